"""What a conversion did, in numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx

from ..checkpoints.checkpoint import Blueprint
from ..network.parts import dtype_name
from ..network.wiring import LETTERS
from ..quantization.layout import Layout, PackedLayout
from ..removal.algebra import Conditioning
from ..removal.choices import RemovalCost
from ..removal.plan import Plan
from ..removal.products import UNIT_ROUNDOFF
from ..removal.table import FirstLayer, measure_table
from .check import Verification

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
class Report:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        source: what the user called it.
        output: the folder that was written, None with ``dry_run``.
        packing: how the source is quantized, in words, None if it is not.
        kept_packed: whether what nothing touched stays packed as it was.
        dtype: of the result's weights that are not quantized.
        quantization: of the result, as its config.json has it, None if it is not quantized.
        params_before: weights of the network that the removals start from.
        params_after: weights of the result.
        bytes_before: of ``params_before`` as dense weights of the source's type.
        bytes_after: of the result as it is stored.
        removed: the layers without a part, by "q", "k", "v", "p", "attention" and "ffn".
        folded: the norms whose gains went into matrices.
        stock: whether the result runs in mlx-lm's own network, without ``model.py``.
        skipless: whether skips were dropped first, so that the result has to be trained again.
        speedup_from_bytes: bytes that decoding a token would read of the same network in the
            result's format without the removals, over those that it reads.
        first_layer: what a table of the first layer saves and costs, None without one.
        cache_bytes_before, cache_bytes_after: of KV cache, that a token takes.
        rows: of the plan, a part of the network each.
        notes: what else there is to know, a sentence each.
        warnings: what must not be overlooked, a sentence each.
        verification: how far the result is from its source, None where that was not checked.
        seconds: that all took.
        stages: seconds of each stage, in the order of their beginnings.
        peak_memory_bytes: the most that the process held.
    """

    source: str
    output: str | None
    packing: str | None
    kept_packed: bool
    dtype: str
    quantization: dict[str, Any] | None
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    removed: dict[str, list[int]]
    folded: tuple[str, ...]
    stock: bool
    skipless: bool
    speedup_from_bytes: float
    first_layer: FirstLayer | None
    cache_bytes_before: int
    cache_bytes_after: int
    rows: tuple[LayerRow, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    verification: Verification | None
    seconds: float
    stages: dict[str, float]
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def calibrated(self, tokens: int, text: str) -> "Report":
        """The report of a result that was quantized against so many tokens of a text."""
        note = f"quantized against {tokens:,} tokens of text ({text})"
        return replace(self, notes=(*self.notes, note))

    def verified(self, check: Verification) -> "Report":
        """The report with the check's outcome, and a warning if that is bad."""
        notes, warnings = self.notes, self.warnings
        condition = max((row.condition or 0 for row in self.rows), default=0)
        if check.max_rel_logit_error > NOTABLE_ERROR and condition and not self.quantization:
            roundoff = UNIT_ROUNDOFF[getattr(mx, self.dtype)]
            notes += (
                f"inverses with condition numbers up to {condition:.1e} magnify {self.dtype}'s "
                f"rounding of {roundoff:.0e} to logit errors of up to "
                f"{min(condition * roundoff, 1):.0e}; the merge itself is exact",
            )
        if any(part in self.removed for part in ("attention", "ffn")):
            pass  # a drop is no rounding: its price is the perplexity that is reported
        elif check.kl_ratio is not None:
            if check.kl > ALARMING_KL and check.kl_ratio > ALARMING_RATIO:
                warnings += (
                    f"the result differs from its source by {check.kl:.2g} nats per token, "
                    f"{check.kl_ratio:.1f} times what quantization alone costs: --calibration "
                    "with text of the kind that it will read helps, --remove p needs no inverse",
                )
        elif not condition and self.dtype != "float32" and ALARMING_KL < check.kl < STRANGE_KL:
            notes += (f"computing in {self.dtype} costs {check.kl:.2g} nats per token by itself",)
        elif check.kl > ALARMING_KL:
            cause = (
                f"inverses magnify the rounding of {self.dtype}. --remove auto leaves such "
                "matrices in place, --remove p needs no inverse"
                if condition
                else "more than rounding explains. Do not use it, and report this model"
            )
            warnings += (
                f"the result differs from its source by {check.kl:.2g} nats per token: {cause}",
            )
        most = max(check.magnitudes, key=lambda one: one.share, default=None)
        if most is not None and most.share > ALARMING_SHARE:
            warnings += (
                f"numbers reach {most.value:.2g} at {most.where}, {most.share:.0%} of what "
                f"{most.dtype} holds: other text may overflow it"
                + ("; use --dtype bfloat16" if most.dtype == "float16" else ""),
            )
        return replace(self, verification=check, notes=notes, warnings=warnings)


def make_report(
    checkpoint: Blueprint,
    plan: Plan,
    layout: Layout,
    stock: bool,
    conditioning: Mapping[str, Conditioning],
    costs: Mapping[str, RemovalCost],
) -> Report:
    """The report of a planned conversion, before anything is measured."""
    source = Layout(plan.before, checkpoint.dtype)
    same_format = replace(layout, args=plan.before)
    warnings = []
    skipless = plan.before != checkpoint.args
    if skipless:
        warnings.append(SKIPLESS_WARNING)
    if layout.quantization is not None and layout.args.extra_bits:
        warnings.append(
            "rounding next to an inverse is magnified: "
            f"{len(layout.args.extra_bits)} matrices beside removed ones keep more bits"
        )
    return Report(
        source=checkpoint.name,
        output=None,
        packing=checkpoint.packing,
        kept_packed=isinstance(layout, PackedLayout),
        dtype=dtype_name(layout.dtype),
        quantization=layout.config_entry,
        params_before=source.count(),
        params_after=layout.count(),
        bytes_before=source.nbytes(),
        bytes_after=layout.nbytes(),
        removed={**plan.gone, **plan.dropped},
        folded=plan.folded,
        stock=stock,
        skipless=skipless,
        speedup_from_bytes=same_format.bytes_per_token / layout.bytes_per_token,
        first_layer=measure_table(plan.merged) if plan.table else None,
        cache_bytes_before=same_format.cache_bytes_per_token,
        cache_bytes_after=layout.cache_bytes_per_token,
        rows=tuple(_rows(plan, source, layout, conditioning, costs)),
        notes=plan.notes,
        warnings=tuple(warnings),
        verification=None,
        seconds=0.0,
        stages={},
        peak_memory_bytes=0,
    )


def _rows(
    plan: Plan,
    source: Layout,
    layout: Layout,
    conditioning: Mapping[str, Conditioning],
    costs: Mapping[str, RemovalCost],
) -> Iterator[LayerRow]:
    names = ["model.embed_tokens"]
    names += [f"model.layers.{i}" for i in range(plan.before.num_hidden_layers)]
    names += [] if plan.before.tie_word_embeddings else ["lm_head"]
    for name in names:
        prefix = f"{name}."
        goes = [w for w in plan.eliminated.values() if w.startswith(prefix)]
        measured = [conditioning[w].condition for w in goes if w in conditioning]
        letters = [x.upper() for x in LETTERS if any(w.endswith(LETTERS[x]) for w in goes)]
        whole = [
            part
            for part, layers in plan.dropped.items()
            if name in (f"model.layers.{i}" for i in layers)
        ]
        into = ["into the table"] if plan.table and name == "model.layers.0" else []
        yield LayerRow(
            name=name.removeprefix("model."),
            goes=" ".join([*letters, *whole, *into]),
            weights_before=source.count(prefix),
            weights_after=layout.count(prefix),
            bytes_before=source.nbytes(prefix),
            bytes_after=layout.nbytes(prefix),
            condition=max(measured) if measured else None,
            cost=next((cost for where, cost in costs.items() if where.startswith(prefix)), None),
        )
