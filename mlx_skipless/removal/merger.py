"""Puts a conversion's result together: the embedding, each layer and the head, in its own types.

``algebra.py`` changes the bases, ``bases.py`` says which basis holds where, ``source.py`` reads.
"""

from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import numpy as np

from ..checkpoints.checkpoint import Checkpoint
from ..network.model import ModelArgs
from ..network.names import (
    ATTENTION,
    CHANNEL_PATHS,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM,
    HEAD,
    LINEAR_PATHS,
    PROJECTIONS,
    find_norms,
    is_stream_norm_weight,
    module_path,
)
from .algebra import Linear, rewrite_stream
from .bases import Bases
from .changer import Changer, count_rows, cut_rows
from .plan import Plan
from .products import cast_finite, choose_working_type, ignore_overflow, to_numpy, to_stored
from .source import SourceReader


class Merger:
    """Applies a plan to a checkpoint, a part of the network at a time.

    Every method that returns tensors returns them by canonical name, shaped as in files. Each
    raises ``UserError`` if a tensor holds NaN or infinity or does not fit the result's type. Layers
    that are asked for in the order of the stream are read ahead.

    Args:
        checkpoint: the source, with weights.
        plan: what goes.
        dtype: the type of the result.
        gain_dtype: the type of the weights of norms on the stream, where it is not ``dtype``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        dtype: mx.Dtype,
        gain_dtype: mx.Dtype | None = None,
    ):
        self._plan, self._dtype, self._gain_dtype = plan, dtype, gain_dtype or dtype
        self._kind = choose_working_type(dtype)
        self._source = SourceReader(checkpoint, plan.folded)
        self._bases = Bases(plan, self._source, self._kind)
        self._changer = Changer(self._source, self._bases, self._kind)

    @ignore_overflow
    def embedding(self) -> dict[str, mx.array]:
        """Make the embedding's weight, (vocabulary, hidden)."""
        name = f"{EMBEDDING}.weight"
        arrays = self._source.read_module(EMBEDDING)
        if self._is_untouched(EMBEDDING):
            return {name: self._cast(name, arrays[name])}
        # The matrix reads one-hot rows, so its file is (in, out) and its bias joins each row.
        # Each part computes that bias again: so they are larger than others.
        parts = cut_rows(arrays, 4 * count_rows())
        linears = (Linear(to_numpy(name, part[name], self._kind)) for part in parts)

        def store(new: Linear) -> dict[str, mx.array]:
            bias = None if new.bias is None else new.bias.astype(self._kind)
            return {name: self._store(name, new.weight if bias is None else new.weight + bias)}

        return _join(self._changer.change_each(EMBEDDING, linears, store))

    @ignore_overflow
    def layer(self, layer: int) -> dict[str, mx.array]:
        """Make every tensor of one layer of the result."""
        out: dict[str, mx.array] = {}
        self._source.read_ahead(layer)
        gone = set(self._plan.eliminated.values())
        for projection in PROJECTIONS:
            path = module_path(layer, projection)
            dropped = self._plan.merged.lacks(
                "attention" if projection in ATTENTION else "ffn", layer
            )
            if path in self._bases and path not in gone and not dropped:
                out |= self._merge(path)
        return out | self._copy_vectors(layer)

    @ignore_overflow
    def head(self) -> dict[str, mx.array]:
        """Make the final norm and the head, as far as the result has them."""
        out = self._copy_norm(FINAL_NORM, "final", self._plan.before.hidden_size)
        return out if self._plan.merged.tie_word_embeddings else out | self._merge(HEAD)

    def rewrite(self, path: str, outputs: mx.array) -> mx.array:
        """Express what the source's matrix at a path wrote, (..., out), in the result's basis."""
        if self._bases.takes_mean_out(path):
            return outputs - outputs.mean(-1, keepdims=True)
        basis = self._bases.find_output(path)
        if basis is None:
            return outputs
        return rewrite_stream(outputs, basis, shift_share=self._bases.find_shift_share(path))

    def _is_untouched(self, path: str) -> bool:
        """Whether the matrix at a path is in the result what it is in the source."""
        return self._bases.keeps(path) and not self._source.has_norm_to_fold(path)

    def _merge(self, path: str) -> dict[str, mx.array]:
        """Make the weight and, if there is one, the bias of the matrix at a path."""
        arrays = self._source.read_module(path)
        if self._is_untouched(path):
            return {name: self._cast(name, array) for name, array in arrays.items()}
        experts = self._plan.before.num_local_experts
        if experts and path.rpartition(".")[2] in EXPERTS:
            each = ({name: a[i] for name, a in arrays.items()} for i in range(experts))
            made = [self._merge_matrix(path, one) for one in each]
            return {name: mx.stack([part[name] for part in made]) for name in made[0]}
        return self._merge_matrix(path, arrays)

    def _merge_matrix(self, path: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Make what ``_merge`` does of a module's tensors, or of one expert's."""
        if not self._bases.keeps(path):
            return _join(self._changer.change(path, arrays, partial(self._store_linear, path)))
        parts = cut_rows(arrays, count_rows()) if path == HEAD else [arrays]
        return _join([self._fold(path, part) for part in parts])

    def _fold(self, path: str, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Make a matrix that no basis changes, or some rows of it, with the norm before it."""
        scaled = self._source.scale(path, arrays, self._dtype)
        if scaled is not None:
            return scaled
        return self._store_linear(path, self._source.fold(path, arrays, self._kind))

    def _store_linear(self, path: str, new: Linear) -> dict[str, mx.array]:
        out = {f"{path}.weight": self._store(f"{path}.weight", new.weight.T)}
        if new.bias is not None:
            out[f"{path}.bias"] = self._store(f"{path}.bias", new.bias)
        return out

    def _copy_vectors(self, layer: int) -> dict[str, mx.array]:
        """Copy a layer's norms and linear paths; write out those that only other layers have."""
        out: dict[str, mx.array] = {}
        args = self._plan.merged
        for norm, (module, size) in _find_layer_norms(args, layer).items():
            out |= self._copy_norm(module, norm, size)
        for name, absent in _find_linear_paths(args, layer).items():
            found = self._source.read_tensor(name)
            if found is not None and name.endswith(CHANNEL_PATHS):
                found = mx.repeat(found, absent.size // found.size)
            out[name] = self._cast(name, absent if found is None else found)
        return out

    def _copy_norm(self, module: str, norm: str, size: int) -> dict[str, mx.array]:
        """Copy a norm's weight and bias as far as the result has them; folded, ones and zeros."""
        out: dict[str, mx.array] = {}
        args = self._plan.merged
        for part, norms, neutral in (
            ("weight", args.gains, mx.ones((size,))),
            ("bias", args.shifts, mx.zeros((size,))),
        ):
            if norm in norms:
                name = f"{module}.{part}"
                found = None if norm in self._plan.folded else self._source.read_tensor(name)
                dtype = self._gain_dtype if is_stream_norm_weight(name) else self._dtype
                out[name] = cast_finite(name, neutral if found is None else found, dtype)
        return out

    def _store(self, name: str, values: np.ndarray) -> mx.array:
        return to_stored(name, values, self._dtype)

    def _cast(self, name: str, array: mx.array) -> mx.array:
        return cast_finite(name, array, self._dtype)


def _join(parts: list[dict[str, mx.array]]) -> dict[str, mx.array]:
    """Join the rows of tensors that were made in parts."""
    if len(parts) == 1:
        return parts[0]
    whole = {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}
    mx.eval(whole)  # so that the parts go
    return whole


def _find_layer_norms(args: ModelArgs, layer: int) -> dict[str, tuple[str, int]]:
    """Find the module path and the width of each norm of a layer, by its name in the config."""
    attention, ffn = not args.lacks("attention", layer), not args.lacks("ffn", layer)
    width = args.num_attention_heads * args.head_dim
    kv_width = args.num_key_value_heads * args.head_dim
    sizes = {"q": width, "k": kv_width, "v": kv_width, "kv": width, "heads": width}
    sizes["hidden"] = args.intermediate_size
    sizes |= dict.fromkeys("qk", args.head_dim) if args.qk_norm else {}
    found = {}
    for norm, module in find_norms(args).items():
        if layer == 0 and norm in ("attention", "kv") and args.precomputed:
            continue  # the table is behind it
        there = ffn if norm in ("hidden", "ffn") else attention
        if there or (norm == "attention" and args.shared_norm and ffn):
            size = sizes.get(norm, args.hidden_size)
            found[norm] = (f"model.layers.{layer}.{module}", size)
    return found


def _find_linear_paths(args: ModelArgs, layer: int) -> dict[str, mx.array]:
    """Find the names of a layer's linear paths, with the values that change nothing."""
    attention, ffn = not args.lacks("attention", layer), not args.lacks("ffn", layer)
    heads = args.num_attention_heads
    skips = mx.zeros(heads * args.head_dim if args.channel_skips else heads)
    return {
        f"model.layers.{layer}.{LINEAR_PATHS[flag]}": neutral
        for flag, there, neutral in (
            ("gate_offset", ffn, mx.zeros(args.intermediate_size)),
            ("value_skip", attention, mx.zeros(heads)),
            ("attention_gain", attention, mx.ones(heads)),
            ("uniform_gain", attention, mx.zeros(heads)),
            ("query_skip", attention, skips),
            ("head_skip", args.has_head_skip(layer), skips),
            ("output_skip", args.has_output_skip(layer), skips),
        )
        if there and getattr(args, flag)
    }
