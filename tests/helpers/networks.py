"""Random small networks of every mix that this package's format has, in `reference`'s terms.

Biases, scales, means, norms, skips, experts, missing parts: whatever moves a constant from one
matrix to another meets all that can stand between the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from architectures import random_weights
from reference import Config, Weights

VOCABULARY = 40
HIDDEN, HEADS = 16, 4
PROJECTION_NORMS = ("q", "k", "v", "kv", "heads", "hidden")
PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "p": "o_proj"}
MATRICES = (*PARTS.values(), "router", "gate_proj", "up_proj", "down_proj", "lm_head")
REMOVALS = ("qp", "kp", "vp", "q", "k", "v", "p", "auto", "auto", "none")


def draw_network(seed: int) -> tuple[Config, Weights, dict[str, Any]]:
    """A network and what to do with it, as `convert` takes it."""
    rng = np.random.default_rng(seed)
    config = _draw_config(rng)
    biased = _pick(rng, (), MATRICES, tuple(m for m in MATRICES if rng.integers(2)))
    weights = make_weights(config, biased, seed)
    _add_paths(config, weights, rng)
    if rng.integers(4) == 0:
        weights = _take_parts(config, weights, rng)
    whole = config["norm"] == "pre" and not config["removed"]
    options: dict[str, Any] = {
        "remove": _pick(rng, *REMOVALS),
        "skipless": bool(whole and rng.integers(2)),
        "fold_norms": bool(rng.integers(3) == 0),
    }
    if rng.integers(4) == 0:
        options["precompute_first_layer"] = "force"
    return config, weights, options


def write_network(folder: Path, config: Config, weights: Weights) -> None:
    """Write a network as a checkpoint without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


def make_config(**changes: Any) -> Config:
    """A small skipless network's config."""
    plain: Config = {
        "model_type": "skipless",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "block": "serial",
        "skip": "none",
        "norm": "none",
        "norm_type": "rms",
        "final_norm": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 100.0,
        "removed": {},
    }
    return plain | changes


def make_weights(config: Config, biased: tuple[str, ...], seed: int) -> Weights:
    """A network's matrices, norms and biases as float32 holds them, each expert's biases its own.

    `biased` names matrices; with any, LayerNorms have biases, too.
    """
    rng = np.random.default_rng(seed)
    weights = random_weights(config, biased, seed)
    for name in [name for name in weights if name.endswith("_proj.bias")]:
        shape = weights[name.replace(".bias", ".weight")].shape
        weights[name] = 0.2 * rng.standard_normal(shape[:-1])
    there = (
        ("layernorm", config["norm"] == "pre"),
        ("model.norm", config["final_norm"]),
        ("router", bool(config.get("num_local_experts"))),
        ("lm_head", not config["tie_word_embeddings"]),
    )
    gone = [part for part, needed in there if not needed]
    return {
        name: w.astype(np.float32).astype(np.float64)
        for name, w in weights.items()
        if not any(part in name for part in gone)
    }


def without(weights: Weights, *modules: str) -> Weights:
    """The tensors of all other modules."""
    return {name: w for name, w in weights.items() if not any(f"{m}." in name for m in modules)}


