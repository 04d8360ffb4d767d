"""Networks of mlx-lm's own without some of their layers: those left get the numbers in a row.

Nothing here knows an architecture. What a config says of its layers one by one is cut to those that
stay; then mlx-lm builds the network that the shorter config describes, without weights, and each of
its layers is compared with the one whose number it takes: its modules, the shapes of its tensors,
all that it reads while it runs, and what the model passes to it. Only if all is the same can the
layers be left out so.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import lru_cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from ..architectures.family import Config
from ..network.driver import Driver
from ..network.model import take_stream
from ..network.parts import tensors_of

COUNT = re.compile(r"(n|num)(_\w+)?_layers?")  # a key with the number of all layers
LAYERS = re.compile(r"layer|dense|block|replace")  # a key with numbers of layers
NOT_BY_LAYER = re.compile(r"rope|quantiz|vision|audio|token|architectures")
# A cache that is that full shows in the mask of a short text what window a layer has.
TOKENS, FULL = 2, 1 << 14
VALUE = 1 / 64  # of all weights while networks are compared
LARGEST = 1 << 20  # numbers of an array that are compared


@dataclass(frozen=True)
class Layers:
    """The layers of a network that stay.

    Attributes:
        kept: their numbers, in order.
        total: how many there are.
    """

    kept: tuple[int, ...]
    total: int

    def pick(self, entries: Any) -> Any:
        """Take a list's or a string's entries of these layers, and what it has behind the last."""
        picked = [entries[i] for i in self.kept] + [*entries[self.total :]]
        return "".join(picked) if isinstance(entries, str) else picked

    def renumber(self, numbers: Sequence[int], first: int = 0) -> list[int]:
        """Return the new numbers of those layers of a list that stay; counted from ``first``."""
        new = {old + first: i + first for i, old in enumerate(self.kept)}
        return [new[number] for number in numbers if number in new]

    def count_first(self, count: int) -> int:
        """Count those that stay of the first ``count`` layers."""
        return sum(layer < count for layer in self.kept)

    def count_last(self, count: int) -> int:
        """Count those that stay of the last ``count`` layers."""
        return sum(layer >= self.total - count for layer in self.kept)


def delete_layers(config: Mapping[str, Any], layers: Layers) -> Config | None:
    """Return the config of a network with some of its layers alone.

    Args:
        config: of a network of mlx-lm's own.
        layers: those that stay.

    Returns:
        The config; None if no config says that to mlx-lm, as where layers follow a fixed pattern.
    """
    whole = _describe_network(dict(config))
    if whole is None or len(whole) != layers.total + 1:
        return None
    wanted = [*(whole[i] for i in layers.kept), whole[-1]]
    best = shorten_config(config, layers)
    least = _count_differences(wanted, best)
    for path, other in _list_readings(config, layers):
        if not least:
            break
        trial = _replace_entry(best, path, other)
        if (found := _count_differences(wanted, trial)) < least:
            best, least = trial, found
    return best if not least else None


def shorten_config(config: Mapping[str, Any], layers: Layers) -> Config:
    """Cut what a config says of each layer to some of them, as its keys are mostly meant."""
    short, first = {}, _find_first(config, layers)
    for key, value in config.items():
        if isinstance(value, Mapping) and not NOT_BY_LAYER.search(key):
            short[key] = shorten_config(value, layers)
        else:
            short[key] = next(_read_entry(key, value, layers, first), value)
    return short


def _find_first(config: Mapping[str, Any], layers: Layers) -> int:
    """Return from what number the lists of a config count its layers."""
    lists = (value for key, value in config.items() if "layer" in key and isinstance(value, list))
    return int(any(layers.total in numbers for numbers in lists))


def shorten_network(
    model: nn.Module, paths: Sequence[str], config: Config, layers: Layers
) -> tuple[nn.Module, Config]:
    """Build a network of some of another's layers, with their weights; return its config, too.

    Args:
        model: the whole network, perhaps with packed matrices.
        paths: the module paths of its layers.
        config: of the result, as ``delete_layers`` makes it, with what the whole one says of its
            packed matrices.
        layers: those that stay.
    """
    kind, kind_args = _get_classes(config)
    short = kind(kind_args.from_dict(config))
    rename = partial(rename_layer, layers=layers, paths=paths)

    def move(tree: Any) -> Any:
        flat: Any = tree_flatten(tree, is_leaf=lambda one: isinstance(one, nn.Module))
        named = ((rename(path), one) for path, one in flat)
        return tree_unflatten([(path, one) for path, one in named if path is not None])

    short.update_modules(move(model.leaf_modules()))
    short.update(move(model.parameters()))
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            entries = {rename(path): one for path, one in config[key].items()}
            config = {**config, key: {k: v for k, v in entries.items() if k is not None}}
    return short, config


def rename_layer(name: str, layers: Layers, paths: Sequence[str] = ()) -> str | None:
    """Return the name that a module or tensor gets; None if its layer goes.

    Args:
        name: the whole network's.
        layers: those that stay.
        paths: the module paths of all layers; none: they are called as in this package's network.
    """
    paths = paths or [f"model.layers.{layer}" for layer in range(layers.total)]
    for layer, path in enumerate(paths):
        if name == path or name.startswith(f"{path}."):
            if layer not in layers.kept:
                return None
            return paths[layers.kept.index(layer)] + name.removeprefix(path)
    return name


def passes_stream(network: Driver, layer: int) -> bool:
    """Whether a block without its sub-layers gives just the stream that it is given."""
    tokens = mx.arange(1, 1 + TOKENS)[None]
    h = network.embed(tokens) + 1
    block = network.without(layer, network.layer(layer), ("attention", "ffn"))
    return bool(mx.array_equal(take_stream(network.run(layer, h, tokens, block)), h))


def _list_readings(config: Mapping[str, Any], layers: Layers) -> Iterator[tuple[list[str], Any]]:
    """Yield other meanings of a config's entries: the path of each, and its value then."""
    first = _find_first(config, layers)
    for key, value in config.items():
        if isinstance(value, Mapping) and not NOT_BY_LAYER.search(key):
            yield from (([key, *path], other) for path, other in _list_readings(value, layers))
        else:
            read = [*_read_entry(key, value, layers, first)]
            if read and "layer" not in key:
                read.append(value)  # as long as there are layers by chance
            yield from (([key], other) for other in read[1:] if other != read[0])
            if type(value) is int and 0 < value <= layers.total and LAYERS.search(key):
                yield [key], layers.count_first(value)
                yield [key], layers.count_last(value)


