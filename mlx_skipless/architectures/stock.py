"""mlx-lm's own networks: which of ours they are the same as, and what they must be told."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..network.model import ModelArgs
from ..network.names import ATTENTION

Config = dict[str, Any]
FFN = ("gate_proj", "up_proj", "down_proj")
# mlx-lm's networks have one of them, as they are.
GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")


@dataclass(frozen=True)
class Stock:
    """One of mlx-lm's networks.

    Attributes:
        expresses: whether it is the same function as a network.
        settings: what config.json must tell it; where configs are silent it has its own defaults.
        drops: whether the same holds without some sub-layers, in mlx-lm's nemotron-nas.
    """

    expresses: Callable[[ModelArgs], bool]
    settings: Callable[[ModelArgs], Config]
    drops: Callable[[ModelArgs], bool] = lambda args: False


def _everywhere(args: ModelArgs, *names: str) -> bool:
    """Whether all of these matrices have biases, or none."""
    found = {tuple(args.biases.get(name, ())) for name in names}
    return found <= {tuple(range(args.num_hidden_layers))} or found == {()}


def _biased(args: ModelArgs) -> set[str]:
    return {name for name, layers in args.biases.items() if layers}


def _like_llama(args: ModelArgs) -> bool:
    """Serial blocks of the kind that all of Llama's descendants have."""
    return (
        args.block == "serial"
        and args.norm_type == "rms"
        and args.gated
        and args.hidden_act == "silu"
        and args.rotary_dim == args.head_dim
        and not args.rope_traditional
        and not args.head_bias
        and args.embedding_scale == args.logit_scale == 1
    )


def _full_heads(args: ModelArgs) -> bool:
    return args.hidden_size == args.num_attention_heads * args.head_dim


def _slides(args: ModelArgs) -> bool:
    return "sliding_attention" in args.layer_types


def _llama(args: ModelArgs) -> bool:
    every = all(kind == "sliding_attention" for kind in args.layer_types)
    uniform = _everywhere(args, *ATTENTION) and _everywhere(args, *FFN)
    plain = not args.qk_norm and not args.num_local_experts
    return _like_llama(args) and plain and uniform and not every


def _nemotron_nas(args: ModelArgs) -> bool:
    rope = args.rope is None or "factor" in args.rope
    whole = _full_heads(args) and not args.intermediate_size % 256
    return _llama(args) and not _slides(args) and rope and whole


def _llama_settings(args: ModelArgs) -> Config:
    settings: Config = {
        "tie_word_embeddings": args.tie_word_embeddings,
        "num_key_value_heads": args.num_key_value_heads,
        "head_dim": args.head_dim,
        "rms_norm_eps": args.rms_norm_eps,
        "rope_theta": args.rope_theta,
        "attention_bias": bool(args.biases.get(ATTENTION[0])),
        "mlp_bias": bool(args.biases.get(FFN[0])),
    }
    settings |= {"rope_scaling": args.rope} if args.rope else {}
    if args.removed:
        settings |= _nemotron_nas_settings(args)
    return settings


def _nemotron_nas_settings(args: ModelArgs) -> Config:
    """Blocks without attention or FFN, in the terms of mlx-lm's nemotron-nas."""
    group = args.num_attention_heads // args.num_key_value_heads
    # Widths are given as two thirds of a multiple of the stream's, and rounded up to 256.
    width = 1.5 * (args.intermediate_size - 128) / args.hidden_size

    def part(name: str, layer: int, key: str, value: float) -> Config:
        gone = args.lacks(name, layer)
        # llama.cpp's converter looks at what is null, mlx-lm at what does nothing.
        return {key: None if gone else value, "no_op": gone, "replace_with_linear": False}

    return {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "max_position_embeddings": args.max_position_embeddings,
        "block_configs": [
            {
                "attention": part("attention", layer, "n_heads_in_group", group),
                "ffn": part("ffn", layer, "ffn_mult", width),
            }
            for layer in range(args.num_hidden_layers)
        ],
    }


LLAMA = Stock(_llama, _llama_settings, drops=_nemotron_nas)


def _gemma(args: ModelArgs) -> bool:
    """Its GELU is the exact one, where transformers has the tanh that approximates it."""
    return args.hidden_act in GELU and args.tie_word_embeddings and not args.biases


GEMMA = Stock(_gemma, _llama_settings)


def _qwen2(args: ModelArgs) -> bool:
    biases = _biased(args) == {*ATTENTION[:3]} and _everywhere(args, *ATTENTION[:3])
    plain = not args.qk_norm and not args.num_local_experts and not _slides(args)
    return _like_llama(args) and plain and biases and _full_heads(args)


