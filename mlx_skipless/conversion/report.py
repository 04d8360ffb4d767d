"""What a conversion did, in numbers."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..checkpoints.guarded import GuardedTokenizer
from ..network.driver import count_weights
from ..network.names import EMBEDDING, FINAL_NORM, HEAD
from ..network.parts import dtype_name
from ..network.wiring import LETTERS
from ..quantization.coverage import Packing, count_packings
from ..quantization.layout import Layout
from ..removal.choices import RemovalCost
from ..removal.products import UNIT_ROUNDOFF
from ..removal.sublayers import describe_wishes
from ..removal.table import FirstLayer, measure_table
from ..text.samples import Passages
from .check import Verification
from .decisions import describe_decisions
from .healing import Healing
from .job import Job
from .options import Options
from .planning import advise, list_wishes

NOTABLE_ERROR = 1e-3  # relative logit error; a well-conditioned merge in float32 stays below
ALARMING_KL = 0.02  # nats per token: what plain 4-bit quantization costs a small skipless model
STRANGE_KL = 0.2  # more than 16 bits cost a model that nothing was removed from
ALARMING_SHARE = 1 / 8  # of the largest number that a type holds: other text may go beyond
ALARMING_RATIO = 1.5  # of a quantized result's KL to that of quantization alone
SKIPLESS_WARNING = (
    "--skipless drops the skip connections that the weights were trained with: the result is NOT a "
    "language model until it is trained again. It shows the speed and size of one."
)


@dataclass(frozen=True)
class LayerRow:
    """One row of the plan: a layer, or the embedding, or the head.

    Attributes:
        name: "layers.0", "embed_tokens" or "lm_head".
        goes: what goes from it, in words: "Q P".
        weights_before, weights_after: how many it has.
        bytes_before, bytes_after: that they take.
        condition: the largest condition number of what goes, None where none was measured.
        cost: of removing its Q (K, V or P), where a quantized result was measured.
    """

    name: str
    goes: str
    weights_before: int
    weights_after: int
    bytes_before: int
    bytes_after: int
    condition: float | None
    cost: RemovalCost | None


@dataclass(frozen=True)
class ChoiceRow:
    """What a search for bits and sub-layers did with a sub-layer, and why.

    What a way costs is what it adds to the KL, in nats per token; what it saves is what the bytes
    that it frees take off the KL as bits of other matrices.

    Attributes:
        name: "layers.0 attention".
        choice: "stays", "dropped" or "replaced".
        bits: of its matrices, or of the one that stands in, the mean; None where none is packed.
        rounding: what rounding its matrices at the usual bits costs.
        drop_costs, drop_saves: of leaving it out; None where it cannot be.
        replacing_costs, replacing_saves: of a matrix in its place; None where none can be.
    """

    name: str
    choice: str
    bits: float | None
    rounding: float
    drop_costs: float | None
    drop_saves: float | None
    replacing_costs: float | None
    replacing_saves: float | None


@dataclass(frozen=True)
class Report:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        source: what the user called it.
        output: the folder that was written, None with ``dry_run``.
        packing: how the source is quantized, in words, None if it is not.
        kept_packed: whether what nothing touched stays packed as it was.
        dtype: of the result's weights that are not quantized.
        quantization: of the result, as its config.json has it, None if it is not quantized.
        packings: how many of the result's matrices have which format.
        bits_per_weight: of the result's weights, the mean, scales and biases included.
        params_before: weights of the network that the removals start from.
        params_after: weights of the result.
        bytes_before: of ``params_before`` as dense weights of the source's type.
        bytes_after: of the result as it is stored.
        removed: the layers without a part, by "q", "k", "v", "p", "attention" and "ffn".
        replaced: the layers for whose "attention" or "ffn" a matrix stands in.
        folded: the norms whose gains went into matrices.
        stock: whether the result runs in mlx-lm's own network, without ``model.py``.
        skipless: whether skips were dropped first, so that the result has to be trained again.
        speedup_from_bytes: bytes that decoding a token would read of the same network in the
            result's format without the removals, over those that it reads.
        first_layer: what a table of the first layer saves and costs, None without one.
        cache_bytes_before, cache_bytes_after: of KV cache, that a token takes.
        rows: of the plan, a part of the network each.
        notes: what else there is to know, a sentence each.
        advice: what would make the result smaller, a sentence each.
        warnings: what must not be overlooked, a sentence each.
        verification: how far the result is from its source, None where that was not checked.
        seconds: that all took.
        stages: seconds of each stage, in the order of their beginnings, and of "other" work; they
            add up to ``seconds``.
        peak_memory_bytes: the most that the process held.
        choices: why each sub-layer stays or goes, where a target was allowed to choose.
        curves: bytes and KL of what could be had, as expected, and of what was "tried".
        healed: what training did, None without it.
    """

    source: str
    output: str | None
    packing: str | None
    kept_packed: bool
    dtype: str
    quantization: dict[str, Any] | None
    packings: tuple[Packing, ...]
    bits_per_weight: float
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    removed: dict[str, list[int]]
    replaced: dict[str, list[int]]
    folded: tuple[str, ...]
    stock: bool
    skipless: bool
    speedup_from_bytes: float
    first_layer: FirstLayer | None
    cache_bytes_before: int
    cache_bytes_after: int
    rows: tuple[LayerRow, ...]
    notes: tuple[str, ...]
    advice: tuple[str, ...]
    warnings: tuple[str, ...]
    verification: Verification | None
    seconds: float
    stages: dict[str, float]
    peak_memory_bytes: int
    choices: tuple[ChoiceRow, ...] = ()
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    healed: Healing | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_report(job: Job) -> Report:
    """Report a conversion as far as it is decided, before its result is written."""
    plan, layout = job.plan, job.layout
    source = Layout(plan.before, job.checkpoint.dtype)
    same_format = replace(layout, args=plan.before)
    if (q := layout.quantization) is not None:
        same_format = replace(same_format, quantization=replace(q, bits=q.typical_bits))
    skipless = plan.before != job.checkpoint.args
    return Report(
        source=job.checkpoint.name,
        output=None,
        packing=job.checkpoint.packing,
        kept_packed=job.form.packed,
        dtype=dtype_name(layout.dtype),
        quantization=layout.config_entry,
        packings=count_packings(layout),
        bits_per_weight=8 * layout.nbytes() / layout.count(),
        params_before=source.count(),
        params_after=layout.count(),
        bytes_before=source.nbytes(),
        bytes_after=layout.nbytes(),
        removed={**plan.gone, **plan.dropped},
        replaced={},
        folded=plan.folded,
        stock=job.form.stock,
        skipless=skipless,
        speedup_from_bytes=same_format.bytes_per_token / layout.bytes_per_token,
        first_layer=measure_table(plan.merged) if plan.table else None,
        cache_bytes_before=same_format.cache_bytes_per_token,
        cache_bytes_after=layout.cache_bytes_per_token,
        rows=tuple(_make_rows(job, source)),
        notes=(*job.checkpoint.notes, *plan.notes, *job.form.notes, *describe_decisions(job)),
        advice=tuple(advise(job)),
        warnings=tuple(_warn_of_plan(job)),
        verification=None,
        seconds=0.0,
        stages={},
        peak_memory_bytes=0,
    )


