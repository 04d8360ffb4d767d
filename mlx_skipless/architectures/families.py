"""Source architectures: one entry each, for what is read and for what is written.

To add one, write a ``Family`` and put it into ``FAMILIES``: what its config means in the terms of
``docs/checkpoint.md``, what its tensors are called, and, if mlx-lm has a network of its own for it,
what that network can be and must be told. Knows nothing of files or arrays.
"""

import math
from collections.abc import Mapping

from ..errors import UserError
from ..network.model import FUSED, ModelArgs
from ..network.names import ATTENTION, EXPERTS, PROJECTIONS
from .family import (
    NO_WEIGHTS,
    Config,
    Family,
    Stock,
    find_rope_value,
    find_rotary_dim,
    find_value,
    list_biases,
    list_layers,
    read_flag,
)

QKV = ATTENTION[:3]
UNGATED = ("up_proj", "down_proj")
# Each of mlx-lm's networks computes one of them, whichever config.json names.
GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")

PRENORM: Config = {"skip": "both", "norm": "pre", "final_norm": True}
NO_WINDOW: Config = {"sliding_window": None, "layer_types": None}


# Llama: serial blocks, an RMS norm before each sub-layer and before the head.


def _read_llama(config: Config) -> Config:
    """Read Llama's window, which holds only where ``layer_types`` name the layers that have it."""
    return {"sliding_window": config.get("sliding_window") if config.get("layer_types") else None}


def _tell_rope(args: ModelArgs) -> Config:
    return {"rope_scaling": args.rope} if args.rope else {}


def _tell_llama(args: ModelArgs) -> Config:
    return {
        "attention_bias": bool(args.biases.get("q_proj")),
        "mlp_bias": bool(args.biases.get("gate_proj")),
        **_tell_rope(args),
        **(_tell_nemotron_nas(args) if args.removed else {}),
    }


def _tell_nemotron_nas(args: ModelArgs) -> Config:
    """Describe blocks without attention or FFN in the terms of mlx-lm's nemotron-nas."""
    group = args.num_attention_heads // args.num_key_value_heads
    # Widths are given as two thirds of a multiple of the stream's, and rounded up to 256.
    width = 1.5 * (args.intermediate_size - 128) / args.hidden_size

    def describe(part: str, layer: int, key: str, value: float) -> Config:
        gone = args.lacks(part, layer)
        # llama.cpp's converter looks at what is null, mlx-lm at what does nothing.
        return {key: None if gone else value, "no_op": gone, "replace_with_linear": False}

    return {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "max_position_embeddings": args.max_position_embeddings,
        "block_configs": [
            {
                "attention": describe("attention", layer, "n_heads_in_group", group),
                "ffn": describe("ffn", layer, "ffn_mult", width),
            }
            for layer in range(args.num_hidden_layers)
        ],
    }


def _fits_nemotron_nas(args: ModelArgs) -> bool:
    return (
        "sliding_attention" not in args.layer_types
        and not args.rope_traditional
        and (args.rope is None or "factor" in args.rope)
        and args.hidden_size == args.num_attention_heads * args.head_dim
        and not args.intermediate_size % 256
    )


LLAMA_TOLD = (
    "tie_word_embeddings", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
)  # fmt: skip
LLAMA_STOCK = Stock(
    told=LLAMA_TOLD,
    tell=_tell_llama,
    optional_biases=(ATTENTION, EXPERTS),
    slides=True,
    scales_rope=True,
    any_head_dim=True,
    drops=_fits_nemotron_nas,
)
# mlx-lm reads this of some architectures, transformers of none.
PAIRS: Config = {"rope_traditional": False}
LLAMA = Family(means=PRENORM, defaults=PAIRS, read=_read_llama, stock=LLAMA_STOCK)

# In Mistral a sliding window without "layer_types" holds for every layer (transformers).
MISTRAL = Family(means=PRENORM, defaults=PAIRS, stock=LLAMA_STOCK)
MINISTRAL = Family(means=PRENORM)


