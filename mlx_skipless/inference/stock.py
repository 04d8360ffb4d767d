"""Models whose networks mlx-lm knows and this package does not.

What such a network computes only mlx-lm's own code says. So a source here is a folder and a way to
build its network anew, with lazy weights; ``network/stock.py`` runs it a layer at a time.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import _decode_tagged_floats, _get_classes, get_total_parameters

from ..architectures.config import LIMITS, check_sizes, read_dtype, read_model_args
from ..architectures.rope import OtherRope
from ..architectures.wrappers import find_text_type, name_type, take_text_model
from ..checkpoints import files, hub
from ..checkpoints.gguf_file import GGUFStore
from ..checkpoints.packed import find_scheme, is_packed
from ..checkpoints.safetensors import (
    SafetensorsStore,
    Store,
    explain_second_model,
    find_usual_dtype,
)
from ..errors import UserError, first_line
from ..network import reduced
from ..network.driver import RESIDENT_BYTES
from ..network.parts import dtype_name, tensors_of
from ..network.stock import StockNetwork
from .caches import try_forward
from .loading import load_network, tell_mlx_lm
from .old_keys import (
    NO_WINDOW,
    add_old_keys,
    explain_unread,
    find_classes,
    find_lost_window,
    list_settings,
)


@dataclass(frozen=True)
class StockSource:
    """A model of mlx-lm's own.

    Attributes:
        name: what the user called it.
        path: its folder or GGUF file, or its config.json if a plan is all that is asked for.
        config: its config.
        trust_remote_code: whether its tokenizer may run code.
        gguf: the GGUF file that it is; ``unpack`` makes a folder of it.
        lacking: keys of its config that this package does not know, if it knows its architecture,
            with a sentence about each, or none.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    trust_remote_code: bool = False
    gguf: GGUFStore | None = None
    lacking: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What it is, for a message."""
        keys = " and ".join(f'"{key}"' for key in self.lacking)
        return f"{name_type(self.config)}{f' with {keys}' if keys else ''}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of it, a sentence each."""
        notes = [] if self.gguf is not None else [*explain_second_model(self.path)]
        if find_text_type({**self.config}) is None:
            notes += explain_unread(self.config)
        elif self.lacking:
            known = f"of a {self.kind} only mlx-lm's network is known: nothing exact is done to it"
            notes += [known, *filter(None, self.lacking.values())]
        return tuple(notes)

    @cached_property
    def store(self) -> Store | None:
        """Its tensors; None if they are elsewhere."""
        there = self.path.is_dir() and any(self.path.glob("*.safetensors"))
        return SafetensorsStore(self.path) if there else None

    def build(self) -> nn.Module:
        """Build its network anew, with lazy weights; with random ones if there are none."""
        return load_network(self.path, lazy=True)[0] if self.store else self.build_shapes()

    def build_dense(self) -> nn.Module:
        """Build its network anew, with what packed matrices stand for in their place, lazily.

        mlx-lm's ``dequantize_model`` knows three kinds of packed modules; networks have more.

        Raises:
            UserError: if a packed module has no dense counterpart.
        """
        model, found = self.build(), []
        modules = {path: m for path, m in model.named_modules() if "scales" in m}
        counterparts: dict[str, Any] = {}
        if modules:
            counterparts = dict(self.build_shapes(dense=True).named_modules())
        for path, packed in modules.items():
            dense, settings = counterparts.get(path), (packed.group_size, packed.bits)
            mode = getattr(packed, "mode", "affine")
            weight = mx.dequantize(
                packed.weight, packed.scales, packed.get("biases"), *settings, mode
            )
            if dense is None or "scales" in dense or dense.weight.shape != weight.shape:
                raise UserError(
                    f"{path} of {self.name} is a {type(packed).__name__}, which is only known "
                    "quantized: it stays as it is without -q, targets, --dtype and healing"
                )
            dense.weight = weight
            if "bias" in packed:
                dense.bias = packed.bias
            found.append((path, dense))
        model.update_modules(tree_unflatten(found))
        return model

    def build_shapes(self, *, dense: bool = False) -> nn.Module:
        """Build its network with weights that are random and cost nothing until used.

        It is dense, except for what stays packed of a GGUF file unless ``dense`` is asked for.

        Raises:
            UserError: if mlx-lm makes no network of the config.
        """
        config = forget_quantization(self.config)
        check_sizes(config, LIMITS["num_hidden_layers"])
        kind, kind_args = _get_classes(config)
        if reduced.DROPPED in config:
            kind, kind_args = reduced.Model, reduced.ModelArgs
        try:
            model: nn.Module = kind(kind_args.from_dict(config))
            if self.gguf is not None and hasattr(model, "sanitize"):  # Gemma's drops its head here
                model.sanitize({name: mx.zeros(s) for name, s in self.gguf.shapes.items()})
            try_forward(model)
        except Exception as error:  # whatever its code does with such settings
            said = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"mlx-lm makes no network of the config.json of {self.name} ({said}): correct it"
            ) from error
        model.set_dtype(read_dtype(config))
        if self.gguf is not None and self.gguf.runs and not dense:
            entry = self.gguf.packed.entry
            usual = {key: entry[key] for key in ("group_size", "bits", "mode")}

            def has_form(path: str, module: nn.Module) -> bool | dict[str, Any]:
                return hasattr(module, "to_quantized") and entry.get(path, True)

            nn.quantize(model, **usual, class_predicate=has_form)
        return model

    @cached_property
    def model(self) -> nn.Module:
        """Its network, of which only names and shapes are asked for."""
        return self.build()

    @property
    def is_packed(self) -> bool:
        """Whether matrices of it are quantized."""
        return any("scales" in module for module in self.model.modules())

    @cached_property
    def quantization(self) -> Mapping[str, Any] | None:
        """The ``quantization`` with which mlx-lm runs it; None where nothing is quantized."""
        return load_network(self.path, lazy=True)[2].get("quantization") if self.store else None

    @cached_property
    def packing(self) -> str | None:
        """How it is quantized, e.g. "MLX affine 4-bit" or "FP8"; None if it is not."""
        packed = [module for module in self.model.modules() if "scales" in module]
        if packed:
            kinds = Counter((getattr(m, "mode", "affine"), m.bits) for m in packed)
            mode, bits = kinds.most_common(1)[0][0]
            return f"MLX {mode} {bits}-bit"
        if self.store is None or not is_packed(self.store):
            return None
        scheme = find_scheme(self.config, self.store)
        return None if scheme is None else scheme.name

    @property
    def dtype(self) -> mx.Dtype:
        """The number type of most of its matrices that are not quantized."""
        floats = (a for a in tensors_of(self.model).values() if mx.issubdtype(a.dtype, mx.floating))
        return Counter(a.dtype for a in floats).most_common(1)[0][0]


