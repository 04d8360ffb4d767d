"""Which sub-layers a network with skip connections can do without.

A sub-layer with a skip adds to the stream; one that changes its direction little matters little
(He et al., *What Matters in Transformers?*, arXiv 2406.15786, section 3.2). One pass over a text
measures that. Another measures the loss without each of the least important ones, which decides. A
greedy search does both again after each drop.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from ..errors import UserError
from ..network.driver import Driver, Streams, split_batches
from ..network.metrics import measure_nll
from ..network.model import ModelArgs, Stream, take_stream
from ..network.names import SUBLAYERS
from ..progress import Steps, tell_part
from .candidates import find_removable, say_what_else_helps

ASKED = ("attention", "ffn", "block")  # what can be asked for; a block is both
SHORTLIST = 2  # times as many as shall go, the least important, are tried alone
CANDIDATES = 6  # the least important of each kind, tried at each step of the greedy search
SEARCH_TOKENS = 4096  # that judge a drop

Drops = Mapping[str, Collection[int]]  # layers by part
# Gives a number a layer for "attention", "ffn" and "block".
Measure = Callable[[Drops, Steps], Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Wish:
    """How many sub-layers of one kind shall go.

    ``count`` is their number; None means as many as a limit on the loss allows. ``verb`` is what
    happens to them: "drop" or "replace".
    """

    kind: str
    count: int | None
    verb: str = "drop"

    def __str__(self) -> str:
        return f"--{self.verb}-{self.kind} {'auto' if self.count is None else self.count}"


@dataclass(frozen=True)
class Step:
    """A step of a greedy search: the loss, nats per token, once ``layer`` has lost its ``kind``.

    The first step is the whole network: ``kind`` and ``layer`` are None.
    """

    loss: float
    kind: str | None = None
    layer: int | None = None

    def __str__(self) -> str:
        return (
            f"{self.loss:.3f}" if self.kind is None else f"{self.kind} {self.layer} {self.loss:.3f}"
        )


def explain_undroppable(args: ModelArgs) -> str | None:
    """Say why no sub-layer of a network can go; return None if some can."""
    if args.precomputed:
        return "the first layer is a table; drop from the model that it is of"
    if args.skip != "both" and not (args.skip == "ffn" and args.block == "parallel"):
        helps = say_what_else_helps(args)
        if find_removable(args):
            helps = "--remove removes weights from this model"
        return (
            "nothing passes a dropped sub-layer where no skip connection leads around it; " + helps
        )
    return None


def check_wishes(args: ModelArgs, wishes: Sequence[Wish], spared: Drops) -> None:
    """Check that a network has as many sub-layers to lose as are asked for.

    Args:
        args: the network.
        wishes: how many of each kind shall go.
        spared: sub-layers that must stay, or are gone.

    Raises:
        UserError: if it has not.
    """
    reason = explain_undroppable(args)
    layers = args.num_hidden_layers
    attentions = sum(not args.lacks("attention", layer) for layer in range(layers))
    for wish in wishes:
        if reason is not None:
            raise UserError(f"{wish}: {reason}")
        out = {layer for part in _list_parts(wish.kind) for layer in spared.get(part, ())}
        most = layers - len(out) if wish.kind == "ffn" else min(layers - len(out), attentions - 1)
        if most < 1:
            raise UserError(f"{wish}: this model has none left that can go")
        if wish.count is not None and not 1 <= wish.count <= most:
            raise UserError(f"{wish}: of this model's {layers} layers 1 to {most} can lose theirs")
    free = {part: layers - len(spared.get(part, ())) for part in SUBLAYERS}
    check_sums(wishes, free | {"attention": min(free["attention"], attentions - 1)})


def check_sums(wishes: Sequence[Wish], most: Mapping[str, int]) -> None:
    """Check that no more of a part go in all than ``most`` says, blocks included.

    Raises:
        UserError: if more are asked for.
    """
    for part, there in most.items():
        asking = [wish for wish in wishes if wish.count and part in _list_parts(wish.kind)]
        if asking and sum(wish.count or 0 for wish in asking) > there:
            flags = " and ".join(map(str, asking))
            raise UserError(f"{flags}: of this model's layers {there} can lose their {part}")


def measure_importance(
    network: Driver,
    tokens: mx.array,
    dropped: Drops | None = None,
    progress: Steps = lambda done, total: None,
) -> dict[str, list[float]]:
    """Measure how much each sub-layer and each block turns the stream.

    That is 1 - cosine of the stream before and after it, the mean over tokens. Where a network is
    no chain of layers it is what the loss grows by without it.

    Args:
        network: runs the layers.
        tokens: (sequences, length) of text.
        dropped: sub-layers that are gone already; theirs is 0.
        progress: called with (layers done, all layers).

    Returns:
        A number a layer for "attention", "ffn" and "block".
    """
    if not network.is_chain:
        return _rank_by_loss(network, tokens, dropped or {}, progress)
    found: dict[str, list[float]] = {kind: [] for kind in ASKED}
    batches = split_batches(tokens)
    streams: list[Stream] = [network.embed(batch) for batch in batches]
    mx.eval(streams)
    for layer, block in network.walk(progress):
        gone = _find_gone(dropped or {}, layer)
        attention = network.without(layer, block, {"ffn"} | gone)
        whole = network.without(layer, block, gone)
        sums = dict.fromkeys(ASKED, 0.0)
        for i, (x, batch) in enumerate(zip(streams, batches, strict=True)):
            given, passed = (network.run(layer, x, batch, one) for one in (attention, whole))
            first, middle, out = map(take_stream, (x, given, passed))
            # In a parallel block both read the block's input.
            before, behind = (first, out - middle + first) if network.parallel else (middle, out)
            for kind, a, b in (
                ("attention", first, middle), ("ffn", before, behind), ("block", first, out),
            ):  # fmt: skip
                sums[kind] += float(mx.sum(1 - _cosine(a, b)).item())  # type: ignore[arg-type]
            streams[i] = passed
            mx.eval(streams[i])
        for kind in ASKED:
            found[kind].append(sums[kind] / tokens.size)
    return found


def measure_losses(
    network: Driver,
    tokens: mx.array,
    variants: Sequence[Drops],
    progress: Steps = lambda done, total: None,
) -> list[float]:
    """Measure the loss of a network with each set of drops, nats per token, in one pass.

    As long as two sets agree, one stream serves both.
    """
    batches = split_batches(tokens)
    if not network.is_chain:
        return [*_measure_wholes(network, batches, variants, progress)]
    streams = Streams(network, batches, range(len(variants)))
    for layer, block in network.walk(progress):
        gone = {i: _find_gone(variant, layer) for i, variant in enumerate(variants)}
        lacking = {i: parts for i, parts in gone.items() if parts}
        streams.advance(layer, block, lacking, partial(network.without, layer, block))
    distinct = {id(stream): stream for stream in streams.values()}
    losses = {key: _measure_loss(network, stream, batches) for key, stream in distinct.items()}
    return [losses[id(streams[i])] for i in range(len(variants))]


def _measure_wholes(
    network: Driver, batches: Sequence[mx.array], variants: Sequence[Drops], progress: Steps
) -> Iterator[float]:
    """The loss of a network with each set of drops, each run as a whole."""
    for done, variant in enumerate(variants):
        progress(done, len(variants))
        reduced = network.drop(variant)
        yield _measure_loss(reduced, [reduced.hidden(batch) for batch in batches], batches)
    progress(len(variants), len(variants))


def _rank_by_loss(
    network: Driver, tokens: mx.array, dropped: Drops, progress: Steps
) -> dict[str, list[float]]:
    """Measure what the loss grows by without each sub-layer and each block that could go."""
    layers = range(len(network.paths))
    alone = [(kind, layer) for kind in ASKED for layer in layers if network.can_drop(layer, kind)]
    variants = [dropped, *(_add(dropped, kind, layer) for kind, layer in alone)]
    whole, *losses = measure_losses(network, tokens, variants, progress)
    found = dict(zip(alone, (loss - whole for loss in losses), strict=True))
    return {kind: [found.get((kind, layer), 0.0) for layer in layers] for kind in ASKED}


def choose_drops(
    network: Driver,
    tokens: mx.array,
    wishes: Sequence[Wish],
    *,
    greedy: bool,
    max_loss: float,
    spared: Drops | None = None,
    measure: Measure | None = None,
    progress: Steps = lambda done, total: None,
) -> tuple[dict[str, list[int]], list[Step]]:
    """Choose the sub-layers that go.

    Args:
        network: one whose sub-layers can go: see ``explain_undroppable``.
        tokens: (sequences, length) of text.
        wishes: how many of each kind; a count of None goes on until ``max_loss``.
        greedy: measure again after each drop even where a count is given.
        max_loss: the share by which the loss, nats per token, may grow where no count is given.
        spared: sub-layers that must stay.
        measure: tells how important each sub-layer is once some are gone; None:
            ``measure_importance`` on the text.
        progress: called with (done, total).

    Returns:
        The layers by part, and the steps of a greedy search.
    """
    rows = max(1, SEARCH_TOKENS // tokens.shape[1])
    judged = tokens[:: max(1, tokens.shape[0] // rows)][:rows]
    stepwise = greedy or any(wish.count is None for wish in wishes)
    if measure is None:
        measure = partial(measure_importance, network, judged if stepwise else tokens)
    if stepwise:
        search = _Search(network, judged, spared or {}, max_loss, measure)
        return search.run({wish.kind: wish.count for wish in wishes}, progress)
    walks = 1 + len(wishes)
    measured = measure({}, tell_part(progress, 0, walks))
    dropped: Drops = {}
    ordered = sorted(wishes, key=lambda wish: ASKED.index(wish.kind), reverse=True)
    for walk, wish in enumerate(ordered, start=1):
        assert wish.count is not None
        there = _rank(measured[wish.kind], wish.kind, dropped, spared or {})
        there = there[: SHORTLIST * wish.count]
        alone = [_add({}, wish.kind, layer) for layer in there]
        losses = measure_losses(network, judged, alone, tell_part(progress, walk, walks))
        by_loss = sorted(zip(losses, there, strict=True))
        for _, layer in by_loss[: wish.count]:
            dropped = _add(dropped, wish.kind, layer)
    return _sort(dropped), []


class _Search:
    """A greedy search: drops the cheapest sub-layer, measures all again, and so on.

    Args:
        network: runs the layers.
        tokens: (sequences, length) of text that judges.
        spared: sub-layers that must stay, or are gone.
        max_loss: the share by which the loss may grow where no number of drops is given.
        measure: tells how important each sub-layer is once some are gone.
    """

    def __init__(
        self, network: Driver, tokens: mx.array, spared: Drops, max_loss: float, measure: Measure
    ):
        self._network, self._tokens = network, tokens
        self._spared, self._max_loss, self._measure = spared, max_loss, measure
        self._dropped: Drops = {}

    def run(
        self, left: dict[str, int | None], progress: Steps
    ) -> tuple[dict[str, list[int]], list[Step]]:
        """Drop as many of each kind as ``left`` says; None: as many as ``max_loss`` allows."""
        steps: list[Step] = []

        def tell(walk: int) -> Steps:
            """Of the next step's two walks, which measure importance and losses; one is whole."""
            rounds = max(0, len(steps) - 1) + sum(1 if n is None else n for n in left.values())
            return tell_part(progress, 2 * len(steps) - 1 + walk, 2 * rounds + 1)

        whole = Step(measure_losses(self._network, self._tokens, [{}], tell(1))[0])
        steps.append(whole)

        while wanted := {kind: count for kind, count in left.items() if count != 0}:
            candidates = self._find_candidates(wanted, tell(0))
            if not candidates:
                if any(left.values()):
                    raise UserError("fewer sub-layers can go than are asked for: ask for fewer")
                break
            best = self._choose(candidates, steps[-1].loss, tell(1))
            assert best.kind is not None and best.layer is not None
            count = left[best.kind]
            if count is None and best.loss > whole.loss * (1 + self._max_loss):
                del left[best.kind]  # the others may still have some to go
                continue
            self._dropped = _add(self._dropped, best.kind, best.layer)
            steps.append(best)
            left[best.kind] = None if count is None else count - 1
        return _sort(self._dropped), steps

    def _find_candidates(
        self, wanted: Mapping[str, int | None], progress: Steps
    ) -> list[tuple[str, int]]:
        """The least important sub-layers of each kind that may go; ``wanted`` has their counts.

        Where no count is given the last attention stays; a count has been checked.
        """
        measured = self._measure(self._dropped, progress)
        ranked = {kind: _rank(measured[kind], kind, self._dropped, self._spared) for kind in wanted}
        return [
            (kind, layer)
            for kind, there in ranked.items()
            for layer in there[:CANDIDATES]
            if kind == "ffn" or wanted[kind] is not None or len(there) > 1
        ]

    def _choose(self, candidates: Sequence[tuple[str, int]], loss: float, progress: Steps) -> Step:
        """The candidate that costs least by the weights that go with it; ``loss`` is without it."""
        variants = [_add(self._dropped, kind, layer) for kind, layer in candidates]
        losses = measure_losses(self._network, self._tokens, variants, progress)
        steps = [Step(after, *which) for after, which in zip(losses, candidates, strict=True)]

        def count(kind: str, layer: int) -> int:
            return sum(self._network.count_weights(layer, part) for part in _list_parts(kind))

        prices = [
            (step.loss - loss) / count(*which)
            for step, which in zip(steps, candidates, strict=True)
        ]
        return steps[prices.index(min(prices))]