def _pick(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def _draw_config(rng: np.random.Generator) -> Config:
    block = _pick(rng, "serial", "serial", "parallel")
    skip = _pick(rng, "none", "none", "none", "ffn", "both")
    norm = _pick(rng, "none", "qkv", "pre", "pre" if skip == "both" else "qkv")
    head_dim = _pick(rng, 4, 4, 4, 2, 6)
    config = make_config(
        num_hidden_layers=_pick(rng, 1, 2, 3, 4),
        num_key_value_heads=_pick(rng, 1, 2, 4, 4),
        head_dim=head_dim,
        block=block,
        skip=skip,
        norm=norm,
        norm_type=_pick(rng, "rms", "layer"),
        final_norm=bool(rng.integers(3)),
        hidden_act=_pick(rng, "silu", "gelu", "relu", "gelu_new"),
        gated=bool(rng.integers(2)),
        embedding_scale=_pick(rng, 1.0, 2.0, 0.25, 5.6),
        logit_scale=_pick(rng, 1.0, 0.3),
        tie_word_embeddings=bool(rng.integers(3) == 0),
        rotary_dim=_pick(rng, 2, head_dim),
        rope_traditional=bool(rng.integers(2)),
        qk_norm=bool(norm != "qkv" and rng.integers(4) == 0),
        shared_norm=bool(block == "parallel" and norm == "pre" and rng.integers(2)),
    )
    if rng.integers(3) == 0:
        config |= {"num_local_experts": 3, "num_experts_per_tok": _pick(rng, 1, 2, 3)}
    if norm == "qkv":
        norms = [n for n in PROJECTION_NORMS if rng.integers(2)]
        fits = head_dim == HIDDEN // HEADS  # K and V read queries only as wide as the stream
        config["norms"] = [n for n in norms if fits or n != "kv"] or ["q"]
    return config


def _add_paths(config: Config, weights: Weights, rng: np.random.Generator) -> None:
    """Give layers what no matrix is: linear paths, skips past the heads, norms' weights."""
    width, kv_width = (
        config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value")
    )
    sizes = {"q": width, "k": kv_width, "v": kv_width, "kv": width, "heads": width}
    sizes["hidden"] = inner = config["intermediate_size"]
    linear, skips, gains = (rng.integers(3) == 0 for _ in range(3))
    for layer in range(config["num_hidden_layers"]):
        attn, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        found: dict[str, np.ndarray] = {}
        if linear:
            names = ("value_skip", "attention_gain", "uniform_gain")
            found = {f"{attn}{name}": rng.uniform(0.3, 1.4, HEADS) for name in names}
            found |= {f"{mlp}gate_offset": rng.uniform(0.6, 1.4, inner)} if config["gated"] else {}
        if skips:
            names = ["query_skip", *(["head_skip"] if layer else [])]
            last = layer == config["num_hidden_layers"] - 1
            names += ["output_skip"] if last and width == HIDDEN else []
            found |= {f"{attn}{x}": rng.standard_normal(_pick(rng, HEADS, width)) for x in names}
        for name in config.get("norms", ()) if gains else ():
            where = mlp if name == "hidden" else attn
            found[f"{where}{name}_norm.weight"] = rng.uniform(0.6, 1.4, sizes[name])
        weights |= {name: w.astype(np.float32).astype(np.float64) for name, w in found.items()}


def _take_parts(config: Config, weights: Weights, rng: np.random.Generator) -> Weights:
    """Take matrices and whole sub-layers out of some layers, as earlier conversions do."""
    wide = config["head_dim"] != HIDDEN // HEADS
    narrow = wide or config["num_key_value_heads"] != HEADS
    fits = {"q": not wide, "k": not narrow, "v": not narrow, "p": not wide}
    layers = range(config["num_hidden_layers"])
    shared = config["shared_norm"]
    for part in [part for part, whole in fits.items() if whole and rng.integers(2)]:
        gone = [layer for layer in layers if rng.integers(2)]
        config["removed"] |= {part: gone} if gone else {}
        weights = without(weights, *(f"layers.{i}.self_attn.{PARTS[part]}" for i in gone))
    for part, module, norm in (
        ("attention", "self_attn", "input_layernorm"),
        ("ffn", "mlp", "post_attention_layernorm"),
    ):
        gone = [layer for layer in layers if rng.integers(6) == 0]
        config["removed"] |= {part: gone} if gone else {}
        modules = (module,) if shared else (module, norm)
        weights = without(weights, *(f"layers.{i}.{name}" for i in gone for name in modules))
        if part == "attention":
            for layer in gone:
                weights.pop(f"model.layers.{layer + 1}.self_attn.head_skip", None)
    bare = {*config["removed"].get("attention", ())} & {*config["removed"].get("ffn", ())}
    return without(weights, *(f"layers.{layer}.input_layernorm" for layer in bare))
