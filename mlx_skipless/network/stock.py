"""Networks of mlx-lm's own, of whatever architecture, read a layer at a time.

Nothing here knows an architecture; ``trial.py`` finds out what there is to know. Most networks are
chains: what a layer gives is all that the next one needs of it. Those that are not, of layers that
run twice for instance, run as a whole.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import get_total_parameters

from .driver import Changes, Driver, _Reached
from .magnitudes import Watch
from .model import Stream, take_stream
from .trial import KINDS, Sublayers, Trial, drop_sublayer, find_part
from .widening import attend_in_float32, widen

StandIns = Mapping[tuple[str, int], nn.Linear]  # by "attention" or "ffn" and layer

TRIAL_TOKENS = mx.zeros((1, 2), mx.int32)
CHAIN_TOKENS, CHAIN_ERROR = 12, 1e-3


class StockNetwork(Driver):
    """A network that mlx-lm builds, whose layers are read when they run and let go after.

    Args:
        build: builds it with lazy weights, anew at each call.
        dtype: of the numbers that it computes with; None: as they are stored. Packed matrices stay.
        resident: keep the layers instead, for many passes.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        dtype: mx.Dtype | None = None,
        *,
        resident: bool = False,
    ):
        self._build, self._dtype = build, dtype
        self._unread: dict[int, nn.Module] = {}
        self._stand_ins: StandIns = {}
        super().__init__(self._cast(build()), resident=resident)

    def _cast(self, model: nn.Module) -> nn.Module:
        if self._dtype is not None:
            model.set_dtype(self._dtype)
        return model

    def load_layer(self, layer: int) -> nn.Module:
        """Read a layer's tensors; they go when the layer that is returned goes."""
        if layer not in self._unread:
            self._unread = dict(enumerate(self._cast(self._build()).layers))
        return self._unread.pop(layer)

    def run(
        self, layer: int, h: Stream, tokens: mx.array, module: nn.Module | None = None
    ) -> Stream:
        """Run one layer on a stream, with what the model's forward passes to it for the tokens.

        Where layers hand on more, a stream is its array and what they handed on, by number.
        """
        if self._trial.sources is None:
            return super().run(layer, h, tokens, module)
        running: Any = self.layer(layer) if module is None else module
        stream = take_stream(h)
        handed: dict[int, Any] = {} if isinstance(h, mx.array) else h[1]  # type: ignore[assignment]

        def visit(at: int, x: mx.array, *args: Any, **options: Any) -> Any:
            if at < layer:
                return (stream, *handed.get(at, handed[layer - 1]))
            raise _Reached(running(stream, *args, **options))

        out, *more = self._forward(visit, tokens)
        kept = {at: one for at, one in handed.items() if at in self._trial.sources}
        return out, kept | {layer: more}  # type: ignore[return-value]

    @cached_property
    def is_chain(self) -> bool:  # type: ignore[override]
        """Whether the layers, run one by one, make the network; tried on a few tokens."""
        tokens = mx.arange(CHAIN_TOKENS)[None] * 7 % self.vocabulary
        try:
            by_layers = self._finish(_run_layers(self, tokens))
        except (AttributeError, KeyError, TypeError, ValueError):  # they need more than that
            return False
        return _agree(by_layers, self._run_whole(tokens))

    def hidden(
        self, tokens: mx.array, caches: list[Any] | None = None, watch: Watch | None = None
    ) -> mx.array:
        """Return what the last layer gives; of what is no chain, the logits."""
        if self.is_chain:
            return super().hidden(tokens, caches, watch)
        return self._run_whole(tokens, caches)

    def logits(self, h: Stream, changes: Changes | None = None) -> mx.array:
        """Return float32 logits (batch, length, vocabulary) of what ``hidden`` gave."""
        return self._finish(h, changes) if self.is_chain else take_stream(h)

    def _finish(self, h: Stream, changes: Changes | None = None) -> mx.array:
        if self._trial.sources is None:
            return super().logits(h, changes)
        whole = (take_stream(h), *[None] * self._trial.extras)
        return super().logits(whole, changes)  # type: ignore[arg-type]

    def _run_whole(self, tokens: mx.array, caches: list[Any] | None = None) -> mx.array:
        """Return float32 logits (batch, length, vocabulary) by the model's own forward."""
        widen(self.model)

        def visit(layer: int, *args: Any, **options: Any) -> Any:
            return self.layer(layer)(*args, **options)  # type: ignore[operator]

        caches = make_prompt_cache(self.model) if caches is None else caches
        logits = self._forward(visit, tokens, cache=caches).astype(mx.float32)
        mx.eval(logits)
        return logits

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return self._trial.vocabulary

    @property
    def context(self) -> int | None:
        """How many tokens in a row the model was made for; None where nothing says so."""
        return getattr(self.model, "context", None)

    @property
    def sublayers(self) -> list[Sublayers]:
        """What each layer's block calls its sub-layers."""
        return self._trial.sublayers

    @cached_property
    def _trial(self) -> Trial:
        caches = partial(make_prompt_cache, self.model)
        return Trial(lambda v: self._forward(v, TRIAL_TOKENS, cache=caches()), self._own)

    def replace(self, stand_ins: StandIns) -> "StockNetwork":
        """Return the same network, in which these stand in for sub-layers that go."""
        (other := copy.copy(self))._stand_ins = stand_ins
        return other

    def without(self, layer: int, block: nn.Module, kinds: Collection[str]) -> nn.Module:
        """Return a block without its attention, its FFN or both; the weights are shared."""
        for kind in kinds:
            linear = self._stand_ins.get((kind, layer))
            block = drop_sublayer(block, self.sublayers[layer], kind, linear)
        return block

    def drop(self, dropped: Mapping[str, Collection[int]]) -> "StockNetwork":
        """Return the network without some layers' "attention" or "ffn"."""

        def build() -> nn.Module:
            model: Any = self._build()
            for kind, layer in ((kind, n) for kind, layers in dropped.items() for n in layers):
                block = self.without(layer, model.layers[layer], {kind})
                model.update_modules(tree_unflatten([(self.paths[layer], block)]))
            return model

        reduced = StockNetwork(build, self._dtype, resident=self.resident)
        reduced.__dict__["is_chain"] = self.is_chain  # which takes two passes to find out
        return reduced

    def can_drop(self, layer: int, kind: str) -> bool:
        """Whether a layer can lose its "attention", its "ffn" or as a "block" both."""
        return not {kind, *(KINDS if kind == "block" else ())} & {*self.sublayers[layer].obstacles}

    def count_weights(self, layer: int, kind: str) -> int:
        """Count the weights that go with a layer's "attention" or "ffn"."""
        parts = self.sublayers[layer].parts.get(kind, ())
        go = [find_part(self._own[layer], part) for part in parts]
        come = [one for which, one in self._stand_ins.items() if which == (kind, layer)]
        return sum(map(get_total_parameters, go)) - sum(map(get_total_parameters, come))


