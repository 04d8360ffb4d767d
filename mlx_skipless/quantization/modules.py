"""Quantizes a network of mlx-lm's own against text, module by module.

Which matrices are quantized, and how, mlx-lm has decided: it is read from the quantized modules,
whose weights are then replaced. Two streams of the text lie in memory, and one layer at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..network.driver import Driver, Recorder, find_ends, is_held_out, split_batches
from ..network.model import Stream
from ..network.parts import replace_at
from ..progress import Steps, tell_part
from ..removal.moments import Moments
from .ends import record, round_tied
from .fitting import fit_matrices
from .formats import Feedback, Format, Packed
from .passage import STEPS, Passage, fit_layer
from .roles import Readers, find_readers, find_writers


def read_formats(model: nn.Module, dtype: mx.Dtype) -> dict[str, Format]:
    """Read how each quantized module of a model is packed, by module path.

    ``dtype`` is that of the dense weights.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    found = {path: m for path, m in modules.items() if "scales" in m and hasattr(m, "mode")}
    return {
        path: Format(m.bits, m.group_size, m.mode, m.scales.dtype if m.mode == "affine" else dtype)
        for path, m in found.items()
    }


class Unrounded(Format):
    """The form of a matrix that stays as it is fitted."""

    def nearest(self, weight: mx.array) -> Packed:
        """Return a weight in the matrix's type."""
        return {"weight": weight.astype(self.dtype)}

    def with_feedback(self, weight: np.ndarray, feedback: Feedback) -> Packed:
        """Return a weight (out, in) in the matrix's type."""
        return self.nearest(mx.array(weight.astype(np.float32)))

    def dense(self, packed: Mapping[str, mx.array]) -> mx.array:
        """Return the weight that is stored, in float32."""
        return packed["weight"].astype(mx.float32)


