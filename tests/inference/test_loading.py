"""What is loaded is looked at as what is converted: configs, tensors, adapters, code."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import published
import pytest
import reference
import safetensors.numpy
import zoo
from factory import make_checkpoint, make_gemma, make_llama
from grids import only, product
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import _get_classes
from test_weight_files import SMALL, TOKENS, Tensors, read_file

import mlx_skipless
from mlx_skipless import UserError, load
from mlx_skipless.checkpoints.safetensors import WHOLE
from mlx_skipless.errors import quote_error
from mlx_skipless.inference.loading import load_network
from mlx_skipless.network.parts import tensors_of

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that runs in mlx-lm's own code."""
    make_llama(tmp_path / "model", **SMALL)
    return tmp_path / "model"


@pytest.fixture
def little_memory() -> Iterator[None]:
    """So little that nothing absurd is built."""
    if sys.platform == "darwin":  # which has no such limit
        yield
        return
    kept = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), kept[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, kept)


def refuse(folder: Path, **options: Any) -> str:
    """The one line of a refusal, which is quick."""
    start = time.process_time()
    with pytest.raises(UserError) as refusal:
        load_network(folder, **options)
    assert time.process_time() - start < 5
    (line,) = str(refusal.value).splitlines()
    return line


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


SIZES = ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"]
ABSURD = [0, -1, 10**9, 10**30, True, "32", 2.5]


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(("key", "value"), product(SIZES, ABSURD))
def test_sizes_that_no_network_has(model: Path, key: str, value: Any):
    edit(model, **{key: value})
    assert f'"{key}" in config.json is {value!r}; it must be a whole number' in refuse(model)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 2000}, "2,000, and the files have 21 tensors"),
        ({"num_hidden_layers": 3}, "Missing 9 parameters"),
        ({"num_hidden_layers": 3}, " …): copy all of its weight files, or correct its config.json"),
        ({"num_hidden_layers": 1}, "Received 9 parameters not in model"),
        ({"hidden_size": 64}, "Expected shape"),
        ({"vocab_size": 1 << 22}, "Expected shape (4194304, 32)"),
        ({"num_key_value_heads": 4}, "Expected shape"),
        ({"num_key_value_heads": 10**6}, '"num_key_value_heads"'),
        ({"num_key_value_heads": 0}, "cannot be loaded"),
        ({"num_key_value_heads": 3}, "cannot be loaded"),
        ({"head_dim": 10**9}, '"head_dim" in config.json has 1000000000'),
        ({"head_dim": [8, 10**9]}, '"head_dim" in config.json has 1000000000'),
        ({"head_dim": 1 << 22}, "Expected shape"),
        ({"text_config": {"num_hidden_layers": 10**7}}, '"num_hidden_layers"'),
        ({"model_type": "gpt2", "n_layer": 10**7}, '"n_layer" in config.json has 10000000'),
        ({"model_type": "mixtral", "num_local_experts": 10**8}, '"num_local_experts"'),
        ({"model_type": "nobody"}, "nobody"),
        ({"model_type": ["llama"]}, "cannot be loaded"),
        ({"model_type": "cache"}, "cannot be loaded"),
        ({"model_type": "olmo"}, "cannot be loaded"),
        ({"rope_theta": "x"}, "cannot be loaded"),
        ({"rope_theta": None, "rope_scaling": {"type": "spiral"}}, "spiral"),
        ({"rope_scaling": {"type": "linear"}}, "cannot be loaded"),
        ({"rope_scaling": [1]}, "cannot be loaded"),
        ({"rms_norm_eps": "small"}, "cannot be loaded"),
        ({"layer_types": ["full_attention"]}, "cannot be loaded"),
        ({"architectures": 5}, "cannot be loaded"),
    ],
    ids=str,
)
def test_a_config_of_another_network(model: Path, changes: dict[str, Any], said: str):
    edit(model, **changes)
    assert said in refuse(model)


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        ("of two\n  lines", "of two lines"),
        ("word " * 100, "word " * 60 + "…"),
        ("x" * 400, "x" * 300 + " …"),
        ("", "ValueError"),
    ],
)
def test_what_is_quoted_of_an_error(said: str, quoted: str):
    assert quote_error(ValueError(said)) == quoted


KINDS: list[Any] = [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.bool_]


