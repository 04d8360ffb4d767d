"""What a device makes of a 7B model: speeds, a conversion, and whether results are exact.

All weights are random and made here. A time is kept to, at the cost of layers, rounds and contexts.
"""

import datetime
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import __version__
from ..errors import UserError
from ..inference.sizes import count_bytes_read, count_cache_bytes
from ..memory import device_memory_bytes, machine_memory_bytes
from ..progress import Progress, Steps
from ..quantization.layout import Layout
from ..quantization.settings import Quantization
from ..removal.products import multiply
from .benchmark import describe_device
from .effort import Effort, Pace, describe_cuts, list_efforts
from .exactness import Exactness, measure_exactness
from .synthetic import Shape, evaluate_in_turn, find_shape, write_checkpoint
from .timing import (
    Case,
    Result,
    compare_timings,
    measure_bandwidth,
    measure_in_turn,
    time_model,
)
from .variants import SharedWeights, make_plain, make_variants

SHAPE = "Mistral-7B-v0.3"
SECONDS = 480.0  # for all; what is under way then is finished
CONVERSION_SHARE = 0.15  # of the time
MEMORY_SHARE = 0.6  # of the device's memory for weights
FORMATS: dict[str, Quantization | None] = {
    "bfloat16": None, "8 bits": Quantization(8, 64), "4 bits": Quantization(4, 64),
}  # fmt: skip
PROBE_LAYERS = 2
FIRST_RUN_SHARE = 0.1  # of the time: a first run that takes longer counts
PROBE_SECONDS, PROBE_TOKENS = 0.3, 1024  # a prompt grows until it takes so long or is so long
WIDTHS = (4, 2, 1)  # divisors of the shape's
SAFETY = 2  # a conversion's layers take at most so many times as long as their products
CONVERTED_LAYERS = 2


@dataclass(frozen=True)
class Network:
    """A network of a report.

    Attributes:
        label: what results call it.
        bytes_per_token: bytes of weights that decoding a token reads, as measured.
        whole_bytes_per_token: the same with all layers of the shape.
        whole_cache_bytes: that a token adds to the KV cache with all layers.
    """

    label: str
    bytes_per_token: int
    whole_bytes_per_token: int
    whole_cache_bytes: int


@dataclass(frozen=True)
class FormatReport:
    """The speeds of one number format.

    Attributes:
        name: of the format.
        effort: what was measured of each network; None if the device is too slow or too small.
        cuts: what this leaves out, in words; "" if nothing.
        networks: the plain one first.
        results: by case, then by network.
    """

    name: str
    effort: Effort | None
    cuts: str
    networks: tuple[Network, ...]
    results: tuple[Result, ...]


@dataclass(frozen=True)
class ConversionReport:
    """How long a conversion took: Q and P out of a random network, check included.

    Attributes:
        layers, hidden_size, parameters: of the network.
        seconds: that it took.
        peak_memory_bytes: of this process until then.
        whole_seconds: that the shape would take. A merge multiplies each matrix by one as wide as
            the stream, so its operations are the weights times the width.
    """

    layers: int
    hidden_size: int
    parameters: int
    seconds: float
    peak_memory_bytes: int
    whole_seconds: float


@dataclass(frozen=True)
class DeviceReport:
    """What ``report_device`` measures.

    Attributes:
        device: what computed, and the versions of what ran on it.
        system: the operating system, Python's and this package's version.
        device_memory_bytes, machine_memory_bytes: of what computed, and of the machine.
        bandwidth: the most bytes a second that MLX reached.
        shape: the model's name.
        layers, hidden_size: of the whole model.
        exactness: the self-check.
        conversion: what a conversion takes.
        formats: speeds, by number format.
        date: of the report.
        seconds: that the report took.
    """

    device: str
    system: str
    device_memory_bytes: int
    machine_memory_bytes: int
    bandwidth: float
    shape: str
    layers: int
    hidden_size: int
    exactness: Exactness
    conversion: ConversionReport
    formats: tuple[FormatReport, ...]
    date: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Clock:
    """The time that is left."""

    def __init__(self, seconds: float):
        self._started, self._seconds = time.perf_counter(), seconds

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._started

    @property
    def left(self) -> float:
        return self._seconds - self.spent


