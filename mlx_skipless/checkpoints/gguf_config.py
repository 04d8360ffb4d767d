"""A Hugging Face config from a GGUF file's metadata. Knows nothing of files or tensors."""

from typing import Any

import numpy as np

from ..errors import UserError
from .gguf_architectures import (
    LONG_FACTORS,
    ROPE_FACTORS,
    Architecture,
    Config,
    Tables,
)
from .gguf_metadata import Metadata, either
from .gguf_tokenizer import find_ends, find_id

# Llama 3.1's, which its GGUF files do not name.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT = 1.0, 4.0, 8192
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # where a file is silent
# Keys of the network that are read, and those that say nothing that the tensors do not.
READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon",
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
TEXTS = ("rope.scaling.type",)
COMPARED = ("attention.scale", "attention.sliding_window")  # with others, where they are not read
# Of the tower that sees pictures, which some files hold too, and which is left out.
PICTURES = ("vision.", "mm.")


def check_support(metadata: Metadata) -> None:
    """Raise a UserError for a file that holds no model, or a part of one."""
    kind, source = metadata.field("general.type"), metadata.source
    if kind not in (None, "model"):
        raise UserError(f"{source} holds no model but something of the type {kind!r}: give a model")
    if either(metadata.field("split.count"), 1) > 1:
        raise UserError(
            f"{source} is one part of several: join them first (llama-gguf-split --merge)"
        )


def check_keys(metadata: Metadata, architecture: Architecture) -> None:
    """Raise a UserError for a key that changes the network and is not read."""
    for key in metadata.list_own():
        read = key in READ or key in architecture.reads or key.startswith(PICTURES)
        number = (read or key in COMPARED) and key not in TEXTS
        if number and isinstance(metadata.get(key), str):
            metadata.doubt(key)
        if not (read or _is_neutral(metadata, key, architecture)):
            metadata.refuse(key)


def _is_neutral(metadata: Metadata, key: str, architecture: Architecture) -> bool:
    """Whether what a key of the network says makes no difference."""
    value = metadata.get(key)
    match key:
        case "attention.scale":
            head_dim = _find_head_dim(metadata)
            return not value or bool(head_dim and np.isclose(value, head_dim**-0.5, rtol=1e-4))
        case "attention.sliding_window":
            return not value or value >= either(metadata.get("context_length"), np.inf)
        case "rope.scaling.yarn_ext_factor":
            return value in (-1, 1 if metadata.get("rope.scaling.type") == "yarn" else 0)
    known = {**NEUTRAL, **architecture.means}
    return value in known[key] if key in known else not value


def _find_head_dim(metadata: Metadata) -> Any:
    """The width of a head; where no key says it, its share of the stream, as in llama.cpp."""
    found = either(metadata.get("attention.key_length"), metadata.get("rope.dimension_count"))
    if found is None:
        found = metadata.need("embedding_length") // metadata.need("attention.head_count")
    return found


