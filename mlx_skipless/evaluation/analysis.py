"""What a model could lose, what that would save and what it would cost: no weight is changed.

From a config alone: weights by part, and what each removal would save. From the weights too: the
condition numbers of Q, K, V and P. From a text too: how important each sub-layer is (1 - cosine,
arXiv 2406.15786, section 3.2), what dropping it alone costs, and what dropping ever more costs.
Of architectures that only mlx-lm knows: the weights by part, and what is measured on text.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.checkpoint import Blueprint, Checkpoint, open_checkpoint
from ..checkpoints.tokenizer import open_tokenizer
from ..constants import REMOVALS
from ..errors import UserError
from ..inference.stock import find_stock
from ..network.driver import RESIDENT_BYTES, StreamedNetwork
from ..network.model import ModelArgs
from ..network.names import EMBEDDING, HEAD, MLP, PROJECTIONS, SUBLAYERS, module_path
from ..network.wiring import LETTERS
from ..options import check_seed, expand_path
from ..progress import Progress
from ..quantization.layout import Layout
from ..quantization.sensitivity import limit_tokens
from ..removal import sublayers
from ..removal.merger import Merger
from ..removal.plan import make_plan
from ..removal.source import SourceReader
from ..removal.table import find_obstacle, measure_table
from ..text import samples
from .findings import CONFIG_ALONE, Analysis, Dropped, Layer, Removal, find_perplexity
from .stock_analysis import analyze_stock
from .sublayer_worth import JUDGES, Measured, TextChoice, measure_sublayers, name_text, take_rows

NOTHING_TO_MEASURE = "{}: a config has no weights to measure; give the model"
BATCHES = (1, 16, 256, 1024)  # for which a table of the first layer is counted


def analyze(
    model: str | Path,
    *,
    calibration: str | Path | None = None,
    config_only: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Analysis:
    """Measure what a model could do without.

    Args:
        model: a Hub id, a Hugging Face folder, a .gguf file, or a config.json, alone or in a
            folder without weights, of which only what needs no weights is told.
        calibration: a text file or data set of the Hub to measure on; default: text sampled from
            the model.
        config_only: tell only what needs no weights; fetch none of a Hub id.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: let the source's tokenizer run its code.
        seed: seed of the sampled text.
        progress: called with (stage, done, total).

    Raises:
        UserError: for anything the user can mend.
    """
    check_seed(seed)
    content = None if calibration is None else samples.read_text(calibration)
    text = TextChoice(str(calibration), content, seed)
    config_only = config_only or str(model).endswith(".json") or _lacks_weights(model)
    opening: dict[str, Any] = {
        "revision": revision,
        "config_only": config_only,
        "trust_remote_code": trust_remote_code,
    }
    source = find_stock(model, **opening)
    checkpoint = open_checkpoint(model, **opening) if source is None else None
    if config_only and content is not None:
        raise UserError(NOTHING_TO_MEASURE.format("--calibration"))
    if source is not None:
        return analyze_stock(source, text, config_only, progress)
    assert checkpoint is not None
    if config_only:
        checkpoint = checkpoint.without_weights()
    measured = _measure(checkpoint, text, trust_remote_code, progress)
    if isinstance(checkpoint, Checkpoint):
        checkpoint.store.check_unchanged()
    return _describe(str(model), checkpoint, measured, _find_notes(checkpoint, content))


def _describe(
    source: str, checkpoint: Blueprint, measured: Measured, notes: Iterable[str]
) -> Analysis:
    """Put what was measured beside what the shapes alone tell."""
    args, dtype = checkpoint.args, checkpoint.dtype
    layout = Layout(args, dtype)
    table = None if find_obstacle(args) else measure_table(args)
    reads = None
    if table is not None:
        reads = {n: table.reads_before(n) / table.reads_after(n) for n in BATCHES}
    layers = (
        Layer(
            layer,
            {
                "attention": layout.count(f"model.layers.{layer}.self_attn."),
                "ffn": layout.count(f"model.layers.{layer}.mlp."),
            },
            measured.importance[layer],
            measured.costs[layer],
            measured.conditions[layer],
        )
        for layer in range(args.num_hidden_layers)
    )
    return Analysis(
        source=source,
        weights=layout.count(),
        parts=count_parts(layout),
        removals=tuple(measure_removal(args, dtype, letters) for letters in REMOVALS[1:-1]),
        first_layer=table,
        first_layer_reads=reads,
        cache_bytes=2 * args.num_key_value_heads * args.head_dim * dtype.size,
        layers=tuple(layers),
        drops=measured.drops,
        text=measured.text,
        notes=tuple(notes),
    )


def _find_notes(checkpoint: Blueprint, text: object | None) -> Iterator[str]:
    """Say what the figures of a source do not; ``text`` is what the user gave to measure on."""
    args = checkpoint.args
    yield from checkpoint.notes
    if not isinstance(checkpoint, Checkpoint):
        yield CONFIG_ALONE
    if (reason := sublayers.explain_undroppable(args)) is not None:
        yield f"no sub-layer can be dropped: {reason}"
        if text is not None:
            yield "nothing here is measured on text: --calibration was not needed"
    if args.norm == "pre" and args.skip == "both":
        yield "with skips and norms no Q or P goes exactly: --skipless drops the skips first"
    layout = Layout(args, checkpoint.dtype)
    parts, whole = count_parts(layout), layout.count()
    if args.block == "parallel" and parts["q"] and parts["p"]:
        left = whole - parts["q"] - parts["p"]
        yield (
            "a parallel block gives up one of Q and P; trained without both it would have "
            f"{left:,} weights ({1 - left / whole:.1%} fewer, {whole / left:.2f} times less)"
        )


def _lacks_weights(model: str | Path) -> bool:
    """Whether a model is a folder of a config without weights of any kind."""
    folder = expand_path(model)
    weights = ("*.safetensors*", "*.bin*", "*.pt*", "*.gguf")
    has_config = (folder / "config.json").is_file()
    return has_config and not any(file for kind in weights for file in folder.glob(kind))


def count_parts(layout: Layout) -> dict[str, int]:
    """Count a network's weights by part."""
    names = {
        "embedding": (f"{EMBEDDING}.",),
        **{letter: (f"{PROJECTIONS[name]}.",) for letter, name in LETTERS.items()},
        "ffn": tuple(f".{name}." for name in MLP),
        "head": (f"{HEAD}.",),
    }
    found = {
        part: sum(n for name, n in layout.weights.items() if any(m in name for m in marks))
        for part, marks in names.items()
    }
    return {**found, "norms and vectors": layout.count() - sum(found.values())}


