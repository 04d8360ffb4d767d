"""Random checkpoints of every family, in its own Hugging Face names and layout.

What a config means and where a tensor lies is written down here once more, from transformers'
modelling code; `test_architectures.py` holds it against transformers itself where torch is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import factory
import mlx.core as mx
import mlx_lm
import numpy as np
from reference import Config, Weights

COMMON: Config = {
    "vocab_size": 264,
    "bos_token_id": factory.BOS,
    "eos_token_id": factory.EOS,
    "max_position_embeddings": 128,
}
LLAMA: Config = COMMON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
PRENORM: Config = {"block": "serial", "skip": "both", "norm": "pre", "final_norm": True}
PARALLEL: Config = PRENORM | {"block": "parallel", "norm_type": "layer"}
QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Architecture:
    """A small network of one family.

    Attributes:
        config: its Hugging Face config.
        mapped: turns that into `reference`'s terms.
        biased: the matrices that have biases.
        theirs: turns canonical tensors into those of the family's files.
        stock: whether mlx-lm has a network of its own for it.
        gain_offset: what files subtract from the weights of norms.
    """

    config: Config
    mapped: Callable[[Config], Config]
    biased: tuple[str, ...] = ()
    theirs: Callable[[Config, Weights], Weights] = lambda config, weights: weights
    stock: bool = True
    gain_offset: float = 0.0


def text(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 12))


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What mlx-lm computes with a checkpoint, in float32."""
    model, _ = mlx_lm.load(str(folder), trust_remote_code=True)  # type: ignore[misc]
    return np.array(model(mx.array(tokens)).astype(mx.float32))


def _map_llama(config: Config) -> Config:
    return config | PRENORM | {"sliding_window": None}


def _map_mistral(config: Config) -> Config:
    return config | PRENORM


def _map_ministral3(config: Config) -> Config:
    rope = config["rope_parameters"]
    return config | PRENORM | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": rope,
        "query_growth": rope["llama_4_scaling_beta"],
        "query_step": rope["original_max_position_embeddings"],
    }  # fmt: skip


def _map_mistral3(config: Config) -> Config:
    text = COMMON | config["text_config"]
    maps = {"ministral3": _map_ministral3, "mistral": _map_mistral}
    return maps[text["model_type"]](text)


def _wrap(part: str, head: str) -> Callable[[Config, Weights], Weights]:
    """Names of a wrapper's files, with a bit of what sees pictures."""

    def name(config: Config, weights: Weights) -> Weights:
        names = {"model.": part, "lm_head": head}
        prefix = part.removesuffix("language_model.").removesuffix("language_model.model.")
        return _rename(weights, names) | {
            f"{prefix}vision_tower.transformer.layers.0.attention.q_proj.weight": np.ones((8, 8)),
            f"{prefix}multi_modal_projector.linear_1.weight": np.ones((config["hidden_size"], 8)),
        }

    return name


def _map_gemma(config: Config) -> Config:
    scale = math.sqrt(config["hidden_size"])
    act = config["hidden_activation"] or "gelu_pytorch_tanh"
    return config | PRENORM | {"hidden_act": act, "embedding_scale": scale}


def _map_qwen3(config: Config) -> Config:
    return _map_llama(config) | {"qk_norm": True}


def _map_neox(config: Config) -> Config:
    width = config["hidden_size"] // config["num_attention_heads"]
    return config | PARALLEL | {
        "block": "parallel" if config["use_parallel_residual"] else "serial",
        "gated": False,
        "rms_norm_eps": config["layer_norm_eps"],
        "rope_theta": config["rotary_emb_base"],
        "rotary_dim": int(width * config["rotary_pct"]),
    }  # fmt: skip


