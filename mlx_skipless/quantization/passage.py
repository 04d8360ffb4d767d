"""Fits the matrices of one layer, one after another, to what the source's give on a text.

Nothing here knows an architecture. Which matrices read the same is found by running the layer:
those are observed together, in the order in which the layer meets them. Each is fitted by least
squares, so that from what the result's layers so far make of the text it gives what the source's
gives from its own inputs. Where its output is added to the stream, it is fitted so that the stream
becomes the source's, errors of all layers before included. Then it is rounded with error feedback.

Experts are fitted by the tokens that the source's router sends to each of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UserError
from ..network.driver import Driver, is_held_out
from ..network.model import Stream, take_stream
from ..network.parts import replace_at
from ..progress import Steps
from ..removal.moments import Moments
from .fitting import fit_matrices, round_together
from .formats import Format, Packed
from .roles import Called, Given, Readers, Routed, is_expert, silence

STEPS = 4  # that progress tells of for each part of a network
SPARSE = 4  # an expert that sees fewer tokens than one in so many inputs is rounded to nearest
OVERFLOWS = "activations overflow float32 at {} on the text to quantize against"

Rewrite = Callable[[str, mx.array], mx.array]


def fit_layer(
    passage: "Passage",
    result: nn.Module,
    forms: Mapping[str, Format],
    *,
    rewrite: Rewrite = lambda path, y: y,
    progress: Steps = lambda done, total: None,
    overflows: str = OVERFLOWS,
) -> tuple[dict[str, Packed], nn.Module]:
    """Quantize the matrices of a layer against text.

    Args:
        passage: the text on its way through the layer.
        result: the layer with dense matrices, in float32.
        forms: how each matrix is rounded, by its path in the layer.
        rewrite: what a matrix writes in the source, as the result should have it.
        progress: called with (steps done, all).
        overflows: the error's text, with a place for where it was.

    Returns:
        The packed matrices by path, and the layer with what they stand for.

    Raises:
        UserError: if activations overflow.
    """
    packed: dict[str, Packed] = {}
    groups = passage.readers.groups
    for done, group in enumerate(groups):
        progress(STEPS * done // len(groups), STEPS)
        modules = dict(result.named_modules())
        fit = _fit_experts if is_expert(modules[group[0]]) else _fit_shared
        read = passage.observe(result, group, late=done >= len(groups) - 2)
        try:
            new = fit(read, {path: modules[path] for path in group}, forms, rewrite)
        except OverflowError:
            where = f"{passage.where}.{group[0]}".removeprefix(".")
            raise UserError(overflows.format(where)) from None
        for path, parts in new.items():
            # What comes behind is fitted to what this matrix gives from now on.
            result = replace_at(result, f"{path}.weight", forms[path].dense(parts))
        packed |= new
        passage.settle(result, group)
    return packed, result


@dataclass
class _Reading:
    """What the matrices of a group read in one batch, and what they should give there.

    ``weights`` are the tokens', (..., 1), where they do not count the same; of errors, not squares.
    """

    x: mx.array
    wanted: Mapping[str, mx.array]
    held_out: bool
    weights: mx.array | None = None
    others: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Passage:
    """A text's way through one layer while the layer's matrices become final, group by group.

    The source's layer runs once, and only as far as is asked for: MLX computes late. The result's
    runs as often as there are groups, each time from where it changed last.

    Args:
        source: the network of the layer.
        layer: its number.
        batches: the text's tokens.
        ahead: the source's streams, a batch each; they pass the layer at once, to be computed.
        streams: the result's streams; they pass it in ``advance``.
        readers: the matrices to fit.
        block: the source's layer, if it is loaded already.
    """

    def __init__(
        self,
        source: Driver,
        layer: int,
        batches: Sequence[mx.array],
        ahead: list[Stream],
        streams: list[Stream],
        readers: Readers,
        block: nn.Module | None = None,
    ):
        self._source, self._batches, self._ahead, self._streams = source, batches, ahead, streams
        self.layer, self.readers, self.where = layer, readers, source.paths[layer]
        self._wanted: list[dict[str, mx.array]] = []  # what the source's matrices give
        self._routes: list[dict[str, mx.array]] = []  # the experts that its routers choose
        self._given: list[dict[str, Any]] = [{} for _ in batches]  # by the result's final modules
        self._latest: list[_Reading] = []
        self._settled: set[str] = set()
        self._lasting: set[str] = set()  # parts that change a cache, so that they always run
        self._middles: list[dict[str, Stream]] = []  # the source's streams within the layer
        own = source.layer(layer) if block is None else block
        block, recorders = own, dict[str, Any]()
        writers = {path: writer for path, writer in readers.writers.items() if writer.behind}
        children = sorted(name for writer in writers.values() for name in writer.before)
        for path in dict.fromkeys([*readers.paths, *readers.routed, *children]):
            recorders[path] = Called(dict(block.named_modules())[path])
            block = replace_at(block, path, recorders[path])
        for i, tokens in enumerate(batches):
            h, out = ahead[i], source.run(layer, ahead[i], tokens, block)
            if source.is_chain:  # else there is nothing behind it, and its logits take much room
                ahead[i] = out
            self._wanted.append({path: recorders[path].y for path in readers.paths})
            self._routes.append({path: recorders[path].indices for path in readers.routed})
            parts = {
                path: writer.stop_behind(own, recorders, h) for path, writer in writers.items()
            }
            middles = {path: source.run(layer, h, tokens, part) for path, part in parts.items()}
            self._middles.append(middles)

    def observe(self, result: nn.Module, group: Sequence[str], *, late: bool) -> Iterator[_Reading]:
        """Run the text, a batch at a time, as far as a group of matrices.

        ``late`` says that little of the source's layer is left to compute: all of it is then, so
        that its inner numbers can go, which are the widest.
        """
        finished = self._find_finished(result)
        writer = self.readers.writers.get(group[0])
        self._latest = []
        for i, tokens in enumerate(self._batches):
            block = self._resume(result, i)
            if writer is not None:
                block = silence(block, writer.behind, self._streams[i])
            reader = Called(dict(block.named_modules())[group[0]])
            block = replace_at(block, group[0], reader)
            block = self._route(block, i)
            modules = dict(block.named_modules())
            recorders = {part: Called(modules[part]) for part in finished}
            for part, recorder in recorders.items():
                block = replace_at(block, part, recorder)
            out = self._source.run(self.layer, self._streams[i], tokens, block)
            wanted, weights = {path: self._wanted[i].pop(path) for path in group}, None
            if writer is not None:  # its matrix is to make up for what the stream misses so far
                middle = take_stream(self._middles[i].pop(group[0], self._ahead[i]))
                aim, weights = writer.aim(reader.y, take_stream(out), middle)
                wanted = {group[0]: aim}
            for part, recorder in recorders.items():
                if "y" not in recorder:
                    continue
                if recorder.has_cache:
                    self._lasting.add(part)
                else:  # what is inside it is no longer needed
                    inside = f"{part}."
                    kept = {p: y for p, y in self._given[i].items() if not p.startswith(inside)}
                    self._given[i] = kept | {part: recorder.y}
            if late and self._source.is_chain:
                mx.eval(self._ahead[i], self._wanted[i], self._routes[i], self._middles[i])
            mx.eval(reader.x, wanted, weights, self._given[i])
            others, options = reader.__dict__["given"]
            held_out = is_held_out(i)
            self._latest.append(_Reading(reader.x, {}, held_out, None, others, options))
            yield _Reading(reader.x, wanted, held_out, weights, others, options)

    def settle(self, result: nn.Module, group: Sequence[str]) -> None:
        """Take down that the matrices of a group, which were observed last, are final."""
        modules = dict(result.named_modules())
        for given, read in zip(self._given, self._latest, strict=True):
            given |= {path: modules[path](read.x, *read.others, **read.options) for path in group}
        self._latest = []
        self._settled |= {*group}

    def advance(self, result: nn.Module, ends: bool = False) -> None:
        """Let the result's streams pass the layer, all matrices of which are final.

        If the text's way ends here, only the streams of the batches that judge pass it.
        """
        for i, tokens in enumerate(self._batches):
            if ends and not is_held_out(i):
                continue
            for path in self.readers.routed:  # the result's own router chooses now
                for other in [*self._given[i]]:
                    if f"{other}.".startswith(f"{path}.") or path.startswith(f"{other}."):
                        del self._given[i][other]
            block = self._resume(result, i)
            self._streams[i] = self._source.run(self.layer, self._streams[i], tokens, block)
            mx.eval(self._streams[i], [] if ends else self._ahead[i])
            self._given[i].clear()

    def _find_finished(self, result: nn.Module) -> list[str]:
        """The parts of the layer all of whose matrices are final since the latest run."""
        places: dict[str, list[str]] = {}
        for path in self.readers.paths:
            names = path.split(".")
            for end in range(1, len(names)):
                places.setdefault(".".join(names[:end]), []).append(path)
        modules = dict(result.named_modules())
        final = {p for p, inside in places.items() if self._settled.issuperset(inside)}
        final &= modules.keys() - self._lasting  # without lists
        done = {*self._given[0]}
        final = {p for p in final if not any(f"{p}.".startswith(f"{q}.") for q in done)}
        return [p for p in final if not any(p.startswith(f"{q}.") for q in final)]

    def _resume(self, result: nn.Module, batch: int) -> nn.Module:
        """Return a copy of a layer that does not compute again what is final."""
        modules = dict(result.named_modules())
        for path, value in self._given[batch].items():
            result = replace_at(result, path, Given(modules[path], value))
        return result

    def _route(self, block: nn.Module, batch: int) -> nn.Module:
        """Return a copy of a layer whose experts get the tokens that the source's get."""
        modules = dict(block.named_modules())
        for path, indices in self._routes[batch].items():
            if path in modules:
                block = replace_at(block, path, Routed(modules[path], indices))
        return block


