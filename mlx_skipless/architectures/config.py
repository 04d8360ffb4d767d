"""What a config.json says of a network: every key read, checked and completed."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import mlx.core as mx

from ..constants import FLOAT_NAMES
from ..errors import UserError
from ..network.model import FUSED, PROJECTION_NORMS, ModelArgs
from ..network.names import (
    ATTENTION,
    CHANNEL_PATHS,
    EXPERTS,
    FINAL_NORM,
    HEAD,
    LINEAR_PATHS,
    NORMS,
    PROJECTIONS,
    find_norms,
)
from .families import find_family
from .family import Config, check_flag, check_real, list_biases, read_flag
from .rope import check_rope, read_rope

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
    "query_step": 1 << 31,
    "num_local_experts": 1 << 12,
    "num_experts_per_tok": 1 << 12,
}
# What the names of sizes end with in the configs of other architectures, and the largest believed.
ENDINGS = {
    **dict.fromkeys(("layer", "layers"), LIMITS["num_hidden_layers"]),
    **dict.fromkeys(("head", "heads", "experts", "groups", "inputs", "loops"), 1 << 14),
    **dict.fromkeys(("size", "dim", "rank", "embd", "inner", "model", "channels"), 1 << 23),
}
POSITIVE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
LAYER_TYPES = ["full_attention", "sliding_attention"]
# Keys that map parts of a layer to lists of layers.
LAYER_LISTS: dict[str, Collection[str]] = {
    "removed": ("q", "k", "v", "p", "attention", "ffn"),
    "fused": FUSED,
    "biases": PROJECTIONS,
}


def read_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    """The number type that a config.json declares; bfloat16 where it declares none."""
    inner = config.get("text_config")
    for one in (config, inner if isinstance(inner, Mapping) else {}):
        declared = one.get("torch_dtype") or one.get("dtype")
        if declared in FLOAT_NAMES:
            return getattr(mx, declared)
    return mx.bfloat16


def check_sizes(config: Mapping[str, Any], tensors: int) -> None:
    """Check sizes in the config of any architecture, before a network is built as it says.

    Only what no network has is refused, for an architecture may have keys of its own. What passes
    is compared with the tensors later; until then MLX's arrays take no memory.

    Args:
        config: a config.json, or an object in one.
        tensors: how many tensors the model has; a layer has one at least.

    Raises:
        UserError: for a size that is not a number, not positive or absurd.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, tensors)
        elif key in POSITIVE and value is not None and not isinstance(value, list):
            _check_whole(key, value)
        most = ENDINGS.get(key.rpartition("_")[2], math.inf)
        for size in value if isinstance(value, list) else [value]:
            if type(size) in (int, float) and abs(size) > most:
                raise UserError(
                    f'"{key}" in config.json has {size!r}; no model has more than {most:,}: '
                    "download it again"
                )
    layers = config.get("num_hidden_layers")
    if type(layers) is int and layers > tensors:
        raise UserError(
            f'"num_hidden_layers" in config.json is {layers:,}, and the files have {tensors:,} '
            "tensors: config.json describes another model"
        )


def _check_whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LIMITS[key]:
        raise UserError(
            f'"{key}" in config.json is {value!r}; it must be a whole number '
            f"from 1 to {LIMITS[key]:,}"
        )
    return value


def _check_count(key: str, value: Any) -> int:
    return 0 if type(value) is int and value == 0 else _check_whole(key, value)


def _check_window(key: str, value: Any) -> int | None:
    return None if value is None else _check_whole(key, value)


def _check_growth(key: str, value: Any) -> float:
    return 0.0 if type(value) in (int, float) and value == 0 else check_real(key, value)


def _check_extra_bits(key: str, value: Any) -> dict[str, int]:
    value = value or {}
    if not isinstance(value, dict) or not all(type(n) is int and n >= 0 for n in value.values()):
        raise UserError(
            f'"{key}" in config.json is {value!r}; it must map matrices to numbers of bits'
        )
    return value


def _check_norms(key: str, value: Any) -> list[str]:
    value = [] if value is None else value
    if not isinstance(value, list) or not all(norm in PROJECTION_NORMS for norm in value):
        raise UserError(
            f'"{key}" in config.json is {value!r}; it must be a list of '
            f"{', '.join(PROJECTION_NORMS)}"
        )
    return value


