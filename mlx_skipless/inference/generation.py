"""Text from a model: streaming, the key-value cache, and two models side by side.

mlx-lm does the sampling and the decoding. Nothing here prints or parses arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, stream_generate
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
)
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError, first_line
from ..memory import format_bytes, weight_bytes
from ..network.parts import dtype_name
from .loading import load

KV_BITS = (2, 3, 4, 6, 8)
DRAFTS = 3  # tokens that a draft model proposes at a time
TALE, TALE_TEMP = "Once upon a time", 0.8  # where nobody asks for anything
CHECK_EVERY = 16  # tokens between two looks at whether the logits are numbers
KEEP = 4  # a rotating cache never drops the first tokens: attention leans on them

Source: TypeAlias = "str | Path | tuple[nn.Module, TokenizerWrapper]"


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
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt; a ratio above 1 means that the first model is faster.

    A ratio is None where a model's only token was its first, so that there was nothing to time.
    """

    first: Answer
    second: Answer
    prompt_tps_ratio: float | None
    generation_tps_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Stream(Iterator[str]):
    """The pieces of an answer, one a token (a piece may be empty).

    `tokens` are the generated ids so far, the end token included: all of them are in the cache
    between two pieces (but with a draft model). `text` is what they say.
    """

    def __init__(
        self,
        responses: Generator[GenerationResponse, None, None],
        *,
        drafts: int = 0,
        max_tokens: int = 0,
    ):
        """`drafts`: what a draft model proposes at a time, within `max_tokens` in all."""
        self._responses = responses
        self._drafts, self._max_tokens = drafts, max_tokens
        self._last: GenerationResponse | None = None
        self._drafted = self._accepted = 0
        self.tokens: list[int] = []
        self.text = ""

    def __next__(self) -> str:
        response = next(self._responses)
        if self._drafts:
            # A round of drafts ends with a token of the model's own.
            if self._last is None or not self._last.from_draft:
                self._drafted += min(self._drafts, self._max_tokens - len(self.tokens))
            self._accepted += response.from_draft
        self._last = response
        self.tokens.append(response.token)
        if len(self.tokens) % CHECK_EVERY == 1 or response.finish_reason is not None:
            self._check(response)
        self.text += response.text
        return response.text

    def _check(self, response: GenerationResponse) -> None:
        """A NaN in a cache stays, so a look now and then finds it."""
        logits = response.logprobs
        if bool(mx.isnan(logits[response.token])):
            self.close()
            raise UserError(
                f"the model's logits are no numbers after {len(self.tokens)} tokens: they overflow "
                f"{dtype_name(logits.dtype)} on the way, or the checkpoint is broken; convert it "
                "with --dtype bfloat16 or float32, whose check names the layer"
            )

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
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    seed: int | None = None,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    prompt_cache: list[Any] | None = None,
    draft_model: nn.Module | None = None,
    num_draft_tokens: int = DRAFTS,
) -> Stream:
    """Start an answer to `prompt`; iterate for its text, then read `.answer`.

    Text goes through `prompt_tokens` first (so through the chat template, if there is one); ids are
    taken as they are. `top_p` 0 or 1 and `min_p` 0 are off. `max_kv_size` and `kv_bits` are
    `make_cache`'s; `prompt_cache` is a cache to go on from, and is extended in place. A
    `draft_model` of the same tokens proposes `num_draft_tokens` at a time, which `model` checks at
    once: the answer is `model`'s (arXiv 2211.17192, as mlx-lm does it). `seed` seeds MLX's random
    state and MLX's peak memory is reset when the first piece is asked for.
    Raises UserError for options and prompts that cannot be.
    """
    check_options(max_tokens=max_tokens, temp=temp, top_p=top_p, min_p=min_p, seed=seed)
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise UserError("the prompt is empty: give at least one token")
    if draft_model is not None:
        if max_kv_size is not None or prompt_cache is not None:
            raise UserError(
                "--draft-model takes back tokens from caches of its own: drop --max-kv-size and a "
                "cache to go on from"
            )
        if num_draft_tokens < 1:
            raise UserError(f"--num-draft-tokens {num_draft_tokens}: must be at least 1")
        prompt_cache = _caches_of_two(model, draft_model, len(ids) + max_tokens, kv_bits)
    elif prompt_cache is None:
        prompt_cache = make_cache(model, max_kv_size=max_kv_size, kv_bits=kv_bits)
    elif max_kv_size is not None or kv_bits is not None:
        raise UserError("max_kv_size and kv_bits shape a new cache: give them to make_cache")

    def responses() -> Generator[GenerationResponse, None, None]:
        if seed is not None:
            mx.random.seed(seed)
        mx.reset_peak_memory()
        yield from stream_generate(
            model,
            tokenizer,
            ids,
            max_tokens=max_tokens,
            sampler=make_sampler(temp, top_p, min_p),
            prompt_cache=prompt_cache,
            draft_model=draft_model,
            num_draft_tokens=num_draft_tokens,
        )

    drafts = 0 if draft_model is None else num_draft_tokens
    return Stream(responses(), drafts=drafts, max_tokens=max_tokens)


