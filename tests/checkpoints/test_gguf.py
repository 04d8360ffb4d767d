"""GGUF files: tensors of every type, metadata, tokenizers, and what is refused."""

from __future__ import annotations

import functools
import io
import json
import math
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import sentencepiece
from factory import CHAT_TEMPLATE, make_llama
from gguf import GGMLQuantizationType as Type
from gguf_blocks import BLOCKS, draw_blocks
from gguf_maker import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    add_byte_tokenizer,
    gguf_name,
    rotary_heads,
    side_by_side,
    write_gguf,
)
from reference import Config, Weights
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import mlx_skipless
from mlx_skipless.checkpoints import gguf_reader
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.checkpoints.gguf_file import GGUFStore
from mlx_skipless.checkpoints.gguf_tokenizer import find_ends
from mlx_skipless.checkpoints.tokenizer import carry_tokenizer
from mlx_skipless.conversion.convert import convert
from mlx_skipless.errors import UserError


def read_all(source: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(source)
    arrays = checkpoint.read(checkpoint.store.shapes)
    return {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}


# Tensors


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (Type.F32, "float32", 0),
        (Type.F16, "float16", 2**-11),
        (Type.BF16, "bfloat16", 2**-8),
        (Type.Q8_0, "float16", 2**-7),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_llama_reads_back_as_it_was(tmp_path: Path, kind: Type, dtype: str, tolerance: float):
    config, weights = make_llama(tmp_path / "hf", attention_bias=True)
    write_gguf(tmp_path / "model.gguf", config, weights, kind=kind)

    read = read_all(tmp_path / "model.gguf")

    assert read.keys() == weights.keys()
    for name, values in weights.items():
        assert np.abs(read[name] - values).max() <= tolerance * np.abs(values).max(), name
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.dtype == getattr(mx, dtype)
    assert checkpoint.packing == ("GGUF Q8_0" if kind == Type.Q8_0 else None)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Weights]:
    """A model whose rows hold whole blocks of any type."""
    folder = tmp_path_factory.mktemp("wide")
    return make_llama(folder, hidden_size=256, intermediate_size=256, num_hidden_layers=1)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_any_block_reads_as_the_format_defines(tmp_path: Path, wide, kind: Type):
    config, weights = wide
    decode, _ = BLOCKS[kind]
    rng = np.random.default_rng(0)
    blocks = {
        name: draw_blocks(kind, values.size, rng)
        for name, values in weights.items()
        if values.ndim == 2
    }
    raw = {name: b.reshape(len(weights[name]), -1) for name, b in blocks.items()}
    write_gguf(tmp_path / "model.gguf", config, weights, kind=kind, raw=raw)

    read = read_all(tmp_path / "model.gguf")

    for name in raw:
        expected = decode(blocks[name]).reshape(weights[name].shape)
        heads = rotary_heads(name, config)
        found = read[name] if heads is None else side_by_side(read[name], heads)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=name)
    assert open_checkpoint(tmp_path / "model.gguf").packing == f"GGUF {kind.name}"


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.IQ4_XS], ids=lambda kind: kind.name)
def test_types_that_only_gguf_decodes(tmp_path: Path, wide, kind: Type):
    """Their values are gguf's word; that all of them are read, and in order, is checked."""
    config, weights = wide
    name = "model.layers.0.self_attn.v_proj.weight"
    size, length = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weights[name].shape
    bytes_of_row = columns // size * length
    blocks = np.random.default_rng(0).integers(0, 60, (rows, bytes_of_row), dtype=np.uint8)
    write_gguf(tmp_path / "model.gguf", config, weights, kind=kind, raw={name: blocks})

    read = read_all(tmp_path / "model.gguf")

    np.testing.assert_array_equal(read[name], gguf.quants.dequantize(blocks, kind))


