"""Times models in turn: reading prompts, and decoding behind them or behind random caches.

What decoding has to read bounds its speed. A step of a batch reads all weights once, but of an
embedding that is not the head too only a row for each sequence, and of experts only those that are
picked. For each sequence it reads the keys and values so far. Activations, and the writing of new
keys and values, are small and not counted. So many bytes a second, over the bandwidth that MLX
reaches on large arrays, is a figure's share of the limit.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from ..errors import UserError
from ..inference.sizes import begin_cache, count_bytes_read, count_cache_bytes
from ..memory import weight_bytes

PROMPT_CHUNK = 2048  # tokens of a prompt at a time, as in mlx-lm
BANDWIDTH_BYTES = 512 << 20  # no cache holds that much
BANDWIDTH_REPEATS = 5

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times.

    Attributes:
        median, low, high: median, least and greatest of the measurements.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Case:
    """What is measured of each model.

    Attributes:
        length: tokens of each sequence before decoding.
        batch_size: sequences at once.
        decode_only: decode behind caches of random numbers instead of reading prompts.
    """

    length: int
    batch_size: int
    decode_only: bool = False

    def describe(self) -> str:
        """Describe what stands before the decoded tokens: "prompt 128", "cache 1,024"."""
        return f"{'cache' if self.decode_only else 'prompt'} {self.length:,}"


@dataclass(frozen=True)
class Result:
    """What was measured of a model in a case; speeds count the tokens of all sequences.

    Attributes:
        label: the model's.
        case: what was measured.
        prompt_tps: tokens of the prompts over the time to the first token, and
        first_token_seconds: that time; None where nothing but decoding was measured.
        decode_tps: tokens a second after the first one.
        peak_memory_bytes: the most that MLX held, the other models' weights not counted.
        limit_share: share of the bandwidth, by the bytes that decoding had to read.
        prompt_ratio: ``prompt_tps`` over the baseline's of the same round, and
        decode_ratio: ``decode_tps`` over the baseline's; None for the baseline.
    """

    label: str
    case: Case
    prompt_tps: Spread | None
    first_token_seconds: Spread | None
    decode_tps: Spread
    peak_memory_bytes: int
    limit_share: float
    prompt_ratio: Spread | None
    decode_ratio: Spread | None


@dataclass(frozen=True)
class Timing:
    """One measurement: seconds to the first token, and for the tokens after it."""

    first_token: float
    decode: float
    peak_memory_bytes: int


def fill_cache(model: nn.Module, batch_size: int, tokens: int) -> list[Any]:
    """Make a cache of random keys and values, as if ``tokens`` of each sequence had been read.

    Raises:
        UserError: for a kind of cache that holds no keys and values.
    """
    cache = make_prompt_cache(model)
    for i, begun in enumerate(begin_cache(model, batch_size)):
        if isinstance(begun, ArraysCache):  # a state: as large after one token as after many
            cache[i] = begun
        elif isinstance(begun, KVCache | RotatingKVCache):
            kept = min(tokens, getattr(begun, "max_size", tokens))
            cache[i].update_and_fetch(
                *(
                    mx.random.uniform(-1, 1, (*like.shape[:2], kept, like.shape[3]), like.dtype)
                    for like in (begun.keys, begun.values)
                )
            )
        else:
            raise UserError(
                f"--contexts: a {type(begun).__name__} cannot be filled; measure prompts instead"
            )
    mx.eval([one.state for one in cache])
    return cache


def measure_bandwidth() -> float:
    """Measure how many bytes of memory a second MLX reaches, by reading and copying a large array.

    A sum reads it, and a product with a vector, which is what decoding does. A copy counts twice,
    because it reads and writes. The best of all tries counts.
    """
    matrix = mx.ones((BANDWIDTH_BYTES // (4 * 8192), 8192))
    vector = mx.ones((8192,))
    mx.eval(matrix, vector)
    best = 0.0
    for passes, way in ((1, matrix.sum), (1, lambda: matrix @ vector), (2, lambda: -matrix)):
        for _ in range(1 + BANDWIDTH_REPEATS):
            started = time.perf_counter()
            mx.eval(way())
            best = max(best, passes * matrix.nbytes / (time.perf_counter() - started))
    return best


def measure_in_turn(
    models: Mapping[str, nn.Module],
    measure: Callable[[nn.Module], Outcome],
    repeats: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, list[Outcome]]:
    """Measure models one after another, over and over, after a warm-up each.

    Args:
        models: by their labels.
        measure: what to do with each.
        repeats: rounds.
        stop: asked before each round but the first, which there always is.
    """
    for model in models.values():
        measure(model)
    runs: dict[str, list[Outcome]] = {label: [] for label in models}
    for done in range(repeats):
        if done and stop():
            break
        for label, model in models.items():
            runs[label].append(measure(model))
    return runs


def time_model(model: nn.Module, case: Case, decode_tokens: int) -> Timing:
    """Time greedy decoding behind prompts of random tokens or behind random caches.

    It works as ``mlx_lm.generate`` does: the prompt goes in chunks, and each step is queued before
    the one before it is waited for. Behind random caches a first, untimed step makes them grow.
    """
    # mlx-lm's generate_step takes one sequence, and its batch_generate needs padded caches of its
    # own, which cost time and cannot be filled: neither measures a plain batch.
    streams: Any = [generation_stream]
    with wired_limit(model, streams), mx.stream(generation_stream):
        cache, prompt = _prepare(model, case)

        def step(tokens: mx.array) -> mx.array:
            logits = model(tokens, cache=cache)[:, -1, :]
            log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen = mx.argmax(log_p, axis=-1)
            mx.async_eval(chosen, log_p)
            return chosen[:, None]

        mx.reset_peak_memory()
        started = time.perf_counter()
        *chunks, last = _split_prompt(prompt)
        for chunk in chunks:
            model(chunk, cache=cache)
            mx.eval([one.state for one in cache])
            mx.clear_cache()
        token = step(last)
        mx.eval(token)
        first_token = time.perf_counter()
        for _ in range(decode_tokens):
            following = step(token)
            mx.eval(token)
            token = following
        mx.eval(token)
        ended = time.perf_counter()
    return Timing(first_token - started, ended - first_token, mx.get_peak_memory())


def _prepare(model: nn.Module, case: Case) -> tuple[list[Any], mx.array]:
    """Make the cache and the prompt (batch, length) of a case: one token behind a full cache."""
    if case.decode_only:
        cache = fill_cache(model, case.batch_size, case.length)
        return cache, mx.zeros((case.batch_size, 1), mx.int32)
    vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    prompt = mx.random.randint(0, vocabulary, (case.batch_size, case.length))
    mx.eval(prompt)
    return make_prompt_cache(model), prompt


def _split_prompt(prompt: mx.array) -> list[mx.array]:
    """Split a prompt (batch, length) into chunks, the last of which is the last token alone."""
    ends = [*range(PROMPT_CHUNK, prompt.shape[1] - 1, PROMPT_CHUNK), prompt.shape[1] - 1]
    return [chunk for chunk in mx.split(prompt, ends, axis=1) if chunk.size]


def compare_timings(
    models: Mapping[str, nn.Module],
    case: Case,
    decode_tokens: int,
    timings: Mapping[str, Sequence[Timing]],
    bandwidth: float,
    loaded_bytes: int | None = None,
) -> list[Result]:
    """Summarize the timings of a case; the first model is the baseline, and has no ratios.

    Args:
        models: by their labels.
        case: what was measured.
        decode_tokens: tokens that each sequence was given.
        timings: by the models' labels, round by round.
        bandwidth: bytes a second.
        loaded_bytes: that all models' weights take together; None: they share none.
    """
    baseline, n = next(iter(models)), case.batch_size
    all_weights = loaded_bytes or sum(weight_bytes(model) for model in models.values())
    results = []
    for label, model in models.items():
        own = timings[label]
        pairs = [] if label == baseline else [*zip(timings[baseline], own, strict=True)]
        prompted = [] if case.decode_only else own
        compared = [] if case.decode_only else pairs
        decode_tps = _summarize(n * decode_tokens / one.decode for one in own)
        assert decode_tps is not None
        peak = max(one.peak_memory_bytes for one in own)
        read = count_bytes_read(model, n)
        read += n * count_cache_bytes(model, case.length + (decode_tokens + 1) / 2)
        results.append(
            Result(
                label,
                case,
                prompt_tps=_summarize(n * case.length / one.first_token for one in prompted),
                first_token_seconds=_summarize(one.first_token for one in prompted),
                decode_tps=decode_tps,
                peak_memory_bytes=peak - all_weights + weight_bytes(model),
                limit_share=read * decode_tps.median / n / bandwidth,
                prompt_ratio=_summarize(a.first_token / b.first_token for a, b in compared),
                decode_ratio=_summarize(a.decode / b.decode for a, b in pairs),
            )
        )
    return results


def _summarize(values: Iterable[float]) -> Spread | None:
    """Summarize measurements; None if there are none."""
    found = [*values]
    return Spread(statistics.median(found), min(found), max(found)) if found else None