def _name_as_neox(config: Config, weights: Weights) -> Weights:
    heads, out = config["num_attention_heads"], {}
    left = dict(weights)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        for part in ("weight", "bias"):
            three = [left.pop(f"{prefix}{name}.{part}") for name in QKV]
            rows = []
            for head in range(heads):
                rows += [np.split(tensor, heads)[head] for tensor in three]
            name = f"gpt_neox.layers.{layer}.attention.query_key_value.{part}"
            out[name] = np.concatenate(rows)
    renamed = {
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.layers": "gpt_neox.layers",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        "self_attn.o_proj": "attention.dense",
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    }
    return out | _rename(left, renamed)


def _map_gptj(config: Config) -> Config:
    return config | PARALLEL | {
        "shared_norm": True,
        "gated": False,
        "hidden_size": config["n_embd"],
        "num_hidden_layers": config["n_layer"],
        "num_attention_heads": config["n_head"],
        "num_key_value_heads": config["n_head"],
        "intermediate_size": config["n_inner"] or 4 * config["n_embd"],
        "rms_norm_eps": config["layer_norm_epsilon"],
        "hidden_act": config["activation_function"],
        "rope_traditional": True,
    }  # fmt: skip


def _name_as_gptj(config: Config, weights: Weights) -> Weights:
    renamed = {
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "self_attn.o_proj": "self_attn.out_proj",
        "self_attn": "attn",
        "up_proj": "fc_in",
        "down_proj": "fc_out",
    }
    return _rename(weights, renamed)


def _map_phi(config: Config) -> Config:
    width = config["hidden_size"] // config["num_attention_heads"]
    return config | PARALLEL | {
        "shared_norm": True,
        "gated": False,
        "rms_norm_eps": config["layer_norm_eps"],
        "rotary_dim": int(width * config["partial_rotary_factor"]),
    }  # fmt: skip


def _name_as_phi(config: Config, weights: Weights) -> Weights:
    renamed = {
        "model.norm": "model.final_layernorm",
        "o_proj": "dense",
        "up_proj": "fc1",
        "down_proj": "fc2",
    }
    return _rename(weights, renamed)


def _map_cohere(config: Config) -> Config:
    return config | PARALLEL | {
        "shared_norm": True,
        "rms_norm_eps": config["layer_norm_eps"],
        "rope_traditional": True,
        "tie_word_embeddings": True,
    }  # fmt: skip


def _name_as_mixtral(config: Config, weights: Weights) -> Weights:
    out = {}
    letters = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for name, tensor in weights.items():
        matrix = name.split(".")[-2]
        prefix = name.split(".mlp.")[0] + ".block_sparse_moe"
        if matrix == "router":
            out[f"{prefix}.gate.weight"] = tensor
        elif matrix in letters:
            for i, expert in enumerate(tensor):
                out[f"{prefix}.experts.{i}.{letters[matrix]}.weight"] = expert
        else:
            out[name] = tensor
    return out


def _rename(weights: Weights, names: dict[str, str]) -> Weights:
    out = {}
    for name, tensor in weights.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        out[name] = tensor
    return out