def restore_first_space(pieces: Stream, tokenizer: TokenizerWrapper) -> Iterator[str]:
    """The pieces of an answer that goes on from a prompt on the same line.

    With the space that its first token opens with, which mlx-lm's detokenizers drop.
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
    """The whole answer to a prompt.

    Args:
        model: a loaded one, or a folder or Hub id, which is loaded.
        tokenizer: the model's; None: that of the folder.
        prompt: text, which goes through the chat template if there is one, or token ids as they
            are.
        options: `stream`'s: `max_tokens` (256), `temp` (0: greedy), `top_p` and `min_p` (0: off),
            `seed`, `max_kv_size`, `kv_bits`, `prompt_cache`, `draft_model`, `num_draft_tokens` (3).

    Raises:
        UserError: for options and prompts that cannot be.
    """
    if isinstance(model, str | Path):
        model, own = load(model)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise UserError("a loaded model needs its tokenizer: give both, or the model's folder")
    pieces = stream(model, tokenizer, prompt, **options)
    for _ in pieces:
        pass
    return pieces.answer


def compare(
    models: Sequence[Source], prompt: str | list[int], *, repeats: int = 3, **options: Any
) -> Comparison:
    """Ask two models (each a folder, a repository or (model, tokenizer)) the same, in turn.

    After a warm-up each they take turns `repeats` times; speeds are medians over these. Both are in
    memory at the same time; `peak_memory_bytes` counts only the model that answers.
    `options` are `stream`'s.
    """
    if len(models) != 2:
        raise UserError(f"a comparison takes two models, not {len(models)}")
    pair = [source if isinstance(source, tuple) else load(source) for source in models]
    if pair[0][0] is pair[1][0]:
        raise UserError("a comparison takes two models, not one twice: load it twice instead")
    few = options | {"max_tokens": min(8, options.get("max_tokens", 8))}
    for model, tokenizer in pair:
        generate(model, tokenizer, prompt, **few)

    runs: tuple[list[Answer], list[Answer]] = ([], [])
    for _ in range(repeats):
        for answers, (model, tokenizer) in zip(runs, pair, strict=True):
            answers.append(generate(model, tokenizer, prompt, **options))

    first, second = (
        dataclasses.replace(
            answers[0],
            prompt_tps=statistics.median(a.prompt_tps for a in answers),
            generation_tps=statistics.median(a.generation_tps for a in answers),
            peak_memory_bytes=max(a.peak_memory_bytes for a in answers) - weight_bytes(other),
        )
        for answers, (other, _) in zip(runs, reversed(pair), strict=True)
    )
    return Comparison(
        first,
        second,
        _ratio(first.prompt_tps, second.prompt_tps),
        _ratio(first.generation_tps, second.generation_tps),
    )


def _ratio(a: float, b: float) -> float | None:
    return a / b if a and b else None


def encode_prompt(
    tokenizer: TokenizerWrapper, text: str, *, chat: bool | None = None, continued: bool = False
) -> list[int]:
    """Token ids that ask `text`: through the chat template, or plain with the start token.

    `chat` None takes the template where the tokenizer has one. `continued`: the beginning of the
    user's message is in a cache already, as `mlx_lm.cache_prompt` leaves it, and `text` ends it.
    Raises UserError for an empty prompt, for text that is not Unicode, and for `chat` True without
    a template.
    """
    if not text.strip():
        raise UserError("the prompt is empty: give some text")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"the prompt is not valid Unicode at character {e.start}") from None
    if chat and not tokenizer.has_chat_template:
        raise UserError(
            "this model's tokenizer has no chat template: send the prompt as plain text"
        )
    if chat or (chat is None and tokenizer.has_chat_template):
        message = {"role": "user", "content": text}
        if continued:
            return _end_of_message(tokenizer, message)
        return list(apply_template(tokenizer, [message]))
    if continued:
        return list(tokenizer.encode(text, add_special_tokens=False))
    start = tokenizer.bos_token
    return list(
        tokenizer.encode(text, add_special_tokens=start is None or not text.startswith(start))
    )


def apply_template(
    tokenizer: TokenizerWrapper, messages: Sequence[dict[str, str]], **options: Any
) -> Any:
    """Messages through the model's chat template, up to the answer.

    Raises:
        UserError: if the template fails: it is a program, the checkpoint's own, and transformers
            runs it in a sandbox.
    """
    try:
        found = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **options)
    except Exception as error:  # jinja2's, and what a template does to Python's own types
        raise UserError(
            f"the model's chat template fails ({first_line(error)}): correct it or download the "
            "model again"
        ) from error
    if not found:
        raise UserError("the model's chat template leaves the message out: correct it")
    return found


def _end_of_message(tokenizer: TokenizerWrapper, message: dict[str, str]) -> list[int]:
    """A templated message from its content on, and the opening of the answer."""
    marker = "<content>"
    texts = [
        apply_template(tokenizer, [{**message, "content": content}], tokenize=False)
        for content in (message["content"], marker)
    ]
    if marker not in texts[1]:
        raise UserError("the model's chat template leaves the message out: correct it")
    return list(tokenizer.encode(texts[0][texts[1].index(marker) :], add_special_tokens=False))


def load_draft(
    name: str | Path, tokenizer: TokenizerWrapper, *, trust_remote_code: bool = False
) -> nn.Module:
    """Load a draft model; UserError if its tokens are not `tokenizer`'s."""
    model, own = load(name, trust_remote_code=trust_remote_code)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--draft-model {name}: has other tokens than the model; give one with its")
    return model