def _check_later(key: str, value: Any) -> Any:
    """Accept what ModelArgs checks itself, or ``_find_contradictions`` beside other keys."""
    return value


def _share_stream(read: Config) -> int:
    """Return the width of a head where all of them together are as wide as the stream."""
    hidden, heads = read["hidden_size"], read["num_attention_heads"]
    if hidden % heads:
        raise UserError(
            f'"hidden_size" {hidden} is no multiple of {heads} heads and config.json has no '
            '"head_dim": correct it'
        )
    return hidden // heads


# The format's keys in the order in which they are read: how each is checked, and its value where a
# config is silent, which can be computed from the keys before it.
FORMAT: dict[str, tuple[Callable[[str, Any], Any], Any]] = {
    "num_hidden_layers": (_check_whole, None),
    "hidden_size": (_check_whole, None),
    "num_attention_heads": (_check_whole, None),
    "num_key_value_heads": (_check_whole, lambda read: read["num_attention_heads"]),
    "head_dim": (_check_whole, _share_stream),
    "intermediate_size": (_check_whole, None),
    "vocab_size": (_check_whole, None),
    "block": (_check_later, "serial"),
    "skip": (_check_later, "none"),
    "norm": (_check_later, "none"),
    "norms": (_check_norms, None),
    "norm_type": (_check_later, "rms"),
    "final_norm": (check_flag, False),
    "shared_norm": (check_flag, False),
    "qk_norm": (check_flag, False),
    "rms_norm_eps": (check_real, 1e-6),
    "hidden_act": (_check_later, "silu"),
    "gated": (check_flag, True),
    "num_local_experts": (_check_count, 0),
    "num_experts_per_tok": (_check_count, 0),
    "max_position_embeddings": (_check_whole, 2048),
    "sliding_window": (_check_window, None),
    "layer_types": (_check_later, None),
    "rotary_dim": (_check_whole, lambda read: read["head_dim"]),
    "rope_traditional": (check_flag, False),
    "query_growth": (_check_growth, 0.0),
    "query_step": (_check_count, 0),
    "tie_word_embeddings": (check_flag, False),
    "embedding_scale": (check_real, 1.0),
    "logit_scale": (check_real, 1.0),
    "head_bias": (check_flag, False),
    "precomputed": (check_flag, False),
    "extra_bits": (_check_extra_bits, None),
    **{key: (lambda key, value: value or {}, None) for key in LAYER_LISTS},
}


def read_model_args(
    config: Config, tensors: Mapping[str, Sequence[int]] | None = None
) -> ModelArgs:
    """Read the network that a config describes.

    Args:
        config: a Hugging Face ``config.json`` of a known family.
        tensors: the checkpoint's tensors by canonical name, as ``list_shapes`` gives them; they
            decide what the config leaves open (biases, norms' weights, linear paths, a tied head).
            None: the config alone is believed.

    Raises:
        UserError: for an unknown architecture or a size that is missing, malformed or absurd.
    """
    family = find_family(config)
    try:
        own = family.to_own_keys(config)
        args = _read_format(own)
        check_rope(args)
        if tensors is None:
            _complete_from_config(args, own)
        else:
            _complete_from_tensors(args, own, tensors)
        if args.precomputed and (args.lacks("attention", 0) or args.tie_word_embeddings):
            raise UserError(
                'config.json says "precomputed", which needs an attention in layer 0 and a head of '
                "its own: correct config.json"
            )
        width = args.num_attention_heads * args.head_dim
        if args.output_skip and width != args.hidden_size:
            raise UserError(
                f"an output skip adds heads that are {width} wide to a stream of "
                f"{args.hidden_size}: correct config.json or take it out"
            )
    except UserError as error:
        raise type(error)(family.quote_its_keys(str(error))) from error
    return args


