"""What a model could lose, what that would save and what it would cost: no weight is changed.

From a config alone: weights by part, and what each removal would save. From the weights too: the
condition numbers of Q, K, V and P. From a text too: how important each sub-layer is (1 - cosine,
arXiv 2406.15786, section 3.2), what dropping it alone costs, and what dropping ever more costs.
Of architectures that only mlx-lm knows: the weights by part, and what is measured on text.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoints.checkpoint import Blueprint, Checkpoint, open_checkpoint
from ..checkpoints.tokenizer import open_tokenizer
from ..constants import REMOVALS
from ..errors import UserError
from ..inference.sizes import count_bytes_read, count_cache_bytes
from ..inference.stock import StockSource, find_stock, open_network
from ..network.driver import RESIDENT_BYTES, Driver, StreamedNetwork
from ..network.model import ModelArgs
from ..network.names import EMBEDDING, HEAD, MLP, PROJECTIONS, SUBLAYERS, module_path
from ..network.parts import replace_at, tensors_of
from ..network.stock import StockNetwork
from ..network.wiring import LETTERS
from ..options import check_seed, expand_path
from ..progress import Progress
from ..quantization.layout import Layout
from ..quantization.sensitivity import MEASURED_TOKENS, STREAMS_BYTES, limit_tokens
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
CONFIG_ALONE = "a config alone: nothing could be measured"
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
            already or cannot go; None for a model without skips and for a config without weights.
        drop_cost: how much the loss, in nats per token, rises without its "attention" or "ffn".
        condition: largest over smallest singular value of its Q, K, V and P, by letter; None where
            this package does not know the architecture, and for a config without weights.
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
        parts: weights by part: embedding, q, k, v, p, ffn, head, norms and vectors; embedding,
            attention, ffn and rest where this package does not know the architecture.
        removals: one for each choice of letters; none where it does not.
        first_layer: what a table of the first layer's projections would save; None if there can be
            none.
        first_layer_reads: how many times fewer numbers such a table reads, by batch size.
        cache_bytes: bytes of KV cache per token and layer with attention; per token, of all layers,
            of a network that only mlx-lm knows, whose layers may differ.
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
    text = _Text(str(calibration), content, seed)
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
        return _analyze_stock(source, text, config_only, progress)
    assert checkpoint is not None
    if config_only:
        checkpoint = checkpoint.without_weights()
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
    resident = Layout(args, mx.float32).nbytes() <= RESIDENT_BYTES
    speaker = StreamedNetwork(args, parts, resident=resident)
    tokens = _take_rows(speaker, text, tokenizer, progress)
    there = {
        part: [n for n in range(args.num_hidden_layers) if not args.lacks(part, n)]
        for part in SUBLAYERS
    }

    def judge(copies: int) -> mx.array:
        return limit_tokens(tokens[::JUDGES], copies, args)

    def describe(layers: list[int], loss: float) -> Dropped:
        return _describe_drop(args, checkpoint.dtype, layers, loss)

    network = StreamedNetwork(args, parts)
    measured = _measure_sublayers(network, tokens, there, judge, describe, progress)
    return replace(measured, conditions=conditions, text=_name_text(text))


def _measure_sublayers(
    network: Driver,
    tokens: mx.array,
    there: Mapping[str, Sequence[int]],
    judge: Callable[[int], mx.array],
    describe: Callable[[list[int], float], Dropped],
    progress: Progress,
) -> _Measured:
    """Measure each sub-layer's importance, what its drop costs, and what ever more drops cost.

    Args:
        network: runs the layers.
        tokens: (sequences, length) of text.
        there: the layers that have an "attention", and an "ffn", that can go.
        judge: gives the tokens that losses are measured on, for so many copies of their stream.
        describe: describes the network without the attention of some layers, of that loss; these
            are ever more.
        progress: called with (stage, done, total).
    """
    found = sublayers.measure_importance(network, tokens, progress=partial(progress, "importance"))
    layers = range(len(network.paths))
    alone = [(n, part) for n in layers for part in SUBLAYERS if n in there[part]]
    order = sorted(there["attention"], key=lambda n: found["attention"][n])
    prefixes = [order[:count] for count in range(max(1, len(order)))]  # one keeps its attention
    variants: list[sublayers.Drops] = [{part: [n]} for n, part in alone]
    variants += [{"attention": prefix} for prefix in prefixes]
    tell = partial(progress, "losses")
    losses = sublayers.measure_losses(network, judge(len(variants)), variants, tell)
    curve = losses[len(alone) :]
    costs: list[dict[str, float]] = [{} for _ in layers]
    for (n, part), loss in zip(alone, losses, strict=False):
        costs[n][part] = loss - curve[0]
    blocks = [n for n in layers if network.can_drop(n, "block")]
    importance = [_select_layer({**there, "block": blocks}, found, n) for n in layers]
    drops = tuple(describe(*one) for one in zip(prefixes, curve, strict=True))
    return _Measured([None for _ in layers], importance, costs, drops)


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


def _take_rows(network: Driver, text: _Text, tokenizer: Any, progress: Progress) -> mx.array:
    """Take rows (sequences, length) of tokens to measure on: of the user's text, or sampled."""
    if text.content is not None:
        return _encode_rows(network.context, text.name, text.content, tokenizer)
    progress("sampling text", 0, 1)
    sequences, length = TEXT if network.resident else STREAMED_TEXT
    length = min(length, network.context or length)
    begin = None if tokenizer is None else tokenizer.bos_token_id
    tokens = samples.sample_text(network, sequences, length, seed=text.seed, start=begin)
    mx.eval(tokens)
    progress("sampling text", 1, 1)
    return tokens


