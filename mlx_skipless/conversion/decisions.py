"""The third step of a conversion: what text decides.

On it are measured which sub-layers matter least, which removals pay, and what bits a matrix needs.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..inference.sizes import count_bytes_read, find_shares_read
from ..memory import weight_bytes
from ..network.names import EMBEDDING, HEAD
from ..progress import Progress
from ..quantization import bits, sensitivity
from ..quantization.coverage import describe_dense
from ..removal.merger import Merger
from ..removal.plan import isolate_removal
from ..removal.sublayers import choose_drops
from ..text.samples import Passages
from .check import Verification
from .job import Job, find_inverses
from .options import Options
from .planning import find_spared, list_wishes
from .stock import StockJob

AnyJob = TypeVar("AnyJob", Job, StockJob)


def decide(job: Job, passages: Passages | None, progress: Progress) -> Job:
    """Decide what depends on text.

    Args:
        job: as it was planned.
        passages: the text, without calibration tokens or None where nothing depends on it.
        progress: called with (stage, done, total).

    Returns:
        The job with what was measured. Bits for a KL are not chosen here, but in ``search_bits``.

    Raises:
        UserError: if a size is out of reach.
    """
    if passages is None or passages.calibration is None:
        return job
    tokens = passages.calibration
    if job.options.drops:
        job = _choose_sublayers(job, tokens, progress)
    if job.calibrated and job.options.remove == "auto":
        job = _choose_removals(job, tokens, progress)
    if (size := find_limit(job.options, lambda: job.source_bytes_read)) is not None:
        raises = measure_mixtures(job, tokens, progress)
        job = job.learn(bits=raises.mixtures(size, job.options.target_speed)[-1].bits)
    return job


def search_bits(
    job: AnyJob,
    mixtures: list[bits.Mixture],
    attempt: Callable[[AnyJob], Verification | None],
    always: float = 0.0,
) -> tuple[AnyJob, Verification]:
    """Search the smallest mixture of bits whose result is as close to its source as was asked for.

    Args:
        job: without bits of single matrices.
        mixtures: the ones to choose from, the smallest first.
        attempt: writes a job's result and checks it.
        always: the part of the KL that no bits make up for.

    Returns:
        The job with its bits, whose result was written last, and the check of that.

    Raises:
        UserError: if even the largest mixture is too far from the source.
    """
    limit = job.options.target_kl
    assert limit is not None
    checks: dict[int, Verification] = {}

    def measure(mixture: bits.Mixture) -> float:
        outcome = attempt(job.learn(bits=mixture.bits))
        assert outcome is not None  # the options see to it that the check runs
        checks[mixture.nbytes] = outcome
        return outcome.kl

    chosen, written = bits.find_smallest(mixtures, limit, measure, always)
    if not written:
        measure(chosen)
    return job.learn(bits=chosen.bits), checks[chosen.nbytes]


def describe_decisions(job: Job) -> Iterator[str]:
    """Tell what was measured on text, a sentence each."""
    if job.measured.path:
        steps = ", ".join(map(str, job.measured.path))
        yield f"loss on the text, nats per token, whole and after each step: {steps}"
    if (dense := describe_dense(job.layout)) is not None:
        yield dense
    yield from describe_bits(job.measured.bits)


def describe_bits(chosen: Mapping[str, int]) -> Iterator[str]:
    """Tell which bits were chosen for how many matrices, if any were."""
    if chosen:
        counts = sorted(Counter(chosen.values()).items())
        yield "bits chosen by what rounding each matrix costs: " + ", ".join(
            f"{width} in {count} matri{'x' if count == 1 else 'ces'}" for width, count in counts
        )


def _choose_sublayers(job: Job, tokens: mx.array, progress: Progress) -> Job:
    """Drop the sub-layers that matter least on the text."""
    args, options = job.plan.before, job.options
    dropped, path = choose_drops(
        job.source_network(),
        tokens,
        list_wishes(options.drops),
        greedy=options.greedy,
        max_loss=options.allowed_loss,
        spared=find_spared(args, job.plan.table),
        progress=lambda done, total: progress("dropping", done, total),
    )
    return job.learn(dropped=dropped, path=tuple(path))


def _choose_removals(job: Job, tokens: mx.array, progress: Progress) -> Job:
    """Measure what each removal costs on the text; the plan leaves in place what does not pay."""
    trials, plan = [], job.plan
    for index, around in find_inverses(plan).items():
        if HEAD in around or (EMBEDDING in around and plan.before.tie_word_embeddings):
            continue  # what the head reads is no stream that later layers could bring back
        single = isolate_removal(plan, index)
        trials.append(
            sensitivity.Trial(
                plan.eliminated[index],
                tuple(around),
                Merger(job.opened, single, job.dtype),
                replace(job.layout, args=single.after),
            )
        )
    if not trials:
        return job
    costs = sensitivity.measure_removals(
        job.source_network(),
        trials,
        job.whole_layout.format_of,
        tokens,
        lambda done, total: progress("measuring removals", done, total),
    )
    return job.learn(costs=costs)


def measure_mixtures(job: Job, tokens: mx.array, progress: Progress) -> bits.Raises:
    """Measure on the text what rounding each matrix costs, which orders the mixtures of bits.

    Raises:
        UserError: if a size is out of reach; before anything is measured.
    """
    check_size(job)
    costs = sensitivity.measure_rounding(
        job.source_network(),
        _list_free(job),
        job.whole_layout.format_of,
        tokens,
        lambda done, total: progress("measuring matrices", done, total),
    )
    return _order(job, costs)


def check_size(job: Job) -> None:
    """Check that few enough bits reach the size that is asked for, if one is.

    Removals that are still to be measured count as done.

    Raises:
        UserError: if it is out of reach.
    """
    if (size := find_limit(job.options, lambda: job.source_bytes_read)) is not None:
        _order(job, dict.fromkeys(_list_free(job), 0.0)).check_reach(size, job.options.target_speed)


def _list_free(job: Job) -> list[str]:
    """The matrices whose bits can be chosen."""
    whole = job.whole_layout
    return [path for path in job.layout.find_adjustable() if whole.format_of(path) is not None]


def _order(job: Job, costs: Mapping[str, float]) -> bits.Raises:
    layout, by_speed = job.layout, job.options.target_speed is not None
    assert layout.quantization is not None
    return make_raises(layout.network, costs, layout.quantization.usual_bits, by_speed=by_speed)


def make_raises(
    model: nn.Module,
    costs: Mapping[str, float],
    measured_bits: int,
    *,
    by_speed: bool,
    floors: Mapping[str, int] | None = None,
) -> bits.Raises:
    """Order the mixtures of bits of a quantized network.

    Args:
        model: the network, with lazy weights.
        costs: of rounding each matrix whose bits are free, by module path.
        measured_bits: to which they were rounded.
        by_speed: count the bytes that decoding a token reads instead of all.
        floors: the fewest bits of some matrices, by module path.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    shares = find_shares_read(model) if by_speed else {}
    weights, scales, taken = {}, {}, 0.0
    for path in costs:
        module, share = modules[path], shares.get(path, 1.0)
        own = [module[name].nbytes for name in ("scales", "biases") if name in module]
        scales[path] = math.ceil(sum(own) * share)
        count = module.weight.size * 32 // module.bits
        weights[path] = 8 * math.ceil(count * share / 8)
        taken += (module.weight.nbytes + sum(own)) * share
    total = count_bytes_read(model) if by_speed else weight_bytes(model)
    return bits.Raises(weights, costs, measured_bits, scales, math.ceil(total - taken), floors)


def find_limit(options: Options, count_read: Callable[[], int]) -> int | None:
    """The most bytes that a target allows; None: it is no size.

    Under ``--target-speed`` they are those that decoding a token reads, which ``count_read`` gives
    of the source.
    """
    if (speed := options.target_speed) is not None:
        return int(count_read() / speed)
    return options.target_bytes
