"""Tokenizers of models: loaded to be used, and carried from a source to a result."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import mlx_lm.utils
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..errors import UserError, first_line
from . import files, hub
from .files import read_json
from .gguf_file import GGUFStore
from .guarded import GuardedTokenizer, explain_panics
from .tekken import TEKKEN, read_tekken
from .tokenizer_json import fill_holes, has_holes, read_tokenizer

JSON, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"  # where models that see pictures have theirs
VOCABULARY_FILES = (JSON, "*.model", "vocab.json", "vocab.txt", "*.tiktoken", TEKKEN)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    TEMPLATE,
    PROCESSOR_TEMPLATE,
    f"{files.TEMPLATES}/*.jinja",
)
# For a config.json of a type that transformers does not know. It reads tokenizers for mlx-lm, warns
# of such a type, and fails over a scaled RoPE of one, unless it finds settings of none.
NO_MODEL_TYPE = {"transformers": {"model_type": ""}}
GENERATION_CONFIG = "generation_config.json"
# What rules cut differently: contractions, capitals, numbers, marks, runs of spaces and lines.
PROBE = "It's WE'LL fooBar_baz(x);  12345 1.5\n\n\te\u0301t\u00e9 \u65e5\u672c/\r\n   end "
PROBED = 8  # special tokens with text behind them
KEPT = ("legacy",)  # settings of tokenizer_config.json that transformers obeys and does not save
GIVE_CHECKPOINT = "give a checkpoint with a Hugging Face tokenizer"


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer."""
    return any(_find_files(folder, *VOCABULARY_FILES))


def _find_files(folder: Path, *patterns: str) -> Iterator[Path]:
    """The files of a folder that have these names and are no link to nothing, pipe or device."""
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            if not file.name.startswith(".") and files.is_there(file):
                yield file


class Opened(Protocol):
    """A model whose files are at hand."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def store(self) -> Any: ...


def carry_tokenizer(
    checkpoint: Opened, folder: Path, *, stock: bool, trust_remote_code: bool
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
    if files.is_there(source / GENERATION_CONFIG):
        read_json(source / GENERATION_CONFIG)  # a result that nobody can read is none
        shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    if not has_tokenizer(source):
        return False
    if not stock:
        return _save_tokenizer(checkpoint, folder, trust_remote_code)
    code = ["*.py"] if trust_remote_code else []
    with _prepare(source, checkpoint.config, trust_remote_code) as ready:
        for file in _find_files(ready, *TOKENIZER_FILES, *code):
            copy = folder / file.relative_to(ready)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    return True


def _check_named_files(source: Path) -> None:
    """Refuse a tokenizer_config.json that names a file outside the folder; transformers reads it.

    A name of a file that does not exist is harmless: it comes from the author's own machine.
    """
    config = source / CONFIG
    if files.is_there(config):
        for key, name in read_json(config).items():
            if key.endswith("_file") and isinstance(name, str) and os.path.lexists(source / name):
                files.check_inside(source / name, source, f'"{key}" in {config} leads')


def _save_tokenizer(checkpoint: Opened, folder: Path, trust_remote_code: bool) -> bool:
    tokenizer: Any
    with _explain_errors(checkpoint.path, GIVE_CHECKPOINT):
        if isinstance(checkpoint.store, GGUFStore):
            tokenizer = checkpoint.store.tokenizer()
        else:
            tokenizer = _read_tokenizer(checkpoint.path, checkpoint.config, trust_remote_code)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
            _keep_settings(checkpoint.path, folder)
            _check_read_back(tokenizer, folder, checkpoint.path, trust_remote_code)
    return tokenizer is not None


def _keep_settings(source: Path, folder: Path) -> None:
    """Put what transformers obeys and does not save into a result's tokenizer_config.json."""
    if not source.is_dir() or not files.is_there(source / CONFIG):
        return
    given = read_json(source / CONFIG)
    if kept := {key: given[key] for key in KEPT if key in given}:
        text = json.dumps(read_json(folder / CONFIG) | kept, indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text, encoding="utf-8")


def _check_read_back(tokenizer: Any, folder: Path, source: Path, trust_remote_code: bool) -> None:
    """Check that transformers reads what was written; for some types it has rules of its own.

    Raises:
        UserError: if it cuts text otherwise.
    """
    config = read_json(folder / "config.json")
    read = _read_tokenizer(folder, config, trust_remote_code)
    special = [f"{token} a\n b" for token in tokenizer.all_special_tokens[:PROBED]]
    text = PROBE + "".join(special)
    if read(text).input_ids != tokenizer(text).input_ids:
        way_out = "use another export of it"
        if not source.is_dir():
            way_out = "convert the Hugging Face model instead"
        raise UserError(
            f"transformers cuts text for a {config['model_type']} by a rule of its own and not by "
            f"that of {source}: {way_out}"
        )


