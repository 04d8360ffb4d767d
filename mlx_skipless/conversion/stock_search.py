"""Makes the best result for a target: bits by matrix, and sub-layers that go where that pays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import UserError
from ..inference.sizes import count_bytes_read, find_shares_read
from ..memory import weight_bytes
from ..network.parts import tensors_of
from ..network.stock import StandIns, StockNetwork
from ..progress import Progress
from ..quantization.bits import Raises
from ..quantization.sensitivity import CHOOSING_TOKENS, DROP, REPLACE, Choice, measure_distances
from ..quantization.together import Found, Frontier, Part, Search, Sublayer, Target, Trust
from ..removal.standins import fit_alone
from ..text.samples import Passages
from .check import Verification, compare_networks
from .decisions import find_limit, search_bits
from .stock import StockJob, find_ways, settle
from .stock_quantization import measure_mixtures, open_dense

ROUNDS = 3  # results that are made and measured, at most, before the best of them is taken
# What one result can tell of others: little losses say nothing of large ones.
MOST_OFF, TINY = 2.0, 1e-12
Attempt = Callable[[StockJob], Verification | None]


def reach_target(
    job: StockJob,
    network: StockNetwork,
    passages: Passages,
    attempt: Attempt,
    treat: Callable[[StockJob], StockJob],
    progress: Progress,
) -> tuple[StockJob, Verification | None]:
    """Choose what a target asks for, and write it.

    Args:
        job: with all sub-layers that no flag takes out.
        network: the source's.
        passages: the text to choose on.
        attempt: writes a job's result and checks it.
        treat: trains a job's result, before it is rounded, if that is asked for.
        progress: called with (stage, done, total).

    Returns:
        The job, all decided, whose result was written last, and the check of that.

    Raises:
        UserError: if the target is out of reach.
    """
    assert passages.calibration is not None
    if job.options.allowed:
        return _Rounds(job, network, passages, attempt, treat, progress).run()
    job = treat(job)
    raises = measure_mixtures(job, network, passages.calibration, progress)
    return _choose_bits(job, raises, attempt)


def _choose_bits(
    job: StockJob, raises: Raises, attempt: Attempt, always: float = 0.0
) -> tuple[StockJob, Verification | None]:
    """Write the best mixture of bits; ``always`` is the KL that no bits make up for."""
    limit = find_limit(job.options, lambda: job.bytes_read)
    if limit is None:
        return search_bits(job, raises.mixtures(), attempt, always)
    mixtures = raises.mixtures(limit, job.options.target_speed)
    job = job.learn(bits=mixtures[-1].bits)
    return job, attempt(job)


@dataclass(frozen=True)
class _Result:
    """A result that was made.

    Attributes:
        job: all decided.
        outcome: of its check, if there was one.
        nbytes: that its weights take, or a token reads.
        trust: what it tells of how far measured figures can be trusted.
    """

    job: StockJob
    outcome: Verification | None
    nbytes: int
    trust: Trust

    def rank(self) -> tuple[float, float]:
        """What is best among results for one target: the smallest, then the closest."""
        kl = 0.0 if self.outcome is None else self.outcome.kl
        return (kl, 0.0) if self.job.options.target_kl is None else (self.nbytes, kl)


class _Rounds:
    """Makes results, and corrects by each what is expected of the next.

    Arguments are those of ``reach_target``.
    """

    def __init__(
        self,
        job: StockJob,
        network: StockNetwork,
        passages: Passages,
        attempt: Attempt,
        treat: Callable[[StockJob], StockJob],
        progress: Progress,
    ):
        self._job, self._network, self._passages = job, network, passages
        self._attempt, self._treat, self._progress = attempt, treat, progress

    def run(self) -> tuple[StockJob, Verification | None]:
        """Make results until one is what is chosen by what is known of them; keep the best.

        Where they are trained there is one: what training makes of others is not known.
        """
        job = self._job
        raises = measure_mixtures(job, self._network, self._text, self._progress)
        search = open_search(job, self._network, raises, self._text, self._progress)
        target = Target(find_limit(job.options, lambda: job.bytes_read), job.options.target_kl)
        trust = Trust()
        paths: list[list[Choice]] = []
        made: dict[frozenset[Any], _Result | None] = {}
        while len(made) < ROUNDS:
            paths.append(search.choose(target, trust))
            choice = paths[-1][-1]
            if (key := frozenset(choice.items())) in made:
                break
            try:
                result = self._make(choice, raises, search.find_distance(choice), trust)
                made[key], trust = result, result.trust
            except UserError:
                if not choice or target.kl is None:
                    raise
                made[key], trust = None, Trust(2 * trust.lost, trust.rounded)
            if not job.options.verify or (job.options.heal and made[key] is not None):
                break
        results = [one for one in made.values() if one is not None]
        *_, written = made.values()
        if not results:
            results = [written := self._make({}, raises, 0.0, trust)]
        best = min(results, key=_Result.rank)
        if best is not written:
            self._attempt(best.job)
        return best.job.learn(found=_describe(search, paths, best, results)), best.outcome

    @property
    def _text(self) -> mx.array:
        assert self._passages.calibration is not None
        return self._passages.calibration

    def _make(self, choice: Choice, raises: Raises, expected: float, trust: Trust) -> _Result:
        """Make a result without some sub-layers.

        Args:
            choice: what happens to which.
            raises: the mixtures of bits of the network with all of them.
            expected: the KL without them, before anything is rounded.
            trust: by what it was chosen.
        """
        network, lost = self._network, 0.0
        job = settle_choice(self._job, network, self._text, choice, self._progress)
        if choice:
            job = self._treat(job)
            raises = measure_mixtures(job, network, self._text, self._progress)
            if job.options.verify:
                lost = self._measure_dense(job)
        job, outcome = _choose_bits(job, raises, self._attempt, lost)
        result, _ = job.build_result(network)
        by_speed = job.options.target_speed is not None
        nbytes = count_bytes_read(result) if by_speed else weight_bytes(result)
        if outcome is None:
            return _Result(job, outcome, nbytes, trust)
        cost = find_cost(raises, job.bits)
        share = lost / expected if expected > 0 else trust.lost
        share = min(max(share, 1 / MOST_OFF), MOST_OFF)
        # Fits make up for a part of both: how much of which, one figure does not tell.
        off = outcome.kl / max(lost + trust.rounded * cost, TINY)
        return _Result(job, outcome, nbytes, Trust(share * min(off, 1.0), trust.rounded * off))

    def _measure_dense(self, job: StockJob) -> float:
        """The KL of a result before it is rounded, on the text of the check."""
        dense, tell = open_dense(job, self._network), partial(self._progress, "comparing")
        text = self._passages
        (found,) = compare_networks(self._network, [dense], text.check, text.origin, tell)
        return found.kl


def find_cost(raises: Raises, chosen: Mapping[str, int]) -> float:
    """What rounding matrices to chosen bits costs, to nearest and one at a time."""
    most = 2**raises.measured_bits - 1
    return sum(raises.costs[path] * (most / (2**bits - 1)) ** 2 for path, bits in chosen.items())


def settle_choice(
    job: StockJob, network: StockNetwork, tokens: mx.array, choice: Choice, progress: Progress
) -> StockJob:
    """Do to a job's sub-layers what was chosen."""
    ways: dict[str, dict[str, list[int]]] = {DROP: {}, REPLACE: {}}
    for (kind, layer), way in sorted(choice.items()):
        ways[way].setdefault(kind, []).append(layer)
    return settle(job, network, tokens, ways[DROP], ways[REPLACE], progress)