@pytest.mark.parametrize(("maker", "kind"), product([make_llama, make_checkpoint], KINDS))
def test_numbers_that_no_weights_are(tmp_path: Path, maker: Callable[..., Any], kind: Any):
    maker(tmp_path, **SMALL)
    for name in ("model.embed_tokens.weight", UP, "model.norm.weight"):
        tensors = safetensors.numpy.load_file(tmp_path / WHOLE)
        kept = (tmp_path / WHOLE).read_bytes()
        safetensors.numpy.save_file(tensors | {name: tensors[name].astype(kind)}, tmp_path / WHOLE)
        said = refuse(tmp_path)
        assert name in said and (np.dtype(kind).name.removesuffix("_") in said)
        (tmp_path / WHOLE).write_bytes(kept)


def test_a_type_that_mlx_does_not_read(model: Path):
    tensors = safetensors.numpy.load_file(model / WHOLE)
    safetensors.numpy.save_file(tensors | {UP: tensors[UP].astype(np.float64)}, model / WHOLE)
    assert "F64" in refuse(model)


def test_complex_weights(model: Path):
    tensors = read_file(model / WHOLE)
    mx.save_safetensors(str(model / WHOLE), tensors | {UP: tensors[UP].astype(mx.complex64)})
    assert f"{UP} in {model} is of the type complex64" in refuse(model)


FP8 = "proj.weight"


def put_fp8(file: Path, tensors: Tensors) -> None:
    """Write a file whose projections are floats of 8 bits, with scales of 1."""
    packed = {n: mx.to_fp8(a) for n, a in tensors.items() if n.endswith(FP8)}
    scales = {f"{n}_scale_inv": mx.ones((1, 1)) for n in packed}
    mx.save_safetensors(str(file), tensors | packed | scales)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"dtype":"U8"', b'"dtype":"F8_E4M3"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


ROPE = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3", "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": None, "first_k_dense_replace": 2,
}  # fmt: skip


MINISTRAL = {"model_type": "ministral3", "rope_parameters": ROPE | {"rope_type": "default"}}


@pytest.mark.parametrize("changes", [MINISTRAL, DEEPSEEK], ids=["ministral3", "deepseek_v3"])
def test_floats_of_8_bits(model: Path, changes: dict[str, Any]):
    """mlx-lm's ministral3 multiplies their bytes as if they were numbers; not so here."""
    edit(model, **changes)
    kind, arguments = _get_classes(json.loads((model / "config.json").read_text()))
    own = arguments.from_dict(json.loads((model / "config.json").read_text()))
    tensors = tensors_of(kind(own))
    put_fp8(model / WHOLE, tensors)
    found = load_network(model)[0](TOKENS)
    decoded = {n: mx.from_fp8(mx.to_fp8(a)) for n, a in tensors.items() if n.endswith(FP8)}
    mx.save_safetensors(str(model / WHOLE), tensors | decoded)
    expected = load_network(model)[0](TOKENS)
    assert mx.array_equal(found, expected).item() and expected.std().item() > 0.01


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_is_a_pipe(model: Path, trusted: bool):
    edit(model, model_file="model.py")
    os.mkfifo(model / "model.py")
    said = refuse(model, trust_remote_code=trusted)
    assert ("no regular file" if trusted else "--trust-remote-code") in said


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "additional_chat_templates/a.jinja", WHOLE]
)
def test_a_pipe_among_the_files(model: Path, name: str):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert f"{name} is no regular file" in refuse(model)


# Adapters


@pytest.fixture
def adapters(model: Path, tmp_path: Path) -> Path:
    """What mlx_lm.lora leaves, of random numbers."""
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.0},
    }
    network = load_network(model)[0]
    network.freeze()
    linear_to_lora_layers(network, 2, config["lora_parameters"])
    names = [n for n in tensors_of(network) if n.endswith(("lora_a", "lora_b"))]
    mx.random.seed(0)
    weights = {n: mx.random.normal(tensors_of(network)[n].shape) for n in names}
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "adapters/adapters.safetensors"), weights)
    return tmp_path / "adapters"


def test_adapters_act(model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch):
    """W x + scale · B A x, computed here."""
    monkeypatch.setenv("HOME", str(adapters.parent))
    plain, _ = load(model)
    adapted, _ = load(model, adapter_path="~/adapters")
    weights = read_file(adapters / "adapters.safetensors")
    tensors = tensors_of(plain)
    for name in (n for n in weights if n.endswith("lora_a")):
        path = name.removesuffix(".lora_a")
        added = 10.0 * (weights[name] @ weights[f"{path}.lora_b"]).T
        tensors[f"{path}.weight"] = tensors[f"{path}.weight"] + added
    plain.load_weights([*tensors.items()])
    assert mx.allclose(plain(TOKENS), adapted(TOKENS), rtol=1e-3, atol=1e-3).item()


