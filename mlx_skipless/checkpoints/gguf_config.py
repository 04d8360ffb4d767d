"""A Hugging Face config from a GGUF file's metadata. Knows nothing of files or tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UserError
from .gguf_tokenizer import Field

ReadFactors = Callable[[], np.ndarray]
# Llama 3.1's, which its GGUF files do not name.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def check_support(field: Field, source: str) -> None:
    """Raise a UserError for a kind of model that is not read; ``source`` names the file in it."""
    architecture = field("general.architecture")
    if architecture != "llama":
        raise UserError(f"{source} holds the architecture {architecture!r}; supported: llama")
    if field("llama.expert_count"):
        raise UserError(f"{source} holds a mixture of experts, which is not supported")
    if _either(field("split.count"), 1) > 1:
        raise UserError(
            f"{source} is one part of several: join them first (llama-gguf-split --merge)"
        )


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
        UserError: for a partial or unknown RoPE.
    """
    heads = field("llama.attention.head_count")
    rotated = field("llama.rope.dimension_count")
    head_dim = _either(field("llama.attention.key_length"), rotated)
    if rotated is not None and rotated != head_dim:
        raise UserError(
            f"{source} rotates {rotated} of {head_dim} channels of a head, which is not supported"
        )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _either(field("llama.attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab_size,
        "rope_theta": _either(field("llama.rope.freq_base"), 10000.0),
        "max_position_embeddings": field("llama.context_length"),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
    }
    config["rope_scaling"] = _read_rope_scaling(field, source, config, read_rope_factors)
    return {key: value for key, value in config.items() if value is not None}


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _read_rope_scaling(
    field: Field, source: str, config: dict[str, Any], read_rope_factors: ReadFactors | None
) -> dict[str, Any] | None:
    factor = _either(field("llama.rope.scaling.factor"), field("llama.rope.scale_linear"))
    kind = _either(field("llama.rope.scaling.type"), "linear")
    if kind == "linear" and factor:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = field("llama.rope.scaling.original_context_length")
        scaling = {"rope_type": "yarn", "factor": factor}
        return scaling | {"original_max_position_embeddings": original}
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


def _compute_llama3_factors(config: dict[str, Any], factor: float) -> np.ndarray:
    """Divisors of RoPE's frequencies, (head_dim / 2,): 1 for short waves, ``factor`` for long."""
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR
    smooth = np.clip((ORIGINAL_CONTEXT / wave - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
