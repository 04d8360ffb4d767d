"""The text of a run: the files that it comes from, and its tokens."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..text import corpus

Files = TypeVar("Files", bound="TextFiles")


@dataclass(frozen=True, kw_only=True)
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

    def replace_paths(
        self: Files, data: Sequence[str | Path], validation: Sequence[str | Path]
    ) -> Files:
        """Return a copy with other files, by their absolute paths."""
        new, held_out = ([str(Path(f).absolute()) for f in part] for part in (data, validation))
        return dataclasses.replace(self, data=new, validation=held_out)

    def read(self) -> corpus.Texts:
        """Read the documents; a UserError as ``corpus.read_texts`` raises it."""
        data, validation = ([Path(f) for f in part] for part in (self.data, self.validation))
        return corpus.read_texts(data, validation, share=self.validation_share)


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
