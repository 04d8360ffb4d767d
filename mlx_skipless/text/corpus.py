"""Text to train on: from files to documents, to a tokenizer made for them, to batches of windows.

This module knows nothing of networks.
"""

import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..checkpoints.files import POINTED, POINTER
from ..checkpoints.guarded import explain_panics
from ..constants import HELD_OUT_SHARE
from ..errors import BadArgument, UserError, first_line
from ..options import expand_path

SEAM = 8  # tokens that a character has at most
BATCH_CHARACTERS = 1_000_000  # or a document more are encoded at a time
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# ChatML, the form that mlx-lm and most servers know.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of a model that knows no turns: what was said so far is one text, an answer goes on with its line.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else ' ' if message['role'] == 'assistant' else '\\n' }}"
    "{{ message['content'] }}{% endfor %}"
)


@dataclass(frozen=True)
class Transcript:
    """What was said in turns.

    Attributes:
        messages: each with a role and a content, which may be None where tools are called.
        tools: that the model may call; None if there are none.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    def begins(self) -> str:
        """Quote its beginning, for errors."""
        return repr(self.messages[0].get("content") or "")[:40]


Document = str | Transcript


@dataclass(frozen=True)
class Texts:
    """Documents to train on and documents held out."""

    train: list[Document]
    validation: list[Document]

    @property
    def chat(self) -> bool:
        """Whether some to train on are conversations."""
        return not all(isinstance(one, str) for one in self.train)


def choose_share(given: float | None, validation: Sequence[Any], data: Sequence[Any]) -> float:
    """The share of each file's lines that is held out; None: the usual one.

    Raises:
        BadArgument: where one is given and nothing is held out by it.
    """
    if given is None:
        return HELD_OUT_SHARE
    if validation or not data:
        why = "--validation's are taken whole" if validation else "there are none"
        raise BadArgument(f"--validation-share is of the lines of --data's files: {why}")
    return given


def read_texts(
    files: Sequence[Path], validation: Sequence[Path] = (), *, share: float = HELD_OUT_SHARE
) -> Texts:
    """Read the documents of some files.

    A .jsonl file holds a document a line, as ``mlx_lm.lora`` takes them: {"text"},
    {"prompt", "completion"}, which are joined, or {"messages"}, with "tools" or without. Any other
    file is one document of plain text.

    Args:
        files: what to train on.
        validation: what to hold out; without it, the last ``share`` of each file's lines.
        share: between 0 and 1.

    Raises:
        UserError: for a file that is missing, not UTF-8, malformed or empty.
    """
    if not 0 <= share < 1:
        raise BadArgument(f"--validation-share {share}: must be at least 0 and below 1")
    train: list[Document] = []
    held_out: list[Document] = []
    for file in map(expand_path, files):
        lines = _read_lines(file)
        cut = len(lines) if validation else len(lines) - round(share * len(lines))
        train += _parse_documents(file, lines[:cut])
        held_out += _parse_documents(file, lines[cut:], before=cut)
    for file in map(expand_path, validation):
        held_out += _parse_documents(file, _read_lines(file))
    return Texts(train, held_out)


def _read_lines(file: Path) -> list[str]:
    try:
        if stat.S_ISCHR(file.stat().st_mode):
            raise UserError(f"{file} is a device, which may never end: give a text file")
        text = file.read_text(encoding="utf-8-sig")  # which some editors begin with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error}): convert it") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a text file") from error
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    if text.startswith(POINTER.decode()):
        raise UserError(POINTED.format(file))
    if not text.strip():
        raise UserError(f"{file} is empty: leave it out")
    return lines


def _parse_documents(file: Path, lines: Sequence[str], before: int = 0) -> list[Document]:
    """Parse a file's lines; ``before`` counts those that come before them."""
    if file.suffix.lower() != ".jsonl":
        return ["\n".join(lines)] if lines else []
    documents = []
    for number, line in enumerate(lines, before + 1):
        if not line.strip():
            continue
        try:
            documents.append(document := read_record(json.loads(line)))
            if isinstance(document, Transcript) and not document.messages:
                raise ValueError('"messages" is empty')
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file}: line {number} is no record ({first_line(error)}): each must be JSON with "
                '"text", "prompt" and "completion", or "messages"'
            ) from error
    return documents


