"""What a model could lose, what that would save and what it would cost: no weight is changed.

From a config alone: weights by part, and what each removal would save. From the weights too: the
condition numbers of Q, K, V and P. From a text too: how important each sub-layer is (1 - cosine,
arXiv 2406.15786, section 3.2), what dropping it alone costs, and what dropping ever more costs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.gguf_file import GGUFStore
from ..checkpoints.tokenizer import VOCABULARY_FILES, load_tokenizer
from ..errors import UserError
from ..network.driver import RESIDENT_BYTES, StreamedNetwork
from ..network.model import ModelArgs
from ..network.names import EMBEDDING, HEAD, MLP, PROJECTIONS, module_path
from ..network.wiring import LETTERS
from ..progress import Progress
from ..quantization.layout import Layout
from ..quantization.sensitivity import limit_tokens
from ..removal import sublayers
from ..removal import table as first_layer
from ..removal.merger import Merger
from ..removal.plan import REMOVALS, make_plan
from ..removal.table import FirstLayer
from ..text import samples

TEXT = (8, 256)  # sequences, tokens each
STREAMED_TEXT = (128, 16)  # where layers are read from disk for each sampled token
JUDGES = 2  # one sequence in so many for the losses of all that could be dropped
NOTHING_TO_MEASURE = "{}: a config has no weights to measure; give the model"
BATCHES = (1, 16, 256, 1024)  # for which a table of the first layer is reckoned
LARGEST_LOSS = 700.0  # whose perplexity a float holds


@dataclass(frozen=True)
class Removal:
    """What an exact removal would save, or why it cannot be.

    Attributes:
        letters: as ``--remove`` takes them.
        skipless: whether the skips would have to go first, and the model be trained again.
        weights: that go.
        share: of all weights.
        bytes: that go, of dense weights in the source's number type.
        bytes_per_token: of these, what decoding a token would have read.
        speedup: weights before / after, the paper's speed-up at batch 1 (arXiv 2404.12362).
        reads: bytes that decoding a token reads, before / after; of an embedding it reads a row.
        obstacle: why not; the figures are None then.
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
    """One layer.

    Attributes:
        layer: its number, from 0.
        weights: of its "attention" and "ffn".
        importance: 1 - cosine by "attention", "ffn" and "block", None for what is gone already;
            None without skips or a text.
        drop_cost: loss, nats per token, without its "attention" or "ffn" less that with it.
        condition: of Q, K, V and P, largest over smallest singular value, by letter.
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
        layers: in the order in which they go.
        loss: nats per token.
        perplexity: of the same tokens; infinite beyond what a float holds.
        weights: that are left, the dropped attentions' norms gone too.
        bytes_per_token: that decoding a token reads of them, dense in the source's number type.
        cache_bytes: of KV cache per token.
    """

    layers: tuple[int, ...]
    loss: float
    perplexity: float
    weights: int
    bytes_per_token: int
    cache_bytes: int


