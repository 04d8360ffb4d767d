"""The fourth step of a conversion: config.json and the weights, part by part."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import mlx.core as mx

from ..architectures.family import DROP_LISTS
from ..architectures.tensors import rename_to_source, to_source_module, to_source_names
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.tokenizer import tell_transformers
from ..checkpoints.writer import Writer
from ..network.model import Model, ModelArgs
from ..network.names import EMBEDDING, FINAL_NORM, HEAD, is_stream_norm_weight
from ..network.parts import Merged, Parts, dtype_name
from ..progress import Progress, Steps, tell_part
from ..quantization.calibration import CalibratedParts, NearestParts
from ..quantization.distillation import distill
from ..quantization.layout import PackedLayout
from ..quantization.passage import STEPS
from ..removal.merger import Merger
from ..removal.renumbering import rename_layer, shorten_config
from ..removal.table import TabledParts
from ..text.samples import Passages
from .check import WrittenParts
from .job import Job

MODEL_FILE = "model.py"
# Keys (or how they begin) that mean something to mlx-lm in these architectures, and to no one else.
ONLY_MLX_LMS = ("quantiz", "text_config", "layer_norm_bias")
# What a result says in mlx-lm's terms.
LLM_DROPS = (*DROP_LISTS, "auto_map")


def write(job: Job, writer: Writer, passages: Passages | None, progress: Progress) -> None:
    """Write config.json and weights of a job's result, in the place of earlier ones.

    Args:
        job: all decided.
        writer: of the result's folder.
        passages: the text to quantize against and to distill with, if need be.
        progress: called with (stage, done, total).
    """
    writer.discard_weights()
    writer.write_json("config.json", make_config(job))
    tokens = None if passages is None else passages.calibration
    tell = partial(progress, "converting")
    parts = _make_parts(job, tokens, tell)
    layers = range(job.plan.before.num_hidden_layers)
    makers: list[Callable[[], Mapping[str, mx.array]]] = [parts.embedding]
    makers += [*(partial(parts.layer, layer) for layer in layers), parts.head]
    for at, make in enumerate(makers):
        tell_part(tell, at, len(makers))(0, STEPS)
        writer.add(_rename(job, make()))
    writer.finish_weights(job.layout.count())
    tell(STEPS * len(makers), STEPS * len(makers))
    if job.options.distill and tokens is not None:
        _distill(job, writer, tokens, progress)


def make_config(job: Job) -> dict[str, Any]:
    """Make the config.json of a job's result."""
    source, layout, args = job.checkpoint.config, job.layout, job.stored_args
    if job.form.stock:
        if job.layers is not None:
            source = shorten_config(source, job.layers)
        gone = ONLY_MLX_LMS + (LLM_DROPS if job.plan.before.removed else ())
        config = {k: v for k, v in source.items() if not k.startswith(gone)}
        config |= job.family.make_stock_settings(args)
    else:
        keep = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = {key: source[key] for key in keep if key in source}
        config |= {k: v for k, v in asdict(args).items() if v is not None}
        config |= {"model_file": MODEL_FILE, "architectures": ["SkiplessForCausalLM"]}
    config |= tell_transformers(config)
    config["torch_dtype"] = dtype_name(layout.dtype)
    config.pop("dtype", None)
    if layout.config_entry is not None:
        settings = {
            to_source_module(job.family, module, args): v
            for module, v in _renumber(job, layout.config_entry).items()
        }
        config["quantization"] = config["quantization_config"] = settings
    return dict(sorted(config.items()))


def _rename(job: Job, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Tensors, of a whole layer or more, as the result's files have them."""
    tensors = _renumber(job, tensors)
    if isinstance(job.layout, PackedLayout):
        return rename_to_source(job.family, tensors, job.stored_args)
    return to_source_names(job.family, tensors, job.stored_args, job.layout.dtype)


def _renumber(job: Job, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries by the canonical name of a module or tensor, under the numbers of the result."""
    if job.layers is None:
        return dict(entries)
    named = ((rename_layer(name, job.layers), entry) for name, entry in entries.items())
    return {name: entry for name, entry in named if name is not None}


def _make_parts(job: Job, tokens: mx.array | None, progress: Steps) -> Parts:
    """The result's tensors as they will be stored."""
    dense = _make_dense_parts(job)
    if isinstance(job.layout, PackedLayout):
        table = dense if job.plan.table else None
        return PackedParts(job.opened, job.layout, table, job.family.gain_offset)
    if job.calibrated and tokens is not None:
        return CalibratedParts(job.source_network(), dense, job.layout, tokens, progress)
    return NearestParts(dense, job.layout)


def _make_dense_parts(job: Job) -> Merged:
    # Gains that are stored less an offset are rounded when that is off.
    gain_dtype = mx.float32 if job.family.gain_offset else job.dtype
    merger = Merger(job.opened, job.plan, job.dtype, gain_dtype)
    if not job.plan.table:
        return merger
    exact = Merger(job.opened, job.plan, mx.float32)
    return TabledParts(merger, exact, job.plan.merged, job.dtype)


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
            return self._read(f"{EMBEDDING}.")
        rows = self._table.embedding()[f"{EMBEDDING}.weight"]
        return self._layout.pack_table(rows, self._checkpoint.read_packed(f"{EMBEDDING}."))

    def layer(self, layer: int) -> dict[str, mx.array]:
        return self._read(f"model.layers.{layer}.")

    def head(self) -> dict[str, mx.array]:
        head = self._read(f"{HEAD}.")
        if not head and self._table is not None:
            head = self._layout.untie_head(self._checkpoint.read_packed(f"{EMBEDDING}."))
        return self._read(f"{FINAL_NORM}.") | head

    def _read(self, prefix: str) -> dict[str, mx.array]:
        found = self._checkpoint.read_packed(prefix)
        return {n: self._shift(n, array) for n, array in found.items() if n in self._layout.tensors}

    def _shift(self, name: str, array: mx.array) -> mx.array:
        change = self._checkpoint.family.gain_offset - self._gain_offset
        if not (change and is_stream_norm_weight(name)):
            return array
        return (array.astype(mx.float32) + change).astype(array.dtype)


def _distill(job: Job, writer: Writer, tokens: mx.array, progress: Progress) -> None:
    """Write the weights again with scales and biases that are trained towards the source."""
    layout = job.layout
    result = _read_all(WrittenParts(writer.folder, layout.args, job.family), layout.args)
    mx.eval(result)
    paths = (name.removesuffix(".scales") for name in result if name.endswith(".scales"))
    forms = {path: form for path in paths if (form := layout.format_of(path)) is not None}
    dense = {name: array for name, array in result.items() if name.rpartition(".")[0] not in forms}
    teacher, student = Model(job.plan.before), Model(layout.args)
    teacher.load_weights([*_read_all(job.source_parts(), job.plan.before).items()])
    student.load_weights([*dense.items()], strict=False)
    teacher.set_dtype(mx.float32)
    student.set_dtype(mx.float32)
    changed = distill(
        teacher,
        student,
        result,
        forms,
        tokens,
        steps=job.options.distill,
        seed=job.options.seed,
        progress=partial(progress, "distilling"),
    )
    writer.discard_weights()
    changed = {name: array.astype(layout.dtype) for name, array in changed.items()}
    writer.add(_rename(job, result | changed))
    writer.finish_weights(layout.count())


def _read_all(parts: Parts, args: ModelArgs) -> dict[str, mx.array]:
    layers = [parts.layer(layer) for layer in range(args.num_hidden_layers)]
    return {k: v for part in (parts.embedding(), *layers, parts.head()) for k, v in part.items()}