# Metadata


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """Llama 3.1's: wavelengths over 8192 tokens by ``factor``, under 2048 not at all."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_known_by_its_table(tmp_path: Path, factor: float):
    config, weights = make_llama(tmp_path / "hf", rope_theta=500000.0)
    factors = llama3_factors(config["head_dim"], config["rope_theta"], factor)
    write_gguf(tmp_path / "model.gguf", config, weights, extra={"rope_freqs.weight": factors})

    checkpoint = open_checkpoint(tmp_path / "model.gguf")

    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_a_scaling_of_another_table_is_refused(tmp_path: Path):
    config, weights = make_llama(tmp_path / "hf", rope_theta=500000.0)
    factors = llama3_factors(config["head_dim"], config["rope_theta"], 8.0)
    factors[1] = 3.0
    write_gguf(tmp_path / "model.gguf", config, weights, extra={"rope_freqs.weight": factors})
    with pytest.raises(UserError, match="not Llama 3's"):
        open_checkpoint(tmp_path / "model.gguf")


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.5)


def old_linear(writer: gguf.GGUFWriter) -> None:
    writer.add_float32("llama.rope.scale_linear", 2.5)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def yarn_with(**settings: float) -> Callable[[gguf.GGUFWriter], None]:
    def describe(writer: gguf.GGUFWriter) -> None:
        yarn(writer)
        for key, value in settings.items():
            key = f"llama.rope.scaling.{key}"
            writer.kv_data[0].pop(key, None)
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)

    return describe


@pytest.mark.parametrize(
    ("describe", "scaling"),
    [
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE), None),
        (linear, {"rope_type": "linear", "factor": 2.5}),
        (old_linear, {"rope_type": "linear", "factor": 2.5}),
        (yarn, YARN),
        (yarn_with(beta_fast=16.0, beta_slow=2.0), YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
        (yarn_with(yarn_beta_fast=16.0), YARN | {"beta_fast": 16.0}),
        (yarn_with(yarn_beta_fast=32.0, yarn_beta_slow=1.0), YARN),  # what a silent file means
        (yarn_with(attn_factor=1.0, yarn_ext_factor=1.0, yarn_log_multiplier=0.0), YARN),
        (yarn_with(original_context_length=0), YARN | {"original_max_position_embeddings": 512}),
    ],
    ids=["none", "linear", "old linear", "yarn", "betas", "new betas", "usual", "1", "context"],
)
def test_rope_scaling(tmp_path: Path, describe: Callable, scaling: Config | None):
    config, weights = make_llama(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", config, weights, describe=describe)
    assert open_checkpoint(tmp_path / "model.gguf").config.get("rope_scaling") == scaling


# A key of the network, a value that makes another network, and one that says what every Llama says.
KEYS: dict[str, tuple[Any, Any]] = {
    "llama.rope.scaling.attn_factor": (1.2, 1.0),
    "llama.rope.scaling.yarn_attn_factor": (0.7, 1.0),
    "llama.rope.scaling.yarn_ext_factor": (0.5, 0.0),
    "llama.rope.scaling.yarn_log_multiplier": (0.1, 0.0),
    "llama.rope.scaling.alpha": (1000.0, 0.0),
    "llama.rope.freq_base_swa": (1e6, 0.0),
    "llama.rope.dimension_sections": ([16, 24, 24, 0], [0][:0]),
    "llama.attention.scale": (0.1, 8**-0.5),
    "llama.attention.sliding_window": (64, 512),
    "llama.attention.causal": (False, True),
    "llama.attention.clamp_kqv": (8.0, 0.0),
    "llama.attention.max_alibi_bias": (8.0, 0.0),
    "llama.attention.temperature_length": (8192, 0),
    "llama.attention.value_length": (16, 8),
    "llama.attention.head_count": ([4, 2], [4, 4]),
    "llama.attention.head_count_kv": ([2, 1], [2, 2]),
    "llama.feed_forward_length": ([32, 16], [32, 32]),
    "llama.attn_logit_softcapping": (50.0, 0.0),
    "llama.final_logit_softcapping": (30.0, 0.0),
    "llama.logit_scale": (0.0625, 1.0),
    "llama.residual_scale": (0.22, 1.0),
    "llama.embedding_scale": (12.0, 1.0),
    "llama.use_parallel_residual": (True, False),
    "llama.expert_count": (8, 0),
    "llama.expert_shared_count": (1, 0),
    "llama.pooling_type": (1, 0),
    "llama.nobody.knows.this": ("yet", ""),
}


def set_key(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    def describe(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        if value != []:  # which gguf does not write
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)

    return describe


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_changes_the_network_is_refused_and_not_where_it_does_not(
    tmp_path: Path, small, key: str
):
    _, config, weights = small
    other, usual = KEYS[key]
    write_gguf(tmp_path / "other.gguf", config, weights, describe=set_key(key, other))
    with pytest.raises(UserError, match=r"not supported|does not say llama\.expert_used_count"):
        open_checkpoint(tmp_path / "other.gguf")
    write_gguf(tmp_path / "usual.gguf", config, weights, describe=set_key(key, usual))
    checkpoint = open_checkpoint(tmp_path / "usual.gguf")
    assert checkpoint.args == open_checkpoint(small[0]).args


def test_norms_without_an_epsilon_are_refused(tmp_path: Path, small):
    """Each family's config has another default."""
    _, config, weights = small
    key = "llama.attention.layer_norm_rms_epsilon"
    write_gguf(tmp_path / "m.gguf", config, weights, describe=lambda w: w.kv_data[0].pop(key))
    with pytest.raises(UserError, match=rf"m\.gguf does not say {key}"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("kind", "complaint"), [("adapter", "'adapter'"), ("mmproj", "'mmproj'"), ("imatrix", "type")]
)
def test_a_gguf_file_of_something_else_is_called_by_its_name(
    tmp_path: Path, small, kind: str, complaint: str
):
    _, config, weights = small
    write_gguf(tmp_path / "model.gguf", config, weights, describe=lambda w: w.add_type(kind))
    with pytest.raises(UserError, match=f"no model.*{complaint}"):
        open_checkpoint(tmp_path / "model.gguf")


