"""How well a model predicts text: nats per token and bits per character."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.files import is_there
from ..errors import BadArgument, UserError, explain_nan
from ..inference.context import check_windows, find_context
from ..inference.loading import load
from ..network.metrics import measure_nll
from ..network.widening import attend_in_float32, widen
from ..options import check_least, expand_path, list_files
from ..text import corpus

CONTEXT = 512  # for models that say nothing, or allow more


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        loss: nats per token.
        bits_per_character: bits of all tokens, special ones too, over characters of the text.
        tokens: how many were predicted.
        characters: how many these tokens stand for.
    """

    loss: float
    bits_per_character: float
    tokens: int
    characters: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_perplexity(
    model: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    validation: str | Path | Sequence[str | Path] = (),
    validation_share: float | None = None,
    context: int | None = None,
    batch_size: int = 16,
    trust_remote_code: bool = False,
    warn: Callable[[str], None] = lambda line: None,
) -> Score:
    """Score a model on held-out text, in windows that do not overlap.

    Args:
        model: a folder or Hub id that ``load`` takes.
        data: files whose last ``validation_share`` of lines is held out, as in training.
        validation: files to take whole instead of the ends of ``data``.
        validation_share: between 0 and 1; None: 0.03. Not beside ``validation``.
        context: tokens of a window; default: what the model was made for, at most 512.
        batch_size: windows at once.
        trust_remote_code: let a model of another architecture run the code that it brings.
        warn: called with a line if windows are longer than what the model was made for.

    Raises:
        UserError: for a model or text that cannot be used.
    """
    check_least("--context", context)
    check_least("--batch-size", batch_size)
    data, validation = list_files(data), list_files(validation)
    if not data and not validation:
        raise BadArgument("no text: give --data, whose end is held out, or --validation")
    share = corpus.choose_share(validation_share, validation, data)
    for file in data if validation else ():
        if not is_there(expand_path(file)):
            raise UserError(f"{file} cannot be read: there is no such file")
    texts = corpus.read_texts(
        [Path(file) for file in data if not validation],
        [Path(file) for file in validation],
        share=share,
    )
    network, tokenizer = load(model, trust_remote_code=trust_remote_code)
    length = context or min(CONTEXT, find_context(network) or CONTEXT)
    if (beyond := check_windows(network, [length], "--context")) is not None:
        warn(beyond)
    if not texts.validation:
        raise UserError(
            f"--validation-share {share} of the lines of --data holds out no text: give "
            "a larger share, or --validation FILE, which is taken whole"
        )
    tokens = corpus.encode(texts.validation, tokenizer)
    check_held_out(tokens, length, tokenizer._tokenizer)
    network = widen(network)
    with attend_in_float32():
        score = score_tokens(
            lambda batch: sum_nll(network, batch), tokens, tokenizer._tokenizer, length, batch_size
        )
    if not math.isfinite(score.loss):
        raise explain_nan(str(model), " on this text")
    return score


def check_held_out(tokens: np.ndarray, length: int, tokenizer: Any) -> None:
    """Check that held-out tokens fill a window of ``length``, and stand for characters.

    Raises:
        UserError: if they do not.
    """
    if len(tokens) <= length:
        raise UserError(
            f"the held-out text has {len(tokens):,} tokens, too few for a context of {length:,}: "
            "give more text or a shorter --context, or --validation FILE, which is taken whole "
            "(of --data's files only the last lines are)"
        )
    if not corpus.count_characters(tokenizer, tokens):
        raise UserError("the held-out text has no characters: give other text")


def sum_nll(network: nn.Module, batch: mx.array) -> mx.array:
    """The negative log likelihood of the tokens after the first, summed; batch (n, length + 1)."""
    return measure_nll(network(batch[:, :-1]), batch[:, 1:]).sum()


def score_tokens(
    summed_nll: Callable[[mx.array], mx.array],
    tokens: np.ndarray,
    tokenizer: Any,
    length: int,
    batch_size: int,
    limit: int | None = None,
) -> Score:
    """Score a row of tokens in windows that do not overlap.

    Args:
        summed_nll: gives the summed negative log likelihood, in nats, of the tokens after the first
            in each window of a batch (windows, length + 1).
        tokens: the row.
        tokenizer: what counts the tokens' characters.
        length: tokens that a window predicts.
        batch_size: windows at once.
        limit: tokens to predict at most, in windows spread evenly over the row; default: all.
    """
    nats, count = 0.0, 0
    for batch in corpus.cut_windows(tokens, length, batch_size, limit):
        nats += summed_nll(mx.array(batch)).item()  # type: ignore[assignment]
        count += batch[:, 1:].size
    characters = corpus.count_predicted(tokenizer, tokens, length, limit)
    return Score(nats / count, nats / math.log(2) / max(1, characters), count, characters)
