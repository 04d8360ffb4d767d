"""Runs a model's own forward with code of ours at each of its layers.

Every model of mlx-lm calls the modules of ``model.layers`` one after another. A ``Driver`` puts a
stand-in in the place of each. Whoever then calls the model reaches the driver at each layer,
together with whatever that architecture passes to its layers: masks, caches, positions. There the
driver loads the layer's tensors, runs it, has it watched, and lets the tensors go again, so that no
network has to fit in memory. What stands before the layers (the embedding and its scale) and behind
them (the final norm, the head) is the model's own code as well.

A forward can also begin and end at any layer. So many texts, and changed copies of their streams,
can pass a layer before the next one is loaded: see ``Driver.run`` and ``Streams``.

Nothing here may know an architecture, but for ``StreamedNetwork``: our own network, filled from
``Parts``.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from ..progress import Steps
from .magnitudes import Watch
from .model import Block, Model, ModelArgs, Stream, take_stream
from .names import EMBEDDING, FINAL_NORM, HEAD, SUBLAYERS
from .parts import Arrays, Parts, replace_at
from .widening import attend_in_float32, widen

RESIDENT_BYTES = 2 << 30  # of float32 weights that may stay in memory
BATCH_TOKENS = 2048
HELD_OUT = 8  # one batch in so many judges fits, the others are fitted

Changes = Mapping[str, Any]  # tensors or modules by their path in a model


class _Hook:
    """What stand-ins call during a forward: ``visit(layer, stream, ...)``."""

    visit: Callable[..., Any]


class _Reached(Exception):
    """Ends a forward as soon as the wanted value is known."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