def add_wishes(report: Report, job: Job) -> Report:
    """Add to a plan's report what shall be dropped and is not chosen yet."""
    if not job.options.drops:
        return report
    count = partial(count_weights, job.checkpoint.args)
    note = describe_wishes(count, list_wishes(job.options.drops))
    return replace(report, notes=(*report.notes, note))


def add_target(report: Report, options: Options) -> Report:
    """Add to a plan's report that the bits of a target are not chosen yet."""
    if not options.mixes_bits or options.allow:
        return report
    note = (
        "the bits of each matrix are measured when converting: sizes are those of the same bits in "
        f"all of them, not what {options.targets[0]} makes"
    )
    return replace(report, notes=(*report.notes, note))


def add_calibration(report: Report, passages: Passages) -> Report:
    """Add the text that a result was quantized against."""
    assert passages.calibration is not None
    note = f"quantized against {passages.calibration.size:,} tokens of text ({passages.origin})"
    return replace(report, notes=(*report.notes, note))


def add_healing(report: Report, healing: Healing | None) -> Report:
    """Add what training did, if there was some."""
    if healing is None:
        return report
    when = ", before its matrices were rounded" if report.quantization else ""
    when = ", after its matrices were rounded" if healing.rounded else when
    told = (
        f"trained towards the source for {healing.steps:,} steps on {healing.tokens:,} tokens"
        f"{when}: KL {healing.kl_before:.2e} before, {healing.kl_after:.2e} after"
    )
    if healing.kept:
        return replace(report, healed=healing, notes=(*report.notes, told))
    told = f"{told}, so the untrained weights stay"
    return replace(report, healed=healing, warnings=(*report.warnings, told))


def add_tokenizer(report: Report, tokenizer: GuardedTokenizer | None) -> Report:
    """Add what there is to know of a result's tokenizer, or that it has none."""
    if tokenizer is not None:
        notes, warnings = (*report.notes, *tokenizer.notes), tokenizer.warnings
        return replace(report, notes=notes, warnings=(*report.warnings, *warnings))
    note = "the source has no tokenizer, so the result has none: put one into its folder"
    return replace(report, notes=(*report.notes, note))


def add_check(report: Report, check: Verification, *, unchanged: bool = False) -> Report:
    """Add the outcome of the check, and a warning if that is bad.

    Args:
        report: without it.
        check: the outcome.
        unchanged: whether the result is a copy of its source.
    """
    notes, warnings = _judge_kl(report, check)
    if (wrong := explain_difference(check)) is not None:
        notes, warnings = [], [wrong]
    return replace(
        report,
        verification=check,
        notes=(*report.notes, *_explain_logit_error(report, check), *notes),
        warnings=(*report.warnings, *warnings, *_warn_of_overflow(check, unchanged)),
    )


