"""Which sub-layers a network with skip connections can do without.

A sub-layer with a skip adds to the stream; one that changes its direction little matters little
(He et al., *What Matters in Transformers?*, arXiv 2406.15786, section 3.2). That is measured in one
pass over a text, and in another the loss decides among the least important: without each of them
alone, or in the greedy search again after each drop.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import UserError
from ..network.driver import StreamedNetwork, fill_block, run_block, split_batches
from ..network.model import Block, ModelArgs
from ..network.names import EMBEDDING
from ..network.parts import Parts
from ..progress import Steps

PARTS = ("attention", "ffn")
KINDS = ("attention", "ffn", "block")  # what can be asked for; a block is both
SHORTLIST = 2  # times as many as shall go, the least important, are tried alone
CANDIDATES = 6  # the least important of each kind, tried at each step of the greedy search
SEARCH_TOKENS = 4096  # that judge a drop

Drops = Mapping[str, Collection[int]]  # layers by part


@dataclass(frozen=True)
class Wish:
    """How many sub-layers of one kind shall go: ``count``, or with None as many as ``max_loss``."""

    kind: str
    count: int | None


@dataclass(frozen=True)
class Step:
    """Of a greedy search: the loss, nats per token, once ``layer`` has lost its ``kind``.

    Before the first drop both are None.
    """

    loss: float
    kind: str | None = None
    layer: int | None = None

    def __str__(self) -> str:
        return (
            f"{self.loss:.3f}" if self.kind is None else f"{self.kind} {self.layer} {self.loss:.3f}"
        )


def explain_undroppable(args: ModelArgs) -> str | None:
    """Why no sub-layer of a network can go; None if they can."""
    if args.precomputed:
        return "the first layer is a table; drop from the model that it is of"
    if args.skip != "both" and not (args.skip == "ffn" and args.block == "parallel"):
        return (
            "nothing passes a dropped sub-layer where no skip connection leads around it; --remove "
            "removes weights from this model"
        )
    return None


def check_wishes(args: ModelArgs, wishes: Sequence[Wish], spared: Drops) -> None:
    """Raises UserError if what is asked for cannot be; ``spared`` sub-layers must stay."""
    reason = explain_undroppable(args)
    layers = args.num_hidden_layers
    for wish in wishes:
        flag = f"--drop-{wish.kind} {'auto' if wish.count is None else wish.count}"
        if reason is not None:
            raise UserError(f"{flag}: {reason}")
        most = layers if wish.kind == "ffn" and not spared.get("ffn") else layers - 1
        if wish.count is not None and not 1 <= wish.count <= most:
            raise UserError(f"{flag}: of this model's {layers} layers 1 to {most} can lose theirs")


def measure_importance(
    args: ModelArgs,
    source: Parts,
    tokens: mx.array,
    dropped: Drops | None = None,
    progress: Steps = lambda done, total: None,
) -> dict[str, list[float]]:
    """1 - cosine of the stream before and after each sub-layer and each block, mean over tokens.

    Args:
        args: the network.
        source: its tensors.
        tokens: (sequences, length) of text.
        dropped: sub-layers that are gone already; theirs is 0.

    Returns:
        A number a layer for "attention", "ffn" and "block".
    """
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    batches = split_batches(tokens)
    streams = _embedded(args, source, batches)
    for layer in range(args.num_hidden_layers):
        progress(layer, args.num_hidden_layers)
        block = _block(args, source, layer)
        gone = _gone(dropped or {}, layer)
        attention, ffn = _without(block, {"ffn"} | gone), _without(block, {"attention"} | gone)
        sums = dict.fromkeys(KINDS, 0.0)
        for i, x in enumerate(streams):
            middle = run_block(args, attention, x)
            if args.block == "parallel":  # both read the block's input
                before, behind = x, run_block(args, ffn, x)
                out = middle + behind - x
            else:
                before, behind = middle, run_block(args, ffn, middle)
                out = behind
            for kind, a, b in (
                ("attention", x, middle), ("ffn", before, behind), ("block", x, out),
            ):  # fmt: skip
                sums[kind] += float(mx.sum(1 - _cosine(a, b)).item())  # type: ignore[arg-type]
            streams[i] = out
            mx.eval(out)
        for kind in KINDS:
            found[kind].append(sums[kind] / tokens.size)
    progress(args.num_hidden_layers, args.num_hidden_layers)
    return found


def measure_losses(
    args: ModelArgs,
    source: Parts,
    tokens: mx.array,
    variants: Sequence[Drops],
    progress: Steps = lambda done, total: None,
) -> list[float]:
    """The loss of the network with each set of drops, nats per token, in one pass.

    As long as two sets agree, one stream serves both.
    """
    batches = split_batches(tokens)
    shared: dict[tuple, list[mx.array]] = {(): _embedded(args, source, batches)}
    paths: list[tuple] = [()] * len(variants)
    for layer in range(args.num_hidden_layers):
        progress(layer, args.num_hidden_layers)
        block = _block(args, source, layer)
        after: dict[tuple, list[mx.array]] = {}
        for i, variant in enumerate(variants):
            gone = _gone(variant, layer)
            path = (*paths[i], tuple(sorted(gone)))
            if path not in after:
                mine = _without(block, gone)
                after[path] = [run_block(args, mine, h) for h in shared[paths[i]]]
                mx.eval(after[path])
            paths[i] = path
        shared = after
    progress(args.num_hidden_layers, args.num_hidden_layers)
    head = StreamedNetwork(args, source)
    known = {path: _loss(head, streams, batches) for path, streams in shared.items()}
    return [known[path] for path in paths]


def choose_drops(
    args: ModelArgs,
    source: Parts,
    tokens: mx.array,
    wishes: Sequence[Wish],
    *,
    greedy: bool,
    max_loss: float,
    spared: Drops | None = None,
    progress: Steps = lambda done, total: None,
) -> tuple[dict[str, list[int]], list[Step]]:
    """The sub-layers that go.

    Args:
        args: the network; see ``droppable``.
        source: its tensors.
        tokens: (sequences, length) of text.
        wishes: how many of each kind; a count of None goes on until ``max_loss``.
        greedy: measure again after each drop even where a count is given.
        max_loss: the share by which the loss, nats per token, may grow where no count is given.
        spared: sub-layers that must stay.

    Returns:
        The layers by part, and the steps of a greedy search.
    """
    dropped: dict[str, set[int]] = {part: set() for part in PARTS}
    spared = spared or {}
    rows = max(1, SEARCH_TOKENS // tokens.shape[1])
    judged = tokens[:: max(1, tokens.shape[0] // rows)][:rows]
    if not greedy and all(wish.count is not None for wish in wishes):
        measured = measure_importance(args, source, tokens, progress=progress)
        for wish in sorted(wishes, key=lambda wish: KINDS.index(wish.kind), reverse=True):
            assert wish.count is not None
            there = _least(measured[wish.kind], wish.kind, dropped, spared)
            there = there[: SHORTLIST * wish.count]
            found = measure_losses(
                args, source, judged, [_with({}, wish.kind, layer) for layer in there], progress
            )
            by_loss = sorted(zip(found, there, strict=True))
            for _, layer in by_loss[: wish.count]:
                dropped = _with(dropped, wish.kind, layer)
        return _sorted(dropped), []
    path = [Step(measure_losses(args, source, judged, [{}])[0])]
    left = {wish.kind: wish.count for wish in wishes}
    taken = 0
    while any(count is None or count > 0 for count in left.values()):
        measured = measure_importance(args, source, judged, dropped)
        candidates = [
            (kind, layer)
            for kind, count in left.items()
            if count is None or count > 0
            for layer in _least(measured[kind], kind, dropped, spared)[:CANDIDATES]
        ]
        if not candidates:
            break
        variants = [_with(dropped, kind, layer) for kind, layer in candidates]
        found = measure_losses(args, source, judged, variants)
        # By what each weight that goes costs.
        price = [
            (loss - path[-1].loss) / _weights(args, kind)
            for (kind, _), loss in zip(candidates, found, strict=True)
        ]
        best = min(range(len(price)), key=price.__getitem__)
        kind, layer = candidates[best]
        if left[kind] is None and found[best] > path[0].loss * (1 + max_loss):
            del left[kind]  # the others may still have some to go
            continue
        dropped = variants[best]
        path.append(Step(found[best], kind, layer))
        left[kind] = None if left[kind] is None else left[kind] - 1  # type: ignore[operator]
        taken += 1
        progress(taken, taken + sum(count or 1 for count in left.values()))
    return _sorted(dropped), path


def _weights(args: ModelArgs, kind: str) -> int:
    """Weights of one sub-layer's matrices."""
    query, key = args.num_attention_heads, args.num_key_value_heads
    attention = 2 * args.hidden_size * (query + key) * args.head_dim
    experts = max(args.num_local_experts, 1)
    ffn = (3 if args.gated else 2) * experts * args.hidden_size * args.intermediate_size
    return {"attention": attention, "ffn": ffn, "block": attention + ffn}[kind]


