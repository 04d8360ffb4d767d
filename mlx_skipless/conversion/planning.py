"""The second step of a conversion: what goes and in which form the result is stored.

Reads no text. Weights are read to measure condition numbers, where they are at hand.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.gguf_file import GGUFStore
from ..errors import UserError
from ..network.model import Model, ModelArgs
from ..network.names import EMBEDDING, SUBLAYERS
from ..progress import Progress
from ..quantization.coverage import check_packable
from ..quantization.layout import compare_sizes
from ..removal import sublayers
from ..removal.algebra import Conditioning
from ..removal.candidates import find_measurable
from ..removal.choices import NOISE_LIMIT
from ..removal.products import UNIT_ROUNDOFF
from ..removal.source import SourceReader
from ..removal.table import explain_price, find_needed, find_obstacle
from ..text.samples import LONG_CHECK_WEIGHTS
from .job import Form, Job, find_inverses
from .options import Options

STOCK_CANNOT = (
    "no network of mlx-lm's own is the same function (they may not know this activation, width, "
    "window or these biases): the result carries one that is"
)
NO_STOCK_DROPS = (
    "mlx-lm has no network of this architecture without some attentions or FFNs: the result "
    "carries one"
)
NO_STOCK_TABLE = (
    "mlx-lm's own network computes its first layer: the result carries one that reads it"
)
PACKED_TABLE = (
    "the table is packed as the matrices are that it stands for, which rounds its rows: with this "
    "source it is not exact"
)
# Tokens that an attention looks back at least, so that few texts are longer.
LONG_WINDOW = 1024
FORGETS_WINDOW = (
    "the source's attentions look back {:,} tokens, mlx-lm's own network looks back on all: they "
    "differ in longer texts. The result is mlx-lm's; --fold-norms makes one with the window"
)
SAVINGS = (
    "nothing exact makes a model with skip connections smaller; -q quantizes it, --drop-attention "
    "auto leaves out the attentions that it hardly needs, and `mlx-skipless heal` makes up for that"
)
SKIPLESS_NETWORK = (
    "--skipless --remove {} shows the speed and size of its skipless network, which is no language "
    "model until it is trained"
)


def plan(job: Job, progress: Progress) -> Job:
    """Choose the form of the result, and measure what decides on exact removals.

    Raises:
        UserError: for what cannot be done to this network.
    """
    _check_wishes(job)
    job = replace(job, form=choose_form(job))
    if isinstance(job.checkpoint, Checkpoint):
        job = job.learn(conditioning=_measure_conditioning(job, progress))
    options, quantization = job.options, job.layout.quantization
    if quantization is not None and not job.layout.settings:
        check_packable(Model(job.layout.args), quantization)
    calibrated = options.quantization is not None and (
        job.text is not None
        or options.mixes_bits
        or options.distill > 0
        or bool(find_inverses(job.plan))
    )
    return replace(job, calibrated=calibrated)


def list_wishes(asked: Mapping[str, int | str], verb: str = "drop") -> list[sublayers.Wish]:
    """How many sub-layers shall go, or be replaced, by kind."""
    return [
        sublayers.Wish(kind, None if count == "auto" else int(count), verb)
        for kind, count in asked.items()
    ]


def size_text(
    options: Options, calibrated: bool, weights: int, widest: int
) -> dict[str, Any] | None:
    """Decide how much text a conversion needs.

    Args:
        options: of the conversion.
        calibrated: whether matrices are quantized against text.
        weights: of the result.
        widest: the inputs of the widest matrix.

    Returns:
        What ``take_passages`` takes as ``sizes``; None where nothing needs text.
    """
    choosing = bool(options.drops or options.replacements or options.allow)
    calibrating = calibrated or choosing
    if not (options.verify or calibrating):
        return None
    # MLX's quantized products are slow on a CPU.
    fast = weights <= LONG_CHECK_WEIGHTS or mx.default_device().type != mx.cpu
    # Choosing sub-layers, distilling and few bits take all the text that there is.
    q = options.quantization
    few = options.mixes_bits or (q is not None and q.usual_bits < 4)
    all_of_it = choosing or options.distill or few
    return {
        "calibrating": calibrating,
        "long_check": calibrating and fast,
        "fitted": None if all_of_it else widest,
    }


def _check_wishes(job: Job) -> None:
    options, args = job.options, job.checkpoint.args
    if options.distill and args.num_local_experts:
        raise UserError("--distill is not for models with experts: drop it")
    if options.drops:
        spared = find_spared(args, options.precompute_first_layer is not None)
        sublayers.check_wishes(args, list_wishes(options.drops), spared)
    if options.precompute_first_layer is not None and (reason := find_obstacle(args)) is not None:
        raise UserError(f"--precompute-first-layer: {reason}")


def find_spared(args: ModelArgs, table: bool) -> dict[str, list[int]]:
    """List the sub-layers that a drop cannot take, layers by part.

    They are gone already, or a table of the first layer needs them.
    """
    needed = find_needed(args) if table else {}
    gone = {
        part: [layer for layer in range(args.num_hidden_layers) if args.lacks(part, layer)]
        for part in SUBLAYERS
    }
    return {part: sorted({*gone[part], *needed.get(part, ())}) for part in SUBLAYERS}


def choose_form(job: Job) -> Form:
    """Choose the form of a job's result, by its options and its source's config."""
    options, checkpoint = job.options, job.checkpoint
    form = Form(packed=_can_stay_packed(job))
    declined = None
    if options.precompute_first_layer == "auto":
        forms = (form, replace(form, table=True))
        declined = explain_price(*compare_sizes(*(replace(job, form=f).layout for f in forms)))
    table = options.precompute_first_layer is not None and declined is None
    family, args = checkpoint.family, checkpoint.args
    known = family.stock is not None and not options.skipless
    renumbered = known and not table and _drops_whole_layers(job)
    whole = renumbered or not (options.drops or args.removed)
    express = family.expresses if whole else family.expresses_without_sublayers
    expressed = known and express(args)
    forgets_window = known and not expressed and _differs_by_long_window(job)
    # What one matrix holds has bits of its own only as a whole.
    split = options.mixes_bits and bool(family.fused)
    notes = []
    if form.packed and isinstance(store := job.opened.store, GGUFStore):
        notes.append(store.packed.describe())
    if forgets_window:
        notes.append(FORGETS_WINDOW.format(args.sliding_window))
        expressed = True
    elif known and not expressed:
        notes.append(NO_STOCK_DROPS if family.expresses(args) else STOCK_CANNOT)
    if expressed and table:
        notes.append(NO_STOCK_TABLE)
    if form.packed and table:
        tensors = replace(job, form=replace(form, table=True)).layout.tensors
        notes += [PACKED_TABLE] if f"{EMBEDDING}.scales" in tensors else []
    stock = expressed and not table and not split
    if declined is not None:
        notes.append(f"the first layer stays computed: {declined} (--precompute-first-layer force)")
    renumbered = renumbered and stock
    return replace(form, table=table, stock=stock, renumbered=renumbered, notes=tuple(notes))


def advise(job: Job) -> Iterator[str]:
    """Say what makes a pretrained model smaller, where nothing that was asked for does."""
    options, args = job.options, job.checkpoint.args
    if options.skipless or options.drops or options.quantization is not None or job.form.packed:
        return
    if sublayers.explain_undroppable(args) is None:
        yield SAVINGS
    whole = args.norm == "pre" and not args.precomputed
    if whole and (letters := "".join(_plan_skipless(job))):
        yield SKIPLESS_NETWORK.format(letters)


def _drops_whole_layers(job: Job) -> bool:
    """Whether layers go as a whole, in a network whose layers are all alike."""
    options, args = job.options, job.checkpoint.args
    alike = len({*args.layer_types}) == 1
    asked = not options.drops or [*options.drops] == ["block"]
    whole = args.removed.get("attention") == args.removed.get("ffn")
    return asked and whole and alike and not options.distill


def _differs_by_long_window(job: Job) -> bool:
    """Whether mlx-lm's own network lacks a window alone, which few texts are longer than."""
    args, options = job.checkpoint.args, job.options
    whole = replace(args, sliding_window=None, layer_types=[])
    wanted = options.fold_norms or options.drops or options.precompute_first_layer == "force"
    return (
        not wanted
        and (args.sliding_window or 0) >= LONG_WINDOW
        and job.checkpoint.family.expresses(whole)
    )