def _list_parts(kind: str) -> tuple[str, ...]:
    return tuple(SUBLAYERS) if kind == "block" else (kind,)


def _rank(measured: Sequence[float], kind: str, *kept_out: Drops) -> list[int]:
    """Layers with nothing of a kind kept out, the least important first."""
    out = {layer for drops in kept_out for p in _list_parts(kind) for layer in drops.get(p, ())}
    there = [layer for layer in range(len(measured)) if layer not in out]
    return sorted(there, key=lambda layer: measured[layer])


def _add(dropped: Drops, kind: str, layer: int) -> Drops:
    """Return the drops and one more."""
    return {**dropped, **{part: {*dropped.get(part, ()), layer} for part in _list_parts(kind)}}


def _sort(dropped: Drops) -> dict[str, list[int]]:
    return {part: sorted(dropped[part]) for part in SUBLAYERS if dropped.get(part)}


def _find_gone(dropped: Drops, layer: int) -> frozenset[str]:
    return frozenset(part for part, layers in dropped.items() if layer in layers)


def _cosine(a: mx.array, b: mx.array) -> mx.array:
    lengths = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / mx.maximum(lengths, 1e-30)


def _measure_loss(network: Driver, streams: Sequence[Stream], batches: Sequence[mx.array]) -> float:
    """Mean -log p of each token but a sequence's first, of streams behind the last layer."""
    total = count = 0.0
    for stream, tokens in zip(streams, batches, strict=True):
        # One sequence's logits at a time.
        for h, row in zip(take_stream(stream), tokens, strict=True):
            nll = measure_nll(network.logits(h[None, :-1])[0], row[1:])
            total += float(nll.sum().item())  # type: ignore[arg-type]
            count += nll.size
    return total / count


def describe_wishes(count: Callable[[str], int], wishes: Sequence[Wish]) -> str:
    """Say what will go, as far as it is known before anything is measured.

    ``count`` gives the weights of an "attention" or "ffn", or of the smallest that could go.
    """
    known = [(wish.kind, wish.count) for wish in wishes if wish.count is not None]
    weights = sum(number * count(part) for kind, number in known for part in _list_parts(kind))
    what = " and ".join(f"{number} x {kind}" for kind, number in known) or "what --max-loss allows"
    return f"which layers lose it is measured when converting: {what}, {weights:,} weights or more"
