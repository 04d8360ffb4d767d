"""The text of a run: the files that it comes from, and its tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..options import expand_path
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


def list_paths(files: Sequence[str | Path]) -> list[str]:
    """Return files' absolute paths, as ``TextFiles`` holds them."""
    return [str(expand_path(file).absolute()) for file in files]


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
