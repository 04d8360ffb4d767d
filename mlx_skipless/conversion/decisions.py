"""Decisions that need text: which removals pay, and how many bits each matrix gets."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from ..network.driver import StreamedNetwork
from ..network.names import EMBEDDING, HEAD
from ..network.wiring import find_points
from ..progress import Progress
from ..quantization import bits as budget
from ..quantization import sensitivity
from ..removal import sublayers, table
from ..removal.merger import Merger
from ..removal.plan import Plan, find_mixed, isolate_removal
from .check import Verification
from .job import Job


@dataclass(frozen=True)
class Goal:
    """What a mixture of bits shall keep: a size in bytes or a KL in nats per token."""

    nbytes: int | None
    kl: float | None


@dataclass(frozen=True)
class Drops:
    """Sub-layers to drop; see ``drop.choose``."""

    wishes: tuple[sublayers.Wish, ...]
    greedy: bool
    max_loss: float


def choose_sublayers(job: Job, drops: Drops, tokens: mx.array, progress: Progress) -> Job:
    """The job without the sub-layers that matter least on the text."""
    layers, path = sublayers.choose_drops(
        StreamedNetwork(job.plan.before, job.source_parts()),
        tokens,
        drops.wishes,
        greedy=drops.greedy,
        max_loss=drops.max_loss,
        spared=table.find_needed(job.plan.before) if job.plan.table else None,
        progress=lambda done, total: progress("dropping", done, total),
    )
    job = replace(job, dropped=layers).replanned()
    if path:
        steps = ", ".join(map(str, path))
        note = f"loss on the text, nats per token, whole and after each drop: {steps}"
        job = replace(job, plan=replace(job.plan, notes=(*job.plan.notes, note)))
    return job


def find_inverses(plan: Plan) -> dict[int, list[str]]:
    """By point, the matrices whose values a removal mixes through an inverse."""
    found = find_points(plan.before)
    around = {
        index: find_mixed(plan.before, found, index, where)
        for index, where in plan.eliminated.items()
    }
    return {index: matrices for index, matrices in around.items() if matrices}


def choose_removals(job: Job, tokens: mx.array, progress: Progress) -> Job:
    """The job with its plan made again from what each removal costs, measured on the text."""
    if job.options["remove"] != "auto":
        return job
    trials, plan = [], job.plan
    for index, around in find_inverses(plan).items():
        if HEAD in around or (EMBEDDING in around and plan.before.tie_word_embeddings):
            continue  # what the head reads is no stream that later layers could bring back
        single = isolate_removal(plan, index)
        trials.append(
            sensitivity.Trial(
                plan.eliminated[index],
                tuple(around),
                Merger(job.checkpoint, single, job.layout.dtype),
                replace(job.layout, args=single.after),
            )
        )
    if not trials:
        return job
    costs = sensitivity.measure_removals(
        StreamedNetwork(plan.before, job.source_parts()),
        trials,
        job.unremoved().format_of,
        tokens,
        lambda done, total: progress("measuring removals", done, total),
    )
    return replace(job, costs=costs).replanned()


def choose_bits(
    goal: Goal,
    job: Job,
    tokens: mx.array,
    attempt: Callable[[Job], Verification | None],
    progress: Progress,
) -> tuple[Job, Verification | None]:
    """Choose bits for a goal by the text; ``attempt`` writes the result and checks it."""
    assert job.layout.quantization is not None
    unremoved = job.unremoved()
    free = [where for where in job.layout.free if unremoved.format_of(where) is not None]
    costs = sensitivity.measure_rounding(
        StreamedNetwork(job.plan.before, job.source_parts()),
        free,
        unremoved.format_of,
        tokens,
        lambda done, total: progress("measuring matrices", done, total),
    )
    raises = budget.Raises(
        {where: job.layout.weights[f"{where}.weight"] for where in free},
        costs,
        job.layout.quantization.usual_bits,
        {where: job.layout.scale_bytes(where) for where in free},
        job.layout.nbytes() - sum(job.layout.nbytes(f"{where}.") for where in free),
    )

    quantization = job.layout.quantization

    def with_bits(mixture: budget.Mixture) -> Job:
        mixed = replace(quantization, own=mixture.bits)
        counts = sorted(Counter(mixture.bits.values()).items())
        note = "bits chosen by what rounding each matrix costs: " + ", ".join(
            f"{bits} in {count} matri{'x' if count == 1 else 'ces'}" for bits, count in counts
        )
        plan = replace(job.plan, notes=(*job.plan.notes, note))
        return replace(job, plan=plan, layout=replace(job.layout, quantization=mixed))

    if goal.nbytes is not None:
        job = with_bits(raises.mixtures(goal.nbytes)[-1])
        return job, attempt(job)

    checks: dict[int, Verification] = {}

    def measure(mixture: budget.Mixture) -> float:
        outcome = attempt(with_bits(mixture))
        assert outcome is not None
        checks[mixture.nbytes] = outcome
        return outcome.kl

    assert goal.kl is not None
    chosen, written = budget.find_smallest(raises.mixtures(), goal.kl, measure)
    if not written:
        measure(chosen)
    return with_bits(chosen), checks[chosen.nbytes]
