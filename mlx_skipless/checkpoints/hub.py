"""The Hugging Face Hub: what a user calls a model becomes a path on this machine, and back."""

import contextlib
import glob
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..constants import HUB_ID
from ..errors import UserError, first_line
from ..options import expand_path
from . import files
from .safetensors import INDEX, WHOLE, read_index

# All of a repository's subfolders but additional_chat_templates: a pattern's * also matches a "/".
SUBFOLDERS = ["[!a]*/*", "a[!d]*/*"]
# Files of which a model has one each.
CONFIGS = ["config.json", "hf_quant_config.json", "adapter_config.json"]
TOKENIZERS = ["tokenizer.*", "tekken.json", "vocab.*", "*.model", "*.tiktoken"]
DATA_SET = re.compile(rf"({HUB_ID.pattern})(?::([\w.-]*))?(?::([\w.-]+))?")
PRIVATE = "(a private one needs `hf auth login`)"


def is_id(source: str) -> bool:
    """Whether a source is a Hub id: it looks like one, and no such path exists."""
    is_file = source.startswith(".") or source.lower().endswith((".gguf", ".json"))
    return (
        bool(HUB_ID.fullmatch(source)) and not is_file and not os.path.exists(expand_path(source))
    )


class _Bar(huggingface_hub.utils.tqdm):
    """The client's progress bar, on terminals only: in a pipe it would stand beside an error."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"disable": None, **options})


def resolve(
    source: str, *, revision: str | None = None, config_only: bool = False, code: bool = False
) -> Path:
    """Find a model on this machine, or download it from the Hub unless it is in the cache.

    Args:
        source: a path, or a Hub id.
        revision: a branch, tag or commit of a Hub id.
        config_only: leave a Hub id's weights there.
        code: download a Hub id's Python files, too.

    Returns:
        The path of the model's folder or file.

    Raises:
        UserError: if there is no such path or repository, or it cannot be downloaded.
    """
    path = expand_path(source)
    if revision == "":
        raise UserError("--revision is empty: give a branch, a tag or a commit")
    if os.path.exists(path):
        files.check_name(path)
        if revision is not None:
            raise UserError(f"--revision {revision}: {source} is a path, and has none")
        if not (path.is_dir() or path.is_file()):  # a pipe would wait for its other end
            raise UserError(f"{source} is neither a file nor a folder: give a model")
        return (path.is_dir() and files.find_gguf(path)) or path
    if not is_id(source):
        raise UserError(f"no such file or folder: {source} (a Hub id looks like owner/name)")
    patterns = [*files.SMALL, *(["*.py"] if code else [])]
    folder = _fetch(source, revision, patterns, [["*"]] if config_only else [CONFIGS, TOKENIZERS])
    is_model = (folder / "config.json").exists() and not config_only
    if is_model and any(one != folder for one in _fetch_weights(source, revision, folder)):
        raise UserError(f"{source} changed while it was fetched: try again")
    _check_gguf(source, folder, config_only)
    if not folder.is_dir() or not any(folder.iterdir()):  # nothing matched
        raise UserError(f"{source} holds nothing that a model has: give another Hub id")
    return folder


def _fetch_weights(source: str, revision: str | None, folder: Path) -> Iterator[Path]:
    """Fetch the files that ``find_weight_files`` will list; yield the folders that they are in.

    ``folder`` has the small files.
    """
    if not files.is_there(folder / INDEX):
        yield _fetch(source, revision, ["model*.safetensors"])
        return
    named = read_index(folder / INDEX)
    yield _fetch(source, revision, [*map(glob.escape, named)])
    if not any((folder / name).exists() for name in named):
        yield _fetch(source, revision, [WHOLE])


def _fetch(
    source: str, revision: str | None, patterns: list[str], enough: Sequence[list[str]] = ()
) -> Path:
    """Fetch the files of a repository that patterns name, unless they are in the cache.

    Args:
        source: the Hub id.
        revision: a branch, tag or commit of it.
        patterns: of the files.
        enough: one file of each of these lists of patterns makes do if the Hub cannot be reached:
            another program may have filled the cache, and with less.

    Returns:
        The folder of the revision's files.

    Raises:
        UserError: if they cannot be had.
    """
    try:
        with _without_warnings():  # of patterns that match nothing
            folder = huggingface_hub.snapshot_download(
                source,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=SUBFOLDERS,
                tqdm_class=_Bar,
            )
    except Exception as error:  # also those of the client's network library, which has changed
        if isinstance(error, IncompleteSnapshotError):
            cached = Path(error.snapshot_path)
            if enough and all(
                any(f for one in group for f in cached.glob(one)) for group in enough
            ):
                return cached
        raise UserError(_explain_failure(error, source, revision)) from error
    return Path(folder)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep the client's warnings from standing beside an error."""
    logging = huggingface_hub.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_gguf(source: str, folder: Path, config_only: bool) -> None:
    """Say which file to give of a repository that holds GGUF files and nothing else to read."""
    if any(folder.glob("*.safetensors")) or (config_only and (folder / "config.json").exists()):
        return
    try:
        names = huggingface_hub.list_repo_files(source, revision=folder.name)
    except Exception:  # the Hub cannot be reached, and what is missing will be named
        names = [str(file.relative_to(folder)) for file in folder.rglob("*")]
    if found := files.list_gguf(names):
        whole = [name for name in found if not files.GGUF_PART.search(name)]
        way_out = (
            f"`hf download {source} {shlex.quote((whole or found)[0])}` prints the path to give"
        )
        if not whole:
            way_out = "all are parts, which `llama-gguf-split --merge` joins: give what it makes"
        raise UserError(f"{source} holds GGUF files, {files.list_names(found)}: {way_out}")


