"""Models side by side: bytes, speed and memory, measured in turn against plain mlx-lm.

Knows nothing of terminals and documents.
"""

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..constants import FLOAT_NAMES, REMOVALS
from ..errors import BadArgument, UserError, explain_nan
from ..inference.context import check_windows
from ..inference.generation import check_experts
from ..inference.loading import load_network
from ..inference.sizes import count_bytes_read, count_cache_bytes
from ..memory import device_memory_bytes, format_bytes, weight_bytes
from ..network import reduced
from ..network.model import Model
from ..network.parts import dtype_name, tensors_of
from ..network.wiring import LETTERS
from ..options import check_choice, check_least, name_folder
from ..progress import Progress
from ..quantization.layout import quantize_nearest
from ..quantization.settings import Quantization, make_quantization
from .synthetic import (
    Shape,
    evaluate_in_turn,
    find_shape,
    make_skipless_model,
    make_skipless_plan,
    make_stock_model,
    make_vanilla_shape,
    write_checkpoint,
)
from .timing import (
    Case,
    Result,
    compare_timings,
    measure_bandwidth,
    measure_in_turn,
    time_model,
)

NOT_THE_SAME = (
    "mlx-lm's own network is not the same function (it may not know this activation, width, window "
    "or these biases)"
)


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        label: what results call it.
        network: what runs: "mlx-lm llama", "skipless without QP", ...
        weight_bytes: bytes of all weights.
        bytes_per_token: bytes of weights that decoding a token of one sequence reads.
        cache_bytes_per_token: bytes that a token adds to the KV cache.
    """

    label: str
    network: str
    weight_bytes: int
    bytes_per_token: int
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Benchmark:
    """What ``benchmark`` measures.

    Attributes:
        device: what computed, and the versions of what ran on it.
        bandwidth: the most bytes a second that MLX reached; None if nothing was timed.
        baseline: label of the model that ratios are to.
        decode_tokens: tokens that each sequence was given, for each figure.
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
class _RandomPair:
    """A shape with random weights, in mlx-lm's own network and in the skipless one."""

    shape: Shape
    remove: str
    dtype: mx.Dtype
    quantization: Quantization | None

    def make_models(self) -> list[nn.Module]:
        """Make both networks; no weight is evaluated."""
        quantized = self.quantization is not None
        plan = make_skipless_plan(self.shape.args, self.remove, self.dtype, quantized)
        return [
            make_stock_model(self.shape.stock, self.dtype, self.quantization),
            make_skipless_model(plan.after, self.dtype, self.quantization),
        ]

    def list_notes(self) -> list[str]:
        stored = dtype_name(self.dtype)
        if self.quantization is not None:
            stored += f", {self.quantization.mode} {self.quantization.usual_bits}-bit"
        notes = [f"random weights of {self.shape.name}, {stored}"]
        return [*notes, NOT_THE_SAME] if self.shape.stock_differs else notes


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

    With neither prompts nor contexts nothing is timed, and no weight is read or made.

    Args:
        models: folders or Hub ids. The first that runs in mlx-lm's own code is the baseline; if
            none does, mlx-lm's Llama (or Mixtral) of the first one's sizes, with random weights.
        synthetic: measure mlx-lm's own network and the skipless one with random weights of a
            shape, a model that ``mlx-skipless architectures`` lists or a config.json; "NAME:8" has
            8 layers.
        remove: what goes from the skipless one: "auto", by arithmetic, "none", or letters.
        dtype: number type of random weights; default: what the shape's config says, else bfloat16.
        quantize, q_bits, q_group_size, q_mode: quantize random weights, as ``mlx_lm.convert`` does.
        save: folder to write the synthetic shape's checkpoint to, dense; must not exist.
        prompt_lengths: tokens of the prompts to read.
        contexts: tokens in the random caches behind which to decode alone.
        batch_sizes: sequences at once.
        decode_tokens: tokens to time for each sequence.
        repeats: rounds, in each of which every model is measured once.
        progress: called with (stage, done, total).

    Raises:
        UserError: for anything the user can mend.
    """
    check_least("--decode-tokens", decode_tokens)
    check_least("--repeats", repeats)
    cases = _list_cases(prompt_lengths, contexts, batch_sizes)
    quantization = make_quantization(quantize, q_bits, q_group_size, q_mode)
    pair = _find_pair(synthetic, remove, dtype, quantization)
    if pair is None:
        _check_models_alone(models, remove, dtype, quantization, save)
    found, notes = _gather_models(models, pair)
    _check_memory(found.values(), cases, decode_tokens)
    notes += _check_contexts(found, cases, decode_tokens)
    if pair is not None and save is not None:
        write_checkpoint(pair.shape, pair.dtype, save, progress)
        notes.append(f"wrote {save}")
    return _measure_models(found, notes, cases, decode_tokens, repeats, progress)


def _list_cases(
    prompt_lengths: Sequence[int], contexts: Sequence[int], batch_sizes: Sequence[int]
) -> list[Case]:
    sizes = {"prompt-lengths": prompt_lengths, "contexts": contexts, "batch-sizes": batch_sizes}
    for name, numbers in sizes.items():
        for number in numbers:
            check_least(f"--{name}", number)
    cases = [Case(length, n) for length in prompt_lengths for n in batch_sizes]
    return cases + [Case(length, n, decode_only=True) for length in contexts for n in batch_sizes]


def _find_pair(
    synthetic: str | None, remove: str, dtype: str | None, quantization: Quantization | None
) -> _RandomPair | None:
    """Find what ``--synthetic`` asks for; None without it."""
    check_choice("--remove", remove, REMOVALS)
    if dtype is not None:
        check_choice("--dtype", dtype, FLOAT_NAMES)
    if synthetic is None:
        return None
    shape = find_shape(synthetic)
    return _RandomPair(shape, remove, getattr(mx, dtype) if dtype else shape.dtype, quantization)


def _check_models_alone(models: Sequence[str | Path], remove: str, *options: Any) -> None:
    """Refuse options of ``--synthetic`` without it, and nothing to measure."""
    if not models:
        raise BadArgument("nothing to measure: give models, or --synthetic with a shape")
    if remove != "auto" or any(options):
        raise BadArgument(
            "--remove, --dtype, -q and --save are for --synthetic; a model is measured as it "
            "is: convert.py makes others of it"
        )


def _gather_models(
    models: Sequence[str | Path], pair: _RandomPair | None
) -> tuple[dict[str, nn.Module], list[str]]:
    """Open all models by their labels, the baseline first, and list notes on them."""
    found, notes = _load_models(models), []
    if pair is not None:
        found |= {describe_network(model): model for model in pair.make_models()}
        notes += pair.list_notes()
    baseline = next((label for label, model in found.items() if is_stock(model)), None)
    if baseline is None:
        first, model = next(iter(found.items()))
        vanilla = _make_vanilla(model)
        baseline = describe_network(vanilla)
        found[baseline] = vanilla
        notes.append(f"{baseline}: random weights, of the sizes of {first}")
    return {baseline: found[baseline], **found}, notes


def _check_contexts(
    found: Mapping[str, nn.Module], cases: Sequence[Case], decode_tokens: int
) -> Iterable[str]:
    """Say of each model if cases are longer than what it was made for, which costs it no time.

    Raises:
        UserError: if it has no positions for them.
    """
    for label, model in found.items():
        for flag, alone in (("--prompt-lengths", False), ("--contexts", True)):
            lengths = [case.length + decode_tokens for case in cases if case.decode_only == alone]
            beyond = check_windows(model, lengths, f"{label}: {flag} and --decode-tokens make")
            yield from () if beyond is None else (beyond,)


def _load_models(models: Sequence[str | Path]) -> dict[str, nn.Module]:
    """Open models by the shortest names that tell them apart; their weights are not read yet."""
    names = [name_folder(model) for model in models]
    found: dict[str, nn.Module] = {}
    for name, model in zip(names, models, strict=True):
        label = name if names.count(name) == 1 else str(model)
        if label in found:
            raise BadArgument(f"{model} is given twice: give it once")
        found[label] = load_network(model, lazy=True)[0]
    return found


def is_stock(model: nn.Module) -> bool:
    """Tell whether a model runs in mlx-lm's own code alone, with all its sub-layers."""
    return not isinstance(model, Model) and not _count_gone(model)


