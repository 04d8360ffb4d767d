"""A conversation in the terminal; ``Conversation`` is the part that needs no terminal."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Generator
from itertools import takewhile
from typing import Any, TextIO

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..memory import format_bytes
from .caches import make_cache
from .generation import Answer, Stream, check_options, restore_first_space, stream, summarize
from .prompts import apply_template, encode_prompt

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

    Attributes:
        messages: what was said so far, as a chat template takes it.
        cached: the ids in the cache.
        reused: how many of them the last turn found there.
        last: the last turn's answer, None before the first.
        turns: how many there were.
        prompt_tokens: that were processed in all turns.
        generation_tokens: that were generated in all turns.
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
        """Yield the answer's pieces, one a token; closed, it stops, and what was said stays.

        Args:
            text: the user's turn.
            same_line: the answer is shown right behind ``text``, and opens with the space that it
                may need.
        """
        ids = self._encode_turn(text)
        pieces: Stream | None = None
        try:
            new = self._reuse_cache(ids)
            pieces = stream(
                self._model, self._tokenizer, new, prompt_cache=self.cache, **self._sampling
            )
            yield from restore_first_space(pieces, self._tokenizer) if same_line else pieces
        except BaseException as e:
            if isinstance(e, GeneratorExit) and pieces is not None:  # between two tokens
                self.cached = ids + pieces.tokens
            else:  # within a step: some layers may be ahead of others
                self._drop_cache()
            if pieces is not None and pieces.tokens:
                self._remember(text, ids, pieces)
            raise
        self.cached = ids + pieces.tokens
        self._remember(text, ids, pieces)

    def _encode_turn(self, text: str) -> list[int]:
        """Encode the whole conversation, with ``text`` as its next turn."""
        if self._tokenizer.has_chat_template:
            messages = [*self.messages, {"role": "user", "content": text}]
            return list(apply_template(self._tokenizer, messages))
        if not self._transcript:
            return encode_prompt(self._tokenizer, text, chat=False)
        more = self._tokenizer.encode("\n" + text, add_special_tokens=False)
        return [*self._transcript, *more]

    def _reuse_cache(self, ids: list[int]) -> list[int]:
        """Cut the cache down to what it shares with ``ids``; return the rest, one token or more."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.cached, ids[:-1], strict=False))
        common = sum(1 for _ in same)
        surplus = len(self.cached) - common
        if surplus and trim_prompt_cache(self.cache, surplus) != surplus:
            self._drop_cache()
            common = 0
        self.cached = self.cached[:common]
        self.reused = common
        return ids[common:]

    def _remember(self, text: str, ids: list[int], pieces: Stream) -> None:
        self.last = pieces.answer
        self.turns += 1
        self.prompt_tokens += self.last.prompt_tokens
        self.generation_tokens += self.last.generation_tokens
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": pieces.text},
        ]
        self._transcript = ids + pieces.tokens
        if pieces.tokens[-1] in self._tokenizer.eos_token_ids:
            self._transcript.pop()

    def _drop_cache(self) -> None:
        self.cache = make_cache(self._model, **self._shape)
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

    Args:
        model: what answers.
        tokenizer: the model's.
        out: where answers go; None: standard output.
        err: where all else goes; None: standard error.
        seed: of the whole chat.
        opening: what the model goes on from before the first turn.
        max_kv_size, kv_bits: as ``make_cache`` takes them.
        sampling: options of ``generation.stream``.

    Raises:
        UserError: for options that cannot be.
    """
    out, err = out or sys.stdout, err or sys.stderr
    check_options(seed=seed, **sampling)
    talk = Conversation(model, tokenizer, max_kv_size=max_kv_size, kv_bits=kv_bits, **sampling)
    if seed is not None:
        mx.random.seed(seed)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its editing and history)

    def note(text: str) -> None:
        print(_make_dim(text, err), file=err, flush=True)

    note("Write to the model; /help lists the commands, Ctrl-D leaves.")
    if opening:
        out.write(opening)
        note(_describe_costs(talk) if _answer(talk, opening, out, same_line=True) else "")
    while True:
        try:
            line = input("> ").encode(errors="replace").decode().strip()
            if line == "/quit":
                return
            _handle_line(talk, line, out, note)
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit leaves.")
        except UnicodeDecodeError as e:
            note(f"error: this terminal does not send {e.encoding}; set its encoding to that")


def _handle_line(talk: Conversation, line: str, out: TextIO, note: Callable[[str], None]) -> None:
    """Do a command other than /quit, or answer what else the user wrote."""
    if line == "/reset":
        talk.reset()
        note("The conversation is forgotten.")
    elif line == "/stats":
        note(_describe_totals(talk))
    elif line == "/help":
        note(HELP)
    elif line.startswith("/"):
        note(f"{line.split()[0]} is no command; /help lists them.")
    elif line:
        said = _answer(talk, line, out)
        note(_describe_costs(talk) if said else "Stopped; the message is forgotten.")


def _answer(talk: Conversation, text: str, out: TextIO, *, same_line: bool = False) -> bool:
    """Write the answer to ``text`` as it comes; Ctrl-C stops it. False if nothing came."""
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


def _describe_costs(talk: Conversation) -> str:
    assert talk.last is not None, "no answer yet"
    return summarize(talk.last, reused=talk.reused)


def _describe_totals(talk: Conversation) -> str:
    held = sum(cache.nbytes for cache in talk.cache if not cache.empty())
    return (
        f"{talk.turns:,} turns: {talk.prompt_tokens:,} prompt tokens processed, "
        f"{talk.generation_tokens:,} generated; "
        f"{len(talk.cached):,} tokens in the cache ({format_bytes(held)})"
    )


def _make_dim(text: str, file: TextIO) -> str:
    colour = file.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[2m{text}\033[0m" if text and colour else text
