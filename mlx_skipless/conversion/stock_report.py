"""What the conversion of a network of mlx-lm's own did, in numbers."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..architectures.wrappers import describe_left_out
from ..errors import UserError
from ..inference.sizes import count_bytes_read, count_cache_bytes
from ..network import reduced
from ..network.parts import dtype_name
from ..network.stock import StockNetwork
from ..quantization.coverage import Packing, describe_undivided
from ..quantization.sensitivity import DROP, REPLACE
from ..removal.renumbering import rename_layer
from ..removal.sublayers import describe_wishes
from .decisions import describe_bits
from .planning import SAVINGS, list_wishes
from .report import ChoiceRow, LayerRow, Report
from .stock import StockJob, find_ways

Sizes = Mapping[str, tuple[int, int]]  # weights and bytes of a module's own tensors, by path


def make_report(
    job: StockJob,
    network: StockNetwork,
    model: nn.Module,
    config: Mapping[str, Any],
    undropped: nn.Module,
) -> Report:
    """Report a conversion as far as it is decided, before its result is written.

    Args:
        job: all decided.
        network: the source's.
        model: the result, with lazy weights.
        config: its config.json.
        undropped: the same without drops.
    """
    source, width = job.source, job.source.dtype.size
    whole, after = _measure_sizes(source.model), _measure_sizes(model)
    before = {path: (count, count * width) for path, (count, _) in whole.items()}
    packed = [module for module in model.modules() if "scales" in module]
    formats = Counter((getattr(m, "mode", "affine"), m.bits, m.group_size) for m in packed)
    options = job.options
    kept_packed = source.is_packed and not job.requantized
    asked = options.drops or options.replacements or options.quantization
    nothing = not (asked or kept_packed or reduced.DROPPED in source.config)
    bytes_after = _total(after, 1)
    left_out = filter(None, [describe_left_out(source.config)])
    return Report(
        source=source.name,
        output=None,
        packing=source.packing if source.gguf is None else source.gguf.packing,
        kept_packed=kept_packed,
        dtype=dtype_name(job.dtype),
        quantization=config.get("quantization"),
        packings=tuple(Packing(*one, count) for one, count in formats.most_common()),
        bits_per_weight=8 * bytes_after / _total(after, 0),
        params_before=_total(before, 0),
        params_after=_total(after, 0),
        bytes_before=_total(before, 1),
        bytes_after=bytes_after,
        removed={kind: layers for kind, layers in job.dropped.items() if layers},
        replaced=job.replaced,
        folded=(),
        stock=reduced.DROPPED not in config,
        skipless=False,
        cache_bytes_after=_try(model),  # before all else that runs it
        speedup_from_bytes=count_bytes_read(undropped) / count_bytes_read(model),
        first_layer=None,
        cache_bytes_before=count_cache_bytes(source.model, 1),
        rows=tuple(_make_rows(job, network.paths, before, after)),
        notes=(*left_out, *job.notes, *_list_notes(job, model)),
        advice=(SAVINGS,) if nothing else (),
        warnings=(),
        verification=None,
        seconds=0.0,
        stages={},
        peak_memory_bytes=0,
        choices=() if job.found is None else tuple(_explain_choices(job, network, model)),
        curves={} if job.found is None else job.found.list_curves(),
    )


def add_wishes(report: Report, job: StockJob, network: StockNetwork) -> Report:
    """Add to a plan's report what shall be dropped and is not chosen yet."""
    asked = list_wishes(job.options.drops), list_wishes(job.options.replacements, "replace")
    if job.options.allow:
        ways = find_ways(job.options, network)
        note = (
            f"which of {len(ways)} sub-layers go, and which bits the other matrices get, is "
            "measured when converting"
        )
        return replace(report, notes=(*report.notes, note), stock=False)
    if not any(asked):
        return report

    def count(kind: str) -> int:
        layers = range(len(network.paths))
        could = (network.count_weights(n, kind) for n in layers if network.can_drop(n, kind))
        return min(could, default=0)

    notes = [describe_wishes(count, drops)] if (drops := asked[0]) else []
    if replacements := asked[1]:
        what = " and ".join(
            f"{w.count or 'what --max-loss allows of'} {w.kind}" for w in replacements
        )
        notes.append(f"which layers get a matrix in the place of theirs is measured, too: {what}")
    stock = report.stock and {*job.options.drops} == {"block"} and not replacements
    return replace(report, notes=(*report.notes, *notes), stock=stock)


def _list_notes(job: StockJob, model: nn.Module) -> Iterator[str]:
    yield from _describe_origin(job)
    yield from describe_bits(job.bits)
    if (q := job.options.quantization) is not None:
        undivided = describe_undivided(model, q, job.dtype)
        yield from () if undivided is None else (undivided,)