def _count_gone(model: nn.Module) -> Counter[Any]:
    """Count the sub-layers that are gone from a network of mlx-lm's own, by what is in their place.

    That is ``Dropped`` or ``StandIn``.
    """
    found = map(type, model.modules())
    return Counter(kind for kind in found if issubclass(kind, reduced.Dropped))


def describe_network(model: nn.Module) -> str:
    """Describe what runs: "mlx-lm llama", "skipless without QP"."""
    if not isinstance(model, Model):
        name = f"mlx-lm {type(model).__module__.rpartition('.')[2]}"
        ways: dict[Any, str] = {reduced.Dropped: "dropped", reduced.StandIn: "replaced"}
        counts = _count_gone(model)
        gone = [f"{counts[kind]} {way}" for kind, way in ways.items() if counts[kind]]
        return f"{name} (sub-layers: {', '.join(gone)})" if gone else name
    kind = "skipless" if model.args.skip == "none" else "mlx-skipless with skips"
    letters = "".join(part.upper() for part in LETTERS if model.args.removed.get(part))
    gone = [letters] if letters else []
    gone += [part for part in ("attention", "ffn") if model.args.removed.get(part)]
    return f"{kind} without {', '.join(gone)}" if gone else kind


def _make_vanilla(model: nn.Module) -> nn.Module:
    """Make mlx-lm's whole network of another one's sizes, number type and quantization."""
    forms = Counter(
        (module.bits, module.group_size, module.mode)
        for module in model.modules()
        if hasattr(module, "bits")
    )
    quantization = Quantization(*forms.most_common(1)[0][0]) if forms else None
    dtype = model(mx.zeros((1, 1), mx.int32)).dtype  # type: ignore[operator]
    if isinstance(model, Model):
        return make_stock_model(make_vanilla_shape(model.args), dtype, quantization)
    kind: Any = type(model)
    whole = kind(getattr(model, "args", None) or model.config)  # as PLaMo 2 calls it
    whole.set_dtype(dtype)
    return whole if quantization is None else quantize_nearest(whole, quantization)[0]


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


