"""Which matrices are packed, at what bits, and what to tell of those that stay as they are.

MLX packs whole groups of a matrix's inputs, so a format can hold only some widths.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..constants import MODES
from ..errors import UserError
from ..network.model import Model, ModelArgs
from ..network.parts import dtype_name
from .layout import Layout
from .settings import Quantization


@dataclass(frozen=True)
class Packing:
    """Matrices of one format.

    Attributes:
        mode, bits, group_size: of the format.
        matrices: how many there are.
    """

    mode: str
    bits: int
    group_size: int
    matrices: int


def count_packings(layout: Layout) -> tuple[Packing, ...]:
    """Count a layout's packed matrices by format, the most frequent first."""
    found = Counter(layout.settings.values())
    return tuple(
        Packing(mode, bits, group_size, count)
        for (group_size, bits, mode), count in found.most_common()
    )


def find_widest(args: ModelArgs) -> int:
    """The inputs of the widest matrix of a network of ours."""
    return max(args.hidden_size, args.intermediate_size, args.num_attention_heads * args.head_dim)


def find_widths(model: nn.Module) -> dict[str, int]:
    """The inputs of each matrix that a format holds or could hold, by module path."""
    modules: dict[str, Any] = dict(model.named_modules())
    dense = {p: m.weight.shape[-1] for p, m in modules.items() if hasattr(m, "to_quantized")}
    packed = {p: m.scales.shape[-1] * m.group_size for p, m in modules.items() if "scales" in m}
    return dense | packed


def check_packable(model: nn.Module, q: Quantization) -> None:
    """Refuse a quantization whose groups divide the inputs of no matrix of a dense model.

    Raises:
        UserError: if none can be quantized; it names the widths, and a choice that works.
    """
    widths, size = sorted({*find_widths(model).values()}), q.usual_group_size
    if not widths or _divides_any(size, widths):
        return
    sizes = [f"--q-group-size {s}" for s in MODES[q.mode][0] if _divides_any(s, widths)]
    modes = [f"-q --q-mode {m}" for m, (s, _) in MODES.items() if _divides_any(s[0], widths)]
    ways = sizes or modes
    raise UserError(
        f"nothing of this model can be quantized in groups of {size}: its matrices have "
        f"{_join(widths, 'or')} inputs; "
        + (f"use {_join(ways, 'or')}" if ways else "no format's groups divide that, leave it dense")
    )


def describe_dense(layout: Layout) -> str | None:
    """Tell which matrices stay as they are in a quantized layout; None if all are packed."""
    q, widths = layout.quantization, find_widths(Model(layout.args))
    dense = {path: width for path, width in widths.items() if path not in layout.settings}
    if q is None or not dense:
        return None
    return _describe_dense(widths, dense, q, layout.dtype)


def describe_undivided(model: nn.Module, q: Quantization, dtype: mx.Dtype) -> str | None:
    """Tell which matrices of a quantized model stay as they are because no group divides them.

    What else stays is mlx-lm's choice. Returns None if there are none.
    """
    widths = find_widths(model)
    packed = {path for path, module in model.named_modules() if "scales" in module}
    size = q.usual_group_size
    dense = {path: n for path, n in widths.items() if path not in packed and n % size}
    return _describe_dense(widths, dense, q, dtype) if dense else None


def _describe_dense(
    widths: dict[str, int], dense: dict[str, int], q: Quantization, dtype: mx.Dtype
) -> str:
    size = q.usual_group_size
    odd = sorted({width for width in dense.values() if width % size})
    kinds: dict[tuple[str, int], list[int]] = {}
    for path, width in reversed(dense.items()):
        *_, layer, block, name = ("", "", *path.split("."))
        inside = layer.isdecimal()
        kind = f"{block}.{name}" if inside else name
        kinds.setdefault((kind, width), []).extend([int(layer)] if inside else [])
    names = [
        f"{kind} ({width} inputs){_name_layers(sorted(layers))}"
        for (kind, width), layers in kinds.items()
    ]
    why = f"groups of {size} do not divide {_join(odd, 'or')} inputs" if odd else ""
    fits = [s for s in MODES[q.mode][0] if not any(width % s for width in odd)]
    why += f" (--q-group-size {fits[0]} does)" if odd and fits else ""
    if any(width % size == 0 for width in dense.values()):
        why += "; " * bool(why) + "beside a removed matrix some need more bits than a format has"
    return (
        f"{len(dense)} of {len(widths)} matrices stay in {dtype_name(dtype)}, "
        f"{_join(names, 'and')}: {why}"
    )


def _divides_any(size: int, widths: Iterable[int]) -> bool:
    return any(width % size == 0 for width in widths)


def _join(parts: Sequence[object], word: str) -> str:
    *others, last = map(str, parts)
    return f"{', '.join(others)} {word} {last}" if others else last


def _name_layers(layers: Sequence[int]) -> str:
    """Layers as ranges, " of layers 0-3, 5"; nothing if there are none."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    ranges = [
        f"{first}" if first == last else f"{first}-{last}"
        for first, last in zip(starts, ends, strict=True)
    ]
    return f" of layers {', '.join(ranges)}" if ranges else ""