def test_two_scalings_at_once_are_refused(tmp_path: Path):
    config, weights = make_llama(tmp_path / "hf", rope_theta=500000.0)
    table = {"rope_freqs.weight": llama3_factors(config["head_dim"], config["rope_theta"], 8.0)}
    for describe in (linear, yarn):
        write_gguf(tmp_path / "m.gguf", config, weights, extra=table, describe=describe)
        with pytest.raises(UserError, match="by a table"):
            open_checkpoint(tmp_path / "m.gguf")


def test_a_tied_head_and_a_head_width_of_its_own(tmp_path: Path):
    config, weights = make_llama(tmp_path / "hf", tie_word_embeddings=True, head_dim=24)

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(24)
        writer.add_value_length(24)

    write_gguf(tmp_path / "model.gguf", config, weights, describe=describe)
    args = open_checkpoint(tmp_path / "model.gguf").args
    assert args.tie_word_embeddings and args.head_dim == 24


# Names of files


@pytest.mark.parametrize("name", ["M.GGUF", "sha256-0123abcd", "model.bin", "model", "m.gguf.1"])
def test_a_file_is_known_by_its_first_bytes(tmp_path: Path, small, name: str):
    shutil.copyfile(small[0], tmp_path / name)
    assert open_checkpoint(tmp_path / name).args == open_checkpoint(small[0]).args


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path, small):
    shutil.copyfile(small[0], tmp_path / "M.Q8_0.GGUF")
    (tmp_path / "README.md").write_text("what it is")
    (tmp_path / "config.json").write_text("{}")  # some repositories have one beside it
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    report = convert(tmp_path, tmp_path / "out", verify=False)
    assert report.params_before and (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match=r"`convert.py --model .*M.Q8_0.GGUF` makes one"):
        mlx_skipless.load(tmp_path)
    shutil.copyfile(small[0], tmp_path / "another.gguf")
    with pytest.raises(UserError, match=r"holds 2 GGUF files, M.Q8_0.GGUF, another.gguf: give one"):
        open_checkpoint(tmp_path)
    for i, old in enumerate(("M.Q8_0.GGUF", "another.gguf"), start=1):
        (tmp_path / old).rename(tmp_path / f"m-0000{i}-of-00002.gguf")
    with pytest.raises(UserError, match=r"2 parts .*--merge m-00001-of-00002.gguf OUT.gguf` and"):
        open_checkpoint(tmp_path)


# Conversion


def test_a_conversion_equals_that_of_the_hugging_face_folder(tmp_path: Path):
    config, weights = make_llama(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", config, weights, describe=add_byte_tokenizer)
    reports = {}
    for source, out in (("hf", "from_hf"), ("model.gguf", "from_gguf")):
        reports[out] = convert(tmp_path / source, tmp_path / out, skipless=True, remove="p", seed=1)

    hf, other = (mx.load(str(tmp_path / out / "model.safetensors")) for out in reports)
    assert hf.keys() == other.keys()
    assert all(mx.array_equal(hf[name], other[name]) for name in hf)
    assert not any("o_proj" in name for name in other)
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in reports]
    assert configs[0] == configs[1]
    assert reports["from_gguf"].verification == reports["from_hf"].verification
    tokenizers = [mlx_lm.utils.load_tokenizer(tmp_path / out) for out in reports]
    text = "Zwölf Boxkämpfer jagen Viktor <s> quer über\n\n\tden Sylter Deich; it's 12345."
    messages = [{"role": "user", "content": text}]
    for call in (
        lambda t: t.encode(text),
        lambda t: t.decode(t.encode(text)),
        lambda t: t.apply_chat_template(messages, add_generation_prompt=True),
        lambda t: (t.bos_token, t.eos_token, t.eos_token_ids, type(t.detokenizer)),
    ):
        assert call(tokenizers[0]) == call(tokenizers[1])


def test_a_packed_file_converts_and_says_so(tmp_path: Path):
    config, weights = make_llama(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", config, weights, kind=Type.Q8_0)
    report = convert(tmp_path / "model.gguf", tmp_path / "out", fold_norms=True, dtype="float32")
    assert report.packing == "GGUF Q8_0" and report.stock
    assert report.verification is not None and report.verification.max_rel_logit_error < 1e-4
    assert not (tmp_path / "out" / "tokenizer.json").exists()  # the file has none


# What is refused


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Weights]:
    folder = tmp_path_factory.mktemp("small")
    config, weights = make_llama(
        folder / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8
    )
    write_gguf(folder / "model.gguf", config, weights, describe=add_byte_tokenizer)
    return folder / "model.gguf", config, weights


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, small):
    content = small[0].read_bytes()
    file = tmp_path / "model.gguf"
    last = len(content) - 64
    for length in [*range(0, 400, 7), *np.linspace(400, last, 60, dtype=int)]:
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"model\.gguf"):
            open_checkpoint(file)


