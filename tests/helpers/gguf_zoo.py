"""GGUF files of mlx-lm's architectures, written as llama.cpp's converter writes them.

Metadata, names and what is done to tensors follow its ``set_gguf_parameters`` and
``modify_tensors``; names come from gguf's own map of Hugging Face's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_maker import add_byte_tokenizer, side_by_side
from zoo import Config

Kinds = Callable[[str], Type]
# GGUF's architectures by Hugging Face's types.
ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
    "llama": "llama",
    "ministral3": "mistral3",
    "mistral": "mistral3",
    "mixtral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
}
PERMUTED = ("llama", "mistral3", "smollm3")
EXPERTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def hf_name(name: str) -> str:
    """The name that the converter looks up for a tensor of mlx-lm's."""
    if match := re.fullmatch(
        r"model\.layers\.(\d+)\.block_sparse_moe\.switch_mlp\.(\w+)(\..*)", name
    ):
        return f"layers.{match[1]}.feed_forward.experts.{EXPERTS[match[2]]}{match[3]}"
    name = name.replace(".switch_mlp.", ".experts.")
    return f"{name}.weight" if name.endswith("sinks") else name


def convert_tensor(name: str, values: np.ndarray, architecture: str, config: Config) -> np.ndarray:
    """What the converter does to a tensor's values."""
    if architecture in PERMUTED and ".q_proj." in name:
        return side_by_side(values, config["num_attention_heads"])
    if architecture in PERMUTED and ".k_proj." in name:
        return side_by_side(values, config["num_key_value_heads"])
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values.astype(np.float32) + 1
    return values


def describe_rope(writer: gguf.GGUFWriter, config: Config) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if "llama_4_scaling_beta" in rope:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])


def describe_model(writer: gguf.GGUFWriter, config: Config, architecture: str) -> None:
    """The metadata of a model, as the converter's class of its architecture has them."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if architecture not in ("gemma", "gemma2", "phi3"):
        describe_rope(writer, config)
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if architecture in PERMUTED:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config.get("head_dim") or width // heads)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if architecture == "gpt-oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        if config["rope_local_base_freq"] != 10000.0:
            writer.add_rope_freq_base_swa(config["rope_local_base_freq"])
        if config["sliding_window_pattern"] != 6:
            writer.add_sliding_window_pattern(config["sliding_window_pattern"])
    if architecture == "phi3":
        describe_phi3(writer, config)


def describe_phi3(writer: gguf.GGUFWriter, config: Config) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    original = config["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(int(config.get("partial_rotary_factor", 1.0) * width) // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_sliding_window(config.get("sliding_window") or 0)
    if rope := config.get("rope_scaling"):
        scale = config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(factor)
        for name in ("long", "short"):
            table = np.array(rope[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", table)


def write_zoo_gguf(
    file: Path,
    folder: Path,
    kinds: Kinds,
    *,
    raw: dict[str, np.ndarray] | None = None,
    lost: str | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    describe: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
) -> dict[str, str]:
    """A GGUF file of a model in a folder; returns GGUF's names of its tensors by mlx-lm's.

    ``kinds`` gives the type of a matrix by GGUF's name of it; vectors and routers are float32.
    ``raw`` has the blocks of some matrices, by mlx-lm's names: (rows, bytes).
    ``lost`` is left out, and tensors in ``shapes`` are zeros of another shape.
    """
    config = json.loads((folder / "config.json").read_text())
    weights = mx.load(str(folder / "model.safetensors"))
    architecture = ARCHITECTURES[config["model_type"]]
    kind_of = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    known = gguf.get_tensor_name_map(kind_of, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, architecture)
    describe_model(writer, config, architecture)
    add_byte_tokenizer(writer)
    if architecture == "qwen2":  # transformers reads no other
        writer.kv_data[0].pop("tokenizer.ggml.pre")
        writer.add_tokenizer_pre("qwen2")
    describe(writer)
    names = {}
    for name, array in weights.items():
        names[name] = known.get_name(hf_name(name), try_suffixes=(".weight", ".bias"))
        assert names[name] is not None, name
        if name == lost:
            continue
        if raw and name in raw:
            writer.add_tensor(names[name], raw[name], raw_dtype=kinds(names[name]))
            continue
        values = np.array(array.astype(mx.float32))
        values = convert_tensor(name, values, architecture, config)
        if shapes and name in shapes:
            values = np.zeros(shapes[name], np.float32)
        plain = values.ndim == 1 or "ffn_gate_inp" in names[name] or names[name].endswith(".bias")
        kind = Type.F32 if plain else kinds(names[name])
        values = np.ascontiguousarray(values)
        writer.add_tensor(names[name], gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names
