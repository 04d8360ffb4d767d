"""Loading a model to run: a converted one without trust, any other as mlx-lm does."""

import contextlib
import glob
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..architectures.config import check_sizes, read_model_args
from ..architectures.families import FAMILIES, find_family
from ..architectures.family import DROP_LISTS, NO_WEIGHTS, Family, Stock, read_dropped
from ..architectures.tensors import find_places, list_shapes
from ..architectures.wrappers import TIED, is_wrapper, take_text_model
from ..checkpoints import files, hub
from ..checkpoints.files import read_config
from ..checkpoints.packed import is_packed
from ..checkpoints.safetensors import FLOATS, SafetensorsStore, Store, is_float
from ..checkpoints.tokenizer import GENERATION_CONFIG, load_tokenizer
from ..errors import UserError, quote_error
from ..network import reduced
from ..network.model import Model, ModelArgs
from ..network.names import HEAD
from ..network.parts import dtype_name
from ..options import expand_path
from .adapters import apply_adapters
from .caches import try_forward
from .context import read_context
from .decoding import build_decoded, open_decoded
from .old_keys import add_old_keys, find_lost_window

QUANTIZATION_KEYS = ("quantization", "quantization_config")


def load(
    path_or_hf_repo: str | Path,
    *,
    revision: str | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a converted model, a skipless source, or any model that mlx-lm knows.

    A skipless network is built from this package; the checkpoint's own model file is not run.

    Args:
        path_or_hf_repo: a folder or a Hub id.
        revision: a branch, tag or commit of a Hub id.
        adapter_path: the folder of LoRA adapters to apply.
        lazy: leave the weights on disk until they are used.
        trust_remote_code: let a model run code that it brings; a skipless one's is never run.

    Returns:
        The model and its tokenizer, as ``mlx_lm.load`` gives them.

    Raises:
        UserError: if there is no such model, it is broken, or it asks for trust.
    """
    model, folder, config = load_network(
        path_or_hf_repo,
        revision=revision,
        adapter_path=adapter_path,
        lazy=lazy,
        trust_remote_code=trust_remote_code,
    )
    return model, load_tokenizer(folder, config, trust_remote_code=trust_remote_code)


def load_network(
    path_or_hf_repo: str | Path,
    *,
    revision: str | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Path, dict[str, Any]]:
    """Load a model without its tokenizer, which it need not have.

    Args:
        path_or_hf_repo: a folder or a Hub id.
        revision: a branch, tag or commit of a Hub id.
        adapter_path: the folder of LoRA adapters to apply.
        lazy: leave the weights on disk until they are used.
        trust_remote_code: let a model run code that it brings; a skipless one's is never run.

    Returns:
        The model, its folder and its config.

    Raises:
        UserError: if there is no such model, it is broken, or it asks for trust.
    """
    folder = hub.resolve(str(path_or_hf_repo), revision=revision, code=trust_remote_code)
    if not folder.is_dir():
        gguf = files.is_gguf(folder)
        way_out = f"`convert.py --model {folder}` makes one" if gguf else "give one"
        raise UserError(f"{folder} is no model folder: {way_out}")
    config, own = _read_config(folder, path_or_hf_repo, trust_remote_code)
    store = SafetensorsStore(folder)
    check_sizes(config, len(store.shapes))
    packed, decoded = is_packed(store), None
    classes = _get_own_classes if own else mlx_lm.utils._get_classes
    with _explain_errors(path_or_hf_repo, store):
        if packed and (own or not config.get("model_file")):
            decoded = open_decoded(config, store, classes)
        stays = packed and decoded is None
        overrides = _find_overrides(config, own, decoded or store, stays, path_or_hf_repo)
        if (dense := decoded or _find_spare(config, store, packed)) is not None:
            config = mlx_lm.utils.load_config(folder) | overrides
            model = build_decoded(config, dense.load(), classes)
        else:
            with _show(folder, store.files) as folder_shown:
                model, config = mlx_lm.utils.load_model(
                    folder_shown,
                    lazy=True,
                    model_config=overrides,
                    get_model_classes=classes,
                    trust_remote_code=trust_remote_code and not own,
                )
        _check_types(model, folder)
        model.context = read_context(config)
        model.lost_window = find_lost_window(config)
        try_forward(model)
        if adapter_path is not None:
            model = apply_adapters(model, expand_path(adapter_path))
        if not lazy:
            mx.eval(model.parameters())
    store.check_unchanged()
    return model, folder, config


def _read_config(
    folder: Path, name: str | Path, trust_remote_code: bool
) -> tuple[dict[str, Any], bool]:
    """Read a folder's config.json, and tell whether this package's own code builds its network.

    Raises:
        UserError: if something beside the weights is broken, or the model asks for trust.
    """
    config = read_config(folder)
    files.check_small(folder)
    if files.is_there(folder / GENERATION_CONFIG):  # which mlx-lm reads, too
        files.read_json(folder / GENERATION_CONFIG)
    own = config.get("model_type") == "skipless" or reduced.DROPPED in config
    code = config.get("model_file")
    if code and not own:
        if not trust_remote_code:
            raise UserError(
                f"{name} brings its own code ({code}): add --trust-remote-code if you trust it"
            )
        if not files.is_there(folder / str(code)):
            raise UserError(f"{folder} lacks {code}, its own code: download it again")
    return config, own


def _find_spare(
    config: dict[str, Any], store: SafetensorsStore, packed: bool
) -> SafetensorsStore | None:
    """Return the store if mlx-lm refuses tensors of it that hold no weights, where it is dense."""
    spare = any(name.endswith(NO_WEIGHTS) for name in store.shapes)
    return store if spare and not packed and not config.get("model_file") else None


def _find_overrides(
    config: dict[str, Any], own: bool, store: Store, packed: bool, name: str | Path
) -> dict[str, Any]:
    """Find what mlx-lm shall take for a config's entries.

    Args:
        config: the config.json of the model that the user called ``name``.
        own: whether this package's own code builds its network.
        store: its tensors.
        packed: whether some of them are packed.
        name: what the user called the model.
    """
    overrides: dict[str, Any] = {"model_file": None} if own else {}
    if config.get("model_type") == "skipless":
        tensors = list_shapes(find_places(find_family(config), store.shapes), store.shapes)
        overrides |= asdict(read_model_args(config, tensors))
    else:
        overrides |= tell_mlx_lm(config, store, name)
    if not packed:  # a declaration may be left over; mlx-lm would believe it
        overrides |= dict.fromkeys(QUANTIZATION_KEYS)
    return overrides


def tell_mlx_lm(config: dict[str, Any], store: Store | None, name: str | Path) -> dict[str, Any]:
    """Put what a config means into the keys that mlx-lm's own network reads.

    It has defaults of its own for keys that are missing, and some are: transformers 5 writes
    RoPE's base into ``rope_parameters`` alone. What this package cannot read is mlx-lm's to judge.

    Args:
        config: the config.json of a model that mlx-lm runs.
        store: its tensors, which know its biases and whether it has a head; of packed ones only
            the head is believed. None where there are none.
        name: what the user called the model.

    Raises:
        UserError: if mlx-lm's network would compute something else without a word.
    """
    text, family = config, FAMILIES.get(str(config.get("model_type")))
    if is_wrapper(config):
        text, family = take_text_model(config, weights=store is not None)
    if any(map(bool, read_dropped(text).values())):
        way_out = f"`convert.py --model {name}` makes one that does not"
        if family is None:
            way_out = "use the model that it was made of, and drop from that"
        raise UserError(
            f"{name} lacks sub-layers ({', '.join(DROP_LISTS)}), which mlx-lm's own network of a "
            f"{config['model_type']} ignores: {way_out}"
        )
    old = add_old_keys(config)
    settings = {key: old[key] for key in old if key not in config or config[key] != old[key]}
    if family is not None:
        settings |= _tell_family(text, family, store, name)
    return {"text_config": text | settings} if is_wrapper(config) else settings


def _tell_family(
    config: dict[str, Any], family: Family, store: Store | None, name: str | Path
) -> dict[str, Any]:
    """Put what the config of a known family means into the keys that mlx-lm's network reads.

    Arguments and errors are those of ``tell_mlx_lm``.
    """
    if family.stock is None:
        return {}
    try:
        shapes = None
        if store is not None:
            shapes = list_shapes(find_places(family, store.shapes), store.shapes)
            if is_packed(store):
                if family.to_own_keys(config).get(TIED) is None:
                    config = config | {TIED: not any(n.startswith(f"{HEAD}.") for n in shapes)}
                shapes = None
        args = read_model_args(config, shapes)
    except UserError as error:
        if _asks_what_is_ignored(config, family, family.stock):
            raise UserError(f"{name}: {error}") from error
        return {}
    lacks = []
    if args.hidden_act not in family.stock.activations:
        lacks.append(f'"hidden_act" {args.hidden_act!r}')
    if args.rope and not family.stock.scales_rope:
        lacks.append("a scaled RoPE")
    if lacks:
        raise UserError(
            f"{name} has {' and '.join(lacks)}, which mlx-lm's own network of a "
            f"{config['model_type']} ignores: `convert.py --model {name}` makes one that does not"
        )
    return family.make_stock_settings(args)


def _asks_what_is_ignored(config: dict[str, Any], family: Family, stock: Stock) -> bool:
    """Whether a config asks for an activation or a RoPE that mlx-lm's network does not look at."""
    kind = config.get(family.keys.get("hidden_act", "hidden_act"))
    rope = add_old_keys(config).get("rope_scaling") or {}
    plain = isinstance(rope, dict) and {rope.get("type"), rope.get("rope_type")} <= {
        None,
        "default",
    }
    return kind not in (None, *stock.activations) or not (plain or stock.scales_rope)


@contextlib.contextmanager
def _show(folder: Path, listed: list[Path]) -> Iterator[Path]:
    """A folder of a model in which mlx-lm finds the listed weights and no others.

    mlx-lm reads whatever is called model*.safetensors. If these are not the listed files, the
    folder is one of links. MLX keeps the files open, so it need not last.
    """
    if sorted(glob.glob(f"{folder}/model*.safetensors")) == sorted(map(str, listed)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        shown = Path(name)
        for file in folder.absolute().iterdir():
            if file.suffix != ".safetensors":
                (shown / file.name).symlink_to(file)
        for i, file in enumerate(listed):
            (shown / f"model-{i}.safetensors").symlink_to(file.absolute())
        yield shown


@contextlib.contextmanager
def _explain_errors(name: str | Path, store: SafetensorsStore) -> Iterator[None]:
    """Turn whatever a library raises, when it builds what a config describes, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # some of mlx-lm's models exit without their package
        store.check_unchanged()
        said = quote_error(error)
        remedy = "correct its config.json, or use another export"
        if said.startswith("Missing"):  # of MLX's load_weights
            remedy = "copy all of its weight files, or correct its config.json"
        raise UserError(f"{name} cannot be loaded ({said}): {remedy}") from error


def _check_types(model: nn.Module, folder: Path) -> None:
    """Refuse weights that are no floats, unless they are packed: MLX would compute with them."""
    for path, module in model.named_modules():
        packed = any("scale" in key for key in module)
        for key, array in module.items():
            own = key.startswith("_")  # a constant of mlx-lm's code, no weight
            if isinstance(array, mx.array) and not (is_float(array.dtype) or packed or own):
                raise UserError(
                    f"{path}.{key} in {folder} is of the type {dtype_name(array.dtype)}, and "
                    f"weights are {', '.join(map(dtype_name, FLOATS.values()))}: use another export"
                )


def _get_own_classes(config: dict) -> tuple[Any, type]:
    if config.get("model_type") == "skipless":
        return Model, ModelArgs
    return reduced.Model, reduced.ModelArgs