@dataclass(frozen=True)
class Analysis:
    """What ``analyze`` finds; see the module.

    Attributes:
        source: what the user called it.
        weights: of the whole network.
        parts: weights by part: embedding, q, k, v, p, ffn, head, norms and other vectors.
        removals: one for each choice of letters.
        first_layer: what a table of the first layer's projections would save; None if there can be
            none.
        first_layer_reads: how many times fewer numbers such a table reads, by batch size.
        cache_bytes: of KV cache per token and layer with attention.
        layers: of them each.
        drops: ever more attentions dropped, the least important first; None without skips or text.
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
        revision: of a Hub id.
        trust_remote_code: let the source's tokenizer run its code.
        seed: of the sampled text.
        progress: called with (stage, done, total).

    Raises:
        UserError: for anything the user can mend.
    """
    samples.check_seed(seed)
    text = None if calibration is None else samples.read_text(calibration)
    config_only = config_only or str(model).endswith(".json") or _lacks_weights(model)
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        config_only=config_only,
        trust_remote_code=trust_remote_code,
    )
    if config_only:
        checkpoint = replace(checkpoint, store=None)
    args, dtype = checkpoint.args, checkpoint.dtype
    measured = None
    conditions: list[dict[str, float]] | None = None
    reason = sublayers.explain_undroppable(args)
    notes = []
    origin = None
    if checkpoint.store is None:
        if text is not None:
            raise UserError(NOTHING_TO_MEASURE.format("--calibration"))
        notes.append("a config alone: nothing could be measured")
    else:
        parts = Merger(checkpoint, make_plan(args, remove="none"), mx.float32)
        conditions = _conditions(args, parts, progress)
        if reason is None:
            tokens, origin = _tokens(
                checkpoint, parts, calibration, text, seed, trust_remote_code, progress
            )
            measured = _measured(args, dtype, parts, tokens, progress)
    if reason is not None:
        notes.append(f"no sub-layer can be dropped: {reason}")
        if text is not None:
            notes.append("nothing here is measured on text: --calibration was not needed")
    if args.norm == "pre" and args.skip == "both":
        notes.append(
            "with skips and norms no Q or P goes exactly: --skipless drops the skips first"
        )
    layout = Layout(args, dtype)
    by_part = count_parts(layout)
    if args.block == "parallel" and by_part["q"] and by_part["p"]:
        left = layout.count() - by_part["q"] - by_part["p"]
        notes.append(
            "a parallel block gives up one of Q and P; trained without both it would have "
            f"{left:,} weights ({1 - left / layout.count():.1%} fewer, "
            f"{layout.count() / left:.2f} times less)"
        )
    layers = range(args.num_hidden_layers)
    table = None if first_layer.find_obstacle(args) else first_layer.measure_table(args)
    return Analysis(
        source=str(model),
        weights=layout.count(),
        parts=by_part,
        removals=tuple(measure_removal(args, dtype, letters) for letters in REMOVALS[1:-1]),
        first_layer=table,
        first_layer_reads=None
        if table is None
        else {n: table.reads_before(n) / table.reads_after(n) for n in BATCHES},
        cache_bytes=2 * args.num_key_value_heads * args.head_dim * dtype.size,
        layers=tuple(
            Layer(
                layer,
                {
                    "attention": layout.count(f"model.layers.{layer}.self_attn."),
                    "ffn": layout.count(f"model.layers.{layer}.mlp."),
                },
                None if measured is None else measured.importance[layer],
                None if measured is None else measured.costs[layer],
                None if conditions is None else conditions[layer],
            )
            for layer in layers
        ),
        drops=None if measured is None else measured.drops,
        text=origin,
        notes=tuple(notes),
    )


def _lacks_weights(model: str | Path) -> bool:
    """Whether a model is a folder of a config without weights of any kind."""
    folder = Path(model).expanduser()
    weights = ("*.safetensors*", "*.bin*", "*.pt*", "*.gguf")
    has_config = (folder / "config.json").is_file()
    return has_config and not any(file for kind in weights for file in folder.glob(kind))


def count_parts(layout: Layout) -> dict[str, int]:
    """A network's weights by part."""
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
    """What ``--remove letters`` would save, of a model with skips with ``--skipless``."""
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


def _conditions(args: ModelArgs, parts: Merger, progress: Progress) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for layer in range(args.num_hidden_layers):
        progress("conditions", layer, args.num_hidden_layers)
        there = [x for x in LETTERS if not args.lacks(x, layer)]
        found.append({x: parts.condition(module_path(layer, LETTERS[x])) for x in there})
    progress("conditions", args.num_hidden_layers, args.num_hidden_layers)
    return found


