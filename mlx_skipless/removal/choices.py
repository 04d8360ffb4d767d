"""Chooses the matrices that become the identity: by letters that are obeyed, or by `auto`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx

from ..errors import UserError
from ..network.model import ModelArgs
from ..network.parts import dtype_name
from ..network.wiring import Point, find_points, parse_layer, parse_letter
from .algebra import Conditioning
from .candidates import (
    can_be_skipless,
    count_saved_by_p,
    explain_obstacle,
    explain_shape,
    find_candidates,
    find_removable,
    is_tied_end,
    name_all_with,
    needs_no_inverse,
    say_what_else_helps,
    suggest_removals,
)
from .products import UNIT_ROUNDOFF

# Largest noise, relative to a projection's output, that `auto` accepts from rounding the stream in
# its new basis: about what 6-bit weights add.
NOISE_LIMIT = 0.02
# Nats per token that no one notices: a hundredth of a per cent of the perplexity.
NEGLIGIBLE_KL = 1e-4
# Beyond this condition number float64 itself keeps fewer than four digits.
HOPELESS = 1e12


@dataclass(frozen=True)
class RemovalCost:
    """What removing one matrix from a network that is quantized costs, in nats per token.

    Attributes:
        removed: KL of the source without it, the matrices around it quantized against text.
        rounded: KL of the source with it, it and those around it quantized to nearest.
    """

    removed: float
    rounded: float

    @property
    def pays(self) -> bool:
        """Whether it costs no more than quantization alone does at this place, or nothing."""
        return self.removed <= max(self.rounded, NEGLIGIBLE_KL)


@dataclass(frozen=True)
class Request:
    """What is asked of a plan, and what is known for deciding it.

    Attributes:
        args: the network that the removals start from.
        remove: "auto", "none" or the letters to remove.
        conditioning: measured, by module path; None where no weights are at hand.
        dtype: the type of the result.
        quantized: whether the result gets quantized, against text.
        costs: measured, of removals by module path.
        precompute: whether the first layer's projections become a table.
    """

    args: ModelArgs
    remove: str = "auto"
    conditioning: Mapping[str, Conditioning] | None = None
    dtype: mx.Dtype = mx.float32
    quantized: bool = False
    costs: Mapping[str, RemovalCost] = field(default_factory=dict)
    precompute: bool = False

    @cached_property
    def points(self) -> list[Point]:
        """The points of the network."""
        return find_points(self.args)

    @property
    def last(self) -> int:
        """The index of the last point, which the head reads."""
        return len(self.points) - 1

    def find_conditioning(self, path: str) -> Conditioning | None:
        """Find what was measured of the matrix at a path, if it was."""
        return (self.conditioning or {}).get(path)

    def count_extra_bits(self, index: int, path: str) -> int:
        """Count the extra bits that matrices need around the basis without the matrix at a path.

        Calibration needs none, but for an embedding that is read at both its ends.
        """
        measured = self.find_conditioning(path)
        fitted = self.quantized and not is_tied_end(self.args, self.points, index)
        return 0 if measured is None or fitted else measured.extra_bits

    def explain_obstacle(self, index: int, path: str) -> str | None:
        """Explain why the matrix at a path cannot become the identity; None if it can."""
        return explain_obstacle(self.args, self.points, index, path)


def choose_eliminated(request: Request) -> tuple[dict[int, str], list[str]]:
    """Choose the matrices that become the identity.

    Returns:
        Their paths by point, and what the user should know, one line each.

    Raises:
        UserError: if an explicit removal is impossible.
    """
    if request.remove == "none":
        return {}, []
    return _choose_by_noise(request) if request.remove == "auto" else _obey_letters(request)


def _obey_letters(request: Request) -> tuple[dict[int, str], list[str]]:
    """Choose all matrices of the letters asked for, but those at a pinned end, or refuse."""
    for letter in request.remove:
        if why := explain_shape(request.args, letter):
            raise _make_refusal(request, f"{why}: {suggest_removals(request.args)}")
    eliminated, kept = _find_asked_for(request)
    _refuse_absent_letters(request, eliminated, kept)
    _refuse_singular(request, eliminated)
    if request.args.tie_word_embeddings and {0, request.last} <= eliminated.keys():
        path = eliminated.pop(request.last)
        kept[path] = "the tied embedding gives the first and the last point one basis"
    notes = [f"{_name(path)} stays: {why}" for path, why in kept.items()]
    if "p" in request.remove and (saved := count_saved_by_p(request.args)) < 0:
        notes.append(f"removing P costs {-saved:,} weights a layer at these shapes")
    return eliminated, notes


def _find_asked_for(request: Request) -> tuple[dict[int, str], dict[str, str]]:
    """Find what the letters ask for: by point what goes, and by path why another matrix stays."""
    eliminated: dict[int, str] = {}
    kept: dict[str, str] = {}
    for index, point in enumerate(request.points):
        wanted = {x: path for x, path in find_candidates(point).items() if x in request.remove}
        reasons = {path: request.explain_obstacle(index, path) for path in wanted.values()}
        kept |= {path: why for path, why in reasons.items() if why}
        free = {letter: path for letter, path in wanted.items() if path not in kept}
        if len(free) > 1:
            names = " and ".join(letter.upper() for letter in free)
            raise _make_refusal(
                request,
                f"{names} meet at one point of this model, where only one matrix can go (block "
                f"{request.args.block}, skip {request.args.skip}): "
                f"--remove {' or --remove '.join(free)}",
            )
        if free:
            (eliminated[index],) = free.values()
    return eliminated, kept


def _refuse_absent_letters(
    request: Request, eliminated: Mapping[int, str], kept: Mapping[str, str]
) -> None:
    """Refuse a letter of which nothing can go."""
    for letter in request.remove:
        if any(parse_letter(path) == letter for path in eliminated.values()):
            continue
        reasons = (why for path, why in kept.items() if parse_letter(path) == letter)
        why = next(reasons, "it is gone already")
        raise _make_refusal(
            request, f"{letter.upper()} cannot go, {why}: {_find_way_out(request.args)}"
        )


def _find_way_out(args: ModelArgs) -> str:
    if find_removable(args):
        return suggest_removals(args)
    helps = say_what_else_helps(args)
    if can_be_skipless(args):
        return f"{helps}; --skipless makes its skipless network, which needs training"
    return helps


def _refuse_singular(request: Request, eliminated: Mapping[int, str]) -> None:
    for path in eliminated.values():
        measured = request.find_conditioning(path)
        if measured is not None and not measured.condition < HOPELESS:
            raise _make_refusal(
                request,
                f"{_name(path)} is singular (condition number {measured.condition:.1e}) and has "
                "no inverse: --remove auto takes what can go",
            )


def _make_refusal(request: Request, why: str) -> UserError:
    return UserError(f"--remove {request.remove}: {why}")


def _choose_by_noise(request: Request) -> tuple[dict[int, str], list[str]]:
    """`auto`: at each point choose the matrix whose removal saves weights at the least noise."""
    eliminated: dict[int, str] = {}
    notes: list[str] = []
    too_noisy: dict[str, list[int]] = {}
    for index, point in enumerate(request.points):
        if point.pinned or _is_taken(request, index, eliminated):
            continue
        free = _find_free(request, index)
        if not free:
            continue
        if len(free) == 1:
            ((letter, path),) = free.items()
            if needs_no_inverse(request.args, request.points, index, path):  # and makes no noise
                if letter == "q" or count_saved_by_p(request.args) > 0:
                    eliminated[index] = path
                continue
        noise = {letter: _estimate_noise(request, index, path) for letter, path in free.items()}
        # In the order q, k, v, p, unless another is clearly better conditioned.
        best = next(letter for letter in noise if noise[letter] <= 4 * min(noise.values()))
        path = free[best]
        cost = request.costs.get(path)
        if cost is not None and not cost.pays:
            notes.append(_explain_cost(request.args, path, cost))
        elif noise[best] <= NOISE_LIMIT:
            eliminated[index] = path
        else:
            too_noisy.setdefault(best, []).append(parse_layer(path))
    notes += [_explain_noise(request, letter, layers) for letter, layers in too_noisy.items()]
    return eliminated, [*notes, *_explain_auto(request, eliminated, bool(notes))]


def _is_taken(request: Request, index: int, eliminated: Mapping[int, str]) -> bool:
    """Whether a point has a basis already: by a tied embedding, or by a table of what reads it."""
    tied = request.args.tie_word_embeddings and index == request.last and 0 in eliminated
    return tied or (request.precompute and index == 0)


def _find_free(request: Request, index: int) -> dict[str, str]:
    """Find the candidates at a point that nothing keeps from becoming the identity."""
    return {
        letter: path
        for letter, path in find_candidates(request.points[index]).items()
        if explain_shape(request.args, letter) is None and not request.explain_obstacle(index, path)
    }


def _estimate_noise(request: Request, index: int, path: str) -> float:
    """Estimate the noise of removing the matrix at a path, relative to a projection's output."""
    measured = request.find_conditioning(path) or Conditioning(1, 1)
    if not measured.condition < HOPELESS:
        return math.inf
    if not request.quantized:
        return measured.amplification * UNIT_ROUNDOFF[request.dtype]
    # What reads the point is fitted again to the text, but nothing fits a tied embedding.
    tied = is_tied_end(request.args, request.points, index)
    return math.inf if tied and measured.extra_bits else 0


