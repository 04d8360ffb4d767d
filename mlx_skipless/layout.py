"""Names, shapes and bytes of a network's tensors, before any weight exists."""

import contextlib
import io
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from .families import EMBEDDING
from .model import Model, ModelArgs, quant_predicate
from .rounding import Format


def dtype_name(dtype: mx.Dtype) -> str:
    """ "bfloat16" for ``mx.bfloat16``."""
    return str(dtype).removeprefix("mlx.core.")


def tensors_of(module: nn.Module) -> dict[str, mx.array]:
    """A module's parameters by name."""
    return dict(tree_flatten(module.parameters()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Quantization:
    """mlx-lm's quantization settings; None means the mode's own default."""

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"


@dataclass(frozen=True)
class Layout:
    """Names, shapes and bytes of a network's tensors as they will lie on disk; holds no weights.

    ``settings`` is the ``quantization`` entry for config.json, None for dense weights.
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
        # Lazy arrays: shapes are made, weights never are. mlx-lm prints; its callers may not.
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(
                model,
                {},
                q.group_size,
                q.bits,
                mode=q.mode,
                quant_predicate=quant_predicate(
                    self.args.extra_bits, q.bits or (8 if q.mode == "mxfp8" else 4)
                ),
            )
        return model, config["quantization"]

    @property
    def settings(self) -> dict[str, Any] | None:
        return self._built[1]

    @cached_property
    def tensors(self) -> dict[str, mx.array]:
        """Lazy placeholders: their names, shapes and types hold, their values mean nothing."""
        return tensors_of(self._built[0])

    @cached_property
    def modules(self) -> dict[str, Any]:
        return dict(self._built[0].named_modules())

    def format_of(self, where: str) -> Format | None:
        """How the matrix at a module path is packed; None if it is absent or dense."""
        if f"{where}.scales" not in self.tensors:
            return None
        module = self.modules[where]
        return Format(module.bits, module.group_size, module.mode, self.dtype)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Weights of each dense tensor; quantization does not change them."""
        dense = self if self.quantization is None else replace(self, quantization=None)
        return {name: array.size for name, array in dense.tensors.items()}

    def count(self, prefix: str = "") -> int:
        """Weights of the tensors whose name starts with ``prefix``."""
        return sum(n for name, n in self.weights.items() if name.startswith(prefix))

    def nbytes(self, prefix: str = "") -> int:
        """Bytes of the tensors whose name starts with ``prefix``."""
        return sum(array.nbytes for name, array in self.tensors.items() if name.startswith(prefix))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding a token reads: of an untied embedding a single row."""
        embedding = 0 if self.args.tie_word_embeddings else self.nbytes(EMBEDDING)
        return self.nbytes() - embedding + embedding // self.args.vocab_size
