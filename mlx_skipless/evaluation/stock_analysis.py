"""What a model could lose whose network only mlx-lm knows: weights by part, and what text tells."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoints.tokenizer import open_tokenizer
from ..errors import UserError
from ..inference.sizes import count_bytes_read, count_cache_bytes
from ..inference.stock import StockSource, open_network
from ..network import reduced
from ..network.names import SUBLAYERS
from ..network.parts import replace_at, tensors_of
from ..network.stock import StockNetwork
from ..progress import Progress
from ..quantization.sensitivity import MEASURED_TOKENS, STREAMS_BYTES
from .findings import CONFIG_ALONE, Analysis, Dropped, Layer, find_perplexity
from .sublayer_worth import JUDGES, Measured, TextChoice, measure_sublayers, name_text, take_rows


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
            find_perplexity(loss),
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
    if reduced.DROPPED in source.config:
        yield "it has lost sub-layers: more are dropped, with these, from what it was made from"
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


def analyze_stock(
    source: StockSource, text: TextChoice, config_only: bool, progress: Progress
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
    measured = Measured(unmeasured, unmeasured, unmeasured)
    if not config_only:
        tokenizer = open_tokenizer(source, trust_remote_code=source.trust_remote_code)
        tokens = take_rows(network, text, tokenizer, progress)
        there = {part: [n for n in layers if network.can_drop(n, part)] for part in SUBLAYERS}

        def judge(copies: int) -> mx.array:
            stream: Any = tree_flatten([network.embed(tokens[:1, :1])])
            width = sum(array.size for _, array in stream)
            rows = min(STREAMS_BYTES // (4 * width * (copies + 2)), MEASURED_TOKENS)
            return tokens[::JUDGES][: max(1, rows // tokens.shape[1])]

        measured = measure_sublayers(network, tokens, there, judge, sizes.describe, progress)
        measured = replace(measured, text=name_text(text))
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