def load_cache(file: str | Path, model: nn.Module) -> list[Any]:
    """A prompt cache that `mlx_lm.cache_prompt` wrote for this model.

    Raises UserError if there is none, or it is another model's.
    """
    try:
        cache = load_prompt_cache(str(file))
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        raise UserError(
            f"{file} is no prompt cache ({first_line(e)}): `mlx_lm.cache_prompt` makes one"
        ) from e
    fresh = make_prompt_cache(model)
    other = UserError(f"{file} is the cache of another model: make one with this model")
    if [type(c) for c in cache] != [type(c) for c in fresh]:
        raise other
    model(mx.array([[0]]), fresh)
    for stored, own in zip(cache, fresh, strict=True):
        if stored.keys.shape[1] != own.keys.shape[1] or stored.keys.shape[-1] != own.keys.shape[-1]:
            raise other
    return cache


def check_options(
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    seed: int | None = None,
) -> None:
    """Raise UserError for sampling options that cannot be."""
    if max_tokens < 1:
        raise UserError(f"--max-tokens {max_tokens}: must be at least 1")
    if not (math.isfinite(temp) and temp >= 0):
        raise UserError(f"--temp {temp}: must be at least 0 (0 takes the likeliest token)")
    if not 0 <= top_p <= 1:
        raise UserError(f"--top-p {top_p}: must lie between 0 and 1 (0 or 1 turns it off)")
    if not 0 <= min_p <= 1:
        raise UserError(f"--min-p {min_p}: must lie between 0 and 1 (0 turns it off)")
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: must be at least 0 and fit 64 bits")


def make_cache(
    model: nn.Module, *, max_kv_size: int | None = None, kv_bits: int | None = None
) -> list[Any]:
    """A fresh cache for `model`: at most `max_kv_size` tokens a layer, or of `kv_bits` a value.

    mlx-lm ignores the first for models that define make_cache. A bounded cache keeps the first 4
    tokens and drops the oldest after them; a layer with a smaller sliding window keeps it. While a
    prompt is read, each chunk of it (2,048 tokens) is held on top.
    Raises UserError for sizes that cannot be and for both at once.
    """
    cache = make_prompt_cache(model)
    if max_kv_size is not None:
        if max_kv_size <= KEEP:
            raise UserError(
                f"--max-kv-size {max_kv_size}: must exceed {KEEP}, as the first {KEEP} tokens stay"
            )
        cache = [_bounded(c, max_kv_size) for c in cache]
    if kv_bits is not None:
        if kv_bits not in KV_BITS:
            raise UserError(f"--kv-bits {kv_bits}: must be one of {', '.join(map(str, KV_BITS))}")
        if max_kv_size is not None:
            raise UserError(
                "--kv-bits with --max-kv-size: mlx-lm cannot quantize a bounded cache; drop one"
            )
        group_size = _group_size(model)
        cache = [_quantized(c, kv_bits, group_size) for c in cache]
    return cache