def test_a_damaged_header_is_refused_or_harmless(tmp_path: Path, small):
    content = bytearray(small[0].read_bytes())
    header = gguf.GGUFReader(small[0]).data_offset
    file = tmp_path / "model.gguf"
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        at, value = rng.randrange(header), rng.randrange(256)
        file.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
        try:
            checkpoint = open_checkpoint(file)
            checkpoint.read(checkpoint.store.shapes)
            carry_tokenizer(checkpoint, tmp_path, stock=False, trust_remote_code=False)
        except UserError as error:
            assert "model.gguf" in str(error) or "config.json" in str(error), error
            refused += 1
    assert refused > 30


def test_the_other_byte_order_is_refused(tmp_path: Path, small):
    """gguf takes its blocks for this machine's."""
    _, config, weights = small
    usual = gguf.GGUFWriter

    def swapped(file: Path, architecture: str) -> gguf.GGUFWriter:
        return usual(file, architecture, endianess=gguf.GGUFEndian.BIG)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", swapped)
        write_gguf(tmp_path / "model.gguf", config, weights)
    with pytest.raises(UserError, match="byte order"):
        open_checkpoint(tmp_path / "model.gguf")


def test_absurd_amounts_of_metadata(tmp_path: Path, small, monkeypatch: pytest.MonkeyPatch):
    _, config, weights = small

    def nested(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("deep", 0)

    write_gguf(tmp_path / "model.gguf", config, weights, describe=nested)
    content = (tmp_path / "model.gguf").read_bytes()
    before, after = content.split(b"deep")
    array = struct.pack("<IQ", 9, 1)  # of one, an array of one, ...
    deep = struct.pack("<I", 9) + array * 2000 + struct.pack("<IQB", 0, 1, 7)
    (tmp_path / "model.gguf").write_bytes(before + b"deep" + deep + after[8:])
    with pytest.raises(UserError, match="arrays of arrays"):
        open_checkpoint(tmp_path / "model.gguf")
    for limit, what in (("MOST_VALUES", "values"), ("MOST_KEYS", "keys"), ("MOST_TENSORS", "ten")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{what}.* no model"):
            patch.setattr(gguf_reader, limit, 10)
            open_checkpoint(small[0])


def test_an_array_longer_than_the_file_ends_at_once(tmp_path: Path, small):
    content = small[0].read_bytes()
    at = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    assert struct.unpack_from("<Q", content, at) == (258,)
    file = tmp_path / "model.gguf"
    file.write_bytes(content[:at] + struct.pack("<Q", 1 << 60) + content[at + 8 :])
    with pytest.raises(UserError, match="truncated"):
        open_checkpoint(file)


@pytest.mark.parametrize(("what", "said"), [("type", "999"), ("version", "version 99")])
def test_a_file_that_is_newer_than_the_gguf_package(what: str, said: str, tmp_path: Path, small):
    content, file = small[0].read_bytes(), tmp_path / "model.gguf"
    name = b"blk.0.attn_q.weight"
    at = 4 if what == "version" else content.index(name) + len(name) + 4 + 2 * 8
    file.write_bytes(content[:at] + struct.pack("<I", 99 if at == 4 else 999) + content[at + 4 :])
    with pytest.raises(UserError, match=f"does not know .*{said}.*: update gguf"):
        open_checkpoint(file)


def test_a_tensor_of_another_shape_is_against_the_metadata(tmp_path: Path):
    config, weights = make_llama(tmp_path / "hf")
    name = "model.layers.0.mlp.up_proj.weight"
    write_gguf(tmp_path / "model.gguf", config, {**weights, name: weights[name][:-1]})
    with pytest.raises(UserError, match=r"has shape \(95, 64\), its metadata asks for \(96, 64\)"):
        open_checkpoint(tmp_path / "model.gguf").validate()


def test_no_gguf_file_at_all(tmp_path: Path):
    for content in (b"", b"GGUF", b"PK\3\4" + bytes(100), bytes(1000)):
        (tmp_path / "model.gguf").write_bytes(content)
        with pytest.raises(UserError, match="no GGUF file"):
            open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"architecture": "bert"}, "'bert'; supported: gemma, .*llama"),
        ({"describe": lambda w: w.add_expert_count(8)}, "does not say llama.expert_used_count"),
        ({"describe": lambda w: w.add_uint16("split.count", 3)}, "one part of several"),
        ({"describe": lambda w: w.add_key_length(16)}, "rotates 8 of 16"),
        (
            {"describe": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)},
            "longrope",
        ),
        ({"extra": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "blk.0.attn_q_norm"),
        ({"extra": {"model.norm.weight": np.ones(32, np.float32)}}, "two names"),
        ({"extra": {"blk.1.attn_q.weight": np.ones((32, 32), np.float32)}}, "blk.1|layers.1"),
    ],
    ids=[
        "architecture",
        "experts",
        "split",
        "partial",
        "longrope",
        "extra",
        "twice",
        "extra layer",
    ],
)
def test_what_is_no_llama_is_refused(
    tmp_path: Path, small, options: dict[str, Any], complaint: str
):
    _, config, weights = small
    write_gguf(tmp_path / "model.gguf", config, weights, **options)
    with pytest.raises(UserError, match=complaint):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "lost", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_missing_tensor_is_named(tmp_path: Path, small, lost: str):
    _, config, weights = small
    write_gguf(tmp_path / "model.gguf", config, {n: w for n, w in weights.items() if n != lost})
    with pytest.raises(UserError, match=f"{gguf_name(lost)}|{lost}"):
        open_checkpoint(tmp_path / "model.gguf")


