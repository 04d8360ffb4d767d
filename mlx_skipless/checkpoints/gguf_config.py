"""A Hugging Face config from a GGUF file's metadata. Knows nothing of files or tensors."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..errors import UserError
from .gguf_tokenizer import Field, find_ends, find_id

ReadFactors = Callable[[], np.ndarray]
# Llama 3.1's, which its GGUF files do not name.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT = 1.0, 4.0, 8192
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # where a file is silent
PREFIX = "llama."
# Keys of the network that are read, and those that say nothing that the tensors do not.
READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "expert_count",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    *(f"rope.scaling.{name}{beta}" for name in ("", "yarn_") for beta in YARN_BETAS),
    "vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon", "expert_used_count",
}  # fmt: skip
# What other keys say if the network is a plain Llama. What is not listed has to be 0 or false.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
}


def check_support(field: Field, keys: Iterable[str], source: str) -> None:
    """Raise a UserError for a model that is not read, or a key that changes its network.

    Args:
        field: the file's metadata by key.
        keys: all keys of the metadata.
        source: what to call the file in a message.
    """
    architecture, kind = field("general.architecture"), field("general.type")
    if kind not in (None, "model"):
        raise UserError(f"{source} holds no model but something of the type {kind!r}: give a model")
    if architecture != "llama":
        raise UserError(f"{source} holds the architecture {architecture!r}; supported: llama")
    if field("llama.expert_count"):
        raise UserError(f"{source} holds a mixture of experts, which is not supported")
    if _either(field("split.count"), 1) > 1:
        raise UserError(
            f"{source} is one part of several: join them first (llama-gguf-split --merge)"
        )
    for key in keys:
        if key.startswith(PREFIX) and not _is_neutral(field, key.removeprefix(PREFIX)):
            raise UserError(
                f"{source} says {key} = {_shorten(field(key))}, which is not supported: convert "
                "the Hugging Face model instead"
            )


def _is_neutral(field: Field, key: str) -> bool:
    """Whether a key of the network is read, or what it says makes no difference."""
    if key in READ:
        return True
    value = field(f"{PREFIX}{key}")
    match key:
        case "attention.scale":
            head_dim = _find_head_dim(field)
            return not value or bool(head_dim and np.isclose(value, head_dim**-0.5, rtol=1e-4))
        case "attention.sliding_window":
            return not value or value >= _either(field("llama.context_length"), np.inf)
        case "rope.scaling.yarn_ext_factor":
            return value in (-1, 1 if field("llama.rope.scaling.type") == "yarn" else 0)
    return value in NEUTRAL[key] if key in NEUTRAL else not value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def _find_head_dim(field: Field) -> Any:
    """The width of a head; None if no key says it."""
    return _either(field("llama.attention.key_length"), field("llama.rope.dimension_count"))


def make_config(
    field: Field, source: str, vocab_size: int, tied: bool, read_rope_factors: ReadFactors | None
) -> dict[str, Any]:
    """Make the config.json of the model that a GGUF file describes.

    Args:
        field: the file's metadata by key.
        source: what to call the file in a message.
        vocab_size: the embedding's number of rows.
        tied: whether the embedding is the head, too.
        read_rope_factors: reads the table that RoPE's frequencies are divided by; None if the file
            has none.

    Raises:
        UserError: for a partial or unknown RoPE, and for layers that differ.
    """
    heads = _read_one(field, "llama.attention.head_count", source)
    rotated, head_dim = field("llama.rope.dimension_count"), _find_head_dim(field)
    value_dim = _either(field("llama.attention.value_length"), head_dim)
    if value_dim != head_dim:
        raise UserError(
            f"{source} has heads of {head_dim} channels for keys and {value_dim} for values, which "
            "is not supported"
        )
    if rotated is not None and rotated != head_dim:
        raise UserError(
            f"{source} rotates {rotated} of {head_dim} channels of a head, which is not supported"
        )
    ends = find_ends(field, vocab_size)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"),
        "intermediate_size": _read_one(field, "llama.feed_forward_length", source),
        "num_attention_heads": heads,
        "num_key_value_heads": _either(
            _read_one(field, "llama.attention.head_count_kv", source), heads
        ),
        "head_dim": head_dim,
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab_size,
        "rope_theta": _either(field("llama.rope.freq_base"), 10000.0),
        "max_position_embeddings": field("llama.context_length"),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": find_id(field, "bos", vocab_size),
        "eos_token_id": ends
        if len(ends) > 1
        else next(iter(ends), None),  # as most configs have it
    }
    config["rope_scaling"] = _read_rope_scaling(field, source, config, read_rope_factors)
    return {key: value for key, value in config.items() if value is not None}


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _read_one(field: Field, key: str, source: str) -> Any:
    """A number that may be given layer by layer, the same for all."""
    value = field(key)
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise UserError(
            f"{source} says {key} = {_shorten(value)}, layers that differ, which is not supported"
        )
    return value[0]


def _read_rope_scaling(
    field: Field, source: str, config: dict[str, Any], read_rope_factors: ReadFactors | None
) -> dict[str, Any] | None:
    factor = _either(field("llama.rope.scaling.factor"), field("llama.rope.scale_linear"))
    kind = _either(field("llama.rope.scaling.type"), "linear")
    if read_rope_factors is not None and (kind == "yarn" or (factor or 1) != 1):
        raise UserError(f"{source} scales RoPE as {kind!r} and by a table, which is not supported")
    if kind == "linear" and factor and read_rope_factors is None:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _read_yarn(field, source, factor)
    if kind not in ("linear", "none"):
        raise UserError(f"{source} scales RoPE as {kind!r}, which is not supported")
    if read_rope_factors is None:
        return None
    factors = read_rope_factors()
    factor = float(factors.max())
    if not np.allclose(factors, _compute_llama3_factors(config, factor), rtol=1e-2):
        raise UserError(
            f"{source} scales RoPE by a table that is not Llama 3's; convert the Hugging Face "
            "model instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW_FREQ_FACTOR,
        "high_freq_factor": HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }


def _read_yarn(field: Field, source: str, factor: Any) -> dict[str, Any]:
    """YaRN's settings. llama.cpp takes the whole context where a file names no original one."""
    if not factor:
        raise UserError(f"{source} scales RoPE as 'yarn' without a factor: download it again")
    own = field("llama.rope.scaling.original_context_length")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": own or field("llama.context_length"),
    }
    for beta, default in YARN_BETAS.items():
        given = _either(
            field(f"llama.rope.scaling.yarn_{beta}"), field(f"llama.rope.scaling.{beta}")
        )
        if given not in (None, default):
            scaling[beta] = given
    return scaling


def _compute_llama3_factors(config: dict[str, Any], factor: float) -> np.ndarray:
    """Divisors of RoPE's frequencies, (head_dim / 2,): 1 for short waves, ``factor`` for long."""
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR
    smooth = np.clip((ORIGINAL_CONTEXT / wave - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