def _describe_origin(job: StockJob) -> Iterator[str]:
    if (file := job.source.gguf) is not None:
        yield from file.notes
        if job.source.is_packed and not job.requantized:
            yield file.packed.describe()
    if job.found is not None:
        gone = sum(reason.way is not None for reason in job.found.reasons.values())
        why = ", for the bytes that they free" if gone else ""
        tried = len(job.found.tried)
        yield (
            f"of {len(job.found.reasons)} sub-layers {gone or 'none'} went{why}; "
            f"{tried} result{' was' if tried == 1 else 's were'} measured"
        )
    if job.path:
        steps = ", ".join(map(str, job.path))
        yield f"loss on the text, nats per token, whole and after each step: {steps}"


def _explain_choices(job: StockJob, network: StockNetwork, model: nn.Module) -> Iterator[ChoiceRow]:
    """Tell of each sub-layer that could go why it stays or goes, in the order of the layers."""
    assert job.found is not None
    body = network.paths[0].rsplit(".", 1)[0].rpartition(".")[0]
    words = {None: "stays", DROP: "dropped", REPLACE: "replaced"}
    for (kind, layer), reason in sorted(job.found.reasons.items(), key=lambda one: one[0][1]):
        path = network.paths[layer]
        new = path if job.layers is None else rename_layer(path, job.layers, network.paths)
        starts = tuple(f"{new}.{part}." for part in network.sublayers[layer].parts[kind])
        found = [m for p, m in model.named_modules() if p.startswith(starts) and "scales" in m]
        sizes = [_count_weights(module, "weight", module.weight) for module in found]
        bits = sum(m.bits * n for m, n in zip(found, sizes, strict=True)) / max(1, sum(sizes))
        yield ChoiceRow(
            f"{path.removeprefix(f'{body}.')} {kind}",
            words[reason.way],
            bits if sizes else None,
            reason.rounded,
            reason.lost.get(DROP),
            reason.saved.get(DROP),
            reason.lost.get(REPLACE),
            reason.saved.get(REPLACE),
        )


def _measure_sizes(model: nn.Module) -> Sizes:
    """Count each module's own weights, as they are before quantization, and its bytes."""
    found = {}
    for path, module in model.named_modules():
        own = _list_tensors(module)
        if own:
            count = sum(_count_weights(module, name, array) for name, array in own.items())
            found[path] = count, sum(array.nbytes for array in own.values())
    return found


def _list_tensors(module: nn.Module) -> dict[str, mx.array]:
    """A module's own tensors; what else it keeps is not written."""
    arrays = {name: a for name, a in module.items() if isinstance(a, mx.array)}
    return {name: a for name, a in arrays.items() if not name.startswith("_")}


def _count_weights(module: nn.Module, name: str, array: mx.array) -> int:
    if "scales" not in module:
        return array.size
    return {"weight": array.size * 32 // module.bits, "bias": array.size}.get(name, 0)


def _total(sizes: Sizes, which: int, prefix: str = "") -> int:
    """Add up the weights (0) or the bytes (1) of the modules at or under a path."""
    return sum(
        one[which]
        for path, one in sizes.items()
        if not prefix or path == prefix or path.startswith(f"{prefix}.")
    )


def _try(model: nn.Module) -> int:
    """Count the bytes of KV cache that a token takes in a result.

    Raises:
        UserError: if mlx-lm's code cannot run it.
    """
    try:
        return count_cache_bytes(model, 1)
    except (AttributeError, TypeError, ValueError) as error:  # a quantized head, for instance
        raise UserError(f"mlx-lm cannot run the result: {error}") from error


def _make_rows(job: StockJob, paths: list[str], before: Sizes, after: Sizes) -> Iterator[LayerRow]:
    inside = tuple(f"{path}." for path in paths)
    body = paths[0].rsplit(".", 2)[0]
    ends = [path for path in before if not path.startswith(inside) and path not in paths]
    for name in (*paths, *ends):
        layer = paths.index(name) if name in paths else None
        new = name if job.layers is None else rename_layer(name, job.layers, paths)
        yield LayerRow(
            name=name.removeprefix(f"{body}.").removeprefix(f"{body.rpartition('.')[0]}."),
            goes=" ".join(
                [kind for kind, layers in job.dropped.items() if layer in layers]
                + [f"{kind} (replaced)" for kind, at in job.stand_ins if at == layer]
            ),
            weights_before=_total(before, 0, name),
            weights_after=_total(after, 0, new) if new else 0,
            bytes_before=_total(before, 1, name),
            bytes_after=_total(after, 1, new) if new else 0,
            condition=None,
            cost=None,
        )