def _qwen_settings(args: ModelArgs) -> Config:
    settings = {
        **_llama_settings(args),
        "max_position_embeddings": args.max_position_embeddings,
    }
    return {k: v for k, v in settings.items() if k not in ("attention_bias", "mlp_bias")}


QWEN2 = Stock(_qwen2, _qwen_settings)


def _qwen3(args: ModelArgs) -> bool:
    plain = args.qk_norm and not args.num_local_experts and not _slides(args)
    return _like_llama(args) and plain and not args.biases


QWEN3 = Stock(_qwen3, _qwen_settings)


def _mixtral(args: ModelArgs) -> bool:
    plain = not args.qk_norm and not args.biases and not _slides(args) and args.rope is None
    return _like_llama(args) and plain and args.num_local_experts > 0 and _full_heads(args)


def _mixtral_settings(args: ModelArgs) -> Config:
    own = ("tie_word_embeddings", "num_key_value_heads", "rms_norm_eps", "rope_theta",
           "num_local_experts", "num_experts_per_tok")  # fmt: skip
    return {key: getattr(args, key) for key in own}


MIXTRAL = Stock(_mixtral, _mixtral_settings)


def _ungated(args: ModelArgs) -> bool:
    """What the older networks have in common: LayerNorm, GELU, no gate, plain RoPE."""
    return (
        args.norm_type == "layer"
        and not args.gated
        and args.hidden_act in GELU
        and args.rope is None
        and _full_heads(args)
        and not args.tie_word_embeddings
        and not args.num_local_experts
    )


def _gpt_neox(args: ModelArgs) -> bool:
    """Its GELU is the tanh form, where transformers has the exact one."""
    biased = _biased(args) == {*ATTENTION, "up_proj", "down_proj"}
    full = args.intermediate_size == 4 * args.hidden_size
    shape = full and args.num_key_value_heads == args.num_attention_heads
    return _ungated(args) and biased and _everywhere(args, *ATTENTION, *FFN[1:]) and shape


def _gpt_neox_settings(args: ModelArgs) -> Config:
    return {
        "max_position_embeddings": args.max_position_embeddings,
        "layer_norm_eps": args.rms_norm_eps,
        "rotary_emb_base": args.rope_theta,
        "rotary_pct": args.rotary_dim / args.head_dim,
        "use_parallel_residual": args.block == "parallel",
    }


GPT_NEOX = Stock(_gpt_neox, _gpt_neox_settings)


def _gptj(args: ModelArgs) -> bool:
    full = args.intermediate_size == 4 * args.hidden_size and args.rope_theta == 10000
    biased = _biased(args) == {*FFN[1:]} and _everywhere(args, *FFN[1:])
    return _ungated(args) and biased and full and args.head_bias


def _gptj_settings(args: ModelArgs) -> Config:
    return {
        "layer_norm_epsilon": args.rms_norm_eps,
        "rotary_dim": args.rotary_dim,
        "n_positions": args.max_position_embeddings,
    }


GPTJ = Stock(_gptj, _gptj_settings)


def _phi(args: ModelArgs) -> bool:
    biased = _biased(args) == {*ATTENTION, *FFN[1:]} and _everywhere(args, *ATTENTION, *FFN[1:])
    return _ungated(args) and biased and args.head_bias


def _phi_settings(args: ModelArgs) -> Config:
    return {
        "max_position_embeddings": args.max_position_embeddings,
        "num_key_value_heads": args.num_key_value_heads,
        "partial_rotary_factor": args.rotary_dim / args.head_dim,
        "intermediate_size": args.intermediate_size,
        "layer_norm_eps": args.rms_norm_eps,
        "rope_theta": args.rope_theta,
    }


PHI = Stock(_phi, _phi_settings)


def _cohere(args: ModelArgs) -> bool:
    plain = args.gated and args.hidden_act == "silu" and args.rope is None and args.rope_traditional
    biases = args.biases == {} or (_biased(args) == {*ATTENTION} and _everywhere(args, *ATTENTION))
    return plain and biases and args.tie_word_embeddings and _full_heads(args)


def _cohere_settings(args: ModelArgs) -> Config:
    return {
        "num_key_value_heads": args.num_key_value_heads,
        "rope_theta": args.rope_theta,
        "layer_norm_eps": args.rms_norm_eps,
        "logit_scale": args.logit_scale,
        "attention_bias": bool(args.biases),
        "use_qk_norm": False,
    }


COHERE = Stock(_cohere, _cohere_settings)