def forget_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what it says of quantized matrices, also of the text's in it."""
    kept = {key: value for key, value in config.items() if not key.startswith("quantiz")}
    if isinstance(inner := kept.get("text_config"), Mapping):
        kept["text_config"] = forget_quantization(inner)
    return kept


def find_stock(
    model: str | Path,
    *,
    revision: str | None = None,
    config_only: bool = False,
    trust_remote_code: bool = False,
    any_family: bool = False,
) -> StockSource | None:
    """Find a model, if its network is one that only mlx-lm knows.

    Args:
        model: a Hub id, a folder, a GGUF file, or a config.json alone.
        revision: a branch, tag or commit of a Hub id.
        config_only: do without the weights; those of a Hub id are not fetched.
        trust_remote_code: let its tokenizer run its code.
        any_family: find whatever mlx-lm has a network for.

    Raises:
        UserError: if it cannot be read.
    """
    name = str(model)
    path = hub.resolve(name, revision=revision, config_only=config_only, code=trust_remote_code)
    gguf: GGUFStore | None = None
    if path.is_dir():
        config = files.read_config(path)
    elif path.suffix.lower() == ".json" and files.is_there(path):
        config = files.read_json(path)
    elif files.is_there(path) and files.is_gguf(path):
        gguf = GGUFStore(path)
        dtype = dtype_name(find_usual_dtype(gguf.shapes, gguf.dtypes))
        config = gguf.config | {"torch_dtype": dtype}
    else:
        return None
    with contextlib.suppress(TypeError):  # a tag that is none
        config = _decode_tagged_floats(config)
    if not _is_known(config):
        return None
    source = StockSource(name, path, add_old_keys(config), trust_remote_code, gguf)
    if find_text_type(config) is None or reduced.DROPPED in config:  # or lacks sub-layers
        return source
    if lacking := _find_lacking(config):
        return replace(source, lacking=lacking)
    if not any_family:
        return None
    told = {**config, **tell_mlx_lm(config, source.gguf or source.store, name)}
    return replace(source, config=add_old_keys(told), lacking=_find_window(config))


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm has a network for a config, and no other code is needed."""
    brings_code = config.get("model_file") and reduced.DROPPED not in config
    return not brings_code and find_classes(config) is not None


def _find_lacking(config: Mapping[str, Any]) -> dict[str, str]:
    """Find what a config of a known architecture asks that mlx-lm's network alone has.

    Returns keys of the config, and of each a sentence about it, or none.
    """
    text, family = take_text_model(dict(config), weights=False)
    read = list_settings(text)
    found = {key: "" for key in family.unsupported if text.get(key) is True and key in read}
    try:
        read_model_args(text)
    except OtherRope as error:
        if family.stock is not None and family.stock.scales_rope:
            found["rope_scaling"] = str(error).removesuffix(": correct it")
    except UserError:  # whoever opens the model says so
        pass
    return found


def _find_window(config: Mapping[str, Any]) -> dict[str, str]:
    """Find a window that mlx-lm's own network of a known architecture does not have."""
    window = find_lost_window(config)
    return {} if window is None else {"sliding_window": NO_WINDOW.format(window)}


def open_network(source: StockSource) -> StockNetwork:
    """Open a source's network, to run in float32; its layers stay in memory if they are small."""
    resident = 4 * get_total_parameters(source.model) <= RESIDENT_BYTES
    return StockNetwork(source.build, mx.float32, resident=resident)