@contextlib.contextmanager
def _prepare(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> Iterator[Path]:
    """Yield a folder with a tokenizer that transformers and mlx-lm can read, the same or a copy.

    Raises:
        UserError: if the tokenizer is broken, or makes of a text what no memory holds.
    """
    settings = read_json(folder / CONFIG) if files.is_there(folder / CONFIG) else {}
    if not isinstance(settings.get("model_max_length"), int | float | None):
        raise UserError(f'"model_max_length" in {folder / CONFIG} is no number: correct it')
    texts: dict[str, str] = {}
    content = read_tokenizer(folder / JSON) if files.is_there(folder / JSON) else None
    made = None
    if content is not None and has_holes(content, folder / JSON):
        options = _make_options(config, trust_remote_code)
        found = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        texts[JSON] = fill_holes(content, found)
    elif content is None and not any(_find_files(folder, *VOCABULARY_FILES[:-1])):
        made = read_tekken(folder / TEKKEN) if files.is_there(folder / TEKKEN) else None
    if not settings.get("chat_template") and (template := _read_processor_template(folder)):
        texts[TEMPLATE] = template
    if not texts and made is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        if made is not None:
            made.save_pretrained(place)
        for file in _find_files(folder, "config.json", *TOKENIZER_FILES, "*.py"):
            kept = copy / file.relative_to(folder)
            kept.parent.mkdir(exist_ok=True)
            if made is None or file.name not in (TEKKEN, JSON, CONFIG):
                kept.unlink(missing_ok=True)
                kept.symlink_to(file.resolve())
        for name, text in texts.items():
            (copy / name).unlink(missing_ok=True)
            (copy / name).write_text(text, encoding="utf-8")
        yield copy


def _read_processor_template(folder: Path) -> str | None:
    """The chat template that a model's processor has, unless there is a file of the tokenizer's."""
    if not files.is_there(folder / PROCESSOR_TEMPLATE) or files.is_there(folder / TEMPLATE):
        return None
    template = read_json(folder / PROCESSOR_TEMPLATE).get("chat_template")
    return template if isinstance(template, str) else None


def open_tokenizer(checkpoint: Opened, *, trust_remote_code: bool) -> Any:
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
) -> GuardedTokenizer:
    """Load the tokenizer of a model's folder, as mlx-lm wraps it.

    ``config`` is the model's config.json. ``name`` is what an error calls it, not its folder.

    Raises:
        UserError: if it is missing, cannot be read, or belongs to another model.
    """
    options, called = _make_options(config, trust_remote_code), str(name or folder)
    _check_tokenizer(folder, called, trust_remote_code)
    with _explain_errors(called, f"copy it again, or {GIVE_CHECKPOINT}"):
        with _prepare(folder, config, trust_remote_code) as ready:
            wrapper = mlx_lm.utils.load_tokenizer(
                ready, options, eos_token_ids=config.get("eos_token_id")
            )
        return GuardedTokenizer(wrapper, called, count_embeddings(config))


def _check_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> None:
    """Check that a folder has a tokenizer; transformers makes an empty one of its settings alone.

    Raises:
        UserError: if it has none, unless it brings code, which may have files of other names.
    """
    brings_code = trust_remote_code and any(folder.glob("*.py"))
    if not has_tokenizer(folder) and not brings_code:
        raise UserError(
            f"{name} has no tokenizer (tokenizer.json, tokenizer.model or another): copy it there"
        )


def count_embeddings(config: Mapping[str, Any]) -> int | None:
    """Read from a model's config how many embeddings it has; None where it is silent."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if type(part.get("vocab_size")) is int:
            return part["vocab_size"]
    return None


def fetch_tokenizer(source: str) -> transformers.PreTrainedTokenizerBase:
    """Read the tokenizer of a folder or Hub id, which needs no model beside it; runs no code.

    Raises:
        UserError: if there is none or it cannot be read.
    """
    folder = hub.resolve(source, config_only=True)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    _check_tokenizer(folder, source, trust_remote_code=False)
    with _explain_errors(source, "give a folder or Hub id with a Hugging Face tokenizer"):
        return _read_tokenizer(folder, config, trust_remote_code=False)


def _read_tokenizer(
    folder: Path, config: Mapping[str, Any], trust_remote_code: bool
) -> transformers.PreTrainedTokenizerBase:
    options = _make_options(config, trust_remote_code)
    with _prepare(folder, config, trust_remote_code) as ready:
        return transformers.AutoTokenizer.from_pretrained(str(ready), **options)


def tell_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json needs for transformers to read the tokenizer beside it."""
    return {} if config.get("model_type") in CONFIG_MAPPING_NAMES else NO_MODEL_TYPE


def _make_options(config: Mapping[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """Options of transformers' ``AutoTokenizer``, which does not know all of mlx-lm's types."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    own = config.get("model_type") == "skipless"
    if own or (tell_transformers(config) and not trust_remote_code):
        options["config"] = transformers.PreTrainedConfig()
    return options


@contextlib.contextmanager
def _explain_errors(name: str | Path, remedy: str) -> Iterator[None]:
    """Turn whatever transformers and tokenizers raise into a UserError."""
    try:
        with explain_panics(name):
            yield
    except UserError:
        raise
    except StrictDataclassFieldValidationError as error:  # transformers reads that file, too
        *_, why = str(error).splitlines()
        raise UserError(
            f"config.json of {name} is malformed ({why.strip()}): correct it"
        ) from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the tokenizer of {name} brings its own code: add --trust-remote-code if you "
                "trust it and the command has that flag, else use another tokenizer"
            ) from error
        raise UserError(
            f"the tokenizer of {name} cannot be read ({first_line(error)}): {remedy}"
        ) from error
