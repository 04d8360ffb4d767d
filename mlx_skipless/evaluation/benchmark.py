"""Models side by side: speed, bytes and memory, measured in turn against plain mlx-lm.

What decoding reads bounds its speed: for each step of a batch all weights once (of an embedding
that is not the head too a row a sequence, of experts those that are picked), and of each sequence
the keys and values so far. Activations, and the writing of new keys and values, are not counted;
they are small. That many bytes a second, over the bandwidth that MLX reaches on large arrays, is a
figure's share of the limit. Knows nothing of terminals and documents.
"""

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..constants import FLOAT_NAMES, REMOVALS
from ..errors import UserError
from ..inference.loading import load_network
from ..memory import device_memory_bytes, format_bytes, weight_bytes
from ..network.model import Model
from ..network.parts import dtype_name, tensors_of
from ..network.wiring import LETTERS
from ..progress import Progress
from ..quantization.settings import Quantization, make_quantization
from .synthetic import (
    evaluate_in_turn,
    find_shape,
    make_skipless_model,
    make_skipless_plan,
    make_stock_model,
    make_vanilla_shape,
    write_checkpoint,
)

PROMPT_CHUNK = 2048  # tokens of a prompt at a time, as in mlx-lm
BANDWIDTH_BYTES = 512 << 20  # no cache holds that much
BANDWIDTH_REPEATS = 5
NOT_THE_SAME = (
    "mlx-lm's own network is not the same function (it may not know this activation, width, window "
    "or these biases)"
)

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Spread:
    """A figure measured several times.

    Attributes:
        median, low, high: of these measurements.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        length: tokens of each sequence before decoding.
        batch_size: sequences at once.
        decode_only: behind caches of random numbers, in place of prompts.
    """

    length: int
    batch_size: int
    decode_only: bool = False


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        label: what it is called in the outcome.
        network: what runs: "mlx-lm llama", "skipless without QP", ...
        weight_bytes: of all weights.
        bytes_per_token: of these, what decoding a token of one sequence reads.
        cache_bytes_per_token: of KV cache, that a token adds.
    """

    label: str
    network: str
    weight_bytes: int
    bytes_per_token: int
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Result:
    """A model in a case; speeds are in tokens per second of all sequences together.

    Attributes:
        label: the model's.
        case: what was measured.
        prompt_tps: tokens of the prompts over the time to the first token, and
        first_token_seconds: that time; None where nothing but decoding was measured.
        decode_tps: tokens behind the first.
        peak_memory_bytes: the most that MLX held, the other models' weights aside.
        limit_share: of the bandwidth, by the bytes that decoding had to read.
        prompt_ratio: of ``prompt_tps`` to the baseline's of the same round, and
        decode_ratio: of ``decode_tps``; None for the baseline.
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
class Benchmark:
    """What ``benchmark`` measures.

    Attributes:
        device: that computed, and the versions of what ran on it.
        bandwidth: the most bytes a second that MLX reached; None if nothing was timed.
        baseline: label of the model that ratios are to.
        decode_tokens: that each sequence was given, for each figure.
        repeats: rounds, in which the models took turns.
        subjects: the models, the baseline first.
        results: by case, then by model.
        notes: what the figures do not say.
    """

    device: str
    bandwidth: float | None
    baseline: str
    decode_tokens: int
    repeats: int
    subjects: tuple[Subject, ...]
    results: tuple[Result, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One measurement, in seconds: to the first token, and for the tokens behind it."""

    first_token: float
    decode: float
    peak_memory_bytes: int


def benchmark(
    models: Sequence[str | Path] = (),
    *,
    synthetic: str | None = None,
    remove: str = "auto",
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    save: str | Path | None = None,
    prompt_lengths: Sequence[int] = (128, 1024),
    contexts: Sequence[int] = (),
    batch_sizes: Sequence[int] = (1, 4),
    decode_tokens: int = 64,
    repeats: int = 5,
    progress: Progress = lambda stage, done, total: None,
) -> Benchmark:
    """Measure models in turn, plain mlx-lm always among them.

    Args:
        models: folders or Hub ids. The first that runs in mlx-lm's own code is the baseline; if
            none does, mlx-lm's Llama (or Mixtral) of the first one's sizes, with random weights.
        synthetic: random weights in mlx-lm's own network and in the skipless one, of a shape: a
            model that ``mlx-skipless architectures`` lists or a config.json, "NAME:8" with 8
            layers.
        remove: from the skipless one: "auto", by arithmetic, "none", or letters.
        dtype: of the random weights; default: what the shape's config says, else bfloat16.
        quantize: quantize the random weights.
        q_bits: bits of a weight; default: the mode's own.
        q_group_size: weights that share a scale; default: the mode's own.
        q_mode: mlx-lm's: "affine", "mxfp4", "nvfp4" or "mxfp8".
        save: write the synthetic shape's checkpoint there, dense; must not exist.
        prompt_lengths: tokens of the prompts to read.
        contexts: tokens in the caches behind which to decode alone.
        batch_sizes: sequences at once.
        decode_tokens: to time for each sequence.
        repeats: rounds.
        progress: called with (stage, done, total).

    With neither prompts nor contexts nothing is timed, and no weight is read or made.

    Raises:
        UserError: for anything the user can mend.
    """
    for flag, number in (("--decode-tokens", decode_tokens), ("--repeats", repeats)):
        _check_positive(flag, number)
    cases = _cases(prompt_lengths, contexts, batch_sizes)
    quantization = make_quantization(quantize, q_bits, q_group_size, q_mode)
    if remove not in REMOVALS:
        raise UserError(f"--remove {remove}: choose one of {', '.join(REMOVALS)}")
    if dtype is not None and dtype not in FLOAT_NAMES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(FLOAT_NAMES)}")
    if synthetic is None:
        if not models:
            raise UserError("nothing to measure: give models, or --synthetic with a shape")
        if remove != "auto" or dtype or quantization or save:
            raise UserError(
                "--remove, --dtype, -q and --save are for --synthetic; a model is measured as it "
                "is: convert.py makes others of it"
            )
    found, notes = _loaded(models), []
    if synthetic is not None:
        shape = find_shape(synthetic)
        kind = getattr(mx, dtype) if dtype else shape.dtype
        plan = make_skipless_plan(shape.args, remove, kind, quantize)
        for model in (
            make_stock_model(shape.stock, kind, quantization),
            make_skipless_model(plan.after, kind, quantization),
        ):
            found[describe_network(model)] = model
        stored = dtype_name(kind)
        if quantization is not None:
            stored += f", {quantization.mode} {quantization.usual_bits}-bit"
        notes.append(f"random weights of {shape.name}, {stored}")
        notes += [NOT_THE_SAME] if shape.stock_differs else []
    baseline = next((label for label, model in found.items() if is_stock(model)), None)
    if baseline is None:
        first, model = next(iter(found.items()))
        vanilla = _vanilla(model)
        baseline = describe_network(vanilla)
        found[baseline] = vanilla
        notes.append(f"{baseline}: random weights, of the sizes of {first}")
    found = {baseline: found[baseline], **found}
    _check_memory(found.values(), cases, decode_tokens)
    if save is not None:
        write_checkpoint(shape, kind, save, progress)
        notes.append(f"wrote {save}")
    bandwidth, results = None, []
    if cases:
        _evaluate(found, progress)
        bandwidth = measure_bandwidth()
        for done, case in enumerate(cases):
            progress("measuring", done, len(cases))
            runs = measure_in_turn(
                found, partial(_run, case=case, decode_tokens=decode_tokens), repeats
            )
            results += compare_runs(found, case, decode_tokens, runs, bandwidth)
        progress("measuring", len(cases), len(cases))
    return Benchmark(
        _device(),
        bandwidth,
        baseline,
        decode_tokens,
        repeats,
        tuple(_subject(label, model) for label, model in found.items()),
        tuple(results),
        tuple(notes),
    )


def _check_positive(flag: str, *numbers: int) -> None:
    for number in numbers:
        if number < 1:
            raise UserError(f"{flag} {number}: must be at least 1")


def _cases(
    prompt_lengths: Sequence[int], contexts: Sequence[int], batch_sizes: Sequence[int]
) -> list[Case]:
    _check_positive("--prompt-lengths", *prompt_lengths)
    _check_positive("--contexts", *contexts)
    _check_positive("--batch-sizes", *batch_sizes)
    cases = [Case(length, n) for length in prompt_lengths for n in batch_sizes]
    return cases + [Case(length, n, decode_only=True) for length in contexts for n in batch_sizes]


def _loaded(models: Sequence[str | Path]) -> dict[str, nn.Module]:
    """Models by the shortest names that tell them apart; their weights are not read yet."""
    names = [Path(model).name or str(model) for model in models]  # "." has no name
    found: dict[str, nn.Module] = {}
    for name, model in zip(names, models, strict=True):
        label = name if names.count(name) == 1 else str(model)
        if label in found:
            raise UserError(f"{model} is given twice: give it once")
        found[label] = load_network(model, lazy=True)[0]
    return found


def is_stock(model: nn.Module) -> bool:
    """Whether a model runs in mlx-lm's own code."""
    return type(model).__module__.startswith("mlx_lm.models.")


def describe_network(model: nn.Module) -> str:
    """What runs, in words: "mlx-lm llama", "skipless without QP"."""
    if not isinstance(model, Model):
        return f"mlx-lm {type(model).__module__.rpartition('.')[2]}"
    kind = "skipless" if model.args.skip == "none" else "mlx-skipless with skips"
    letters = "".join(part.upper() for part in LETTERS if model.args.removed.get(part))
    gone = [letters, *(part for part in ("attention", "ffn") if model.args.removed.get(part))]
    gone = [part for part in gone if part]
    return f"{kind} without {', '.join(gone)}" if gone else kind


def _vanilla(model: nn.Module) -> nn.Module:
    """mlx-lm's network of a skipless one's sizes, number type and quantization."""
    assert isinstance(model, Model)
    forms = Counter(
        (module.bits, module.group_size, module.mode)
        for module in model.modules()
        if hasattr(module, "bits")
    )
    quantization = Quantization(*forms.most_common(1)[0][0]) if forms else None
    dtype = model(mx.zeros((1, 1), mx.int32)).dtype
    return make_stock_model(make_vanilla_shape(model.args), dtype, quantization)


def _subject(label: str, model: nn.Module) -> Subject:
    return Subject(
        label,
        describe_network(model),
        weight_bytes(model),
        count_bytes_read(model),
        count_cache_bytes(model, 1),
    )


def count_bytes_read(model: nn.Module, batch_size: int = 1) -> int:
    """Bytes of weights that a step of decoding reads, for a token of each sequence.

    Of an embedding that is not the head too a row a sequence; of experts those that are picked, by
    several sequences as many as random picks meet.
    """
    modules = [m for m in model.modules() if "weight" in m]
    total = float(weight_bytes(model))
    for module in modules:
        own = weight_bytes(module)
        rows = module.weight.shape[0]
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            head = any(m.weight.shape[0] == rows for m in modules if m is not module)
            total -= own - own / rows * batch_size if head else 0
        elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            picked = getattr(model.args, "num_experts_per_tok", rows)
            total -= own * (1 - picked / rows) ** batch_size
    return round(total)


def _begun_cache(model: nn.Module, batch_size: int) -> list[Any]:
    """A cache that holds a token of each sequence, lazily: its shapes are there, no value is."""
    cache = make_prompt_cache(model)
    model(mx.zeros((batch_size, 1), mx.int32), cache=cache)
    return cache


def count_cache_bytes(model: nn.Module, tokens: float) -> int:
    """Bytes of keys and values of a sequence of so many tokens, a window's as far as it sees."""
    total = 0.0
    for one in _begun_cache(model, 1):
        if isinstance(one, KVCache | RotatingKVCache):
            kept = min(tokens, getattr(one, "max_size", tokens))
            total += one.nbytes / one.keys.shape[2] * kept
    return round(total)


def fill_cache(model: nn.Module, batch_size: int, tokens: int) -> list[Any]:
    """A cache of random keys and values, as if so many tokens of each sequence had been read.

    Raises:
        UserError: for a kind of cache that has none.
    """
    cache = make_prompt_cache(model)
    for i, begun in enumerate(_begun_cache(model, batch_size)):
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


def _check_memory(models: Iterable[nn.Module], cases: Sequence[Case], decode_tokens: int) -> None:
    """Refuse what cannot fit: all weights, and twice the largest cache, which is copied to grow."""
    models = list(models)
    weights, available = sum(weight_bytes(model) for model in models), device_memory_bytes()
    for case in cases:
        tokens = case.length + decode_tokens
        cache = case.batch_size * max(count_cache_bytes(model, tokens) for model in models)
        if weights + 2 * cache > available:
            raise UserError(
                f"{case.length:,} tokens at batch {case.batch_size} take about "
                f"{format_bytes(weights + 2 * cache)} of memory with all models loaded and there "
                f"are {format_bytes(available)}: give fewer or smaller ones"
            )


def _evaluate(models: Mapping[str, nn.Module], progress: Progress) -> None:
    """Read or make the weights."""
    for done, model in enumerate(models.values()):
        progress("loading", done, len(models))
        evaluate_in_turn(tensors_of(model).values())
    progress("loading", len(models), len(models))


def _device() -> str:
    """What computes, and by which versions."""
    kind = "GPU" if mx.default_device().type == mx.gpu else "CPU"
    name = mx.device_info().get("device_name", platform.processor())
    system = f"{platform.system()} {platform.machine()}"
    return f"{name} ({kind}), {system}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"


def measure_bandwidth() -> float:
    """Bytes a second of memory that MLX reaches: the best of reading and copying a large array.

    It is read by a sum, and by a product with a vector, which is what decoding does; of a copy
    both ends count.
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
    models: Mapping[str, nn.Module], measure: Callable[[nn.Module], Outcome], repeats: int
) -> dict[str, list[Outcome]]:
    """Measure models one after another, over and over, after a warm-up each."""
    for model in models.values():
        measure(model)
    runs: dict[str, list[Outcome]] = {label: [] for label in models}
    for _ in range(repeats):
        for label, model in models.items():
            runs[label].append(measure(model))
    return runs


def _run(model: nn.Module, case: Case, decode_tokens: int) -> Run:
    """Greedy decoding behind prompts of random tokens or behind random caches.

    As in ``mlx_lm.generate``: the prompt goes in chunks, and each step is queued before the one
    before it is waited for. Behind random caches a first, untimed step makes them grow.
    """
    batch_size, length = case.batch_size, case.length

    def step(tokens: mx.array) -> mx.array:
        logits = model(tokens, cache=cache)[:, -1, :]
        log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.argmax(log_p, axis=-1)
        mx.async_eval(chosen, log_p)
        return chosen[:, None]

    streams: Any = [generation_stream]
    with wired_limit(model, streams), mx.stream(generation_stream):
        if case.decode_only:
            cache = fill_cache(model, batch_size, length)
            prompt = mx.zeros((batch_size, 1), mx.int32)
        else:
            cache = make_prompt_cache(model)
            vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
            prompt = mx.random.randint(0, vocabulary, (batch_size, length))
            mx.eval(prompt)
        mx.reset_peak_memory()
        started = time.perf_counter()
        *chunks, last = _chunks(prompt)
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
    return Run(first_token - started, ended - first_token, mx.get_peak_memory())


def _chunks(prompt: mx.array) -> list[mx.array]:
    """A prompt (batch, length) in pieces, the last of them the last token alone."""
    ends = [*range(PROMPT_CHUNK, prompt.shape[1] - 1, PROMPT_CHUNK), prompt.shape[1] - 1]
    return [chunk for chunk in mx.split(prompt, ends, axis=1) if chunk.size]


def compare_runs(
    models: Mapping[str, nn.Module],
    case: Case,
    decode_tokens: int,
    runs: Mapping[str, Sequence[Run]],
    bandwidth: float,
) -> list[Result]:
    """The outcome of a case; the first model is the baseline."""
    baseline, batch_size = next(iter(models)), case.batch_size
    weights = {label: weight_bytes(model) for label, model in models.items()}
    results = []
    for label, model in models.items():
        own = runs[label]
        pairs = [] if label == baseline else [*zip(runs[baseline], own, strict=True)]
        decode = Spread.of([batch_size * decode_tokens / run.decode for run in own])
        read = count_bytes_read(model, batch_size)
        read += batch_size * count_cache_bytes(model, case.length + (decode_tokens + 1) / 2)
        prompted = not case.decode_only
        results.append(
            Result(
                label,
                case,
                Spread.of([batch_size * case.length / run.first_token for run in own])
                if prompted
                else None,
                Spread.of([run.first_token for run in own]) if prompted else None,
                decode,
                max(run.peak_memory_bytes for run in own) - sum(weights.values()) + weights[label],
                read * decode.median / batch_size / bandwidth,
                Spread.of([base.first_token / run.first_token for base, run in pairs])
                if pairs and prompted
                else None,
                Spread.of([base.decode / run.decode for base, run in pairs]) if pairs else None,
            )
        )
    return results
