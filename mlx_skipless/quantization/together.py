"""Bits and sub-layers chosen together: what of a network costs least for the bytes that it saves.

A sub-layer can stay, at bits that cost something, it can go, or a matrix can stand in for it. All
of that is measured in one currency, KL in nats per token, and adds up well enough to choose by. So
a sub-layer goes where that costs less than what its bytes save as bits of the other matrices.

Losses of sub-layers add up less well than noise does. So the KL of those that go together is
measured, after each one that is chosen.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .bits import FIRST_GUESS, Raises
from .sensitivity import REPLACE, Choice

Sublayer = tuple[str, int]  # "attention" or "ffn", and its layer
# Gives the KL of the network with each choice, before anything is rounded.
Measure = Callable[[Sequence[Choice]], Sequence[float]]

SHORTLIST = 8  # choices that are measured at once
CURVE_POINTS = 24


@dataclass(frozen=True)
class Part:
    """What a sub-layer holds, and what stands in for it.

    Attributes:
        matrices: those whose bits are free, by their names in ``Raises``.
        rest: bytes of all else in it.
        stand_in: the matrix that stands in for it, by its name in ``Raises``; None: none can.
        stand_in_rest: bytes of all else in that.
    """

    matrices: tuple[str, ...]
    rest: float
    stand_in: str | None = None
    stand_in_rest: float = 0.0


@dataclass(frozen=True)
class Target:
    """What is asked for: the least KL within bytes, or the fewest bytes within a KL."""

    nbytes: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Trust:
    """What measured figures are multiplied by, to be those of a result.

    Attributes:
        lost: KL of lost sub-layers.
        rounded: KL of matrices rounded to nearest, one at a time.
    """

    lost: float = 1.0
    rounded: float = FIRST_GUESS


class Frontier:
    """The mixtures of bits of a network that has lost sub-layers, by a choice of these.

    Args:
        raises: of all matrices, stand-ins included.
        parts: by sub-layer.
    """

    def __init__(self, raises: Raises, parts: Mapping[Sublayer, Part]):
        self._raises, self.parts, self.costs = raises, parts, raises.costs
        self._numbers = {name: i for i, name in enumerate(raises.weights)}
        steps = [(self._numbers[name], gain, more) for name, _, gain, more in raises.steps]
        which, gains, more = zip(*steps, strict=True) if steps else ((), (), ())
        self._which = np.array(which, dtype=int)
        self._gains, self._more = np.array(gains, float), np.array(more, float)
        least = [raises.least[name] for name in self._numbers]
        self._least_bytes, self._least_costs = np.array(least, float).reshape(-1, 2).T

    def mix(self, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of all mixtures, ascending, and what rounding costs in each."""
        there, rest = np.ones(len(self._numbers), bool), float(self._raises.rest)
        for which, part in self.parts.items():
            way = choice.get(which)
            if part.stand_in is not None:
                there[self._numbers[part.stand_in]] = way == REPLACE
            if way is not None:
                there[[self._numbers[name] for name in part.matrices]] = False
                rest += (part.stand_in_rest if way == REPLACE else 0.0) - part.rest
        use = there[self._which]
        nbytes = rest + self._least_bytes[there].sum() + np.cumsum([0.0, *self._more[use]])
        costs = self._least_costs[there].sum() - np.cumsum([0.0, *self._gains[use]])
        return nbytes, np.maximum(costs, 0.0)