def open_search(
    job: StockJob, network: StockNetwork, raises: Raises, tokens: mx.array, progress: Progress
) -> Search:
    """Measure on a text what each sub-layer is good for.

    Stand-ins are fitted to most of the text, and judged on the rest as drops are.

    Args:
        job: with all sub-layers.
        network: the source's.
        raises: the mixtures of bits of the network with all of them.
        tokens: (sequences, length) of text.
        progress: called with (stage, done, total).
    """
    ways = find_ways(job.options, network)
    wanted: dict[str, list[int]] = {}
    for (kind, layer), there in ways.items():
        if REPLACE in there:
            wanted.setdefault(kind, []).append(layer)
    rows = max(1, CHOOSING_TOKENS // tokens.shape[1])
    step = max(2, tokens.shape[0] // rows)
    fitted = [row for row in range(tokens.shape[0]) if row % step] or [0]
    stand_ins: StandIns = {}
    if wanted:
        tell = partial(progress, "fitting alone")
        fits = fit_alone(network, tokens[mx.array(fitted)], wanted, tell)
        stand_ins = {which: fit.linear for which, fit in fits.items()}
    most = len(network.paths) - 1
    search = Search(
        _make_frontier(job, network, raises, stand_ins),
        ways,
        {"attention": most, "ffn": most},
        lambda choices: measure_distances(
            network, tokens[::step], choices, stand_ins, partial(progress, "measuring sub-layers")
        ),
    )
    search.begin()
    return search


def _make_frontier(
    job: StockJob, network: StockNetwork, raises: Raises, stand_ins: StandIns
) -> Frontier:
    """Count what each sub-layer and each stand-in holds.

    A stand-in is taken to mind rounding as the matrix of its sub-layer does that minds it most.
    """
    model, _ = job.build_result(network)
    modules: dict[str, Any] = dict(model.named_modules())
    shares = find_shares_read(model) if job.options.target_speed is not None else {}
    assert job.options.quantization is not None
    group = job.options.quantization.usual_group_size
    parts: dict[Sublayer, Part] = {}
    weights, costs = dict(raises.weights), dict(raises.costs)
    scales, floors = dict(raises.scale_bytes), dict(raises.floors)
    for layer, own in enumerate(network.sublayers):
        for kind, paths in own.parts.items():
            starts = tuple(f"{network.paths[layer]}.{path}." for path in paths)
            there = tuple(path for path in raises.weights if path.startswith(starts))
            free = (modules[p].weight.nbytes * shares.get(p, 1.0) + scales[p] for p in there)
            rest = _count_bytes(model, starts, shares) - sum(free)
            name, more = None, 0.0
            if (linear := stand_ins.get((kind, layer))) is not None:
                size, width = linear.weight.size, linear.bias.size
                more = float(width * job.dtype.size)
                if width % group:
                    more += size * job.dtype.size
                else:
                    name = f"{kind} {layer}"
                    weights[name], scales[name] = size, 2 * size // group * job.dtype.size
                    costs[name] = max((costs[p] for p in there), default=0.0)
                    floors[name] = min((floors.get(p, 0) for p in there), default=0)
            parts[kind, layer] = Part(there, rest, name, more)
    whole = Raises(weights, costs, raises.measured_bits, scales, raises.rest, floors)
    return Frontier(whole, parts)


def _count_bytes(model: nn.Module, starts: tuple[str, ...], shares: Mapping[str, float]) -> float:
    """The bytes of the modules under some paths, of which shares may count alone."""
    return sum(
        array.nbytes * shares.get(name.rpartition(".")[0], 1.0)
        for name, array in tensors_of(model).items()
        if name.startswith(starts)
    )


def _describe(
    search: Search, paths: list[list[Choice]], best: _Result, results: list[_Result]
) -> Found:
    """Tell what was found, and why."""
    job, trust = best.job, best.trust
    choice = {(kind, n): DROP for kind, layers in job.dropped.items() for n in layers}
    choice |= dict.fromkeys(job.stand_ins, REPLACE)
    curves = {
        "bits alone, expected": search.draw([{}], trust),
        "bits and sub-layers, expected": search.draw([c for path in paths for c in path], trust),
    }
    tried = [(float(one.nbytes), one.outcome.kl) for one in results if one.outcome is not None]
    return Found(search.explain(choice, best.nbytes, trust), curves, tried)
