"""Reading a model, a Hugging Face folder or a GGUF file: tensor by tensor, dense, canonical names.

Nothing is held: ``Checkpoint.read`` gives the tensors asked for, and they live as long as the
caller keeps them. Checks every name and shape before any weight is read, and runs no code and
unpickles nothing from a checkpoint.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ..architectures.config import read_model_args
from ..architectures.families import Config, Family, find_family
from ..architectures.tensors import (
    Place,
    arrange,
    find_places,
    find_shape,
    restore_gains,
    to_canonical_modules,
)
from ..constants import FLOAT_NAMES
from ..errors import UserError
from ..network.model import Model, ModelArgs
from ..network.names import LINEAR_PATHS
from ..network.parts import tensors_of
from . import files, hub
from .files import read_json
from .gguf_file import GGUFStore
from .packed import MLXScheme, Scheme, find_scheme

FLOATS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
TYPES = FLOATS | {
    "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64,
    "I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64, "BOOL": mx.bool_,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
LARGEST = 1 << 31  # MLX counts no further along an axis


class Store(Protocol):
    """Named tensors on disk: ``shapes`` and ``dtypes`` are known unread, ``read`` gets them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def dtypes(self) -> Mapping[str, mx.Dtype | None]: ...
    def read(self, names: Iterable[str]) -> dict[str, mx.array]: ...
    def read_ahead(self, names: Iterable[str]) -> None: ...


@dataclass(frozen=True)
class _Tensor:
    """Where a safetensors file has a tensor; ``dtype`` is None for a type that MLX has not."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: mx.Dtype | None


class SafetensorsStore:
    """The safetensors files of a folder.

    Raises:
        UserError: if there are none, or one is missing, truncated, corrupt or outside the folder,
            or two have tensors of one name.
    """

    def __init__(self, folder: Path):
        self._tensors: dict[str, _Tensor] = {}
        for file in _weight_files(folder):
            for name, tensor in _tensors_of(file):
                if name in self._tensors:
                    raise UserError(
                        f"{name} is in {file} and in {self._tensors[name].file.name}: "
                        "download the checkpoint again, into a new folder"
                    )
                self._tensors[name] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
        self._state = self._files()

    def _files(self) -> dict[Path, tuple[int, int]]:
        found = {tensor.file: tensor.file.stat() for tensor in self._tensors.values()}
        return {file: (state.st_size, state.st_mtime_ns) for file, state in found.items()}

    def check_unchanged(self) -> None:
        """To be called when MLX has read the files: it takes what is missing for read.

        Raises:
            UserError: if one has changed since it was opened.
        """
        for file, state in self._files().items():
            if state != self._state[file]:
                raise UserError(f"{file} changed while it was read: try again")

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        return {name: _read(name, self._tensors[name]) for name in names}

    def read_ahead(self, names: Iterable[str]) -> None:
        found = (self._tensors[name] for name in names)
        files.read_ahead((tensor.file, tensor.offset, tensor.nbytes) for tensor in found)


def _tensors_of(file: Path) -> list[tuple[str, _Tensor]]:
    """What the header of a safetensors file says.

    Raises:
        UserError: if it cannot be true. The safetensors library checks it, but for names that come
            twice, of which parsers may take either.
    """
    if not files.is_there(file):
        raise UserError(f"no {file.name} in {file.parent}: download the checkpoint again")
    try:
        with safe_open(str(file), framework="numpy"):
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length), object_pairs_hook=_once)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} is truncated or corrupt ({error}): download or copy it again"
        ) from error
    header.pop("__metadata__", None)
    if any(size >= LARGEST for entry in header.values() for size in entry["shape"]):
        raise UserError(f"{file} has a tensor of an absurd shape: download or copy it again")
    return [
        (
            name,
            _Tensor(
                file,
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
                tuple(entry["shape"]),
                TYPES.get(entry["dtype"]),
            ),
        )
        for name, entry in header.items()
    ]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names something twice")
    return found


def _read(name: str, tensor: _Tensor) -> mx.array:
    """A tensor's values. Read here, since MLX takes what it could not read for read."""
    if tensor.dtype is None:
        raise UserError(f"{name} in {tensor.file} has a number type that is not read")
    if tensor.nbytes == 0:
        return mx.zeros(tensor.shape, tensor.dtype)
    *rows, last = tensor.shape or (1,)
    array = mx.zeros((*rows, last * tensor.dtype.size), mx.uint8)
    mx.eval(array)
    files.fill(tensor.file, tensor.offset, array)
    return array.view(tensor.dtype).reshape(tensor.shape)


def _weight_files(folder: Path) -> list[Path]:
    """Of which the index only says what they are called: all that is in them belongs to the model.

    So transformers and mlx-lm take it, too.
    """
    index = folder / INDEX
    if files.is_there(index):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f'{index} has no "weight_map": download the checkpoint again')
        found = sorted(set(names.values()))
        for name in found:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    f"{index} names {name!r}, which is not a file of its folder: refused"
                )
        missing = [name for name in found if not files.is_there(folder / name)]
        if missing:
            raise UserError(
                f"{folder} lacks {missing[0]}, which its index names: download it again"
            )
        return [folder / name for name in found]
    files_found = sorted(folder.glob("model*.safetensors"))
    if not files_found:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = " (pickled .bin and .pt files are never read)" if pickled else ""
        raise UserError(f"no model*.safetensors in {folder}{why}: give a safetensors checkpoint")
    return files_found