def test_a_number_type_that_cannot_be_read_is_named(tmp_path: Path, small):
    _, config, weights = small
    name = "model.layers.0.self_attn.v_proj.weight"
    others = {n: w for n, w in weights.items() if n != name}
    write_gguf(tmp_path / "model.gguf", config, others, extra={gguf_name(name): weights[name]})
    with pytest.raises(UserError, match="F64"):
        read_all(tmp_path / "model.gguf")


# Tokenizers


def tokenizer_of(
    tmp_path: Path, small, describe: Callable[[gguf.GGUFWriter], Any]
) -> PreTrainedTokenizerFast:
    """What a converted model gets from a GGUF file so described, read back from its folder."""
    _, config, weights = small
    weights = dict(weights)
    rows = np.zeros((2000, config["hidden_size"]), np.float32)
    weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = rows
    config = config | {"vocab_size": len(rows)}
    write_gguf(tmp_path / "model.gguf", config, weights, describe=describe)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    assert carry_tokenizer(checkpoint, folder, stock=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    direct = checkpoint.store.tokenizer()
    assert direct("a b").input_ids == tokenizer("a b").input_ids
    return tokenizer


SYLLABLES = ["ka", "lo", "mi", "ter", "ün", "é", "sch", "a", "aa", "日本", "語", "The", "WORD"]


def some_text(rng: random.Random, words: int) -> str:
    def word() -> str:
        kind = rng.random()
        if kind < 0.7:
            return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))
        if kind < 0.8:
            return str(rng.randrange(10 ** rng.randint(1, 9)))
        return rng.choice(
            ["it's", "WE'LL", "...", "!?\n", "\n\n", "\t", "a_b", "x = (y + 1);\n//", "½"]
        )

    return "".join(rng.choice([" ", " ", " ", "  ", "    ", ""]) + word() for _ in range(words))


def odd_texts(count: int) -> Iterator[str]:
    """Ordinary text, runs of few characters, and any characters at all."""
    rng = random.Random(7)
    yield from ("", " ", "  ", "\n", "a", " a", "▁", "a▁b ▁", "e\u0301é")
    for _ in range(count):
        yield some_text(rng, rng.randint(1, 20))
        yield "".join(rng.choices([" ", "a", "aa", "é", "日"], k=rng.randint(0, 40)))
        ranges = [(32, 127), (1, 0x3000), (0xE000, 0x1FFFF)]
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 30)))


