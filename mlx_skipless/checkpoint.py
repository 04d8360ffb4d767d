"""Reading a model, a Hugging Face folder or a GGUF file: tensor by tensor, dense, canonical names.

Nothing is held: ``Checkpoint.read`` gives lazy arrays of the tensors asked for, and they live as
long as the caller keeps them. Checks every name and shape before any weight is read, and runs no
code and unpickles nothing from a checkpoint.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from . import hub
from .arrangement import Place, arranged, canonical_modules, places, shape
from .config import model_args
from .errors import UserError
from .families import Config, Family, family_of
from .gguf_file import GGUFStore
from .layout import tensors_of
from .model import Model, ModelArgs
from .names import LINEAR_PATHS, is_stream_gain
from .packed import MLXScheme, Scheme, scheme_of

FLOATS = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
FLOAT_NAMES = ("float16", "bfloat16", "float32")


class Store(Protocol):
    """Named tensors on disk: ``shapes`` and ``dtypes`` are known unread, ``read`` gets them."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def dtypes(self) -> Mapping[str, mx.Dtype | None]: ...
    def read(self, names: Iterable[str]) -> dict[str, mx.array]: ...


class SafetensorsStore:
    """The safetensors files of a folder.

    Raises:
        UserError: if there are none, or one is missing, truncated, corrupt or outside the folder.
    """

    def __init__(self, folder: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, mx.Dtype | None] = {}
        self._file_of: dict[str, Path] = {}
        for file in _weight_files(folder):
            try:
                with safe_open(str(file), framework="numpy") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                        header = tensors.get_slice(name)
                        self.shapes[name] = tuple(header.get_shape())
                        self.dtypes[name] = FLOATS.get(header.get_dtype())
                        self._file_of[name] = file
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file} is truncated or corrupt ({error}): download or copy it again"
                ) from error

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        read: dict[str, mx.array] = {}
        for file, wanted in by_file.items():
            # Loaded anew each time: a kept lazy array would keep its data once evaluated.
            try:
                arrays: Any = mx.load(str(file), format="safetensors")
            except (RuntimeError, OSError) as error:
                raise UserError(
                    f"{file} cannot be read ({error}): download or copy it again"
                ) from error
            read |= {name: arrays[name] for name in wanted}
        return read


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f'{index} has no "weight_map": download the checkpoint again')
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    f"{index} names {name!r}, which is not a file of its folder: refused"
                )
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"{folder} lacks {missing[0]}, which its index names: download it again"
            )
        return [folder / name for name in files]
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
                self.shapes[f"{path}.weight"] = scheme.shape(path, store.shapes)
                self.dtypes[f"{path}.weight"] = store.dtypes[f"{path}.scales"] or mx.bfloat16
            elif path in self._paths and name.endswith(".bias") and not self._is_bias(name):
                continue  # GPTQ exporters write a bias of zeros beside matrices that have none
            else:
                self.shapes[name] = store.shapes[name]
                self.dtypes[name] = store.dtypes[name]

    def _is_bias(self, name: str) -> bool:
        return bool(mx.any(self.packed.read([name])[name] != 0).item())

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        parts: list[str] = []
        packed: list[str] = []
        plain: list[str] = []
        for name in names:
            path = name.removesuffix(".weight")
            if path in self._paths and name.endswith(".weight"):
                packed.append(path)
                parts += [path + p for p in self._scheme.parts if path + p in self.packed.shapes]
            else:
                plain.append(name)
        arrays = self.packed.read([*plain, *parts])
        read = {name: arrays[name] for name in plain}
        return read | {f"{path}.weight": self._scheme.dense(path, arrays) for path in packed}


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
        of_matrices = Counter(d for n, d in self._dtypes.items() if len(self._shapes[n]) > 1 and d)
        return of_matrices.most_common(1)[0][0] if of_matrices else mx.float32

    @property
    def lazy(self) -> bool:
        """Whether what ``read`` gives is not in memory yet; GGUF's blocks are unpacked at once."""
        return not isinstance(self.store, GGUFStore)

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Where the store has each canonical tensor."""
        assert self.store is not None
        return places(self.family, self.store.shapes)

    @property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        assert self.store is not None
        return self.store.shapes

    @property
    def _dtypes(self) -> Mapping[str, mx.Dtype | None]:
        assert self.store is not None
        return self.store.dtypes

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """The tensors of these canonical names, dense and lazy; absent ones are left out."""
        assert self.store is not None, "a config alone has no weights"
        wanted = {name: self._places[name] for name in names if name in self._places}
        arrays = self.store.read({own for place in wanted.values() for own in place.names})
        return {
            name: self._gain(name, arranged(place, arrays, self.args))
            for name, place in wanted.items()
        }

    def _gain(self, name: str, array: mx.array) -> mx.array:
        """A tensor as it acts: gains that are stored less an offset get it back, in float32."""
        offset = self.family.gain_offset
        return array.astype(mx.float32) + offset if offset and is_stream_gain(name) else array

    @property
    def packed_by_mlx(self) -> bool:
        """Whether its matrices are packed in a way that mlx-lm runs as it is."""
        return isinstance(self.store, UnpackedStore) and self.store.runs

    def read_packed(self, prefix: str = "") -> dict[str, mx.array]:
        """The tensors whose canonical names start with ``prefix``, lazy, just as on disk."""
        assert isinstance(self.store, UnpackedStore)
        found = places(self.family, self.store.packed.shapes)
        wanted = {name: place for name, place in found.items() if name.startswith(prefix)}
        arrays = self.store.packed.read({own for place in wanted.values() for own in place.names})
        return {name: arranged(place, arrays, self.args) for name, place in wanted.items()}

    @property
    def packed_settings(self) -> Config:
        """The config's ``quantization``, its matrices under their canonical names."""
        settings: Config = {}
        for key, value in self.config["quantization"].items():
            own = "." in key or isinstance(value, dict | bool)
            modules = canonical_modules(self.family, key) if own else [key]
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
            found = shape(place, self._shapes, self.args)
            if found != wanted:
                raise UserError(
                    f"{_called(place, name)} in {self.name} has shape {found}, config.json asks "
                    f"for {wanted}: correct config.json or download the checkpoint again"
                )
            if any(self._dtypes[original] is None for original in place.names):
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


