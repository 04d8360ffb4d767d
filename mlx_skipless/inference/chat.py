"""A conversation in the terminal; ``Conversation`` is the part that needs no terminal."""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import takewhile
from typing import Any, TextIO

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError
from ..memory import format_bytes
from ..terminal import make_visible
from .caches import cut_prompt, make_cache, make_sliding_cache
from .context import find_context
from .generation import Answer, Stream, restore_first_space, stream, summarize
from .keyboard import edit_lines, read_message
from .prompts import apply_template, check_text, encode_prompt, has_turns, open_conversation
from .sampling import check_options

HELP = """\
/reset  forget the conversation
/stats  what it has taken so far
/help   this list
/quit   leave (so do /exit, quit, exit and Ctrl-D)
\"\"\" opens a message of several lines, and ends it. Ctrl-C stops an answer."""
LEAVING = ("/quit", "/exit", "quit", "exit")
FULL = 0.75  # of the context: time to say so


class Conversation:
    """Turns with a model whose cache is kept: a turn processes only the tokens not yet in it.

    With a chat template the history goes through it each turn. Without one the conversation is one
    text, which the user and the model take turns in writing, a user's turn on a new line.

    Attributes:
        messages: what was said so far, as a chat template takes it.
        cached: the ids in the cache.
        reused: how many of them the last turn found there.
        last: the last turn's answer, None before the first.
        cut: what ended it, if not an end token.
        forgotten: how many messages, or tokens where there are no turns, the last turn left out at
            the beginning, because the model's context was full.
        too_long: whether the last turn alone was more than the model's context.
        context: the tokens that the model was made for; None: unknown, or the cache is smaller.
        turns: how many there were.
        prompt_tokens: that were processed in all turns.
        generation_tokens: that were generated in all turns.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        *,
        system_prompt: str | None = None,
        max_kv_size: int | None = None,
        kv_bits: int | None = None,
        **sampling: Any,
    ):
        self.cached: list[int]
        self._model = model
        self._tokenizer = tokenizer
        self._system = open_conversation(tokenizer, system_prompt)
        self._shape = {"max_kv_size": max_kv_size, "kv_bits": kv_bits}
        self._sampling = sampling
        self.context = find_context(model) if max_kv_size is None else None
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self.messages: list[dict[str, str]] = []
        self.last: Answer | None = None
        self._transcript: list[int] = []
        self.turns = self.prompt_tokens = self.generation_tokens = self.reused = 0
        self.forgotten, self.cut, self.too_long = 0, "", False
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
        """Encode the conversation, with ``text`` as its next turn.

        Where it would leave an answer less than a quarter of the model's context, its beginning is
        dropped until it takes half of that. Of a turn that is longer by itself the end is kept.
        """
        ids = self._forget_beginning(text)
        self.too_long = self.context is not None and len(ids) > self.context
        return ids if self.context is None else cut_prompt(self._model, self.cache, ids)

    def _forget_beginning(self, text: str) -> list[int]:
        self.forgotten = 0
        ids = self._encode_all(text)
        if self.context is None or len(ids) <= self.context * FULL:
            return ids
        if has_turns(self._tokenizer):
            while self.forgotten < len(self.messages) and len(ids) > self.context // 2:
                self.forgotten += 2
                ids = self._encode_all(text)
        elif self._transcript:
            self.forgotten = min(len(ids) - self.context // 2, len(self._transcript))
        return ids if has_turns(self._tokenizer) else ids[self.forgotten :]

    def _encode_all(self, text: str) -> list[int]:
        check_text(text)
        if has_turns(self._tokenizer):
            said = [*self._system, *self.messages[self.forgotten :]]
            return list(apply_template(self._tokenizer, [*said, {"role": "user", "content": text}]))
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
        self.last, self.cut = pieces.answer, pieces.cut
        self.turns += 1
        self.prompt_tokens += self.last.prompt_tokens
        self.generation_tokens += self.last.generation_tokens
        if has_turns(self._tokenizer):
            del self.messages[: self.forgotten]
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": pieces.text},
        ]
        self._transcript = ids + pieces.tokens
        if pieces.tokens[-1] in self._tokenizer.eos_token_ids:
            self._transcript.pop()

    def _drop_cache(self) -> None:
        bounded = any(size is not None for size in self._shape.values())
        self.cache = (
            make_cache(self._model, **self._shape) if bounded else make_sliding_cache(self._model)
        )
        self.cached = []


def chat(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    *,
    out: TextIO | None = None,
    err: TextIO | None = None,
    seed: int | None = None,
    opening: str | None = None,
    remarks: Sequence[str] = (),
    system_prompt: str | None = None,
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
        remarks: lines to show before the first turn.
        system_prompt: what the system says before the first turn.
        max_kv_size, kv_bits: as ``make_cache`` takes them.
        sampling: options of ``generation.stream``.

    Raises:
        UserError: for options that cannot be.
    """
    out, err = out or sys.stdout, err or sys.stderr
    check_options(seed=seed, **sampling)
    talk = Conversation(
        model, tokenizer, system_prompt=system_prompt, max_kv_size=max_kv_size, kv_bits=kv_bits,
        **sampling,
    )  # fmt: skip
    if seed is not None:
        mx.random.seed(seed)

    def note(text: str) -> None:
        print(_make_dim(make_visible(text), err), file=err, flush=True)

    for line in ("Write to the model; /help lists the commands, Ctrl-D leaves.", *remarks):
        note(line)
    with edit_lines():
        while _take_turn(talk, out, note, opening):
            opening = None