def train_sentencepiece(rng: random.Random, **options: Any) -> io.BytesIO:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([some_text(rng, 20).replace("\n", " ") for _ in range(600)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=0.999,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model


@pytest.mark.parametrize("prefix", [True, False, None], ids=["prefix", "no prefix", "unsaid"])
def test_a_sentencepiece_model_tokenizes_as_sentencepiece_does(tmp_path: Path, small, prefix):
    rng = random.Random(0)
    model = train_sentencepiece(
        rng,
        add_dummy_prefix=prefix is not False,
        allow_whitespace_only_pieces=True,
    )
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(spm.get_piece_size())

    def type_of(i: int) -> int:
        if spm.is_unknown(i):
            return UNKNOWN
        return CONTROL if spm.is_control(i) else BYTE if spm.is_byte(i) else NORMAL

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([spm.id_to_piece(i) for i in pieces])
        writer.add_token_scores([spm.get_score(i) for i in pieces])
        writer.add_token_types([type_of(i) for i in pieces])
        if prefix is not None:
            writer.add_add_space_prefix(prefix)

    tokenizer = tokenizer_of(tmp_path, small, describe)

    assert tokenizer("a").input_ids[0] == spm.bos_id() == tokenizer.bos_token_id
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (spm.eos_id(), spm.unk_id())
    lengths = []
    for text in odd_texts(700):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == spm.encode(text), repr(text)
        assert tokenizer.decode(ids) == spm.decode(ids), repr(text)
        lengths.append(len(ids))
    assert sum(lengths) > 10000
    streaming = mlx_lm.utils.load_tokenizer(tmp_path / "tokenizer").detokenizer
    text = "kalomi  日本 é 123"
    for token in spm.encode(text):
        streaming.add_token(token)
    streaming.finalize()
    assert streaming.text == text


@pytest.mark.parametrize("spaces", [True, False], ids=["runs of spaces", "no runs"])
def test_gemmas_tokens_stay_whole(tmp_path: Path, small, spaces: bool):
    """What SentencePiece calls user-defined: runs of spaces and of line ends, marks of a turn.

    llama.cpp's converter writes spaces as such in these tokens.
    """
    own = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\n\n\n", "<table>"]
    own += ["▁▁", "▁▁▁", "▁▁▁▁"] if spaces else []
    rng = random.Random(0)
    model = train_sentencepiece(
        rng,
        add_dummy_prefix=False,
        user_defined_symbols=own,
    )
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(spm.get_piece_size())
    kinds = dict.fromkeys(own, USER_DEFINED)

    def type_of(i: int) -> int:
        if spm.is_unknown(i):
            return UNKNOWN
        ordinary = BYTE if spm.is_byte(i) else kinds.get(spm.id_to_piece(i), NORMAL)
        return CONTROL if spm.is_control(i) else ordinary

    def text_of(i: int) -> str:
        piece = spm.id_to_piece(i)
        return piece.replace("▁", " ") if type_of(i) == USER_DEFINED else piece

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([text_of(i) for i in pieces])
        writer.add_token_scores([spm.get_score(i) for i in pieces])
        writer.add_token_types([type_of(i) for i in pieces])
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(True)

    tokenizer = tokenizer_of(tmp_path, small, describe)

    turns = "<start_of_turn>user\nka  lo\n\n\n\nmi<end_of_turn>\n"
    for text in (turns, *(text.replace("▁", "") for text in odd_texts(300))):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == spm.encode(text), repr(text)
        assert tokenizer.decode(ids) == spm.decode(ids).replace("▁", " "), repr(text)
    assert tokenizer("a").input_ids[0] == spm.bos_id()


def test_special_tokens_and_what_follows_them(tmp_path: Path, small):
    """As llama.cpp: a space goes before what follows a special token, too."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "<tool>", "<0x41>"]
    types = [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL, NORMAL, USER_DEFINED, BYTE]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, 0.0, 0.0])
        writer.add_token_types(types)
        writer.add_add_eos_token(True)

    tokenizer = tokenizer_of(tmp_path, small, describe)

    ids = tokenizer("ab<tool>a</s>A?").input_ids
    assert [tokens[i] for i in ids] == [
        "<s>", "▁a", "b", "<tool>", "▁a", "</s>", "▁", "<0x41>", "<unk>", "</s>",
    ]  # fmt: skip
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool> a A"
    assert [tokens[i] for i in tokenizer("a", "b").input_ids] == [
        "<s>", "▁a", "</s>", "<s>", "▁", "b", "</s>",
    ]  # fmt: skip


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F "
    "386 388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD "
    "1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 "
    "1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 "
    "2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 "
    "2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F A771-A787 "
    "A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943 "
)  # DeepSeek's letters: the ranges that its tokenizer lists
LETTERS = "".join(
    "-".join(chr(int(end, 16)) for end in found.split("-")) for found in CASED.split()
)
LINES, CHINESE = "[\r\n]", "[一-龥ࠀ-一가-퟿]+"
SEED = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+"
SEED += r"|\s+(?!\S)|\s+"


def splitter(*patterns: str, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in patterns]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


MARKS = "!-/:-~！-／：-～‘-‟　-。"  # noqa: RUF001
DEEPSEEK = splitter(LINES, rf"\s?[{LETTERS}]+", rf"\s?[{MARKS}]+", r"\s+$", CHINESE, digits=True)
DEEPSEEK_CODER = splitter(LINES, r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, digits=True)
VIKING = splitter(r" ?[^(\s|[.,!?…。，、।۔،])]+", digits=True)  # noqa: RUF001


@functools.cache
def unsplit_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE that learnt across words, so that every cut matters to it.

    The last third of its merges is lost: some of its tokens are out of the others' reach.
    """
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.train_from_iterator(
        [some_text(rng, 8) for _ in range(1000)],
        trainers.BpeTrainer(
            vocab_size=1500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>", "<pad>"],
            show_progress=False,
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return model["vocab"], merges[: len(merges) * 2 // 3]


def bpe(pre: pre_tokenizers.PreTokenizer, **options: Any) -> Tokenizer:
    vocab, merges = unsplit_bpe()
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def describe_bpe(writer: gguf.GGUFWriter, tokenizer: Tokenizer, name: str) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)


DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("name", "pre", "whole", "begins"),
    [
        ("gpt-2", GPT_2, False, False),
        ("smollm", DIGITS, False, False),
        ("minerva-7b", DIGITS, False, False),
        ("llama-bpe", splitter(LLAMA_3), True, True),
        ("llama3", splitter(LLAMA_3), True, True),
        ("tekken", splitter(NEMO), True, True),
        ("gpt-4o", splitter(O200K), False, False),
        ("smaug-bpe", splitter(LLAMA_3), False, False),
        ("qwen2", splitter(QWEN_2), False, False),
        ("falcon3", splitter(LLAMA_3), True, True),
        ("deepseek-r1-qwen", splitter(QWEN_2), False, False),
        ("trillion", GPT_2, False, False),
        ("seed-coder", splitter(SEED), False, False),
        ("deepseek-llm", DEEPSEEK, False, False),
        ("deepseek-coder", DEEPSEEK_CODER, False, False),
        ("viking", VIKING, False, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_byte_level_bpe_tokenizes_as_the_original(
    tmp_path: Path, small, name: str, pre, whole: bool, begins: bool
):
    original = bpe(pre, ignore_merges=whole)
    if pre is not GPT_2 and name.endswith(("qwen2", "qwen")):
        original.normalizer = normalizers.NFC()

    tokenizer = tokenizer_of(tmp_path, small, lambda w: describe_bpe(w, original, name))

    for text in odd_texts(300):
        words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert words == pre.pre_tokenize_str(text), repr(text)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == original.encode(text).ids, repr(text)
        assert tokenizer.decode(ids) == original.decode(ids), repr(text)
    assert tokenizer("a").input_ids[: 1 + begins] == [0, tokenizer.vocab["a"]][not begins :]
    assert tokenizer("<s>a</s>", add_special_tokens=False).input_ids[::2] == [0, 1]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>", "</s>", "<pad>",
    )  # fmt: skip


def test_the_file_decides_on_bos_and_eos_and_brings_the_chat_template(tmp_path: Path, small):
    original = bpe(GPT_2)

    def describe(writer: gguf.GGUFWriter) -> None:
        describe_bpe(writer, original, "llama-bpe")
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)
        writer.add_chat_template(CHAT_TEMPLATE)

    tokenizer = tokenizer_of(tmp_path, small, describe)

    assert tokenizer("a").input_ids == [tokenizer.vocab["a"], 1]
    messages = [{"role": "user", "content": "ka"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<s>user: ka\n<s>assistant: "


def test_an_ordinary_word_named_as_padding_stays_one(tmp_path: Path, small):
    original = bpe(GPT_2)
    word = original.token_to_id("!")

    def describe(writer: gguf.GGUFWriter) -> None:
        describe_bpe(writer, original, "gpt-2")
        del writer.kv_data[0]["tokenizer.ggml.padding_token_id"]
        writer.add_pad_token_id(word)

    tokenizer = tokenizer_of(tmp_path, small, describe)
    assert tokenizer("!").input_ids == [word]
    assert tokenizer.decode([word], skip_special_tokens=True) == "!"


TURNS = ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<turn>", "<|im_end|>", "<end_of_turn>"]


def describe_ends(writer: gguf.GGUFWriter, types: int = CONTROL) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", *TURNS]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([NORMAL] * 256 + [CONTROL] + [types] * len(TURNS))
    writer.add_bos_token_id(256)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ({}, []),
        ({"eos": 257}, []),
        ({"eos": 257, "eot": 260}, ["<turn>"]),
        ({"eos": 260, "eom": 3}, ["<turn>", 3]),
        ({"eos": 999, "eot": 260}, ["<turn>"]),
    ],
    ids=str,
)
def test_every_token_that_ends_a_turn_ends_an_answer(tmp_path: Path, small, given, own):
    """Those that the file names, and those that llama.cpp knows by their names."""
    _, config, weights = small

    def describe(writer: gguf.GGUFWriter) -> None:
        describe_ends(writer)
        for name, index in given.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)

    write_gguf(tmp_path / "model.gguf", config, weights, describe=describe)
    for form in ("stock", "own"):
        convert(tmp_path / "model.gguf", tmp_path / form, verify=False, skipless=form == "own")
        expected = {*own} | {token for token in TURNS if token != "<turn>"}
        for load in (mlx_skipless.load, load_in_mlx_lm):
            _, tokenizer = load(tmp_path / form)
            ids = {t if isinstance(t, int) else tokenizer.vocab[t] for t in expected}
            assert tokenizer.eos_token_ids == ids
    first = json.loads((tmp_path / "stock" / "config.json").read_text())["eos_token_id"][0]
    assert first == given.get("eos", 257) or given.get("eos") == 999


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["<|end|>", "<|return|>", "<|call|>", "<|message|>"], ["<|return|>", "<|call|>"]),
        (["<|flush|>", "<|end|>", "<|calls|>"], ["<|flush|>", "<|calls|>"]),
        (["<|end|>", "<|call|>"], ["<|end|>", "<|call|>"]),
        (["</s>", "<|tool_response>", "<turn|>"], ["<|tool_response>", "<turn|>"]),
        (["</s>", "<eos>"], ["</s>", "<eos>"]),
    ],
    ids=["gpt-oss", "Solar Open", "neither", "Gemma 4", "others"],
)
def test_what_ends_a_message_ends_no_answer_where_answers_have_several(
    names: list[str], ends: list[str]
):
    """As llama.cpp has it (`llama-vocab.cpp`), also where the file itself names that token."""
    fields = {"tokenizer.ggml.tokens": ["a", *names], "tokenizer.ggml.eos_token_id": 1}
    found = find_ends(fields.get, 1 + len(names))
    assert {names[i - 1] for i in found} == {*ends} | ({names[0]} if names[0] in ends else set())


