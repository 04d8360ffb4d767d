"""Text from a model: an answer that streams, or a whole one.

mlx-lm does the sampling and the decoding. Nothing here prints or parses arguments.
"""

import contextlib
import dataclasses
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..constants import DRAFTS
from ..errors import BadArgument, UserError, explain_nan, first_line
from ..memory import format_bytes
from ..options import check_least
from .caches import (
    check_cache,
    cut_prompt,
    make_cache,
    make_draft_caches,
    make_sliding_cache,
)
from .context import find_context, limit_answer
from .loading import load
from .prompts import check_ids, encode_prompt, list_ids
from .sampling import check_options, make_samplers

TALE, TALE_TEMP = "Once upon a time", 0.8  # where nobody asks for anything
CHECK_EVERY = 16  # tokens between two looks at whether the logits are numbers


@dataclass(frozen=True)
class Answer:
    """What a model said and what it took.

    Attributes:
        text: the answer.
        prompt_tokens: that were processed, without those already in a given cache.
        prompt_tps: tokens per second up to the first generated token.
        generation_tokens: the end token included.
        generation_tps: tokens per second after the first; 0 if there are none.
        peak_memory_bytes: the most that MLX held during the answer, weights included.
        finish_reason: "stop" (end token), "length" (max_tokens), or None (left early).
        drafted_tokens: that a draft model proposed.
        accepted_tokens: of these, how many are in the answer.
    """

    text: str
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory_bytes: int
    finish_reason: str | None
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as JSON can hold it."""
        return dataclasses.asdict(self)


def check_experts(error: Exception) -> None:
    """Say so if an error is that MLX has no product of a model's experts on a CPU.

    Raises:
        UserError: if it is.
    """
    if "GatherMM" in str(error):
        raise UserError(
            "on a CPU MLX multiplies experts that are not quantized in float32 alone: convert the "
            "model with --dtype float32 or -q"
        ) from error


class Stream(Iterator[str]):
    """The pieces of an answer, one a token (a piece may be empty).

    Attributes:
        tokens: the generated ids so far, the end token included; between two pieces all of them are
            in the cache, unless there is a draft model.
        text: what they say.
        cut: what ends an answer that has no end token.
    """

    def __init__(
        self,
        responses: Generator[GenerationResponse, None, None],
        *,
        drafts: int = 0,
        max_tokens: int = 0,
        cut: str = "--max-tokens",
    ):
        """``drafts``: what a draft model proposes at a time, within ``max_tokens`` in all."""
        self._responses = responses
        self.cut = cut
        self._drafts, self._max_tokens = drafts, max_tokens
        self._last: GenerationResponse | None = None
        self._drafted = self._accepted = 0
        self.tokens: list[int] = []
        self.text = ""

    def __next__(self) -> str:
        try:
            response = next(self._responses)
        except (StopIteration, UserError):
            raise
        except Exception as error:  # of mlx-lm's detokenizers and samplers, and of the model
            check_experts(error)
            raise UserError(
                f"the answer breaks off after {len(self.tokens):,} tokens "
                f"({type(error).__name__}: {first_line(error)}): the model or its tokenizer cannot "
                "go on; download it again, or ask otherwise"
            ) from error
        if self._drafts:
            # A round of drafts ends with a token of the model's own.
            if self._last is None or not self._last.from_draft:
                self._drafted += min(self._drafts, self._max_tokens - len(self.tokens))
            self._accepted += response.from_draft
        self._last = response
        self.tokens.append(response.token)
        if len(self.tokens) % CHECK_EVERY == 1 or response.finish_reason is not None:
            self._check_logits(response)
        self.text += response.text
        return response.text

    def _check_logits(self, response: GenerationResponse) -> None:
        """Raise UserError if the logits are no numbers.

        A NaN stays in the cache, so a look now and then finds it.
        """
        if bool(mx.isnan(response.logprobs[response.token])):
            self.close()
            raise explain_nan("the model", f" after {len(self.tokens)} tokens")

    def close(self) -> None:
        """Stop the answer here."""
        self._responses.close()

    @property
    def answer(self) -> Answer:
        """The answer so far, whole when the stream has ended; RuntimeError before a first piece."""
        if self._last is None:
            raise RuntimeError("no piece has been taken from this stream yet")
        last = self._last
        # mlx-lm divides n tokens by the time of the n - 1 steps after the first.
        steps = (last.generation_tokens - 1) / last.generation_tokens
        return Answer(
            text=self.text,
            prompt_tokens=last.prompt_tokens,
            prompt_tps=last.prompt_tps,
            generation_tokens=last.generation_tokens,
            generation_tps=last.generation_tps * steps,
            peak_memory_bytes=mx.get_peak_memory(),
            finish_reason=last.finish_reason,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
        )


def stream(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: str | list[int],
    *,
    max_tokens: int = 256,
    seed: int | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    prompt_cache: list[Any] | None = None,
    draft_model: nn.Module | str | Path | None = None,
    num_draft_tokens: int = DRAFTS,
    **choice: Any,
) -> Stream:
    """Start an answer to a prompt; iterate for its text, then read ``answer``.

    An answer that outgrows the model's context goes on with the oldest tokens out of sight, or ends
    there if its cache cannot slide. Of a longer prompt the first 4 and the last tokens are read.

    Args:
        model: what answers.
        tokenizer: the model's.
        prompt: text, which goes through the chat template if there is one, or token ids.
        max_tokens: of the answer.
        seed: of MLX's random state, set when the first piece is asked for.
        max_kv_size, kv_bits: as ``make_cache`` takes them.
        prompt_cache: a cache to go on from, which is extended in place.
        draft_model: a loaded one, a folder or a Hub id; it proposes ``num_draft_tokens`` at a time,
            which ``model`` checks at once: the answer is ``model``'s (arXiv 2211.17192, as mlx-lm
            does it). Its tokens are the same.
        choice: ``temp``, ``top_p``, ``min_p``, ``top_k`` and ``repetition_penalty``, as
            ``sampling.make_samplers`` takes them.

    Raises:
        UserError: for options and prompts that cannot be.
    """
    check_options(max_tokens=max_tokens, seed=seed, **choice)
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list_ids(prompt)
    check_ids(model, ids)
    if isinstance(draft_model, str | Path):
        draft_model = load_draft(draft_model, tokenizer)
    tokens = len(ids) + max_tokens
    if draft_model is None:
        cache, ids = _choose_cache(model, ids, prompt_cache, tokens, max_kv_size, kv_bits)
    else:
        penalty = choice.get("repetition_penalty")
        check_drafting(num_draft_tokens, max_kv_size, prompt_cache, penalty)
        cache = make_draft_caches(model, draft_model, tokens, kv_bits)
    most = limit_answer(model, cache, len(ids), max_tokens)
    options: dict[str, Any] = {"max_tokens": most, "prompt_cache": cache}
    options |= {"draft_model": draft_model, "num_draft_tokens": num_draft_tokens}
    responses = _respond(model, tokenizer, ids, seed, options | make_samplers(**choice))
    drafts = 0 if draft_model is None else num_draft_tokens
    cut = "--max-tokens" if most == max_tokens else "the end of the model's context"
    return Stream(responses, drafts=drafts, max_tokens=most, cut=cut)


def check_drafting(
    num_draft_tokens: int | None = None,
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    repetition_penalty: float | None = None,
) -> None:
    """Check the options of an answer that a draft model helps with.

    Raises:
        BadArgument: for those that do not go with it, and for fewer drafts than one.
    """
    if max_kv_size is not None or prompt_cache is not None:
        raise BadArgument(
            "--draft-model takes back tokens from caches of its own: drop --max-kv-size and a "
            "cache to go on from"
        )
    if repetition_penalty not in (None, 1):
        raise BadArgument("--draft-model: no prompt is penalized then; drop --repetition-penalty")
    check_least("--num-draft-tokens", num_draft_tokens)


def _choose_cache(
    model: nn.Module,
    ids: list[int],
    given: list[Any] | None,
    tokens: int,
    max_kv_size: int | None,
    kv_bits: int | None,
) -> tuple[list[Any], list[int]]:
    """Make a cache for so many tokens, bounded where they are more than the model's context.

    Returns:
        The cache, and what of the prompt ``ids`` is to be read.
    """
    if given is not None:
        if max_kv_size is not None or kv_bits is not None:
            raise BadArgument("max_kv_size and kv_bits shape a new cache: give them to make_cache")
        check_cache("prompt_cache", given, model)
        return given, ids
    if max_kv_size is None and kv_bits is None and tokens > (find_context(model) or tokens):
        cache = make_sliding_cache(model)
        return cache, cut_prompt(model, cache, ids)
    return make_cache(model, max_kv_size=max_kv_size, kv_bits=kv_bits), ids


def _respond(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    ids: list[int],
    seed: int | None,
    options: dict[str, Any],
) -> Generator[GenerationResponse, None, None]:
    """Let mlx-lm answer; seeds, and counts memory, from when the first piece is asked for."""
    if seed is not None:
        mx.random.seed(seed)
    mx.reset_peak_memory()
    yield from stream_generate(model, tokenizer, ids, **options)


def restore_first_space(pieces: Stream, tokenizer: TokenizerWrapper) -> Iterator[str]:
    """Yield the pieces of an answer that goes on from a prompt on the same line.

    The first one gets back the space that its token opens with, which mlx-lm's detokenizers drop.
    """
    started = False
    with contextlib.closing(pieces):
        for piece in pieces:
            if piece and not started:
                started = True
                # None for a token that the network has and the tokenizer does not.
                name = tokenizer.convert_ids_to_tokens(pieces.tokens[0]) or ""
                if name.startswith(("Ġ", "▁")) and not piece.startswith(" "):
                    piece = f" {piece}"
            yield piece


def generate(
    model: nn.Module | str | Path,
    tokenizer: TokenizerWrapper | None,
    prompt: str | list[int],
    **options: Any,
) -> Answer:
    """Answer a prompt, and return the whole answer.

    Args:
        model: a loaded one, or a folder or Hub id, which is loaded.
        tokenizer: the model's; None: that of the folder.
        prompt: text, which goes through the chat template if there is one, or token ids as they
            are.
        options: those of ``stream``: ``max_tokens`` (256), ``temp`` (0: greedy), ``top_p``,
            ``min_p`` and ``top_k`` (0: off), ``repetition_penalty``, ``seed``, ``max_kv_size``,
            ``kv_bits``, ``prompt_cache``, ``draft_model``, ``num_draft_tokens`` (3).

    Raises:
        UserError: for options and prompts that cannot be.
    """
    if isinstance(model, str | Path):
        model, own = load(model)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise BadArgument("a loaded model needs its tokenizer: give both, or the model's folder")
    pieces = stream(model, tokenizer, prompt, **options)
    for _ in pieces:
        pass
    return pieces.answer


def warm_up(
    model: nn.Module, tokenizer: TokenizerWrapper, prompt_tokens: int = 64, **options: Any
) -> None:
    """Answer something that nobody sees, so that what comes next is timed truly.

    Kernels are compiled or fetched when they are first used, and which ones depends on lengths:
    this prompt is as long as the one to come, less whole blocks of 64. It uses a cache of its own,
    and leaves MLX's random state as it was.

    Args:
        model: what answers.
        tokenizer: the model's.
        prompt_tokens: of the prompt to come.
        options: those of ``stream`` for it.
    """
    if options.get("max_kv_size") is None:
        prompt_tokens = min(prompt_tokens, find_context(model) or prompt_tokens)
    blocks = max(0, (prompt_tokens - 2) // 64 - 1)
    ids = [0] * (prompt_tokens - 64 * blocks)  # the last token of a prompt is a step of its own
    options = {**options, "max_tokens": 3, "prompt_cache": None, "seed": None}
    state: Any = mx.random.state
    high, low = state[0].tolist()  # of the seed that leads on from here
    with contextlib.suppress(UserError):  # the answer itself will tell
        for _ in stream(model, tokenizer, ids, **options):
            pass
    mx.random.seed(high << 32 | low)
    mx.clear_cache()


def load_draft(
    name: str | Path, tokenizer: TokenizerWrapper, *, trust_remote_code: bool = False
) -> nn.Module:
    """Load a draft model.

    Raises:
        UserError: if its tokens are not those of ``tokenizer``, the model's.
    """
    model, own = load(name, trust_remote_code=trust_remote_code)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--draft-model {name}: has other tokens than the model; give one with its")
    return model


def summarize(answer: Answer, *, reused: int = 0, cut: str = "--max-tokens") -> str:
    """Say in a line what an answer took.

    Args:
        answer: the answer.
        reused: prompt tokens that were in the cache already.
        cut: what ended it, if not an end token.
    """
    cached = f" ({reused:,} more were in the cache)" if reused else ""
    cut = f", cut off by {cut}" if answer.finish_reason == "length" else ""
    share = f"{answer.accepted_tokens:,} of {answer.drafted_tokens:,}"
    drafts = f", {share} drafts accepted" if answer.drafted_tokens else ""
    return (
        f"prompt {answer.prompt_tokens:,} tokens at {answer.prompt_tps:,.1f}/s{cached}; "
        f"answer {answer.generation_tokens:,} tokens at {answer.generation_tps:,.1f}/s"
        f"{drafts}{cut}; peak memory {format_bytes(answer.peak_memory_bytes)}"
    )