def _tokens(
    checkpoint: Checkpoint,
    parts: Merger,
    calibration: str | Path | None,
    text: str | None,
    seed: int,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[mx.array, str]:
    """The text to measure on, (sequences, length), and where it comes from."""
    args = checkpoint.args
    tokenizer: Any = None
    if isinstance(checkpoint.store, GGUFStore):
        tokenizer = checkpoint.store.tokenizer()
    elif checkpoint.folder is not None and _has_tokenizer(checkpoint.folder):
        tokenizer = load_tokenizer(
            checkpoint.folder, checkpoint.config, trust_remote_code=trust_remote_code
        )
    if text is not None:
        if tokenizer is None:
            raise UserError("--calibration needs a tokenizer and the source has none: drop it")
        sequences, length = TEXT
        step = len(text) // sequences  # from places all over it
        size = min(step, samples.PIECE)
        pieces = [text[i * step : i * step + size] for i in range(sequences)]
        rows = [tokenizer.encode(piece, verbose=False) for piece in pieces]
        length = min(length, args.max_position_embeddings or length, *map(len, rows))
        if length < samples.SHORTEST:
            raise UserError(
                f"--calibration {calibration} has {length} tokens in an eighth of it; at least "
                f"{samples.SHORTEST} are needed: give more text"
            )
        return mx.array([row[:length] for row in rows]), str(calibration)
    progress("sampling text", 0, 1)
    resident = Layout(args, mx.float32).nbytes() <= RESIDENT_BYTES
    network = StreamedNetwork(args, parts, resident=resident)
    sequences, length = TEXT if resident else STREAMED_TEXT
    length = min(length, args.max_position_embeddings or length)
    begin = None if tokenizer is None else tokenizer.bos_token_id
    tokens = samples.sample_text(network, sequences, length, seed=seed, start=begin)
    mx.eval(tokens)
    progress("sampling text", 1, 1)
    return tokens, "sampled from the model"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


@dataclass(frozen=True)
class _Measured:
    importance: list[dict[str, float | None]]
    costs: list[dict[str, float]]
    drops: tuple[Dropped, ...]


def _measured(
    args: ModelArgs, dtype: mx.Dtype, parts: Merger, tokens: mx.array, progress: Progress
) -> _Measured:
    """Importance, the cost of each drop alone, and of ever more: two passes over the layers."""

    def at(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(stage, done, total)

    layers = range(args.num_hidden_layers)
    network = StreamedNetwork(args, parts)
    importance = sublayers.measure_importance(network, tokens, progress=at("importance"))
    alone = [
        (layer, part) for layer in layers for part in sublayers.PARTS if not args.lacks(part, layer)
    ]
    there = [layer for layer in layers if not args.lacks("attention", layer)]
    order = sorted(there, key=lambda layer: importance["attention"][layer])
    prefixes = [order[:count] for count in range(len(order))]  # one keeps its attention
    variants: list[sublayers.Drops] = [{part: [layer]} for layer, part in alone]
    variants += [{"attention": prefix} for prefix in prefixes]
    rows = limit_tokens(tokens[::JUDGES], len(variants), args.hidden_size)
    losses = sublayers.measure_losses(network, rows, variants, at("losses"))
    curve = losses[len(alone) :]
    costs: list[dict[str, float]] = [{} for _ in layers]
    for (layer, part), loss in zip(alone, losses, strict=False):
        costs[layer][part] = loss - curve[0]
    drops = tuple(
        _dropped(args, dtype, prefix, loss) for prefix, loss in zip(prefixes, curve, strict=True)
    )
    return _Measured([_of_layer(args, importance, i) for i in layers], costs, drops)


def _of_layer(
    args: ModelArgs, importance: Mapping[str, Sequence[float]], layer: int
) -> dict[str, float | None]:
    """One layer's importance by kind, None for what it lacks."""
    gone = {part: args.lacks(part, layer) for part in sublayers.PARTS}
    gone["block"] = all(gone.values())
    return {kind: None if gone[kind] else values[layer] for kind, values in importance.items()}


def _dropped(args: ModelArgs, dtype: mx.Dtype, layers: list[int], loss: float) -> Dropped:
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