def _called(place: Place, name: str) -> str:
    """A tensor as a user finds it in the source."""
    whole = not place.stacked and not place.fused
    return place.names[0] if whole else f"{name}, from {place.names[0]},"


def _optional(names: Iterable[str], args: ModelArgs) -> set[str]:
    """Gains and linear paths may be absent in some layers (a gain of one, a path of zero)."""
    gains = ("_norm.weight",) if args.norm == "qkv" else ()
    return {name for name in names if name.endswith((*gains, *LINEAR_PATHS))}


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        UserError: if it is missing, malformed or no object.
    """
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no {file.name} in {file.parent}: give a Hugging Face model folder"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(read, dict):
        raise UserError(f"{file} holds no JSON object: download it again")
    return read


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
    if path.suffix == ".gguf":
        gguf_store = GGUFStore(path)
        return _checked(name, path, gguf_store.config, gguf_store, gguf_store.packing)
    if path.is_file():
        if path.suffix != ".json":
            raise UserError(f"{path} is no model: give a folder, a .gguf file or a Hub id")
        return _checked(name, path, read_json(path), None, None)
    config = read_json(path / "config.json")
    family_of(config)  # an unknown architecture is the more helpful complaint
    scheme = scheme_of(config)
    if config_only and not any(path.glob("*.safetensors")):
        return _checked(name, path, config, None, None)
    store = SafetensorsStore(path)
    if scheme is None:
        return _checked(name, path, config, store, None)
    return _checked(name, path, config, UnpackedStore(store, scheme), scheme.name)


def _checked(
    name: str, path: Path, config: Config, store: Store | None, packing: str | None
) -> Checkpoint:
    family = family_of(config)
    tensors = None if store is None else places(family, store.shapes).keys()
    args = replace(model_args(config, tensors), fused={})  # they are cut out when read
    checkpoint = Checkpoint(name, path, config, family, args, packing, store)
    if store is not None:
        checkpoint.validate()
    return checkpoint
