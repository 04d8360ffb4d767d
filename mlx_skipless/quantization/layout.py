"""Names, shapes and bytes of a network's tensors, before any weight exists."""

import contextlib
import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import quantize_model

from ..checkpoints.packed import MLXScheme
from ..network.model import FUSED, Model, ModelArgs, quant_predicate
from ..network.names import EMBEDDING, EXPERTS, HEAD, module_path
from ..network.parts import tensors_of
from .formats import Format
from .settings import Quantization


def quantize_nearest(
    model: nn.Module, q: Quantization, predicate: Callable[..., bool | dict[str, Any]] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantize a model to nearest, lazily and in place.

    ``predicate`` tells of a module path and its module whether it is quantized, or with which
    settings; default: the model's own predicate. Where it says no more than yes, a matrix has the
    bits that ``q`` has for it. Returns the model and the ``quantization`` entry for its
    config.json.
    """
    usual = predicate or getattr(model, "quant_predicate", None) or (lambda path, module: True)

    def choose(path: str, module: Any) -> bool | dict[str, Any]:
        if "mode" not in inspect.signature(module.to_quantized).parameters:
            return False  # afm7's fused matrices, which mlx-lm cannot quantize
        answer = usual(path, module)
        if path in q.own and answer is True:
            return {"group_size": q.usual_group_size, "bits": q.own[path], "mode": q.mode}
        if isinstance(answer, dict) and module.weight.shape[-1] % answer.get("group_size", 1):
            return answer | {"group_size": q.usual_group_size}  # which divides its inputs
        return answer

    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints; its callers may not
        model, config = quantize_model(
            model, {}, q.group_size, q.bits, mode=q.mode, quant_predicate=choose
        )
    return model, config["quantization"]


@dataclass(frozen=True)
class Layout:
    """Names, shapes and bytes of a network's tensors as they will lie on disk; holds no weights.

    Attributes:
        args: the network.
        dtype: the number type of dense weights, scales and biases.
        quantization: how the matrices are quantized; None for dense ones.
    """

    args: ModelArgs
    dtype: mx.Dtype
    quantization: Quantization | None = None

    @cached_property
    def _built(self) -> tuple[nn.Module, dict[str, Any] | None]:
        model: nn.Module = Model(self.args)
        model.set_dtype(self.dtype)
        if self.quantization is None:
            return model, None
        q = self.quantization
        # Lazy arrays: shapes are made, weights never are.
        usual = quant_predicate(self.args.extra_bits, q.usual_bits)
        return quantize_nearest(model, q, usual)

    @property
    def network(self) -> nn.Module:
        """The network, with weights that are never made."""
        return self._built[0]

    @property
    def config_entry(self) -> dict[str, Any] | None:
        """The ``quantization`` entry for config.json; None where nothing is packed."""
        return self._built[1] if self.settings else None

    @cached_property
    def tensors(self) -> dict[str, mx.array]:
        """Lazy placeholders, by canonical name, of the tensors' shapes and types."""
        return tensors_of(self._built[0])

    @cached_property
    def _modules(self) -> dict[str, Any]:
        return dict(self._built[0].named_modules())

    @cached_property
    def settings(self) -> dict[str, tuple[int, int, str]]:
        """Group size, bits and mode of each packed matrix, by module path."""
        modules = ((path, self._modules[path]) for path in self._packed)
        return {path: (m.group_size, m.bits, m.mode) for path, m in modules}

    @property
    def _packed(self) -> list[str]:
        return [name.removesuffix(".scales") for name in self.tensors if name.endswith(".scales")]

    def format_of(self, path: str) -> Format | None:
        """The format of the matrix at a module path; None if it is absent or dense."""
        if path not in self.settings:
            return None
        group_size, bits, mode = self.settings[path]
        return Format(bits, group_size, mode, self.dtype)

    def find_adjustable(self) -> list[str]:
        """The module paths of the matrices whose bits can be chosen: packed, without extra bits."""
        return [path for path in self.settings if not self.args.extra_bits.get(path)]

    def scale_bytes(self, path: str) -> int:
        """The bytes of a packed matrix's scales and biases."""
        return self.nbytes(f"{path}.scales") + self.nbytes(f"{path}.biases")

    @cached_property
    def fusable_layers(self) -> dict[str, list[int]]:
        """The layers in which matrices with the same input can be stored as one matrix.

        They can where they are packed alike. The keys are the fused matrices' names.
        """
        found: dict[str, list[int]] = {}
        packings: dict[str, set[Any]] = {}  # by module path
        for name, array in self.tensors.items():
            path, _, part = name.rpartition(".")
            if not (self.args.num_local_experts and path.endswith(EXPERTS)):  # these stay apart
                packings.setdefault(path, set()).add((part, array.shape[1:], array.dtype))
        apart = () if "k" in self.args.stream_readers else ("q_proj",)
        kinds = [
            [name for name in FUSED[x] if name not in apart] for x in ("qkv_proj", "gate_up_proj")
        ]
        for layer in range(self.args.num_hidden_layers):
            for kind in kinds:
                there = [name for name in kind if module_path(layer, name) in packings]
                fused = next((name for name in FUSED if [*FUSED[name]] == there), None)
                packed = [packings[module_path(layer, name)] for name in there]
                if fused and packed.count(packed[0]) == len(packed):
                    found.setdefault(fused, []).append(layer)
        return found

    @cached_property
    def weights(self) -> dict[str, int]:
        """The number of weights of each tensor, as it is before quantization."""
        dense = self if self.quantization is None else replace(self, quantization=None)
        return {name: array.size for name, array in dense.tensors.items()}

    def count(self, prefix: str = "") -> int:
        """The number of weights in the tensors whose names start with ``prefix``."""
        return sum(n for name, n in self.weights.items() if name.startswith(prefix))

    def nbytes(self, prefix: str = "") -> int:
        """The bytes of the tensors whose names start with ``prefix``."""
        return sum(array.nbytes for name, array in self.tensors.items() if name.startswith(prefix))

    @property
    def cache_bytes_per_token(self) -> int:
        """The bytes that a token adds to the KV cache."""
        args = self.args
        layers = sum(not args.lacks("attention", i) for i in range(args.num_hidden_layers))
        return 2 * layers * args.num_key_value_heads * args.head_dim * self.dtype.size

    @property
    def bytes_per_token(self) -> int:
        """The bytes of weights that decoding a token reads.

        An untied embedding counts with a single row, experts with those that a token is given to.
        """
        args = self.args
        embedding = 0 if args.tie_word_embeddings else self.nbytes(EMBEDDING)
        total = self.nbytes() - embedding + embedding // args.vocab_size
        if not args.num_local_experts:
            return total
        experts = sum(
            array.nbytes
            for name, array in self.tensors.items()
            if any(f".{matrix}." in name for matrix in EXPERTS)
        )
        return total - experts + experts * args.num_experts_per_tok // args.num_local_experts


def compare_sizes(before: Layout, after: Layout) -> tuple[float, float]:
    """By what share the bytes in memory grow, and by what share those read for a token shrink."""
    growth = after.nbytes() / before.nbytes() - 1
    return growth, 1 - after.bytes_per_token / before.bytes_per_token


@dataclass(frozen=True)
class PackedLayout(Layout):
    """The layout of a network whose tensors stay packed as its source has them.

    A table of the first layer is new, and packed as the embedding is. A head that it unties is the
    source's embedding.

    Attributes:
        stored: the source's tensors, lazy, by canonical name.
        entry: the source's ``quantization`` in config.json.
        scale: what the source's embedding is multiplied by when it enters the stream.
    """

    stored: Mapping[str, mx.array] = field(default_factory=dict)
    entry: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0

    @cached_property
    def tensors(self) -> dict[str, mx.array]:
        dense = tensors_of(Model(self.args))
        made = self._make_tensors(dense)
        modules = {name.rpartition(".")[0] for name in dense.keys() - made.keys()}
        kept = {n: array for n, array in self.stored.items() if n.rpartition(".")[0] in modules}
        return kept | made

    def _make_tensors(self, dense: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The tensors that the source does not have."""
        if not self.args.precomputed:
            return {}
        rows = dense[f"{EMBEDDING}.weight"].astype(self.dtype)
        table = self.pack_table(rows, self.stored)
        return table | (self.untie_head(self.stored) if self._unties else {})

    @property
    def _unties(self) -> bool:
        return not any(name.startswith(f"{HEAD}.") for name in self.stored)

    def pack_table(self, rows: mx.array, stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Pack the first layer's table as the source's embedding is packed.

        Columns that are the embedding itself, unscaled, are taken from the source as they are. The
        rows stay dense if the source's embedding is, or if the other columns are no whole number
        of groups.

        Args:
            rows: (vocabulary, row).
            stored: the source's embedding, by canonical name.
        """
        if f"{EMBEDDING}.scales" not in stored:
            return {f"{EMBEDDING}.weight": rows}
        group_size, bits, mode = MLXScheme(self.entry).find_settings(EMBEDDING)
        form = Format(bits, group_size, mode, self.dtype)
        widths = self.args.row_widths()
        itself = self.args.block == "serial" and self.scale == 1
        same = widths.get("x", 0) if itself else 0
        if (rows.shape[1] - same) % group_size:
            return {f"{EMBEDDING}.weight": rows}
        packed = form.nearest(rows[:, same:])
        if same:
            packed = {
                part: mx.concatenate([stored[f"{EMBEDDING}.{part}"], new], axis=1)
                for part, new in packed.items()
            }
        return {f"{EMBEDDING}.{part}": array for part, array in packed.items()}

    def untie_head(self, stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Copy the source's packed embedding for a head of its own."""
        return {
            name.replace(EMBEDDING, HEAD): array
            for name, array in stored.items()
            if name.startswith(f"{EMBEDDING}.")
        }

    @cached_property
    def settings(self) -> dict[str, tuple[int, int, str]]:
        return {path: MLXScheme(self.entry).find_settings(path) for path in self._packed}

    @property
    def config_entry(self) -> dict[str, Any] | None:
        if not self.settings:
            return None
        if self.args.precomputed and self._unties and EMBEDDING in self.entry:
            return {**self.entry, HEAD: self.entry[EMBEDDING]}
        return dict(self.entry)

    @cached_property
    def weights(self) -> dict[str, int]:
        return {name: array.size for name, array in tensors_of(Model(self.args)).items()}

    def format_of(self, path: str) -> Format | None:
        return None  # nothing is left to be quantized
