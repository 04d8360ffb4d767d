"""One conversion as far as it is decided: what was asked and measured, and what follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from ..architectures.families import FAMILIES
from ..architectures.family import Family
from ..checkpoints.checkpoint import Blueprint, Checkpoint
from ..network.driver import StreamedNetwork
from ..network.model import ModelArgs
from ..network.names import HEAD
from ..network.wiring import find_points
from ..quantization.layout import Layout, PackedLayout
from ..removal.algebra import Conditioning
from ..removal.candidates import find_mixed
from ..removal.choices import RemovalCost
from ..removal.merger import Merger
from ..removal.networks import keep_layers
from ..removal.plan import Plan, make_plan
from ..removal.renumbering import Layers
from ..removal.sublayers import Step
from ..text.corpus import Document
from .options import Options


@dataclass(frozen=True)
class Form:
    """In which form a network is stored.

    Attributes:
        packed: whether what nothing touches stays packed as its source has it.
        table: whether layer 0's projections become a table by token.
        stock: whether the result is a network of mlx-lm's own.
        renumbered: whether layers that lose all are left out, and the others renumbered.
        notes: why it is so, a sentence each.
    """

    packed: bool = False
    table: bool = False
    stock: bool = False
    renumbered: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurements:
    """What was measured on the weights and on the text.

    Attributes:
        conditioning: of matrices that a removal may invert, by module path; None where no weights
            are at hand.
        dropped: the layers that lose their "attention" or "ffn".
        path: the steps of the search for these, if there was one.
        costs: of removals, by module path.
        bits: of matrices that get their own, by module path.
    """

    conditioning: Mapping[str, Conditioning] | None = None
    dropped: Mapping[str, list[int]] = field(default_factory=dict)
    path: tuple[Step, ...] = ()
    costs: Mapping[str, RemovalCost] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One conversion.

    Plan and layout follow from the rest; what is learnt on the way makes another job.

    Attributes:
        options: what the user asked for.
        checkpoint: the source, with its weights or for a plan alone without.
        text: the user's, to quantize against and to check with; None: the source's own.
        form: of the result.
        measured: so far.
        calibrated: whether the result is quantized against text.
    """

    options: Options
    checkpoint: Blueprint
    text: Sequence[Document] | None
    form: Form = field(default_factory=Form)
    measured: Measurements = field(default_factory=Measurements)
    calibrated: bool = False

    def learn(self, **found: Any) -> "Job":
        """Add to what was measured; ``found`` are fields of ``Measurements``."""
        return replace(self, measured=replace(self.measured, **found))

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the result's weights that are not quantized."""
        name = self.options.dtype
        return getattr(mx, name) if name else self.checkpoint.dtype

    @cached_property
    def plan(self) -> Plan:
        """What goes, by all that is known."""
        options, args = self.options, self.checkpoint.args
        quantized = options.quantization is not None
        # Folding is what is exact for it; but gains of many sizes in one matrix round worse, and
        # mlx-lm's own network has norms with weights anyhow.
        pretrained = args.norm == "pre" and not options.skipless and not self.form.packed
        pays = not quantized and not self.form.stock
        unasked = pretrained and options.remove == "auto" and pays
        return make_plan(
            args,
            remove=options.remove,
            skipless=options.skipless,
            fold_norms=options.fold_norms or unasked,
            conditioning=self.measured.conditioning,
            dtype=self.dtype,
            quantized=quantized,
            costs=self.measured.costs,
            dropped=self.measured.dropped,
            precompute=self.form.table,
            stock=self.form.stock,
        )

    @cached_property
    def layout(self) -> Layout:
        """Names, shapes and types of the result's tensors."""
        args = self.plan.after
        if not self.form.packed:
            quantization = self.options.quantization
            if quantization is not None:
                quantization = replace(quantization, own=self.measured.bits)
            return Layout(args, self.dtype, quantization)
        return self._lay_out_packed(args)

    def _lay_out_packed(self, args: ModelArgs) -> PackedLayout:
        """Lay out a network whose tensors stay packed as the source has them."""
        stored, own = self.opened.packed_placeholders(), self.checkpoint.args
        if own.tie_word_embeddings:  # a head on disk is not read
            stored = {name: a for name, a in stored.items() if not name.startswith(f"{HEAD}.")}
        settings, scale = self.opened.packed_settings, own.embedding_scale
        return PackedLayout(args, self.dtype, None, stored, settings, scale)

    @property
    def source_bytes_read(self) -> int:
        """The bytes of weights that decoding a token reads of the source, as it is stored."""
        own = self.checkpoint
        if isinstance(own, Checkpoint) and own.packed_by_mlx:
            return self._lay_out_packed(own.args).bytes_per_token
        return Layout(own.args, own.dtype).bytes_per_token

    @property
    def whole_layout(self) -> Layout:
        """Of the network before the removals, quantized alike, with the same bits everywhere."""
        return Layout(self.plan.before, self.dtype, self.options.quantization)

    @property
    def family(self) -> Family:
        """The result's: its source's if it is of mlx-lm's own, else this package's."""
        return self.checkpoint.family if self.form.stock else FAMILIES["skipless"]

    @property
    def layers(self) -> Layers | None:
        """The layers that stay, where some are left out as a whole."""
        args = self.plan.after
        total, gone = args.num_hidden_layers, args.removed.get("ffn", ())
        if not (self.form.renumbered and gone):
            return None
        return Layers(tuple(layer for layer in range(total) if layer not in gone), total)

    @property
    def stored_args(self) -> ModelArgs:
        """The network as it lies on disk."""
        args = self.layout.args
        if self.layers is not None:
            args = keep_layers(args, self.layers)
        return args if self.form.stock else replace(args, fused=self.layout.fusable_layers)

    @property
    def exact(self) -> bool:
        """Whether nothing but the rounding of float32 parts the result from its source."""
        approximate = self.options.drops or self.layout.config_entry is not None
        return self.dtype == mx.float32 and not approximate

    @property
    def unchanged(self) -> bool:
        """Whether the result has its source's dense tensors, bit for bit, in mlx-lm's network."""
        dense = self.checkpoint.packing is None and self.layout.config_entry is None
        kept = self.plan.after == self.checkpoint.args and not self.plan.folded
        same_type = self.dtype == self.checkpoint.dtype and self.opened.is_uniform
        return self.form.stock and dense and kept and same_type

    def source_parts(self, dtype: mx.Dtype = mx.float32) -> Merger:
        """The network that the removals start from; in float32, however its weights are stored."""
        plan = self.plan
        stripped = tuple(gain for gain in plan.folded if gain not in plan.before.gains)
        start = replace(plan, table=False, eliminated={}, folded=stripped, merged=plan.before)
        return Merger(self.opened, start, dtype)

    def source_network(
        self, dtype: mx.Dtype = mx.float32, *, resident: bool = False
    ) -> StreamedNetwork:
        """The network that the removals start from, to run in float32 or another type."""
        return StreamedNetwork(self.plan.before, self.source_parts(dtype), resident=resident)

    @property
    def opened(self) -> Checkpoint:
        """The source with its weights; a plan alone may have none."""
        assert isinstance(self.checkpoint, Checkpoint)
        return self.checkpoint


def find_inverses(plan: Plan) -> dict[int, list[str]]:
    """By point, the matrices whose values a removal mixes through an inverse."""
    found = find_points(plan.before)
    around = {
        index: find_mixed(plan.before, found, index, path)
        for index, path in plan.eliminated.items()
    }
    return {index: matrices for index, matrices in around.items() if matrices}
