"""GGUF files of small Llamas, written with llama.cpp's own library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from factory import CHAT_TEMPLATE
from gguf import GGMLQuantizationType as Type
from reference import Config, Weights
from tokenizers import pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    path, _, kind = name.rpartition(".")
    if path.startswith("model.layers."):
        _, _, layer, module = path.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{kind}"
    return f"{NAMES[path]}.{kind}"


def side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k: channels i and i + half of a head next to each other."""
    half = len(rows) // heads // 2
    order = [
        h * 2 * half + i + part * half for h in range(heads) for i in range(half) for part in (0, 1)
    ]
    return rows[order]


def rotary_heads(name: str, config: Config) -> int | None:
    if ".q_proj." in name:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if ".k_proj." in name else None


def write_gguf(
    file: Path,
    config: Config,
    weights: Weights,
    *,
    kind: Type = Type.F32,
    raw: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    describe: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """A GGUF file of a Llama.

    Its matrices but the embedding are of the type ``kind``; with ``raw`` those in it are, and these
    are their blocks (rows, bytes). The rest is float32.
    """
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    describe(writer)
    for name, values in weights.items():
        if raw is not None and name in raw:
            writer.add_tensor(gguf_name(name), raw[name], raw_dtype=kind)
            continue
        heads = rotary_heads(name, config)
        values = values if heads is None else side_by_side(values, heads)
        values = np.ascontiguousarray(values, dtype=np.float32)
        plain = raw is not None or values.ndim == 1 or "embed_tokens" in name
        packed = Type.F32 if plain else kind
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, packed), raw_dtype=packed)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_byte_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The factory's tokenizer: 256 bytes, <s>, </s>."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"])
    writer.add_token_types([NORMAL] * 256 + [CONTROL] * 2)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(CHAT_TEMPLATE)
