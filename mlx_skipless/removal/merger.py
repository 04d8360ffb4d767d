"""The algebra: changes of basis between a network's matrices.

Letters as in Graef, arXiv 2404.12362: Q, K, V, P (``o_proj``), M (gate and up), O (down). Inside
this module a matrix is (in, out) and acts on rows, ``x @ W``; files hold its transpose.

A basis at a point of the stream is x* = (x + s) T. What writes the point becomes W T, what reads it
T^-1 W, and the function stays. Every removal chooses T so that one matrix becomes the identity:

    Q (K, V)   T = Q       O* = O Q        K* = Q^-1 K, V* = Q^-1 V
    P          T = P^-1    M* = P M        (O* = O P^-1 where O writes the same point)
    a gain g   T^-1 = diag(g): W* = diag(g) W
    a mean     T = I - 1 1^T / n, which a LayerNorm applies in any case: W* = W T

``products.py`` says in which precision.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..checkpoints.checkpoint import Checkpoint
from ..errors import UserError
from ..network.names import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM,
    HEAD,
    LINEAR_PATHS,
    PROJECTIONS,
    find_norms,
    find_readers,
    is_stream_norm_weight,
    module_path,
)
from ..network.parts import dtype_name
from ..network.wiring import find_points, parse_layer, parse_letter
from .plan import Conditioning, Plan
from .products import Inverse, choose_working_type, multiply

ROWS = 8192  # of an embedding or a head at a time
unwarned = np.errstate(over="ignore", invalid="ignore")  # what overflows is refused by its name


@dataclass(frozen=True)
class Linear:
    """y = x @ weight + bias: weight (in, out), bias (out,) in float64."""

    weight: np.ndarray
    bias: np.ndarray | None = None


@dataclass(frozen=True)
class Basis:
    """x* = (x + shift) @ matrix; ``matrix`` is None where nothing is left to write the point."""

    matrix: np.ndarray | Inverse | None
    inverse: np.ndarray | Inverse
    shift: np.ndarray | None = None


def basis_without_reader(q: Linear) -> Basis:
    """The basis in which a reader of the point (Q, K or V) is the identity, without bias."""
    inverse = Inverse(q.weight)
    return Basis(q.weight, inverse, None if q.bias is None else q.bias @ inverse)


def basis_without_writer(p: Linear, *, alone: bool) -> Basis:
    """The basis in which a writer of the point (P) is the identity; ``alone``: the only writer."""
    matrix = None if alone else Inverse(p.weight)
    return Basis(matrix, p.weight, None if p.bias is None else -p.bias)


def transpose_basis(basis: Basis) -> Basis:
    """The basis at the other end of a tied embedding: (E T)^T = T^T E^T."""
    assert basis.matrix is not None
    return Basis(basis.inverse.T, basis.matrix.T)


def change_basis(
    linear: Linear,
    *,
    reads: Basis | None = None,
    writes: Basis | None = None,
    owns_shift: bool = False,
) -> Linear:
    """A matrix between two points whose bases changed.

    Args:
        linear: the matrix in the old bases.
        reads: the new basis of its input, None where it is the old one.
        writes: likewise of its output.
        owns_shift: whether this writer adds the shift of ``writes`` (one of several must).
    """
    weight, bias = linear.weight, linear.bias
    if reads is not None:
        if reads.shift is not None:
            bias = (0 if bias is None else bias) - reads.shift @ weight
        weight = multiply(reads.inverse, weight)
    if writes is not None:
        assert writes.matrix is not None
        if owns_shift and writes.shift is not None:
            bias = (0 if bias is None else bias) + writes.shift
        weight = multiply(weight, writes.matrix)
        bias = None if bias is None else bias @ writes.matrix
    return Linear(weight, bias)


def fold_norm(gain: np.ndarray | None, shift: np.ndarray | None, linear: Linear) -> Linear:
    """The matrix behind a norm, with the norm's gain and bias (in,) in it.

    See arXiv 2407.09577, sections 2 and 3.
    """
    weight, bias = linear.weight, linear.bias
    if shift is not None:
        bias = (0 if bias is None else bias) + shift @ weight
    if gain is not None:  # one rounding, as storing would do it; gains are float32 at most
        weight = gain[:, None].astype(weight.dtype) * weight
    return Linear(weight, bias)


def centre(linear: Linear) -> Linear:
    """The matrix without the mean of its outputs (SliceGPT, arXiv 2401.15024, section 3.2)."""
    bias = linear.bias
    return Linear(
        linear.weight - _mean(linear.weight),
        None if bias is None else bias - _mean(bias),
    )


def _mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-1, keepdims=True, dtype=np.float64).astype(values.dtype)


def measure_conditioning(matrix: np.ndarray) -> Conditioning:
    """The conditioning of a square matrix; infinite if it is singular."""
    try:
        inverse = np.linalg.inv(matrix)
    except np.linalg.LinAlgError:
        return Conditioning(math.inf, math.inf)
    norms = np.linalg.norm(matrix) * np.linalg.norm(inverse)
    condition = _largest_singular_value(matrix) * _largest_singular_value(inverse)
    return Conditioning(float(condition), float(norms / len(matrix)))


def _largest_singular_value(matrix: np.ndarray) -> float:
    """By power iteration, to about a per cent."""
    x = np.random.default_rng(0).standard_normal((matrix.shape[1], 1))
    value = 0.0
    for _ in range(100):
        x = matrix.T @ (matrix @ (x / np.linalg.norm(x)))
        length = float(np.linalg.norm(x))
        previous, value = value, math.sqrt(length)
        if abs(value - previous) <= 1e-4 * value:
            break
    return value


class Merger:
    """Applies a plan to a checkpoint, a layer at a time; holds at most three bases.

    Layers that are asked for in the order of the stream are read into the system's cache while the
    one before is worked on. ``gain_dtype`` is the type of the stream norms' gains, where it is not
    ``dtype``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        dtype: mx.Dtype,
        gain_dtype: mx.Dtype | None = None,
    ):
        self._checkpoint, self._plan, self._dtype = checkpoint, plan, dtype
        self._gain_dtype = gain_dtype or dtype
        self._points = find_points(plan.before)
        self._reads = {m: i for i, point in enumerate(self._points) for m in point.consumers}
        self._writes = {m: i for i, point in enumerate(self._points) for m in point.producers}
        self._basis = lru_cache(maxsize=3)(self._make_basis)
        self._kind = choose_working_type(dtype)
        self._latest = -1

    @unwarned
    def conditioning(self, where: str) -> Conditioning:
        """Of the matrix at a module path, its norm's gain folded in."""
        return measure_conditioning(self._linear(where, np.float64).weight)

    @unwarned
    def condition(self, where: str) -> float:
        """Largest over smallest singular value of a matrix of any shape; infinite if singular."""
        weight = self._linear(where, np.float64).weight
        if weight.shape[0] == weight.shape[1]:
            return measure_conditioning(weight).condition
        gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
        values = np.linalg.eigvalsh(gram)
        # Below that the squares say nothing.
        return math.sqrt(values[-1] / values[0]) if values[0] > 1e-14 * values[-1] else math.inf

    @unwarned
    def embedding(self) -> dict[str, mx.array]:
        name = f"{EMBEDDING}.weight"
        basis = self._basis(self._writes[EMBEDDING])
        if self._plan.centred:
            return {name: self._rows(name, lambda rows: rows - _mean(rows))}
        if basis is None:
            return {name: self._through(name)}
        matrix = basis.matrix
        assert matrix is not None
        added = 0 if basis.shift is None else (basis.shift @ matrix).astype(self._kind)
        return {name: self._rows(name, lambda rows: multiply(rows, matrix) + added)}

    @unwarned
    def layer(self, layer: int) -> dict[str, mx.array]:
        """Every tensor of one layer of the result, in its type."""
        out: dict[str, mx.array] = {}
        self._read_ahead(layer)
        gone = set(self._plan.eliminated.values())
        for projection in PROJECTIONS:
            where = module_path(layer, projection)
            if where in gone or where not in self._reads.keys() | self._writes.keys():
                continue
            if self._plan.merged.lacks("attention" if projection in ATTENTION else "ffn", layer):
                continue
            out |= self._projection(where)
        return out | self._vectors(layer)

    @unwarned
    def head(self) -> dict[str, mx.array]:
        """The final norm's gain and the head, as far as the result has them."""
        out = self._norm(FINAL_NORM, "final", self._plan.before.hidden_size)
        if self._plan.merged.tie_word_embeddings:
            return out
        name = f"{HEAD}.weight"
        basis = self._basis(self._reads[HEAD])
        gain, shift = self._gain_and_shift(FINAL_NORM, "final")
        if basis is not None:
            out[name] = self._rows(name, lambda rows: multiply(rows, basis.inverse.T))
        elif gain is not None:
            out[name] = self._rows(name, lambda rows: rows * gain.astype(rows.dtype))
        else:
            out[name] = self._through(name)
        if self._plan.merged.head_bias:
            out[f"{HEAD}.bias"] = self._head_bias(basis, shift)
        return out

    def _head_bias(self, basis: Basis | None, shift: np.ndarray | None) -> mx.array:
        name = f"{HEAD}.bias"
        bias = self._vector(name)
        for moved in (None if basis is None else basis.shift, None if shift is None else -shift):
            if moved is not None:
                rows = self._checkpoint.read([f"{HEAD}.weight"])[f"{HEAD}.weight"]
                parts = (rows[i : i + ROWS] for i in range(0, rows.shape[0], ROWS))
                more = np.concatenate([_array(HEAD, part, np.float64) @ moved for part in parts])
                bias = (0 if bias is None else bias) - more
        assert bias is not None
        return self._stored(name, bias)

    def rewrite(self, where: str, outputs: mx.array) -> mx.array:
        """What the matrix at a module path wrote before, (..., out), in the basis of the result."""
        basis = self._basis(self._writes[where]) if where in self._writes else None
        if self._plan.centred and where in self._writes:
            return outputs - outputs.mean(-1, keepdims=True)
        if basis is None:
            return outputs
        matrix = basis.matrix
        assert matrix is not None
        if basis.shift is not None and self._owns(where):
            outputs = outputs + mx.array(basis.shift.astype(np.float32))
        if isinstance(matrix, Inverse):
            rows = np.asarray(outputs).reshape(-1, outputs.shape[-1]) @ matrix
            return mx.array(rows).reshape(outputs.shape)
        return outputs @ mx.array(matrix.astype(np.float32))

    def _owns(self, where: str) -> bool:
        """Whether a writer adds the shift of the point that it writes."""
        return self._points[self._writes[where]].producers[0] == where

    def _projection(self, where: str) -> dict[str, mx.array]:
        reads = self._basis(self._reads[where]) if where in self._reads else None
        writes = self._basis(self._writes[where]) if where in self._writes else None
        centred = self._plan.centred and where in self._writes
        unchanged = reads is None and writes is None and not centred
        arrays = self._read(where)
        if unchanged and all(vector is None for vector in self._norm_before(where)):
            return {name: self._finite(name, array) for name, array in arrays.items()}
        kind = np.float32 if unchanged else self._kind  # a gain alone rounds once, as storing does
        owner = writes is not None and self._owns(where)

        def stored(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
            new = self._folded(where, kind, arrays)
            new = change_basis(new, reads=reads, writes=writes, owns_shift=owner)
            new = centre(new) if centred else new
            out = {f"{where}.weight": self._stored(f"{where}.weight", new.weight.T)}
            if new.bias is not None:
                out[f"{where}.bias"] = self._stored(f"{where}.bias", new.bias)
            return out

        experts = self._plan.before.num_local_experts
        if not experts or where.rpartition(".")[2] not in EXPERTS:
            return stored(arrays)
        each = [
            stored({name: a[expert] for name, a in arrays.items()}) for expert in range(experts)
        ]
        return {name: mx.stack([arrays[name] for arrays in each]) for name in each[0]}

    def _vectors(self, layer: int) -> dict[str, mx.array]:
        """Gains and linear paths; one that this layer lacks and others have is written out."""
        out: dict[str, mx.array] = {}
        args, prefix = self._plan.merged, f"model.layers.{layer}"
        attention, ffn = not args.lacks("attention", layer), not args.lacks("ffn", layer)
        width = args.num_attention_heads * args.head_dim
        kv_width = args.num_key_value_heads * args.head_dim
        sizes = {"q": width, "k": kv_width, "v": kv_width, "hidden": args.intermediate_size}
        sizes |= dict.fromkeys("qk", args.head_dim) if args.qk_norm else {}
        for norm, module in find_norms(args).items():
            if layer == 0 and norm == "attention" and args.precomputed:
                continue  # the table is behind it
            there = ffn if norm in ("hidden", "ffn") else attention
            if there or (norm == "attention" and args.shared_norm and ffn):
                out |= self._norm(f"{prefix}.{module}", norm, sizes.get(norm, args.hidden_size))
        heads = args.num_attention_heads
        for flag, absent in (
            ("gate_offset", mx.zeros(args.intermediate_size)),
            ("value_skip", mx.zeros(heads)),
            ("attention_gain", mx.ones(heads)),
            ("uniform_gain", mx.zeros(heads)),
        ):
            if getattr(args, flag) and (ffn if flag == "gate_offset" else attention):
                name = f"{prefix}.{LINEAR_PATHS[flag]}"
                found = self._checkpoint.read([name])
                out[name] = self._finite(name, found.get(name, absent))
        return out

    def _norm(self, module: str, norm: str, size: int) -> dict[str, mx.array]:
        """A norm's gain and bias, as far as the result has them: ones and zeros if folded."""
        out: dict[str, mx.array] = {}
        args = self._plan.merged
        for part, norms, nothing in (
            ("weight", args.gains, mx.ones((size,))),
            ("bias", args.shifts, mx.zeros((size,))),
        ):
            if norm in norms:
                name = f"{module}.{part}"
                found = {} if norm in self._plan.folded else self._checkpoint.read([name])
                dtype = self._gain_dtype if is_stream_norm_weight(name) else self._dtype
                out[name] = cast_finite(name, found.get(name, nothing), dtype)
        return out

    def _make_basis(self, index: int) -> Basis | None:
        where = self._plan.eliminated.get(index)
        if where is None:
            ends = {0: len(self._points) - 1, len(self._points) - 1: 0}
            other = ends.get(index)
            if self._plan.before.tie_word_embeddings and other in self._plan.eliminated:
                basis = self._make_basis(other)
                assert basis is not None
                return transpose_basis(basis)
            return None
        linear = self._linear(where, self._kind)
        alone = self._points[index].producers == [where]
        if parse_letter(where) == "p":
            return basis_without_writer(linear, alone=alone)
        return basis_without_reader(linear)

    def _linear(self, where: str, kind: type[np.floating]) -> Linear:
        """The matrix at a module path, the norm before it folded in; ``kind`` of its weight."""
        return self._folded(where, kind, self._read(where))

    def _folded(
        self, where: str, kind: type[np.floating], arrays: Mapping[str, mx.array]
    ) -> Linear:
        """Likewise of what was read, of a mixture's matrices one expert's."""
        weight, bias = f"{where}.weight", f"{where}.bias"
        matrix = _array(weight, arrays[weight], kind).T
        vector = _array(bias, arrays[bias], np.float64) if bias in arrays else None
        return fold_norm(*self._norm_before(where), Linear(matrix, vector))

    def _read(self, where: str) -> dict[str, mx.array]:
        """Weight and, if there is one, bias of a module, by canonical name."""
        return self._checkpoint.read([f"{where}.weight", f"{where}.bias"])

    def _read_ahead(self, layer: int) -> None:
        """Have the matrices of the next layer read, if layers are asked for one by one."""
        one_by_one, self._latest = self._latest == layer - 1, layer
        if one_by_one:
            names = [f"{module_path(layer + 1, projection)}.weight" for projection in PROJECTIONS]
            self._checkpoint.read_ahead(names)

    def _norm_before(self, where: str) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The gain and bias (in,) that the plan folds into the matrix at a module path."""
        source = self._checkpoint.args
        for norm, module in find_norms(source).items():
            if where.rpartition(".")[2] in find_readers(source, norm):
                gain, shift = self._gain_and_shift(
                    f"model.layers.{parse_layer(where)}.{module}", norm
                )
                if norm == "v" and gain is not None:
                    gain = self._per_query_head(gain)
                return gain, shift
        return None, None

    def _gain_and_shift(self, module: str, norm: str) -> tuple[np.ndarray | None, ...]:
        """A norm's gain and bias if the plan folds them."""
        if norm not in self._plan.folded:
            return None, None
        return self._vector(f"{module}.weight"), self._vector(f"{module}.bias")

    def _per_query_head(self, gain: np.ndarray) -> np.ndarray:
        """A value gain (kv_heads * head_dim,) as the query heads meet it (heads * head_dim,)."""
        args = self._plan.before
        group = args.num_attention_heads // args.num_key_value_heads
        return np.repeat(gain.reshape(args.num_key_value_heads, -1), group, axis=0).reshape(-1)

    def _vector(self, name: str) -> np.ndarray | None:
        found = self._checkpoint.read([name])
        return _array(name, found[name], np.float64) if found else None

    def _rows(self, name: str, change) -> mx.array:
        """A (vocabulary, hidden) tensor changed some rows at a time."""
        rows = self._checkpoint.read([name])[name]
        done = []
        for start in range(0, rows.shape[0], ROWS):
            changed = change(_array(name, rows[start : start + ROWS], self._kind))
            done.append(self._stored(name, changed))
        return mx.concatenate(done)

    def _through(self, name: str) -> mx.array:
        return self._finite(name, self._checkpoint.read([name])[name])

    def _stored(self, name: str, values: np.ndarray) -> mx.array:
        largest = float(max(values.max(initial=0), -values.min(initial=0)))
        if largest > float(np.finfo(np.float32).max):
            raise UserError(f"{name} does not fit float32 (largest value {largest:.3g})")
        return self._finite(name, mx.array(np.ascontiguousarray(values, dtype=np.float32)))

    def _finite(self, name: str, array: mx.array) -> mx.array:
        return cast_finite(name, array, self._dtype)


def cast_finite(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    """``array`` in another type.

    Raises:
        UserError: for NaN or infinity, in ``array`` or because the type is too narrow.
    """
    cast = array.astype(dtype)
    if not _all_finite(cast):
        if _all_finite(array):
            wider = "bfloat16 or float32" if dtype == mx.float16 else "float32"
            raise UserError(
                f"{name} does not fit {dtype_name(dtype)} (largest value "
                f"{mx.abs(array).max().item():.3g}): use --dtype {wider}"
            )
        _refuse_not_finite(name)
    return cast


def _array(name: str, array: mx.array, kind: type[np.floating]) -> np.ndarray:
    values = np.asarray(array.astype(mx.float32))
    if not np.isfinite(values).all():
        _refuse_not_finite(name)
    return values.astype(kind, copy=False)


def _all_finite(array: mx.array) -> bool:
    """Several times faster than MLX's own on a CPU; NumPy has no bfloat16, but its bits."""
    if array.dtype == mx.float32:
        return bool(np.isfinite(np.asarray(array)).all())
    exponent = {mx.bfloat16: 0x7F80, mx.float16: 0x7C00}[array.dtype]
    return bool((np.asarray(array.view(mx.uint16)) & 0x7FFF).max(initial=0) < exponent)


def _refuse_not_finite(name: str) -> None:
    raise UserError(f"{name} holds NaN or infinity: the checkpoint is broken, download it again")
