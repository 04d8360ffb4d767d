"""A family's tensor names and layouts: renamed, cut out of fused matrices, stacked from experts.

What a fused matrix holds lies row behind row, or head by head: the rows of the first one's first
head, of the second one's first head, ...

Everything is rows, so packed matrices' parts are arranged just as dense ones: groups of weights
that share a scale lie along a row.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from ..errors import UserError
from ..network.model import ModelArgs
from ..network.names import is_stream_norm_weight
from ..network.wiring import parse_layer
from .family import Family

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True)
class Place:
    """Where a canonical tensor is.

    ``names`` are the source's tensors, of an expert each if ``stacked``. Of one that holds several,
    ``fused``, it is the ``index``-th, ``by_head`` or not.
    """

    names: tuple[str, ...]
    stacked: bool = False
    fused: tuple[str, ...] = ()
    index: int = 0
    by_head: bool = False

    def rows(self, args: ModelArgs) -> list[int]:
        """Of each that a fused matrix holds."""
        return [args.count_rows(name.rpartition(".")[2]) for name in self.fused]


def find_places(family: Family, names: Iterable[str]) -> dict[str, Place]:
    """Where each canonical tensor is among a source's tensors of these names.

    Raises:
        UserError: if two of them are the same one.
    """
    found: dict[str, Place] = {}

    def put(ours: str, place: Place) -> None:
        if ours in found:
            raise UserError(
                f"{found[ours].names[0]} and {place.names[0]} are one and the same tensor, {ours}: "
                "take one of them out of the checkpoint"
            )
        found[ours] = place

    experts: dict[str, dict[int, str]] = {}
    inverse = {theirs: ours for ours, theirs in family.names.items()}
    for name in names:
        module, _, part = name.rpartition(".")
        module = _renamed(module, family.also)
        if expert := _expert(family, module):
            stacked, number = expert
            experts.setdefault(f"{_renamed(stacked, inverse)}.{part}", {})[number] = name
        elif theirs := next((t for t in family.fused if module.endswith(f".{t}")), None):
            prefix, modules = _renamed(module.removesuffix(theirs), inverse), family.fused[theirs]
            for i, ours in enumerate(modules):
                place = Place((name,), fused=modules, index=i, by_head=family.fused_by_head)
                put(f"{prefix}{ours}.{part}", place)
        else:
            put(f"{_renamed(module, inverse)}.{part}", Place((name,)))
    for name, numbered in experts.items():
        if sorted(numbered) == [*range(len(numbered))]:  # else some are missing: so is the whole
            put(name, Place(tuple(numbered[i] for i in sorted(numbered)), stacked=True))
    return found


def find_shape(
    place: Place, shapes: Mapping[str, tuple[int, ...]], args: ModelArgs
) -> tuple[int, ...]:
    """The shape of a canonical tensor; of a fused matrix, what the others leave for it.

    Raises:
        UserError: for experts of several shapes.
    """
    first = tuple(shapes[place.names[0]])
    for name in place.names:
        if shapes[name] != first:
            raise UserError(
                f"{name} has shape {shapes[name]}, {place.names[0]} {first}: experts are all "
                "alike; download the checkpoint again"
            )
    if place.fused:
        rows = place.rows(args)
        return (first[0] - sum(rows) + rows[place.index], *first[1:]) if first else first
    return (len(place.names), *first) if place.stacked else first


def arrange(place: Place, arrays: Arrays, args: ModelArgs) -> mx.array:
    """A canonical tensor out of its source's."""
    if place.stacked:
        return mx.stack([arrays[name] for name in place.names])
    whole = arrays[place.names[0]]
    if not place.fused:
        return whole
    if place.by_head:
        count = len(place.fused)
        heads = whole.reshape(args.num_attention_heads, count, -1, *whole.shape[1:])
        return heads[:, place.index].reshape(-1, *whole.shape[1:])
    start, end = ([0, *accumulate(place.rows(args))][place.index + i] for i in (0, 1))
    return whole[start:end]