def _explain_cost(args: ModelArgs, path: str, cost: RemovalCost) -> str:
    return (
        f"{_name(path)} stays: quantized without it the model would be {cost.removed:.2g} nats per "
        f"token from its source by this alone, with it {cost.rounded:.2g} "
        f"(--remove {name_all_with(args, parse_letter(path))} insists)"
    )


def _explain_noise(request: Request, letter: str, layers: list[int]) -> str:
    why = (
        "the tied embedding would need more bits than it saves"
        if request.quantized
        else f"their inverses magnify the rounding of {dtype_name(request.dtype)} too much"
    )
    return (
        f"{letter.upper()} of layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} "
        f"stays: {why} (--remove {name_all_with(request.args, letter)} insists)"
    )


def _explain_auto(request: Request, eliminated: Mapping[int, str], noted: bool) -> list[str]:
    """Explain on what little `auto` decided, or why it removes nothing that no note explains."""
    args = request.args
    inverted = any(
        not needs_no_inverse(args, request.points, index, path)
        for index, path in eliminated.items()
    )
    if inverted and request.conditioning is None:
        return ["chosen by arithmetic alone: no weights at hand to measure conditioning on"]
    if not eliminated and args.norm == "pre":
        what = "norms on its stream" if args.skip == "none" else "skips and norms"
        return [f"no exact removal of Q or P exists for a model with {what}"]
    if not eliminated and not noted and (shape := explain_shape(args, "q")):
        saves = count_saved_by_p(args) > 0
        wider = "" if saves else "; without P the FFN would read wider heads"
        return [f"nothing that saves weights can go: {shape}{wider}"]
    return []


def _name(path: str) -> str:
    return f"{parse_letter(path).upper()} of layer {parse_layer(path)}"
