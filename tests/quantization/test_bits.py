"""Bits under a budget: sizes, mixtures against all others, the search for a limit."""

import itertools
import math

import numpy as np
import pytest

from mlx_skipless.errors import UserError
from mlx_skipless.options import parse_bytes
from mlx_skipless.quantization import bits as budget
from mlx_skipless.quantization.bits import BITS, Mixture, Raises


@pytest.mark.parametrize(
    ("text", "value"),
    [("900000", 900000), ("1.6MB", 1_600_000), ("4 GB", 4 * 10**9), ("12kb", 12000), ("7b", 7)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "0", "-3", "MB", "4TB", "1.6MBs", "nan", "1e6", "0.2"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"no size.*1\.6MB"):
        parse_bytes(text)


def some(
    seed: int, count: int = 4, floors: dict[str, int] | None = None
) -> tuple[dict[str, int], dict[str, float], Raises]:
    rng = np.random.default_rng(seed)
    names = [f"m{i}" for i in range(count)]
    weights = {name: int(rng.integers(1, 9)) * 64 for name in names}
    costs = {name: float(10 ** rng.uniform(-5, -2)) for name in names}
    scales = {name: count // 16 for name, count in weights.items()}
    return weights, costs, Raises(weights, costs, 4, scales, 1000, floors)


def measured(weights: dict[str, int], costs: dict[str, float], bits: dict) -> tuple[int, float]:
    """Bytes and cost of a mixture, from the definitions."""
    nbytes = 1000 + sum(n * bits[name] // 8 + n // 16 for name, n in weights.items())
    return nbytes, sum(c * (15 / (2 ** bits[name] - 1)) ** 2 for name, c in costs.items())


@pytest.mark.parametrize("floors", [{}, {"m1": 8, "m2": 4}], ids=["free", "floors"])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_mixture_of_these_bytes_costs_less(seed: int, floors: dict[str, int]) -> None:
    weights, costs, raises = some(seed, floors=floors)
    every = [dict(zip(weights, b, strict=True)) for b in itertools.product(BITS, repeat=4)]
    every = [bits for bits in every if all(bits[name] >= b for name, b in floors.items())]
    known = [measured(weights, costs, bits) for bits in every]
    found = raises.mixtures()
    assert found[0].bits == dict.fromkeys(weights, 2) | floors
    assert set(found[-1].bits.values()) == {8}
    for before, after in itertools.pairwise(found):
        assert before.nbytes < after.nbytes and before.cost > after.cost
    for mixture in found:
        nbytes, cost = measured(weights, costs, dict(mixture.bits))
        assert mixture.nbytes == nbytes and mixture.cost == pytest.approx(cost)
        assert cost <= min(c for n, c in known if n <= nbytes) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_limit_is_kept_and_used(seed: int) -> None:
    weights, costs, raises = some(seed, count=6)
    for limit in np.random.default_rng(seed).integers(1600, 5000, 20):
        if limit < raises.mixtures()[0].nbytes:
            with pytest.raises(UserError, match=f"--target-bytes {limit:,} is out of reach"):
                raises.mixtures(int(limit))
            continue
        chosen = raises.mixtures(int(limit))[-1]
        assert chosen.nbytes == measured(weights, costs, dict(chosen.bits))[0] <= limit
        # What is left would not raise any matrix that is not at its widest.
        for name, bits in chosen.bits.items():
            if bits < 8:
                wider = BITS[BITS.index(bits) + 1]
                assert chosen.nbytes + weights[name] * (wider - bits) // 8 > limit


def mixtures(costs: list[float]) -> list[Mixture]:
    return [Mixture({"m": i}, 1000 + 100 * i, cost) for i, cost in enumerate(costs)]


@pytest.mark.parametrize("seed", range(8))
def test_the_search_finds_the_smallest(seed: int) -> None:
    """Whatever the measured KL makes of the expected costs, as long as it falls too."""
    rng = np.random.default_rng(seed)
    costs = sorted(10 ** rng.uniform(-5, 0, 60), reverse=True)
    found = mixtures(costs)
    bend, share = rng.uniform(0.8, 1.2), 10 ** rng.uniform(-1.5, 0.5)
    kls = [share * cost**bend for cost in costs]
    limit = float(10 ** rng.uniform(math.log10(kls[-1]), math.log10(kls[0])))
    asked: list[int] = []

    def measure(mixture: Mixture) -> float:
        asked.append(mixture.bits["m"])
        return kls[asked[-1]]

    chosen, last = budget.find_smallest(found, limit, measure)
    index = chosen.bits["m"]
    smallest = next(i for i, kl in enumerate(kls) if kl <= limit)
    assert kls[index] <= limit and len(asked) <= budget.TRIES
    assert index == smallest or kls[index] >= 0.9 * limit or index - smallest <= 1
    assert last == (asked[-1] == index) and index in asked


def test_the_search_says_what_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"--target-kl 0\.01 is out of reach.*0\.5 nats"):
        budget.find_smallest(mixtures([1.0, 0.1, 0.001]), 0.01, lambda mixture: 0.5)


def test_the_search_stops_where_the_smallest_will_do() -> None:
    chosen, last = budget.find_smallest(mixtures([1e-3, 1e-4]), 1.0, lambda mixture: 1e-3)
    assert chosen.bits["m"] == 0 and last
