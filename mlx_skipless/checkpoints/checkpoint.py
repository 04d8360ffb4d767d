"""Reading a model, a Hugging Face folder or a GGUF file: tensor by tensor, dense, canonical names.

Nothing is held: ``Checkpoint.read`` returns the tensors asked for, and they live as long as the
caller keeps them. Every name and shape is checked before any weight is read. No code of a
checkpoint is run, and nothing is unpickled.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, overload

import mlx.core as mx

from ..architectures.config import read_dtype, read_model_args
from ..architectures.families import find_family
from ..architectures.family import DROP_LISTS, Config, Family
from ..architectures.tensors import (
    Place,
    arrange,
    find_places,
    find_shape,
    list_shapes,
    restore_gains,
    to_canonical_modules,
)
from ..architectures.wrappers import describe_left_out, take_text_model
from ..errors import UserError
from ..network.model import Model, ModelArgs
from ..network.names import ATTENTION, CHANNEL_PATHS, EMBEDDING, EXPERTS, HEAD, LINEAR_PATHS
from ..network.parts import tensors_of
from . import files, hub
from .files import read_config, read_json
from .gguf_file import GGUFStore
from .packed import UnpackedStore, find_scheme
from .safetensors import (
    FLOATS,
    SafetensorsStore,
    Shape,
    Store,
    explain_second_model,
    find_usual_dtype,
    is_float,
)

OTHER_HEADS = ("Classification", "QuestionAnswering")  # what classes without words end in


@dataclass(frozen=True)
class Blueprint:
    """What a model's config says; the weights may be elsewhere.

    Attributes:
        name: what the user called the model.
        config: its config.json, or the same made from a GGUF file's metadata.
        family: its architecture.
        args: the network that it describes, in this package's terms.
        notes: what there is to know of it, a sentence each.
    """

    name: str
    config: Config
    family: Family
    args: ModelArgs
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def packing(self) -> str | None:
        """How the weights are quantized, e.g. "GPTQ 4-bit"; None for dense or absent ones."""
        return None

    @cached_property
    def dtype(self) -> mx.Dtype:
        """The number type of the matrices."""
        return read_dtype(self.config)

    def without_weights(self) -> "Blueprint":
        """Leave the weights aside, if there are any."""
        return Blueprint(self.name, self.config, self.family, self.args, notes=self.notes)


@dataclass(frozen=True)
class Checkpoint(Blueprint):
    """A model with its weights.

    Attributes:
        path: its folder or its GGUF file.
        store: its tensors as they are called on disk, dense.
    """

    path: Path
    store: Store

    @property
    def packing(self) -> str | None:
        """How the weights are quantized, e.g. "GPTQ 4-bit"; None for dense ones."""
        return self.store.packing

    @cached_property
    def dtype(self) -> mx.Dtype:
        """The number type that most matrices have, whatever the config declares."""
        return find_usual_dtype(self.store.shapes, _list_dtypes(self))

    @property
    def is_uniform(self) -> bool:
        """Whether all tensors that are read have the number type ``dtype``."""
        return {*_list_dtypes(self).values()} == {self.dtype}

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Where the store has each canonical tensor."""
        return find_places(self.family, self.store.shapes)

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        """Read the tensors of these canonical names, dense; absent ones are left out.

        Raises:
            UserError: if one cannot be read.
        """
        wanted = self._find_wanted(names)
        arrays = self.store.read({own for place in wanted.values() for own in place.names})
        found = {name: arrange(place, arrays, self.args) for name, place in wanted.items()}
        return restore_gains(found, self.family.gain_offset)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Have the system fetch these tensors in the background."""
        wanted = self._find_wanted(names)
        self.store.read_ahead(own for place in wanted.values() for own in place.names)

    def _find_wanted(self, names: Iterable[str]) -> dict[str, Place]:
        return {name: self._places[name] for name in names if name in self._places}

    @property
    def packed_by_mlx(self) -> bool:
        """Whether mlx-lm runs its matrices packed as they are."""
        return isinstance(self.store, UnpackedStore | GGUFStore) and self.store.runs

    @property
    def _packed_store(self) -> Store:
        assert isinstance(self.store, UnpackedStore | GGUFStore), "its matrices are not packed"
        return self.store.packed

    @cached_property
    def _packed_places(self) -> dict[str, Place]:
        return find_places(self.family, self._packed_store.shapes)

    def read_packed(self, prefix: str) -> dict[str, mx.array]:
        """Read the tensors whose canonical names start with ``prefix``, packed as on disk."""
        wanted = {n: place for n, place in self._packed_places.items() if n.startswith(prefix)}
        arrays = self._packed_store.read({own for p in wanted.values() for own in p.names})
        return {name: arrange(place, arrays, self.args) for name, place in wanted.items()}

    def packed_placeholders(self) -> dict[str, mx.array]:
        """Lazy zeros of the shapes and types that ``read_packed`` returns, for the whole model."""
        store = self._packed_store
        arrays = {
            name: mx.zeros(shape, store.dtypes[name] or mx.uint8)
            for name, shape in store.shapes.items()
        }
        return {n: arrange(place, arrays, self.args) for n, place in self._packed_places.items()}

    @property
    def packed_settings(self) -> Config:
        """The config's ``quantization``, with canonical names for the matrices that it lists."""
        settings: Config = {}
        for key, value in self.config["quantization"].items():
            is_module = "." in key or isinstance(value, dict | bool)
            modules = to_canonical_modules(self.family, key) if is_module else [key]
            settings |= dict.fromkeys(modules, value)
        return settings

    def validate(self) -> None:
        """Compare every name and shape with the network's.

        Raises:
            UserError: for a tensor that is missing, misshapen, not a float, or not the network's.
        """
        expected = self._expected
        optional, dropped = _find_optional(expected, self.args), _find_dropped(self)
        for name, shape in expected.items():
            if name in self._places:
                self._validate_tensor(name, shape)
            elif name not in optional:
                raise UserError(f"{self.name} has no tensor {name}: {_explain_missing(self)}")
        for name, place in self._places.items():
            tied_head = self.args.tie_word_embeddings and name == f"{HEAD}.weight"
            ignored = place.names[0].endswith(self.family.ignored)
            if (needed := _find_needed(name)) and name not in expected:
                raise UserError(
                    f"{self.name} has a tensor {place.names[0]}, which needs {needed}: take it out"
                )
            if name not in expected and not (tied_head or ignored or name in dropped):
                raise UserError(
                    f"{self.name} has a tensor {place.names[0]} that a {self.config['model_type']} "
                    f"of this config does not use: {_name_config(self)} describes another model"
                )

    @cached_property
    def _expected(self) -> dict[str, Shape]:
        """The shape of each of the network's tensors."""
        return {name: tuple(a.shape) for name, a in tensors_of(Model(self.args)).items()}

    @property
    def is_whole(self) -> bool:
        """Whether every tensor is there as the network has it, also those that may be left out."""
        return all(
            name in self._places
            and find_shape(self._places[name], self.store.shapes, self.args) == shape
            for name, shape in self._expected.items()
        )

    def _validate_tensor(self, name: str, expected: Shape) -> None:
        place = self._places[name]
        found = find_shape(place, self.store.shapes, self.args)
        per_head = name.endswith(CHANNEL_PATHS) and found == (self.args.num_attention_heads,)
        if found != expected and not per_head:
            raise UserError(
                f"{_describe(place, name)} in {self.name} has shape {found}, {_name_config(self)} "
                f"asks for {expected}: correct that or download the checkpoint again"
            )
        if not all(is_float(self.store.dtypes[own]) for own in place.names):
            raise UserError(
                f"{_describe(place, name)} in {self.name} has a number type that is not read; "
                f"known: {', '.join(FLOATS)}"
            )