def _caches_of_two(
    model: nn.Module, draft_model: nn.Module, tokens: int, kv_bits: int | None
) -> list[Any]:
    """The caches of a model and of its draft, as mlx-lm wants them: in one list."""
    own, draft = (make_cache(m, kv_bits=kv_bits) for m in (model, draft_model))
    for cache in (*own, *draft):
        # mlx-lm goes on without a word when it cannot take back what the model rejects.
        if not cache.is_trimmable() or tokens >= getattr(cache, "max_size", math.inf):
            raise UserError(
                f"--draft-model: the prompt and --max-tokens make {tokens:,} tokens, which a "
                f"{type(cache).__name__} of this model cannot take back; ask for fewer, or drop "
                "--draft-model"
            )
    # It parts the list by the number of layers, of which some may have no cache.
    unused = [KVCache() for _ in model.layers[len(own) :]]
    return [*own, *unused, *draft]


def _bounded(cache: Any, size: int) -> Any:
    if type(cache) is KVCache:
        return RotatingKVCache(max_size=size, keep=KEEP)
    if isinstance(cache, RotatingKVCache):
        return RotatingKVCache(max_size=min(size, cache.max_size), keep=cache.keep)
    if isinstance(cache, ArraysCache | ChunkedKVCache):  # do not grow
        return cache
    raise UserError(
        f"--max-kv-size: a {type(cache).__name__} cannot be bounded; drop --max-kv-size"
    )


def _quantized(cache: Any, bits: int, group_size: int) -> Any:
    if type(cache) is KVCache:
        return _QuantizedKVCache(group_size=group_size, bits=bits)
    if isinstance(cache, ArraysCache):  # a state, no keys and values
        return cache
    if isinstance(cache, RotatingKVCache):
        raise UserError(
            "--kv-bits: mlx-lm cannot quantize a sliding window's cache, which this model has; "
            "drop --kv-bits"
        )
    raise UserError(f"--kv-bits: a {type(cache).__name__} cannot be quantized; drop --kv-bits")


def _group_size(model: nn.Module) -> int:
    """The values that share a scale, along a head; where the head's size is unknown MLX decides."""
    args = getattr(model, "args", None)
    hidden, heads = (getattr(args, key, 0) for key in ("hidden_size", "num_attention_heads"))
    head_dim = getattr(args, "head_dim", None) or (hidden // heads if heads else 0)
    for size in (64, 32):
        if head_dim % size == 0:
            return size
    raise UserError(
        f"--kv-bits: heads of {head_dim} values cannot be quantized in groups of 64 or 32; "
        "drop --kv-bits"
    )


class _QuantizedKVCache(QuantizedKVCache):
    """mlx-lm's, starting from rows of the right width: its own are too wide for some bits.

    head_dim // (32 // bits) words a row is one too many for 6 bits and a head_dim of 128.
    """

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        if self.keys is None:
            width, bits = self.group_size, self.bits
            self.keys = mx.quantize(keys[..., :0, :], width, bits)  # type: ignore[assignment]
            self.values = mx.quantize(values[..., :0, :], width, bits)  # type: ignore[assignment]
        return super().update_and_fetch(keys, values)


def summarize(answer: Answer, *, reused: int = 0) -> str:
    """One line of what an answer took; ``reused`` prompt tokens were in the cache already."""
    cached = f" ({reused:,} more were in the cache)" if reused else ""
    cut = ", cut off by --max-tokens" if answer.finish_reason == "length" else ""
    share = f"{answer.accepted_tokens:,} of {answer.drafted_tokens:,}"
    drafts = f", {share} drafts accepted" if answer.drafted_tokens else ""
    return (
        f"prompt {answer.prompt_tokens:,} tokens at {answer.prompt_tps:,.1f}/s{cached}; "
        f"answer {answer.generation_tokens:,} tokens at {answer.generation_tps:,.1f}/s"
        f"{drafts}{cut}; peak memory {format_bytes(answer.peak_memory_bytes)}"
    )
