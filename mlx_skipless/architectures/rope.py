"""What a config.json says of RoPE: its base and its scaling, in whichever keys they are.

mlx-lm builds the scaling. Where it means something else to transformers, nothing exact is known.
"""

import math
from collections.abc import Iterator

from mlx_lm.models.rope_utils import initialize_rope

from ..errors import UserError
from ..network.model import ModelArgs
from .family import Config, check_real

FROM_A_LENGTH = ("llama3", "yarn", "longrope")  # scalings from a length that a model had once
ORIGINAL = "original_max_position_embeddings"


class OtherRope(UserError):
    """A RoPE scaling that mlx-lm computes, and otherwise than transformers does."""


def read_rope(config: Config, longest: int) -> tuple[float, Config | None]:
    """Read base and scaling, from our own key, Hugging Face's old ones or ``rope_parameters``.

    Args:
        config: in the format's keys.
        longest: the length of the texts that the model is for, in tokens.

    Raises:
        UserError: if one of them is malformed, or is not one for all layers.
    """
    for key in ("rope", "rope_scaling", "rope_parameters"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise UserError(
                f"the RoPE scaling in config.json is {config[key]!r}; it must be an object"
            )
    new = config.get("rope_parameters") or {}
    scaling = next((config[k] for k in ("rope", "rope_scaling") if config.get(k)), new)
    given = (one.get("rope_theta") for one in (new, scaling, config))
    theta = next((one for one in given if one is not None), None)
    scaling = {k: v for k, v in scaling.items() if k != "rope_theta" and v is not None}
    rest = {k: v for k, v in scaling.items() if k not in ("rope_type", "type")}
    kind = scaling.get("rope_type") or scaling.get("type")
    theta = check_real("rope_theta", 10000.0 if theta is None else theta)
    if kind is None and rest.keys() - {"partial_rotary_factor"}:
        raise UserError(
            f'the RoPE scaling in config.json is {scaling!r}; it needs a "rope_type", one for all '
            "layers"
        )
    if kind in (None, "default"):
        return theta, None
    if kind in FROM_A_LENGTH and not config.get("rope"):
        rest = {ORIGINAL: longest, **rest}  # transformers' default; mlx-lm has numbers of its own
    return theta, {**rest, "rope_type": kind}


def check_rope(args: ModelArgs) -> None:
    """Check that mlx-lm builds a network's RoPE, and as its config means it.

    Raises:
        OtherRope: if it builds another.
        UserError: if it builds none.
    """
    try:
        if args.rope and "factor" in args.rope:
            check_real("factor", 1.0 if args.rope["factor"] is None else args.rope["factor"])
        initialize_rope(
            args.rotary_dim, args.rope_theta, False, args.rope, args.max_position_embeddings
        )
        complaints = [*_find_unread(args)]
    except (ValueError, KeyError, TypeError, ArithmeticError, AssertionError, UserError) as error:
        raise UserError(
            f"the RoPE scaling in config.json is {args.rope!r}, which mlx-lm cannot build "
            f"({type(error).__name__}: {error}): correct it"
        ) from error
    for complaint in complaints:
        raise OtherRope(
            f"the RoPE scaling in config.json is {args.rope!r}, and {complaint}: correct it"
        )


def _find_unread(args: ModelArgs) -> Iterator[str]:
    """Yield what a scaling asks of transformers that mlx-lm does otherwise."""
    rope = args.rope or {}
    factors = _find_attention_factors(args)
    if not math.isclose(*factors, rel_tol=1e-6):
        yield f'mlx-lm takes {factors[1]} for its "attention_factor", not {factors[0]}'
    if rope.get("short_factor") != rope.get("long_factor"):
        yield 'mlx-lm takes its "long_factor" for short texts, too'
    if rope.get("rope_type") == "yarn" and rope.get("truncate") is False:
        yield 'mlx-lm does as if "truncate" was true'
    width = int(args.head_dim * rope.get("partial_rotary_factor", args.rotary_dim / args.head_dim))
    if rope.get("rope_type") != "proportional" and width != args.rotary_dim:
        yield f"mlx-lm rotates {args.rotary_dim} numbers of a head, not {width}"


def _find_attention_factors(args: ModelArgs) -> tuple[float, float]:
    """Return by what transformers and by what mlx-lm multiply what is rotated."""
    rope = args.rope or {}
    if rope.get("rope_type") == "yarn":

        def count(scale: float) -> float:
            return 0.1 * scale * math.log(max(rope["factor"], 1.0)) + 1.0

        mscale, of_all = rope.get("mscale", 1), rope.get("mscale_all_dim", 0)
        found = count(mscale) / count(of_all)
        usual = found if rope.get("mscale") and of_all else count(1)
    elif rope.get("rope_type") == "longrope":
        original = rope[ORIGINAL]
        longer = max(args.max_position_embeddings / original, 1.0)
        usual = found = math.sqrt(1 + math.log(longer) / math.log(original))
    else:
        return 1.0, 1.0
    return float(rope.get("attention_factor", usual)), found