def _explain_missing(checkpoint: Checkpoint) -> str:
    """Say why a tensor of the network may not be there."""
    named = checkpoint.config.get("architectures")
    head = str(named[0] if isinstance(named, list) and named else "")
    if head.endswith(OTHER_HEADS):
        return f"{_name_config(checkpoint)} says {head}, and that is no language model"
    places = checkpoint._places
    if not places.keys() & checkpoint._expected.keys() and places:
        other = min(own for place in places.values() for own in place.names)
        return f"its tensors have other names, such as {other}: use another export of it"
    return f"the checkpoint is incomplete or {_name_config(checkpoint)} describes another model"


def _name_config(checkpoint: Checkpoint) -> str:
    """Name what describes the network: a GGUF file has no config.json."""
    return "config.json" if checkpoint.path.is_dir() else "its metadata"


def _explain_head(checkpoint: Checkpoint) -> Iterator[str]:
    """Say so where a head beside the embedding to which config.json ties it is another matrix.

    mlx-lm leaves such a head out, and so does a result; transformers 5 keeps it.
    """
    names = f"{HEAD}.weight", f"{EMBEDDING}.weight"
    found = checkpoint.read(names) if checkpoint.args.tie_word_embeddings else {}
    if len(found) < len(names):
        return
    head, embedding = (found[name] for name in names)
    if head.shape != embedding.shape or not mx.array_equal(head, embedding).item():
        own = checkpoint._places[names[0]].names[0]
        yield (
            f"config.json ties the head to the embedding, so {own}, which is another matrix, is "
            'left out, as mlx-lm does: set "tie_word_embeddings" to false to keep it'
        )


def _explain_biases(checkpoint: Checkpoint) -> Iterator[str]:
    """Say so where there are biases that config.json denies; a result has them."""
    own = checkpoint.family.to_own_keys(checkpoint.config)
    for key, matrices in (("attention_bias", ATTENTION), ("mlp_bias", EXPERTS)):
        biased = [name for name in matrices if checkpoint.args.biases.get(name)]
        if own.get(key) is False and biased:
            yield (
                f'"{key}" in config.json is false, but {" and ".join(biased)} have biases, which '
                "are kept: transformers leaves them out"
            )