class CalibratedModules:
    """Fits the modules of a network to a text, in place, in the order of the stream.

    Quantized modules are quantized, or all matrices fitted if there are none.

    A network that is no chain of layers comes as one layer. Embeddings that are not the head are
    rounded to nearest. So are matrices that ``find_readers`` leaves out.

    Args:
        network: with dense matrices, in float32.
        packed: the same network as it is stored, with lazy weights.
        dtype: of the dense weights.
        tokens: (sequences, length) of text.
        progress: called with (steps done, all), ``STEPS`` for each part: embedding, layers, head.
        whole: the network that has all sub-layers, if some are gone. Matrices are fitted to what
            it makes of the text, so that they make up for these. It is a chain of layers.
        kept: the numbers that the layers have in it.
    """

    def __init__(
        self,
        network: Driver,
        packed: nn.Module,
        dtype: mx.Dtype,
        tokens: mx.array,
        progress: Steps = lambda done, total: None,
        *,
        whole: Driver | None = None,
        kept: Sequence[int] = (),
    ):
        self._network, self._tokens, self._progress = network, split_batches(tokens), progress
        self._source = network if whole is None else whole
        self._kept = [*(kept or range(len(network.paths)))]
        self._forms = read_formats(packed, dtype) or _list_dense(packed)
        self._modules: dict[str, Any] = dict(packed.named_modules())
        inside = tuple(f"{path}." for path in network.paths if path)
        chained = self._forms if network.is_chain else ()
        outside = [path for path in chained if not path.startswith(inside)]
        self._ends = {path: self._modules[path] for path in outside}
        self._wanted: list[Stream] = []  # the source's streams
        self._streams: list[Stream] = []

    def embedding(self) -> None:
        """Let the text enter both networks, through an embedding that is rounded by now."""
        network = self._network
        self._round_tied()
        self._wanted = [self._source.embed(tokens) for tokens in self._tokens]
        begun = [network.embed(tokens, self._ends) for tokens in self._tokens]
        self._streams = [h.astype(mx.float32) if network.is_chain else h for h in begun]
        mx.eval(self._wanted, self._streams)
        network.release()
        self._source.release()

    def _round_tied(self) -> None:
        """Round an embedding that is the head too, by what is read there."""
        if not self._ends:
            return
        before, behind = find_ends(self._network)
        for path in sorted(before & behind & self._ends.keys()):
            packed = round_tied(self._source, path, self._tokens, self._forms[path])
            self._modules[path].update(packed)

    def layer(self, layer: int) -> None:
        """Quantize a layer; to be called once for each, first to last."""
        network, tokens, streams = self._network, self._tokens, self._streams
        prefix = f"{network.paths[layer]}.".removeprefix(".")
        forms = {
            path.removeprefix(prefix): form
            for path, form in self._forms.items()
            if path.startswith(prefix)
        }
        result = network.layer(layer)
        readers = find_readers(network, layer, result, streams[0], tokens[0], [*forms])
        writers = find_writers(network, layer, result, streams[0], tokens[0], readers)
        readers = replace(readers, writers=writers)
        source = result if self._source is network else self._find_whole(layer, result, readers)
        for path in forms.keys() - {*readers.paths}:
            nearest = forms[path].dense(_list_parts(self._modules[prefix + path]))
            result = replace_at(result, f"{path}.weight", nearest)
        passage = Passage(network, layer, tokens, self._wanted, streams, readers, source)
        tell = tell_part(self._progress, 1 + layer, 2 + len(network.paths))
        packed, result = fit_layer(passage, result, forms, progress=tell)
        for path, parts in packed.items():
            self._modules[prefix + path].update(parts)
        if network.is_chain:
            passage.advance(result)

    def _find_whole(self, layer: int, result: nn.Module, readers: Readers) -> nn.Module:
        """Return the whole network's layer, which its streams have reached.

        It has all matrices that are fitted: those that stand in for a sub-layer stand beside it.
        """
        self._pass(self._kept[layer - 1] + 1 if layer else 0, self._kept[layer])
        whole = self._source.layer(self._kept[layer])
        modules, there = dict(result.named_modules()), dict(whole.named_modules())
        for path in readers.paths:
            if path not in there:
                parent = path.rpartition(".")[0]
                whole = replace_at(whole, parent, _Beside(there[parent], modules[path]))
        return whole

    def _pass(self, first: int, end: int) -> None:
        """Let the whole network's streams pass layers that are gone as a whole."""
        for layer in range(first, end):
            block = self._source.layer(layer)
            for i, tokens in enumerate(self._tokens):
                self._wanted[i] = self._source.run(layer, self._wanted[i], tokens, block)
                mx.eval(self._wanted[i])

    def head(self) -> None:
        """Quantize what stands behind the layers, unless it is the embedding."""
        before, behind = find_ends(self._network)
        modules = dict(self._network.model.named_modules())
        heads = [path for path in sorted(behind - before) if path in self._ends]
        heads = [path for path in heads if isinstance(modules[path], nn.Linear)]
        if heads:
            self._pass(self._kept[-1] + 1, len(self._source.paths))
        for path in heads:
            bias = modules[path].get("bias", 0)
            moments = Moments(), Moments()
            for i, wanted in enumerate(self._wanted):
                y = record(self._source, path, wanted).y - bias
                x = record(self._network, path, self._streams[i], self._ends).x
                moments[is_held_out(i)].add(x, {path: y})
            found = fit_matrices(*moments, {path: modules[path]["weight"]}, self._forms)
            self._modules[path].update(found[path])
        count = STEPS * (2 + len(self._network.paths))
        self._progress(count, count)


def _list_dense(model: nn.Module) -> dict[str, Format]:
    """The forms of a network's matrices if they stay as they are, by module path."""
    modules = ((path, m) for path, m in model.named_modules() if hasattr(m, "to_quantized"))
    return {
        path: Unrounded(16, 1, "affine", module.weight.dtype)
        for path, module in modules
        if not isinstance(module, nn.Embedding)
    }


class _Beside(Recorder):
    """A sub-layer that runs with the matrix beside it that stands in for it."""

    def __init__(self, inner: Any, linear: nn.Module):
        super().__init__(inner)
        self.linear = linear

    def __call__(self, *args: Any, **options: Any) -> Any:
        x, *_ = (*args, *options.values())
        self.linear(x)
        return self.inner(*args, **options)


def _list_parts(module: Any) -> Packed:
    return {
        part: module[part]
        for part in ("weight", "scales", "biases")
        if module.get(part) is not None
    }
