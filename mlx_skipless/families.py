"""Source architectures: how a model's config and tensor names map to this package's blocks.

To add one, add a ``Family`` to ``FAMILIES``. The canonical tensor names are those of
``docs/checkpoint.md`` (Hugging Face's for Llama). Knows nothing of files or arrays.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.models.rope_utils import initialize_rope

from .errors import UserError
from .model import ModelArgs

Config = dict[str, Any]

PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
ATTENTION, MLP = tuple(PROJECTIONS)[:4], tuple(PROJECTIONS)[4:]
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
# Learned gains by the norm they belong to; the last part of a tensor's name before ".weight".
GAINS = {
    "qkv": {
        "q": "self_attn.q_norm",
        "k": "self_attn.k_norm",
        "v": "self_attn.v_norm",
        "hidden": "mlp.hidden_norm",
    },
    "pre": {"attention": "input_layernorm", "ffn": "post_attention_layernorm"},
    "none": {},
}
LINEAR_PATHS = {
    "gate_offset": "mlp.gate_offset",
    "value_skip": "self_attn.value_skip",
    "attention_gain": "self_attn.attention_gain",
    "uniform_gain": "self_attn.uniform_gain",
}

# Largest sizes that are believed; anything above is a broken or hostile config.
LIMITS = {
    "num_hidden_layers": 2048,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 13,
    "vocab_size": 1 << 23,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
}


def is_stream_gain(name: str) -> bool:
    """Whether a tensor is the gain of a norm on the stream, the final one included."""
    return name.endswith(
        (*(f"{norm}.weight" for norm in GAINS["pre"].values()), "model.norm.weight")
    )


def path(layer: int, projection: str) -> str:
    """The module path of a layer's projection: ``path(3, "q_proj")``."""
    return f"model.layers.{layer}.{PROJECTIONS[projection]}"


@dataclass(frozen=True)
class Family:
    """One source architecture.

    ``settings`` turns a Hugging Face config into the format's own keys. ``names`` rewrites source
    tensor names (regular expression to replacement, ``re.sub``) into canonical ones. ``stock``
    families run in mlx-lm itself, so an output that keeps skips and norms needs no code of ours.
    ``gain_offset`` is what the gains of stream norms are stored less than they are.
    """

    settings: Callable[[Config], Config]
    names: Mapping[str, str] = field(default_factory=dict)
    stock: bool = True
    gain_offset: float = 0.0

    def canonical(self, name: str) -> str:
        for pattern, replacement in self.names.items():
            name = re.sub(pattern, replacement, name)
        return name


def _prenorm(config: Config) -> Config:
    """Llama: serial blocks, both skips, an RMS norm before each sub-layer and before the head."""
    bias = {"attention_bias": config.get("attention_bias"), "mlp_bias": config.get("mlp_bias")}
    window = config.get("sliding_window") if config.get("layer_types") else None
    return {"skip": "both", "norm": "pre", "final_norm": True, "sliding_window": window, **bias}


def _mistral(config: Config) -> Config:
    """As Llama; a sliding window without ``layer_types`` holds for every layer (transformers)."""
    return {**_prenorm(config), "sliding_window": config.get("sliding_window")}


def _gemma(config: Config) -> Config:
    """Gemma 1: as Llama, but the embedding, tied, enters the stream times sqrt(hidden_size).

    Whatever "hidden_act" says, the activation is "hidden_activation" (transformers).
    """
    size = config.get("hidden_size")
    return {
        **_prenorm(config),
        "sliding_window": None,
        "layer_types": None,
        "hidden_act": _given(config, "hidden_activation", "gelu_pytorch_tanh"),
        "tie_word_embeddings": _given(config, "tie_word_embeddings", True),
        "embedding_scale": math.sqrt(size) if isinstance(size, int) and size > 0 else 1.0,
    }


FAMILIES: dict[str, Family] = {
    "gemma": Family(_gemma, gain_offset=1.0),
    "llama": Family(_prenorm),
    "mistral": Family(_mistral),
    "skipless": Family(dict, stock=False),
}