def _read_entry(key: str, value: Any, layers: Layers, first: int) -> Iterator[Any]:
    """Yield what an entry may become, the likeliest first; nothing if it says nothing of layers."""
    by_layer = not NOT_BY_LAYER.search(key) or "layer" in key
    if not by_layer or isinstance(value, bool):
        return
    if value == layers.total and (COUNT.fullmatch(key) or key == "max_window_layers"):
        yield len(layers.kept)
    elif isinstance(value, list):
        if len(value) == layers.total or (len(value) > layers.total and "layer" in key):
            yield layers.pick(value)
        if "layer" in key and all(type(one) is int for one in value):
            yield layers.renumber(value, first)
            yield layers.renumber(value, 1 - first)
    elif isinstance(value, str):
        if len(value) == layers.total and "pattern" in key:
            yield layers.pick(value)
        if re.fullmatch(r"\d+(,\d+)*", value) and "layer" in key:
            numbers = layers.renumber([*map(int, value.split(","))])
            yield ",".join(map(str, numbers))


def _replace_entry(config: Config, path: Sequence[str], value: Any) -> Config:
    key, *rest = path
    return {**config, key: _replace_entry(config[key], rest, value) if rest else value}


def _count_differences(wanted: Sequence[Any], config: Config) -> int:
    """Count the layers of a config's network that are not as they shall be, and its ends."""
    found = _describe_network(config)
    if found is None or len(found) != len(wanted):
        return len(wanted) + 1
    return sum(a != b for a, b in zip(found, wanted, strict=True))


def _describe_network(config: Config) -> list[Any] | None:
    """Describe each layer of a config's network, and what is around them; None if there is none."""
    try:
        kind, kind_args = _get_classes(config)
        model = kind(kind_args.from_dict(config))
        return _Tracer(model).describe()
    except Exception:  # a config that fits no network can fail anywhere in mlx-lm
        return None


