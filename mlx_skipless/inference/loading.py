"""Loading a model to run: a converted one without trust, any other as mlx-lm does."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..architectures.config import read_model_args
from ..architectures.families import find_family
from ..architectures.tensors import find_places, list_shapes
from ..checkpoints import files, hub
from ..checkpoints.files import read_json
from ..checkpoints.safetensors import SafetensorsStore
from ..checkpoints.tokenizer import load_tokenizer
from ..errors import UserError, first_line
from ..network.model import Model, ModelArgs
from .context import read_context

BUNDLED = Path(__file__).parents[1] / "assets" / "tales"  # a source checkpoint that tells tales


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
        raise UserError(f"{folder} is no model folder: `convert.py --model {folder}` makes one")
    config = read_json(folder / "config.json")
    files.check_small(folder)
    skipless = config.get("model_type") == "skipless"
    if config.get("model_file") and not skipless and not trust_remote_code:
        raise UserError(
            f"{path_or_hf_repo} brings its own code ({config['model_file']}): add "
            "--trust-remote-code if you trust it"
        )
    store = SafetensorsStore(folder)
    overrides = {}
    if skipless:
        tensors = list_shapes(find_places(find_family(config), store.shapes), store.shapes)
        overrides = {**asdict(read_model_args(config, tensors)), "model_file": None}
    try:
        model, config = mlx_lm.utils.load_model(
            folder,
            lazy,
            model_config=overrides,
            get_model_classes=_get_own_classes if skipless else mlx_lm.utils._get_classes,
            trust_remote_code=trust_remote_code and not skipless,
        )
        store.check_unchanged()
        model.context = read_context(config)
        if adapter_path is not None:
            model = mlx_lm.utils.load_adapters(model, adapter_path)
            model.eval()
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise UserError(f"{path_or_hf_repo} cannot be loaded: {first_line(error)}") from error
    return model, folder, config


def _get_own_classes(config: dict) -> tuple[type[nn.Module], type]:
    return Model, ModelArgs
