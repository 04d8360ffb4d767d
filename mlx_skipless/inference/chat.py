"""A conversation in the terminal; `Conversation` is the part that needs no terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Generator
from itertools import takewhile
from typing import Any, TextIO

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import generation
from .generation import Answer, Stream

HELP = """\
/reset  forget the conversation
/stats  what it has taken so far
/help   this list
/quit   leave (so does Ctrl-D)
Ctrl-C stops an answer."""

# An untrained model says anything, terminal commands too.
_VISIBLE = dict.fromkeys((*range(32), *range(127, 160)), "�")
del _VISIBLE[ord("\n")], _VISIBLE[ord("\t")]


class Conversation:
    """Turns with a model whose cache is kept: a turn processes only the tokens not yet in it.

    With a chat template the history goes through it each turn. Without one the conversation is one
    text, which the user and the model take turns in writing, a user's turn on a new line.
    `cached` are the ids in the cache, `reused` how many of them the last turn found there, and
    `last` is its answer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        *,
        max_kv_size: int | None = None,
        kv_bits: int | None = None,
        **sampling: Any,
    ):
        self.cached: list[int]
        self._model = model
        self._tokenizer = tokenizer
        self._shape = {"max_kv_size": max_kv_size, "kv_bits": kv_bits}
        self._sampling = sampling
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.messages: list[dict[str, str]] = []
        self.last: Answer | None = None
        self._transcript: list[int] = []
        self.turns = self.prompt_tokens = self.generation_tokens = self.reused = 0
        self._drop_cache()

    def ask(self, text: str, *, same_line: bool = False) -> Generator[str, None, None]:
        """The answer's pieces, one a token. Close it to stop: what was said so far stays.

        `same_line`: it is shown right behind `text`, and opens with the space that it may need.
        """
        ids = self._ids(text)
        stream: Stream | None = None
        try:
            new = self._reuse(ids)
            stream = generation.stream(
                self._model, self._tokenizer, new, prompt_cache=self.cache, **self._sampling
            )
            yield from (
                generation.restore_first_space(stream, self._tokenizer) if same_line else stream
            )
        except BaseException as e:
            if isinstance(e, GeneratorExit) and stream is not None:  # between two tokens
                self.cached = ids + stream.tokens
            else:  # within a step: some layers may be ahead of others
                self._drop_cache()
            if stream is not None and stream.tokens:
                self._remember(text, ids, stream)
            raise
        self.cached = ids + stream.tokens
        self._remember(text, ids, stream)

    def _ids(self, text: str) -> list[int]:
        """The whole conversation, and `text` as its next turn."""
        if self._tokenizer.has_chat_template:
            messages = [*self.messages, {"role": "user", "content": text}]
            return list(generation.apply_template(self._tokenizer, messages))
        if not self._transcript:
            return generation.encode_prompt(self._tokenizer, text, chat=False)
        more = self._tokenizer.encode("\n" + text, add_special_tokens=False)
        return [*self._transcript, *more]

    def _reuse(self, ids: list[int]) -> list[int]:
        """Cut the cache down to what it shares with `ids`; return the rest, at least one token."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.cached, ids[:-1], strict=False))
        common = sum(1 for _ in same)
        surplus = len(self.cached) - common
        if surplus and trim_prompt_cache(self.cache, surplus) != surplus:
            self._drop_cache()
            common = 0
        self.cached = self.cached[:common]
        self.reused = common
        return ids[common:]

    def _remember(self, text: str, ids: list[int], stream: Stream) -> None:
        self.last = stream.answer
        self.turns += 1
        self.prompt_tokens += self.last.prompt_tokens
        self.generation_tokens += self.last.generation_tokens
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": stream.text},
        ]
        self._transcript = ids + stream.tokens
        if stream.tokens[-1] in self._tokenizer.eos_token_ids:
            self._transcript.pop()

    def _drop_cache(self) -> None:
        self.cache = generation.make_cache(self._model, **self._shape)
        self.cached = []


def chat(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    *,
    out: TextIO | None = None,
    err: TextIO | None = None,
    seed: int | None = None,
    opening: str | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    **sampling: Any,
) -> None:
    """Talk with the model until Ctrl-D or /quit; for a terminal, in the main thread.

    Answers go to `out` (standard output), all else to `err` (standard error). The model goes on
    from `opening` before the first turn. `sampling` and the rest are `generation.stream`'s options;
    `seed` holds for the whole chat.
    Raises UserError for options that cannot be.
    """
    out, err = out or sys.stdout, err or sys.stderr
    generation.check_options(seed=seed, **sampling)
    talk = Conversation(model, tokenizer, max_kv_size=max_kv_size, kv_bits=kv_bits, **sampling)
    if seed is not None:
        mx.random.seed(seed)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its editing and history)

    def note(text: str) -> None:
        print(_dim(text, err), file=err, flush=True)

    note("Write to the model; /help lists the commands, Ctrl-D leaves.")
    if opening:
        out.write(opening)
        note(_costs(talk) if _answer(talk, opening, out, same_line=True) else "")
    while True:
        try:
            line = input("> ").encode(errors="replace").decode().strip()
            if line == "/quit":
                return
            if line == "/reset":
                talk.reset()
                note("The conversation is forgotten.")
            elif line == "/stats":
                note(_stats(talk))
            elif line == "/help":
                note(HELP)
            elif line.startswith("/"):
                note(f"{line.split()[0]} is no command; /help lists them.")
            elif line:
                said = _answer(talk, line, out)
                note(_costs(talk) if said else "Stopped; the message is forgotten.")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit leaves.")
        except UnicodeDecodeError as e:
            note(f"error: this terminal does not send {e.encoding}; set its encoding to that")


def _answer(talk: Conversation, text: str, out: TextIO, *, same_line: bool = False) -> bool:
    """Write the answer to `text` as it comes; Ctrl-C stops it. False if nothing came."""
    begun = stopped = False

    def stop(*_: Any) -> None:
        # Wait for the token's end, which keeps the cache; not for a prompt's, nor when asked twice.
        nonlocal stopped
        if stopped or not begun:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        with contextlib.closing(talk.ask(text, same_line=same_line)) as pieces:
            for piece in pieces:
                begun = True
                out.write(piece.translate(_VISIBLE))
                out.flush()
                if stopped:
                    break
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
    print(file=out, flush=True)
    return begun


def _costs(talk: Conversation) -> str:
    assert talk.last is not None, "no answer yet"
    return generation.summarize(talk.last, reused=talk.reused)


def _stats(talk: Conversation) -> str:
    held = sum(cache.nbytes for cache in talk.cache if not cache.empty())
    return (
        f"{talk.turns:,} turns: {talk.prompt_tokens:,} prompt tokens processed, "
        f"{talk.generation_tokens:,} generated; "
        f"{len(talk.cached):,} tokens in the cache ({generation.format_bytes(held)})"
    )


def _dim(text: str, file: TextIO) -> str:
    colour = file.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[2m{text}\033[0m" if text and colour else text
