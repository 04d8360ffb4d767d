"""Networks of random weights: the speed and size of a shape, without a model of it."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils

from ..architectures.config import read_model_args
from ..architectures.families import FAMILIES, find_family
from ..architectures.family import Config, Family
from ..architectures.shapes import MODELS
from ..architectures.tensors import to_published_names, to_source_names
from ..architectures.wrappers import take_text_model
from ..checkpoints.files import read_json
from ..checkpoints.writer import Writer
from ..constants import FLOAT_NAMES
from ..errors import BadArgument, UserError, first_line
from ..network.model import Model, ModelArgs
from ..network.names import EMBEDDING, FINAL_NORM, HEAD
from ..network.parts import dtype_name
from ..options import expand_path
from ..progress import Progress
from ..quantization.coverage import check_packable
from ..quantization.layout import Layout, quantize_nearest
from ..quantization.settings import Quantization
from ..removal.plan import Plan, make_plan

SEED = 0
REPEATED = 1 << 20  # numbers


@dataclass(frozen=True)
class Shape:
    """A model's name and its Hugging Face config, without weights."""

    name: str
    config: Config

    @property
    def family(self) -> Family:
        """The source architecture that the config names."""
        return find_family(self.config)

    @cached_property
    def args(self) -> ModelArgs:
        """The network that the config describes."""
        return read_model_args(self.config)

    @property
    def dtype(self) -> mx.Dtype:
        """The number type that the config names, else bfloat16."""
        declared = self.config.get("torch_dtype") or self.config.get("dtype")
        return getattr(mx, declared) if declared in FLOAT_NAMES else mx.bfloat16

    @property
    def stock_config(self) -> Config:
        """The config with whatever mlx-lm's own network of this family must be told."""
        return self.config | self.family.make_stock_settings(self.args)

    @property
    def stock(self) -> "Shape":
        """This shape if mlx-lm has a network of its own for it, else the nearest vanilla one."""
        return make_vanilla_shape(self.args) if self.family.stock is None else self

    @property
    def stock_differs(self) -> bool:
        """Whether mlx-lm's own network computes something else than the config describes."""
        return self.family.stock is not None and not self.family.expresses(self.args)


def find_shape(name: str) -> Shape:
    """Find the shape that a user names.

    Args:
        name: a published model's name or a part of it, in any case, or the path of a config.json or
            of its folder; then, after a colon, a number of layers if it is not to have all.

    Raises:
        UserError: if there is no such model, several, or its config cannot be read.
    """
    stem, _, layers = name.rpartition(":")
    if not (stem and layers.isdecimal()):
        stem, layers = name, ""
    path = expand_path(stem)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file() or path.suffix == ".json":
        title = path.absolute().parent.name if path.name == "config.json" else path.stem
        config, _ = take_text_model(read_json(path), weights=False)
    else:
        title = _find_model(stem)
        config = MODELS[title]
    if layers:
        if int(layers) < 1:
            raise BadArgument(f"--synthetic {name}: must have at least 1 layer")
        config = _set_layers(config, int(layers))
        title += f", {layers} layers"
    shape = Shape(title, config)
    _ = shape.args  # complains about what is wrong with the config
    return shape


def _find_model(name: str) -> str:
    """Find the published model whose name contains this one; of its versions the newest."""
    plain = {one: re.sub(r"[^a-z0-9]", "", one.lower()) for one in (name, *MODELS)}
    wanted = plain[name]
    found = [one for one in MODELS if plain[one] == wanted]
    found = found or [one for one in MODELS if wanted and wanted in plain[one]]
    versions = {re.sub(r"-v[\d.]+$", "", one) for one in found}
    if len(versions) == 1:
        return found[-1]
    which = "could be each of" if found else "is no file and none of"
    raise BadArgument(f"--synthetic {name} {which} {', '.join(found or MODELS)}: give one of them")


