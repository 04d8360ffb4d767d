"""Small converted folders with all that a cache or a machine of several must get right."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from architectures import make
from factory import make_checkpoint

from mlx_skipless.conversion.convert import convert

QKV: dict[str, Any] = {"norm": "qkv", "gains": True}
PRE: dict[str, Any] = {"norm": "pre", "skip": "both"}
WINDOW: dict[str, Any] = {
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
SKIPS: dict[str, Any] = {"skips": ("query", "head", "output")}
TABLE: dict[str, Any] = {"precompute_first_layer": "force"}
# Of a source checkpoint the options, or its family; how it is converted; what loses attention.
MODELS: dict[str, tuple[dict[str, Any] | str, dict[str, Any], list[int]]] = {
    "qp": (QKV | WINDOW | {"linear_paths": True}, {"remove": "qp"}, []),
    "kp": (
        {"num_key_value_heads": 4, "bias": ("q_proj", "o_proj", "down_proj")},
        {"remove": "kp"},
        [],
    ),
    "parallel": (QKV | SKIPS | {"block": "parallel"}, {"remove": "p"}, []),
    "tied": ({"skip": "ffn", "tie_word_embeddings": True}, {"remove": "q"}, []),
    "table": (QKV | SKIPS, {"remove": "qp"} | TABLE, []),
    "quantized table": (
        QKV | {"hidden_size": 128, "intermediate_size": 256},
        {"remove": "p", "quantize": True} | TABLE,
        [],
    ),
    "skips": (
        QKV | WINDOW | SKIPS | {"per_channel": True, "norms": ["k", "v", "heads"]},
        {"remove": "qp"},
        [],
    ),
    "queries": (QKV | SKIPS | {"norms": ["q", "kv", "heads"]}, {"remove": "p"}, []),
    "queries, no Q": (QKV | SKIPS | {"norms": ["kv"]}, {"remove": "qp"} | TABLE, []),
    "no attention 0": (PRE | SKIPS, {"remove": "none"}, [0]),
    "no attention 1": (QKV, {"remove": "p"}, [1]),
    "no attention 1, 2": (PRE, {"remove": "none"} | TABLE, [1, 2]),
    "mixtral": ("mixtral", {"skipless": True, "remove": "p"}, []),
    "gpt_neox": ("gpt_neox, serial", {"skipless": True, "remove": "p"}, []),
    "cohere": ("cohere", {"drop_ffn": 1}, []),
    "growing queries": ("ministral3", {"skipless": True, "remove": "qp"}, []),
    "qwen3": ("qwen3", {"skipless": True, "remove": "p"}, []),
}


def made(folder: Path, name: str) -> Path:
    """The converted folder of one of `MODELS`."""
    source, options, attentionless = MODELS[name]
    if isinstance(source, str):
        kv_heads = {} if source.startswith("gpt_neox") else {"num_key_value_heads": 2}
        make(folder / "sources" / name, source, **kv_heads)
    else:
        make_checkpoint(folder / "sources" / name, **source)
    out = folder / name
    convert(folder / "sources" / name, out, verify=False, **options)
    if attentionless:
        take_attention(out, attentionless)
    return out


def take_attention(folder: Path, layers: list[int]) -> None:
    """Take the attention of these layers out of a converted folder."""
    config = json.loads((folder / "config.json").read_text())
    config["removed"]["attention"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    parts = ("self_attn", "input_layernorm")
    gone = tuple(f"model.layers.{layer}.{part}" for layer in layers for part in parts)
    gone += tuple(f"model.layers.{layer + 1}.self_attn.head_skip" for layer in layers)
    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    kept = {name: w for name, w in mx.load(str(file)).items() if not name.startswith(gone)}
    mx.eval(kept)
    mx.save_safetensors(str(file), kept, metadata={"format": "mlx"})
    index.write_text(json.dumps({"weight_map": dict.fromkeys(kept, file.name)}))