def _run_layers(network: Driver, tokens: mx.array) -> Stream:
    """Run the layers one by one; return what the last one gives."""
    h: Stream = network.embed(tokens)
    for layer, block in network.walk():
        h = network.run(layer, h, tokens, block)
        mx.eval(h)
    return h


class WholeNetwork(Driver):
    """A network that is no chain of layers, run as one layer: it takes tokens and gives logits.

    Args:
        model: with its weights.
    """

    is_chain = False

    def __init__(self, model: nn.Module):
        self.model, self.resident, self.paths = widen(model), True, [""]

    def layer(self, layer: int) -> nn.Module:
        """Return the model."""
        return self.model

    def embed(self, tokens: mx.array, changes: Changes | None = None) -> mx.array:
        """Return the tokens."""
        return tokens

    def run(
        self, layer: int, h: Stream, tokens: mx.array, module: nn.Module | None = None
    ) -> Stream:
        """Return float32 logits (batch, length, vocabulary) of tokens (batch, length)."""
        running: Any = self.model if module is None else module
        with attend_in_float32():
            logits: mx.array = running(tokens, cache=make_prompt_cache(self.model))
        return logits.astype(mx.float32)

    def logits(self, h: Stream, changes: Changes | None = None) -> mx.array:
        """Return what ``run`` gave."""
        return take_stream(h)

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return take_stream(self.run(0, mx.zeros(1), mx.zeros((1, 1), mx.int32))).shape[-1]


def _agree(a: mx.array, b: mx.array) -> bool:
    """Whether logits are the same but for rounding; some networks give -inf."""
    same = (a == b) | (mx.isnan(a) & mx.isnan(b))
    largest = mx.where(mx.isfinite(b), mx.abs(b), 0.0).max()
    return bool(mx.where(same, 0.0, mx.abs(a - b)).max() <= CHAIN_ERROR * largest)