# Ministral 3: Mistral whose queries grow with their positions. The keys for that are among RoPE's.

MINISTRAL3_ROPE: Config = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MINISTRAL3_SIZES: Config = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
}


def _read_ministral3(config: Config) -> Config:
    """Read what queries grow by, and RoPE's own keys beside it."""
    rope = find_value(config, "rope_scaling", "rope_parameters", default=MINISTRAL3_ROPE)
    if not isinstance(rope, dict):
        return {}
    growth = find_value(rope, "llama_4_scaling_beta", default=0.0)
    rest = {
        k: v
        for k, v in rope.items()
        if k not in ("llama_4_scaling_beta", "max_position_embeddings")
    }
    if find_value(rope, "rope_type", "type") is None:
        rest["rope_type"] = "default"
    nulls = [key for key in ("head_dim", "num_key_value_heads") if config.get(key, 0) is None]
    return {
        **dict.fromkeys(nulls),  # which are computed, while an absent key has a default
        "rope_scaling": None,
        "rope_parameters": rest,
        "query_growth": growth,
        "query_step": rope.get("original_max_position_embeddings") if growth else None,
    }


def _tell_ministral3(args: ModelArgs) -> Config:
    rope = {
        "rope_type": "default",
        "original_max_position_embeddings": args.query_step or args.max_position_embeddings,
        **(args.rope or {}),
    }
    return {
        "rope_parameters": rope
        | {"rope_theta": args.rope_theta, "llama_4_scaling_beta": args.query_growth}
    }


MINISTRAL3 = Family(
    means=PRENORM,
    defaults=MINISTRAL3_SIZES,
    read=_read_ministral3,
    keys={"query_growth": "llama_4_scaling_beta"},
    stock=Stock(
        told=("tie_word_embeddings", *MINISTRAL3_SIZES),
        tell=_tell_ministral3,
        slides=True,
        scales_rope=True,
        any_head_dim=True,
    ),
)


# Mixtral: Mistral with experts, which a checkpoint has one by one and mlx-lm stacked.


def _read_mixtral(config: Config) -> Config:
    if config.get("num_local_experts") == 0:
        raise UserError('"num_local_experts" in config.json is 0, a mixtral has some: correct it')
    return {}


