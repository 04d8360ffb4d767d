"""What a model could lose, what that would save and what it would cost: no weight is changed.

From a config alone: weights by part, and what each removal would save. From the weights too: the
condition numbers of Q, K, V and P. From a text too: how important each sub-layer is (1 - cosine,
arXiv 2406.15786, section 3.2), what dropping it alone costs, and what dropping ever more costs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.checkpoint import Blueprint, Checkpoint, open_checkpoint
from ..checkpoints.tokenizer import open_tokenizer
from ..constants import REMOVALS
from ..errors import UserError
from ..network.driver import RESIDENT_BYTES, StreamedNetwork
from ..network.model import ModelArgs
from ..network.names import EMBEDDING, HEAD, MLP, PROJECTIONS, SUBLAYERS, module_path
from ..network.wiring import LETTERS
from ..options import check_seed, expand_path
from ..progress import Progress, Steps
from ..quantization.layout import Layout
from ..quantization.sensitivity import limit_tokens
from ..removal import sublayers
from ..removal.merger import Merger
from ..removal.plan import make_plan
from ..removal.source import SourceReader
from ..removal.table import FirstLayer, find_obstacle, measure_table
from ..text import samples

TEXT = (8, 256)  # sequences, tokens each
STREAMED_TEXT = (128, 16)  # where layers are read from disk for each sampled token
JUDGES = 2  # one sequence in so many measures the losses of all that could be dropped
OWN_TEXT = "sampled from the model"
NOTHING_TO_MEASURE = "{}: a config has no weights to measure; give the model"
BATCHES = (1, 16, 256, 1024)  # for which a table of the first layer is counted
LARGEST_LOSS = 700.0  # whose perplexity a float holds


@dataclass(frozen=True)
class Removal:
    """What an exact removal would save, or why it is impossible.

    Attributes:
        letters: as ``--remove`` takes them.
        skipless: whether the skips would have to go first, and the model be trained again.
        weights: how many would go.
        share: their share of all weights.
        bytes: how many would go, of dense weights in the source's number type.
        bytes_per_token: how many fewer bytes decoding a token would read.
        speedup: weights before / after, the paper's speed-up at batch 1 (arXiv 2404.12362).
        reads: bytes read to decode a token, before / after; one row of an embedding is read.
        obstacle: why the removal is impossible; the figures are None then.
    """

    letters: str
    skipless: bool
    weights: int | None = None
    share: float | None = None
    bytes: int | None = None
    bytes_per_token: int | None = None
    speedup: float | None = None
    reads: float | None = None
    obstacle: str | None = None


@dataclass(frozen=True)
class Layer:
    """What one layer holds and what it is worth.

    Attributes:
        layer: its number, from 0.
        weights: how many are in its "attention" and in its "ffn".
        importance: 1 - cosine of its "attention", "ffn" and "block", None for what is gone
            already; None for a model without skips and for a config without weights.
        drop_cost: how much the loss, in nats per token, rises without its "attention" or "ffn".
        condition: largest over smallest singular value of its Q, K, V and P, by letter.
    """

    layer: int
    weights: dict[str, int]
    importance: dict[str, float | None] | None
    drop_cost: dict[str, float] | None
    condition: dict[str, float] | None


@dataclass(frozen=True)
class Dropped:
    """A network without the attention of some layers.

    Attributes:
        layers: numbers of these layers, in the order in which their attentions go.
        loss: nats per token.
        perplexity: of the same tokens; infinite beyond what a float holds.
        weights: how many are left; the dropped attentions' norms are gone too.
        bytes_per_token: bytes of them, dense in the source's number type, that decoding a token
            reads.
        cache_bytes: bytes of KV cache per token.
    """

    layers: tuple[int, ...]
    loss: float
    perplexity: float
    weights: int
    bytes_per_token: int
    cache_bytes: int


@dataclass(frozen=True)
class Analysis:
    """What ``analyze`` finds out about a model.

    Attributes:
        source: the model, as the user named it.
        weights: how many the whole network has.
        parts: weights by part: embedding, q, k, v, p, ffn, head, norms and vectors.
        removals: one for each choice of letters.
        first_layer: what a table of the first layer's projections would save; None if there can be
            none.
        first_layer_reads: how many times fewer numbers such a table reads, by batch size.
        cache_bytes: bytes of KV cache per token and layer with attention.
        layers: one for each layer.
        drops: ever more attentions dropped, the least important first; None where ``importance``
            of a layer is None.
        text: what importance and losses were measured on.
        notes: what the figures do not say.
    """

    source: str
    weights: int
    parts: dict[str, int]
    removals: tuple[Removal, ...]
    first_layer: FirstLayer | None
    first_layer_reads: dict[int, float] | None
    cache_bytes: int
    layers: tuple[Layer, ...]
    drops: tuple[Dropped, ...] | None
    text: str | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Text:
    """What to measure on: a text called ``name``, or text sampled from the model by ``seed``."""

    name: str
    content: str | None
    seed: int


@dataclass(frozen=True)
class _Measured:
    """What was measured of each layer and of ever more drops; None where it was not."""

    conditions: Sequence[dict[str, float] | None]
    importance: Sequence[dict[str, float | None] | None]
    costs: Sequence[dict[str, float] | None]
    drops: tuple[Dropped, ...] | None = None
    text: str | None = None


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
    config_only = config_only or str(model).endswith(".json") or _lacks_weights(model)
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        config_only=config_only,
        trust_remote_code=trust_remote_code,
    )
    if config_only:
        if content is not None:
            raise UserError(NOTHING_TO_MEASURE.format("--calibration"))
        checkpoint = checkpoint.without_weights()
    text = _Text(str(calibration), content, seed)
    measured = _measure(checkpoint, text, trust_remote_code, progress)
    if isinstance(checkpoint, Checkpoint):
        checkpoint.store.check_unchanged()
    return _describe(str(model), checkpoint, measured, _find_notes(checkpoint, content))


def _describe(
    source: str, checkpoint: Blueprint, measured: _Measured, notes: Iterable[str]
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


def _find_notes(checkpoint: Blueprint, text: str | None) -> Iterator[str]:
    """Say what the figures of a source do not; ``text`` is what the user gave to measure on."""
    args = checkpoint.args
    yield from checkpoint.notes
    if not isinstance(checkpoint, Checkpoint):
        yield "a config alone: nothing could be measured"
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
    checkpoint: Blueprint, text: _Text, trust_remote_code: bool, progress: Progress
) -> _Measured:
    """Measure all that a source's weights allow: nothing of a config alone."""
    args = checkpoint.args
    unmeasured = [None] * args.num_hidden_layers
    if not isinstance(checkpoint, Checkpoint):
        return _Measured(unmeasured, unmeasured, unmeasured)
    parts = Merger(checkpoint, make_plan(args, remove="none"), mx.float32)
    conditions = _measure_conditions(args, SourceReader(checkpoint), progress)
    if sublayers.explain_undroppable(args) is not None:
        return _Measured(conditions, unmeasured, unmeasured)
    tokenizer = open_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    if text.content is None:
        tokens, origin = _sample_rows(args, parts, tokenizer, text.seed, progress), OWN_TEXT
    else:
        tokens, origin = _encode_rows(args, text.name, text.content, tokenizer), text.name
    importance = sublayers.measure_importance(
        StreamedNetwork(args, parts), tokens, progress=partial(progress, "importance")
    )
    costs, drops = _measure_drops(
        args, checkpoint.dtype, parts, tokens, importance["attention"], partial(progress, "losses")
    )
    rows = [_select_layer(args, importance, i) for i in range(args.num_hidden_layers)]
    return _Measured(conditions, rows, costs, drops, origin)


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


