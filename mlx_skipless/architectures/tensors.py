"""A family's tensor names and layouts: renamed, cut out of fused matrices, stacked from experts.

A fused matrix holds several row behind row, or head by head: the rows of the first one's first
head, then of the second one's first head, and so on. All of this moves whole rows only, so the
parts of packed matrices are moved just as dense ones: weights that share a scale lie along a row.

Gemma's files store the weights of stream norms less one: ``restore_gains`` adds that offset when
they are read, ``to_source_names`` subtracts it when they are written, and besides these only
``conversion/job.py`` knows of it, which copies packed sources as they are.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from ..errors import UserError
from ..network.model import ModelArgs
from ..network.names import is_stream_norm_weight
from ..network.parts import Arrays
from ..network.wiring import parse_layer
from .family import Family


@dataclass(frozen=True)
class Place:
    """Where a canonical tensor is among a source's tensors.

    Attributes:
        names: the source's tensors that hold it; one, or one per expert if ``stacked``.
        stacked: whether it is a stack of those.
        fused: the canonical modules that the source's one tensor holds; empty: this one alone.
        index: which of ``fused`` it is.
        by_head: whether the source's tensor has each head's rows together.
    """

    names: tuple[str, ...]
    stacked: bool = False
    fused: tuple[str, ...] = ()
    index: int = 0
    by_head: bool = False

    def count_rows(self, args: ModelArgs) -> list[int]:
        """Count the rows of each module that the source's tensor holds."""
        return [args.count_rows(name.rpartition(".")[2]) for name in self.fused]


def find_places(family: Family, names: Iterable[str]) -> dict[str, Place]:
    """Find each canonical tensor among a source's tensors of these names.

    Raises:
        UserError: if two of the source's tensors are the same canonical one.
    """
    found: dict[str, Place] = {}

    def put(canonical: str, place: Place) -> None:
        if canonical in found:
            raise UserError(
                f"{found[canonical].names[0]} and {place.names[0]} are one and the same tensor, "
                f"{canonical}: take one of them out of the checkpoint"
            )
        found[canonical] = place

    experts: dict[str, dict[int, str]] = {}
    canonical_names = {theirs: ours for ours, theirs in family.names.items()}
    for name in names:
        module, _, part = name.rpartition(".")
        if not {*family.others}.isdisjoint(module.split(".")):
            continue
        module = _rename(module, family.also)
        if expert := _parse_expert(family, module):
            stacked, number = expert
            experts.setdefault(f"{_rename(stacked, canonical_names)}.{part}", {})[number] = name
        elif theirs := next((t for t in family.fused if module.endswith(f".{t}")), None):
            prefix = _rename(module.removesuffix(theirs), canonical_names)
            modules = family.fused[theirs]
            for i, ours in enumerate(modules):
                place = Place((name,), fused=modules, index=i, by_head=family.fused_by_head)
                put(f"{prefix}{ours}.{part}", place)
        else:
            put(f"{_rename(module, canonical_names)}.{part}", Place((name,)))
    for name, numbered in experts.items():
        if sorted(numbered) == [*range(len(numbered))]:  # else some are missing: so is the whole
            put(name, Place(tuple(numbered[i] for i in sorted(numbered)), stacked=True))
    return found


