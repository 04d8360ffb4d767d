"""GGUF files of many architectures: what they hold, converted, runs in mlx-lm as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from factory import CHAT_TEMPLATE
from gguf import GGMLQuantizationType as Type
from gguf_zoo import ARCHITECTURES, write_zoo_gguf
from grids import only
from test_gguf import QWEN_2, bpe, describe_bpe, odd_texts, splitter
from zoo import make_model

import mlx_skipless
from mlx_skipless.checkpoints.gguf_architectures import find_architecture
from mlx_skipless.checkpoints.gguf_config import make_config
from mlx_skipless.checkpoints.gguf_file import GGUFStore
from mlx_skipless.checkpoints.gguf_metadata import Metadata
from mlx_skipless.conversion.convert import convert
from mlx_skipless.errors import UserError

# What GGUF files of an architecture always are, or what mlx-lm's class cannot tell.
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
    "beta_slow": 1.0,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "llama": {"rope_scaling": None},
    "mistral": {"rope_scaling": YARN},
    "ministral3": {"tie_word_embeddings": False},
    "qwen3_moe": {"mlp_only_layers": []},
}
SHOWN = {"gemma3_text", "gpt_oss", "ministral3", "phi3", "smollm3"}


def make(folder: Path, name: str, **changes: Any) -> None:
    """A random model of an architecture; a Mistral is a Llama by another name."""
    changes = CHANGES.get(name, {}) | {"vocab_size": 258} | changes
    make_model(folder, "llama" if name == "mistral" else name, **changes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))
    weights = mx.load(str(folder / "model.safetensors"))
    if config["tie_word_embeddings"] and weights.pop("lm_head.weight", None) is not None:
        mx.save_safetensors(str(folder / "model.safetensors"), weights)


def load(folder: Path) -> Any:
    model = mlx_lm.utils.load_model(folder)[0]
    model.set_dtype(mx.float32)
    return model


@pytest.mark.parametrize("name", only(SHOWN, sorted(ARCHITECTURES)))
def test_float16_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    make(tmp_path / "hf", name, dtype="float16")
    write_zoo_gguf(tmp_path / "model.gguf", tmp_path / "hf", lambda _: Type.F16)

    report = convert(tmp_path / "model.gguf", tmp_path / "out", verify=False)

    assert report.stock and not report.notes[1:]
    before, after = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("hf", "out"))
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert after[key].dtype == mx.float16
        slack = 2**-24 if name.startswith("gemma") and key.endswith("norm.weight") else 0
        assert mx.abs(array.astype(mx.float32) - after[key]).max().item() <= slack, key
    source, result = load(tmp_path / "hf"), load(tmp_path / "out")
    tokens = mx.array(np.random.default_rng(0).integers(0, 258, (1, 40)))
    difference = mx.abs(source(tokens) - result(tokens)).max().item()
    assert difference <= (1e-3 if name.startswith("gemma") else 0)


def write_with_tokenizer(tmp_path: Path, name: str, rule: str) -> Path:
    """A model whose tokenizer cuts by a rule, and begins no text."""
    make(tmp_path / "hf", name, dtype="float16", vocab_size=1600)
    original = bpe(splitter(QWEN_2))

    def describe(writer: gguf.GGUFWriter) -> None:
        for key in [key for key in writer.kv_data[0] if key.startswith("tokenizer.")]:
            del writer.kv_data[0][key]
        describe_bpe(writer, original, rule)
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHAT_TEMPLATE)

    write_zoo_gguf(tmp_path / "m.gguf", tmp_path / "hf", lambda _: Type.F16, describe=describe)
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("name", only({"qwen2"}, sorted(ARCHITECTURES)))
def test_tokens_are_the_files(name: str, tmp_path: Path) -> None:
    """transformers chooses a tokenizer's class by the model's type."""
    file = write_with_tokenizer(tmp_path, name, "qwen2")
    direct = GGUFStore(file).tokenizer()
    assert direct is not None
    convert(file, tmp_path / "out", verify=False)
    tokenizer = mlx_lm.utils.load_tokenizer(tmp_path / "out")
    for text in odd_texts(60):
        assert tokenizer.encode(text) == direct(text).input_ids, repr(text)
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(tmp_path: Path) -> None:
    file = write_with_tokenizer(tmp_path, "qwen2", "llama-bpe")
    with pytest.raises(UserError, match="for a qwen2 by a rule of its own"):
        convert(file, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_plan_knows_what_stays_packed(tmp_path: Path) -> None:
    """Without unpacking anything."""
    make(tmp_path / "hf", "gemma3_text", dtype="float16")
    write_zoo_gguf(tmp_path / "m.gguf", tmp_path / "hf", lambda _: Type.Q4_0)
    plan = convert(tmp_path / "m.gguf", dry_run=True)
    done = convert(tmp_path / "m.gguf", tmp_path / "out", verify=False)
    assert plan.kept_packed and plan.notes == done.notes[:1]
    assert plan.packings == done.packings


# What is wrong with a file, and what is said of it.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"lost": "model.layers.1.mlp.router.weight"}, "no tensor .*1.mlp.router.weight"),
    "no head": ({"lost": "lm_head.weight"}, "no tensor lm_head.weight"),
    "no embedding": ({"lost": "model.embed_tokens.weight"}, "no tensor token_embd"),
    "shape": ({"shapes": {"model.layers.0.self_attn.q_proj.weight": (64, 64)}}, "has shape"),
    "experts": ({"key": ("expert_count", 8)}, "has shape"),
    "no experts": ({"key": ("expert_count", 0)}, "expert_count = 0, which no model has"),
    "chosen": ({"key": ("expert_used_count", 64)}, "expert_used_count = 64, which no model"),
    "none chosen": ({"key": ("expert_used_count", 0)}, "expert_used_count = 0, which no"),
    "huge": ({"key": ("expert_count", 1 << 30)}, "which no model has"),
    "layers": ({"key": ("block_count", 3)}, "that a gpt_oss of its metadata does not use"),
    "more layers": ({"key": ("block_count", 1 << 31)}, "which no model has"),
    "some layers": ({"key": ("block_count", 1 << 20)}, "must be a whole number from 1 to 2,048"),
    "heads": ({"key": ("attention.head_count", 3)}, "has shape|makes no network"),
    "no heads": ({"key": ("attention.head_count", 0)}, "head_count = 0, which no model has"),
    "width": ({"key": ("embedding_length", 0)}, "embedding_length = 0, which no model has"),
    "odd width": ({"key": ("embedding_length", 96)}, "has shape"),
    "window": ({"key": ("attention.sliding_window_pattern", 3)}, "not supported"),
    "unknown": ({"key": ("attention.clamp_kqv", 8)}, "clamp_kqv = 8, which is not supported"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_contradicts_itself_is_refused(
    case: str, gpt_oss: Path, tmp_path: Path
) -> None:
    options, complaint = BROKEN[case]
    options = dict(options)
    if key := options.pop("key", None):

        def describe(writer: gguf.GGUFWriter) -> None:
            writer.kv_data[0].pop(f"gpt-oss.{key[0]}", None)
            writer.add_uint32(f"gpt-oss.{key[0]}", key[1])

        options["describe"] = describe
    write_zoo_gguf(tmp_path / "m.gguf", gpt_oss, lambda _: Type.F16, **options)
    with pytest.raises(UserError, match=complaint) as error:
        convert(tmp_path / "m.gguf", tmp_path / "out", verify=False)
    said = str(error.value)
    assert "\n" not in said and ("m.gguf" in said or "config.json" in said)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss")
    make(folder, "gpt_oss", dtype="float16")
    return folder


def test_a_disk_without_room_is_told(tmp_path: Path, gpt_oss: Path, monkeypatch: Any) -> None:
    write_zoo_gguf(tmp_path / "m.gguf", gpt_oss, lambda _: Type.F16)
    usage = shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 18)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"unpacked beside .* takes 0\.00 GB"):
        convert(tmp_path / "m.gguf", tmp_path / "out", verify=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(tmp_path / "m.gguf", tmp_path / "out", verify=False)


def test_what_is_not_known_of_an_architecture_is_said_before_it_is_unpacked(
    tmp_path: Path, gpt_oss: Path, monkeypatch: Any
) -> None:
    write_zoo_gguf(tmp_path / "m.gguf", gpt_oss, lambda _: Type.F16)
    monkeypatch.setattr(GGUFStore, "decode", None)
    with pytest.raises(UserError, match="--remove q: that is not known of a gpt_oss"):
        convert(tmp_path / "m.gguf", tmp_path / "out", remove="q")
    with pytest.raises(UserError, match="`convert` it first"):
        mlx_skipless.analyze(tmp_path / "m.gguf")


# A key that is gone, by the architecture, and what is said of that; None: it has a meaning.
GONE: list[tuple[str, str, str | None]] = [
    *((name, "feed_forward_length", "does not say") for name in ("llama", "gemma2", "phi3")),
    *((name, "expert_used_count", "does not say") for name in ("mixtral", "gpt_oss", "qwen3_moe")),
    ("gpt_oss", "attention.sliding_window", "does not say"),
    ("gpt_oss", "expert_feed_forward_length", "does not say"),
    ("qwen3_moe", "context_length", "does not say"),
    ("phi3", "rope.scaling.original_context_length", "does not say"),
    ("gemma3_text", "attention.key_length", None),
]
WRONG: list[tuple[str, str, Any]] = [
    ("llama", "attention.sliding_window", "x"),
    ("gpt_oss", "attention.sliding_window", 0),
    ("gemma3_text", "rope.scaling.factor", -2.0),
    ("gemma3_text", "rope.scale_linear", -2.0),
    ("gemma3_text", "attention.layer_norm_rms_epsilon", -1.0),
    ("phi3", "rope.scaling.original_context_length", 1),
    ("mixtral", "expert_used_count", 5),
]


def rewrite(file: Path, key: str, value: Any) -> None:
    """Write a file again with another value of a key of its architecture's; None: without."""
    reader = gguf.GGUFReader(file)
    name = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(file.with_suffix(".new"), name)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.name == f"{name}.{key}":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    if value is not None:
        kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32}
        kind = kinds.get(type(value), gguf.GGUFValueType.FLOAT32)
        writer.add_key_value(f"{name}.{key}", value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)