class _Tracer(Driver):
    """Finds out what each layer of a network is and does, without computing its numbers."""

    def __init__(self, model: nn.Module):
        model.update(tree_map(_fill, model.parameters()))
        super().__init__(model)
        self._reads: dict[tuple[str, str], Any] | None = None

    def describe(self) -> list[Any]:
        """Describe each layer, and last what is around them."""
        given: list[Any] = [None] * len(self.paths)
        reads: list[Any] = [None] * len(self.paths)

        def pass_on(layer: int, x: mx.array, *args: Any, **options: Any) -> mx.array:
            given[layer] = _describe([x, args, options])
            return x

        def run(layer: int, *args: Any, **options: Any) -> Any:
            self._reads = reads[layer] = {}
            try:
                return self._own[layer](*args, **options)
            finally:
                self._reads = None

        tokens = mx.zeros((1, TOKENS), mx.int32)
        caches = make_prompt_cache(self.model)
        for cache in caches:
            if type(getattr(cache, "offset", None)) is int:
                cache.offset = FULL
        self._forward(pass_on, tokens)  # also without caches, as trainers do
        self._forward(pass_on, tokens, cache=caches)
        for layer in self._own:
            for name, module in layer.named_modules():
                self._watch(name, module)
        self._forward(run, tokens, cache=make_prompt_cache(self.model))
        layers = [_describe_tensors(layer) for layer in self._own]
        self.model.update_modules(tree_unflatten([(path, nn.Identity()) for path in self.paths]))
        around = _describe_tensors(self.model)
        return [*zip(layers, given, reads, strict=True), around]

    def _watch(self, name: str, module: nn.Module) -> None:
        """Have all noted that a module reads of its settings."""
        for value in vars(module).values():
            if is_dataclass(value) and not isinstance(value, type):  # what config.json says
                object.__setattr__(value, "__class__", _make_watched(type(value)))
                object.__setattr__(value, "_note", partial(self._note, "", {}))
        module.__class__ = _make_watched(type(module))
        module.__dict__["_note"] = partial(self._note, name, tensors_of(module))

    def _note(self, module: str, parameters: Mapping[str, Any], name: str, value: Any) -> None:
        if self._reads is not None and name not in parameters:
            self._reads[module, name] = _describe(value)


@lru_cache
def _make_watched(kind: Any) -> type:
    """Make a class whose objects tell what is read of them."""

    if hasattr(kind, "_is_watched"):
        return kind  # type: ignore[no-any-return]

    def tell(self: Any, name: str, value: Any) -> Any:
        note = object.__getattribute__(self, "__dict__").get("_note")
        if note is not None and not name.startswith("__") and not hasattr(value, "__self__"):
            note(name, value)
        return value

    def read(self: Any, name: str) -> Any:
        return tell(self, name, kind.__getattribute__(self, name))

    def read_item(self: Any, name: str) -> Any:
        return tell(self, name, kind.__getattr__(self, name))

    body: dict[str, Any] = {"__getattribute__": read, "_is_watched": True}
    if hasattr(kind, "__getattr__"):
        body["__getattr__"] = read_item
    return type(kind.__name__, (kind,), body)


def _fill(array: mx.array) -> mx.array:
    return mx.broadcast_to(mx.array(VALUE).astype(array.dtype), array.shape)


def _describe_tensors(module: nn.Module) -> list[Any]:
    parts = [(path, part) for path, part in module.named_modules() if type(part) is not nn.Identity]
    kinds = sorted((path, type(part).__name__) for path, part in parts)
    return [kinds, {name: (a.shape, a.dtype) for name, a in tensors_of(module).items()}]


def _describe(value: Any) -> Any:
    """Describe a value so that equal ones have equal descriptions."""
    if isinstance(value, mx.array):
        small = value.size <= LARGEST
        numbers: Any = value.astype(mx.float32) if small else ()
        return value.shape, value.dtype, bytes(memoryview(numbers)) if small else None
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, list | tuple):
        return [_describe(one) for one in value]
    if isinstance(value, dict):
        return {key: _describe(one) for key, one in value.items()}
    if isinstance(value, partial):
        return [_describe(one) for one in (value.func, value.args, value.keywords)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "make_mask"):  # a cache
        return type(value).__name__, _describe({**vars(value)})
    return getattr(value, "__qualname__", type(value).__name__)