def _least(measured: Sequence[float], kind: str, *kept_out: Drops) -> list[int]:
    """Layers with nothing of a kind kept out, the least important first."""
    parts = PARTS if kind == "block" else (kind,)
    out = {layer for drops in kept_out for part in parts for layer in drops.get(part, ())}
    there = [layer for layer in range(len(measured)) if layer not in out]
    return sorted(there, key=lambda layer: measured[layer])


def _with(dropped: Drops, kind: str, layer: int) -> dict[str, set[int]]:
    """The drops and one more."""
    more = PARTS if kind == "block" else (kind,)
    return {p: {*dropped.get(p, ()), *([layer] if p in more else ())} for p in PARTS}


def _sorted(dropped: Drops) -> dict[str, list[int]]:
    return {part: sorted(layers) for part, layers in dropped.items() if layers}


def _gone(dropped: Drops, layer: int) -> set[str]:
    return {part for part, layers in dropped.items() if layer in layers}


def _without(block: Block, parts: Collection[str]) -> Block:
    """The block without its attention, its FFN or both; the weights are shared."""
    other = copy.copy(block)
    if "attention" in parts:
        other.self_attn = None
    if "ffn" in parts:
        other.mlp = None
    return other


def _block(args: ModelArgs, source: Parts, layer: int) -> Block:
    return fill_block(Block(args, layer), source.layer(layer), f"model.layers.{layer}.")


