"""What reads a checkpoint, for fuzzing: each target takes the bytes of one file.

    python tools/fuzz_readers.py TARGET [CORPUS ...] [-max_total_time=600 ...]

guides the bytes by coverage, from the target's seeds on, with libFuzzer's flags; that takes `pip
install atheris`, which the tests do not depend on. They run the seeds (`tests/seeds/TARGET`) and
mutants that nothing guides.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import safetensors

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.append(str(TESTS / "helpers"))
SEEDS = TESTS / "seeds"
LAYERS = 8  # that a config may ask for: thousands are believed, and would take seconds each
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "rms_norm_eps": 1e-5,
}
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 8192}
INDEX = "model.safetensors.index.json"


def llama_tensors(hidden: int = 8, inner: int = 12) -> dict[str, np.ndarray]:
    """Of a Llama of one layer with heads of half its width, one of them for keys and values."""
    rng = np.random.default_rng(0)
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (16, hidden),
        f"{layer}self_attn.q_proj.weight": (hidden, hidden),
        f"{layer}self_attn.k_proj.weight": (hidden // 2, hidden),
        f"{layer}self_attn.v_proj.weight": (hidden // 2, hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, hidden),
        f"{layer}mlp.gate_proj.weight": (inner, hidden),
        f"{layer}mlp.up_proj.weight": (inner, hidden),
        f"{layer}mlp.down_proj.weight": (hidden, inner),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (16, hidden),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@functools.cache
def place() -> Path:
    """A folder for this process's files; a test's own would be a new one each time."""
    folder = tempfile.TemporaryDirectory(prefix="fuzz-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []  # until the process ends


def written(folder: Path, config: dict[str, Any], *files: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for i, tensors in enumerate(files):
        name = f"model-{i}" if len(files) > 1 else "model"
        arrays = {name: mx.array(values) for name, values in tensors.items()}
        mx.save_safetensors(str(folder / f"{name}.safetensors"), arrays)
    return folder


@functools.cache
def dense_folder() -> Path:
    return written(place() / "dense", LLAMA, llama_tensors())


@functools.cache
def loaded_folder() -> Path:
    return written(place() / "loaded", LLAMA, llama_tensors())


@functools.cache
def sharded_folder() -> Path:
    tensors = [*llama_tensors().items()]
    return written(place() / "sharded", LLAMA, dict(tensors[:5]), dict(tensors[5:]))


@functools.cache
def packed_folders() -> list[Path]:
    """Of each kind of packing, which their config's settings alone tell apart from others."""
    from packing import awq, gptq, mlx_pack
    from scaled_packing import float32, fp8, packed_int, save

    mlx = mlx_pack("affine", 32, 4)
    packers = {"mlx": lambda path, values: mlx(values), "awq": awq()[1], "gptq": gptq(4)[1]}
    config = LLAMA | {"hidden_size": 64, "intermediate_size": 64}
    folders = []
    for name, pack in packers.items():
        tensors: dict[str, np.ndarray] = {}
        for path, values in llama_tensors(64, 64).items():
            if not path.endswith("proj.weight"):
                tensors[path] = values
                continue
            module = path.removesuffix(".weight")
            parts, _ = pack(module, values.astype(np.float64))
            tensors |= {
                f"{module}.{part}": array
                if array.dtype != mx.bfloat16
                else array.astype(mx.float16)
                for part, array in parts.items()
            }
        folders.append(written(place() / name, config, tensors))
    for name, scaled in {"fp8": fp8((32, 32)), "words": packed_int(4, 32, zeros=True)}.items():
        stored = {}
        for path, values in llama_tensors(64, 64).items():
            packed = path.endswith("proj.weight")
            parts = scaled(values.astype(np.float64))[0] if packed else {"": float32(values)}
            stored |= {path + part: tensor for part, tensor in parts.items()}
        folders.append(written(place() / name, config, {}))
        save(folders[-1] / "model.safetensors", stored)
    return folders


def read_all(source: Path) -> None:
    """Open a model, read every tensor and, where there is one, the tokenizer."""
    from mlx_skipless.checkpoints.checkpoint import open_checkpoint
    from mlx_skipless.checkpoints.gguf_file import GGUFStore

    checkpoint = open_checkpoint(source)
    mx.eval(checkpoint.read(checkpoint.store.shapes))
    if isinstance(checkpoint.store, GGUFStore):
        mx.eval(checkpoint.store.packed.read(checkpoint.store.packed.shapes))
        checkpoint.store.tokenizer()