def _name_text(text: _Text) -> str:
    return OWN_TEXT if text.content is None else text.name


def _encode_rows(longest: int | None, name: str, text: str, tokenizer: Any) -> mx.array:
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
    length = min(length, longest or length, *map(len, rows))
    if length < samples.SHORTEST:
        raise UserError(
            f"--calibration {name} has {length} tokens in an eighth of it; at least "
            f"{samples.SHORTEST} are needed: give more text"
        )
    return mx.array([row[:length] for row in rows])


def _select_layer(
    there: Mapping[str, Sequence[int]], importance: Mapping[str, Sequence[float]], layer: int
) -> dict[str, float | None]:
    """Select one layer's importance by kind, None for what it lacks or cannot lose."""
    gone = {kind for kind, layers in there.items() if layer not in layers}
    gone |= {"block"} if gone.issuperset(SUBLAYERS) else set()
    return {kind: None if kind in gone else values[layer] for kind, values in importance.items()}


def _describe_drop(args: ModelArgs, dtype: mx.Dtype, layers: list[int], loss: float) -> Dropped:
    """Describe the network without the attention of ``layers``."""
    layout = Layout(make_plan(args, remove="none", dropped={"attention": layers}).after, dtype)
    return Dropped(
        tuple(layers),
        loss,
        _exponentiate(loss),
        layout.count(),
        layout.bytes_per_token,
        layout.cache_bytes_per_token,
    )


def _exponentiate(loss: float) -> float:
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf


def _count(module: nn.Module) -> int:
    return sum(array.size for array in tensors_of(module).values())


