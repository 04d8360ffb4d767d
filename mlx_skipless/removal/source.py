"""What a merge reads: a checkpoint's matrices and vectors, with the norms before them folded in."""

from collections.abc import Collection, Mapping

import mlx.core as mx
import numpy as np

from ..checkpoints.checkpoint import Checkpoint
from ..network.model import ModelArgs
from ..network.names import FINAL_NORM, HEAD, PROJECTIONS, find_norms, find_readers, module_path
from ..network.wiring import parse_layer
from . import algebra
from .algebra import Conditioning, Linear, fold_norm
from .products import ignore_overflow, is_finite, to_numpy


class SourceReader:
    """Reads a checkpoint's tensors by canonical name, for the algebra.

    Args:
        checkpoint: the source, with weights.
        folded: norms, by their names in the config's ``gains`` and ``shifts``, whose weights and
            biases belong to the matrices that read them.
    """

    def __init__(self, checkpoint: Checkpoint, folded: Collection[str] = ()):
        self._checkpoint, self._folded = checkpoint, folded
        self._latest = -1

    def read_tensor(self, name: str) -> mx.array | None:
        """Read one tensor as it is stored; None if the checkpoint lacks it."""
        return self._checkpoint.read([name]).get(name)

    def read_module(self, path: str) -> dict[str, mx.array]:
        """Read the weight and, if there is one, the bias of the module at a path."""
        return self._checkpoint.read([f"{path}.weight", f"{path}.bias"])

    def read_ahead(self, layer: int) -> None:
        """Have the system read the next layer's matrices, if layers are asked for one by one."""
        one_by_one, self._latest = self._latest == layer - 1, layer
        if one_by_one:
            names = [f"{module_path(layer + 1, projection)}.weight" for projection in PROJECTIONS]
            self._checkpoint.read_ahead(names)

    def read_linear(self, path: str, kind: type[np.floating]) -> Linear:
        """Read the matrix at a path, its weight in ``kind``, the norm before it folded in.

        Raises:
            UserError: if a tensor holds NaN or infinity.
        """
        return self.fold(path, self.read_module(path), kind)

    def fold(self, path: str, arrays: Mapping[str, mx.array], kind: type[np.floating]) -> Linear:
        """Make the matrix at a path of what ``read_module`` gave, the norm before it folded in.

        Args:
            path: a module path.
            arrays: what was read there, or some rows of it, or one expert's part of it.
            kind: the type of the weight.

        Raises:
            UserError: if a tensor holds NaN or infinity.
        """
        weight, bias = f"{path}.weight", f"{path}.bias"
        matrix = to_numpy(weight, arrays[weight], kind).T
        vector = to_numpy(bias, arrays[bias], np.float64) if bias in arrays else None
        return fold_norm(*self._read_norm_before(path), Linear(matrix, vector))

    def scale(
        self, path: str, arrays: Mapping[str, mx.array], dtype: mx.Dtype
    ) -> dict[str, mx.array] | None:
        """Make the matrix at a path as ``fold`` does, as it is stored, if a weight is all to fold.

        Args:
            path: a module path.
            arrays: what was read there, or some rows of it, or one expert's part of it.
            dtype: the type that it is stored in.

        Returns:
            Its tensors; None if more is to be folded, or if ``fold`` refuses them.
        """
        gain, shift = self._read_norm_before(path)
        weight, bias = f"{path}.weight", f"{path}.bias"
        if gain is None or shift is not None:
            return None
        # x g W = x (diag(g) W), with one float32 product for each element
        scaled = arrays[weight].astype(mx.float32) * mx.array(gain.astype(np.float32))
        found = {weight: scaled.astype(dtype)}
        if bias in arrays:
            found[bias] = arrays[bias].astype(dtype)
        return found if all(map(is_finite, found.values())) else None

    def has_norm_to_fold(self, path: str) -> bool:
        """Tell whether a norm's weight or bias belongs to the matrix at a path."""
        return any(vector is not None for vector in self._read_norm_before(path))

    @ignore_overflow
    def measure_conditioning(self, path: str, limits: Collection[float] = ()) -> Conditioning:
        """Measure how much the inverse of the square matrix at a path would magnify noise.

        The norm before the matrix is folded in; the result is infinite if it is singular.

        Args:
            path: a module path.
            limits: amplifications that decide something, near which it is not just estimated.

        Raises:
            UserError: if a tensor holds NaN or infinity.
        """
        weight = self.read_linear(path, np.float64).weight
        return algebra.measure_conditioning(weight, limits)

    @ignore_overflow
    def measure_condition_number(self, path: str) -> float:
        """Measure the largest over the smallest singular value of the matrix at a path.

        The matrix has any shape, and the norm before it is folded in; the result is infinite if it
        is singular.

        Raises:
            UserError: if a tensor holds NaN or infinity.
        """
        return algebra.measure_condition_number(self.read_linear(path, np.float64).weight)

    def _read_norm_before(self, path: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Read the weight and the bias, both (in,), that are folded into the matrix at a path."""
        module, norm = _find_norm_before(self._checkpoint.args, path)
        if norm not in self._folded:
            return None, None
        weight, bias = self._read_vector(f"{module}.weight"), self._read_vector(f"{module}.bias")
        if norm == "v" and weight is not None:
            weight = _repeat_for_query_heads(weight, self._checkpoint.args)
        return weight, bias

    def _read_vector(self, name: str) -> np.ndarray | None:
        array = self.read_tensor(name)
        return None if array is None else to_numpy(name, array, np.float64)


def _find_norm_before(args: ModelArgs, path: str) -> tuple[str | None, str | None]:
    """Find the norm that the matrix at a path reads: its module path and its name in the config."""
    if path == HEAD:
        return FINAL_NORM, "final"
    for norm, module in find_norms(args).items():
        if path.rpartition(".")[2] in find_readers(args, norm):
            return f"model.layers.{parse_layer(path)}.{module}", norm
    return None, None


def _repeat_for_query_heads(weight: np.ndarray, args: ModelArgs) -> np.ndarray:
    """Repeat a value norm's weight (kv_heads * head_dim,) for P, which reads heads * head_dim."""
    group = args.num_attention_heads // args.num_key_value_heads
    return np.repeat(weight.reshape(args.num_key_value_heads, -1), group, axis=0).reshape(-1)
