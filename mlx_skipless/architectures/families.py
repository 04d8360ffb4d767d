"""Source architectures: how a model's config and tensor names map to this package's blocks.

To add one, add a ``Family`` to ``FAMILIES``: what its config means in the terms of
``docs/checkpoint.md``, what its tensors are called, and, if mlx-lm has a network of its own for it,
what that network can be (``stock.py``). Knows nothing of files or arrays.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..network.model import FUSED
from ..network.names import ATTENTION, MLP, PROJECTIONS
from . import stock
from .stock import Stock

Config = dict[str, Any]
QKV = tuple(PROJECTIONS[name] for name in ATTENTION[:3])
# What all configs say alike; of other keys only those that a family's settings know are believed.
LLAMA_KEYS = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "max_position_embeddings", "sliding_window", "layer_types",
    "attention_bias", "mlp_bias", "tie_word_embeddings",
)  # fmt: skip
MIXTRAL_EXPERTS = {
    "block_sparse_moe.experts.{}.w1": "mlp.gate_proj",
    "block_sparse_moe.experts.{}.w2": "mlp.down_proj",
    "block_sparse_moe.experts.{}.w3": "mlp.up_proj",
}


@dataclass(frozen=True)
class Family:
    """One source architecture.

    Attributes:
        settings: turns a Hugging Face config into the format's own keys.
        keys: the format's keys to the config's, where it has other names for them.
        names: a module's canonical name to the source's, whole dotted parts of a path.
        also: other names of modules, such as mlx-lm's where it saves them, to the source's.
        fused: canonical modules by the source's one that holds them all.
        fused_by_head: whether that has each head's rows together, and is in every layer.
        experts: the source's name of a single expert's module, with {} for its number, to the
            canonical one that holds all.
        ignored: ends of tensor names that mean nothing.
        stock: mlx-lm's own network for it; None if it has none.
        gain_offset: what the gains of stream norms are stored less than they are.
    """

    settings: Callable[[Config], Config]
    keys: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_by_head: bool = False
    experts: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)  # old exporters'; rebuilt at run time
    stock: Stock | None = None
    gain_offset: float = 0.0

    def to_own_keys(self, config: Config) -> Config:
        """A config in the format's own keys."""
        config = {**config, **{ours: config.get(theirs) for ours, theirs in self.keys.items()}}
        shared = {key: config[key] for key in LLAMA_KEYS if key in config}
        return {**shared, **self.settings(config)}

    def quote_its_keys(self, complaint: str) -> str:
        """A complaint about the format's keys, with those that the config has."""
        for ours, theirs in self.keys.items():
            complaint = complaint.replace(f'"{ours}"', f'"{theirs}"')
        return complaint


