"""Tiny models, with random weights, of every architecture that mlx-lm has.

`CONFIGS` names them by their file in ``mlx_lm/models`` and holds configs in the shape of their
published models'. Every kind of layer occurs in each, windows are of 8 tokens, and the weights keep
every sub-layer alive. `CANNOT` names those that cannot be built, with the reason.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from factory import BOS, CHAT_TEMPLATE, EOS, make_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

Config = dict[str, Any]

WINDOW = 8
_VOCABULARY, _LENGTH = 264, 256

# What most configs have, in the names of most.
_LLAMA: Config = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": _LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# Heads that are wider together than the stream.
_WIDE = _LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_ALL_HEADS = _LLAMA | {"num_key_value_heads": 2}
_BIASED = {"attention_bias": True, "mlp_bias": True}
_TIED = {"tie_word_embeddings": True}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_LATENT_HEADS = _ALL_HEADS | {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_DEEPSEEK = _LATENT_HEADS | _ROUTED_EXPERTS | {"moe_layer_freq": 1, "attention_bias": False}
_INDEXER = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": WINDOW}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _kinds(letters: str) -> list[str]:
    """Layer types by their first letters."""
    types = ("sliding_attention", "full_attention", "linear_attention", "conv", "mamba")
    names = {name[0]: name for name in types}
    return [{**names, "a": "attention"}[letter] for letter in letters]


_WINDOWS = {"sliding_window": WINDOW, "layer_types": _kinds("sssf")}
_GEMMA = _WIDE | _TIED | {"hidden_activation": "gelu_pytorch_tanh"}
_GEMMA3 = _GEMMA | {
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 32,
    "rope_local_base_freq": 1000.0,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 3,
}
_GEMMA4 = _GEMMA | {
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "layer_types": _kinds("sfsfsf"),
    "sliding_window": WINDOW,
    "global_head_dim": 64,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 1000.0, "rope_type": "default"},
    },
}
_QWEN3_MOE = _WIDE | _EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": []}
_QWEN3_5 = (
    _WIDE
    | _DELTA
    | {
        "full_attention_interval": 2,
        "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
)
_GRANITE = (
    _LLAMA
    | _TIED
    | {
        "attention_bias": False,
        "mlp_bias": False,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.125,
        "embedding_multiplier": 4.0,
        "residual_multiplier": 0.5,
    }
)

CONFIGS: dict[str, Config] = {
    "llama": _LLAMA | {"head_dim": 32, "rope_scaling": _LLAMA3_ROPE} | _BIASED,
    "qwen2": _LLAMA | _TIED,
    "qwen2_moe": _ALL_HEADS | _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen2_vl": _LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    "qwen3": _WIDE | _TIED,
    "qwen3_moe": _QWEN3_MOE | {"mlp_only_layers": [0]},
    "qwen3_vl": {"text_config": _WIDE | {"model_type": "qwen3_vl_text"}},
    "qwen3_vl_moe": {"text_config": _QWEN3_MOE | {"model_type": "qwen3_vl_moe_text"}},
    "qwen3_next": _QWEN3_MOE | _DELTA | {
        "shared_expert_intermediate_size": 32,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 2,
    },
    "qwen3_5": {"text_config": _QWEN3_5 | {"model_type": "qwen3_5_text"}},
    "qwen3_5_moe": {
        "text_config": _QWEN3_5 | _EXPERTS | {
            "model_type": "qwen3_5_moe_text",
            "shared_expert_intermediate_size": 32,
        }
    },
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 32,
        "sliding_window": WINDOW,
    },
    "gemma3_text": _GEMMA3,
    "gemma3": {
        "vocab_size": _VOCABULARY,
        "text_config": _GEMMA3 | {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    },
    "gemma3n": {
        "text_config": _GEMMA | {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 6,
            "layer_types": _kinds("sfsfsf"),
            "num_kv_shared_layers": 2,
            "sliding_window": WINDOW,
            "rope_local_base_freq": 1000.0,
            "final_logit_softcapping": 30.0,
            "vocab_size_per_layer_input": _VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
            "altup_num_inputs": 4,
            "altup_active_idx": 0,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "laurel_rank": 32,
        }
    },
    "gemma4_text": _GEMMA4 | {
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": _VOCABULARY,
        "use_double_wide_mlp": True,
    },
    "gemma4": {
        "vocab_size": _VOCABULARY,
        "text_config": _GEMMA4 | {
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    },
    "gpt_oss": _WIDE | _LOCAL_EXPERTS | {
        "intermediate_size": 64,
        "sliding_window": WINDOW,
        "layer_types": _kinds("sfsf"),
        "rope_scaling": _YARN,
    },
    "smollm3": _LLAMA | _TIED | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0]},
    "phi": {
        **_ALL_HEADS,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    "phi3": _LLAMA | {
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0 + 0.25 * i for i in range(16)],
            "short_factor": [1.0 + 0.125 * i for i in range(16)],
        },
    },
    "phimoe": _LLAMA | _LOCAL_EXPERTS | {
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0 + 0.25 * i for i in range(16)],
            "short_factor": [1.0 + 0.125 * i for i in range(16)],
            "long_mscale": 1.25,
            "short_mscale": 1.25,
        },
    },
    "glm": _WIDE | {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": _WIDE | {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4_moe": _WIDE | _ROUTED_EXPERTS | {
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "use_qk_norm": True,
    },
    "granite": _GRANITE,
    "granitemoe": _GRANITE | _LOCAL_EXPERTS,
    "granitemoehybrid": _GRANITE | _LOCAL_EXPERTS | {
        "layer_types": _kinds("mmam"),
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "position_embedding_type": "nope",
    },
    "olmo2": _LLAMA,
    "olmo3": _LLAMA | _WINDOWS,
}  # fmt: skip

CANNOT: dict[str, str] = {}

# Where a norm multiplies by one more than it stores.
_ONE_MORE = {
    "gear", "gemma", "gemma2", "gemma3_text", "minimax_m3_vl", "muse_glimmer", "nemotron",
    "plamo2", "plamo3", "recurrent_gemma", "step3p5",
}  # fmt: skip
# Parameters that no general rule draws well, by the ends of their names: least and most.
_RANGES = {
    r"A_log": (0.0, 1.5),
    r"dt_bias|dt_proj\.bias": (-3.0, 0.0),
    r"correct_output_scale": (0.6, 1.4),
}


def make_model(
    folder: Path, model_type: str, *, seed: int = 0, dtype: str = "float32", **changes: Any
) -> Config:
    """Write a random model of one of mlx-lm's architectures; return its config.

    `changes` override entries of its config, those of its ``text_config`` where it has them.
    """
    config = {"model_type": model_type} | CONFIGS[model_type]
    config |= {"bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": dtype}
    if "text_config" in config:
        config["text_config"] = config["text_config"] | changes
    else:
        config |= changes
    config = json.loads(json.dumps(config))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = make_tokenizer(_LENGTH)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model_class, args_class = _get_classes(json.loads(json.dumps(config)))
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    weights = draw_weights(model, seed)
    casts = getattr(model, "cast_predicate", lambda _: True)
    weights = {
        name: array.astype(getattr(mx, dtype)) if casts(name) and _is_float(array) else array
        for name, array in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return config


def draw_weights(model: nn.Module, seed: int) -> dict[str, mx.array]:
    """Random parameters for a model, in float32, in place of those it has."""
    rng = np.random.default_rng(seed)
    modules = dict(model.named_modules())
    return {
        name: _draw(name, array, modules.get(name.rpartition(".")[0]), rng)
        for name, array in tree_flatten(model.parameters())
    }


def _draw(
    name: str, array: mx.array, module: nn.Module | None, rng: np.random.Generator
) -> mx.array:
    if not _is_float(array):
        return array
    noise = rng.standard_normal(array.shape)
    for end, (least, most) in _RANGES.items():
        if re.search(rf"(^|[._])({end})$", name):
            return mx.array(rng.uniform(least, most, array.shape).astype(np.float32))
    leaf = name.rpartition(".")[2]
    first = float(array.reshape(-1)[0])
    if "Norm" in type(module).__name__ and leaf == "weight":
        one_more = type(module).__module__.rpartition(".")[2] in _ONE_MORE
        values = float(not one_more) + 0.2 * noise
    elif leaf == "bias":
        values = 0.2 * noise
    elif array.ndim == 1 or (first and bool((array == first).all())):
        values = first + 0.2 * noise
    elif isinstance(module, nn.Embedding):
        values = 0.3 * noise
    elif "conv" in name and array.shape[-1] == 1:
        values = noise / np.sqrt(array.shape[1])
    else:
        values = noise / np.sqrt(array.shape[-1])
    return mx.array(values.astype(np.float32))


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))