def _embedded(args: ModelArgs, source: Parts, batches: Sequence[mx.array]) -> list[mx.array]:
    embedding = source.embedding()[f"{EMBEDDING}.weight"].astype(mx.float32)
    return [args.scale_embedding(embedding[tokens]) for tokens in batches]


def _cosine(a: mx.array, b: mx.array) -> mx.array:
    lengths = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / mx.maximum(lengths, 1e-30)


def _loss(head: StreamedNetwork, streams: Sequence[mx.array], batches: Sequence[mx.array]) -> float:
    """Mean -log p of each token but a sequence's first, of streams before the final norm."""
    total = count = 0.0
    for h, tokens in _rows(streams, batches):
        logits = head.logits(h[None, :-1])[0]
        chosen = mx.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
        total += float((mx.logsumexp(logits, axis=-1) - chosen).sum().item())  # type: ignore[arg-type]
        count += tokens.size - 1
    return total / count


def _rows(
    streams: Sequence[mx.array], batches: Sequence[mx.array]
) -> Iterator[tuple[mx.array, mx.array]]:
    for h, tokens in zip(streams, batches, strict=True):
        yield from zip(h, tokens, strict=True)


def describe_wishes(args: ModelArgs, wishes: Sequence[Wish]) -> str:
    """What will go, as far as it is known before anything is measured."""
    known = [(wish.kind, wish.count) for wish in wishes if wish.count is not None]
    weights = sum(count * _weights(args, kind) for kind, count in known)
    what = " and ".join(f"{count} x {kind}" for kind, count in known) or "what --max-loss allows"
    return f"which layers lose it is measured when converting: {what}, {weights:,} weights or more"
