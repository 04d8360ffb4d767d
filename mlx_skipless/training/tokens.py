"""The text of a run: the files that it comes from, and its tokens."""

import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..checkpoints.files import is_there
from ..options import expand_path, list_files
from ..text import corpus


@dataclass(frozen=True)
class TextFiles:
    """The files of a run's text, as ``run.json`` keeps them.

    Attributes:
        data: paths of what is trained on.
        validation: paths of what is held out.
        validation_share: of each file's lines, held out where ``validation`` is empty.
    """

    data: list[str]
    validation: list[str]
    validation_share: float

    def read(self) -> corpus.Texts:
        """Read the documents; a UserError as ``corpus.read_texts`` raises it."""
        data, validation = ([Path(f) for f in part] for part in (self.data, self.validation))
        return corpus.read_texts(data, validation, share=self.validation_share)


Sources = TypeVar("Sources", bound=TextFiles)


def read_sources(kind: type[Sources], given: Mapping[str, Any]) -> Sources:
    """Make a ``TextFiles`` of what ``run.json`` keeps, which anyone may have written.

    Raises:
        KeyError, TypeError, UserError: if it is none, or a file is no regular file.
    """
    for one in fields(kind):
        value = given[one.name]
        if one.name in ("data", "validation"):
            fits = isinstance(value, list) and all(isinstance(file, str) for file in value)
        elif one.name == "validation_share":
            fits = isinstance(value, int | float) and 0 <= value < 1
        else:
            fits = isinstance(value, str) or (value is None and one.name == "tokenizer")
        if not fits:
            raise TypeError(f"{one.name} is {reprlib.repr(value)}")
    sources = kind(**given)
    for file in (*sources.data, *sources.validation):
        is_there(Path(file))  # a pipe would block
    return sources


def list_paths(files: str | Path | Sequence[str | Path]) -> list[str]:
    """Return files' absolute paths, as ``TextFiles`` holds them; one file may stand for a list."""
    return [str(expand_path(file).absolute()) for file in list_files(files)]


@dataclass(frozen=True)
class Tokens:
    """A text as rows of token ids, int32, with their tokenizer; ``held_out`` may be empty."""

    tokenizer: Any
    train: np.ndarray
    held_out: np.ndarray

    def fingerprint(self) -> str:
        """Compute a digest, which tells whether a resumed run sees the same text."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.held_out.tobytes())
        return digest.hexdigest()[:32]


def encode_texts(texts: corpus.Texts, tokenizer: Any) -> Tokens:
    """Turn documents into tokens with a Hugging Face tokenizer."""
    train, held_out = (corpus.encode(part, tokenizer) for part in (texts.train, texts.validation))
    return Tokens(tokenizer, train, held_out)