def explain_difference(check: Verification) -> str | None:
    """Say that a result is not the function that its source is; None if it is."""
    if check.rounding_ratio is None or check.rounding_ratio <= 1:
        return None
    return (
        f"the result is not the same function as its source: its logits are off by up to "
        f"{check.max_rel_logit_error:.1e}, {check.rounding_ratio:,.0f} times what weights rounded "
        "a hundred times as coarsely as float32's explain. This is a fault of mlx-skipless: report "
        "this model"
    )


def _find_condition(report: Report) -> float:
    """The largest condition number of what went; 0 if none was measured."""
    return max((row.condition or 0 for row in report.rows), default=0)


def _explain_logit_error(report: Report, check: Verification) -> Iterator[str]:
    condition = _find_condition(report)
    if check.max_rel_logit_error > NOTABLE_ERROR and condition and not report.quantization:
        roundoff = UNIT_ROUNDOFF[getattr(mx, report.dtype)]
        magnified = min(condition * roundoff, 1)
        yield (
            f"inverses with condition numbers up to {condition:.1e} magnify {report.dtype}'s "
            f"rounding of {roundoff:.0e} to as much as {magnified:.0e} in a layer; the merge "
            "itself is exact"
        )


def _judge_kl(report: Report, check: Verification) -> tuple[list[str], list[str]]:
    """Notes and warnings about the KL between source and result."""
    if report.replaced or any(part in report.removed for part in ("attention", "ffn")):
        return [], []  # a drop is no rounding: its price is the perplexity that is reported
    if not check.kl > ALARMING_KL:
        return [], []
    differs = f"the result differs from its source by {check.kl:.2g} nats per token"
    condition = _find_condition(report)
    if report.kept_packed and report.first_layer is not None:
        return [], []  # a note has said that the table is rounded
    if check.kl_ratio is not None:
        text = (
            f"{differs}, {check.kl_ratio:.1f} times what quantization alone costs: --calibration "
            "with text of the kind that it will read helps"
            + (", --remove p needs no inverse" if condition else "")
        )
        return [], [text] if check.kl_ratio > ALARMING_RATIO and not _has_fewer_bits(report) else []
    if not condition and report.dtype != "float32" and check.kl < STRANGE_KL:
        return [f"computing in {report.dtype} costs {check.kl:.2g} nats per token by itself"], []
    cause = (
        f"inverses magnify the rounding of {report.dtype}. --remove auto leaves such "
        "matrices in place, --remove p needs no inverse"
        if condition
        else "more than rounding explains. Do not use it, and report this model"
    )
    return [], [f"{differs}: {cause}"]


def _has_fewer_bits(report: Report) -> bool:
    """Whether bits were chosen, some fewer than what the result is compared with has."""
    usual = (report.quantization or {}).get("bits", 0)
    return any(packing.bits < usual for packing in report.packings)


def _warn_of_overflow(check: Verification, unchanged: bool) -> Iterator[str]:
    most = max(check.magnitudes, key=lambda one: one.share, default=None)
    if most is not None and most.share > ALARMING_SHARE:
        yield (
            f"{'the source itself: ' if unchanged else ''}numbers reach {most.value:.2g} at "
            f"{most.where}, {most.share:.0%} of what {most.dtype} holds: other text may overflow it"
            + ("; use --dtype bfloat16" if most.dtype == "float16" else "")
        )


def _warn_of_plan(job: Job) -> Iterator[str]:
    if job.plan.before != job.checkpoint.args:
        yield SKIPLESS_WARNING
    if job.layout.quantization is not None and job.layout.args.extra_bits:
        yield (
            "rounding next to an inverse is magnified: "
            f"{len(job.layout.args.extra_bits)} matrices beside removed ones keep more bits"
        )


def _make_rows(job: Job, source: Layout) -> Iterator[LayerRow]:
    plan, layout, costs = job.plan, job.layout, job.measured.costs
    conditioning = job.measured.conditioning or {}
    names = [EMBEDDING, *(f"model.layers.{i}" for i in range(plan.before.num_hidden_layers))]
    names += [FINAL_NORM] if source.count(FINAL_NORM) else []
    names += [] if plan.before.tie_word_embeddings else [HEAD]
    for name in names:
        prefix = f"{name}."
        eliminated = [path for path in plan.eliminated.values() if path.startswith(prefix)]
        letters = [x.upper() for x in LETTERS if any(p.endswith(LETTERS[x]) for p in eliminated)]
        layer = name.rpartition(".")[2]
        dropped = [part for part, layers in plan.dropped.items() if layer in map(str, layers)]
        into = ["into the table"] if plan.table and name == "model.layers.0" else []
        measured = [conditioning[path].condition for path in eliminated if path in conditioning]
        yield LayerRow(
            name=name.removeprefix("model."),
            goes=" ".join([*letters, *dropped, *into]),
            weights_before=source.count(prefix),
            weights_after=layout.count(prefix),
            bytes_before=source.nbytes(prefix),
            bytes_after=layout.nbytes(prefix),
            condition=max(measured) if measured else None,
            cost=next((cost for path, cost in costs.items() if path.startswith(prefix)), None),
        )
