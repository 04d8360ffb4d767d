"""One conversion: what goes in, what is planned, what comes out."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..architectures.families import FAMILIES
from ..architectures.family import Family
from ..architectures.tensors import rename_to_source, to_source_module, to_source_names
from ..checkpoints.checkpoint import Blueprint, Checkpoint
from ..network.model import ModelArgs
from ..network.names import EMBEDDING, FINAL_NORM, HEAD, is_stream_norm_weight
from ..network.parts import Merged, dtype_name
from ..quantization.layout import Layout, PackedLayout
from ..removal.merger import Merger
from ..removal.plan import Plan, RemovalCost
from ..removal.table import TabledParts
from .report import Report, make_report

MODEL_FILE = "model.py"
# Keys (or how they begin) that mean something to mlx-lm in these architectures, and to no one else.
ONLY_MLX_LMS = ("quantiz", "text_config", "rope_traditional", "layer_norm_bias")


@dataclass(frozen=True)
class Job:
    """What goes in and what comes out: ``stock`` results are of mlx-lm's own architectures."""

    checkpoint: Blueprint
    plan: Plan
    layout: Layout
    stock: bool
    trust_remote_code: bool
    upload_repo: str | None
    options: Mapping[str, Any]
    planned: Callable[[Mapping[str, RemovalCost], Mapping[str, list[int]]], Plan]
    costs: Mapping[str, RemovalCost] = field(default_factory=dict)
    dropped: Mapping[str, list[int]] = field(default_factory=dict)

    def replanned(self) -> "Job":
        """With the plan that follows from what was measured."""
        plan = self.planned(self.costs, self.dropped)
        return replace(self, plan=plan, layout=replace(self.layout, args=plan.after))

    def unremoved(self) -> Layout:
        """Of the network before the removals, quantized alike, with the same bits everywhere."""
        quantization = self.layout.quantization
        plain = None if quantization is None else replace(quantization, own={})
        return Layout(self.plan.before, self.layout.dtype, plain)

    def report(self) -> Report:
        """Of the plan, before anything is checked."""
        conditioning = self.options.get("conditioning", {})
        return make_report(
            self.checkpoint, self.plan, self.layout, self.stock, conditioning, self.costs
        )

    def source_parts(self, dtype: mx.Dtype = mx.float32) -> Merger:
        """The network that the removals start from; in float32, however its weights are stored."""
        plan = self.plan
        stripped = tuple(gain for gain in plan.folded if gain not in plan.before.gains)
        start = replace(plan, table=False, eliminated={}, folded=stripped, merged=plan.before)
        return Merger(self.opened, start, dtype)

    @property
    def opened(self) -> Checkpoint:
        """The source with its weights; a plan alone may have none."""
        assert isinstance(self.checkpoint, Checkpoint)
        return self.checkpoint

    @property
    def family(self) -> Family:
        """The result's: its source's if it is of mlx-lm's own, else this package's."""
        return self.checkpoint.family if self.stock else FAMILIES["skipless"]

    def named(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Tensors, of a whole layer or more, as the result's files have them."""
        if isinstance(self.layout, PackedLayout):
            return rename_to_source(self.family, tensors, self._args)
        return to_source_names(self.family, tensors, self._args, self.layout.dtype)

    @property
    def _args(self) -> ModelArgs:
        """The network as it lies on disk."""
        args = self.layout.args
        return args if self.stock else replace(args, fused=self.layout.fusable_layers)

    def result_parts(self) -> Merged:
        """The result's dense tensors."""
        plan, dtype = self.plan, self.layout.dtype
        # Gains that are stored less an offset are rounded when that is off.
        gain_dtype = mx.float32 if self.family.gain_offset else dtype
        merger = Merger(self.opened, plan, dtype, gain_dtype)
        if not plan.table:
            return merger
        exact = Merger(self.opened, plan, mx.float32)
        return TabledParts(merger, exact, plan.merged, dtype)

    def config(self) -> dict[str, Any]:
        """config.json of the result."""
        source, layout = self.checkpoint.config, self.layout
        if self.stock:
            config = {k: v for k, v in source.items() if not k.startswith(ONLY_MLX_LMS)}
            config |= self.family.make_stock_settings(layout.args)
        else:
            keep = ("bos_token_id", "eos_token_id", "pad_token_id")
            config = {key: source[key] for key in keep if key in source}
            config |= {k: v for k, v in asdict(self._args).items() if v is not None}
            config |= {"model_file": MODEL_FILE, "architectures": ["SkiplessForCausalLM"]}
        config["torch_dtype"] = dtype_name(layout.dtype)
        config.pop("dtype", None)
        if layout.config_entry is not None:
            named = {
                to_source_module(self.family, module, self._args): v
                for module, v in layout.config_entry.items()
            }
            config["quantization"] = config["quantization_config"] = named
        return dict(sorted(config.items()))


class PackedParts:
    """A source's tensors, packed as they are, as far as a layout has them.

    ``table`` makes the dense rows of a table of the first layer, where the layout has one;
    ``gain_offset`` as in ``Merger``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: PackedLayout,
        table: Merged | None,
        gain_offset: float,
    ):
        self._checkpoint, self._layout, self._table = checkpoint, layout, table
        self._gain_offset = gain_offset

    def embedding(self) -> dict[str, mx.array]:
        if self._table is None:
            return self._under(f"{EMBEDDING}.")
        rows = self._table.embedding()[f"{EMBEDDING}.weight"]
        return self._layout.pack_table(rows, self._checkpoint.read_packed(f"{EMBEDDING}."))

    def layer(self, layer: int) -> dict[str, mx.array]:
        return self._under(f"model.layers.{layer}.")

    def head(self) -> dict[str, mx.array]:
        head = self._under(f"{HEAD}.")
        if not head and self._table is not None:
            head = self._layout.untie_head(self._checkpoint.read_packed(f"{EMBEDDING}."))
        return self._under(f"{FINAL_NORM}.") | head

    def _under(self, prefix: str) -> dict[str, mx.array]:
        read = self._checkpoint.read_packed(prefix)
        return {name: self._kept(name, read[name]) for name in read if name in self._layout.tensors}

    def _kept(self, name: str, array: mx.array) -> mx.array:
        change = self._checkpoint.family.gain_offset - self._gain_offset
        if not (change and is_stream_norm_weight(name)):
            return array
        return (array.astype(mx.float32) + change).astype(array.dtype)