def to_source_names(
    family: Family, tensors: Arrays, args: ModelArgs, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Canonical tensors, a whole layer's at a time, as a family's files have them.

    Gains of stream norms lose the family's offset and are stored in ``dtype``.
    """
    return rename_to_source(family, _store_gains(tensors, family.gain_offset, dtype), args)


def rename_to_source(family: Family, tensors: Arrays, args: ModelArgs) -> dict[str, mx.array]:
    """The same, with the values as they are."""
    out: dict[str, mx.array] = {}
    left = dict(tensors)
    for theirs, ours in family.fused.items():
        first = f".{ours[0]}."
        for name in [name for name in left if first in name and _fuses(family, theirs, name, args)]:
            prefix, part = name.split(first)
            parts = [left.pop(f"{prefix}.{module}.{part}") for module in ours]
            if family.fused_by_head:
                heads = [p.reshape(args.num_attention_heads, -1, *p.shape[1:]) for p in parts]
                whole = mx.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])
            else:
                whole = mx.concatenate(parts)
            out[f"{_renamed(prefix, family.names)}.{theirs}.{part}"] = whole
    for name, array in left.items():
        module, _, part = name.rpartition(".")
        out[f"{_renamed(module, family.names)}.{part}"] = array
    return out


def to_published_names(
    family: Family, tensors: Arrays, args: ModelArgs, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """As ``in_family``, but experts one by one, where the family's authors have them so."""
    out: dict[str, mx.array] = {}
    left = dict(tensors)
    for theirs, ours in family.experts.items() if args.num_local_experts else ():
        for name in [name for name in left if f".{ours}." in name]:
            stacked = left.pop(name)
            prefix, part = name.split(ours)
            for i in range(args.num_local_experts):
                out[f"{prefix}{theirs.format(i)}{part}"] = stacked[i]
    return out | to_source_names(family, left, args, dtype)


def to_source_module(family: Family, module: str, args: ModelArgs) -> str:
    """A canonical module path as a family calls it."""
    for theirs, ours in family.fused.items():
        for one in ours:
            if module.endswith(one) and _fuses(family, theirs, module, args):
                return _renamed(module.removesuffix(one) + theirs, family.names)
    return _renamed(module, family.names)


def _fuses(family: Family, theirs: str, canonical: str, args: ModelArgs) -> bool:
    """Whether a layer has a fused matrix: all of them where a family's are by head, else chosen."""
    return family.fused_by_head or parse_layer(canonical) in args.fused.get(
        theirs.rpartition(".")[2], ()
    )


def to_canonical_modules(family: Family, module: str) -> list[str]:
    """The canonical paths of a family's module."""
    return [name.removesuffix(".weight") for name in find_places(family, [f"{module}.weight"])]


def _expert(family: Family, module: str) -> tuple[str, int] | None:
    """Of a single expert's module, the one that holds all, and its number."""
    for theirs, ours in family.experts.items():
        before, after = map(re.escape, theirs.split("{}"))
        if match := re.fullmatch(rf"(.*\.){before}(0|[1-9][0-9]{{0,8}}){after}", module):
            return f"{match[1]}{ours}", int(match[2])
    return None


def _renamed(module: str, names: Mapping[str, str]) -> str:
    """A path with whole dotted parts of it called otherwise, in the order of ``names``."""
    for old, new in names.items():
        module = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", module)
    return module


def restore_gains(tensors: Arrays, gain_offset: float) -> dict[str, mx.array]:
    """Tensors as they act: gains of stream norms that are stored less an offset, in float32."""
    return {
        name: array.astype(mx.float32) + gain_offset
        if gain_offset and is_stream_norm_weight(name)
        else array
        for name, array in tensors.items()
    }


def _store_gains(tensors: Arrays, gain_offset: float, dtype: mx.Dtype) -> Arrays:
    """The inverse of ``restore_gains``, rounded to ``dtype``."""
    if not gain_offset:
        return tensors
    return {
        name: (array - gain_offset).astype(dtype) if is_stream_norm_weight(name) else array
        for name, array in tensors.items()
    }
