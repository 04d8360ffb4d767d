"""Tokenizers of models: loaded to be used, and carried from a source to a result."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx_lm.utils
import transformers
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError, first_line
from . import files
from .checkpoint import Checkpoint
from .files import read_json
from .gguf_file import GGUFStore

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


GENERATION_CONFIG = "generation_config.json"


def carry_tokenizer(
    checkpoint: Checkpoint, folder: Path, *, stock: bool, trust_remote_code: bool
) -> bool:
    """Put the source's tokenizer, chat template and generation settings into ``folder``.

    transformers picks a tokenizer's class by the model's type as well, so its files are copied only
    where that stays (``stock``); otherwise transformers reads the tokenizer with the source's
    config and saves it, as mlx-lm does. Returns whether there was a tokenizer.

    Raises:
        UserError: if there is one that cannot be read, or what would be taken is a link elsewhere.
    """
    if isinstance(checkpoint.store, GGUFStore):
        return _save(checkpoint.store.tokenizer, checkpoint.path, folder)
    source = checkpoint.folder
    assert source is not None, "a config alone has no tokenizer"
    files.check_links(source, code=trust_remote_code)
    _check_named_files(source)
    present = [name for name in TOKENIZER_FILES if files.is_there(source / name)]
    if files.is_there(source / GENERATION_CONFIG):
        shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    if not set(present) & set(VOCABULARY_FILES):
        return False
    if not stock:
        options = make_tokenizer_options(checkpoint.config, trust_remote_code=trust_remote_code)
        read = transformers.AutoTokenizer.from_pretrained
        return _save(lambda: read(str(source), **options), source, folder)
    code = [file.name for file in source.glob("*.py")] if trust_remote_code else []
    for name in (*present, *code):
        shutil.copyfile(source / name, folder / name)
    return True


def _check_named_files(source: Path) -> None:
    """Refuse a tokenizer_config.json that names a file elsewhere, which older transformers read.

    The name of a file that is not there comes from an author's own machine.
    """
    config = source / "tokenizer_config.json"
    if files.is_there(config):
        for key, name in read_json(config).items():
            if key.endswith("_file") and isinstance(name, str) and os.path.lexists(source / name):
                files.check_inside(source / name, source, f'"{key}" in {config} leads')


def _save(read: Callable[[], Any], source: Path, folder: Path) -> bool:
    try:
        tokenizer = read()
        if tokenizer is None:
            return False
        tokenizer.save_pretrained(str(folder))
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise whatever their parsers do
        raise UserError(
            f"the tokenizer of {source} cannot be read ({first_line(error)}): give a checkpoint "
            "with a Hugging Face tokenizer"
        ) from error
    return True


def load_tokenizer(
    folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool, name: str | None = None
) -> TokenizerWrapper:
    """The tokenizer of a model folder, as mlx-lm wraps it; ``name`` is what an error calls it.

    Raises:
        UserError: if it is missing or cannot be read.
    """
    options = make_tokenizer_options(config, trust_remote_code=trust_remote_code)
    try:
        return mlx_lm.utils.load_tokenizer(
            folder, options, eos_token_ids=config.get("eos_token_id")
        )
    except Exception as error:  # transformers and tokenizers raise whatever they like
        raise UserError(
            f"the tokenizer of {name or folder} cannot be read ({first_line(error)}): copy it "
            "again, or "
            "give a checkpoint with a Hugging Face tokenizer"
        ) from error


def open_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a source that is open: transformers' or mlx-lm's; None without one.

    Raises:
        UserError: if there is one that cannot be read.
    """
    if isinstance(checkpoint.store, GGUFStore):
        return checkpoint.store.tokenizer()
    folder = checkpoint.folder
    if folder is None or not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return None
    return load_tokenizer(folder, checkpoint.config, trust_remote_code=trust_remote_code)


def make_tokenizer_options(config: Mapping[str, Any], *, trust_remote_code: bool) -> dict[str, Any]:
    """For transformers' ``AutoTokenizer``, which does not know this package's model type."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if config.get("model_type") == "skipless":
        options["config"] = transformers.PreTrainedConfig()
    return options