def _explain_failure(error: Exception, source: str, revision: str | None) -> str:
    """What went wrong in a download, and what to do about it."""
    where = f"{source} at revision {revision}" if revision else source
    # The client looks into its cache when it got no file list, and says why it got none.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    match cause:
        case GatedRepoError():
            return (
                f"{source} is gated: accept its terms on huggingface.co/{source}, then "
                "`hf auth login` or set HF_TOKEN"
            )
        case RevisionNotFoundError():
            return f"{source} has no revision {revision!r}: check --revision"
        case RepositoryNotFoundError() | HFValidationError():
            return f"no such folder, and no such model on the Hub: {source} {PRIVATE}"
        case HfHubHTTPError() if cause.response.status_code in (401, 403):
            return (
                f"the Hub refuses {where} ({first_line(cause)}): `hf auth login` with a token "
                "that may read it, or set HF_TOKEN"
            )
    if cause is error or isinstance(cause, HfHubHTTPError):
        return f"{where} could not be downloaded ({first_line(cause)}): try again"
    part = "only in part " if isinstance(error, IncompleteSnapshotError) else "not "
    return f"the Hub cannot be reached and {where} is {part}in the cache: connect, or give a folder"


def is_data_set(source: str) -> bool:
    """Whether a source is a data set: OWNER/NAME[:SUBSET[:SPLIT]], and no such path exists."""
    named = DATA_SET.fullmatch(source) and not source.endswith((".txt", ".jsonl"))
    return bool(named) and not os.path.exists(source)


def read_data_set(source: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a data set from the first on, fetched as they are asked for.

    Args:
        source: OWNER/NAME[:SUBSET[:SPLIT]]; without a split, the one called train.

    Raises:
        UserError: if the data set cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"no such file: {source}; and to read it as a data set of the Hub takes a package "
            f"({first_line(error)}): pip install 'mlx-lm[train]'"
        ) from error
    match = DATA_SET.fullmatch(source)
    assert match is not None
    name, subset, split = match.groups()
    _check_data_set(name, source)
    try:
        yield from datasets.load_dataset(
            name, subset or None, split=split or "train", streaming=True
        )
    except Exception as error:  # of every format that a data set may have
        said = " ".join(str(error).partition("Example of usage")[0].split()) or type(error).__name__
        raise UserError(
            f"the data set {source} cannot be read ({said}): it is called OWNER/NAME, "
            "OWNER/NAME:SUBSET or OWNER/NAME:SUBSET:SPLIT"
        ) from error


def _check_data_set(name: str, source: str) -> None:
    """Ask the Hub whether it has a data set; ``datasets`` would try for half a minute."""
    try:
        huggingface_hub.dataset_info(name)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"no such file, and no such data set on the Hub: {source} {PRIVATE}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"the Hub refuses the data set {name} ({first_line(error)})") from error
    except Exception as error:
        raise UserError(
            f"no such file: {source}; and the Hub, for a data set of that name, cannot be reached: "
            "connect, or give a file"
        ) from error


def upload(folder: Path, repo: str) -> str:
    """Upload a converted folder as it is, with its model card; returns the page's address.

    Raises:
        UserError: if the Hub refuses.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, repo_type="model")
    except Exception as error:
        raise UserError(
            f"{folder} is written, but its upload to {repo} failed ({first_line(error)}): "
            f"`hf auth login`, then `hf upload {repo} {folder}`"
        ) from error
    return f"{api.endpoint}/{repo}"
