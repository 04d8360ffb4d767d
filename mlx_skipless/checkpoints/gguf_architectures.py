"""GGUF's architectures: one entry each, for what the metadata and the tensors of a file mean.

To add one, write an ``Architecture`` and put it into ``ARCHITECTURES``. What llama.cpp's converter
did to a model is undone by it: names, the order of rotary channels, gains that lost their offset.
Knows nothing of files.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES

from ..architectures.family import Config
from ..errors import UserError
from ..network.names import EMBEDDING, FINAL_NORM, HEAD
from .gguf_metadata import Metadata, either

Tables = Mapping[str, Callable[[], np.ndarray]]
Tensor = MODEL_TENSOR
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

ENDS = {Tensor.TOKEN_EMBD: EMBEDDING, Tensor.OUTPUT_NORM: FINAL_NORM, Tensor.OUTPUT: HEAD}
ATTENTION = {
    Tensor.ATTN_NORM: "input_layernorm",
    Tensor.ATTN_Q: "self_attn.q_proj",
    Tensor.ATTN_K: "self_attn.k_proj",
    Tensor.ATTN_V: "self_attn.v_proj",
    Tensor.ATTN_OUT: "self_attn.o_proj",
    Tensor.FFN_NORM: "post_attention_layernorm",
}
FFN = {
    Tensor.FFN_GATE: "mlp.gate_proj",
    Tensor.FFN_UP: "mlp.up_proj",
    Tensor.FFN_DOWN: "mlp.down_proj",
}
LLAMA_BLOCK = ATTENTION | FFN
QK_NORMS = {Tensor.ATTN_Q_NORM: "self_attn.q_norm", Tensor.ATTN_K_NORM: "self_attn.k_norm"}
AROUND_NORMS = {
    Tensor.ATTN_POST_NORM: "post_attention_layernorm",
    Tensor.FFN_NORM: "pre_feedforward_layernorm",
    Tensor.FFN_POST_NORM: "post_feedforward_layernorm",
}


def _name_experts(router: str, experts: str) -> dict[Tensor, str]:
    """Name what a mixture has, by the paths of its router and of its stacked experts."""
    return {
        Tensor.FFN_GATE_INP: router,
        Tensor.FFN_GATE_EXP: f"{experts}.gate_proj",
        Tensor.FFN_UP_EXP: f"{experts}.up_proj",
        Tensor.FFN_DOWN_EXP: f"{experts}.down_proj",
    }


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF.

    Attributes:
        model_type: Hugging Face's name of it.
        class_name: of transformers' network.
        block: the paths of modules inside a layer, as mlx-lm has them, by GGUF's tensors.
        paired: whether the rows of q and k have the two channels of a rotary pair side by side.
        gain_offset: what was added to the weights of all norms.
        reads: keys of the metadata, without the architecture's name, that ``read`` understands
            beside those that every architecture has.
        means: what other keys may say, as the architecture implies it.
        read: returns what config.json says beside what it says of every architecture, from the
            metadata, that common part and the tables of RoPE's factors.
        bare: modules whose weight is a tensor of their own name, without "weight".
        rotates_part: whether RoPE may turn a part of a head.
        tables: tensors that hold factors of RoPE.
        rope_theta: the base of RoPE where a file is silent.
        scales_rope: whether RoPE may be scaled as the metadata says of all architectures.
    """

    model_type: str
    class_name: str
    block: Mapping[Tensor, str] = field(default_factory=lambda: LLAMA_BLOCK)
    paired: bool = False
    gain_offset: float = 0.0
    reads: tuple[str, ...] = ()
    means: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    read: Callable[[Metadata, Config, Tables], Config] = lambda metadata, config, tables: {}
    bare: tuple[str, ...] = ()
    rotates_part: bool = False
    tables: tuple[str, ...] = (ROPE_FACTORS,)
    rope_theta: float = 10000.0
    scales_rope: bool = True

    def name_modules(self) -> dict[str, str]:
        """Return module paths, of layer 0 inside the layers, by GGUF's names of them."""
        modules = {TENSOR_NAMES[tensor]: path for tensor, path in ENDS.items()}
        for tensor, path in self.block.items():
            modules[TENSOR_NAMES[tensor].format(bid=0)] = f"model.layers.0.{path}"
        return modules


# Mixtral: what Llama's converter makes of a mixture.

EXPERT_KEYS = ("expert_count", "expert_used_count")
SOFTMAX = 1  # of llama_expert_gating_func_type


def _count_experts(metadata: Metadata) -> tuple[int, int]:
    """Read how many experts there are, and how many of them a token goes to."""
    there, used = map(metadata.need, EXPERT_KEYS)
    if used > there:
        metadata.doubt("expert_used_count")
    return there, used


def _read_mixtral(metadata: Metadata, config: Config, tables: Tables) -> Config:
    there, used = _count_experts(metadata)
    return {"num_local_experts": there, "num_experts_per_tok": used}