def read_record(record: Mapping[str, Any]) -> Document:
    """Return the document in a record: {"messages"}, {"text"} or {"prompt", "completion"}.

    Raises:
        KeyError, TypeError, ValueError: if it is none of these.
    """
    if "messages" in record:
        messages, tools = record["messages"], record.get("tools")
        for key, value in (("messages", messages), ("tools", [] if tools is None else tools)):
            if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
                raise TypeError(f'"{key}" is no list of objects')
        for message in messages:
            _check_text(message.get("role"), '"role" of a message')
            if message.get("content") is not None or not message.get("tool_calls"):
                _check_text(message.get("content"), '"content" of a message')
        # A template may write the rest too, such as a tool's description.
        _check_text(json.dumps([messages, tools], ensure_ascii=False, default=str))
        return Transcript(messages, tools or None)
    if "text" in record:
        return _check_text(record["text"])
    if isinstance(record, Mapping) and not {"prompt", "completion"} <= record.keys():
        raise ValueError(f"its keys: {', '.join(map(repr, record)) or 'none':.80}")
    return _check_text(record["prompt"]) + _check_text(record["completion"])


def _check_text(value: Any, what: str = "") -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what and f'{what}, '}{value!r:.40}, is no text")
    value.encode()  # JSON allows half a surrogate pair; no tokenizer does
    return value


def write_document(document: Document, tokenizer: Any = None) -> str:
    """Write a document as text: a conversation by the tokenizer's chat template, else as ChatML.

    Raises:
        UserError: if the template refuses the conversation, or there is none to write tools.
    """
    if isinstance(document, str):
        return document
    messages, tools = document.messages, document.tools
    template = getattr(tokenizer, "chat_template", None) is not None
    if not getattr(tokenizer, "has_chat_template", template):
        if tools or any(one.get("tool_calls") for one in messages):
            raise UserError(
                f"a conversation of the text ({document.begins()}) has tools, which only a model's "
                "chat template can write: give a model or a tokenizer that has one"
            )
        return "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    except UserError:
        raise
    except Exception as error:  # jinja2's, and what a template does to Python's own types
        raise UserError(
            f"the model's chat template fails on a conversation of the text ({document.begins()}: "
            f"{first_line(error)}): correct one of the two"
        ) from error


def count_said(document: Document) -> int:
    """Count the characters of a text, or of what the messages of a conversation say."""
    if isinstance(document, str):
        return len(document.strip())
    return sum(len(one.get("content") or "") for one in document.messages)


def join_documents(documents: Sequence[Document], tokenizer: Any = None) -> str:
    """Write documents as one text, an empty line between them."""
    return "\n\n".join(write_document(one, tokenizer) for one in documents)


