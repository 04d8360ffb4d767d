"""A family's tensor names and layouts: renamed, cut out of fused matrices, stacked from experts.

Everything is rows, so packed matrices' parts are arranged just as dense ones: groups of weights
that share a scale lie along a row.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from .families import Family
from .model import ModelArgs

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True)
class Place:
    """Where a canonical tensor is.

    ``names`` are the source's tensors, of an expert each if ``stacked``; of a fused one it is the
    ``index``-th of ``count``.
    """

    names: tuple[str, ...]
    stacked: bool = False
    index: int = 0
    count: int = 1


def places(family: Family, names: Iterable[str]) -> dict[str, Place]:
    """Where each canonical tensor is among a source's tensors of these names."""
    found: dict[str, Place] = {}
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
                place = Place((name,), index=i, count=len(modules))
                found[f"{prefix}{ours}.{part}"] = place
        else:
            found[f"{_renamed(module, inverse)}.{part}"] = Place((name,))
    for name, numbered in experts.items():
        found[name] = Place(tuple(numbered[i] for i in sorted(numbered)), stacked=True)
    return found


def shape(place: Place, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a canonical tensor."""
    found = [tuple(shapes[name]) for name in place.names]
    odd = next((other for other in found if other != found[0]), found[0])
    if place.count > 1:
        return (odd[0] // place.count if odd and odd[0] % place.count == 0 else -1, *odd[1:])
    return (len(found), *odd) if place.stacked else odd


def arranged(place: Place, arrays: Arrays, args: ModelArgs) -> mx.array:
    """A canonical tensor out of its source's."""
    if place.stacked:
        return mx.stack([arrays[name] for name in place.names])
    whole = arrays[place.names[0]]
    if place.count == 1:
        return whole
    heads = whole.reshape(args.num_attention_heads, place.count, -1, *whole.shape[1:])
    return heads[:, place.index].reshape(-1, *whole.shape[1:])


def in_family(family: Family, tensors: Arrays, args: ModelArgs) -> dict[str, mx.array]:
    """Canonical tensors, a whole layer's at a time, under a family's names and in its layout."""
    out: dict[str, mx.array] = {}
    left = dict(tensors)
    for theirs, ours in family.fused.items():
        first = f".{ours[0]}."
        for name in [name for name in left if first in name]:
            prefix, part = name.split(first)
            parts = [left.pop(f"{prefix}.{module}.{part}") for module in ours]
            heads = [p.reshape(args.num_attention_heads, -1, *p.shape[1:]) for p in parts]
            whole = mx.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])
            out[f"{_renamed(prefix, family.names)}.{theirs}.{part}"] = whole
    for name, array in left.items():
        module, _, part = name.rpartition(".")
        out[f"{_renamed(module, family.names)}.{part}"] = array
    return out


def in_source(family: Family, tensors: Arrays, args: ModelArgs) -> dict[str, mx.array]:
    """As ``in_family``, but experts one by one, where the family's authors have them so."""
    out: dict[str, mx.array] = {}
    left = dict(tensors)
    for theirs, ours in family.experts.items() if args.num_local_experts else ():
        for name in [name for name in left if f".{ours}." in name]:
            stacked = left.pop(name)
            prefix, part = name.split(ours)
            for i in range(args.num_local_experts):
                out[f"{prefix}{theirs.format(i)}{part}"] = stacked[i]
    return out | in_family(family, left, args)


def module_in_family(family: Family, module: str) -> str:
    """A canonical module path as a family calls it."""
    for theirs, ours in family.fused.items():
        for one in ours:
            if module.endswith(one):
                module = module.removesuffix(one) + theirs
    return _renamed(module, family.names)


def canonical_modules(family: Family, module: str) -> list[str]:
    """The canonical paths of a family's module."""
    return [name.removesuffix(".weight") for name in places(family, [f"{module}.weight"])]


def _expert(family: Family, module: str) -> tuple[str, int] | None:
    """Of a single expert's module, the one that holds all, and its number."""
    for theirs, ours in family.experts.items():
        before, after = map(re.escape, theirs.split("{}"))
        if match := re.fullmatch(rf"(.*\.){before}(\d+){after}", module):
            return f"{match[1]}{ours}", int(match[2])
    return None


def _renamed(module: str, names: Mapping[str, str]) -> str:
    """A path with whole dotted parts of it called otherwise, in the order of ``names``."""
    for old, new in names.items():
        module = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", module)
    return module