_QWEN = LLAMA | {"tie_word_embeddings": True}
_NEOX: Config = COMMON | {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 500,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
_NEOX_BIASED = (*QKV, "o_proj", "up_proj", "down_proj")
_PHI = {k: v for k, v in LLAMA.items() if k != "rms_norm_eps"} | {
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
}
_GPTJ: Config = {k: v for k, v in COMMON.items() if k != "max_position_embeddings"} | {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": None,
    "n_positions": 128,
    "rotary_dim": 8,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
_COHERE = {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "tie_word_embeddings")} | {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.25,
    "num_key_value_heads": 1,
}

_GROWING = {k: v for k, v in LLAMA.items() if k != "rope_theta"} | {
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 500.0,
        "factor": 8.0,
        "original_max_position_embeddings": 4,
        "beta_fast": 1.0,
        "beta_slow": 0.1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.5,
    },
}
_EYES: Config = {
    "image_token_index": 10,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": False,
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 14,
        "patch_size": 14,
    },
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(LLAMA, _map_llama),
    "mistral": Architecture(LLAMA | {"sliding_window": 5}, _map_mistral, stock=False),
    "mistral, Nemo's heads": Architecture(LLAMA | {"head_dim": 8}, _map_llama),
    "ministral": Architecture(
        LLAMA
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"sliding_window": 5, "head_dim": 16},
        _map_mistral,
        stock=False,
    ),
    "ministral3": Architecture(_GROWING, _map_ministral3),
    "mixtral": Architecture(
        LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
        _map_llama,
        theirs=_name_as_mixtral,
    ),
    "gemma": Architecture(
        LLAMA
        | {"num_key_value_heads": 1, "hidden_act": "gelu", "hidden_activation": None}
        | {"tie_word_embeddings": True, "head_dim": 16},
        _map_gemma,
        gain_offset=1.0,
    ),
    "gpt_neox": Architecture(_NEOX, _map_neox, _NEOX_BIASED, _name_as_neox),
    "gpt_neox, serial": Architecture(
        _NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0},
        _map_neox,
        _NEOX_BIASED,
        _name_as_neox,
    ),
    "gptj": Architecture(_GPTJ, _map_gptj, ("up_proj", "down_proj", "lm_head"), _name_as_gptj),
    "phi": Architecture(_PHI, _map_phi, (*_NEOX_BIASED, "lm_head"), _name_as_phi),
    "cohere": Architecture(_COHERE, _map_cohere),
    "qwen2": Architecture(_QWEN, _map_llama, QKV),
    "qwen3": Architecture(LLAMA | {"head_dim": 16, "attention_bias": False}, _map_qwen3),
}
# Wrappers of a language model, in each layout of names that there is.
WRAPPERS: dict[str, Architecture] = {
    "mistral3": Architecture(
        _EYES | {"text_config": _GROWING | {"model_type": "ministral3", "head_dim": 8}},
        _map_mistral3,
        theirs=_wrap("language_model.model.", "language_model.lm_head"),
    ),
    "mistral3, Small": Architecture(
        _EYES | {"text_config": LLAMA | {"model_type": "mistral", "sliding_window": None}},
        _map_mistral3,
        theirs=_wrap("model.language_model.", "lm_head"),
    ),
}


def make(
    folder: Path, name: str, *, seed: int = 0, dtype: str = "float32", **changes: Any
) -> tuple[Config, Weights]:
    """Write a random checkpoint of a family; what stands behind a comma in its name is a variant.

    Returns `reference`'s config and weights of the same function, norms' weights with their offset.
    """
    kind = (ARCHITECTURES | WRAPPERS)[name]
    config = kind.config
    if "text_config" in config:
        config = COMMON | config | {"text_config": config["text_config"] | changes}
        changes = {}
    config = config | changes | {"model_type": name.split(",")[0], "torch_dtype": dtype}
    mapped = kind.mapped(config)
    weights = random_weights(mapped, kind.biased, seed)
    norms = [n for n in weights if n.endswith("norm.weight")]
    stored = factory.rounded(weights | {n: weights[n] - kind.gain_offset for n in norms}, dtype)
    factory.write(folder, config, kind.theirs(mapped, stored), dtype, shards=1)
    return mapped, stored | {n: stored[n] + kind.gain_offset for n in norms}