def _fit_shared(
    readings: Iterator[_Reading],
    modules: Mapping[str, nn.Module],
    forms: Mapping[str, Format],
    rewrite: Rewrite,
) -> dict[str, Packed]:
    """Fit and round matrices that read the same and are one for all tokens."""
    moments = Moments(), Moments()
    for read in readings:
        targets = {path: rewrite(path, y) for path, y in read.wanted.items()}
        for path in targets:
            if "bias" in modules[path]:
                targets[path] = targets[path] - modules[path]["bias"]
        weights = 1 if read.weights is None else read.weights
        targets = {path: weights * y for path, y in targets.items()}
        moments[read.held_out].add(weights * read.x, targets)
    _check_finite(*moments)
    priors = {path: module["weight"] for path, module in modules.items()}
    return fit_matrices(*moments, priors, forms)


def _fit_experts(
    readings: Iterator[_Reading],
    modules: Mapping[str, nn.Module],
    forms: Mapping[str, Format],
    rewrite: Rewrite,
) -> dict[str, Packed]:
    """Fit and round experts, each by the tokens that it sees; to nearest where these are few."""
    rows = [_list_rows(read, modules) for read in readings]
    packed: dict[str, list[Packed]] = {path: [] for path in modules}
    count = next(iter(modules.values()))["weight"].shape[0]
    for expert in range(count):
        moments = Moments(), Moments()
        for held_out, x, targets, chosen in rows:
            mine = np.flatnonzero(chosen == expert)
            if mine.size:
                pick = mx.array(mine)
                moments[held_out].add(x[pick], {path: y[pick] for path, y in targets.items()})
        _check_finite(*moments)
        weights = {path: module["weight"][expert] for path, module in modules.items()}
        for path, parts in _fit_expert(*moments, weights, forms).items():
            packed[path].append(parts)
    return {
        path: {name: mx.stack([one[name] for one in parts]) for name in parts[0]}
        for path, parts in packed.items()
    }