def _list_dtypes(checkpoint: Checkpoint) -> dict[str, mx.Dtype | None]:
    """The number types of a source's tensors that are read."""
    places = checkpoint._places.values()
    return {name: checkpoint.store.dtypes[name] for place in places for name in place.names}


def _describe(place: Place, name: str) -> str:
    """A tensor's name in the source, for a message."""
    whole = not place.stacked and not place.fused
    return place.names[0] if whole else f"{name}, from {place.names[0]},"


def _find_needed(name: str) -> str | None:
    """What the tensor of a skip needs to be where it is; None for any other tensor."""
    needs = {
        "head_skip": "an attention in its layer and in the one before",
        "output_skip": "to be in the last layer, with an attention",
    }
    return needs.get(name.rpartition(".")[2])


def _find_dropped(checkpoint: Checkpoint) -> set[str]:
    """The tensors of what LLM-Drop left out of a network, but perhaps not out of its files."""
    if not any(checkpoint.config.get(key) for key in DROP_LISTS):
        return set()
    return {*tensors_of(Model(replace(checkpoint.args, removed={})))}


def _find_optional(names: Iterable[str], args: ModelArgs) -> set[str]:
    """The tensors that a layer may lack: norm weights (then 1) and linear paths (then 0)."""
    norms = ("_norm.weight",) if args.norm == "qkv" else ()
    return {name for name in names if name.endswith((*norms, *LINEAR_PATHS))}


@overload
def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    config_only: Literal[False] = False,
    trust_remote_code: bool = False,
) -> Checkpoint: ...


@overload
def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    config_only: bool,
    trust_remote_code: bool = False,
) -> Blueprint: ...


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    config_only: bool = False,
    trust_remote_code: bool = False,
) -> Blueprint:
    """Open a model for reading.

    Args:
        source: a Hugging Face folder, a GGUF file, a Hub id, or with ``config_only`` a
            config.json.
        revision: a branch, tag or commit of a Hub id.
        config_only: do without the weights; those of a Hub id are not fetched.
        trust_remote_code: fetch a Hub id's Python files too, for its tokenizer.

    Returns:
        A ``Checkpoint``; with ``config_only``, and where there are no weights, a ``Blueprint``.

    Raises:
        UserError: for whatever is wrong with the source.
    """
    path = hub.resolve(
        str(source), revision=revision, config_only=config_only, code=trust_remote_code
    )
    notes: list[str] = []
    opened = _open_folder(path, config_only, notes) if path.is_dir() else _open_file(path, notes)
    config, family, store = opened
    if config.get("model_file") is not None and config["model_type"] != "skipless":
        raise UserError(
            f"{source} brings its own code ({config['model_file']}), which is never run here: what "
            'its network is only that knows; if it is none of its own, take "model_file" out of '
            "config.json"
        )
    tensors = None
    if store is not None:
        tensors = list_shapes(find_places(family, store.shapes), store.shapes)
    args = read_model_args(config, tensors)
    args = replace(args, fused={})  # fused matrices are cut apart when they are read
    if store is not None:
        checkpoint = Checkpoint(str(source), config, family, args, path, store, notes=tuple(notes))
        checkpoint.validate()
        notes += [*_explain_head(checkpoint), *_explain_biases(checkpoint)]
        return replace(checkpoint, notes=tuple(notes))
    if not config_only:
        raise UserError(f"{source} is a config without weights: add --dry-run, or give the model")
    return Blueprint(str(source), config, family, args, notes=tuple(notes))


Opened = tuple[Config, Family, Store | None]


def _open_file(path: Path, notes: list[str]) -> Opened:
    files.is_there(path)
    if files.is_gguf(path):
        store = GGUFStore(path)
        return store.config, find_family(store.config), store
    if path.suffix.lower() == ".json":
        return *_take_text_model(read_json(path), False, notes), None
    raise UserError(f"{path} is no model: give a folder, a GGUF file or a Hub id")


def _take_text_model(config: Config, weights: bool, notes: list[str]) -> tuple[Config, Family]:
    """Take the language model out of a config; ``notes`` says what else there was."""
    text, family = take_text_model(config, weights=weights)
    if (left_out := describe_left_out(config)) is not None:
        notes.append(left_out)
    return text, family


def _open_folder(folder: Path, config_only: bool, notes: list[str]) -> Opened:
    """Read a folder's config and open its weights; ``notes`` says why a plan has none."""
    config = read_config(folder)
    files.check_small(folder)
    there = any(folder.glob("*.safetensors"))
    # An unknown architecture is the more helpful complaint.
    config, family = _take_text_model(config, there, notes)
    if config_only and not there:
        find_scheme(config)
        return config, family, None
    try:
        store = SafetensorsStore(folder)
    except UserError as error:
        if not config_only:
            raise
        find_scheme(config)
        notes.append(f"this is planned from config.json alone: {error}")
        return config, family, None
    notes += explain_second_model(folder)
    scheme = find_scheme(config, store)
    return config, family, store if scheme is None else UnpackedStore(store, scheme)