def _take_turn(
    talk: Conversation, out: TextIO, note: Callable[[str], None], opening: str | None
) -> bool:
    """Go on from an opening, or read a message and do what it asks; False if the user leaves."""
    try:
        if opening:
            out.write(opening)
            _report(talk, _answer(talk, opening, out, same_line=True), note, stopped="")
            return True
        message = read_message()
        if message in LEAVING:
            return False
        _handle_message(talk, message, out, note)
    except EOFError:
        note("")
        return False
    except KeyboardInterrupt:
        note("\nCtrl-D or /quit leaves.")
    except UnicodeDecodeError as e:
        note(f"error: this terminal does not send {e.encoding}; set its encoding to that")
    except UserError as e:
        note(f"error: {e}")
    return True


def _handle_message(
    talk: Conversation, line: str, out: TextIO, note: Callable[[str], None]
) -> None:
    """Do a command other than /quit, or answer what else the user wrote."""
    if line == "/reset":
        talk.reset()
        note("The conversation is forgotten.")
    elif line == "/stats":
        note(_describe_totals(talk))
    elif line == "/help":
        note(HELP)
    elif line.startswith("/") and "\n" not in line:
        note(f"{line.split()[0]} is no command; /help lists them.")
    elif line:
        _report(talk, _answer(talk, line, out), note)


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
                out.write(make_visible(piece))
                out.flush()
                if stopped:
                    break
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, before)
    print(file=out, flush=True)
    return begun


def _report(
    talk: Conversation,
    said: bool,
    note: Callable[[str], None],
    stopped: str = "Stopped; the message is forgotten.",
) -> None:
    """Tell what an answer took and how much room is left, or that it was stopped."""
    note(_describe_costs(talk) if said else stopped)
    for remark in _describe_room(talk) if said else ():
        note(remark)


def _describe_costs(talk: Conversation) -> str:
    assert talk.last is not None, "no answer yet"
    return summarize(talk.last, reused=talk.reused, cut=talk.cut)


def _describe_room(talk: Conversation) -> Iterator[str]:
    """Say what the model's context made the last turn forget, and if it is about to overflow."""
    if talk.context is None or talk.last is None:
        return
    size, held = talk.context, len(talk.cached)
    context = f"the model's context of {size:,} tokens"
    if talk.forgotten:
        yield f"The conversation outgrew {context}: its beginning is forgotten."
    if talk.too_long:
        yield f"This turn is longer than {context}: the model saw only the end of it."
    elif held > size:
        yield f"The answer outgrew {context}: it was written without all that was said before."
    elif held > size * FULL:
        yield (
            f"{held:,} of the {size:,} tokens of the model's context are taken: the beginning is "
            "about to be forgotten; /reset forgets all."
        )


def _describe_totals(talk: Conversation) -> str:
    size = sum(cache.nbytes for cache in talk.cache if not cache.empty())
    most = max(getattr(cache, "max_size", math.inf) for cache in talk.cache)
    return (
        f"{talk.turns:,} turn{'s' if talk.turns != 1 else ''}: "
        f"{talk.prompt_tokens:,} prompt tokens processed, "
        f"{talk.generation_tokens:,} generated; "
        f"{min(len(talk.cached), most):,} tokens in the cache ({format_bytes(size)})"
    )


def _make_dim(text: str, file: TextIO) -> str:
    colour = file.isatty() and not os.environ.get("NO_COLOR")
    return f"\033[2m{text}\033[0m" if text and colour else text
