"""A GGUF file of an architecture that only mlx-lm knows, as a folder that mlx-lm loads.

mlx-lm reads safetensors, lazily. So the file's tensors are written once, one at a time, into a
folder beside the result's, which is there as long as it is needed.
"""

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..architectures.config import check_sizes
from ..checkpoints.gguf_file import GGUFStore
from ..checkpoints.safetensors import Shape, Store, find_usual_dtype
from ..checkpoints.tokenizer import carry_tokenizer
from ..checkpoints.writer import Writer
from ..errors import UserError
from ..network.names import HEAD
from ..network.parts import dtype_name, tensors_of
from ..progress import Progress
from .stock import StockSource


class DenseView:
    """A GGUF file's tensors, dense and of one number type."""

    packing = None

    def __init__(self, source: GGUFStore, dtype: mx.Dtype):
        self._source, self._dtype = source, dtype
        self.shapes: Mapping[str, Shape] = source.shapes
        self.dtypes: Mapping[str, mx.Dtype | None] = dict.fromkeys(source.shapes, dtype)

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Read the tensors of these names."""
        return {name: self._source.decode(name, self._dtype) for name in names}

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system fetch these tensors in the background."""
        self._source.read_ahead(names)

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened."""
        self._source.check_unchanged()


@contextmanager
def unpack(
    source: StockSource, out: Path, *, dtype: mx.Dtype | None, packed: bool, progress: Progress
) -> Iterator[StockSource]:
    """Unpack a source's GGUF file into a folder beside ``out``, for as long as the block lasts.

    Args:
        source: the model; one that is a folder already is yielded as it is.
        out: the folder of the result.
        dtype: of the tensors; None: that of most of the file's matrices.
        packed: whether matrices stay packed that MLX can have packed without a new rounding.
        progress: called with (stage, done, total).

    Raises:
        UserError: if tensors are missing or of other shapes than the metadata ask for, or if the
            disk lacks room.
    """
    file = source.gguf
    if file is None:
        yield source
        return
    check_tensors(source)
    usual = find_usual_dtype(file.shapes, file.dtypes)
    packed = packed and file.runs
    store: Store = file.packed if packed else DenseView(file, dtype or usual)
    size = sum(math.prod(s) * (store.dtypes[n] or mx.uint8).size for n, s in store.shapes.items())
    _check_space(source.name, out, size)
    # No longer a name than a file system takes.
    with Writer(out.with_name(f"{out.name[:50]}.unpacked"), size) as writer:
        _write_tensors(store, writer, progress)
        file.check_unchanged()
        config: dict[str, Any] = dict(source.config)
        config["torch_dtype"] = dtype_name(dtype or usual)
        if not packed:
            config.pop("quantization", None)
        writer.write_json("config.json", config)
        trust = source.trust_remote_code
        carry_tokenizer(_Opened(file), writer.folder, stock=True, trust_remote_code=trust)
        yield replace(source, path=writer.folder, config=config)


class _Opened:
    """A GGUF file as ``carry_tokenizer`` asks for it."""

    def __init__(self, store: GGUFStore):
        self.path, self.config, self.store = store.path, store.config, store


def check_tensors(source: StockSource) -> None:
    """Compare the names and shapes of a GGUF file's tensors with those of mlx-lm's network.

    Raises:
        UserError: for a tensor that is missing, misshapen, or not the network's.
    """
    file = source.gguf
    assert file is not None
    check_sizes(source.config, len(file.shapes))
    expected = {n: tuple(a.shape) for n, a in tensors_of(source.build_shapes(dense=True)).items()}
    if source.config.get("tie_word_embeddings"):
        expected.pop(f"{HEAD}.weight", None)
    again = "download it again, or convert the Hugging Face model instead"
    for name, shape in expected.items():
        found = file.shapes.get(name)
        if found is None:
            raise UserError(f"{source.name} has no tensor {name}: {again}")
        if found != shape:
            raise UserError(
                f"{name} in {source.name} has shape {found}, its metadata ask for {shape}: {again}"
            )
    if rest := file.shapes.keys() - expected.keys():
        raise UserError(
            f"{source.name} has a tensor {min(rest)} that a {source.config['model_type']} of its "
            f"metadata does not use: {again}"
        )


def _check_space(name: str, out: Path, size: int) -> None:
    parent = out.absolute().parent
    free = shutil.disk_usage(parent).free
    if 2 * size > free:
        raise UserError(
            f"{name} is unpacked beside the result first, which takes {size / 1e9:.2f} GB and the "
            f"result as much at most; {parent} has {free / 1e9:.2f} GB free: make room or give "
            "another --mlx-path"
        )


def _write_tensors(store: Store, writer: Writer, progress: Progress) -> None:
    modules: dict[str, list[str]] = {}
    for name in store.shapes:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for done, names in enumerate(modules.values()):
        progress("unpacking", done, len(modules))
        writer.add(store.read(names))
    progress("unpacking", len(modules), len(modules))
    writer.finish_weights(sum(map(math.prod, store.shapes.values())))