class UnpackedStore:
    """A store whose packed matrices look dense: ``X.weight`` whatever its parts on disk."""

    def __init__(self, store: Store, scheme: Scheme):
        self.packed, self._scheme = store, scheme
        self.runs = isinstance(scheme, MLXScheme)
        self._paths = {
            name.removesuffix(scheme.marker)
            for name in store.shapes
            if name.endswith(scheme.marker)
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, mx.Dtype | None] = {}
        for name in store.shapes:
            path = name.rpartition(".")[0]
            if path in self._paths and name.endswith(scheme.parts):
                self.shapes[f"{path}.weight"] = scheme.shape(path, store.shapes, store.dtypes)
                scales = store.dtypes[f"{path}.scales"]
                self.dtypes[f"{path}.weight"] = scales if _is_float(scales) else mx.bfloat16
            elif path in self._paths and name.endswith(".bias") and not self._is_bias(name):
                continue  # GPTQ exporters write a bias of zeros beside matrices that have none
            else:
                self.shapes[name] = store.shapes[name]
                self.dtypes[name] = store.dtypes[name]

    def _is_bias(self, name: str) -> bool:
        return bool(mx.any(self.packed.read([name])[name] != 0).item())

    def _parts(self, name: str) -> list[str]:
        """The tensors on disk that one stands for: itself, if it is not packed."""
        path = name.removesuffix(".weight")
        if path not in self._paths or not name.endswith(".weight"):
            return [name]
        return [path + p for p in self._scheme.parts if path + p in self.packed.shapes]

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        parts = {name: self._parts(name) for name in names}
        arrays = self.packed.read(part for group in parts.values() for part in group)
        return {
            name: arrays[name]
            if group == [name]
            else self._scheme.dense(name.removesuffix(".weight"), arrays)
            for name, group in parts.items()
        }

    def read_ahead(self, names: Iterable[str]) -> None:
        self.packed.read_ahead(part for name in names for part in self._parts(name))


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        name: what the user called it.
        folder: where its tokenizer files lie; None for a GGUF file.
        config: its config.json, or the same made from GGUF's metadata.
        family: its architecture.
        args: the network it holds, in this package's terms.
        packing: how its weights were quantized, e.g. "GPTQ 4-bit"; None for dense ones.
        store: its tensors; None where only the config is at hand.
    """

    name: str
    path: Path
    config: Config
    family: Family
    args: ModelArgs
    packing: str | None
    store: Store | None

    @property
    def folder(self) -> Path | None:
        return self.path if self.path.is_dir() else None

    @cached_property
    def dtype(self) -> mx.Dtype:
        """The type of the matrices; the config's word where only that is at hand."""
        declared = self.config.get("torch_dtype") or self.config.get("dtype")
        if self.store is None:
            return getattr(mx, declared) if declared in FLOAT_NAMES else mx.bfloat16
        of_matrices = Counter(
            d for n, d in self._dtypes.items() if _is_float(d) and len(self._shapes[n]) > 1
        )
        return of_matrices.most_common(1)[0][0] if of_matrices else mx.float32

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Where the store has each canonical tensor."""
        assert self.store is not None
        return find_places(self.family, self.store.shapes)

    @property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        assert self.store is not None
        return self.store.shapes

    @property
    def _dtypes(self) -> Mapping[str, mx.Dtype | None]:
        assert self.store is not None
        return self.store.dtypes

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """The tensors of these canonical names, dense; absent ones are left out."""
        assert self.store is not None, "a config alone has no weights"
        wanted = self._wanted(names)
        arrays = self.store.read({own for place in wanted.values() for own in place.names})
        found = {name: arrange(place, arrays, self.args) for name, place in wanted.items()}
        return restore_gains(found, self.family.gain_offset)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system read these tensors, while others are worked on."""
        assert self.store is not None
        self.store.read_ahead(own for place in self._wanted(names).values() for own in place.names)

    def _wanted(self, names: Iterable[str]) -> dict[str, Place]:
        return {name: self._places[name] for name in names if name in self._places}

    @property
    def packed_by_mlx(self) -> bool:
        """Whether its matrices are packed in a way that mlx-lm runs as it is."""
        return isinstance(self.store, UnpackedStore) and self.store.runs

    def read_packed(self, prefix: str) -> dict[str, mx.array]:
        """The tensors whose canonical names start with ``prefix``, just as on disk."""
        assert isinstance(self.store, UnpackedStore)
        wanted = {n: place for n, place in self._packed_places.items() if n.startswith(prefix)}
        arrays = self.store.packed.read({own for place in wanted.values() for own in place.names})
        return {name: arrange(place, arrays, self.args) for name, place in wanted.items()}

    def packed_placeholders(self) -> dict[str, mx.array]:
        """All of them, lazy: their shapes and types hold, their values mean nothing."""
        assert isinstance(self.store, UnpackedStore)
        store = self.store.packed
        arrays = {
            name: mx.zeros(shape, store.dtypes[name] or mx.uint8)
            for name, shape in store.shapes.items()
        }
        return {n: arrange(place, arrays, self.args) for n, place in self._packed_places.items()}

    @property
    def _packed_places(self) -> dict[str, Place]:
        assert isinstance(self.store, UnpackedStore)
        return find_places(self.family, self.store.packed.shapes)

    @property
    def packed_settings(self) -> Config:
        """The config's ``quantization``, its matrices under their canonical names."""
        settings: Config = {}
        for key, value in self.config["quantization"].items():
            own = "." in key or isinstance(value, dict | bool)
            modules = to_canonical_modules(self.family, key) if own else [key]
            settings |= dict.fromkeys(modules, value)
        return settings

    def validate(self) -> None:
        """Compare every name and shape with the network's.

        Raises:
            UserError: for a tensor that is missing, misshapen, not a float, or not the network's.
        """
        expected = {name: tuple(a.shape) for name, a in tensors_of(Model(self.args)).items()}
        optional = _optional(expected, self.args)
        for name, wanted in expected.items():
            if name not in self._places:
                if name in optional:
                    continue
                raise UserError(
                    f"{self.name} has no tensor {name}: the checkpoint is incomplete or "
                    "config.json describes another model"
                )
            place = self._places[name]
            found = find_shape(place, self._shapes, self.args)
            if found != wanted:
                raise UserError(
                    f"{_called(place, name)} in {self.name} has shape {found}, config.json asks "
                    f"for {wanted}: correct config.json or download the checkpoint again"
                )
            if not all(_is_float(self._dtypes[original]) for original in place.names):
                raise UserError(
                    f"{_called(place, name)} in {self.name} has a number type that is not read; "
                    f"known: {', '.join(FLOATS)}"
                )
        for name, place in self._places.items():
            tied_head = self.args.tie_word_embeddings and name == "lm_head.weight"
            ignored = place.names[0].endswith(self.family.ignored)
            if name not in expected and not tied_head and not ignored:
                raise UserError(
                    f"{self.name} has a tensor {place.names[0]} that a {self.config['model_type']} "
                    "of this config does not use: config.json describes another model"
                )