def random_weights(config: Config, biased: tuple[str, ...], seed: int) -> Weights:
    """All tensors of a network in `reference`'s terms, float64; Q and P well conditioned."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    width, kv_width = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    experts = config.get("num_local_experts", 0)

    def gaussian(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) / np.sqrt(shape[-1])

    def square(rows: int, columns: int) -> np.ndarray:
        size = max(rows, columns)
        basis = np.linalg.qr(rng.standard_normal((size, size)))[0][:rows, :columns]
        return 1.5 * (basis + 0.2 * gaussian(rows, columns))

    def norm(name: str, size: int) -> Weights:
        found = {f"{name}.weight": rng.uniform(0.6, 1.4, size)}
        if config.get("norm_type") == "layer" and biased:
            found[f"{name}.bias"] = 0.2 * rng.standard_normal(size)
        return found

    lead = (experts,) if experts else ()
    out = {"model.embed_tokens.weight": rng.standard_normal((config["vocab_size"], hidden))}
    for layer in range(config["num_hidden_layers"]):
        attn, mlp = (f"model.layers.{layer}.{part}." for part in ("self_attn", "mlp"))
        out |= {
            f"{attn}q_proj.weight": square(width, hidden),
            f"{attn}k_proj.weight": gaussian(kv_width, hidden),
            f"{attn}v_proj.weight": gaussian(kv_width, hidden),
            f"{attn}o_proj.weight": square(hidden, width),
            f"{mlp}up_proj.weight": gaussian(*lead, inner, hidden),
            f"{mlp}down_proj.weight": gaussian(*lead, hidden, inner),
        }
        if config.get("gated", True):
            out[f"{mlp}gate_proj.weight"] = gaussian(*lead, inner, hidden)
        if experts:
            out[f"{mlp}router.weight"] = gaussian(experts, hidden)
        out |= norm(f"model.layers.{layer}.input_layernorm", hidden)
        if not config.get("shared_norm"):
            out |= norm(f"model.layers.{layer}.post_attention_layernorm", hidden)
        if config.get("qk_norm"):
            out[f"{attn}q_norm.weight"] = rng.uniform(0.6, 1.4, head_dim)
            out[f"{attn}k_norm.weight"] = rng.uniform(0.6, 1.4, head_dim)
    out |= norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = 2 * gaussian(config["vocab_size"], hidden)
    for name in [name for name in out if name.split(".")[-2] in biased]:
        out[name.replace(".weight", ".bias")] = 0.2 * rng.standard_normal(out[name].shape[0])
    return out


# mlx-lm has the other form of GELU than transformers: what makes it the same function.
MLX_LM_GELU = {"gemma": {"hidden_activation": "gelu"}, "gpt_neox": {"hidden_act": "gelu_new"}}
STOCK = [name for name, kind in ARCHITECTURES.items() if kind.stock]


def as_mlx_lm(name: str) -> dict[str, Any]:
    return MLX_LM_GELU.get(name.split(",")[0], {})


def without(weights: Weights, removed: dict[str, list[int]]) -> Weights:
    modules = {"attention": "self_attn", "ffn": "mlp"}
    gone = [f"layers.{i}.{modules[part]}." for part, layers in removed.items() for i in layers]
    return {name: w for name, w in weights.items() if not any(g in name for g in gone)}


def skipless(config: Config, weights: Weights) -> tuple[Config, Weights]:
    """The skipless network of a pretrained one: stream norms' gains and biases folded by hand."""
    weights = dict(weights)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        readers = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
        ffn = [f"mlp.{name}" for name in ("router", "gate_proj", "up_proj")]
        shared = config.get("shared_norm")
        readers.setdefault("input_layernorm" if shared else "post_attention_layernorm", [])
        readers["input_layernorm" if shared else "post_attention_layernorm"] += ffn
        for norm, names in readers.items():
            gain = weights.pop(f"{prefix}{norm}.weight")
            shift = weights.pop(f"{prefix}{norm}.bias", None)
            for matrix in (f"{prefix}{name}" for name in names):
                if f"{matrix}.weight" not in weights:
                    continue
                if shift is not None:
                    bias = weights.get(f"{matrix}.bias", 0.0)
                    weights[f"{matrix}.bias"] = bias + weights[f"{matrix}.weight"] @ shift
                weights[f"{matrix}.weight"] = weights[f"{matrix}.weight"] * gain
    return config | {"skip": "none", "norm": "qkv"}, weights
