"""Networks of random weights: the speed and size of a shape, without a model of it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils

from ..architectures.config import read_model_args
from ..architectures.families import FAMILIES, Config, Family, find_family
from ..architectures.tensors import to_published_names, to_source_names
from ..checkpoints.files import read_json
from ..checkpoints.writer import Writer
from ..constants import FLOAT_NAMES
from ..errors import UserError, first_line
from ..network.model import Model, ModelArgs
from ..network.names import EMBEDDING, FINAL_NORM, HEAD
from ..network.parts import dtype_name
from ..progress import Progress
from ..quantization.layout import Layout, quantize_nearest
from ..quantization.settings import Quantization
from ..removal.plan import Plan, make_plan
from .catalogue import MODELS, SHARED

SEED = 0


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: what it is called, and a Hugging Face config."""

    name: str
    config: Config

    @property
    def family(self) -> Family:
        return find_family(self.config)

    @cached_property
    def args(self) -> ModelArgs:
        return read_model_args(self.config)

    @property
    def dtype(self) -> mx.Dtype:
        """The number type that the config names, else bfloat16."""
        declared = self.config.get("torch_dtype") or self.config.get("dtype")
        return getattr(mx, declared) if declared in FLOAT_NAMES else mx.bfloat16

    @property
    def stock_config(self) -> Config:
        """The config with all that mlx-lm's own network of this family has to be told."""
        stock = self.family.stock
        return self.config if stock is None else self.config | stock.settings(self.args)

    @property
    def stock(self) -> "Shape":
        """This shape if mlx-lm has a network of its own for it, else its nearest."""
        return make_vanilla_shape(self.args) if self.family.stock is None else self

    @property
    def stock_differs(self) -> bool:
        """Whether mlx-lm's own network is not quite what the config describes."""
        stock = self.stock
        assert stock.family.stock is not None
        return stock is self and not stock.family.stock.expresses(self.args)


def find_shape(name: str) -> Shape:
    """The shape that a user means.

    Args:
        name: a model of the catalogue, a part of its name or any case of it, or a config.json or
            the folder of one; then, after a colon, a number of layers if it is not to have all.

    Raises:
        UserError: if there is no such model, several, or its config cannot be read.
    """
    stem, _, layers = name.rpartition(":")
    if not (stem and layers.isdecimal()):
        stem, layers = name, ""
    path = Path(stem).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file() or path.suffix == ".json":
        called = path.absolute().parent.name if path.name == "config.json" else path.stem
        config = read_json(path)
    else:
        called = _in_catalogue(stem)
        config = {**SHARED, **MODELS[called]}
    if layers:
        if int(layers) < 1:
            raise UserError(f"--synthetic {name}: must have at least 1 layer")
        config = _with_layers(config, int(layers))
        called += f", {layers} layers"
    shape = Shape(called, config)
    _ = shape.args  # complains about what is wrong with the config
    return shape