def config(data: bytes) -> None:
    """config.json, alone and beside a Llama's weights."""
    from mlx_skipless.conversion.convert import convert
    from mlx_skipless.errors import UserError

    file = dense_folder() / "config.json"
    file.write_bytes(data)
    with contextlib.suppress(UserError):
        convert(file, dry_run=True)
    read_all(dense_folder())


def network(data: bytes) -> None:
    """config.json, beside a Llama's weights, as mlx-lm builds the network that it describes."""
    from mlx_skipless.inference.loading import load_network

    (loaded_folder() / "config.json").write_bytes(data)
    mx.eval(load_network(loaded_folder())[0](mx.array([[1, 2, 3]])))


def adapters(data: bytes) -> None:
    """adapter_config.json, of adapters that mlx-lm trained."""
    from mlx_skipless.inference.loading import load_network

    (loaded_folder() / "config.json").write_text(json.dumps(LLAMA))
    folder = place() / "adapters"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(data)
    path = "model.layers.0.mlp.up_proj"
    ranks = {f"{path}.lora_a": mx.ones((8, 2)), f"{path}.lora_b": mx.ones((2, 12))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), ranks)
    mx.eval(load_network(loaded_folder(), adapter_path=str(folder))[0](mx.array([[1, 2, 3]])))


def weights(data: bytes) -> None:
    """A safetensors file, read as its library reads it; and as a Llama's."""
    from mlx_skipless.checkpoints.safetensors import SafetensorsStore

    folder = dense_folder()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").write_bytes(data)
    store = SafetensorsStore(folder)
    expected = dict(safetensors.deserialize(data))
    assert store.shapes.keys() == expected.keys()
    for name, tensor in expected.items():
        assert store.shapes[name] == tuple(tensor["shape"])
        if store.dtypes[name] is not None:
            (read,) = store.read([name]).values()
            assert bytes(memoryview(read.reshape(-1).view(mx.uint8))) == bytes(tensor["data"])
    read_all(folder)


def index(data: bytes) -> None:
    """The index of a model in two shards."""
    (sharded_folder() / INDEX).write_bytes(data)
    read_all(sharded_folder())


def gguf(data: bytes) -> None:
    """A GGUF file, tokenizer and all; of an architecture that only mlx-lm knows, what it runs."""
    from mlx_skipless.inference.loading import load_network
    from mlx_skipless.inference.stock import find_stock
    from mlx_skipless.inference.unpacking import unpack

    file = place() / "model.gguf"
    file.write_bytes(data)
    source = find_stock(file)
    if source is None:
        read_all(file)
        return
    out = place() / "unpacked"
    with unpack(source, out, dtype=None, packed=True, progress=lambda *at: None) as folder:
        model, _, _ = load_network(folder.path)
        model.set_dtype(mx.float32)
        mx.eval(model(mx.array([[1, 2, 3]])))


def quantization(data: bytes) -> None:
    """What a config says of packed weights, of each kind of packing in turn."""
    from mlx_skipless.errors import UserError

    try:
        settings = json.loads(data)
    except (ValueError, RecursionError):
        return
    for folder in packed_folders():
        file = folder / "config.json"
        known = {k: v for k, v in json.loads(file.read_text()).items() if "quant" not in k}
        own = settings if isinstance(settings, dict) else {"quantization": settings}
        chosen = {key: own[key] for key in ("quantization", "quantization_config") if key in own}
        file.write_text(json.dumps(known | chosen))
        with contextlib.suppress(UserError):
            read_all(folder)