def _is_float(dtype: mx.Dtype | None) -> TypeGuard[mx.Dtype]:
    return dtype is not None and mx.issubdtype(dtype, mx.floating)


def _called(place: Place, name: str) -> str:
    """A tensor as a user finds it in the source."""
    whole = not place.stacked and not place.fused
    return place.names[0] if whole else f"{name}, from {place.names[0]},"


def _optional(names: Iterable[str], args: ModelArgs) -> set[str]:
    """Gains and linear paths may be absent in some layers (a gain of one, a path of zero)."""
    gains = ("_norm.weight",) if args.norm == "qkv" else ()
    return {name for name in names if name.endswith((*gains, *LINEAR_PATHS))}


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    config_only: bool = False,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a model for reading.

    Args:
        source: a Hugging Face folder, a .gguf file, a config.json (no weights then), or a Hub id.
        revision: of a Hub id: branch, tag or commit.
        config_only: fetch and read no more than the config.
        trust_remote_code: fetch a Hub id's Python files too, for its tokenizer.

    Raises:
        UserError: for whatever is wrong with the source.
    """
    path = hub.resolve(
        str(source), revision=revision, config_only=config_only, code=trust_remote_code
    )
    name = str(source)
    if not path.is_dir():
        files.is_there(path)
        if path.suffix == ".gguf":
            gguf_store = GGUFStore(path)
            return _checked(name, path, gguf_store.config, gguf_store, gguf_store.packing)
        if path.suffix == ".json":
            return _checked(name, path, read_json(path), None, None)
        raise UserError(f"{path} is no model: give a folder, a .gguf file or a Hub id")
    config = read_json(path / "config.json")
    files.check_small(path)
    find_family(config)  # an unknown architecture is the more helpful complaint
    scheme = find_scheme(config)
    if config_only and not any(path.glob("*.safetensors")):
        return _checked(name, path, config, None, None)
    store = SafetensorsStore(path)
    if scheme is None:
        return _checked(name, path, config, store, None)
    return _checked(name, path, config, UnpackedStore(store, scheme), scheme.name)


def _checked(
    name: str, path: Path, config: Config, store: Store | None, packing: str | None
) -> Checkpoint:
    family = find_family(config)
    if config.get("model_file") is not None and config["model_type"] != "skipless":
        raise UserError(
            f"{name} brings its own code ({config['model_file']}), which is never run here: what "
            'its network is only that knows; if it is none of its own, take "model_file" out of '
            "config.json"
        )
    tensors = None if store is None else find_places(family, store.shapes).keys()
    args = replace(read_model_args(config, tensors), fused={})  # they are cut out when read
    checkpoint = Checkpoint(name, path, config, family, args, packing, store)
    if store is not None:
        checkpoint.validate()
    return checkpoint
