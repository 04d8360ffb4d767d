"""Models whose networks mlx-lm knows and this package does not.

What such a network computes only mlx-lm's own code says. So a source here is a folder and a way to
build its network anew, with lazy weights; ``network/stock.py`` runs it a layer at a time.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes, get_total_parameters

from ..architectures.config import LIMITS, check_sizes, read_model_args
from ..architectures.families import FAMILIES
from ..architectures.rope import OtherRope
from ..checkpoints import files, hub
from ..checkpoints.checkpoint import read_dtype
from ..checkpoints.safetensors import SafetensorsStore, Store
from ..errors import UserError, first_line
from ..network import reduced
from ..network.driver import RESIDENT_BYTES
from ..network.parts import tensors_of
from ..network.stock import StockNetwork
from .loading import load_network, try_forward
from .old_keys import add_old_keys, find_classes, list_settings


@dataclass(frozen=True)
class StockSource:
    """A model of mlx-lm's own.

    Attributes:
        name: what the user called it.
        path: its folder, or its config.json if a plan is all that is asked for.
        config: its config.
        trust_remote_code: whether its tokenizer may run code.
        lacking: keys of its config that this package does not know, if it knows its architecture,
            with a sentence about each, or none.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    trust_remote_code: bool = False
    lacking: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What it is, for a message."""
        keys = " and ".join(f'"{key}"' for key in self.lacking)
        return f"{self.config['model_type']}{f' with {keys}' if keys else ''}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of it, a sentence each."""
        if not self.lacking:
            return ()
        known = f"of a {self.kind} only mlx-lm's network is known: nothing exact is done to it"
        return (known, *filter(None, self.lacking.values()))

    @cached_property
    def store(self) -> Store | None:
        """Its tensors; None if they are elsewhere."""
        there = self.path.is_dir() and any(self.path.glob("*.safetensors"))
        return SafetensorsStore(self.path) if there else None

    def build(self) -> nn.Module:
        """Build its network anew, with lazy weights; with random ones if there are none."""
        return load_network(self.path, lazy=True)[0] if self.store else self.build_shapes()

    def build_shapes(self) -> nn.Module:
        """Build its network dense, with weights that are random and cost nothing until used.

        Raises:
            UserError: if mlx-lm makes no network of the config.
        """
        config = {k: v for k, v in self.config.items() if not k.startswith("quantization")}
        check_sizes(config, LIMITS["num_hidden_layers"])
        kind, kind_args = _get_classes(config)
        if reduced.DROPPED in config:
            kind, kind_args = reduced.Model, reduced.ModelArgs
        try:
            model: nn.Module = kind(kind_args.from_dict(config))
            try_forward(model)
        except Exception as error:  # whatever its code does with such settings
            said = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"mlx-lm makes no network of the config.json of {self.name} ({said}): correct it"
            ) from error
        model.set_dtype(read_dtype(config))
        return model

    @cached_property
    def model(self) -> nn.Module:
        """Its network, of which only names and shapes are asked for."""
        return self.build()

    @property
    def is_packed(self) -> bool:
        """Whether matrices of it are quantized."""
        return any("scales" in module for module in self.model.modules())

    @property
    def dtype(self) -> mx.Dtype:
        """The number type of most of its matrices that are not quantized."""
        floats = (a for a in tensors_of(self.model).values() if mx.issubdtype(a.dtype, mx.floating))
        return Counter(a.dtype for a in floats).most_common(1)[0][0]


def find_stock(
    model: str | Path,
    *,
    revision: str | None = None,
    config_only: bool = False,
    trust_remote_code: bool = False,
) -> StockSource | None:
    """Find a model, if its network is one that only mlx-lm knows.

    Args:
        model: a Hub id, a folder, or its config.json alone.
        revision: a branch, tag or commit of a Hub id.
        config_only: do without the weights; those of a Hub id are not fetched.
        trust_remote_code: let its tokenizer run its code.

    Raises:
        UserError: if it cannot be read.
    """
    name = str(model)
    path = hub.resolve(name, revision=revision, config_only=config_only, code=trust_remote_code)
    if path.is_dir():
        config = files.read_config(path)
    elif path.suffix.lower() == ".json" and files.is_there(path):
        config = files.read_json(path)
    else:
        return None
    if not _is_known(config):
        return None
    lacking = {}
    if config["model_type"] in FAMILIES and not (lacking := _find_lacking(config)):
        return None
    return StockSource(name, path, add_old_keys(config), trust_remote_code, lacking)


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm has a network for a config, and no other code is needed."""
    brings_code = config.get("model_file") and reduced.DROPPED not in config
    return not brings_code and find_classes(config) is not None


def _find_lacking(config: Mapping[str, Any]) -> dict[str, str]:
    """Find what a config of a known architecture asks that mlx-lm's network alone has.

    Returns keys of the config, and of each a sentence about it, or none.
    """
    family, read = FAMILIES[config["model_type"]], list_settings(config)
    found = {key: "" for key in family.unsupported if config.get(key) is True and key in read}
    try:
        read_model_args(dict(config))
    except OtherRope as error:
        if family.stock is not None and family.stock.scales_rope:
            found["rope_scaling"] = str(error).removesuffix(": correct it")
    except UserError:  # whoever opens the model says so
        pass
    return found


def open_network(source: StockSource) -> StockNetwork:
    """Open a source's network, to run in float32; its layers stay in memory if they are small."""
    resident = 4 * get_total_parameters(source.model) <= RESIDENT_BYTES
    return StockNetwork(source.build, mx.float32, resident=resident)