MIXTRAL = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    ATTENTION | _name_experts("block_sparse_moe.gate", "block_sparse_moe.switch_mlp"),
    paired=True,
    reads=EXPERT_KEYS,
    read=_read_mixtral,
)


# Qwen 3 with experts: gates are always normalized over the chosen ones.


def _read_qwen3_moe(metadata: Metadata, config: Config, tables: Tables) -> Config:
    there, used = _count_experts(metadata)
    width = metadata.get("expert_feed_forward_length")
    if width is None:
        width = metadata.need("feed_forward_length") // used
    return {
        "max_position_embeddings": metadata.need("context_length"),
        "num_experts": there,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN3_MOE = Architecture(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    ATTENTION | QK_NORMS | _name_experts("mlp.gate", "mlp.switch_mlp"),
    reads=(*EXPERT_KEYS, "expert_feed_forward_length"),
    means={
        "expert_gating_func": (0, SOFTMAX),
        "expert_weights_scale": (0, 1),
        "expert_weights_norm": (True,),
    },
    read=_read_qwen3_moe,
    scales_rope=False,
)


# Gemma: the embedding is the head, and GGUF has the norms' weights as they act. The scale of
# attention is no key: llama.cpp knows the largest models by their numbers of layers.

GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA2_27B, GEMMA3_27B = 46, 62  # layers
LOCAL_THETA = 10000.0  # of Gemma 3's layers with a window
GEMMA2_PERIOD, GEMMA3_PERIOD = 2, 6  # layers, of which one has no window


def _find_query_scale(config: Config, largest: int) -> Any:
    if config["num_hidden_layers"] != largest:
        return config["head_dim"]
    return config["hidden_size"] // config["num_attention_heads"]


def _read_period(metadata: Metadata, usual: int) -> int:
    """Read how many layers make a period, of which the last has no window.

    Raises:
        UserError: for any other order.
    """
    pattern = metadata.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        layers = len(pattern)
        period = next((n for n in range(1, layers + 1) if not pattern[n - 1]), layers + 1)
        if [bool(one) for one in pattern] == [(n + 1) % period != 0 for n in range(layers)]:
            return period
        metadata.refuse("attention.sliding_window_pattern")
    return either(pattern, usual)


def _read_gemma2(metadata: Metadata, config: Config, tables: Tables) -> Config:
    if _read_period(metadata, GEMMA2_PERIOD) != GEMMA2_PERIOD:
        metadata.refuse("attention.sliding_window_pattern")
    return GELU | {
        "query_pre_attn_scalar": _find_query_scale(config, GEMMA2_27B),
        "attn_logit_softcapping": either(metadata.get("attn_logit_softcapping"), 50.0),
        "final_logit_softcapping": either(metadata.get("final_logit_softcapping"), 30.0),
        "sliding_window": either(metadata.get("attention.sliding_window"), 4096),
    }


def _read_gemma3(metadata: Metadata, config: Config, tables: Tables) -> Config:
    window = metadata.get("attention.sliding_window")
    return GELU | {
        "query_pre_attn_scalar": _find_query_scale(config, GEMMA3_27B),
        "rope_local_base_freq": either(metadata.get("rope.freq_base_swa"), LOCAL_THETA),
        "sliding_window": window or None,
        "sliding_window_pattern": _read_period(metadata, GEMMA3_PERIOD) if window else 1,
    }


WINDOW_KEYS = ("attention.sliding_window", "attention.sliding_window_pattern")
GEMMA = Architecture(
    "gemma", "GemmaForCausalLM", gain_offset=1.0, read=lambda *found: GELU, tables=()
)
GEMMA2 = Architecture(
    "gemma2",
    "Gemma2ForCausalLM",
    LLAMA_BLOCK | AROUND_NORMS,
    gain_offset=1.0,
    reads=(*WINDOW_KEYS, "attn_logit_softcapping", "final_logit_softcapping"),
    read=_read_gemma2,
    tables=(),
    scales_rope=False,
)
GEMMA3 = Architecture(
    "gemma3_text",
    "Gemma3ForCausalLM",
    LLAMA_BLOCK | QK_NORMS | AROUND_NORMS,
    gain_offset=1.0,
    reads=(*WINDOW_KEYS, "rope.freq_base_swa"),
    read=_read_gemma3,
    tables=(),
    rope_theta=1e6,
)


# Phi 3: q, k and v are one matrix, gate and up another. Long contexts have factors of their own for
# each frequency.


def _read_phi3(metadata: Metadata, config: Config, tables: Tables) -> Config:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rotated = metadata.get("rope.dimension_count")
    original = metadata.get("rope.scaling.original_context_length")
    found: Config = {
        "original_max_position_embeddings": original,
        "sliding_window": metadata.get("attention.sliding_window") or None,
        "partial_rotary_factor": rotated * heads / width if rotated and width else None,
    }
    factor = metadata.get("rope.scaling.attn_factor") or 1.0
    usual = 1.0
    if len(tables) == 2:
        if metadata.need("rope.scaling.original_context_length") < 2:
            metadata.doubt("rope.scaling.original_context_length")
        scale = either(config.get("max_position_embeddings"), 0) / original
        if scale > 1:
            usual = math.sqrt(1 + math.log(scale) / math.log(original))
        long, short = (tables[name]().tolist() for name in (LONG_FACTORS, SHORT_FACTORS))
        found["rope_scaling"] = {"type": "longrope", "long_factor": long, "short_factor": short}
    elif tables:
        raise UserError(f"{metadata.source} has one of two tables of RoPE: download it again")
    if not math.isclose(factor, usual, rel_tol=1e-4):
        metadata.refuse("rope.scaling.attn_factor")
    return found


PHI3 = Architecture(
    "phi3",
    "Phi3ForCausalLM",
    {
        Tensor.ATTN_NORM: "input_layernorm",
        Tensor.ATTN_QKV: "self_attn.qkv_proj",
        Tensor.ATTN_OUT: "self_attn.o_proj",
        Tensor.FFN_NORM: "post_attention_layernorm",
        Tensor.FFN_UP: "mlp.gate_up_proj",
        Tensor.FFN_DOWN: "mlp.down_proj",
    },
    reads=("attention.sliding_window", "rope.scaling.attn_factor"),
    read=_read_phi3,
    rotates_part=True,
    scales_rope=False,
    tables=(LONG_FACTORS, SHORT_FACTORS),
)


# Mistral 3: a Mistral, but for YaRN and, in Ministral 3, queries that grow with the position.


def _read_mistral3(metadata: Metadata, config: Config, tables: Tables) -> Config:
    rope = config.get("rope_scaling")
    log = metadata.get("rope.scaling.yarn_log_multiplier")
    if log and rope:
        rope = rope | {"mscale": 1.0, "mscale_all_dim": log}
    beta = metadata.get("attention.temperature_scale")
    if not beta:
        return {"rope_scaling": rope}
    original = metadata.get("rope.scaling.original_context_length")
    settings = {
        "rope_theta": config["rope_theta"],
        "llama_4_scaling_beta": beta,
        "original_max_position_embeddings": original or config.get("max_position_embeddings"),
    }
    return {
        "model_type": "ministral3",
        "architectures": ["Ministral3ForCausalLM"],
        "rope_scaling": None,
        "rope_parameters": (rope or {"rope_type": "default"}) | settings,
    }


MISTRAL3 = Architecture(
    "mistral",
    "MistralForCausalLM",
    paired=True,
    reads=("rope.scaling.yarn_log_multiplier", "attention.temperature_scale"),
    read=_read_mistral3,
)


# gpt-oss: every other layer has a window, from the first on. Each head has a sink.


def _read_gpt_oss(metadata: Metadata, config: Config, tables: Tables) -> Config:
    if _read_period(metadata, 2) != 2:
        metadata.refuse("attention.sliding_window_pattern")
    layers = config["num_hidden_layers"]
    there, used = _count_experts(metadata)
    return {
        "intermediate_size": metadata.need("expert_feed_forward_length"),
        "num_local_experts": there,
        "num_experts_per_tok": used,
        "sliding_window": metadata.need("attention.sliding_window"),
        "layer_types": [("full" if n % 2 else "sliding") + "_attention" for n in range(layers)],
        "tie_word_embeddings": False,
        "swiglu_limit": 7.0,
        "attention_bias": True,
    }


GPT_OSS = Architecture(
    "gpt_oss",
    "GptOssForCausalLM",
    {tensor: path for tensor, path in ATTENTION.items() if tensor != Tensor.FFN_NORM}
    | {Tensor.ATTN_POST_NORM: "post_attention_layernorm", Tensor.ATTN_SINKS: "self_attn.sinks"}
    | _name_experts("mlp.router", "mlp.experts"),
    reads=(*EXPERT_KEYS, *WINDOW_KEYS, "expert_feed_forward_length"),
    read=_read_gpt_oss,
    bare=("self_attn.sinks",),
)


# SmolLM 3: a Llama of which every fourth layer turns nothing.

SMOLLM3 = Architecture(
    "smollm3",
    "SmolLM3ForCausalLM",
    paired=True,
    read=lambda metadata, config, tables: {
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((n + 1) % 4 != 0) for n in range(config["num_hidden_layers"])],
    },
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gpt-oss": GPT_OSS,
    "llama": Architecture("llama", "LlamaForCausalLM", paired=True),
    "mistral3": MISTRAL3,
    "phi3": PHI3,
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", LLAMA_BLOCK | QK_NORMS),
    "qwen3moe": QWEN3_MOE,
    "smollm3": SMOLLM3,
}


def find_architecture(metadata: Metadata) -> Architecture:
    """Find a file's architecture.

    Raises:
        UserError: if it is not known.
    """
    found = ARCHITECTURES.get(metadata.architecture)
    if found is None:
        raise UserError(
            f"{metadata.source} holds the architecture {metadata.architecture!r}; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return MIXTRAL if found.model_type == "llama" and metadata.get("expert_count") else found