def make_file(name: str, tmp_path: Path) -> Path:
    changes = {"decoder_sparse_step": 1, "mlp_only_layers": []} if name == "qwen3_moe" else {}
    make(tmp_path / "hf", name, dtype="float16", **changes)
    write_zoo_gguf(tmp_path / "m.gguf", tmp_path / "hf", lambda _: Type.F16)
    return tmp_path / "m.gguf"


@pytest.mark.parametrize(("name", "key", "complaint"), GONE)
def test_a_key_that_is_gone(name: str, key: str, complaint: str | None, tmp_path: Path) -> None:
    file = make_file(name, tmp_path)
    rewrite(file, key, None)
    if complaint is None:  # llama.cpp takes the stream's share
        rewrite(file, "attention.value_length", None)
        rewrite(file, "rope.dimension_count", None)
        config = GGUFStore(file).config
        assert config["head_dim"] == config["hidden_size"] // config["num_attention_heads"]
        return
    with pytest.raises(UserError, match=f"{complaint} .*{key}, which its network needs"):
        convert(file, tmp_path / "out", verify=False)


@pytest.mark.parametrize(("name", "key", "value"), WRONG)
def test_a_value_that_no_network_has(name: str, key: str, value: Any, tmp_path: Path) -> None:
    file = make_file(name, tmp_path)
    rewrite(file, key, value)
    with pytest.raises(UserError, match=f"{key} = {value!r}, which no model has"):
        convert(file, tmp_path / "out", verify=False)


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_queries_by_the_share_of_a_head(name: str, layers: int) -> None:
    """What llama.cpp knows by the number of layers: the file has no key for it."""
    own = {"embedding_length": 64, "attention.head_count": 4, "attention.key_length": 32,
           "feed_forward_length": 96, "attention.layer_norm_rms_epsilon": 1e-6}  # fmt: skip
    for count, scalar in ((layers, 16), (layers - 1, 32)):
        fields: dict[str, Any] = {f"{name}.{key}": value for key, value in own.items()}
        fields |= {"general.architecture": name, f"{name}.block_count": count}
        metadata = Metadata(fields.get, tuple(fields), "m.gguf")
        config = make_config(metadata, find_architecture(metadata), 258, True, {})
        assert config["query_pre_attn_scalar"] == scalar


def test_what_sees_pictures_is_left_out(tmp_path: Path) -> None:
    """Ollama keeps it in the same file."""
    make(tmp_path / "hf", "gemma3_text", dtype="float16")

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("gemma3.vision.block_count", 2)
        writer.add_uint32("gemma3.mm.tokens_per_image", 256)
        for name in ("v.blk.0.attn_q.weight", "mm.input_projection.weight"):
            writer.add_tensor(name, np.zeros((8, 8), np.float32))

    write_zoo_gguf(tmp_path / "m.gguf", tmp_path / "hf", lambda _: Type.F16, describe=describe)
    out = "o" * 250  # as long as a name may be
    report = convert(tmp_path / "m.gguf", tmp_path / out, verify=False)
    assert report.notes == ("what sees pictures is left out: the result reads text alone",)
    before, after = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("hf", out))
    assert before.keys() == after.keys()
