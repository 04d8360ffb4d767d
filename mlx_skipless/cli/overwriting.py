"""What a command writes is none of what it reads: checked before its work."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..constants import BUNDLED
from ..errors import UserError
from ..options import expand_path, flag_name

WRITTEN = ("json", "plot", "markdown", "report", "output")
READ = (
    "model", "models", "source", "result", "teacher", "draft_model", "compare", "adapter_path",
    "tokenizer", "prompt_cache_file", "synthetic", "data", "validation", "calibration", "config",
    "tasks", "include_path", "runs",
)  # fmt: skip
FIGURES = (".png", ".pdf", ".svg")  # lie in a folder without being a part of what is read there


def check_overwriting(options: Mapping[str, Any]) -> None:
    """Check that no file to be written is one that the command reads, or lies in a folder of them.

    A new file may be made in such a folder, and a figure drawn again there. The bundled model and
    the Hub's cache are always read.

    Raises:
        UserError: if one is.
    """
    read = [path for name in _name_inputs(options) for path in _list_paths(options.get(name))]
    for name in WRITTEN:
        given = options.get(name)
        if given is None or not (path := expand_path(given)).is_file():
            continue
        for source in (*read, BUNDLED, _find_cache()):
            if _is_part(path, source):
                raise UserError(
                    f"{flag_name(name)} {given}: is a part of {source}, which is read"
                    if source.is_dir()
                    else f"{flag_name(name)} {given}: is a file that is read, give another one"
                )


def _find_cache() -> Path:
    """Where huggingface_hub keeps what it downloads; not there before the first download."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _name_inputs(options: Mapping[str, Any]) -> Iterator[str]:
    yield from READ
    if options.get("resume"):
        yield "mlx_path"


def _list_paths(given: Any) -> Iterator[Path]:
    """The paths that exist among an option's values."""
    for one in given if isinstance(given, list | tuple) else [given]:
        if isinstance(one, str | Path):
            path = expand_path(one)
            if not os.path.exists(path):  # as bench takes NAME:LAYERS
                path = Path(str(path).rpartition(":")[0] or path)
            if os.path.exists(path):
                yield path


def _is_part(path: Path, source: Path) -> bool:
    """Whether a file is another or lies in a folder, be it by a link on either side."""
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    if not root.is_dir():
        return target == root
    beside = Path(os.path.realpath(path.parent)) / path.name
    if target.suffix.lower() in FIGURES:
        return False
    if target.is_relative_to(root) or beside.is_relative_to(root):
        return True
    links = (file for file in root.iterdir() if file.is_symlink())
    return any(os.path.realpath(file) == str(target) for file in links)
