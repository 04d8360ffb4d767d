"""What a config.json says of a network: every key read, checked and completed."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from mlx_lm.models.rope_utils import initialize_rope

from ..errors import UserError
from ..network.model import FUSED, ModelArgs
from ..network.names import FINAL_NORM, HEAD, LINEAR_PATHS, NORMS, PROJECTIONS, find_norms
from .families import Config, find_family, read_flag

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
    "rotary_dim": 1 << 13,
    "num_local_experts": 1 << 12,
    "num_experts_per_tok": 1 << 12,
}


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


def _count(config: Config, key: str) -> int:
    """A whole number that may be absent or 0."""
    value = config.get(key)
    return 0 if value is None or (type(value) is int and value == 0) else _whole(config, key)


def _real(config: Config, key: str, default: float) -> float:
    value = _given(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise UserError(f'"{key}" in config.json is {value!r}; it must be a positive number')
    return float(value)


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


def _norms(config: Config, key: str, known: Collection[str], norm: str) -> list[str] | None:
    """The norms that a list in the config names; None where it says nothing."""
    named = config.get(key)
    if named is not None and not (isinstance(named, list) and all(g in known for g in named)):
        raise UserError(
            f'"{key}" in config.json is {named!r}; with norm {norm} it must be a list of '
            f"{', '.join(known)}"
        )
    return named


def _layers_with(names: Iterable[str], suffix: str) -> list[int]:
    pattern = re.compile(rf"model\.layers\.(0|[1-9][0-9]{{0,8}})\.{re.escape(suffix)}")
    return sorted(int(m[1]) for name in names if (m := pattern.fullmatch(name)))


def _rope(config: Config) -> tuple[float, Config | None]:
    """Base and scaling, from our own key, Hugging Face's old ones or ``rope_parameters``."""
    for key in ("rope", "rope_scaling", "rope_parameters"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise UserError(
                f"the RoPE scaling in config.json is {config[key]!r}; it must be an object"
            )
    new = config.get("rope_parameters")
    scaling = next((config[k] for k in ("rope", "rope_scaling") if config.get(k)), new)
    theta = _real({**config, **(new or {})}, "rope_theta", 10000.0)
    scaling = {k: v for k, v in (scaling or {}).items() if k != "rope_theta" and v is not None}
    left = {k: v for k, v in scaling.items() if k not in ("rope_type", "type")}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind is None and left.keys() - {"partial_rotary_factor"}:
        raise UserError(
            f'the RoPE scaling in config.json is {scaling!r}; it needs a "rope_type", one for all '
            "layers"
        )
    return theta, None if kind in (None, "default") else {**left, "rope_type": kind}


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


def read_model_args(config: Config, tensors: Collection[str] | None = None) -> ModelArgs:
    """The network that a config describes.

    Args:
        config: a Hugging Face ``config.json`` of a known family.
        tensors: the checkpoint's canonical tensor names; they decide what the config leaves open
            (biases, gains, linear paths, a tied head). None: the config alone is believed.

    Raises:
        UserError: for an unknown architecture or a size that is missing, malformed or absurd.
    """
    family = find_family(config)
    try:
        return _model_args(family.to_own_keys(config), tensors)
    except UserError as error:
        raise UserError(family.quote_its_keys(str(error))) from error


def _model_args(own: Config, tensors: Collection[str] | None) -> ModelArgs:
    """Likewise of a config in the format's own keys."""
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
            f'"hidden_size" {hidden} is no multiple of {heads} heads and config.json has no '
            '"head_dim": correct it'
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
            final_norm=read_flag(own, "final_norm"),
            rms_norm_eps=_real(own, "rms_norm_eps", 1e-6),
            hidden_act=_given(own, "hidden_act", "silu"),
            rope_theta=theta,
            rope=scaling,
            max_position_embeddings=_whole(own, "max_position_embeddings", 2048),
            sliding_window=None if window is None else _whole(own, "sliding_window"),
            layer_types=_given(own, "layer_types", []),
            tie_word_embeddings=read_flag(own, "tie_word_embeddings"),
            embedding_scale=_real(own, "embedding_scale", 1.0),
            logit_scale=_real(own, "logit_scale", 1.0),
            norm_type=_given(own, "norm_type", "rms"),
            shared_norm=read_flag(own, "shared_norm"),
            qk_norm=read_flag(own, "qk_norm"),
            gated=read_flag(own, "gated", default=True),
            num_local_experts=_count(own, "num_local_experts"),
            num_experts_per_tok=_count(own, "num_experts_per_tok"),
            rotary_dim=_whole(own, "rotary_dim", _whole(own, "head_dim", hidden // heads)),
            rope_traditional=read_flag(own, "rope_traditional"),
            head_bias=read_flag(own, "head_bias"),
            removed=_layer_lists(own, "removed", ("q", "k", "v", "p", "attention", "ffn"), layers),
            extra_bits=_extra_bits(own),
            fused=_layer_lists(own, "fused", FUSED, layers),
            precomputed=read_flag(own, "precomputed"),
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error
    _check_removed(args)
    _check_shapes(args)
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


def _check_shapes(args: ModelArgs) -> None:
    for key, width in (("head_dim", args.head_dim), ("rotary_dim", args.rotary_dim)):
        if width % 2:
            raise UserError(f"{key} {width} is odd; RoPE needs pairs: correct config.json")
    if args.rotary_dim > args.head_dim:
        raise UserError(
            f'"rotary_dim" {args.rotary_dim} in config.json is more than a head has, '
            f"{args.head_dim}: correct it"
        )
    if args.num_local_experts and not 1 <= args.num_experts_per_tok <= args.num_local_experts:
        raise UserError(
            f'"num_experts_per_tok" in config.json is {args.num_experts_per_tok}; of '
            f"{args.num_local_experts} experts a token can have 1 to all"
        )
    if args.shared_norm and (args.block != "parallel" or args.norm != "pre"):
        raise UserError(
            'config.json says "shared_norm", which is for parallel blocks with norm pre: correct it'
        )


def _check_rope(args: ModelArgs) -> None:
    try:
        if args.rope and "factor" in args.rope:
            _real(args.rope, "factor", 1.0)
        if args.rope and "attention_factor" in args.rope:
            raise UserError('it has no "attention_factor"')
        initialize_rope(
            args.rotary_dim, args.rope_theta, False, args.rope, args.max_position_embeddings
        )
    except (ValueError, KeyError, TypeError, ArithmeticError, AssertionError, UserError) as error:
        raise UserError(
            f"the RoPE scaling in config.json is {args.rope!r}, which mlx-lm cannot build "
            f"({type(error).__name__}: {error}): correct it"
        ) from error


def _complete_from_config(args: ModelArgs, config: Config) -> None:
    everywhere = list(range(args.num_hidden_layers))
    for key, names in (
        ("attention_bias", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp_bias", ("gate_proj", "up_proj", "down_proj")),
    ):
        if read_flag(config, key):
            args.biases |= dict.fromkeys(names, everywhere)
    args.biases = _layer_lists(config, "biases", PROJECTIONS, len(everywhere)) or args.biases
    gains = _norms(config, "gains", _known_norms(args), args.norm)
    args.gains = [*_needed_gains(args), "final"] if gains is None else gains
    args.shifts = _norms(config, "shifts", _known_shifts(args), args.norm) or []
    for key in LINEAR_PATHS:
        setattr(args, key, read_flag(config, key))


def _known_norms(args: ModelArgs) -> list[str]:
    return [*find_norms(args), "final"]


def _known_shifts(args: ModelArgs) -> list[str]:
    """The norms that can have a bias."""
    layer_norms = args.norm_type == "layer"
    return [n for n in _known_norms(args) if layer_norms and (n in NORMS["pre"] or n == "final")]


def _needed_gains(args: ModelArgs) -> list[str]:
    """The layers' gains that a source must have; those of norm "qkv" may be absent."""
    return [*find_norms(args)] if args.norm == "pre" else []


def _complete_from_tensors(args: ModelArgs, config: Config, tensors: Collection[str]) -> None:
    if config.get("tie_word_embeddings") is None:
        args.tie_word_embeddings = f"{HEAD}.weight" not in tensors
    biases = {p: _layers_with(tensors, f"{full}.bias") for p, full in PROJECTIONS.items()}
    args.biases = {p: layers for p, layers in biases.items() if layers}
    gains = _norms(config, "gains", _known_norms(args), args.norm)
    if gains is None:
        found = [g for g, n in find_norms(args).items() if _layers_with(tensors, f"{n}.weight")]
        gains = [*(_needed_gains(args) or found), *(["final"] if args.final_norm else [])]
    args.gains = gains
    shifts = _norms(config, "shifts", _known_shifts(args), args.norm)
    if shifts is None:
        modules = find_norms(args)
        shifts = [
            norm
            for norm in _known_shifts(args)
            if (norm == "final" and f"{FINAL_NORM}.bias" in tensors)
            or (norm in modules and _layers_with(tensors, f"{modules[norm]}.bias"))
        ]
    args.shifts = shifts
    args.head_bias = f"{HEAD}.bias" in tensors
    for key, name in LINEAR_PATHS.items():
        setattr(args, key, bool(_layers_with(tensors, name)))