def _read_format(own: Config) -> ModelArgs:
    read: Config = {}
    for key, (check, default) in FORMAT.items():
        value = own.get(key)
        if value is None:
            value = default(read) if callable(default) else default
        read[key] = check(key, value)
    theta, scaling = read_rope(own, read["max_position_embeddings"])
    try:
        args = ModelArgs(model_type="skipless", rope_theta=theta, rope=scaling, **read)
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error
    finders = (_find_wrong_layers, _find_contradictions, _find_wrong_query_readers)
    for complaint in chain.from_iterable(find(args) for find in finders):
        raise UserError(complaint)
    return args


def _find_wrong_layers(args: ModelArgs) -> Iterator[str]:
    """Yield a complaint about each key that says something of layers that there are not."""
    layers = args.num_hidden_layers
    for key, parts in LAYER_LISTS.items():
        lists = getattr(args, key)
        if not isinstance(lists, dict) or not all(
            part in parts
            and isinstance(numbers, list)
            and all(type(i) is int and 0 <= i < layers for i in numbers)
            for part, numbers in lists.items()
        ):
            yield (
                f'"{key}" in config.json is {lists!r}; it must map {", ".join(parts)} to '
                f"lists of layers from 0 to {layers - 1}"
            )
    kinds = args.layer_types
    fits = isinstance(kinds, list) and len(kinds) == layers
    if not fits or not all(kind in LAYER_TYPES for kind in kinds):
        yield (
            f'"layer_types" in config.json must name one of {LAYER_TYPES} for each of {layers} '
            "layers"
        )
    if "sliding_attention" in kinds and not args.sliding_window:
        yield '"layer_types" in config.json asks for a window: give "sliding_window" too'


def _find_contradictions(args: ModelArgs) -> Iterator[str]:
    """Yield a complaint about each key that does not fit the others."""
    heads, kv_heads = args.num_attention_heads, args.num_key_value_heads
    if heads % kv_heads:
        yield (
            f"{heads} attention heads cannot share {kv_heads} key-value heads: correct "
            '"num_key_value_heads" in config.json'
        )
    # Without Q, K or V the stream itself takes its place; without P the heads take the stream's,
    # but where an FFN alone reads them.
    counts = {"q": heads, "k": kv_heads, "v": kv_heads}
    without_p = {*args.removed.get("p", ())} - {*args.removed.get("attention", ())}
    bare = without_p & {*args.removed.get("ffn", ())}
    alone = args.block == "serial" and args.skip == "none" and args.norm != "pre"
    if bare or not alone:
        counts["p"] = heads
    for part, count in counts.items():
        if args.removed.get(part) and count * args.head_dim != args.hidden_size:
            yield (
                f'"removed" in config.json names {part}, which is {count * args.head_dim} wide and '
                f"cannot be left out of a stream of {args.hidden_size}: correct config.json"
            )
    for key, width in (("head_dim", args.head_dim), ("rotary_dim", args.rotary_dim)):
        if width % 2:
            yield f"{key} {width} is odd, and RoPE needs pairs: make it even"
    if args.rotary_dim > args.head_dim:
        yield (
            f'"rotary_dim" {args.rotary_dim} in config.json is more than a head has, '
            f"{args.head_dim}: correct it"
        )
    if args.query_growth and not args.query_step:
        yield (
            "queries grow with their positions by config.json, and nothing says at which: give "
            '"query_step" too (of a ministral3, "original_max_position_embeddings")'
        )
    if args.num_local_experts and not 1 <= args.num_experts_per_tok <= args.num_local_experts:
        yield (
            f'"num_experts_per_tok" in config.json is {args.num_experts_per_tok}; of '
            f"{args.num_local_experts} experts a token can have 1 to all"
        )
    if args.norms and args.norm != "qkv":
        yield (
            f'"norms" in config.json is {args.norms!r}, which is for norm qkv and not for norm '
            f"{args.norm}: correct it"
        )
    if args.shared_norm and (args.block != "parallel" or args.norm != "pre"):
        yield (
            'config.json says "shared_norm", which is for parallel blocks with norm pre: correct it'
        )


def _find_wrong_query_readers(args: ModelArgs) -> Iterator[str]:
    """Yield a complaint about each key that does not fit a K and V that read the queries."""
    if "kv" not in args.norms:
        return
    heads, width = args.num_attention_heads, args.head_dim
    if heads * width != args.hidden_size:
        yield (
            f'"norms" in config.json names kv, and {heads} queries of {width} are not as wide as a '
            f"stream of {args.hidden_size}: correct it"
        )
    for name in args.fused:
        if "q_proj" in FUSED[name]:
            yield (
                f'"fused" in config.json names {name}, whose matrices read different things by the '
                'kv in "norms": correct it'
            )