def edit_adapters(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "adapters.safetensors"
    mx.save_safetensors(str(file), change(read_file(file)))


def put_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "no adapter_config.json in it"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json in it"),
    "no weights": (lambda f: (f / "adapters.safetensors").unlink(), "no adapters.safetensors"),
    "PEFT's": (
        lambda f: (f / "adapters.safetensors").rename(f / "adapter_model.safetensors"),
        "PEFT's are not read",
    ),
    "pipe": (lambda f: put_pipe(f / "adapters.safetensors"), "no regular file"),
    "config is a pipe": (lambda f: put_pipe(f / "adapter_config.json"), "no regular file"),
    "truncated": (lambda f: os.truncate(f / "adapters.safetensors", 300), "truncated or corrupt"),
    "not finite": (
        lambda f: edit_weights(f, lambda w: {name: array / 0 for name, array in w.items()}),
        "numbers that are not finite: train it again",
    ),
    "no object": (lambda f: (f / "adapter_config.json").write_text("[]"), "no JSON object"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "pointer": (
        lambda f: (f / "adapters.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
        "Git LFS pointer",
    ),
    "integers": (
        lambda f: edit_weights(f, lambda w: {n: a.astype(mx.int32) for n, a in w.items()}),
        "number type",
    ),
    "of another model": (
        lambda f: edit_weights(f, lambda w: {f"x.{n}": a for n, a in w.items()}),
        "does not fit the model",
    ),
    "wider": (
        lambda f: edit_weights(f, lambda w: {n: mx.concatenate([a, a]) for n, a in w.items()}),
        "does not fit the model",
    ),
    "rank": (
        lambda f: edit_adapters(f, lambda c: c["lora_parameters"].update(rank=10**9)),
        "does not fit the model",
    ),
    "no parameters": (
        lambda f: edit_adapters(f, lambda c: c.pop("lora_parameters")), "does not fit the model"
    ),
    "layers": (
        lambda f: edit_adapters(f, lambda c: c.update(num_layers="all")), "does not fit the model"
    ),
    "no numbers": (
        lambda f: edit_weights(f, lambda w: dict([*w.items()][1:])), "lacks .*lora_a.*copy both"
    ),
    "half the layers": (
        lambda f: edit_weights(f, lambda w: {n: a for n, a in w.items() if "layers.0" not in n}),
        r"lacks .*layers\.0\..* and [0-9]+ more",
    ),
    "kind": (lambda f: edit_adapters(f, lambda c: c.update(fine_tune_type="x")), "'x' is none of"),
    "dora": (
        lambda f: edit_adapters(f, lambda c: c.update(fine_tune_type="dora")), r"lacks .*\.m"
    ),
}  # fmt: skip


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_adapters(model: Path, adapters: Path, broken: str):
    change, said = BROKEN[broken]
    change(adapters)
    assert re.search(said, refuse(model, adapter_path=str(adapters)))


@pytest.mark.parametrize(
    "spelling", [{"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}, {}]
)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_the_stock_network_is_told_what_the_config_means(
    tmp_path: Path, model_type: str, spelling: dict[str, Any]
) -> None:
    """mlx-lm has defaults of its own for keys that a config has elsewhere or not at all."""
    make_llama(tmp_path / "m", model_type=model_type, **SMALL)
    config = json.loads((tmp_path / "m/config.json").read_text())
    for key in ("rope_theta", "rms_norm_eps", "attention_bias"):
        config.pop(key, None)
    config |= spelling
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    tokens = np.arange(40)[None] % config["vocab_size"]

    told = {"rope_theta": 1e4, "rms_norm_eps": 1e-6} | spelling.get("rope_parameters", {})
    weights = {name: np.array(a) for name, a in mx.load(str(tmp_path / "m" / WHOLE)).items()}
    expected = reference.logits(reference.llama_config(config | told), weights, tokens)
    seen = np.array(load_network(tmp_path / "m")[0](mx.array(tokens)))
    assert np.abs(seen - expected).max() < 1e-4 * np.abs(expected).max()


MOVED = {
    kind: config
    for kind, config in zoo.CONFIGS.items()
    if "rope_theta" in (text := config.get("text_config", config))
    and "rope_parameters" not in text
    and kind not in ("gpt_neox", "phi3small")  # another name for it; no number of its own
}


@pytest.mark.parametrize(
    "kind", only(("phi3", "llama4", "gemma3n", "glm4_moe", "internlm2"), MOVED)
)
def test_rope_may_stand_where_transformers_5_writes_it(kind: str, tmp_path: Path) -> None:
    """Without a word mlx-lm's network would take a base of its own."""
    config, base = MOVED[kind], {"rope_theta": 777.0}
    if "text_config" in config:
        base = {"text_config": config["text_config"] | base}
    config = zoo.make_model(tmp_path, kind, **base)
    tokens = mx.arange(24)[None] * 7 % 250
    expected = load_network(tmp_path)[0](tokens)
    (tmp_path / "config.json").write_text(json.dumps(published.write_today(config)))
    assert mx.array_equal(load_network(tmp_path)[0](tokens), expected).item()


@pytest.mark.parametrize("tied", [True, False])
def test_the_tensors_say_whether_a_packed_model_has_a_head(tied: bool, tmp_path: Path) -> None:
    zoo.make_model(tmp_path / "m", "llama", tie_word_embeddings=tied)
    source, packed = str(tmp_path / "m"), str(tmp_path / "q")
    mlx_lm.convert(source, packed, quantize=True, q_group_size=32, q_bits=4)
    expected = mlx_lm.utils.load_model(tmp_path / "q")[0](TOKENS)
    config = json.loads((tmp_path / "q/config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "q/config.json").write_text(json.dumps(config))
    assert mx.array_equal(load_network(tmp_path / "q")[0](TOKENS), expected).item()


@pytest.mark.parametrize("nested", [False, True])
def test_a_text_model_of_a_type_that_mlx_lm_does_not_know(nested: bool, tmp_path: Path) -> None:
    config = zoo.make_model(tmp_path / "m", "qwen2_vl", rope_theta=777.0)
    tokens = mx.arange(24)[None] * 7 % 250
    expected = load_network(tmp_path / "m")[0](tokens)
    new = published.write_today(config)
    if nested:
        text = {**new, "model_type": "qwen2_vl_text"}
        new = {"model_type": "qwen2_vl", "text_config": text, "torch_dtype": "float32"}
    (tmp_path / "m/config.json").write_text(json.dumps(new))
    assert mx.array_equal(load_network(tmp_path / "m")[0](tokens), expected).item()
    mlx_skipless.convert(tmp_path / "m", tmp_path / "o", dtype="float32")
    seen = mlx_lm.utils.load_model(tmp_path / "o")[0](tokens)
    assert mx.allclose(seen, expected, rtol=1e-5, atol=1e-5).item()


@pytest.mark.parametrize(
    ("maker", "key", "value"),
    [
        (make_llama, "hidden_act", "gelu"),
        (make_llama, "hidden_act", "relu"),
        (make_gemma, "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        (make_gemma, "rope_scaling", {"type": "bogus", "factor": 2.0}),
        (make_llama, "hidden_act", "relu2"),
        (make_llama, "hidden_act", ""),
        (make_gemma, "hidden_activation", "bogus"),
    ],
)
def test_what_the_stock_network_would_ignore_is_refused(
    tmp_path: Path, maker: Callable[..., Any], key: str, value: Any
) -> None:
    maker(tmp_path / "m", **SMALL)
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {key: value}))
    said = refuse(tmp_path / "m")
    assert "ignores: `convert.py --model" in said or re.search(f"{key}|rope", said)


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_broken_generation_config_is_named(tmp_path: Path, content: str) -> None:
    make_llama(tmp_path / "m", **SMALL)
    (tmp_path / "m/generation_config.json").write_text(content)
    assert "m/generation_config.json " in refuse(tmp_path / "m")


def test_swish_is_silu(tmp_path: Path) -> None:
    """transformers has one function under both names, and mlx-lm's network computes it."""
    make_llama(tmp_path / "m", **SMALL)
    tokens = mx.array([[1, 2, 3]])
    expected = load_network(tmp_path / "m")[0](tokens)
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"hidden_act": "swish"}))
    assert mx.array_equal(load_network(tmp_path / "m")[0](tokens), expected).item()
    report = mlx_skipless.convert(tmp_path / "m", tmp_path / "o", dtype="float32")
    assert report.stock
    seen = mlx_lm.utils.load_model(tmp_path / "o")[0](tokens)
    assert mx.allclose(seen, expected, rtol=1e-5, atol=1e-5).item()