def tokenizer(data: bytes) -> None:
    """tokenizer.json."""
    from mlx_skipless.checkpoints.tokenizer import load_tokenizer

    folder = place() / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_bytes(data)
    read = load_tokenizer(folder, LLAMA, trust_remote_code=False)
    read.decode(read.encode("a b"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (config, network, adapters, weights, index, gguf, quantization, tokenizer)
}


def attempt(target: str, data: bytes) -> bool:
    """Whether the bytes are accepted; they may be refused, and nothing else."""
    from mlx_skipless.architectures.config import LIMITS
    from mlx_skipless.errors import UserError

    try:
        with mock.patch.dict(LIMITS, num_hidden_layers=LAYERS):
            TARGETS[target](data)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        return False
    finally:
        mx.eval(mx.random.state)  # else it remembers every weight that a network began with
    return True


# Where to start from, and where to go


def starts(target: str) -> list[bytes]:
    """A few valid files, small ones."""
    if target == "weights":
        (dense_folder() / "model.safetensors").unlink(missing_ok=True)
        mx.save_safetensors(
            str(dense_folder() / "model.safetensors"),
            {name: mx.array(values) for name, values in llama_tensors().items()},
        )
        return [(dense_folder() / "model.safetensors").read_bytes()]
    if target == "gguf":
        return _gguf_files()
    return [json.dumps(start).encode() for start in _json_starts(target)]


def _json_starts(target: str) -> list[Any]:
    if target == "config":
        from architectures import ARCHITECTURES

        theirs = [(name.split(",")[0], kind.config) for name, kind in ARCHITECTURES.items()]
        configs = [config | {"model_type": name, "num_hidden_layers": 1} for name, config in theirs]
        return [LLAMA, LLAMA | {"model_type": "skipless", "rope_scaling": ROPE}, *configs]
    if target == "network":
        return [LLAMA, LLAMA | {"rope_scaling": ROPE, "layer_types": ["full_attention"]}]
    if target == "adapters":
        parameters = {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
        return [{"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}]
    if target == "index":
        files = {name: f"model-{int(i > 4)}.safetensors" for i, name in enumerate(llama_tensors())}
        return [{"weight_map": files}]
    if target == "quantization":
        gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
        awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
        mlx = {"group_size": 32, "bits": 4, "mode": "affine", "lm_head": {"bits": 8}}
        fp8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
        weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"}
        groups = {"group_0": {"targets": ["Linear", "re:.*up_proj"], "weights": weights}}
        words = {"quant_method": "compressed-tensors", "config_groups": groups}
        others = (gptq, awq, fp8, words | {"format": "pack-quantized", "ignore": ["lm_head"]})
        return [{"quantization": mlx}, *({"quantization_config": c} for c in others)]
    from factory import make_tokenizer

    return [json.loads(make_tokenizer(512).backend_tokenizer.to_str())]


@functools.cache
def _gguf_files() -> list[bytes]:
    """With the tokenizer of either kind, and of several architectures."""
    from gguf import GGMLQuantizationType as Type
    from gguf_maker import CONTROL, NORMAL, UNKNOWN, write_gguf

    words = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    config = LLAMA | {"max_position_embeddings": 64, "rope_theta": 1e4, "head_dim": 4}

    def describe(writer: Any, kind: str) -> None:
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(words)
        writer.add_token_types([UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 3])
        if kind == "llama":
            writer.add_token_scores([float(-i) for i in range(len(words))])
        else:
            writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)

    files = []
    for kind in ("llama", "gpt2"):
        file = place() / "start.gguf"
        write_gguf(file, config, llama_tensors(), describe=functools.partial(describe, kind=kind))
        files.append(file.read_bytes())
    from gguf_zoo import write_zoo_gguf
    from zoo import make_model

    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"vocab_size": 258, "num_attention_heads": 1, "num_key_value_heads": 1}
    for name in ("gemma3_text", "gpt_oss", "phi3", "qwen3_moe"):
        own = {"layer_types": ["sliding_attention", "full_attention"], "mlp_only_layers": []}
        make_model(place() / name, name, **small, **own)
        write_zoo_gguf(place() / "start.gguf", place() / name, lambda _: Type.Q4_0)
        files.append((place() / "start.gguf").read_bytes())
    return files


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 8, 16, 32, 64, 1 << 31, 1 << 32, 1 << 63, 10**30,
    0.0, -0.5, 1e-5, 1.5, 1e12, 1e308, float("nan"), float("inf"), "", "a", "1", "silu", "relu",
    "gelu", "none", "both", "ffn", "pre", "qkv", "parallel", "layer", "full_attention",
    "sliding_attention", "linear", "yarn", "llama3", "dynamic", "longrope", "proportional",
    "affine", "mxfp4", "nvfp4", "gptq", "awq", "../a", "\n", "\ud800", [], [0], [1, 2], ["q"], {},
    {"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}, {"q": [0]}, {"a": 1},
    ["kv"],
    {"rope_type": "default", "rope_theta": 1e6}, [[[]]], {"bits": 8},
]  # fmt: skip
KEYS = [
    "attention_bias", "auto_map", "biases", "bits", "block", "channel_skips", "dtype",
    "embedding_scale", "eos_token_id", "extra_bits", "factor", "final_norm", "fused", "gains",
    "gated", "group_size", "head_bias", "head_dim", "head_skip", "hidden_act", "hidden_activation",
    "hidden_size", "intermediate_size", "layer_types", "logit_scale", "max_position_embeddings",
    "max_window_layers", "mode", "model_file", "model_type", "norm", "norm_type", "norms",
    "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads",
    "num_local_experts", "original_max_position_embeddings", "output_skip", "partial_rotary_factor",
    "precomputed",
    "qk_norm", "quant_method", "quantization", "quantization_config", "quantize_activations",
    "query_skip", "removed", "rms_norm_eps", "rope", "rope_parameters", "rope_scaling",
    "rope_theta", "rope_traditional", "rope_type", "rotary_dim", "rotary_pct", "shared_norm",
    "shifts", "skip", "sliding_window", "text_config", "tie_word_embeddings", "torch_dtype", "type",
    "use_qk_norm", "use_sliding_window", "value_skip", "vocab_size",
]  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it changed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return _other(value, rng)
    if isinstance(value, list):
        at, rest = rng.randrange(len(value)), list(value)
        how = rng.random()
        if how < 0.2:
            return rest[:at] + rest[at + 1 :]
        if how < 0.4:
            return [*rest, rest[at]]
        return [*rest[:at], mutated(rest[at], rng), *rest[at + 1 :]]
    key, rest = rng.choice([*value]), dict(value)
    how = rng.random()
    if how < 0.15:
        del rest[key]
    elif how < 0.35:
        rest[rng.choice([*KEYS, *value])] = rng.choice([*ODD, *value.values()])
    elif how < 0.45:
        rest[rng.choice([*KEYS, key + ".", key.upper(), "a\nb"])] = rest.pop(key)
    else:
        rest[key] = mutated(rest[key], rng)
    return rest


def _other(value: Any, rng: random.Random) -> Any:
    """Something near, or nothing like it."""
    if type(value) in (int, float) and rng.random() < 0.6:
        near = [value + 1, value - 1, -value, value * 2, value / 2, value * 10**6, str(value)]
        return rng.choice([*near, int(value) if abs(value) < 1e300 else 0, float(value)])
    if isinstance(value, str) and value and rng.random() < 0.4:
        at = rng.randrange(len(value))
        return rng.choice([value[:at] + value[at + 1 :], value + value, value.upper(), [value]])
    return rng.choice(ODD)


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with some of them changed, cut out or put in."""
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 8, 64])
        new = rng.choice([rng.randbytes(n), bytes(n), b"\xff" * n, struct.pack("<Q", n)[:n], b""])
        data = data[:at] + new + data[at + (n if rng.random() < 0.8 else 0) :]
    return data


def mutated_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with something else in its header, whose length is right."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(mutated(json.loads(data[8 : 8 + size]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def mutant(target: str, data: bytes, rng: random.Random) -> bytes:
    """Another file of the target's kind."""
    try:
        if target == "weights" and rng.random() < 0.7:
            return mutated_header(data, rng)
        if target not in ("weights", "gguf") and rng.random() < 0.9:
            return json.dumps(mutated(json.loads(data), rng)).encode()
    except (ValueError, RecursionError, OverflowError):
        pass
    return mutated_bytes(data, rng)


def main(target: str, *arguments: str) -> None:
    """Fuzz until an error or libFuzzer's limits; what it finds worth keeping goes to a corpus."""
    import atheris

    with atheris.instrument_imports(include=["mlx_skipless", "gguf"]):
        import gguf  # noqa: F401

        import mlx_skipless  # noqa: F401

    start = Path(tempfile.mkdtemp(prefix=f"starts-{target}-"))
    for i, data in enumerate(starts(target)):
        (start / str(i)).write_bytes(data)

    def another(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return (mutant(target, data, rng) if rng.random() < 0.7 else atheris.Mutate(data, most))[
            :most
        ]

    corpora = [
        *arguments,
        str(start),
        *([str(SEEDS / target)] if (SEEDS / target).is_dir() else []),
    ]
    flags = [sys.argv[0], *corpora, "-max_len=50000"]
    atheris.Setup(flags, lambda data: attempt(target, data), custom_mutator=another)
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parsed, rest = parser.parse_known_args()
    main(parsed.target, *rest)