def measure_removal(args: ModelArgs, dtype: mx.Dtype, letters: str) -> Removal:
    """Count what ``--remove letters`` would save, with ``--skipless`` where a model has skips.

    Args:
        args: the network.
        dtype: its number type.
        letters: a choice of ``--remove``.
    """
    skipless = args.norm == "pre" and args.skip == "both"
    try:
        plan = make_plan(args, remove=letters, skipless=skipless)
    except UserError as error:
        return Removal(letters, skipless, obstacle=str(error).removeprefix(f"--remove {letters}: "))
    before, after = Layout(plan.before, dtype), Layout(plan.after, dtype)
    gone = before.count() - after.count()
    return Removal(
        letters,
        skipless,
        gone,
        gone / before.count(),
        before.nbytes() - after.nbytes(),
        before.bytes_per_token - after.bytes_per_token,
        before.count() / after.count(),
        before.bytes_per_token / after.bytes_per_token,
    )


def _measure(
    checkpoint: Blueprint, text: TextChoice, trust_remote_code: bool, progress: Progress
) -> Measured:
    """Measure all that a source's weights allow: nothing of a config alone."""
    args = checkpoint.args
    unmeasured = [None] * args.num_hidden_layers
    if not isinstance(checkpoint, Checkpoint):
        return Measured(unmeasured, unmeasured, unmeasured)
    parts = Merger(checkpoint, make_plan(args, remove="none"), mx.float32)
    conditions = _measure_conditions(args, SourceReader(checkpoint), progress)
    if sublayers.explain_undroppable(args) is not None:
        return Measured(conditions, unmeasured, unmeasured)
    tokenizer = open_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    resident = Layout(args, mx.float32).nbytes() <= RESIDENT_BYTES
    speaker = StreamedNetwork(args, parts, resident=resident)
    tokens = take_rows(speaker, text, tokenizer, progress)
    there = {
        part: [n for n in range(args.num_hidden_layers) if not args.lacks(part, n)]
        for part in SUBLAYERS
    }

    def judge(copies: int) -> mx.array:
        return limit_tokens(tokens[::JUDGES], copies, args)

    def describe(layers: list[int], loss: float) -> Dropped:
        return _describe_drop(args, checkpoint.dtype, layers, loss)

    network = StreamedNetwork(args, parts)
    measured = measure_sublayers(network, tokens, there, judge, describe, progress)
    return replace(measured, conditions=conditions, text=name_text(text))


def _measure_conditions(
    args: ModelArgs, source: SourceReader, progress: Progress
) -> list[dict[str, float]]:
    """Measure the condition numbers of each layer's Q, K, V and P."""
    found: list[dict[str, float]] = []
    for layer in range(args.num_hidden_layers):
        progress("conditions", layer, args.num_hidden_layers)
        there = [x for x in LETTERS if not args.lacks(x, layer)]
        paths = {x: module_path(layer, LETTERS[x]) for x in there}
        found.append({x: source.measure_condition_number(path) for x, path in paths.items()})
    progress("conditions", args.num_hidden_layers, args.num_hidden_layers)
    return found


def _describe_drop(args: ModelArgs, dtype: mx.Dtype, layers: list[int], loss: float) -> Dropped:
    """Describe the network without the attention of ``layers``."""
    layout = Layout(make_plan(args, remove="none", dropped={"attention": layers}).after, dtype)
    return Dropped(
        tuple(layers),
        loss,
        find_perplexity(loss),
        layout.count(),
        layout.bytes_per_token,
        layout.cache_bytes_per_token,
    )
