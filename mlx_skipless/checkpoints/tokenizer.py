"""Tokenizers of models: loaded to be used, and carried from a source to a result."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx_lm.utils
import transformers
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError, first_line
from . import files, hub
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
# For a config.json of a model type of ours: transformers, which reads tokenizers for mlx-lm, warns
# of a type that it does not know unless it finds settings of none.
NO_MODEL_TYPE = {"transformers": {"model_type": ""}}
GENERATION_CONFIG = "generation_config.json"
GIVE_CHECKPOINT = "give a checkpoint with a Hugging Face tokenizer"


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def carry_tokenizer(
    checkpoint: Checkpoint, folder: Path, *, stock: bool, trust_remote_code: bool
) -> bool:
    """Put the source's tokenizer, chat template and generation settings into a folder.

    The files are copied if the result has the source's model type (``stock``). Otherwise
    transformers, which chooses a tokenizer's class by the model's type, too, reads the tokenizer
    with the source's config and saves it, as mlx-lm does.

    Returns whether the source has a tokenizer.

    Raises:
        UserError: if the tokenizer cannot be read, or a file to copy is a link out of the source.
    """
    if isinstance(checkpoint.store, GGUFStore):
        return _save_tokenizer(checkpoint, folder, trust_remote_code)
    source = checkpoint.path
    files.check_links(source, code=trust_remote_code)
    _check_named_files(source)
    present = [name for name in TOKENIZER_FILES if files.is_there(source / name)]
    if files.is_there(source / GENERATION_CONFIG):
        shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    if not set(present) & set(VOCABULARY_FILES):
        return False
    if not stock:
        return _save_tokenizer(checkpoint, folder, trust_remote_code)
    code = [file.name for file in source.glob("*.py")] if trust_remote_code else []
    for name in (*present, *code):
        shutil.copyfile(source / name, folder / name)
    return True


def _check_named_files(source: Path) -> None:
    """Refuse a tokenizer_config.json that names a file outside the folder; transformers reads it.

    A name of a file that does not exist is harmless: it comes from the author's own machine.
    """
    config = source / "tokenizer_config.json"
    if files.is_there(config):
        for key, name in read_json(config).items():
            if key.endswith("_file") and isinstance(name, str) and os.path.lexists(source / name):
                files.check_inside(source / name, source, f'"{key}" in {config} leads')


def _save_tokenizer(checkpoint: Checkpoint, folder: Path, trust_remote_code: bool) -> bool:
    tokenizer: Any
    with _explain_errors(checkpoint.path, GIVE_CHECKPOINT):
        if isinstance(checkpoint.store, GGUFStore):
            tokenizer = checkpoint.store.tokenizer()
        else:
            tokenizer = _read_tokenizer(checkpoint.path, checkpoint.config, trust_remote_code)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
    return tokenizer is not None


def open_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a checkpoint; None if it has none.

    Raises:
        UserError: if it cannot be read.
    """
    if isinstance(checkpoint.store, GGUFStore):
        return checkpoint.store.tokenizer()
    if not has_tokenizer(checkpoint.path):
        return None
    return load_tokenizer(checkpoint.path, checkpoint.config, trust_remote_code=trust_remote_code)


def load_tokenizer(
    folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool, name: str | None = None
) -> TokenizerWrapper:
    """Load the tokenizer of a model's folder, as mlx-lm wraps it.

    ``config`` is the model's config.json. ``name`` is what an error calls it, not its folder.

    Raises:
        UserError: if it is missing or cannot be read.
    """
    options = _make_options(config, trust_remote_code)
    with _explain_errors(name or folder, f"copy it again, or {GIVE_CHECKPOINT}"):
        return mlx_lm.utils.load_tokenizer(
            folder, options, eos_token_ids=config.get("eos_token_id")
        )


def fetch_tokenizer(source: str) -> transformers.PreTrainedTokenizerBase:
    """Read the tokenizer of a folder or Hub id, which needs no model beside it; runs no code.

    Raises:
        UserError: if there is none or it cannot be read.
    """
    folder = hub.resolve(source, config_only=True)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    with _explain_errors(source, "give a folder or Hub id with a Hugging Face tokenizer"):
        return _read_tokenizer(folder, config, trust_remote_code=False)


def _read_tokenizer(
    folder: Path, config: Mapping[str, Any], trust_remote_code: bool
) -> transformers.PreTrainedTokenizerBase:
    options = _make_options(config, trust_remote_code)
    return transformers.AutoTokenizer.from_pretrained(str(folder), **options)


def _make_options(config: Mapping[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """Options of transformers' ``AutoTokenizer``, which does not know this package's model type."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if config.get("model_type") == "skipless":
        options["config"] = transformers.PreTrainedConfig()
    return options


@contextlib.contextmanager
def _explain_errors(name: str | Path, remedy: str) -> Iterator[None]:
    """Turn whatever transformers and tokenizers raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the tokenizer of {name} cannot be read ({first_line(error)}): {remedy}"
        ) from error