def _encode_rows(args: ModelArgs, name: str, text: str, tokenizer: Any) -> mx.array:
    """Cut rows (sequences, length) of tokens from evenly spaced places of a user's text.

    Raises:
        UserError: without a tokenizer, or if the text is too short.
    """
    if tokenizer is None:
        raise UserError("--calibration needs a tokenizer and the source has none: drop it")
    sequences, length = TEXT
    step = len(text) // sequences
    size = min(step, samples.PIECE)
    pieces = [text[i * step : i * step + size] for i in range(sequences)]
    rows = [tokenizer.encode(piece, verbose=False) for piece in pieces]
    length = min(length, args.max_position_embeddings or length, *map(len, rows))
    if length < samples.SHORTEST:
        raise UserError(
            f"--calibration {name} has {length} tokens in an eighth of it; at least "
            f"{samples.SHORTEST} are needed: give more text"
        )
    return mx.array([row[:length] for row in rows])


def _sample_rows(
    args: ModelArgs, parts: Merger, tokenizer: Any, seed: int, progress: Progress
) -> mx.array:
    """Sample rows (sequences, length) of tokens from the model."""
    progress("sampling text", 0, 1)
    resident = Layout(args, mx.float32).nbytes() <= RESIDENT_BYTES
    network = StreamedNetwork(args, parts, resident=resident)
    sequences, length = TEXT if resident else STREAMED_TEXT
    length = min(length, args.max_position_embeddings or length)
    begin = None if tokenizer is None else tokenizer.bos_token_id
    tokens = samples.sample_text(network, sequences, length, seed=seed, start=begin)
    mx.eval(tokens)
    progress("sampling text", 1, 1)
    return tokens