def _list_rows(
    read: _Reading, modules: Mapping[str, nn.Module]
) -> tuple[bool, mx.array, dict[str, mx.array], np.ndarray]:
    """A reading as one row for each token that an expert gets, and the experts' numbers."""
    indices = read.others[0]
    x = mx.broadcast_to(read.x, (*indices.shape, 1, read.x.shape[-1])).reshape(-1, read.x.shape[-1])
    targets = {}
    for path, y in read.wanted.items():
        targets[path] = y.reshape(-1, y.shape[-1])
        if "bias" in modules[path]:
            targets[path] = targets[path] - modules[path]["bias"][indices.reshape(-1)]
    return read.held_out, x, targets, np.array(indices).reshape(-1)


def _fit_expert(
    seen: Moments, judge: Moments, weights: Mapping[str, mx.array], forms: Mapping[str, Format]
) -> dict[str, Packed]:
    enough = max(-(-weight.shape[1] // SPARSE) for weight in weights.values())
    if seen.count + judge.count < enough:
        return {path: forms[path].nearest(weight) for path, weight in weights.items()}
    if seen.count >= enough and judge.count:
        return fit_matrices(seen, judge, weights, forms)
    gram = sum(found.gram for found in (seen, judge) if found.count)
    return round_together(
        {path: np.array(weight.astype(mx.float32)) for path, weight in weights.items()},
        gram,  # type: ignore[arg-type]
        forms,
    )


def _check_finite(*moments: Moments) -> None:
    if not all(found.finite for found in moments):
        raise OverflowError