def make_tokenizer(documents: Sequence[Document], vocab_size: int, *, chat: bool) -> Any:
    """Make a byte-level BPE of ``vocab_size`` entries, as a Hugging Face tokenizer.

    Raises:
        UserError: if the text is too short for so many entries, or they are fewer than bytes.
    """
    special = [END, TURN_START, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise BadArgument(
            f"--vocab-size {vocab_size}: must be at least {len(alphabet) + len(special)}, "
            "one for each byte and the special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    # By lines: the pieces that BPE merges never cross one, and a book is too long to hold twice.
    texts = map(write_document, documents)
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"--vocab-size {vocab_size}: the text yields only {tokenizer.get_vocab_size()} "
            "entries; ask for fewer or give more text"
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END if chat else END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE if chat else PLAIN_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(documents: Sequence[Document], tokenizer: Any) -> np.ndarray:
    """Turn documents into one row of token ids (tokens,), int32, with the end token after each.

    Raises:
        UserError: if the tokenizer has no end token.
    """
    end = tokenizer.convert_tokens_to_ids(END)
    if end is None or end == tokenizer.unk_token_id:
        end = tokenizer.eos_token_id
    if end is None:  # config.json may know one
        known = getattr(tokenizer, "eos_token_ids", None) or ()
        end = min((one for one in known if one is not None), default=None)
    if end is None:
        raise UserError("the tokenizer has no end token: give one that has")
    if not documents:
        return np.zeros(0, np.int32)
    with explain_panics(getattr(tokenizer, "name_or_path", None) or "this model"):
        rows = [
            np.array([*row, end], np.int32)
            for batch in _batch_documents(write_document(one, tokenizer) for one in documents)
            for row in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        ]
    return np.concatenate(rows)


def _batch_documents(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield documents in lists; no signal is heard while a tokenizer has one of them."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count_characters(tokenizer: Any, tokens: np.ndarray, start: int = 0) -> int:
    """Count the characters that a row's tokens from ``start`` on stand for.

    Special tokens stand for none. A character of several tokens counts where it begins.
    """
    row = tokens[max(0, start - SEAM) :].tolist()
    before = row[: min(start, SEAM)]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    whole, known = (len(tokenizer.decode(part, **options)) for part in (row, before))
    return whole - known


class Batches:
    """Batches of windows of a row of tokens, which depend on ``seed`` and the step alone.

    Each epoch cuts the row into windows anew, from a random offset, and takes each once.

    Args:
        tokens: (n,), int32.
        length: tokens that a window predicts; it holds one more.
        batch_size: windows a step.
        seed: of offsets and order.

    Raises:
        UserError: if the row is shorter than two windows.
    """

    def __init__(self, tokens: np.ndarray, length: int, batch_size: int, seed: int):
        if len(tokens) < 2 * length + 1:
            raise UserError(
                f"the text has {len(tokens):,} tokens, too few for a context of {length:,}: "
                "give more text or a shorter --context"
            )
        self._tokens = tokens
        self._length = length
        self._batch_size = batch_size
        self._windows = (len(tokens) - 1) // length - 1  # whichever the offset
        self._seed = seed
        self._starts: Callable[[int], np.ndarray] = lru_cache(maxsize=2)(self._shuffle_epoch)

    def _shuffle_epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self._seed, epoch))
        return rng.integers(self._length) + self._length * rng.permutation(self._windows)

    def make_batch(self, step: int) -> np.ndarray:
        """Return the batch of a step, counted from 0: (batch_size, length + 1), int32."""
        first = step * self._batch_size
        starts = [
            self._starts(i // self._windows)[i % self._windows]
            for i in range(first, first + self._batch_size)
        ]
        return np.stack([self._tokens[s : s + self._length + 1] for s in starts])


def cut_windows(
    tokens: np.ndarray, length: int, batch_size: int, limit: int | None = None
) -> Iterator[np.ndarray]:
    """Cut a row into windows in order, for validation.

    Neighbours share one token, so that each token but the first is predicted once. The tail that
    fills no window is left out.

    Args:
        tokens: (n,), int32.
        length: tokens that a window predicts; it holds one more.
        batch_size: windows at once.
        limit: predict only so many tokens, in windows spread evenly over the row.

    Yields:
        Batches of at most ``batch_size`` windows (windows, length + 1), int32.
    """
    starts = find_windows(tokens, length, limit)
    for i in range(0, len(starts), batch_size):
        yield np.stack([tokens[s : s + length + 1] for s in starts[i : i + batch_size]])


def find_windows(tokens: np.ndarray, length: int, limit: int | None = None) -> list[int]:
    """List where the windows begin into which ``cut_windows`` cuts a row."""
    count = (len(tokens) - 1) // length
    taken = count if limit is None else min(count, max(1, limit // length))
    return [int(i) * length for i in np.linspace(0, count - 1, taken).round()]


def count_predicted(
    tokenizer: Any, tokens: np.ndarray, length: int, limit: int | None = None
) -> int:
    """Count the characters of the tokens that the windows of ``cut_windows`` predict."""
    starts = find_windows(tokens, length, limit)
    return sum(count_characters(tokenizer, tokens[: s + length + 1], s + 1) for s in starts)