MIXTRAL_EXPERTS = {
    "block_sparse_moe.experts.{}.w1": "mlp.gate_proj",
    "block_sparse_moe.experts.{}.w2": "mlp.down_proj",
    "block_sparse_moe.experts.{}.w3": "mlp.up_proj",
}
MIXTRAL = Family(
    means=PRENORM,
    defaults=PAIRS
    | {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
    read=_read_mixtral,
    names={"mlp.router": "block_sparse_moe.gate", "mlp": "block_sparse_moe.switch_mlp"},
    experts=MIXTRAL_EXPERTS,
    stock=Stock(
        told=(
            "tie_word_embeddings",
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_theta",
            "num_local_experts",
            "num_experts_per_tok",
        ),
    ),
)


# Gemma 1: Llama with a scaled embedding, which is the head too. Its norms' weights are stored less
# one. transformers' GELU is the tanh form whatever "hidden_act" says, mlx-lm's the exact one.


def _read_gemma(config: Config) -> Config:
    size = config.get("hidden_size")
    return {"embedding_scale": math.sqrt(size) if isinstance(size, int) and size > 0 else 1.0}


GEMMA = Family(
    means=PRENORM | NO_WINDOW,
    defaults=PAIRS | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    read=_read_gemma,
    keys={"hidden_act": "hidden_activation"},
    gain_offset=1.0,
    stock=Stock(told=LLAMA_TOLD, tell=_tell_llama, activations=GELU, tied=True, any_head_dim=True),
)


# Qwen 2: Llama with biases on q, k and v. Qwen 3: with an RMS norm of each head's q and k instead.


def _read_qwen(config: Config) -> Config:
    """Read Qwen's window, which holds only where ``use_sliding_window`` says so."""
    slides = read_flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    kinds = config.get("layer_types") if slides else None
    if slides and kinds is None:
        full = find_value(config, "max_window_layers", default=28)
        if not isinstance(full, int):
            raise UserError(
                f'"max_window_layers" in config.json is {full!r}; it must be a whole number'
            )
        kinds = [("full" if i < full else "sliding") + "_attention" for i in list_layers(config)]
    return {"layer_types": kinds, "sliding_window": config.get("sliding_window") if kinds else None}


QWEN_TOLD = (*LLAMA_TOLD, "max_position_embeddings")
QWEN2 = Family(
    means=PRENORM | {"attention_bias": None},
    defaults=PAIRS | {"max_position_embeddings": 32768},
    read=_read_qwen,
    biased=QKV,
    stock=Stock(told=QWEN_TOLD, tell=_tell_rope, scales_rope=True),
)
QWEN3 = Family(
    means=PRENORM | {"qk_norm": True},
    defaults={"max_position_embeddings": 32768, "head_dim": 128},
    read=_read_qwen,
    stock=Stock(told=QWEN_TOLD, tell=_tell_rope, scales_rope=True, any_head_dim=True),
)


# LayerNorms instead of RMS norms, mostly without a gate and in parallel blocks.

LAYER_NORMS = PRENORM | NO_WINDOW | {"norm_type": "layer"}
FULL_HEADS: Config = {"num_key_value_heads": None, "head_dim": None}
PARALLEL = LAYER_NORMS | {"block": "parallel", "shared_norm": True}
PARALLEL_UNGATED = {
    **PARALLEL,
    "gated": False,
    "shifts": ["attention", "final"],
    "head_bias": True,
}
LAYER_NORM_KEYS = {"rms_norm_eps": "layer_norm_eps"}
UNTIED: Config = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # where configs are silent


def _has_fourfold_ffn(args: ModelArgs) -> bool:
    return args.intermediate_size == 4 * args.hidden_size


# GPT-NeoX and Pythia: attention and FFN each behind a LayerNorm of its own, RoPE on a quarter of a
# head. transformers' GELU is the exact one, mlx-lm's its tanh form.


def _read_gpt_neox(config: Config) -> Config:
    parallel = read_flag(config, "use_parallel_residual", default=True)
    all_biased = read_flag(config, "attention_bias", default=True)
    return {
        "block": "parallel" if parallel else "serial",
        "rope_theta": find_rope_value(config, "rotary_emb_base", "rope_theta", default=10000),
        "rotary_dim": find_rotary_dim(config, "rotary_pct", "partial_rotary_factor", default=0.25),
        **({} if all_biased else {"biases": list_biases(config, UNGATED)}),
    }


GPT_NEOX = Family(
    means=LAYER_NORMS | FULL_HEADS | {"shifts": ["attention", "ffn", "final"], "gated": False},
    defaults=UNTIED | {"hidden_act": "gelu"},
    read=_read_gpt_neox,
    also={"model.embed_out": "embed_out", "model.h": "gpt_neox.layers", "model": "gpt_neox"},
    ignored=(*NO_WEIGHTS, ".attention.bias", ".attention.masked_bias"),
    keys=LAYER_NORM_KEYS,
    names={
        "model.embed_tokens": "gpt_neox.embed_in",
        "model.layers": "gpt_neox.layers",
        "model.norm": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
        "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    fused={"attention.query_key_value": tuple(PROJECTIONS[name] for name in QKV)},
    fused_by_head=True,
    biased=(*ATTENTION, *UNGATED),
    stock=Stock(
        told=("max_position_embeddings", "rms_norm_eps"),
        tell=lambda args: {
            "rotary_emb_base": args.rope_theta,
            "rotary_pct": args.rotary_dim / args.head_dim,
            "use_parallel_residual": args.block == "parallel",
        },
        activations=GELU,
        tied=False,
        also=_has_fourfold_ffn,
    ),
)


# GPT-J: parallel blocks behind one LayerNorm, RoPE on neighbours, biases on FFN and head alone.


def _read_gptj(config: Config) -> Config:
    size, inner = config.get("hidden_size"), config.get("intermediate_size")
    return {"intermediate_size": 4 * size if inner is None and isinstance(size, int) else inner}


GPTJ = Family(
    means={
        **PARALLEL_UNGATED,
        **FULL_HEADS,
        **dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters")),
        "rope_traditional": True,
    },
    defaults=UNTIED | {"hidden_act": "gelu_new", "rotary_dim": 64},
    read=_read_gptj,
    also={"model": "transformer"},
    ignored=(".attn.bias", ".attn.masked_bias"),
    keys={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    names={
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "self_attn.o_proj": "attn.out_proj",
        "self_attn": "attn",
        "mlp.up_proj": "mlp.fc_in",
        "mlp.down_proj": "mlp.fc_out",
    },
    biased=UNGATED,
    stock=Stock(
        told=("rms_norm_eps", "rotary_dim", "max_position_embeddings"),
        activations=GELU,
        tied=False,
        head_bias=True,
        also=_has_fourfold_ffn,
    ),
)


# Phi 1 to 2: parallel blocks behind one LayerNorm, biases everywhere, RoPE on a part of a head.

PHI = Family(
    means=PARALLEL_UNGATED,
    defaults=UNTIED | {"hidden_act": "gelu_new"},
    read=lambda config: {
        "rotary_dim": find_rotary_dim(config, "partial_rotary_factor", default=0.5)
    },
    unsupported=("qk_layernorm",),
    keys=LAYER_NORM_KEYS,
    names={
        "model.norm": "model.final_layernorm",
        "self_attn.o_proj": "self_attn.dense",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    },
    biased=(*ATTENTION, *UNGATED),
    stock=Stock(
        told=(
            "max_position_embeddings",
            "num_key_value_heads",
            "intermediate_size",
            "rms_norm_eps",
            "rope_theta",
        ),
        tell=lambda args: {"partial_rotary_factor": args.rotary_dim / args.head_dim},
        activations=GELU,
        tied=False,
        head_bias=True,
    ),
)


# Command R, PaLM's block: attention and SwiGLU in parallel behind one LayerNorm without a bias,
# RoPE on neighbours. The head is the embedding, its logits scaled.

COHERE = Family(
    means=PARALLEL | {"shifts": [], "rope_traditional": True},
    defaults={"rms_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True},
    unsupported=("use_qk_norm",),
    keys=LAYER_NORM_KEYS,
    stock=Stock(
        told=("num_key_value_heads", "rope_theta", "rms_norm_eps", "logit_scale"),
        tell=lambda args: {"attention_bias": bool(args.biases), "use_qk_norm": False},
        tied=True,
        optional_biases=(ATTENTION,),
    ),
)


# This package's own format, whose config means what it says.
SKIPLESS = Family(
    read=dict,
    also={"block_sparse_moe.gate": "mlp.router"},
    fused={
        f"{PROJECTIONS[parts[0]].partition('.')[0]}.{name}": tuple(PROJECTIONS[p] for p in parts)
        for name, parts in FUSED.items()
    },
    experts=MIXTRAL_EXPERTS,
)

FAMILIES: Mapping[str, Family] = {
    "cohere": COHERE,
    "gemma": GEMMA,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "llama": LLAMA,
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL3,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "phi": PHI,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "skipless": SKIPLESS,
}


def find_family(config: Config) -> Family:
    """Return the family of a config.

    Raises:
        UserError: for an architecture that is not known.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} in config.json is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}, and but for what is exact whatever the "
            "installed mlx-lm runs"
        )
    return FAMILIES[model_type]
