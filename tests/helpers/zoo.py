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
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": _VOCABULARY, "max_position_embeddings": _LENGTH,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
# Heads that are wider together than the stream.
_WIDE = _LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_ALL_HEADS = _LLAMA | {"num_key_value_heads": 2}
_BIASED = {"attention_bias": True, "mlp_bias": True}
_TIED = {"tie_word_embeddings": True}
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
}  # fmt: skip
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 1.5, "norm_topk_prob": True, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}  # fmt: skip
_LATENT_HEADS = _ALL_HEADS | {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}  # fmt: skip
_DEEPSEEK = _LATENT_HEADS | _ROUTED_EXPERTS | {"moe_layer_freq": 1, "attention_bias": False}
_INDEXER = {"index_head_dim": 32, "index_n_heads": 2, "index_topk": WINDOW}
_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip
_LONG_ROPE = {
    "type": "longrope",
    "long_factor": [1.0 + 0.25 * i for i in range(16)],
    "short_factor": [1.0 + 0.125 * i for i in range(16)],
}  # fmt: skip
_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _kinds(letters: str) -> list[str]:
    """Layer types by their first letters."""
    types = ("sliding_attention", "full_attention", "linear_attention", "conv", "mamba")
    names = {name[0]: name for name in types}
    return [{**names, "a": "attention"}[letter] for letter in letters]


_WINDOWS = {"sliding_window": WINDOW, "layer_types": _kinds("sssf")}
_GEMMA = _WIDE | _TIED | {"hidden_activation": "gelu_pytorch_tanh"}
_GEMMA3 = _GEMMA | {
    "num_hidden_layers": 6, "query_pre_attn_scalar": 32, "rope_local_base_freq": 1000.0,
    "sliding_window": WINDOW, "sliding_window_pattern": 3,
}  # fmt: skip
_GEMMA4 = _GEMMA | {
    "model_type": "gemma4_text", "num_hidden_layers": 6, "layer_types": _kinds("sfsfsf"),
    "sliding_window": WINDOW, "global_head_dim": 64, "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25, "rope_theta": 10000.0, "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 1000.0, "rope_type": "default"},
    },
}  # fmt: skip
_QWEN3_MOE = _WIDE | _EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": []}
_QWEN3_5 = _WIDE | _DELTA | {
    "full_attention_interval": 2, "attention_bias": False,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    },
}  # fmt: skip
_GRANITE = _LLAMA | _TIED | {
    "intermediate_size": 128, "attention_bias": False, "mlp_bias": False, "logits_scaling": 2.0,
    "attention_multiplier": 0.125, "embedding_multiplier": 4.0, "residual_multiplier": 0.5,
}  # fmt: skip
_BAILING = {
    "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 1.5, "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "use_qk_norm": True,
}  # fmt: skip
_DYNAMIC_ROPE = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
_KIMI = _EXPERTS | {
    "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "moe_router_activation_func": "sigmoid", "moe_renormalize": True,
    "num_expert_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5,
    "linear_attn_config": {
        "kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 2, "head_dim": 32,
        "short_conv_kernel_size": 4,
    },
}  # fmt: skip
_LFM2 = _LLAMA | {
    "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "layer_types": _kinds("cfcf"),
    "block_dim": 64, "block_ff_dim": 96, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}  # fmt: skip
_LONGCAT = _LATENT_HEADS | {
    "num_layers": 3, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "n_routed_experts": 4,
    "moe_topk": 2, "zero_expert_num": 2, "zero_expert_type": "identity",
    "routed_scaling_factor": 1.5, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    "attention_bias": False,
}  # fmt: skip
_MINISTRAL_ROPE = _YARN | {
    "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_MUSE = _WINDOWS | {
    "post_norm_eps": 1e-8,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "final_logit_softcapping": 20.0, "output_multiplier": 0.5,
}  # fmt: skip