def family_of(config: Config) -> Family:
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


def _given(config: Config, key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _whole(config: Config, key: str, default: int | None = None) -> int:
    value = _given(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LIMITS[key]:
        raise UserError(
            f'"{key}" in config.json is {value!r}; it must be a whole number '
            f"from 1 to {LIMITS[key]:,}"
        )
    return value


def _real(config: Config, key: str, default: float) -> float:
    value = _given(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise UserError(f'"{key}" in config.json is {value!r}; it must be a positive number')
    return float(value)


def _flag(config: Config, key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f'"{key}" in config.json is {value!r}; it must be true or false')
    return bool(value)


def _layer_lists(
    config: Config, key: str, parts: Collection[str], layers: int
) -> dict[str, list[int]]:
    lists = config.get(key) or {}
    if not isinstance(lists, dict) or not all(
        part in parts
        and isinstance(where, list)
        and all(type(i) is int and 0 <= i < layers for i in where)
        for part, where in lists.items()
    ):
        raise UserError(
            f'"{key}" in config.json is {lists!r}; it must map {", ".join(parts)} to '
            f"lists of layers from 0 to {layers - 1}"
        )
    return lists


def _extra_bits(config: Config) -> dict[str, int]:
    bits = config.get("extra_bits") or {}
    if not isinstance(bits, dict) or not all(type(n) is int and n >= 0 for n in bits.values()):
        raise UserError(
            f'"extra_bits" in config.json is {bits!r}; it must map matrices to numbers of bits'
        )
    return bits


def _gains(config: Config, norm: str) -> list[str] | None:
    """The gains that a converted checkpoint says it has; None where a source says nothing."""
    gains = config.get("gains")
    known = [*GAINS[norm], "final"]
    if gains is not None and not (isinstance(gains, list) and all(g in known for g in gains)):
        raise UserError(
            f'"gains" in config.json is {gains!r}; with norm {norm} it must be a list of '
            f"{', '.join(known)}"
        )
    return gains


def _layers_with(names: Iterable[str], suffix: str) -> list[int]:
    pattern = re.compile(rf"model\.layers\.(\d+)\.{re.escape(suffix)}$")
    return sorted(int(m[1]) for name in names if (m := pattern.match(name)))


def _rope(config: Config) -> tuple[float, Config | None]:
    """Base and scaling, from our own key, Hugging Face's old ones or ``rope_parameters``."""
    new = config.get("rope_parameters")
    scaling = next((config[k] for k in ("rope", "rope_scaling") if config.get(k)), new)
    for value in (new, scaling):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"the RoPE scaling in config.json is {value!r}; it must be an object")
    theta = _real({**config, **(new or {})}, "rope_theta", 10000.0)
    scaling = {k: v for k, v in (scaling or {}).items() if k != "rope_theta"}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return theta, None if kind == "default" else {**scaling, "rope_type": kind}


def _check_removed(args: ModelArgs) -> None:
    """Without Q, K or V the stream itself takes its place, so it must be as wide."""
    heads, kv_heads = args.num_attention_heads, args.num_key_value_heads
    count = {"q": heads, "k": kv_heads, "v": kv_heads}
    if args.block == "parallel" or args.skip == "both":
        count["p"] = heads  # the heads are added to the stream
    for part, n in count.items():
        if args.removed.get(part) and n * args.head_dim != args.hidden_size:
            raise UserError(
                f'"removed" in config.json names {part}, which is {n * args.head_dim} wide and '
                f"cannot be left out of a stream of {args.hidden_size}: correct config.json"
            )


def model_args(config: Config, tensors: Collection[str] | None = None) -> ModelArgs:
    """The network that a config describes.

    Args:
        config: a Hugging Face ``config.json`` of a known family.
        tensors: the checkpoint's canonical tensor names; they decide what the config leaves open
            (biases, gains, linear paths, a tied head). None: the config alone is believed.

    Raises:
        UserError: for an unknown architecture or a size that is missing, malformed or absurd.
    """
    own = {**config, **family_of(config).settings(config)}
    layers = _whole(own, "num_hidden_layers")
    hidden, heads = _whole(own, "hidden_size"), _whole(own, "num_attention_heads")
    kv_heads = _whole(own, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"{heads} attention heads cannot share {kv_heads} key-value heads: correct "
            '"num_key_value_heads" in config.json'
        )
    if own.get("head_dim") is None and hidden % heads:
        raise UserError(
            f'"hidden_size" {hidden} is no multiple of {heads} heads: config.json needs "head_dim"'
        )
    norm = _given(own, "norm", "none")
    theta, scaling = _rope(own)
    window = own.get("sliding_window")
    try:
        args = ModelArgs(
            model_type="skipless",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=_whole(own, "intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_whole(own, "head_dim", hidden // heads),
            vocab_size=_whole(own, "vocab_size"),
            block=_given(own, "block", "serial"),
            skip=_given(own, "skip", "none"),
            norm=norm,
            final_norm=_flag(own, "final_norm"),
            rms_norm_eps=_real(own, "rms_norm_eps", 1e-6),
            hidden_act=_given(own, "hidden_act", "silu"),
            rope_theta=theta,
            rope=scaling,
            max_position_embeddings=_whole(own, "max_position_embeddings", 2048),
            sliding_window=None if window is None else _whole(own, "sliding_window"),
            layer_types=_given(own, "layer_types", []),
            tie_word_embeddings=_flag(own, "tie_word_embeddings"),
            embedding_scale=_real(own, "embedding_scale", 1.0),
            removed=_layer_lists(own, "removed", ("q", "k", "v", "p", "attention", "ffn"), layers),
            extra_bits=_extra_bits(own),
            precomputed=_flag(own, "precomputed"),
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error
    _check_removed(args)
    if args.head_dim % 2:
        raise UserError(f"head_dim {args.head_dim} is odd; RoPE needs pairs: correct config.json")
    _check_rope(args)
    kinds = args.layer_types
    known = ["full_attention", "sliding_attention"]
    fits = isinstance(kinds, list) and len(kinds) == layers
    if not fits or not all(kind in known for kind in kinds):
        raise UserError(
            f'"layer_types" in config.json must name one of {known} for each of {layers} layers'
        )
    if "sliding_attention" in kinds and not args.sliding_window:
        raise UserError('"layer_types" in config.json asks for a window: give "sliding_window" too')
    if tensors is None:
        _complete_from_config(args, own)
    else:
        _complete_from_tensors(args, own, tensors)
    if args.precomputed and (args.lacks("attention", 0) or args.tie_word_embeddings):
        raise UserError(
            'config.json says "precomputed", which needs an attention in layer 0 and a head of its '
            "own: correct config.json"
        )
    return args


def _check_rope(args: ModelArgs) -> None:
    try:
        if args.rope and "factor" in args.rope:
            _real(args.rope, "factor", 1.0)
        initialize_rope(
            args.head_dim, args.rope_theta, False, args.rope, args.max_position_embeddings
        )
    except (ValueError, KeyError, TypeError, ArithmeticError, AssertionError, UserError) as error:
        raise UserError(
            f"the RoPE scaling in config.json is {args.rope!r}, which mlx-lm cannot build "
            f"({type(error).__name__}: {error}): correct it"
        ) from error


def _complete_from_config(args: ModelArgs, config: Config) -> None:
    everywhere = list(range(args.num_hidden_layers))
    for flag, names in (
        ("attention_bias", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp_bias", ("gate_proj", "up_proj", "down_proj")),
    ):
        if _flag(config, flag):
            args.biases |= dict.fromkeys(names, everywhere)
    args.biases = _layer_lists(config, "biases", PROJECTIONS, len(everywhere)) or args.biases
    gains = _gains(config, args.norm)
    args.gains = [*_needed_gains(args), "final"] if gains is None else gains
    for flag in LINEAR_PATHS:
        setattr(args, flag, _flag(config, flag))


def _needed_gains(args: ModelArgs) -> list[str]:
    """The layers' gains that a source must have; those of norm "qkv" may be absent."""
    return [*GAINS["pre"]] if args.norm == "pre" else []


def _complete_from_tensors(args: ModelArgs, config: Config, tensors: Collection[str]) -> None:
    if config.get("tie_word_embeddings") is None:
        args.tie_word_embeddings = f"{HEAD}.weight" not in tensors
    biases = {p: _layers_with(tensors, f"{full}.bias") for p, full in PROJECTIONS.items()}
    args.biases = {p: layers for p, layers in biases.items() if layers}
    gains = _gains(config, args.norm)
    if gains is None:
        found = [g for g, n in GAINS[args.norm].items() if _layers_with(tensors, f"{n}.weight")]
        gains = [*(_needed_gains(args) or found), *(["final"] if args.final_norm else [])]
    args.gains = gains
    for flag, name in LINEAR_PATHS.items():
        setattr(args, flag, bool(_layers_with(tensors, name)))


def stock_expresses(args: ModelArgs, *, dropping: bool = False) -> bool:
    """Whether mlx-lm's own network is the same function; it knows fewer mixes than configs do.

    That is its gemma where the embedding is scaled (whose GELU is the exact one, not the tanh that
    approximates it), else its llama. With ``dropping``, whether its nemotron-nas is, which knows
    blocks without attention or FFN.
    """
    if args.embedding_scale != 1:
        gelu = args.hidden_act in ("gelu", "gelu_pytorch_tanh", "gelu_new")
        return gelu and args.tie_word_embeddings and not args.biases and not dropping
    slides = [kind == "sliding_attention" for kind in args.layer_types]
    everywhere = list(range(args.num_hidden_layers))
    uniform = all(
        len({tuple(args.biases.get(name, ())) for name in names}) == 1
        and args.biases.get(names[0], everywhere) == everywhere
        for names in (ATTENTION, MLP)
    )
    expresses = args.hidden_act == "silu" and not all(slides) and uniform
    if not dropping:
        return expresses
    rope = args.rope is None or "factor" in args.rope
    heads = args.hidden_size == args.num_attention_heads * args.head_dim
    return expresses and not any(slides) and rope and heads and not args.intermediate_size % 256


def stock_settings(args: ModelArgs) -> Config:
    """What mlx-lm's llama must be told: it has defaults of its own where configs are silent."""
    settings: Config = {
        "tie_word_embeddings": args.tie_word_embeddings,
        "num_key_value_heads": args.num_key_value_heads,
        "head_dim": args.head_dim,
        "rms_norm_eps": args.rms_norm_eps,
        "rope_theta": args.rope_theta,
        "attention_bias": bool(args.biases.get(ATTENTION[0])),
        "mlp_bias": bool(args.biases.get(MLP[0])),
    }
    settings |= {"rope_scaling": args.rope} if args.rope else {}
    if args.removed:
        settings |= _nemotron_nas(args)
    return settings


def _nemotron_nas(args: ModelArgs) -> Config:
    """Blocks without attention or FFN, in the terms of mlx-lm's nemotron-nas."""
    group = args.num_attention_heads // args.num_key_value_heads
    # Widths are given as two thirds of a multiple of the stream's, and rounded up to 256.
    width = {"ffn_mult": 1.5 * (args.intermediate_size - 128) / args.hidden_size}
    nothing: Config = {"no_op": True}
    return {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "max_position_embeddings": args.max_position_embeddings,
        "block_configs": [
            {
                "attention": nothing if args.lacks("attention", i) else {"n_heads_in_group": group},
                "ffn": nothing if args.lacks("ffn", i) else width,
            }
            for i in range(args.num_hidden_layers)
        ],
    }