def _in_catalogue(name: str) -> str:
    """The model of the catalogue whose name contains this one; of its versions the newest."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    wanted = plain(name)
    found = [one for one in MODELS if plain(one) == wanted]
    found = found or [one for one in MODELS if wanted and wanted in plain(one)]
    versions = {re.sub(r"-v[\d.]+$", "", one) for one in found}
    if len(versions) == 1:
        return found[-1]
    which = "could be each of" if found else "is no file and none of"
    raise UserError(f"--synthetic {name} {which} {', '.join(found or MODELS)}: give one of them")


def _with_layers(config: Config, layers: int) -> Config:
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    config = {**config, key: layers}
    if kinds := config.get("layer_types"):
        config["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    return config


def make_vanilla_shape(args: ModelArgs) -> Shape:
    """The vanilla transformer of a network's sizes that mlx-lm has: its Llama, or its Mixtral.

    With Q and P, norms on the stream and skips, whatever ``args`` lack.
    """
    sizes = (
        "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
        "max_position_embeddings", "rms_norm_eps", "rope_theta",
    )  # fmt: skip
    config: Config = {key: getattr(args, key) for key in sizes}
    kind = "llama"
    if args.num_local_experts:
        kind = "mixtral"
        config |= {key: getattr(args, key) for key in ("num_local_experts", "num_experts_per_tok")}
    if {*args.layer_types} > {"sliding_attention"}:  # mlx-lm's Llama slides in some layers only
        config |= {"layer_types": args.layer_types, "sliding_window": args.sliding_window}
    return Shape(kind, config | {"model_type": kind})


def make_random_weights(layout: Layout, prefix: str = "") -> dict[str, mx.array]:
    """A network's tensors under canonical names, lazy, the same ones at each call.

    Matrices are normal with a variance of 1 / inputs, which keeps any stream within bounds; gains
    are one, biases zero.
    """
    keys = mx.random.split(mx.random.key(SEED), len(layout.tensors))
    found = {}
    for key, (name, array) in zip(keys, layout.tensors.items(), strict=True):
        if not name.startswith(prefix):
            continue
        if array.ndim > 1:
            random = mx.random.normal(array.shape, scale=array.shape[-1] ** -0.5, key=key)
        elif name.endswith(".bias"):
            random = mx.zeros(array.shape)
        else:
            random = mx.ones(array.shape)
        found[name] = random.astype(layout.dtype)
    return found


def make_stock_model(
    shape: Shape, dtype: mx.Dtype, quantization: Quantization | None = None
) -> nn.Module:
    """mlx-lm's own network of a shape, its weights random and lazy.

    Raises:
        UserError: if mlx-lm cannot build it.
    """
    tensors = make_random_weights(Layout(shape.args, dtype))
    config = shape.stock_config
    try:
        kind, args_kind = mlx_lm.utils._get_classes(config)
        model = kind(args_kind.from_dict(config))
        weights = to_source_names(shape.family, tensors, shape.args, dtype)
        return _filled(model, weights, quantization)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"mlx-lm cannot build a {config['model_type']} of this shape ({first_line(error)}): "
            "give another"
        ) from error


def make_skipless_plan(args: ModelArgs, remove: str, dtype: mx.Dtype, quantized: bool) -> Plan:
    """A removal from a network, of one with skips when these are gone; by arithmetic alone.

    Raises:
        UserError: if it is impossible.
    """
    skipless = args.norm == "pre" and args.skip == "both"
    return make_plan(args, remove=remove, skipless=skipless, dtype=dtype, quantized=quantized)


def make_skipless_model(
    args: ModelArgs, dtype: mx.Dtype, quantization: Quantization | None = None
) -> nn.Module:
    """This package's network as ``convert`` writes it, its weights random and lazy."""
    written = replace(args, fused=Layout(args, dtype, quantization).fused)
    weights = to_source_names(
        FAMILIES["skipless"], make_random_weights(Layout(args, dtype)), written, dtype
    )
    return _filled(Model(written), weights, quantization)


def _filled(
    model: nn.Module, weights: dict[str, mx.array], quantization: Quantization | None
) -> nn.Module:
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights([*weights.items()])
    model.eval()
    return model if quantization is None else quantize_nearest(model, quantization)[0]


def write_checkpoint(
    shape: Shape,
    dtype: mx.Dtype,
    out: str | Path,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Write the checkpoint whose weights ``stock_model`` has, in its family's names and layout.

    It has no tokenizer. A layer is in memory at a time, besides a shard.

    Raises:
        UserError: if the path exists, its parent does not, or the disk lacks room.
    """
    layout = Layout(shape.args, dtype)
    layers = range(shape.args.num_hidden_layers)
    parts = [EMBEDDING, *(f"model.layers.{layer}" for layer in layers), FINAL_NORM, HEAD]
    with Writer(Path(out), layout.nbytes(), "--save") as writer:
        writer.write_json("config.json", shape.stock_config | {"torch_dtype": dtype_name(dtype)})
        for done, part in enumerate(parts):
            progress("saving", done, len(parts))
            tensors = make_random_weights(layout, f"{part}.")
            evaluate_in_turn(tensors.values())
            writer.add(to_published_names(shape.family, tensors, shape.args, dtype))
        writer.finish_weights(layout.count())
        writer.commit()
    progress("saving", len(parts), len(parts))


def evaluate_in_turn(arrays: Iterable[mx.array]) -> None:
    """Evaluate arrays one by one, so that only one's making takes memory."""
    for array in arrays:
        mx.eval(array)
