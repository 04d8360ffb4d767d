"""A stranger's tokenizer at work: what it cannot do is a UserError, never a traceback.

The library tokenizers panics where a regular expression takes too many steps. Its PanicException is
no Exception, and Rust writes a trace of its own to stderr first.
"""

import contextlib
import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError, first_line
from .limits import check_template, limited
from .tekken_chat import UNKNOWN_CHATS
from .tokenizer_json import UNNAMED

PANIC = "PanicException"  # its module cannot be imported
STDERR = 2
# A warning of transformers, and how it keeps that it was given.
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
LONGEST_CHAT = 1 << 25  # characters of a template's result
_hold = threading.RLock()  # of the process's stderr


@contextlib.contextmanager
def explain_panics(name: str | Path) -> Iterator[None]:
    """Turn a panic or an error of tokenizers into a UserError; ``name`` is the model's."""
    with hold_stderr() as drop:
        try:
            yield
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != PANIC:
                raise  # the library's own errors have no type either
            drop()
            raise UserError(
                f"the tokenizer of {name} gives up on this text ({first_line(error)}): give another"
                " text or another tokenizer"
            ) from error


@contextlib.contextmanager
def hold_stderr() -> Iterator[Callable[[], Any]]:
    """Hold back what is written to stderr until the end; yields a function that drops it."""
    with _hold:
        try:
            held, shown = _open_held(), os.dup(STDERR)
        except OSError:  # closed, or there is no room: then it shows what it shows
            yield lambda: None
            return
        os.dup2(held.fileno(), STDERR)
        try:
            yield lambda: _take(held)
        finally:
            os.dup2(shown, STDERR)
            kept = _take(held)
            with contextlib.suppress(OSError):
                os.write(shown, kept)
            os.close(shown)


@functools.cache
def _open_held() -> Any:
    return tempfile.TemporaryFile(buffering=0)


def _take(held: Any) -> bytes:
    """Empty the file that holds what was written, and return that."""
    if not os.fstat(held.fileno()).st_size:
        return b""
    held.seek(0)
    written: bytes = held.read()
    held.seek(0)
    held.truncate()
    return written


class GuardedTokenizer(TokenizerWrapper):
    """mlx-lm's wrapper, made to fit its model.

    Ids without a token stand for no text, and text with a token that has no embedding is refused:
    MLX reads past a matrix's end without a word.
    """

    def __init__(self, wrapper: TokenizerWrapper, name: str, rows: int | None):
        """Take over a wrapper.

        Args:
            wrapper: as mlx-lm loads it.
            name: of the model, for a message.
            rows: how many embeddings it has; None if that is not known.

        Raises:
            UserError: if ordinary text, or the chat template, needs tokens without an embedding.
        """
        vars(self).update(vars(wrapper))
        # Of long texts; where a model's context ends is said elsewhere.
        getattr(wrapper._tokenizer, "deprecation_warnings", {})[TOO_LONG] = True
        self._name, self._rows = name, rows
        known = getattr(self._detokenizer, "tokenmap", None)
        if known is None:
            self._detokenizer._tokenizer = self  # whose decode explains panics
        else:
            nothing = b"" if known and isinstance(known[0], bytes) else ""
            known += [nothing] * ((rows or 0) - len(known))
        for template in self._templates:
            check_template(template, f"the chat template of {name}")
        self._surplus = self._find_surplus()

    @property
    def _templates(self) -> list[str]:
        found = self._tokenizer.chat_template or ()
        return [found] if isinstance(found, str) else list(dict(found).values())

    def _find_surplus(self) -> dict[str, int]:
        """The tokens without an embedding, none of which a text has unless it writes them."""
        if self._rows is None:
            return {}
        ids = self._tokenizer.get_vocab().items()
        surplus = {t: i for t, i in ids if i >= self._rows and not t.startswith(UNNAMED)}
        added = self._tokenizer.get_added_vocab() if surplus else {}
        needed = {self._tokenizer.bos_token, self._tokenizer.eos_token}
        for token in surplus:
            if (
                token not in added
                or token in needed
                or any(token in text for text in self._templates)
            ):
                raise UserError(
                    f"{self._describe(surplus, token)}, which it needs: give the tokenizer that "
                    "belongs to this model, or embeddings for all of its tokens"
                )
        return surplus

    def _describe(self, surplus: dict[str, int], token: str) -> str:
        return (
            f"{self._name} has {self._rows:,} embeddings, and {len(surplus):,} of its tokenizer's "
            f"tokens have none, such as {token!r} ({surplus[token]})"
        )

    @property
    def warnings(self) -> list[str]:
        """What must not be overlooked, a sentence each."""
        if not self._surplus:
            return []
        said = self._describe(self._surplus, next(iter(self._surplus)))
        return [f"{said}: text with one of them is refused"]

    @property
    def notes(self) -> list[str]:
        """What there is to know of it, a sentence each."""
        version = self._tokenizer.init_kwargs.get(UNKNOWN_CHATS)
        if version is None or self._templates:
            return []
        return [
            f"how to chat by a tekken.json of version {version} is not known, so there is no chat "
            "template: put the model's chat_template.jinja into its folder"
        ]

    def encode(self, *arguments: Any, **options: Any) -> Any:
        """Encode as transformers does.

        Raises:
            UserError: if that fails, or the text has a token that the model has no embedding for.
        """
        with explain_panics(self._name):
            ids = self._tokenizer.encode(*arguments, **options)
        self._check_ids(ids)
        return ids

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Encode one text or many as transformers does.

        Raises:
            UserError: as ``encode``.
        """
        with explain_panics(self._name):
            found = self._tokenizer(*arguments, **options)
        for ids in (found["input_ids"], *found["input_ids"]):
            self._check_ids(ids)
        return found

    def apply_chat_template(self, *arguments: Any, tokenize: bool = True, **options: Any) -> Any:
        """Put messages through the chat template as mlx-lm does, within bounds.

        Raises:
            UserError: as ``encode``, and if the template takes more time or memory than any needs.
        """
        if not options.get("sanitize_control_tokens"):
            with limited(f"the chat template of {self._name}"):
                text = super().apply_chat_template(*arguments, tokenize=False, **options)
            if len(text) > LONGEST_CHAT:
                raise UserError(f"the chat template of {self._name} makes {len(text):,} characters")
            if not tokenize:
                return text
        with explain_panics(self._name):
            found = super().apply_chat_template(*arguments, **options)
        self._check_ids(found)
        return found

    def decode(self, *arguments: Any, **options: Any) -> Any:
        """Decode as transformers does.

        Raises:
            UserError: if that fails.
        """
        with explain_panics(self._name):
            return self._tokenizer.decode(*arguments, **options)

    def _check_ids(self, ids: Any) -> None:
        if not self._surplus or not isinstance(ids, Sequence) or isinstance(ids, str):
            return
        found = next((i for i in ids if isinstance(i, int) and i >= (self._rows or 0)), None)
        if found is not None:
            token = self._tokenizer.convert_ids_to_tokens(found)
            raise UserError(
                f"the text has the token {token!r} ({found}), and {self._name} has "
                f"{self._rows:,} embeddings: take it out"
            )
