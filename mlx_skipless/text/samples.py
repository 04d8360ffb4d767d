"""Text to calibrate and to check with: a user's, or sampled from the source model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..checkpoints import hub
from ..checkpoints.guarded import GuardedTokenizer
from ..errors import UserError, first_line
from ..network.driver import Driver
from ..progress import Steps
from . import corpus

CHECK = (4, 32)  # sequences, tokens each
LONG_CHECK = (16, 128)  # where quantization is compared with quantization
LONG_CHECK_WEIGHTS = 1 << 25  # of a network that a CPU can run, quantized, on a long check
CALIBRATION = (64, 256)
FITTING = 16  # tokens for each input of the widest matrix that calibrate it, if no more is wanted
SHORT = 64  # tokens that a sequence has even so
# Where the layers are read from disk for each token, text is sampled in fewer steps: each takes as
# long as the check of the source, however many sequences there are.
STREAMED_CHECK, STREAMED_CALIBRATION = (43, 3), (512, 16)
STREAMED_OPENING = 2  # tokens that a sequence has without a step
SHORTEST = 16  # tokens in a row that calibrate anything
TAIL = 1 << 16  # characters at a file's end that are kept for the check
DATA_SET = 1 << 22  # characters of a data set that are read
PIECE = 2048  # characters of a file in a row to calibrate with


@dataclass(frozen=True)
class Passages:
    """Tokens (sequences, length) to check a result with and, if it needs them, to calibrate it.

    ``origin`` says where the text comes from.
    """

    check: mx.array
    calibration: mx.array | None
    origin: str


def read_text(source: str | Path) -> list[corpus.Document]:
    """Read the text to calibrate with.

    Args:
        source: a plain file, all of it; a .jsonl file, its documents; or a data set of the Hub,
            its first ones, as many as ``DATA_SET`` characters take.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        if hub.is_data_set(str(source)):
            return list(_first_documents(str(source)))
        return corpus.read_texts([Path(source)], share=0).train
    except UserError as error:
        raise UserError(f"--calibration {error}") from error


def _first_documents(source: str) -> Iterator[corpus.Document]:
    size = 0
    for row in hub.read_data_set(source):
        try:
            document = corpus.read_record(row)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the data set {source} has a row that is no record ({first_line(error)}): each "
                'must have "text", "prompt" and "completion", or "messages"; its columns are '
                f"{', '.join(row)}"
            ) from error
        if said := corpus.count_said(document):
            yield document
        size += said
        if size >= DATA_SET:
            return


def take_passages(
    open_network: Callable[[], Driver],
    tokenizer: GuardedTokenizer | None,
    text: Sequence[corpus.Document] | None,
    name: str,
    *,
    seed: int,
    longest: int | None,
    progress: Steps = lambda done, total: None,
    **sizes: Any,
) -> Passages:
    """Cut a user's text into passages, or have the source write some.

    Args:
        open_network: opens the source, which writes if there is no text.
        tokenizer: the source's; None: it has none, so that only ids can be sampled.
        text: the user's; None: there is none.
        name: what errors call it.
        seed: of sampled text.
        longest: tokens that the model can read in a row.
        progress: called with (tokens of a sampled sequence done, all).
        sizes: what ``cut_passages`` and ``sample_passages`` both take.

    Raises:
        UserError: if the text is too short, or there is no tokenizer for it.
    """
    if text is None:
        start = None if tokenizer is None else tokenizer.bos_token_id
        return sample_passages(open_network(), seed=seed, start=start, progress=progress, **sizes)
    if tokenizer is None:
        raise UserError("--calibration needs a tokenizer and the source has none: drop it")

    def encode(piece: str) -> list[int]:
        return tokenizer.encode(piece, verbose=False)  # of its length; pieces get cut

    written = corpus.join_documents(text, tokenizer)
    return cut_passages(name, written, encode, longest=longest, **sizes)


