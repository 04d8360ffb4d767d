"""Bits and sub-layers chosen together: what the mixtures cost, and which choice is made."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from grids import only

from mlx_skipless.quantization.bits import Raises
from mlx_skipless.quantization.together import Frontier, Part, Search, Target, Trust

REST = 5000
WAYS = {(kind, n): ("drop", "replace") for n in range(3) for kind in ("attention", "ffn")}


class Case:
    """Random matrices, two a sub-layer and one outside, and what sub-layers cost."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.parts, self.weights, self.costs = {}, {"head": 640}, {"head": 1e-2}
        for kind, layer in WAYS:
            own = tuple(f"{kind} {layer} {name}" for name in "ab")
            stand_in = f"{kind} {layer} new"
            for name in (*own, stand_in):
                self.weights[name] = 64 * int(rng.integers(4, 12))
                self.costs[name] = float(10 ** rng.uniform(-4, -1.5))
            self.parts[kind, layer] = Part(own, float(rng.integers(50)), stand_in, 7.0)
        self.scales = {name: count // 16 for name, count in self.weights.items()}
        self.floors = {"attention 1 a": 4}
        names = [part.stand_in for part in self.parts.values()]
        rest = REST + sum(part.rest for part in self.parts.values())
        self.rest = int(rest)
        assert None not in names
        whole = Raises(self.weights, self.costs, 4, self.scales, self.rest, self.floors)
        self.frontier = Frontier(whole, self.parts)
        self.alone = {
            (which, way): float(10 ** rng.uniform(-4, -0.5)) * (1 if way == "drop" else 0.3)
            for which in WAYS
            for way in WAYS[which]
        }
        self.bend, self.measured = rng.uniform(0.0, 2.0), []

    def list_mixtures(self, choice: dict[Any, str]) -> list[tuple[int, float]]:
        """The bytes and costs of all mixtures, by those that make them without sub-layers."""
        there, rest = {"head"}, self.rest
        for which, part in self.parts.items():
            way = choice.get(which)
            there |= {*part.matrices} if way is None else set()
            there |= {part.stand_in} if way == "replace" else set()
            rest += 0 if way is None else int(7.0 * (way == "replace") - part.rest)
        picked = [{name: of[name] for name in there} for of in (self.weights, self.costs)]
        floors = {name: least for name, least in self.floors.items() if name in there}
        scales = {name: self.scales[name] for name in there}
        raises = Raises(*picked, 4, scales, rest, floors)
        return [(one.nbytes, one.cost) for one in raises.mixtures()]

    def measure(self, choices: Sequence[Any]) -> list[float]:
        """More than the sum of what each costs alone."""
        self.measured += [frozenset(choice.items()) for choice in choices]
        sums = [sum(self.alone[one] for one in choice.items()) for choice in choices]
        return [
            total * (1 + self.bend * (len(choice) - 1))
            for total, choice in zip(sums, choices, strict=True)
        ]

    def score(self, choice: dict[Any, str], target: Target, trust: Trust) -> float:
        """The KL within the bytes, or the bytes within the KL; infinite where there is none."""
        distance = trust.lost * self.measure([choice])[0] if choice else 0.0
        found = [
            (nbytes, distance + trust.rounded * cost) for nbytes, cost in self.list_mixtures(choice)
        ]
        if target.nbytes is not None:
            return min((kl for n, kl in found if n <= target.nbytes), default=np.inf)
        return min((n for n, kl in found if kl <= target.kl), default=np.inf)  # type: ignore[operator]

    def search(self, most: int = 3) -> Search:
        search = Search(
            self.frontier, WAYS, dict.fromkeys(("attention", "ffn"), most), self.measure
        )
        search.begin()
        return search


def draw_choice(rng: np.random.Generator) -> dict[Any, str]:
    drawn = {which: str(rng.choice(["stay", "drop", "replace"])) for which in WAYS}
    return {which: way for which, way in drawn.items() if way != "stay"}


@pytest.mark.parametrize("seed", only({0}, range(4)))
def test_mixtures_of_a_choice_are_those_of_the_network_without(seed: int) -> None:
    case, rng = Case(seed), np.random.default_rng(seed)
    for choice in ({}, *(draw_choice(rng) for _ in range(10))):
        nbytes, costs = case.frontier.mix(choice)
        wanted = case.list_mixtures(choice)
        np.testing.assert_array_equal(nbytes, [n for n, _ in wanted])
        np.testing.assert_allclose(costs, [cost for _, cost in wanted], atol=1e-9)


@pytest.mark.parametrize("trust", [Trust(), Trust(0.7, 1.0)], ids=["guess", "known"])
@pytest.mark.parametrize("seed", only({0}, range(6)))
def test_no_other_choice_one_move_away_is_better(seed: int, trust: Trust) -> None:
    """And it is better than bits alone; what is measured is measured once."""
    case = Case(seed)
    search = case.search()
    smallest, largest = case.list_mixtures({})[0][0], case.list_mixtures({})[-1][0]
    targets = [Target(nbytes=n) for n in np.linspace(smallest, largest, 4)]
    targets += [Target(kl=kl) for kl in (0.3, 0.05, 0.005)]
    went = 0
    for target in targets:
        path = search.choose(target, trust)
        asked = list(case.measured)
        best, bits_alone = (case.score(one, target, trust) for one in (path[-1], {}))
        assert path[0] == {} and best <= bits_alone
        for before, after in itertools.pairwise(path):
            assert len({*after.items()} - {*before.items()}) == 1
        for which, way in itertools.product(WAYS, ("drop", "replace")):
            assert case.score({**path[-1], which: way}, target, trust) >= best * (1 - 1e-9)
        case.measured[:] = asked
        went += bool(path[-1])
    assert went and len({*case.measured}) == len(case.measured)


@pytest.mark.parametrize("seed", only({0}, range(3)))
def test_a_size_below_two_bits_is_reached_by_what_goes(seed: int) -> None:
    """At the least cost for a byte, and no more of a kind goes than may."""
    case = Case(seed)
    smallest = case.list_mixtures({})[0][0]
    target = Target(nbytes=0.8 * smallest)
    path = case.search(most=2).choose(target, Trust())
    chosen = path[-1]
    assert case.list_mixtures(dict(chosen))[0][0] <= 0.8 * smallest

    def price(which: Any, way: str) -> float:
        (before, cost), (after, less) = (case.list_mixtures(c)[0] for c in ({}, {which: way}))
        return (case.alone[which, way] + 0.3 * (less - cost)) / (before - after)

    alone = [(w, way) for w in WAYS for way in WAYS[w]]
    alone = [one for one in alone if case.list_mixtures(dict([one]))[0][0] < smallest]
    assert path[1] == dict([min(alone, key=lambda one: price(*one))])
    for kind, way in itertools.product(("attention", "ffn"), ("drop", "replace")):
        assert sum(which[0] == kind and own == way for which, own in chosen.items()) <= 2
    free = case.list_mixtures(dict.fromkeys(WAYS, "drop"))[0][0]
    assert free < target.nbytes  # type: ignore[operator]
    stays = Search(case.frontier, WAYS, {"attention": 0, "ffn": 0}, case.measure)
    stays.begin()
    assert stays.choose(target, Trust()) == [{}]


@pytest.mark.parametrize("seed", only({0}, range(3)))
def test_reasons_are_what_a_choice_costs_and_saves(seed: int) -> None:
    case, trust = Case(seed), Trust(0.5, 0.25)
    search = case.search()
    limit = float(np.mean([n for n, _ in case.list_mixtures({})]))
    chosen = search.choose(Target(nbytes=limit), trust)[-1]
    reasons = search.explain(chosen, limit, trust)
    assert {which: one.way for which, one in reasons.items() if one.way} == chosen

    def price(choice: dict[Any, str]) -> float:
        found = case.list_mixtures(choice)
        return 0.25 * min((cost for n, cost in found if n <= limit), default=found[0][1])

    for which, reason in reasons.items():
        whole = {other: way for other, way in chosen.items() if other != which}
        for way in ("drop", "replace"):
            saved = price(whole) - price({**whole, which: way})
            assert reason.saved[way] == pytest.approx(saved, rel=1e-6, abs=1e-12)
        own = case.parts[which].matrices
        assert reason.rounded == pytest.approx(0.25 * sum(case.costs[name] for name in own))
    first = next(iter(chosen.items()))
    if len(chosen) == 1:
        assert reasons[first[0]].lost[first[1]] == pytest.approx(0.5 * case.alone[first])


def test_a_curve_is_the_best_of_all_choices() -> None:
    case, trust = Case(0), Trust()
    search = case.search()
    path = search.choose(Target(nbytes=case.list_mixtures({})[20][0]), trust)
    assert len(path) > 2
    curve = search.draw(path, trust)
    for nbytes, kl in curve:
        known = (case.score(dict(one), Target(nbytes=nbytes * (1 + 1e-9)), trust) for one in path)
        assert kl == pytest.approx(min(known))
    sizes, kls = zip(*curve, strict=True)
    assert [*sizes] == sorted(sizes) and [*kls] == sorted(kls, reverse=True)
    assert sizes[-1] == case.list_mixtures({})[-1][0]