def report_device(
    convert: Callable[..., Any],
    *,
    shape: str = SHAPE,
    seconds: float = SECONDS,
    progress: Progress = lambda stage, done, total: None,
) -> DeviceReport:
    """Measure what MLX's default device makes of a shape and of what removals leave of it.

    Args:
        convert: what converts, as ``mlx_skipless.convert`` does.
        shape: a name or the path of a config.json, as ``benchmark`` takes it.
        seconds: to keep to, about. A slower device measures fewer layers and less of them.
        progress: called with (stage, done, total).

    Raises:
        UserError: for anything the user can mend.
    """
    clock, whole = _Clock(seconds), find_shape(shape)
    progress("bandwidth", 0, 1)
    bandwidth = measure_bandwidth()
    progress("bandwidth", 1, 1)
    with tempfile.TemporaryDirectory(prefix="mlx-skipless-") as folder:
        exactness = measure_exactness(
            convert, Path(folder), progress=partial(progress, "exactness")
        )
        conversion = _time_conversions(
            convert,
            whole,
            Path(folder),
            CONVERSION_SHARE * seconds,
            partial(progress, "converting"),
        )
    formats = []
    for done, (name, quantization) in enumerate(FORMATS.items()):
        share = clock.left / (len(FORMATS) - done)
        tell = partial(progress, name)
        own = _Clock(share)
        formats.append(_Measuring(shape, whole, quantization, bandwidth, own, tell).run(name))
        mx.clear_cache()
    return DeviceReport(
        describe_device(), _describe_system(), device_memory_bytes(), machine_memory_bytes(),
        bandwidth, whole.name, whole.args.num_hidden_layers, whole.args.hidden_size, exactness,
        conversion, tuple(formats), datetime.date.today().isoformat(), clock.spent,
    )  # fmt: skip


def _describe_system() -> str:
    mac = platform.mac_ver()[0]
    system = f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}"
    return f"{system}, Python {platform.python_version()}, mlx-skipless {__version__}"


def _time_conversions(
    convert: Callable[..., Any], whole: Shape, folder: Path, seconds: float, progress: Steps
) -> ConversionReport:
    """Convert a narrow network, then the widest that the time allows; return its figures.

    What a conversion takes whatever it converts, and then its products, are the time to expect.
    """
    least, *wider = sorted(WIDTHS, reverse=True)
    progress(0, 2)
    started = time.perf_counter()
    found = _time_conversion(convert, whole, _narrow(whole, least), folder / str(least))
    always = time.perf_counter() - started
    speed = _time_products(whole.args.hidden_size)
    progress(1, 2)
    for divisor in reversed(wider):
        shape = _narrow(whole, divisor)
        if 2 * always + SAFETY * _count_operations(shape) / speed > seconds:
            continue
        with suppress(UserError):  # no room on the disk or in memory
            found = _time_conversion(convert, whole, shape, folder / str(divisor))
            break
    progress(2, 2)
    return found


def _narrow(whole: Shape, divisor: int) -> Shape:
    """A few layers of a shape, narrower than its own, with a small vocabulary."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    narrow = {key: max(1, getattr(whole.args, key) // divisor) for key in sizes}
    narrow["vocab_size"] = max(1, whole.args.vocab_size // max(WIDTHS))
    narrow |= {"num_hidden_layers": CONVERTED_LAYERS, "head_dim": whole.args.head_dim}
    return Shape(whole.name, {**whole.config, **narrow})


def _count_operations(shape: Shape) -> int:
    """Count a conversion's operations: it multiplies matrices by ones as wide as the stream."""
    return 2 * shape.args.hidden_size * Layout(shape.args, shape.dtype).count()


def _time_products(width: int) -> float:
    """Measure how many operations a second a float32 product of that width does."""
    matrix = np.ones((width, width), dtype=np.float32)
    multiply(matrix, matrix)  # warms up
    started = time.perf_counter()
    multiply(matrix, matrix)
    return 2 * width**3 / (time.perf_counter() - started)


def _time_conversion(
    convert: Callable[..., Any], whole: Shape, shape: Shape, folder: Path
) -> ConversionReport:
    """Convert a random network of a shape; say what another would take by that."""
    folder.mkdir()
    write_checkpoint(shape, whole.dtype, folder / "source")
    report = convert(folder / "source", folder / "result", skipless=True, remove="qp")
    shutil.rmtree(folder)
    share = _count_operations(whole) / _count_operations(shape)
    return ConversionReport(
        CONVERTED_LAYERS, shape.args.hidden_size, Layout(shape.args, shape.dtype).count(),
        report.seconds, report.peak_memory_bytes, report.seconds * share,
    )  # fmt: skip