@pytest.mark.parametrize(
    ("name", "takes"),
    [("Phi 3 Mini 4k Instruct", True), ("phi-3.5", True), ("Phi3", True), ("A Llama", False)],
)
def test_special_tokens_of_a_phi_3_take_the_white_space_behind_them(
    tmp_path: Path, small, name: str, takes: bool
):
    tokens = ["<unk>", "<s>", "</s>", "▁", "\n", "a", "<|user|>", "<|endoftext|>"]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_name(name)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([UNKNOWN, *[CONTROL] * 2, *[NORMAL] * 3, *[CONTROL] * 2])

    tokenizer = tokenizer_of(tmp_path, small, describe)
    for token in tokens[1:3] + tokens[6:]:
        ids = tokenizer(f"{token}\n a", add_special_tokens=False).input_ids
        cut = takes and token in ("</s>", "<|user|>")
        expected = [token, "▁", "a"] if cut else [token, "▁", "\n", "▁", "a"]
        assert tokenizer.convert_ids_to_tokens(ids) == expected, token


def load_in_mlx_lm(folder: Path) -> Any:
    return mlx_lm.utils.load(str(folder), trust_remote_code=True)


def test_a_token_that_ends_a_turn_is_one_token_whatever_its_type(tmp_path: Path, small):
    tokenizer = tokenizer_of(tmp_path, small, lambda writer: describe_ends(writer, NORMAL))
    assert tokenizer("a<|im_end|>").input_ids[1:] == [256 + 1 + TURNS.index("<|im_end|>")]
    assert len(tokenizer("a<turn>").input_ids) > 2


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({"default": CHAT_TEMPLATE, "tool_use": "tools"}, None),
        ({"tool_use": "tools"}, "tools"),
        ({"a": "x", "b": "y"}, {"default": "x", "a": "x", "b": "y"}),
    ],
    ids=["with a default", "one", "two"],
)
def test_named_chat_templates_come_along(
    templates: dict[str, str], expected: Any, tmp_path: Path, small
):
    """The first one is used where none is the default: else nothing could be."""

    def describe(writer: gguf.GGUFWriter) -> None:
        add_byte_tokenizer(writer)
        del writer.kv_data[0]["tokenizer.chat_template"]
        writer.add_chat_template([{"name": n, "template": t} for n, t in templates.items()])

    tokenizer = tokenizer_of(tmp_path, small, describe)
    assert tokenizer.chat_template == (expected or templates)
    written = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert written