def cut_passages(
    name: str,
    text: str,
    encode: Callable[[str], list[int]],
    *,
    calibrating: bool,
    long_check: bool = False,
    longest: int | None = None,
    fitted: int | None = None,
) -> Passages:
    """Cut a text into passages: its end to check with, places all over the rest to calibrate with.

    Args:
        name: what errors call the text.
        text: of any length.
        encode: text to tokens.
        calibrating: whether calibration is wanted.
        long_check: whether to check more than usual.
        longest: tokens that the model can read in a row.
        fitted: inputs of the widest matrix, if calibration is for nothing but fitting matrices.

    Raises:
        UserError: if it is too short.
    """
    sequences, length = LONG_CHECK if long_check else CHECK
    length = min(length, longest or length)
    rest, end = split_tail(text) if calibrating else ("", text[-TAIL:])
    ids = encode(end)
    count = min(len(ids) // length, sequences)
    if not count:
        raise UserError(
            f"--calibration {name} has {len(ids)} tokens"
            f"{' in its last quarter' if calibrating else ''}; the check needs {length} or more"
        )
    check = mx.array(ids[-count * length :]).reshape(count, length)
    if not calibrating:
        return Passages(check, None, name)
    sequences, length = _size_calibration(fitted)
    step = max(PIECE, len(rest) // sequences)
    places = range(0, len(rest), step)
    share = math.ceil(sequences * length / max(1, len(places)))
    row = [i for at in places for i in encode(rest[at : at + PIECE])[:share]]
    length = min(length, longest or length, len(row) // sequences)
    if length < SHORTEST:
        raise UserError(
            f"--calibration {name} has {len(row)} tokens to calibrate with; at least "
            f"{sequences * SHORTEST:,} are needed: give more text"
        )
    count = min(len(row) // length, sequences)
    return Passages(check, mx.array(row[: count * length]).reshape(count, length), name)


def split_tail(text: str) -> tuple[str, str]:
    """Split a text into what calibrates or trains and its end, which is kept for the check."""
    tail = min(TAIL, len(text) // 4)
    return text[: len(text) - tail], text[len(text) - tail :]


def _size_calibration(fitted: int | None) -> tuple[int, int]:
    """Sequences and tokens of each; fewer where matrices with few inputs are fitted."""
    sequences, length = CALIBRATION
    if fitted is None:
        return sequences, length
    return sequences, min(length, max(SHORT, -(-FITTING * fitted // sequences)))


def sample_passages(
    network: Driver,
    *,
    seed: int,
    start: int | None,
    calibrating: bool,
    long_check: bool = False,
    fitted: int | None = None,
    progress: Steps = lambda done, total: None,
) -> Passages:
    """Sample the text to check with and, if asked for, to calibrate with, from the source itself.

    Args:
        network: the source; where its layers are not resident, the text has fewer steps.
        seed: of the text.
        start: the token that opens a text, if there is one.
        calibrating: whether calibration is wanted.
        long_check: whether to check more than usual.
        fitted: inputs of the widest matrix, if calibration is for nothing but fitting matrices.
        progress: called with (tokens of a sequence done, all).
    """
    check = (LONG_CHECK if long_check else CHECK) if network.resident else STREAMED_CHECK
    longest = network.context or CALIBRATION[1]
    sizes = [check]
    if calibrating:
        sizes.append(_size_calibration(fitted) if network.resident else STREAMED_CALIBRATION)
    # All in one batch: its steps take as long as they would for a part of it, or little longer.
    rows, length = sum(rows for rows, _ in sizes), min(longest, max(length for _, length in sizes))
    tokens = sample_text(network, rows, length, seed=seed, start=start, progress=progress)
    calibration = tokens[check[0] :, : sizes[1][1]] if calibrating else None
    return Passages(tokens[: check[0], : check[1]], calibration, "sampled from the model")


def sample_text(
    network: Driver,
    sequences: int,
    length: int,
    *,
    seed: int,
    start: int | None,
    progress: Steps = lambda done, total: None,
) -> mx.array:
    """Sample text from a network, tokens (sequences, length): see ``sample_tokens``."""
    caches = make_prompt_cache(network.model)
    for cache in caches:
        cache.step = length  # room for no more: many short sequences would fill gigabytes

    def next_logits(fresh: mx.array) -> mx.array:
        return network.logits(network.hidden(fresh, caches)[:, -1:])[:, -1]

    return sample_tokens(
        next_logits,
        network.vocabulary,
        sequences,
        length,
        seed=seed,
        start=start,
        opening=1 if network.resident else STREAMED_OPENING,
        progress=progress,
    )


def sample_tokens(
    next_logits: Callable[[mx.array], mx.array],
    vocab_size: int,
    sequences: int,
    length: int,
    *,
    seed: int,
    start: int | None,
    opening: int = 1,
    progress: Steps = lambda done, total: None,
) -> mx.array:
    """Sample text from a network at temperature 1, tokens (sequences, length).

    Each sequence begins with ``start``, if there is one, and a random token or more.

    Args:
        next_logits: takes the tokens (sequences, new) that follow those it took before, and gives
            logits (sequences, vocab_size) of the next one.
        vocab_size: the number of tokens that there are.
        sequences: how many to sample.
        length: tokens of each.
        seed: of the random numbers.
        start: the token that opens a text, if there is one.
        opening: how many tokens a sequence begins with at least.
        progress: called with (tokens of a sequence done, all).
    """
    key = mx.random.key(seed)
    key, first = mx.random.split(key)
    if start is not None and not 0 <= start < vocab_size:
        start = None
    drawn = max(1, opening - (start is not None))
    tokens = mx.random.randint(0, vocab_size, (sequences, drawn), key=first)
    if start is not None:
        tokens = mx.concatenate(
            [mx.full((sequences, 1), start, dtype=tokens.dtype), tokens], axis=1
        )
    fresh = tokens
    while tokens.shape[1] < length:
        progress(tokens.shape[1], length)
        logits = next_logits(fresh)
        key, now = mx.random.split(key)
        fresh = mx.random.categorical(mx.nan_to_num(logits), key=now)[:, None].astype(tokens.dtype)
        tokens = mx.concatenate([tokens, fresh], axis=1)
        mx.eval(tokens)
    progress(length, length)
    return tokens