def make_config(
    metadata: Metadata, architecture: Architecture, vocab_size: int, tied: bool, tables: Tables
) -> Config:
    """Make the config.json of the model that a GGUF file describes.

    Args:
        metadata: the file's.
        architecture: the file's.
        vocab_size: the embedding's number of rows.
        tied: whether the embedding is the head, too.
        tables: read the factors of RoPE that the file has, by the tensors' names.

    Raises:
        UserError: for a partial or unknown RoPE, and for layers that differ.
    """
    heads = metadata.get_one("attention.head_count")
    ends = find_ends(metadata.field, vocab_size)
    config: Config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "hidden_size": metadata.get("embedding_length"),
        "num_hidden_layers": metadata.get("block_count"),
        "intermediate_size": metadata.get_one("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": either(metadata.get_one("attention.head_count_kv"), heads),
        "head_dim": _read_head_dim(metadata, architecture),
        "rms_norm_eps": metadata.get("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab_size,
        "rope_theta": either(metadata.get("rope.freq_base"), architecture.rope_theta),
        "max_position_embeddings": metadata.get("context_length"),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": find_id(metadata.field, "bos", vocab_size),
        "eos_token_id": ends
        if len(ends) > 1
        else next(iter(ends), None),  # as most configs have it
    }
    _check_sizes(metadata, config)
    if config["rms_norm_eps"] is None:
        raise UserError(
            f"{metadata.source} does not say {metadata.architecture}."
            "attention.layer_norm_rms_epsilon, which its norms need: download it again"
        )
    scaling = _read_rope_scaling(metadata, config, tables)
    if scaling and not architecture.scales_rope:
        metadata.refuse("rope.scaling.factor")
    config["rope_scaling"] = scaling
    config |= architecture.read(metadata, config, tables)
    if config["intermediate_size"] is None:
        metadata.need("feed_forward_length")
    return {key: value for key, value in config.items() if value is not None}


def _check_sizes(metadata: Metadata, config: Config) -> None:
    """Check the sizes that an architecture may compute others from."""
    for key in ("embedding_length", "block_count", "attention.head_count"):
        metadata.need(key)
    if config["rms_norm_eps"] is not None and not 0 < config["rms_norm_eps"] < 1:
        metadata.doubt("attention.layer_norm_rms_epsilon")


def _read_head_dim(metadata: Metadata, architecture: Architecture) -> Any:
    """Read the width of a head.

    Raises:
        UserError: if values have another than keys, or a part of a head alone is rotated.
    """
    rotated, head_dim = metadata.get("rope.dimension_count"), _find_head_dim(metadata)
    value_dim = either(metadata.get("attention.value_length"), head_dim)
    if value_dim != head_dim:
        raise UserError(
            f"{metadata.source} has heads of {head_dim} channels for keys and {value_dim} for "
            "values, which is not supported"
        )
    if architecture.rotates_part:
        return None
    if rotated is not None and rotated != head_dim:
        raise UserError(
            f"{metadata.source} rotates {rotated} of {head_dim} channels of a head, which is not "
            "supported"
        )
    return head_dim


def _read_rope_scaling(metadata: Metadata, config: Config, tables: Tables) -> Config | None:
    source, read_factors = metadata.source, tables.get(ROPE_FACTORS)
    factor = either(metadata.get("rope.scaling.factor"), metadata.get("rope.scale_linear"))
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        if either(metadata.get(key), 0) < 0:
            metadata.doubt(key)
    kind = either(metadata.get("rope.scaling.type"), "linear")
    if kind == "longrope" and tables.keys() & {LONG_FACTORS}:
        return None  # the architecture reads it
    if read_factors is not None and (kind == "yarn" or (factor or 1) != 1):
        raise UserError(f"{source} scales RoPE as {kind!r} and by a table, which is not supported")
    if kind == "linear" and factor and read_factors is None:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _read_yarn(metadata, factor)
    if kind not in ("linear", "none"):
        raise UserError(f"{source} scales RoPE as {kind!r}, which is not supported")
    if read_factors is None:
        return None
    factors = read_factors()
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


def _read_yarn(metadata: Metadata, factor: Any) -> Config:
    """YaRN's settings. llama.cpp takes the whole context where a file names no original one."""
    if not factor:
        raise UserError(
            f"{metadata.source} scales RoPE as 'yarn' without a factor: download it again"
        )
    own = metadata.get("rope.scaling.original_context_length")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": own or metadata.get("context_length"),
    }
    for beta, default in YARN_BETAS.items():
        given = either(
            metadata.get(f"rope.scaling.yarn_{beta}"), metadata.get(f"rope.scaling.{beta}")
        )
        if given not in (None, default):
            scaling[beta] = given
    return scaling


def _compute_llama3_factors(config: Config, factor: float) -> np.ndarray:
    """Divisors of RoPE's frequencies, (head_dim / 2,): 1 for short waves, ``factor`` for long."""
    head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR
    smooth = np.clip((ORIGINAL_CONTEXT / wave - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