def _check_logits(label: str, model: nn.Module) -> None:
    """Refuse a broken model, whose speed nobody asks for."""
    try:
        broken = bool(mx.isnan(model(mx.zeros((1, 2), mx.int32))).any())
    except RuntimeError as error:
        check_experts(error)
        raise
    if broken:
        raise explain_nan(label)


def _measure_models(
    models: Mapping[str, nn.Module],
    notes: Sequence[str],
    cases: Sequence[Case],
    decode_tokens: int,
    repeats: int,
    progress: Progress,
) -> Benchmark:
    """Count the models' bytes and time the cases, if there are any; the first is the baseline."""
    bandwidth, results = None, []
    if cases:
        for done, (label, model) in enumerate(models.items()):
            progress("loading", done, len(models))
            evaluate_in_turn(tensors_of(model).values())
            _check_logits(label, model)
        progress("loading", len(models), len(models))
        bandwidth = measure_bandwidth()
        for done, case in enumerate(cases):
            progress("measuring", done, len(cases))
            measure = partial(time_model, case=case, decode_tokens=decode_tokens)
            timings = measure_in_turn(models, measure, repeats)
            results += compare_timings(models, case, decode_tokens, timings, bandwidth)
        progress("measuring", len(cases), len(cases))
    return Benchmark(
        describe_device(),
        bandwidth,
        next(iter(models)),
        decode_tokens,
        repeats,
        tuple(_count_bytes(label, model) for label, model in models.items()),
        tuple(results),
        tuple(notes),
    )


def _count_bytes(label: str, model: nn.Module) -> Subject:
    return Subject(
        label,
        describe_network(model),
        weight_bytes(model),
        count_bytes_read(model),
        count_cache_bytes(model, 1),
    )


def describe_device() -> str:
    """Describe what computes, and by which versions."""
    kind = "GPU" if mx.default_device().type == mx.gpu else "CPU"
    name = mx.device_info().get("device_name", platform.processor())
    system = f"{platform.system()} {platform.machine()}"
    return f"{name} ({kind}), {system}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}"