def nested_tokens(count: int) -> list[str]:
    return ["a" * (i + 1) for i in range(count)]


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        (["a" * 1_000_000, "b"], "token of 1,000,000 characters"),
        ([f"{i:0999}" for i in range(5000)], "4,995,000 in all"),
        (nested_tokens(1000), "more merges"),
    ],
    ids=["long", "many", "nested"],
)
def test_absurd_tokens_are_refused_at_once(tmp_path: Path, small, tokens, complaint: str):
    _, config, weights = small

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types([NORMAL] * len(tokens))

    write_gguf(tmp_path / "model.gguf", config, weights, describe=describe)
    started = time.process_time()
    with pytest.raises(UserError, match=complaint):
        open_checkpoint(tmp_path / "model.gguf").store.tokenizer()
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"model": "bert"}, "'bert'; known: gpt2 and llama.*Hugging Face model"),
        ({"pre": "deepseek-v3"}, "'deepseek-v3'.*known: gpt-2.*Hugging Face model"),
        ({"pre": "default"}, "'default'"),
        ({"pre": None}, "rule None"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "list of tokens"),
        ({"tokens": None}, "list of tokens"),
        ({"token_type": [1, 1]}, "list of tokens"),
        ({"merges": ["a"]}, "list of merges"),
        ({"merges": ["a z"]}, "list of merges"),
        ({"model": "llama", "scores": [0.0]}, "token scores"),
        ({"tokens": [str(i) for i in range(300)], "merges": ["1 0"]}, "300 tokens and 264"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else ", ".join(value),
)
def test_a_tokenizer_that_is_unknown_or_broken_is_refused(
    tmp_path: Path, small, metadata: dict[str, Any], complaint: str
):
    _, config, weights = small
    known = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}

    def describe(writer: gguf.GGUFWriter) -> None:
        for key, value in (known | metadata).items():
            add = writer.add_array if isinstance(value, list) else writer.add_string
            if value is not None:
                add(f"tokenizer.ggml.{key}", value)

    write_gguf(tmp_path / "model.gguf", config, weights, describe=describe)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=complaint):
        carry_tokenizer(checkpoint, tmp_path, stock=True, trust_remote_code=False)


def test_a_file_without_a_tokenizer_has_none(tmp_path: Path, small):
    _, config, weights = small
    for describe in (lambda w: None, lambda w: w.add_tokenizer_model("no_vocab")):
        write_gguf(tmp_path / "model.gguf", config, weights, describe=describe)
        assert GGUFStore(tmp_path / "model.gguf").tokenizer() is None