def _can_stay_packed(job: Job) -> bool:
    """Whether what nothing touches can stay packed as it is."""
    options = job.options
    in_place = bool(options.drops) or options.precompute_first_layer is not None
    in_place |= isinstance(job.checkpoint, Checkpoint) and isinstance(job.opened.store, GGUFStore)
    changed = options.dtype or options.fold_norms or options.skipless or options.quantization
    checkpoint = job.checkpoint
    packed = isinstance(checkpoint, Checkpoint) and checkpoint.packed_by_mlx and checkpoint.is_whole
    return in_place and packed and not changed and not job.plan.eliminated


def _plan_skipless(job: Job) -> list[str]:
    """The letters of what could go from the skipless network of a source."""
    return [*replace(job, options=Options(skipless=True), form=Form()).plan.gone]


def _measure_conditioning(job: Job, progress: Progress) -> Mapping[str, Conditioning]:
    wanted = find_measurable(job.plan.before, job.options.remove)
    reader = SourceReader(job.opened, job.plan.folded)
    limits = [NOISE_LIMIT / UNIT_ROUNDOFF[job.dtype]]
    measured = {}
    for done, path in enumerate(wanted):
        progress("measuring", done, len(wanted))
        measured[path] = reader.measure_conditioning(path, limits)
    progress("measuring", len(wanted), len(wanted))
    return measured