def _set_layers(config: Config, layers: int) -> Config:
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    config = {**config, key: layers}
    if kinds := config.get("layer_types"):
        config["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    return config


def make_vanilla_shape(args: ModelArgs) -> Shape:
    """Make the shape of a vanilla transformer of a network's sizes, which mlx-lm can run.

    It is a Llama, or with experts a Mixtral: with Q and P, norms on the stream and skips, whatever
    ``args`` lack.
    """
    sizes = (
        "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
        "max_position_embeddings", "rms_norm_eps", "rope_theta",
    )  # fmt: skip
    kind = "mixtral" if args.num_local_experts else "llama"
    experts = ("num_local_experts", "num_experts_per_tok") if args.num_local_experts else ()
    config: Config = {key: getattr(args, key) for key in (*sizes, *experts)}
    if {*args.layer_types} > {"sliding_attention"}:  # mlx-lm's Llama slides in some layers only
        config |= {"layer_types": args.layer_types, "sliding_window": args.sliding_window}
    return Shape(kind, config | {"model_type": kind})


def make_random_weights(layout: Layout, prefix: str = "") -> dict[str, mx.array]:
    """Make a network's tensors under canonical names, lazily, the same ones at each call.

    Matrices are normal with a variance of 1 / inputs, which keeps any stream within bounds. The
    weights of norms are one, biases zero.

    Args:
        layout: the network, and the number type of its tensors.
        prefix: make only tensors whose names start with it.
    """

    def make(name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
        if len(shape) > 1:
            return mx.random.normal(shape, scale=shape[-1] ** -0.5, key=key)
        return mx.zeros(shape) if name.endswith(".bias") else mx.ones(shape)

    keys = mx.random.split(mx.random.key(SEED), len(layout.tensors))
    return {
        name: make(name, array.shape, key).astype(layout.dtype)
        for key, (name, array) in zip(keys, layout.tensors.items(), strict=True)
        if name.startswith(prefix)
    }


def repeat_weights(layout: Layout) -> dict[str, mx.array]:
    """Make weights for measuring speed alone, which a CPU makes many times as fast.

    They have the scale of ``make_random_weights``, but the same few numbers come again and again.
    """
    few = mx.random.normal((REPEATED,), key=mx.random.key(SEED))

    def make(like: mx.array) -> mx.array:
        if like.ndim < 2:
            return mx.ones_like(like)
        rows = -(-like.size // REPEATED)
        row = (few * like.shape[-1] ** -0.5).astype(like.dtype)
        return mx.broadcast_to(row, (rows, REPEATED)).flatten()[: like.size].reshape(like.shape)

    return {name: make(array) for name, array in layout.tensors.items()}


def make_stock_model(
    shape: Shape,
    dtype: mx.Dtype,
    quantization: Quantization | None = None,
    make: Callable[[Layout], dict[str, mx.array]] = make_random_weights,
) -> nn.Module:
    """Make mlx-lm's own network of a shape, with random, lazy weights.

    Args:
        shape: one for which mlx-lm has a network.
        dtype: the number type of weights that are not quantized.
        quantization: how to quantize the matrices; None: not at all.
        make: makes its weights, by canonical names.

    Raises:
        UserError: if mlx-lm cannot build it.
    """
    tensors = make(Layout(shape.args, dtype))
    config = shape.stock_config
    try:
        kind, args_kind = mlx_lm.utils._get_classes(config)
        model = kind(args_kind.from_dict(config))
        weights = to_source_names(shape.family, tensors, shape.args, dtype)
        return _load_weights(model, weights, quantization)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"mlx-lm cannot build a {config['model_type']} of this shape ({first_line(error)}): "
            "give another"
        ) from error


def make_skipless_plan(args: ModelArgs, remove: str, dtype: mx.Dtype, quantized: bool) -> Plan:
    """Plan what to remove from a network, by arithmetic alone; a pretrained one loses its skips.

    Raises:
        UserError: if the removal is impossible.
    """
    skipless = args.norm == "pre" and args.skip == "both"
    return make_plan(args, remove=remove, skipless=skipless, dtype=dtype, quantized=quantized)


def make_skipless_model(
    args: ModelArgs,
    dtype: mx.Dtype,
    quantization: Quantization | None = None,
    make: Callable[[Layout], dict[str, mx.array]] = make_random_weights,
) -> nn.Module:
    """Make this package's network as ``convert`` writes it, with random, lazy weights."""
    written = replace(args, fused=Layout(args, dtype, quantization).fusable_layers)
    tensors = make(Layout(args, dtype))
    weights = to_source_names(FAMILIES["skipless"], tensors, written, dtype)
    return _load_weights(Model(written), weights, quantization)


def _load_weights(
    model: nn.Module, weights: dict[str, mx.array], quantization: Quantization | None
) -> nn.Module:
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights([*weights.items()])
    model.eval()
    if quantization is None:
        return model
    check_packable(model, quantization)
    return quantize_nearest(model, quantization)[0]


def write_checkpoint(
    shape: Shape,
    dtype: mx.Dtype,
    out: str | Path,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Write the weights of ``make_stock_model`` as a checkpoint, in its family's names and layout.

    It has no tokenizer. No more than a layer and a shard of it are in memory at a time.

    Args:
        shape: what to write.
        dtype: the number type of all tensors.
        out: the folder to write.
        progress: called with (stage, done, total).

    Raises:
        UserError: if the folder exists, its parent does not, or the disk lacks room.
    """
    layout = Layout(shape.args, dtype)
    layers = range(shape.args.num_hidden_layers)
    parts = [EMBEDDING, *(f"model.layers.{layer}" for layer in layers), FINAL_NORM, HEAD]
    with Writer(expand_path(out), layout.nbytes(), "--save") as writer:
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
    """Evaluate arrays one by one, so that only one needs memory for its intermediate results."""
    for array in arrays:
        mx.eval(array)