def list_shapes(
    places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """List canonical tensors with the shapes of the source's first tensor that holds each.

    ``places`` are what ``find_places`` found, ``shapes`` those of the source's tensors.
    """
    return {name: shapes[place.names[0]] for name, place in places.items()}


def find_shape(
    place: Place, shapes: Mapping[str, tuple[int, ...]], args: ModelArgs
) -> tuple[int, ...]:
    """Return the shape of a canonical tensor; in a fused matrix, what the others leave for it.

    Args:
        place: where the tensor is.
        shapes: of the source's tensors.
        args: the network.

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
        rows = place.count_rows(args)
        return (first[0] - sum(rows) + rows[place.index], *first[1:]) if first else first
    return (len(place.names), *first) if place.stacked else first


def arrange(place: Place, arrays: Arrays, args: ModelArgs) -> mx.array:
    """Make a canonical tensor out of its source's tensors, stacked, cut out or as it is."""
    if place.stacked:
        return mx.stack([arrays[name] for name in place.names])
    whole = arrays[place.names[0]]
    if not place.fused:
        return whole
    if place.by_head:
        # (heads, modules, rows of a head, ...), of which one module is taken
        heads = whole.reshape(args.num_attention_heads, len(place.fused), -1, *whole.shape[1:])
        return heads[:, place.index].reshape(-1, *whole.shape[1:])
    start, end = ([0, *accumulate(place.count_rows(args))][place.index + i] for i in (0, 1))
    return whole[start:end]


def to_source_names(
    family: Family, tensors: Arrays, args: ModelArgs, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Return canonical tensors as a family's files have them.

    Args:
        family: the family of the files.
        tensors: whole layers, so that all parts of a fused matrix are there.
        args: the network, and with ``fused`` which of its matrices are one.
        dtype: what the weights of stream norms are stored in, where they lose the family's offset.
    """
    if family.gain_offset:
        tensors = {
            name: (array - family.gain_offset).astype(dtype)
            if is_stream_norm_weight(name)
            else array
            for name, array in tensors.items()
        }
    return rename_to_source(family, tensors, args)


def rename_to_source(family: Family, tensors: Arrays, args: ModelArgs) -> dict[str, mx.array]:
    """Rename and fuse canonical tensors as ``to_source_names`` does, but change no value."""
    out: dict[str, mx.array] = {}
    rest = dict(tensors)
    for theirs, ours in family.fused.items():
        first = f".{ours[0]}."
        for name in [name for name in rest if first in name and _fuses(family, theirs, name, args)]:
            prefix, part = name.split(first)
            parts = [rest.pop(f"{prefix}.{module}.{part}") for module in ours]
            if family.fused_by_head:
                heads = [p.reshape(args.num_attention_heads, -1, *p.shape[1:]) for p in parts]
                whole = mx.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])
            else:
                whole = mx.concatenate(parts)
            out[f"{_rename(prefix, family.names)}.{theirs}.{part}"] = whole
    for name, array in rest.items():
        module, _, part = name.rpartition(".")
        out[f"{_rename(module, family.names)}.{part}"] = array
    return out


def to_published_names(
    family: Family, tensors: Arrays, args: ModelArgs, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Return canonical tensors as a family's authors publish them, experts one by one.

    Arguments are those of ``to_source_names``, which leaves experts stacked, as mlx-lm has them.
    """
    out: dict[str, mx.array] = {}
    rest = dict(tensors)
    for theirs, ours in family.experts.items() if args.num_local_experts else ():
        for name in [name for name in rest if f".{ours}." in name]:
            stacked = rest.pop(name)
            prefix, part = name.split(ours)
            for i in range(args.num_local_experts):
                out[f"{prefix}{theirs.format(i)}{part}"] = stacked[i]
    return out | to_source_names(family, rest, args, dtype)


def to_source_module(family: Family, module: str, args: ModelArgs) -> str:
    """Return a canonical module's path in a family's files; a fused matrix's for its parts."""
    for theirs, ours in family.fused.items():
        for one in ours:
            if module.endswith(one) and _fuses(family, theirs, module, args):
                return _rename(module.removesuffix(one) + theirs, family.names)
    return _rename(module, family.names)


def to_canonical_modules(family: Family, module: str) -> list[str]:
    """Return the canonical paths of a family's module: several for a fused matrix."""
    return [name.removesuffix(".weight") for name in find_places(family, [f"{module}.weight"])]


def restore_gains(tensors: Arrays, gain_offset: float) -> dict[str, mx.array]:
    """Return canonical tensors with the weights of stream norms as the network uses them.

    These gain the offset that a family stores them without, and are float32 then.
    """
    return {
        name: array.astype(mx.float32) + gain_offset
        if gain_offset and is_stream_norm_weight(name)
        else array
        for name, array in tensors.items()
    }


def _fuses(family: Family, theirs: str, canonical: str, args: ModelArgs) -> bool:
    """Tell whether a layer has a fused matrix: each does by head, else those that ``args`` name."""
    matrix = theirs.rpartition(".")[2]
    return family.fused_by_head or parse_layer(canonical) in args.fused.get(matrix, ())


def _parse_expert(family: Family, module: str) -> tuple[str, int] | None:
    """Return the module that holds all experts, and this one's number; None for other modules."""
    for theirs, ours in family.experts.items():
        before, after = map(re.escape, theirs.split("{}"))
        if match := re.fullmatch(rf"(.*\.){before}(0|[1-9][0-9]{{0,8}}){after}", module):
            return f"{match[1]}{ours}", int(match[2])
    return None


def _rename(module: str, names: Mapping[str, str]) -> str:
    """Replace whole dotted parts of a path, in the order of ``names``."""
    for old, new in names.items():
        module = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", module)
    return module