class _Hooked(nn.Module):
    """Stands in a layer's place: calling it calls the hook; any attribute is the layer's.

    So is its class, because some architectures tell their layers apart by that.
    """

    def __init__(self, layer: nn.Module, number: int, hook: _Hook):
        super().__init__()
        # Not as an item of the module: so the layer's tensors are no longer among the model's.
        self.__dict__["_layer"] = layer
        self._number, self._hook = number, hook

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.__dict__["_layer"])

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not args:  # some architectures name what they pass; the stream is what comes first
            first = next(iter(inspect.signature(self.__dict__["_layer"].__call__).parameters))
            args = (options.pop(first),)
        return self._hook.visit(self._number, *args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy asks for these before there is a layer
            raise AttributeError(name)
        return getattr(self.__dict__["_layer"], name)


class Network:
    """What there is to know of a network besides running it; a subclass of ``Driver`` tells.

    Attributes:
        parallel: whether the attention and the FFN of a block read the same stream.
        is_chain: whether a layer's stream is all that the next one needs of it.
    """

    parallel = False
    is_chain = True

    def without(self, layer: int, block: nn.Module, kinds: Collection[str]) -> nn.Module:
        """Return a block without its "attention", its "ffn" or both; the weights are shared."""
        raise NotImplementedError

    def count_weights(self, layer: int, kind: str) -> int:
        """Count the weights of a layer's "attention" or "ffn"."""
        raise NotImplementedError

    def can_drop(self, layer: int, kind: str) -> bool:
        """Whether a layer can lose its "attention", its "ffn" or as a "block" both."""
        return True

    def drop(self, dropped: Mapping[str, Collection[int]]) -> "Driver":
        """Return the network, which is no chain, without some layers' "attention" or "ffn"."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        raise NotImplementedError

    @property
    def context(self) -> int | None:
        """How many tokens in a row the model was made for; None where nothing says so."""
        raise NotImplementedError


class Driver(Network):
    """Runs a model, or any single layer of it, inside the model's own forward.

    ``embed``, ``run`` and ``logits`` need layers that return a ``Stream``.

    Args:
        model: a model of mlx-lm, or one made like them. Its layers are replaced by stand-ins.
        resident: keep loaded layers in memory, for many passes.

    Attributes:
        model: that model, with stand-ins as layers.
        paths: each layer's module path in the model.
    """

    def __init__(self, model: Any, *, resident: bool = True):
        self.model, self.resident = model, resident
        self._hook = _Hook()
        self._own = [*model.layers]
        self._kept: dict[int, nn.Module] = {}
        names = {id(module): name for name, module in model.named_modules()}
        self.paths = [names[id(layer)] for layer in self._own]
        hooked = [_Hooked(layer, i, self._hook) for i, layer in enumerate(self._own)]
        model.update_modules(tree_unflatten([*zip(self.paths, hooked, strict=True)]))

    # What a network that is read in parts overrides.

    def load_layer(self, layer: int) -> nn.Module:
        """Return a layer with its tensors; here the model's own."""
        return self._own[layer]

    def load_embedding(self) -> None:
        """Give the model what it needs before its layers; here it has it."""

    def load_head(self) -> None:
        """Give the model what it needs behind its layers; here it has it."""

    def release(self) -> None:
        """Let go what ``load_embedding`` and ``load_head`` loaded; a later call loads it again."""

    # What all share.

    def layer(self, layer: int) -> nn.Module:
        """Load a layer, or return the one that was kept."""
        if layer in self._kept:
            return self._kept[layer]
        module = widen(self.load_layer(layer))
        if self.resident:
            self._kept[layer] = module
        return module

    def walk(self, progress: Steps = lambda done, total: None) -> Iterator[tuple[int, nn.Module]]:
        """Load one layer after another; gives each with its number."""
        self.release()
        total = len(self.paths)
        for layer in range(total):
            progress(layer, total)
            yield layer, self.layer(layer)
        progress(total, total)

    def embed(self, tokens: mx.array, changes: Changes | None = None) -> mx.array:
        """Return what enters the first layer, (batch, length, width), of tokens (batch, length).

        Args:
            tokens: (batch, length).
            changes: tensors or modules, by path, that stand in for the model's own.
        """
        self.load_embedding()

        def visit(layer: int, x: mx.array, *args: Any, **options: Any) -> mx.array:
            raise _Reached(x)

        return self._forward(visit, tokens, changes)

    def run(
        self, layer: int, h: Stream, tokens: mx.array, module: nn.Module | None = None
    ) -> Stream:
        """Run one layer on a stream, with what the model's forward passes to it for the tokens.

        Args:
            layer: its number.
            h: what the layer before gave.
            tokens: that the stream is of, (batch, length).
            module: runs instead of the layer's own.
        """
        running = self.layer(layer) if module is None else module

        def visit(at: int, x: mx.array, *args: Any, **options: Any) -> mx.array:
            if at < layer:
                return x
            raise _Reached(running(h, *args, **options))

        return self._forward(visit, tokens)

    def hidden(
        self, tokens: mx.array, caches: list[Any] | None = None, watch: Watch | None = None
    ) -> mx.array:
        """Return what the last layer gives, (batch, length, hidden).

        Args:
            tokens: (batch, length).
            caches: as mlx-lm's ``make_prompt_cache`` makes them; they grow by the tokens.
            watch: looks at each layer's numbers.
        """
        self.load_embedding()

        def visit(at: int, x: mx.array, *args: Any, **options: Any) -> Any:
            own: Any = self.layer(at)
            layer = own if watch is None else partial(watch.run, self.paths[at], own)
            out = layer(x, *args, **options)
            mx.eval(out)
            if at == len(self.paths) - 1:
                raise _Reached(take_stream(out))
            return out

        h = self._forward(visit, tokens, cache=caches)
        if not self.resident:
            mx.clear_cache()
        return h

    def logits(self, h: Stream, changes: Changes | None = None) -> mx.array:
        """Return float32 logits (batch, length, vocabulary) of what the last layer gave.

        Args:
            h: (batch, length, hidden).
            changes: tensors or modules, by path, that stand in for the model's own.
        """
        self.load_head()
        widen(self.model)  # its layers are stand-ins
        tokens = mx.zeros(take_stream(h).shape[:2], mx.int32)  # any: the layers' output is h
        logits = self._forward(lambda layer, x, *args, **options: h, tokens, changes)
        return logits.astype(mx.float32)

    def _forward(
        self,
        visit: Callable[..., Any],
        tokens: mx.array,
        changes: Changes | None = None,
        **options: Any,
    ) -> Any:
        model = self.model
        for path, value in (changes or {}).items():
            model = replace_at(model, path, value)
        self._hook.visit = visit
        try:
            with attend_in_float32():
                return model(tokens, **options)
        except _Reached as reached:
            return reached.value
        finally:
            del self._hook.visit


class StreamedNetwork(Driver):
    """This package's own network, which reads each layer when it runs and lets it go after.

    Args:
        args: the network.
        parts: its tensors.
        settings: the ``quantization`` entry of its config, None for dense weights.
        resident: keep the layers instead, for many passes.
    """

    def __init__(
        self,
        args: ModelArgs,
        parts: Parts,
        settings: Mapping[str, Any] | None = None,
        *,
        resident: bool = False,
    ):
        super().__init__(Model(args), resident=resident)
        self.args, self.parts, self._settings = args, parts, settings
        self._loaded: set[str] = set()

    def load_layer(self, layer: int) -> nn.Module:
        """Read a layer's tensors."""
        return load_block(self.args, layer, self.parts.layer(layer), self._settings)

    def load_embedding(self) -> None:
        """Read the embedding, unless it is there."""
        if "embedding" not in self._loaded:
            self._fill(self.parts.embedding(), (EMBEDDING,))
            self._loaded.add("embedding")

    def load_head(self) -> None:
        """Read the final norm and the head, which may be the embedding, unless they are there."""
        if self.args.tie_word_embeddings:
            self.load_embedding()
        if "head" not in self._loaded:
            self._fill(self.parts.head(), (FINAL_NORM, HEAD))
            self._loaded.add("head")

    @property
    def parallel(self) -> bool:  # type: ignore[override]
        """Whether the attention and the FFN of a block read the same stream."""
        return self.args.block == "parallel"

    def without(self, layer: int, block: nn.Module, kinds: Collection[str]) -> nn.Module:
        """Return a block without its "attention", its "ffn" or both; the weights are shared."""
        for kind in kinds:
            block = replace_at(block, SUBLAYERS[kind], None)
        return block

    def count_weights(self, layer: int, kind: str) -> int:
        """Count the weights of a layer's "attention" or "ffn"."""
        return count_weights(self.args, kind)

    @property
    def vocabulary(self) -> int:
        """How many logits there are."""
        return self.args.vocab_size

    @property
    def context(self) -> int | None:
        """How many tokens in a row the model was made for; None where nothing says so."""
        return self.args.max_position_embeddings

    def release(self) -> None:
        """Let go the embedding, the final norm and the head, unless layers are kept as well."""
        if self._loaded and not self.resident:
            self.model.update(tree_map(mx.zeros_like, self.model.parameters()))  # never evaluated
            self._loaded.clear()

    def _fill(self, tensors: Arrays, paths: Sequence[str]) -> None:
        for path in paths:
            own = {name: a for name, a in tensors.items() if name.startswith(f"{path}.")}
            quantize_as(self.model, own, self._settings)
            module = dict(self.model.named_modules()).get(path)
            if module is not None:
                module.load_weights([(n.removeprefix(f"{path}."), a) for n, a in own.items()])


def count_weights(args: ModelArgs, kind: str) -> int:
    """Count the weights of the matrices of an "attention" or "ffn"."""
    if kind == "attention":
        query, key = args.num_attention_heads, args.num_key_value_heads
        return 2 * args.hidden_size * (query + key) * args.head_dim
    experts = max(args.num_local_experts, 1)
    return (3 if args.gated else 2) * experts * args.hidden_size * args.intermediate_size


def load_block(
    args: ModelArgs, layer: int, tensors: Arrays, settings: Mapping[str, Any] | None = None
) -> Block:
    """Build one layer of this package's network from its tensors.

    Args:
        args: the network.
        layer: the layer's number.
        tensors: all of the layer's, by canonical name.
        settings: the ``quantization`` entry of the network's config, None for dense weights.
    """
    prefix = f"model.layers.{layer}."
    own = {name.removeprefix(prefix): array for name, array in tensors.items()}
    block = Block(args, layer)
    quantize_as(block, own, settings, prefix)
    block.load_weights([*own.items()])
    return block


def quantize_as(
    module: nn.Module, tensors: Arrays, settings: Mapping[str, Any] | None, prefix: str = ""
) -> None:
    """Make those parts of a module quantized ones whose tensors are packed.

    Args:
        module: holds the parts.
        tensors: the parts' tensors by their name in the module; packed ones have "scales".
        settings: the ``quantization`` entry of a config, None for dense weights.
        prefix: what goes before a part's name in the settings.
    """
    if settings is None:
        return

    def choose(path: str, part: nn.Module) -> Any:
        packed = f"{path}.scales" in tensors and hasattr(part, "to_quantized")
        return packed and settings.get(prefix + path, True)

    mode = settings.get("mode", "affine")
    nn.quantize(module, settings["group_size"], settings["bits"], mode=mode, class_predicate=choose)


class Recorder(nn.Module):
    """A module that keeps its latest input ``x`` and output ``y``."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def __call__(self, *args: Any, **options: Any) -> Any:
        x, *_ = (*args, *options.values())  # some blocks name what they give
        self.x, self.y = x, self.inner(*args, **options)
        return self.y

    def __getattr__(self, name: str) -> Any:
        if name in self or "inner" not in self:
            return super().__getattr__(name)
        return getattr(self.inner, name)  # what a layer asks of the module inside it

    def as_linear(self, x: mx.array) -> mx.array:
        """Apply an embedding as a tied head does."""
        self.x, self.y = x, self.inner.as_linear(x)
        return self.y


class _Counted(Recorder):
    """A module that counts its calls."""

    count = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.__dict__["count"] = self.count + 1
        return super().__call__(*args, **options)

    def as_linear(self, x: mx.array) -> mx.array:
        """Apply an embedding as a tied head does."""
        self.__dict__["count"] = self.count + 1
        return super().as_linear(x)


def find_ends(network: Driver) -> tuple[set[str], set[str]]:
    """Find the embeddings and matrices that a forward calls before its layers, and behind them.

    Nothing is computed. A tied embedding is in both sets of module paths.
    """
    if isinstance(network, StreamedNetwork):
        return {EMBEDDING}, {EMBEDDING if network.args.tie_word_embeddings else HEAD}
    modules: dict[Any, Any] = dict(network.model.named_modules())
    counted = {
        path: _Counted(module)
        for path, module in modules.items()
        if hasattr(module, "to_quantized") or "scales" in module
    }
    h = network.embed(mx.zeros((1, 1), mx.int32), counted)
    before = {path: one.count for path, one in counted.items()}
    network.logits(h, counted)  # which begins with the embedding
    behind = {path for path, one in counted.items() if one.count > 2 * before[path]}
    return {path for path, count in before.items() if count}, behind


class Streams(dict[Hashable, list[Stream]]):
    """Copies of a text's stream that pass through a network's layers side by side, by name.

    A copy can run another module than the layer's own. Copies that have met the same so far are one
    list: they are computed once and lie in memory once.

    Args:
        network: runs the layers.
        batches: the text's tokens, (rows, length) each.
        names: of the copies; all begin with what the network's embedding gives.
    """

    def __init__(self, network: Driver, batches: Sequence[mx.array], names: Sequence[Hashable]):
        start: list[Stream] = [network.embed(tokens) for tokens in batches]
        mx.eval(start)
        super().__init__(dict.fromkeys(names, start))
        self._network, self._batches = network, batches

    def advance(
        self,
        layer: int,
        module: nn.Module,
        variants: Mapping[Any, Hashable] | None = None,
        make: Callable[[Any], nn.Module] | None = None,
    ) -> None:
        """Run every copy through one layer.

        Args:
            layer: its number.
            module: the layer; ``Driver.walk`` gives both.
            variants: for copies that run another module, by their name, which one.
            make: makes the module of a variant when its turn comes.
        """
        variants = variants or {}
        groups: dict[tuple[int, Hashable], list[Hashable]] = {}
        for name, stream in self.items():
            groups.setdefault((id(stream), variants.get(name)), []).append(name)
        waiting = Counter(number for number, _ in groups)
        for (number, variant), names in groups.items():
            waiting[number] -= 1
            # A list that no one else needs any more is overwritten, a batch at a time.
            held = [*self[names[0]]] if waiting[number] else self[names[0]]
            running = module if variant is None or make is None else make(variant)
            for i, tokens in enumerate(self._batches):
                held[i] = self._network.run(layer, held[i], tokens, running)
                mx.eval(held[i])
            self.update(dict.fromkeys(names, held))


def split_batches(tokens: mx.array) -> list[mx.array]:
    """Split text, tokens (sequences, length), into the batches that calibration takes it in."""
    rows = max(1, min(BATCH_TOKENS // tokens.shape[1], tokens.shape[0] // HELD_OUT))
    return [tokens[i : i + rows] for i in range(0, tokens.shape[0], rows)]


def is_held_out(batch: int) -> bool:
    """Whether a batch judges fits instead of being fitted."""
    return batch % HELD_OUT == HELD_OUT - 1
