"""What can go from the architectures that are known: arithmetic on published shapes."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models

from ..architectures.config import read_model_args
from ..architectures.families import FAMILIES
from ..architectures.shapes import MODELS
from ..architectures.wrappers import WRAPPERS
from ..constants import REMOVALS
from ..network.model import ModelArgs
from ..quantization.layout import Layout, compare_sizes
from ..removal import table as first_layer
from ..removal.plan import make_plan
from .analysis import measure_removal
from .findings import Removal


@dataclass(frozen=True)
class Entry:
    """What can go from one model.

    Attributes:
        name: the model's name.
        family: its ``model_type``.
        weights: how many it has in all.
        folded: norms whose weights (and biases) fold into the matrices behind them, in mlx-lm's own
            network, or in ours if mlx-lm has none: "attention", "ffn", "final".
        kept: norms whose weights do not.
        removal: the exact removal that saves most once the skips are gone; None if none saves.
        refused: why other removals are impossible, by their letters.
        table_reads: how many times fewer numbers the first layer reads from a table at batch 1.
        table_growth: what the table adds, as a share of the weights.
        table_pays: whether ``--precompute-first-layer`` makes the table unforced.
        drops_stock: whether the model without some attentions runs in mlx-lm's own code.
    """

    name: str
    family: str
    weights: int
    folded: tuple[str, ...]
    kept: tuple[str, ...]
    removal: Removal | None
    refused: dict[str, str]
    table_reads: float
    table_growth: float
    table_pays: bool
    drops_stock: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as JSON has it."""
        return asdict(self)


def read_catalogue_args(name: str) -> ModelArgs:
    """Read the network of a model in the catalogue."""
    return read_model_args(MODELS[name])


def list_entries() -> list[Entry]:
    """List what can go from each model in the catalogue."""
    return [_make_entry(name) for name in MODELS]


def list_other_types() -> list[str]:
    """List the ``model_type``s that the installed mlx-lm has a network for and we have no entry."""
    files = (file for folder in mlx_lm.models.__path__ for file in Path(folder).glob("*.py"))
    needed = (r"^(class|from .* import) Model\b", r"^class ModelArgs\b")
    networks = (
        file.stem
        for file in files
        if all(re.search(one, file.read_text("utf-8"), re.M) for one in needed)
    )
    return sorted({*networks} - FAMILIES.keys() - WRAPPERS.keys())


def _make_entry(name: str) -> Entry:
    args = read_catalogue_args(name)
    model_type = MODELS[name]["model_type"]
    family = FAMILIES[model_type]
    folded = make_plan(args, remove="none", fold_norms=True, stock=family.expresses(args)).folded
    norms = ("attention", *(() if args.shared_norm else ("ffn",)), "final")
    removals = [measure_removal(args, mx.bfloat16, letters) for letters in REMOVALS[1:-1]]
    saving = [one for one in removals if one.weights is not None and one.weights > 0]
    table = first_layer.measure_table(args)
    before = Layout(args, mx.bfloat16)
    after = Layout(make_plan(args, remove="none", precompute=True).after, mx.bfloat16)
    return Entry(
        name,
        model_type,
        before.count(),
        folded,
        tuple(norm for norm in norms if norm not in folded),
        max(saving, key=lambda one: one.weights or 0, default=None),
        {one.letters: one.obstacle for one in removals if one.obstacle is not None},
        table.reads_before() / table.reads_after(),
        table.growth / before.count(),
        first_layer.explain_price(*compare_sizes(before, after)) is None,
        family.expresses_without_sublayers(args),
    )