@dataclass(frozen=True)
class Reason:
    """Why a sub-layer stays or goes.

    Attributes:
        way: "drop", "replace" or None.
        lost: what each way adds to the KL, by the way; alone, or behind those that went before.
        saved: what the bytes that it frees take off the KL as bits of other matrices, by the way.
        rounded: what rounding its matrices costs at the bits that all were measured at.
    """

    way: str | None
    lost: Mapping[str, float]
    saved: Mapping[str, float]
    rounded: float


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        reasons: why each sub-layer stays or goes.
        curves: bytes and KL of what could be had, as it was expected, by name.
        tried: bytes and KL of the results that were made and measured.
    """

    reasons: Mapping[Sublayer, Reason]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    tried: Sequence[tuple[float, float]]

    def list_curves(self) -> dict[str, list[tuple[float, float]]]:
        """All curves, "tried" among them."""
        return {name: [*curve] for name, curve in {**self.curves, "tried": self.tried}.items()}


@dataclass
class Search:
    """Chooses greedily which sub-layers go; what was measured is kept.

    Args:
        frontier: what the mixtures of bits cost.
        ways: what can be done to each sub-layer.
        most: how many of each kind can go, by the kind.
        measure: measures choices.
    """

    frontier: Frontier
    ways: Mapping[Sublayer, Sequence[str]]
    most: Mapping[str, int]
    measure: Measure
    _known: dict[frozenset[tuple[Sublayer, str]], float] = field(default_factory=dict)
    _added: dict[tuple[Sublayer, str], float] = field(default_factory=dict)  # at last
    _least: dict[tuple[Sublayer, str], float] = field(default_factory=dict)

    def begin(self) -> None:
        """Measure each way of each sub-layer alone."""
        alone = [{which: way} for which, ways in self.ways.items() for way in ways]
        self._measure(alone)

    def choose(self, target: Target, trust: Trust) -> list[Choice]:
        """Choose what goes; return the choice after each step, the first one empty."""
        path: list[Choice] = [{}]
        while True:
            better = self._list_better(path[-1], target, trust)
            if not better:
                return path
            unknown = [move for move in better if _key(move) not in self._known]
            if _key(better[0]) in self._known:
                path.append(better[0])
            else:
                self._measure(unknown[:SHORTLIST])

    def find_distance(self, choice: Choice) -> float:
        """Return the KL of a choice before anything is rounded, or what it is at least.

        That takes the least that each way has added so far: what is lost together costs more.
        """
        if not choice:
            return 0.0
        if (known := self._known.get(_key(choice))) is not None:
            return known
        *before, last = choice.items()
        return self.find_distance(dict(before)) + self._least[last]

    def explain(self, choice: Choice, nbytes: float, trust: Trust) -> dict[Sublayer, Reason]:
        """Say of each sub-layer what its ways cost and save in a result of some bytes."""
        found = {}
        for which, ways in self.ways.items():
            whole = {other: way for other, way in choice.items() if other != which}
            stays = self._price(whole, nbytes, trust)
            lost = {way: trust.lost * max(self._added[which, way], 0.0) for way in ways}
            saved = {way: stays - self._price(whole | {which: way}, nbytes, trust) for way in ways}
            costs = self.frontier.costs
            rounded = sum(costs[name] for name in self.frontier.parts[which].matrices)
            found[which] = Reason(choice.get(which), lost, saved, trust.rounded * rounded)
        return found

    def draw(self, path: Sequence[Choice], trust: Trust) -> list[tuple[float, float]]:
        """The curve of bytes and KL of the best mixture of any choice on a path."""
        mixes = [(self.find_distance(choice), *self.frontier.mix(choice)) for choice in path]
        low = min(nbytes[0] for _, nbytes, _ in mixes)
        high = max(nbytes[-1] for _, nbytes, _ in mixes)
        points = np.geomspace(low, high, CURVE_POINTS)
        points[-1] = high  # which rounding may have moved
        curve = []
        for point in points:
            kls = (
                trust.lost * distance + trust.rounded * costs[_last_within(nbytes, point)]
                for distance, nbytes, costs in mixes
                if nbytes[0] <= point * (1 + 1e-9)
            )
            curve.append((float(point), float(min(kls, default=math.nan))))
        return curve

    def _price(self, choice: Choice, nbytes: float, trust: Trust) -> float:
        """What rounding costs in the best mixture of some bytes, or in the smallest."""
        there, costs = self.frontier.mix(choice)
        return trust.rounded * float(costs[_last_within(there, nbytes)])

    def _score(self, choice: Choice, target: Target, trust: Trust) -> tuple[bool, float]:
        """How far a choice is from the target (True) or, where it is reached, from the best."""
        nbytes, costs = self.frontier.mix(choice)
        kls = trust.lost * max(self.find_distance(choice), 0.0) + trust.rounded * costs
        if target.nbytes is not None:
            if nbytes[0] > target.nbytes:
                return True, float(nbytes[0])
            return False, float(kls[_last_within(nbytes, target.nbytes)])
        assert target.kl is not None
        if kls[-1] > target.kl:
            return True, float(kls[-1])
        return False, float(nbytes[np.argmax(kls <= target.kl)])

    def _list_better(self, now: Choice, target: Target, trust: Trust) -> list[Choice]:
        """The choices one move away that are better than another, as far as known, best first.

        Where a size is out of reach those are best that cost least for each byte.
        """
        present = self._score(now, target, trust)
        scores = [(self._score(move, target, trust), move) for move in self._list_moves(now)]
        better = [one for one in scores if one[0] < present]
        if target.nbytes is None or not present[0]:
            return [move for _, move in sorted(better, key=lambda one: one[0])]

        def find_smallest(choice: Choice) -> tuple[float, float]:
            nbytes, costs = self.frontier.mix(choice)
            kl = trust.lost * self.find_distance(choice) + trust.rounded * float(costs[0])
            return float(nbytes[0]), kl

        size, kl = find_smallest(now)
        smallest = [(*find_smallest(move), move) for _, move in better]
        prices = [((after - kl) / (size - less), move) for less, after, move in smallest]
        return [move for _, move in sorted(prices, key=lambda one: one[0])]

    def _list_moves(self, now: Choice) -> Iterator[Choice]:
        """The choices with one more sub-layer that goes, or goes in another way."""
        for which, ways in self.ways.items():
            kind, _ = which
            for way in ways:
                if now.get(which) == way:
                    continue
                others = {one: how for one, how in now.items() if one != which}
                alike = sum(one[0] == kind and how == way for one, how in others.items())
                if alike < self.most[kind]:
                    yield others | {which: way}

    def _measure(self, choices: Sequence[Choice]) -> None:
        """Measure choices that differ from another in their last sub-layer."""
        for choice, distance in zip(choices, self.measure(choices), strict=True):
            self._known[_key(choice)] = distance
            *before, last = choice.items()
            self._added[last] = added = distance - self.find_distance(dict(before))
            self._least[last] = min(added, self._least.get(last, added))


def _key(choice: Choice) -> frozenset[tuple[Sublayer, str]]:
    return frozenset(choice.items())


def _last_within(nbytes: np.ndarray, limit: float) -> int:
    """The last mixture of at most so many bytes, or the first of all."""
    return max(0, int(np.searchsorted(nbytes, limit * (1 + 1e-9), side="right")) - 1)