def _complete_from_config(args: ModelArgs, own: Config) -> None:
    """Settle what tensors would tell, where there is a config alone."""
    attention = ATTENTION if read_flag(own, "attention_bias") else ()
    ffn = EXPERTS if read_flag(own, "mlp_bias") else ()
    args.biases = args.biases or list_biases(own, (*attention, *ffn))
    weights = _read_norms(own, "gains", _list_norms(args), args)
    args.gains = [*_list_required(args, {}), "final"] if weights is None else weights
    args.shifts = _read_norms(own, "shifts", _list_layer_norms(args), args) or []
    for key in (*LINEAR_PATHS, "channel_skips"):
        setattr(args, key, read_flag(own, key))


def _complete_from_tensors(
    args: ModelArgs, own: Config, tensors: Mapping[str, Sequence[int]]
) -> None:
    """Settle what the config leaves open by the tensors that there are."""
    if own.get("tie_word_embeddings") is None:
        args.tie_word_embeddings = f"{HEAD}.weight" not in tensors
    args.head_bias = f"{HEAD}.bias" in tensors
    biases = {p: _find_layers(tensors, f"{full}.bias") for p, full in PROJECTIONS.items()}
    args.biases = {p: layers for p, layers in biases.items() if layers}
    modules = find_norms(args)
    weights = _read_norms(own, "gains", _list_norms(args), args)
    if weights is None:
        found = [norm for norm, n in modules.items() if _find_layers(tensors, f"{n}.weight")]
        needed = _list_required(args, own)
        weights = [norm for norm in modules if norm in found or norm in needed]
        weights += ["final"] if args.final_norm else []
    args.gains = weights
    shifts = _read_norms(own, "shifts", _list_layer_norms(args), args)
    if shifts is None:
        biased = {norm for norm, n in modules.items() if _find_layers(tensors, f"{n}.bias")}
        biased |= {"final"} if f"{FINAL_NORM}.bias" in tensors else set()
        shifts = [norm for norm in _list_layer_norms(args) if norm in biased]
    args.shifts = shifts
    for key, name in LINEAR_PATHS.items():
        setattr(args, key, bool(_find_layers(tensors, name)))
    per_channel = [args.num_attention_heads * args.head_dim]
    args.channel_skips = any(
        name.endswith(CHANNEL_PATHS) and [*shape] == per_channel for name, shape in tensors.items()
    )


def _read_norms(own: Config, key: str, known: Collection[str], args: ModelArgs) -> list[str] | None:
    """Read a list of norms; None where the config says nothing."""
    named = own.get(key)
    if named is not None and not (isinstance(named, list) and all(n in known for n in named)):
        raise UserError(
            f'"{key}" in config.json is {named!r}; with norm {args.norm} it must be a list of '
            f"{', '.join(known)}"
        )
    return named


def _list_norms(args: ModelArgs) -> list[str]:
    return [*find_norms(args), "final"]


def _list_layer_norms(args: ModelArgs) -> list[str]:
    """List the norms that can have a bias."""
    layer_norms = args.norm_type == "layer"
    return [n for n in _list_norms(args) if layer_norms and (n in NORMS["pre"] or n == "final")]


def _list_required(args: ModelArgs, own: Config) -> list[str]:
    """List the layers' norms whose weights a source must have.

    With norm "qkv" all are optional, and those of q and k in a source in this format (``own``).
    """
    norms = [*find_norms(args)] if args.norm == "pre" else []
    ours = own.get("model_type") == "skipless"
    return [norm for norm in norms if not (ours and norm in ("q", "k"))]


def _find_layers(names: Iterable[str], suffix: str) -> list[int]:
    """List the layers that have a tensor of this name."""
    pattern = re.compile(rf"model\.layers\.(0|[1-9][0-9]{{0,8}})\.{re.escape(suffix)}")
    return sorted(int(m[1]) for name in names if (m := pattern.fullmatch(name)))