class _StockSizes:
    """What a network that only mlx-lm knows holds, whole and without ever more attentions.

    All is dense, in the number type that its config declares.

    Args:
        source: the model.
        network: tells its sub-layers.
    """

    def __init__(self, source: StockSource, network: StockNetwork):
        self._network = network
        self._model: Any = source.build_shapes()
        self._names = [one.parts for one in network.sublayers]
        self.whole = _count(self._model)
        self.cache_bytes = count_cache_bytes(self._model, 1)
        self.layers = [
            {kind: self._count_part(n, kind) for kind in SUBLAYERS} for n in range(len(self._names))
        ]
        self.parts = self._count_parts(tuple(f"{path}." for path in network.paths))
        self._gone: set[int] = set()

    def _count_part(self, layer: int, kind: str) -> int:
        modules = dict(self._model.layers[layer].named_modules())
        return sum(_count(modules[name]) for name in self._names[layer].get(kind, ()))

    def _count_parts(self, inside: tuple[str, ...]) -> dict[str, int]:
        modules = dict(self._model.named_modules())
        ends = {
            part: sum(
                _count(module)
                for path, module in modules.items()
                if isinstance(module, kind) and not path.startswith(inside)
            )
            for part, kind in (("embedding", nn.Embedding), ("head", nn.Linear))
        }
        sums = {kind: sum(one[kind] for one in self.layers) for kind in SUBLAYERS}
        found = {"embedding": ends["embedding"], **sums, "head": ends["head"]}
        return {**found, "rest": self.whole - sum(found.values())}

    def describe(self, layers: list[int], loss: float) -> Dropped:
        """Describe the network without these attentions, those that went before among them."""
        for layer in layers:
            if layer not in self._gone:
                block = self._network.without(layer, self._model.layers[layer], {"attention"})
                self._model = replace_at(self._model, self._network.paths[layer], block)
                self._gone.add(layer)
        return Dropped(
            tuple(layers),
            loss,
            _exponentiate(loss),
            _count(self._model),
            count_bytes_read(self._model),
            count_cache_bytes(self._model, 1),
        )


def _find_stock_notes(
    source: StockSource, network: StockNetwork, config_only: bool
) -> Iterator[str]:
    """Say what the figures of a network that only mlx-lm knows do not."""
    yield (
        f"of a {source.kind} only mlx-lm's network is known: condition numbers and what exact "
        "removals save are not"
    )
    if config_only:
        yield CONFIG_ALONE
        return
    for part in SUBLAYERS:
        reasons: dict[str, list[int]] = {}
        for layer, one in enumerate(network.sublayers):
            if part in one.obstacles:
                reasons.setdefault(one.obstacles[part], []).append(layer)
        for reason, layers in reasons.items():
            numbers = ", ".join(map(str, layers))
            where = "all layers" if len(layers) == len(network.paths) else f"layer {numbers}"
            yield f"no {part} to drop in {where}: {reason}"
    if not network.is_chain:
        yield "layers hand on more than the stream: importance is what the loss rises by"


def _analyze_stock(
    source: StockSource, text: _Text, config_only: bool, progress: Progress
) -> Analysis:
    """Measure what a network that only mlx-lm knows could do without."""
    if source.store is None and not config_only:
        way_out = "use another export" if source.gguf is None else "`convert` it first"
        raise UserError(
            f"{source.name} has no weights in safetensors: add --config-only, or {way_out}"
        )
    network = open_network(source)
    sizes = _StockSizes(source, network)
    layers = range(len(network.paths))
    unmeasured = [None for _ in layers]
    measured = _Measured(unmeasured, unmeasured, unmeasured)
    if not config_only:
        tokenizer = open_tokenizer(source, trust_remote_code=source.trust_remote_code)
        tokens = _take_rows(network, text, tokenizer, progress)
        there = {part: [n for n in layers if network.can_drop(n, part)] for part in SUBLAYERS}

        def judge(copies: int) -> mx.array:
            stream: Any = tree_flatten([network.embed(tokens[:1, :1])])
            width = sum(array.size for _, array in stream)
            rows = min(STREAMS_BYTES // (4 * width * (copies + 2)), MEASURED_TOKENS)
            return tokens[::JUDGES][: max(1, rows // tokens.shape[1])]

        measured = _measure_sublayers(network, tokens, there, judge, sizes.describe, progress)
        measured = replace(measured, text=_name_text(text))
        assert source.store is not None
        source.store.check_unchanged()
    rows = zip(sizes.layers, measured.importance, measured.costs, strict=True)
    return Analysis(
        source=source.name,
        weights=sizes.whole,
        parts=sizes.parts,
        removals=(),
        first_layer=None,
        first_layer_reads=None,
        cache_bytes=sizes.cache_bytes,
        layers=tuple(Layer(n, *row, None) for n, row in enumerate(rows)),
        drops=measured.drops,
        text=measured.text,
        notes=tuple(_find_stock_notes(source, network, config_only)),
    )