def read_flag(config: Config, key: str, default: bool = False) -> bool:
    """A key that is true or false, or absent.

    Raises:
        UserError: if it is anything else.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f'"{key}" in config.json is {value!r}; it must be true or false')
    return default if value is None else value


def _prenorm(config: Config) -> Config:
    """Llama: serial blocks, both skips, an RMS norm before each sub-layer and before the head."""
    bias = {"attention_bias": config.get("attention_bias"), "mlp_bias": config.get("mlp_bias")}
    window = config.get("sliding_window") if config.get("layer_types") else None
    return {"skip": "both", "norm": "pre", "final_norm": True, "sliding_window": window, **bias}


def _mistral(config: Config) -> Config:
    """As Llama; a sliding window without ``layer_types`` holds for every layer (transformers)."""
    return {**_prenorm(config), "sliding_window": config.get("sliding_window")}


def _mixtral(config: Config) -> Config:
    """Mistral with experts; the config's keys for them are the format's own."""
    experts = _first(config, "num_local_experts", default=8)
    if experts == 0:
        raise UserError('"num_local_experts" in config.json is 0, a mixtral has some: correct it')
    return {
        **_mistral(config),
        "num_local_experts": experts,
        "num_experts_per_tok": _first(config, "num_experts_per_tok", default=2),
        "rms_norm_eps": _first(config, "rms_norm_eps", default=1e-5),
        "rope_theta": _rope(config, "rope_theta", default=1e6),
    }


def _gemma(config: Config) -> Config:
    """Gemma 1: as Llama, but the embedding, tied, enters the stream times sqrt(hidden_size).

    Whatever "hidden_act" says, the activation is "hidden_activation" (transformers).
    """
    size = config.get("hidden_size")
    return {
        **_prenorm(config),
        "sliding_window": None,
        "layer_types": None,
        "hidden_act": _first(config, "hidden_activation") or "gelu_pytorch_tanh",
        "tie_word_embeddings": _first(config, "tie_word_embeddings", default=True),
        "embedding_scale": math.sqrt(size) if isinstance(size, int) and size > 0 else 1.0,
    }


def _qwen2(config: Config) -> Config:
    """As Llama, with biases on q, k and v; a window only where ``use_sliding_window`` says so."""
    slides = read_flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    kinds = config.get("layer_types") if slides else None
    if slides and kinds is None:
        full = _first(config, "max_window_layers", default=28)
        if not isinstance(full, int):
            raise UserError(
                f'"max_window_layers" in config.json is {full!r}; it must be a whole number'
            )
        kinds = [("full" if i < full else "sliding") + "_attention" for i in _layers(config)]
    return {
        **_prenorm(config),
        "layer_types": kinds,
        "sliding_window": config.get("sliding_window") if kinds else None,
        "attention_bias": None,
        "biases": _biases(config, ATTENTION[:3]),
        "max_position_embeddings": _first(config, "max_position_embeddings", default=32768),
    }


def _qwen3(config: Config) -> Config:
    """As Qwen2 with ``attention_bias`` like Llama's, and an RMS norm of each head's q and k."""
    given = {"attention_bias": config.get("attention_bias"), "biases": None, "qk_norm": True}
    head_dim = _first(config, "head_dim", default=128)
    return {**_qwen2(config), **given, "head_dim": head_dim}


def _layer_norms(config: Config, *shifts: str) -> Config:
    """Both skips and LayerNorms, those named with biases."""
    return {
        "skip": "both",
        "norm": "pre",
        "norm_type": "layer",
        "final_norm": True,
        "shifts": list(shifts),
        "sliding_window": None,
        "layer_types": None,
        "rms_norm_eps": _first(config, "rms_norm_eps", default=1e-5),
    }


def _gpt_neox(config: Config) -> Config:
    """Pythia: attention and FFN in parallel, each behind its own LayerNorm; RoPE on a quarter.

    All matrices have biases but the head; the FFN has no gate.
    """
    parallel = read_flag(config, "use_parallel_residual", default=True)
    names = (*ATTENTION, *MLP) if read_flag(config, "attention_bias", default=True) else MLP
    return {
        **_layer_norms(config, "attention", "ffn", "final"),
        "block": "parallel" if parallel else "serial",
        "gated": False,
        "hidden_act": _first(config, "hidden_act", default="gelu"),
        "num_key_value_heads": None,
        "head_dim": None,
        "rope_theta": _rope(config, "rotary_emb_base", "rope_theta", default=10000),
        "rotary_dim": _share_of_head(config, "rotary_pct", "partial_rotary_factor", default=0.25),
        "biases": _biases(config, [name for name in names if name not in ("router", "gate_proj")]),
        "tie_word_embeddings": _first(config, "tie_word_embeddings", default=False),
    }


def _gptj(config: Config) -> Config:
    """Parallel blocks behind one LayerNorm; RoPE on neighbours; biases on FFN and head alone."""
    size, inner = config.get("hidden_size"), config.get("intermediate_size")
    return {
        **_layer_norms(config, "attention", "final"),
        "block": "parallel",
        "shared_norm": True,
        "gated": False,
        "num_key_value_heads": None,
        "head_dim": None,
        "intermediate_size": 4 * size if inner is None and isinstance(size, int) else inner,
        "hidden_act": _first(config, "hidden_act", default="gelu_new"),
        **dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters")),
        "rope_traditional": True,
        "rotary_dim": _first(config, "rotary_dim", default=64),
        "biases": _biases(config, ("up_proj", "down_proj")),
        "head_bias": True,
        "tie_word_embeddings": _first(config, "tie_word_embeddings", default=False),
    }


def _phi(config: Config) -> Config:
    """Phi-1 to 2: parallel blocks behind one LayerNorm; biases everywhere; RoPE on a part."""
    if read_flag(config, "qk_layernorm"):
        raise UserError('"qk_layernorm" in config.json is not supported for phi')
    return {
        **_layer_norms(config, "attention", "final"),
        "block": "parallel",
        "shared_norm": True,
        "gated": False,
        "hidden_act": _first(config, "hidden_act", default="gelu_new"),
        "rotary_dim": _share_of_head(config, "partial_rotary_factor", default=0.5),
        "biases": _biases(config, (*ATTENTION, "up_proj", "down_proj")),
        "head_bias": True,
        "tie_word_embeddings": _first(config, "tie_word_embeddings", default=False),
    }


def _cohere(config: Config) -> Config:
    """Command R, PaLM's block: attention and SwiGLU in parallel behind one LayerNorm, no biases.

    The head is the embedding, its logits scaled; RoPE on neighbours.
    """
    if read_flag(config, "use_qk_norm"):
        raise UserError('"use_qk_norm" in config.json is not supported for cohere')
    return {
        **_layer_norms(config),
        "block": "parallel",
        "shared_norm": True,
        "rope_traditional": True,
        "attention_bias": config.get("attention_bias"),
        "logit_scale": _first(config, "logit_scale", default=0.0625),
        "tie_word_embeddings": _first(config, "tie_word_embeddings", default=True),
    }


def _first(config: Config, *keys: str, default: Any = None) -> Any:
    """The value of the first key that has one."""
    return next((config[key] for key in keys if config.get(key) is not None), default)


def _rope(config: Config, *keys: str, default: Any = None) -> Any:
    """Likewise, also where newer configs keep what RoPE needs."""
    inner = config.get("rope_parameters")
    return _first({**config, **(inner if isinstance(inner, dict) else {})}, *keys, default=default)


def _share_of_head(config: Config, *keys: str, default: float) -> int | None:
    """So much of a head's width, None where that is not known."""
    share = _rope(config, *keys, default=default)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise UserError(
            f'"{keys[0]}" in config.json is {share!r}; it must be a share of a head, 1 at most'
        )
    size, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not isinstance(size, int) or not isinstance(heads, int) or heads < 1 or size % heads:
        return None
    width = int(size // heads * share)
    if width % 2 or width == 0:
        raise UserError(
            f'"{keys[0]}" {share} of a head in config.json is {width}; RoPE needs pairs: correct it'
        )
    return width


def _layers(config: Config) -> range:
    """Of all layers, none where their number cannot be true."""
    layers = config.get("num_hidden_layers")
    return range(layers if isinstance(layers, int) and 0 < layers < 1 << 16 else 0)


def _biases(config: Config, names: Iterable[str]) -> dict[str, list[int]]:
    """Biases of these matrices in every layer."""
    return {name: [*_layers(config)] for name in names}


LAYER_NORM_KEYS = {"rms_norm_eps": "layer_norm_eps"}

FAMILIES: dict[str, Family] = {
    "cohere": Family(_cohere, keys=LAYER_NORM_KEYS, stock=stock.COHERE),
    "gemma": Family(_gemma, gain_offset=1.0, stock=stock.GEMMA),
    "gpt_neox": Family(
        _gpt_neox,
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
        also={"model.embed_out": "embed_out", "model.h": "gpt_neox.layers", "model": "gpt_neox"},
        fused={"attention.query_key_value": QKV},
        fused_by_head=True,
        ignored=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
        stock=stock.GPT_NEOX,
    ),
    "gptj": Family(
        _gptj,
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
        also={"model": "transformer"},
        ignored=(".attn.bias", ".attn.masked_bias"),
        stock=stock.GPTJ,
    ),
    "llama": Family(_prenorm, stock=stock.LLAMA),
    "ministral": Family(_mistral),
    "mistral": Family(_mistral, stock=stock.LLAMA),
    "mixtral": Family(
        _mixtral,
        names={
            "mlp.router": "block_sparse_moe.gate",
            "mlp": "block_sparse_moe.switch_mlp",
        },
        experts=MIXTRAL_EXPERTS,
        stock=stock.MIXTRAL,
    ),
    "phi": Family(
        _phi,
        keys=LAYER_NORM_KEYS,
        names={
            "model.norm": "model.final_layernorm",
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        },
        stock=stock.PHI,
    ),
    "qwen2": Family(_qwen2, stock=stock.QWEN2),
    "qwen3": Family(_qwen3, stock=stock.QWEN3),
    "skipless": Family(
        dict,
        also={"block_sparse_moe.gate": "mlp.router"},
        fused={
            f"{'self_attn' if parts[0] in ATTENTION else 'mlp'}.{name}": tuple(
                PROJECTIONS[part] for part in parts
            )
            for name, parts in FUSED.items()
        },
        experts=MIXTRAL_EXPERTS,
    ),
}


def find_family(config: Config) -> Family:
    """The family of a config.

    Raises:
        UserError: for an architecture that is not known.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} in config.json is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