def _measure_drops(
    args: ModelArgs,
    dtype: mx.Dtype,
    parts: Merger,
    tokens: mx.array,
    importance: Sequence[float],
    progress: Steps,
) -> tuple[list[dict[str, float]], tuple[Dropped, ...]]:
    """Measure in one pass what each drop alone costs, and what dropping ever more attentions does.

    ``importance`` is that of each layer's attention: the least important one goes first.
    """
    layers = range(args.num_hidden_layers)
    alone = [(layer, part) for layer in layers for part in SUBLAYERS if not args.lacks(part, layer)]
    there = [layer for layer in layers if not args.lacks("attention", layer)]
    order = sorted(there, key=lambda layer: importance[layer])
    prefixes = [order[:count] for count in range(len(order))]  # one keeps its attention
    variants: list[sublayers.Drops] = [{part: [layer]} for layer, part in alone]
    variants += [{"attention": prefix} for prefix in prefixes]
    rows = limit_tokens(tokens[::JUDGES], len(variants), args)
    losses = sublayers.measure_losses(StreamedNetwork(args, parts), rows, variants, progress)
    curve = losses[len(alone) :]
    costs: list[dict[str, float]] = [{} for _ in layers]
    for (layer, part), loss in zip(alone, losses, strict=False):
        costs[layer][part] = loss - curve[0]
    drops = (
        _describe_drop(args, dtype, prefix, loss)
        for prefix, loss in zip(prefixes, curve, strict=True)
    )
    return costs, tuple(drops)


def _select_layer(
    args: ModelArgs, importance: Mapping[str, Sequence[float]], layer: int
) -> dict[str, float | None]:
    """Select one layer's importance by kind, None for what it lacks."""
    gone = {part: args.lacks(part, layer) for part in SUBLAYERS}
    gone["block"] = all(gone.values())
    return {kind: None if gone[kind] else values[layer] for kind, values in importance.items()}


def _describe_drop(args: ModelArgs, dtype: mx.Dtype, layers: list[int], loss: float) -> Dropped:
    """Describe the network without the attention of ``layers``."""
    layout = Layout(make_plan(args, remove="none", dropped={"attention": layers}).after, dtype)
    perplexity = math.exp(loss) if loss < LARGEST_LOSS else math.inf
    return Dropped(
        tuple(layers),
        loss,
        perplexity,
        layout.count(),
        layout.bytes_per_token,
        layout.cache_bytes_per_token,
    )