CONFIGS: dict[str, Config] = {
    # Those of most use.
    "llama": _LLAMA | {"head_dim": 32, "rope_scaling": _LLAMA3_ROPE} | _BIASED,
    "qwen2": _LLAMA | _TIED,
    "qwen2_moe": _ALL_HEADS | _EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen2_vl": _LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    "qwen3": _WIDE | _TIED,
    "qwen3_moe": _QWEN3_MOE | {"mlp_only_layers": [0]},
    "qwen3_vl": {"text_config": _WIDE | {"model_type": "qwen3_vl_text"}},
    "qwen3_vl_moe": {"text_config": _QWEN3_MOE | {"model_type": "qwen3_vl_moe_text"}},
    "qwen3_next": _QWEN3_MOE | _DELTA | {
        "shared_expert_intermediate_size": 32, "partial_rotary_factor": 0.25,
        "full_attention_interval": 2,
    },
    "qwen3_5": {"text_config": _QWEN3_5 | {"model_type": "qwen3_5_text"}},
    "qwen3_5_moe": {
        "text_config": _QWEN3_5 | _EXPERTS | {
            "model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 32,
        }
    },
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 32, "sliding_window": WINDOW,
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
            "model_type": "gemma3n_text", "num_hidden_layers": 6, "layer_types": _kinds("sfsfsf"),
            "num_kv_shared_layers": 2, "sliding_window": WINDOW, "rope_local_base_freq": 1000.0,
            "final_logit_softcapping": 30.0, "vocab_size_per_layer_input": _VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0], "altup_num_inputs": 4,
            "altup_active_idx": 0, "altup_coef_clip": 120.0, "altup_correct_scale": True,
            "laurel_rank": 32,
        }
    },
    "gemma4_text": _GEMMA4 | {
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": _VOCABULARY, "use_double_wide_mlp": True,
    },
    "gemma4": {
        "vocab_size": _VOCABULARY,
        "text_config": _GEMMA4 | {
            "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
            "use_double_wide_mlp": False, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
            "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    },
    "gpt_oss": _WIDE | _LOCAL_EXPERTS | {
        "intermediate_size": 64, "sliding_window": WINDOW, "layer_types": _kinds("sfsf"),
        "rope_scaling": _YARN,
    },
    "smollm3": _LLAMA | _TIED | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0]},
    "phi": _ALL_HEADS | {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "phi3": _LLAMA | {"original_max_position_embeddings": 64, "rope_scaling": _LONG_ROPE},
    "phimoe": _LLAMA | _LOCAL_EXPERTS | {
        "original_max_position_embeddings": 64,
        "rope_scaling": _LONG_ROPE | {"long_mscale": 1.25, "short_mscale": 1.25},
    },
    "glm": _WIDE | {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": _WIDE | {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4_moe": _WIDE | _ROUTED_EXPERTS | {
        "attention_bias": True, "partial_rotary_factor": 0.5, "rope_scaling": None,
        "use_qk_norm": True,
    },
    "granite": _GRANITE,
    "granitemoe": _GRANITE | _LOCAL_EXPERTS,
    "granitemoehybrid": _GRANITE | _LOCAL_EXPERTS | {
        "layer_types": _kinds("mmam"), "shared_intermediate_size": 64, "mamba_n_heads": 4,
        "mamba_d_head": 32, "mamba_d_state": 32, "mamba_d_conv": 4, "mamba_n_groups": 1,
        "mamba_conv_bias": True, "mamba_proj_bias": False, "position_embedding_type": "nope",
    },
    "olmo2": _LLAMA,
    "olmo3": _LLAMA | _WINDOWS,
    # The others, by name.
    "afm7": {
        "hidden_dim": 64, "num_layers": 5, "num_kv_reuse_layers": 2, "num_heads": 2,
        "num_kv_heads": 1, "hidden_dim_scale_factor": 1.5, "vocab_size": _VOCABULARY,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    },
    "afmoe": _WIDE | _EXPERTS | _WINDOWS | {
        "num_shared_experts": 1, "num_dense_layers": 1, "route_norm": True, "route_scale": 1.5,
        "score_func": "sigmoid", "mup_enabled": True,
    },
    "apertus": _LLAMA | {
        "attention_bias": False, "mlp_bias": False, "post_norm": False, "qk_norm": True,
        "rope_scaling": _LLAMA3_ROPE,
    },
    "baichuan_m1": _LLAMA | {
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": WINDOW,
        "sliding_window_layers": [1, 3], "num_swa_attention_heads": 2, "num_swa_key_value_heads": 2,
        "conv_window": 2,
    },
    "bailing_moe": _WIDE | _EXPERTS | _BAILING | {"use_bias": True, "use_qkv_bias": True},
    "bailing_moe_linear": _WIDE | _EXPERTS | _BAILING | {
        "layer_group_size": 2, "group_norm_size": 2, "num_key_value_heads": 4,
        "partial_rotary_factor": 0.5,
    },
    "bailing_hybrid": _LATENT_HEADS | _EXPERTS | _BAILING | {
        "head_dim": 32, "layer_group_size": 2, "group_norm_size": 2, "partial_rotary_factor": 0.5,
    },
    "bailing_moe_v3": _LATENT_HEADS | _EXPERTS | _BAILING | {
        "model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"],
        "head_dim": 32, "layer_group_size": 2, "moe_shared_expert_intermediate_size": 32,
        "short_conv_kernel_size": 4, "kda_lower_bound": -5.0, "kda_safe_gate": True,
        "no_kda_lora": True,
    },
    "cohere": _ALL_HEADS | {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": _LLAMA | {
        "head_dim": 32, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "sliding_window": WINDOW,
        "sliding_window_pattern": 4,
    },
    "dbrx": {
        "d_model": 64, "n_heads": 2, "n_layers": 3, "max_seq_len": _LENGTH,
        "vocab_size": _VOCABULARY,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": _ALL_HEADS | _ROUTED_EXPERTS | {"moe_layer_freq": 1},
    "deepseek_v2": _DEEPSEEK | {
        "topk_method": "group_limited_greedy", "scoring_func": "softmax",
        "rope_scaling": _YARN | {"type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "deepseek_v3": _DEEPSEEK | {
        "rope_scaling": _YARN | {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}
    },
    "deepseek_v32": _DEEPSEEK | _INDEXER,
    "deepseek_v41": _WIDE | _ROUTED_EXPERTS | {
        "num_hidden_layers": 6, "q_lora_rank": 32, "qk_rope_head_dim": 16, "o_groups": 2,
        "o_lora_rank": 32, "scoring_func": "sqrtsoftplus", "swiglu_limit": 10.0,
        "sliding_window": WINDOW, "compress_ratios": [0, 2, 2, 2, 2, 0], "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1, 3], "candidate_source_layer_id": 1,
        "candidate_topk_blocks": 2, "candidate_block_size": 2, "compress_rope_theta": 10000.0,
        "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4, "hc_mult": 4,
        "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    },
    "dots1": _WIDE | _ROUTED_EXPERTS,
    "ernie4_5": _WIDE | _TIED | {"use_bias": True},
    "ernie4_5_moe": _WIDE | _TIED | {
        "use_bias": False, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32,
        "moe_layer_start_index": 1, "moe_layer_interval": 1, "moe_num_shared_experts": 1,
        "moe_use_aux_free": True,
    },
    "exaone": _LLAMA | _TIED | {
        "num_layers": 4, "layer_norm_epsilon": 1e-5, "rope_scaling": _LLAMA3_ROPE,
    },
    "exaone4": _WIDE | _WINDOWS | {
        "rope_scaling": _LLAMA3_ROPE, "sliding_window_pattern": "LLLG",
    },
    "exaone_moe": _WIDE | _EXPERTS | _WINDOWS | {
        "num_shared_experts": 1, "is_moe_layer": [False, True, True, True], "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 1.5,
    },
    "falcon_h1": _WIDE | _TIED | {
        "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375,
        "embedding_multiplier": 2.0, "key_multiplier": 0.5, "lm_head_multiplier": 0.5,
        "mlp_multipliers": [0.875, 0.625], "ssm_in_multiplier": 1.25,
        "ssm_multipliers": [0.75, 0.5, 0.75, 0.5, 0.75], "ssm_out_multiplier": 0.5,
        "mamba_d_conv": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 32,
        "mamba_n_groups": 1, "mamba_n_heads": 4, "mamba_rms_norm": True, "mamba_conv_bias": True,
    },
    "glm4_moe_lite": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK | _INDEXER | {
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}
    },
    "gpt2": {
        "n_ctx": _LENGTH, "n_embd": 64, "n_head": 2, "n_layer": 4, "n_positions": _LENGTH,
        "layer_norm_epsilon": 1e-5, "vocab_size": _VOCABULARY,
    },
    "gpt_bigcode": {
        "n_embd": 64, "n_inner": 96, "n_head": 2, "n_layer": 4, "n_positions": _LENGTH,
        "layer_norm_epsilon": 1e-5, "multi_query": True, "vocab_size": _VOCABULARY,
    },
    "gpt_neox": _LLAMA | {
        "layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5,
        "use_parallel_residual": True, "num_key_value_heads": 2,
    },
    "gptj": {
        "n_embd": 64, "n_head": 2, "n_layer": 4, "n_positions": _LENGTH, "layer_norm_epsilon": 1e-5,
        "rotary_dim": 16, "vocab_size": _VOCABULARY,
    },
    "helium": _LLAMA | {"attention_bias": False, "mlp_bias": False, "head_dim": 32},
    "hunyuan": _LLAMA | {
        "attention_bias": False, "moe_topk": 2, "num_experts": 4, "num_shared_expert": 1,
        "use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": True, "cla_share_factor": 2,
        "moe_intermediate_size": 32, "rope_scaling": _DYNAMIC_ROPE,
    },
    "hunyuan_v1_dense": _WIDE | {"use_qk_norm": True, "rope_scaling": _DYNAMIC_ROPE},
    "internlm2": _LLAMA | {"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "internlm3": _LLAMA | {
        "bias": False, "qkv_bias": False,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    },
    "iquestloopcoder": _WIDE | {"loop_num": 2, "loop_window_size": WINDOW},
    "jamba": _LLAMA | {
        "attn_layer_offset": 1, "attn_layer_period": 3, "expert_layer_offset": 1,
        "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2,
        "mamba_dt_rank": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 6,
    },
    "kimi_k25": {"text_config": _DEEPSEEK | {"model_type": "kimi_k2"}},
    "kimi_k3": {
        "text_config": _LATENT_HEADS | _KIMI | {
            "model_type": "kimi_linear", "mla_use_nope": True, "mla_use_output_gate": True,
            "hidden_act": "situ", "activation_situ_beta": 1.0, "activation_situ_linear_beta": 4.0,
            "attn_res_block_size": 2, "routed_expert_hidden_size": 32, "latent_moe_use_norm": True,
        }
    },
    "kimi_linear": _LATENT_HEADS | _KIMI | {
        "head_dim": 32, "mla_use_nope": True, "q_lora_rank": None, "model_max_length": _LENGTH,
    },
    "kimi_vl": {"text_config": _DEEPSEEK | {"model_type": "deepseek_v3"}},
    "Klear": _ALL_HEADS | _EXPERTS | {
        "attention_bias": False, "mlp_only_layers": [0], "decoder_sparse_step": 1,
        "n_shared_experts": 1,
    },
    "laguna": _WIDE | _EXPERTS | _WINDOWS | {
        "num_attention_heads_per_layer": [2, 2, 2, 4],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "gating": True,
        "shared_expert_intermediate_size": 32, "moe_routed_scaling_factor": 1.5,
        "moe_router_score_func": "sigmoid",
        "rope_parameters": {
            "full_attention": _YARN | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2 | _EXPERTS | {"use_expert_bias": True, "num_dense_layers": 1},
    "lfm2-vl": {"text_config": _LFM2 | {"model_type": "lfm2"}},
    "lille-130m": {
        "block_size": _LENGTH, "layer_norm_eps": 1e-5, "n_embd": 64, "n_head": 2, "n_kv_heads": 1,
        "n_layer": 4, "rope_theta": 10000.0, "vocab_size": _VOCABULARY,
    },
    "llama4": {
        "text_config": _WIDE | {
            "model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1,
            "intermediate_size": 32, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2,
            "attention_chunk_size": WINDOW, "attention_bias": False, "use_qk_norm": True,
            "attn_temperature_tuning": True, "floor_scale": 16, "attn_scale": 0.1,
            "rope_scaling": _LLAMA3_ROPE,
        }
    },
    "llama4_text": _WIDE | _TIED | {
        "intermediate_size_mlp": 96, "no_rope_layers": [1, 1, 1, 0], "use_qk_norm": True,
    },
    "longcat_flash": _LONGCAT | {"attention_method": "MLA"},
    "longcat_flash_ngram": _LONGCAT | {
        "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2,
    },
    "mamba": {
        "hidden_size": 64, "intermediate_size": 128, "state_size": 16, "num_hidden_layers": 4,
        "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 32,
        "vocab_size": _VOCABULARY,
    },
    "mamba2": {
        "hidden_size": 64, "intermediate_size": 128, "state_size": 32, "num_heads": 4,
        "head_dim": 32, "num_hidden_layers": 4, "layer_norm_epsilon": 1e-5, "conv_kernel": 4,
        "n_groups": 1, "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": False,
        "time_step_limit": [0.001, 100.0], "time_step_rank": 4, "vocab_size": _VOCABULARY,
    },
    "mellum": _WIDE | _EXPERTS | _WINDOWS | {
        "rope_parameters": {
            "full_attention": _YARN | {"rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        }
    },
    "mimo": _LLAMA | {"num_nextn_predict_layers": 1},
    "mimo_v2_flash": _WIDE | _ROUTED_EXPERTS | {
        "layernorm_epsilon": 1e-5, "hybrid_layer_pattern": [0, 1, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1], "n_shared_experts": None,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW, "swa_rope_theta": 1000.0, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "v_head_dim": 32, "swa_head_dim": 32, "swa_v_head_dim": 32,
        "partial_rotary_factor": 0.5, "attention_value_scale": 0.75,
    },
    "minicpm": _LLAMA | {"dim_model_base": 32, "scale_depth": 1.5, "scale_emb": 4},
    "minicpm3": _LATENT_HEADS | {
        "dim_model_base": 32, "scale_depth": 1.5, "scale_emb": 4,
        "rope_scaling": _LONG_ROPE | {"original_max_position_embeddings": 64},
    },
    "minimax": _WIDE | _LOCAL_EXPERTS | {
        "intermediate_size": 32, "shared_intermediate_size": 0, "rotary_dim": 16,
        "scoring_func": "sigmoid", "use_qk_norm": True,
    },
    "minimax_m3_vl": {
        "text_config": _WIDE | _LOCAL_EXPERTS | {
            "model_type": "minimax_m3", "intermediate_size": 32, "dense_intermediate_size": 96,
            "shared_intermediate_size": 32, "partial_rotary_factor": 0.5,
            "routed_scaling_factor": 1.5, "moe_layer_freq": [0, 1, 1, 1],
            "sparse_attention_config": {
                "sparse_num_index_heads": 2, "sparse_index_dim": 32, "sparse_block_size": 4,
                "sparse_topk_blocks": 3, "sparse_local_block": 1,
                "sparse_attention_freq": [0, 1, 1, 1],
            },
        }
    },
    "ministral3": _WIDE | _TIED | {"rope_parameters": _MINISTRAL_ROPE},
    "mistral3": {
        "text_config": _WIDE | {"model_type": "ministral3", "rope_parameters": _MINISTRAL_ROPE}
    },
    "mistral4": _LATENT_HEADS | _ROUTED_EXPERTS | {"rope_parameters": _MINISTRAL_ROPE},
    "mixtral": _LLAMA | _LOCAL_EXPERTS,
    "muse_glimmer": {
        "text_config": _WIDE | _MUSE | {"qk_scale_factor": 2.0, "hidden_activation": "silu"}
    },
    "nanbeige": _LLAMA | {"num_loops": 2},
    "nanochat": _ALL_HEADS,
    "nemotron": _LLAMA | {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "nemotron_h": _WIDE | _ROUTED_EXPERTS | {
        "hybrid_override_pattern": "M-*EM*E-", "num_hidden_layers": 8, "attention_bias": False,
        "mamba_num_heads": 4, "mamba_head_dim": 32, "mamba_proj_bias": False, "ssm_state_size": 32,
        "conv_kernel": 4, "n_groups": 2, "mlp_bias": False, "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True,
        "moe_shared_expert_intermediate_size": 32,
    },
    "nemotron-nas": _LLAMA | {
        "num_hidden_layers": 5,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 0.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 1}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
        ],
    },
    "olmo_hybrid": _ALL_HEADS | _DELTA | {
        "attention_bias": False, "layer_types": _kinds("lflf"), "linear_num_key_heads": 4,
        "linear_allow_neg_eigval": True,
    },
    "olmoe": _LLAMA | _EXPERTS | {"intermediate_size": 32},
    "openelm": {
        "head_dim": 32, "model_dim": 64, "num_transformer_layers": 4,
        "num_query_heads": [2, 2, 4, 4], "num_kv_heads": [1, 1, 2, 2],
        "ffn_multipliers": [0.5, 1.0, 1.5, 2.0], "ffn_dim_divisor": 32, "ffn_with_glu": True,
        "normalize_qk_projections": True, "share_input_output_layers": True,
        "rope_freq_constant": 10000, "vocab_size": _VOCABULARY,
    },
    "phi3small": _LLAMA | {
        "vocab_size": 100352,  # it hides tokens of that vocabulary by number
        "dense_attention_every_n_layers": 2, "ff_intermediate_size": 96, "gegelu_limit": 20.0,
        "layer_norm_epsilon": 1e-5, "mup_attn_multiplier": 1.0, "mup_embedding_multiplier": 4.0,
        "mup_width_multiplier": 2.0, "rope_embedding_base": 10000, "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1, "blocksparse_vert_stride": 2,
    },
    "phixtral": {
        "model_dim": 64, "num_heads": 2, "num_layers": 4, "num_vocab": _VOCABULARY,
        "rotary_dim": 16, "num_experts_per_tok": 2, "num_local_experts": 4,
    },
    "pixtral": {"text_config": _LLAMA | {"model_type": "mistral", "head_dim": 32}},
    "plamo": _LLAMA | {"num_attention_heads": 4, "n_shared_head": 2},
    "plamo2": _LLAMA | _TIED | {
        "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size_per_head": 32,
        "attention_window_size": WINDOW, "mamba_d_state": 32, "mamba_d_conv": 4,
        "mamba_num_heads": 4, "mamba_step": 2, "mamba_chunk_size": WINDOW, "mamba_enabled": True,
    },
    "plamo3": _WIDE | _TIED | {
        "window_size": WINDOW, "sliding_window_pattern": 4, "rope_local_theta": 1000,
    },
    "prism_hadamard_qwen35": {
        "text_config": _QWEN3_5 | {
            "model_type": "qwen3_5_text", "hidden_size": 128, "intermediate_size": 512,
        },
        "schema_version": 2, "tensor_namespace": "mlx-vlm-qwen3_5",
        "gdn_activation_layout": "grouped",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": f"model.{path}", "embedding": "embed" in path, "dtype": "float16", "block": n}
            for path, n in [
                ("embed_tokens", 0),
                *((f"layers.{i}.mlp.{part}_proj", 0) for i in range(4) for part in ("up", "gate")),
                *((f"layers.{i}.mlp.down_proj", 512) for i in range(4)),
            ]
        ],
    },
    "qwen": {
        "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4, "kv_channels": 32,
        "layer_norm_epsilon": 1e-6, "intermediate_size": 192, "no_bias": True,
        "vocab_size": _VOCABULARY,
    },
    "recurrent_gemma": _GEMMA | {
        "intermediate_size": 128,
        "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1,
        "attention_bias": False, "conv1d_width": 4, "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW, "embeddings_scale_by_sqrt_dim": True,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        "hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 4,
        "norm_eps": 1e-5, "a_low_rank_dim": 64, "v_low_rank_dim": 64, "gate_low_rank_dim": 64,
        "decay_low_rank_dim": 64, "vocab_size": _VOCABULARY,
    },
    "seed_oss": _WIDE | {"attention_bias": True, "attention_out_bias": False},
    "solar_open": _WIDE | _ROUTED_EXPERTS | {"partial_rotary_factor": 1.0, "use_qk_norm": True},
    "spark2_5": _WIDE | _WINDOWS | {
        "rope_parameters": {
            "full_attention": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_theta": 1000.0},
        }
    },
    "stablelm": _ALL_HEADS | {
        "use_qkv_bias": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5,
        "qk_layernorm": True,
    },
    "starcoder2": _LLAMA | _TIED | {"norm_epsilon": 1e-5},
    "step3p5": _WIDE | _WINDOWS | {
        "num_attention_groups": 2, "layer_types": _kinds("fssf"),
        "attention_other_setting": {
            "attention_type": "sliding_attention", "num_attention_heads": 2,
            "num_attention_groups": 1, "head_dim": 32,
        },
        "rope_scaling": _LLAMA3_ROPE, "yarn_only_types": ["full_attention"],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5], "use_head_wise_attn_gate": True,
        "moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 32, "share_expert_dim": 32,
        "moe_layers_enum": "1,2,3", "moe_router_scaling_factor": 1.5, "norm_expert_weight": True,
        "swiglu_limits": [0.0, 0.0, 7.0, 7.0], "swiglu_limits_shared": [0.0, 0.0, 7.0, 7.0],
    },
    "talkie": _ALL_HEADS | {"head_dim": 32},
    "telechat3": _LLAMA | {
        "head_dim": 32, "rope_scaling": _YARN | {"rope_type": "telechat3-yarn"},
    },
    "youtu_llm": _LATENT_HEADS | _TIED,
}  # fmt: skip

CANNOT: dict[str, str] = {
    "bitnet": "its matrices are multiplied by a Metal kernel that has no other path",
    "gear": "transformers refuses its layer types, so mlx-lm finds no tokenizer",
    "muse_spark": "its attention is a Metal kernel that has no other path",
    "olmo": "mlx-lm ends the process unless the package ai2-olmo is installed",
}

# Where a norm multiplies by one more than it stores.
_ONE_MORE = {
    "gemma", "gemma2", "gemma3_text", "minimax_m3_vl", "muse_glimmer", "nemotron",
    "plamo2", "plamo3", "recurrent_gemma",
}  # fmt: skip
# Parameters that no general rule draws well, by the ends of their names: least and most.
_RANGES = {
    r"A_log": (0.0, 1.5),
    r"dt_bias|dt_proj\.bias": (-3.0, 0.0),
    r"correct_output_scale": (0.6, 1.4),
    r"recurrent_param": (-4.0, -2.0),
    r"x_[rwkvag]": (0.0, 1.0),
    r"k_[ka]": (0.5, 1.0),
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
    return write_model(folder, config, seed=seed, dtype=dtype)


def write_model(folder: Path, config: Config, *, seed: int = 0, dtype: str = "float32") -> Config:
    """Write a random model of a config that mlx-lm knows; return the config."""
    config = json.loads(json.dumps(config))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = make_tokenizer(_LENGTH)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model_class, args_class = _get_classes(json.loads(json.dumps(config)))
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    weights = draw_weights(model, seed)
    if hasattr(model, "sanitize"):  # baichuan_m1 stores the rows of its head at a length of one
        weights = model.sanitize(weights)
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
    leaf = name.rpartition(".")[2]
    if type(module).__name__.startswith("Hadamard"):
        return _draw_packed(leaf, array, module, rng)
    if not _is_float(array):
        return array
    noise = rng.standard_normal(array.shape)
    for end, (least, most) in _RANGES.items():
        if re.search(rf"(^|[._])({end})$", name):
            return mx.array(rng.uniform(least, most, array.shape).astype(np.float32))
    first = float(array.reshape(-1)[0])
    constant = bool((array == first).all())
    if "Norm" in type(module).__name__ and leaf == "weight":
        one_more = type(module).__module__.rpartition(".")[2] in _ONE_MORE
        values = float(not one_more) + 0.2 * noise
    elif constant and first:
        values = first * (1 + 0.2 * noise)
    elif leaf == "bias" or array.ndim == 1:
        values = 0.2 * noise
    elif isinstance(module, nn.Embedding):
        values = 0.3 * noise
    elif "conv" in name and array.shape[-1] == 1:
        values = noise / np.sqrt(array.shape[1])
    else:
        values = noise / np.sqrt(array.shape[-1])
    return mx.array(values.astype(np.float32))


def _draw_packed(
    part: str, array: mx.array, module: nn.Module, rng: np.random.Generator
) -> mx.array:
    """A part of a matrix of 2 bits, whose values have a mean of 0."""
    if part == "weight":
        return mx.array(rng.integers(0, 2**32, array.shape, dtype=np.uint32))
    if part == "signs":
        return mx.array(rng.choice([-1.0, 1.0], array.shape).astype(np.float32))
    step = 0.9 / np.sqrt(16 * module.weight.shape[-1])
    return mx.full(array.shape, {"scales": step, "biases": -1.5 * step}[part], array.dtype)


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def draw_text(seed: int, letters: int) -> str:
    """Text of few letters, some of which are frequent: activations are alike."""
    share = np.random.default_rng(0).dirichlet(np.full(64, 0.3))
    drawn = np.random.default_rng(seed).choice(64, letters, p=share)
    return "".join(chr(48 + i) for i in drawn)