class _Measuring:
    """The measurement of one number format.

    Args:
        name: of the shape, as ``find_shape`` takes it.
        whole: the shape.
        quantization: the format; None: bfloat16.
        bandwidth: bytes a second.
        clock: the time to keep to.
        progress: called with (done, total).
    """

    def __init__(
        self,
        name: str,
        whole: Shape,
        quantization: Quantization | None,
        bandwidth: float,
        clock: _Clock,
        progress: Steps,
    ):
        self._name, self._whole, self._quantization = name, whole, quantization
        self._bandwidth, self._clock, self._progress = bandwidth, clock, progress
        self._shared = SharedWeights()

    def run(self, name: str) -> FormatReport:
        """Choose what fits into the memory and the time, and measure it."""
        self._progress(0, 1)
        networks, most = self._count_bytes()
        effort = pace = None
        if most:
            probed = self._probe(min(PROBE_LAYERS, most))
            effort, pace = self._choose(probed, networks[0][0], most)
        if effort is None or pace is None:
            self._progress(1, 1)
            reason = "a token takes too long here" if most else "not even one layer fits in memory"
            return FormatReport(name, None, f"left out: {reason}", (), ())
        models = self._load(effort)
        results: list[Result] = []
        cases = effort.list_cases()
        for done, case in enumerate(cases):
            self._progress(1 + done, 1 + len(cases))
            if done and effort.estimate_case(case, pace) > self._clock.left:
                kept = tuple(one.length for one in cases[:done])
                prompts = tuple(n for n in effort.prompts if n in kept)
                effort = replace(effort, contexts=kept, prompts=prompts)
                break
            results += self._measure(models, case, effort)
        self._progress(1 + len(cases), 1 + len(cases))
        layers = self._whole.args.num_hidden_layers
        read = {label: count_bytes_read(model) for label, model in models.items()}
        shown = tuple(
            Network(label, nbytes, *two)
            for (label, nbytes), two in zip(read.items(), networks, strict=False)
        )
        return FormatReport(name, effort, describe_cuts(effort, layers), shown, tuple(results))

    def _make(self, layers: int) -> dict[str, nn.Module]:
        shape = find_shape(f"{self._name}:{layers}")
        return make_variants(shape, mx.bfloat16, self._quantization)

    def _count_bytes(self) -> tuple[list[tuple[int, int]], int]:
        """Count the bytes that whole networks read and cache, and the layers that fit in memory."""
        layers = self._whole.args.num_hidden_layers
        whole = self._make(layers)
        counted = [(count_bytes_read(one), count_cache_bytes(one, 1)) for one in whole.values()]
        least = self._count_shared(1)
        a_layer = (self._count_shared(layers) - least) / max(1, layers - 1)
        spare = MEMORY_SHARE * device_memory_bytes() - least
        most = 0 if spare < 0 else min(layers, 1 + int(spare / max(1.0, a_layer)))
        return counted, most

    def _count_shared(self, layers: int) -> int:
        shared = SharedWeights()
        for model in self._make(layers).values():
            shared.share(model)
        return shared.nbytes

    def _probe(self, layers: int) -> tuple[Pace, int]:
        """Measure the plain network with few layers.

        Returns:
            Its pace, a prompt's for each layer, and the bytes that it reads for a token.
        """
        started = time.perf_counter()
        shape = find_shape(f"{self._name}:{layers}")
        model = make_plain(shape, mx.bfloat16, self._quantization)
        self._shared.share(model)
        evaluate_in_turn(self._shared.values())
        load, length = time.perf_counter() - started, 2
        timing = time_model(model, Case(length, 1), 1)
        # The first run may have compiled kernels, unless all that follows takes that long, too.
        if timing.first_token < FIRST_RUN_SHARE * self._clock.left:
            timing = time_model(model, Case(length, 1), 1)
        while timing.first_token < PROBE_SECONDS and length < PROBE_TOKENS:
            length *= 8
            timing = time_model(model, Case(length, 1), 1)
        prompt = max(timing.first_token - timing.decode, 0.0) / (length - 1)
        # A prompt's last layer gives the cache its keys and values and does no more.
        return Pace(timing.decode, prompt / max(1, layers - 1), load), count_bytes_read(model)

    def _choose(
        self, probed: tuple[Pace, int], whole: int, most: int
    ) -> tuple[Effort | None, Pace | None]:
        """Choose the best that fits into the time that is left.

        Args:
            probed: what ``_probe`` gave.
            whole: bytes that the plain network with all layers reads for a token.
            most: layers that fit in memory.
        """
        pace, read = probed
        layers, few = self._whole.args.num_hidden_layers, min(PROBE_LAYERS, most)
        a_layer = (whole - read) / max(1, layers - few)
        for effort in list_efforts(most):
            grown = 1 + (effort.layers - few) * a_layer / read
            prompt = pace.prompt * (effort.layers - 1)
            expected = Pace(pace.token * grown, prompt, 2 * pace.load * grown)
            if effort.estimate(expected) <= self._clock.left:
                return effort, expected
        return None, None

    def _load(self, effort: Effort) -> Mapping[str, nn.Module]:
        """Make the networks and evaluate their weights."""
        models = dict(islice(self._make(effort.layers).items(), effort.networks))
        for model in models.values():
            self._shared.share(model)
        evaluate_in_turn(self._shared.values())
        return models

    def _measure(self, models: Mapping[str, nn.Module], case: Case, effort: Effort) -> list[Result]:
        tokens = effort.decode_tokens
        timings = measure_in_turn(
            models,
            partial(time_model, case=case, decode_tokens=tokens),
            effort.repeats,
            lambda: self._clock.left < 0,
        )
        held = self._shared.nbytes
        return compare_timings(models, case, tokens, timings, self._bandwidth, held)
