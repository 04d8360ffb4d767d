"""A benchmark as tables and remarks, for the terminal and for documents."""

from collections.abc import Iterator

from ..evaluation.benchmark import Benchmark
from ..evaluation.timing import Spread
from ..memory import format_bytes
from .tables import Grid


def tabulate_benchmark(benchmark: Benchmark) -> Iterator[Grid]:
    """Yield tables of bytes, of reading prompts and of decoding, as far as they were measured."""
    yield _tabulate_bytes(benchmark)
    if any(one.prompt_tps for one in benchmark.results):
        yield _tabulate_prompts(benchmark)
    if benchmark.results:
        yield _tabulate_decoding(benchmark)


def describe_measurement(benchmark: Benchmark) -> Iterator[str]:
    """Yield lines that say how the tables were measured."""
    yield benchmark.device
    if benchmark.bandwidth is not None:
        yield (
            f"medians (lowest..highest) of {benchmark.repeats} rounds, in turn; "
            f"{benchmark.decode_tokens} tokens decoded; limit: {benchmark.bandwidth / 1e9:,.1f} "
            "GB/s of memory read or copied"
        )
    yield f"ratios: to {benchmark.baseline}, round by round"
    yield from (f"note: {note}" for note in benchmark.notes)


def write_markdown(benchmark: Benchmark) -> str:
    """Write the tables and the remarks as Markdown."""
    parts = [grid.markdown() for grid in tabulate_benchmark(benchmark)]
    remarks = "\n".join(f"- {line}" for line in describe_measurement(benchmark))
    return "\n\n".join([*parts, remarks]) + "\n"


def _tabulate_bytes(benchmark: Benchmark) -> Grid:
    titles = ("model", "runs", "weights", "read for\na token", "KV cache\na token, bytes")
    rows = [
        (
            one.label, "" if one.network == one.label else one.network,
            format_bytes(one.weight_bytes), format_bytes(one.bytes_per_token),
            f"{one.cache_bytes_per_token:,}",
        )
        for one in benchmark.subjects
    ]  # fmt: skip
    return Grid(titles, rows, words=2)


def _tabulate_prompts(benchmark: Benchmark) -> Grid:
    titles = ("prompt\nx batch", "model", "prompt\ntokens/s", "ratio", "first token\nms")
    rows = [
        (
            f"{one.case.length:,} x {one.case.batch_size}", one.label,
            format_spread(one.prompt_tps), _format_ratio(one.prompt_ratio),
            format_spread(one.first_token_seconds, 1e3),
        )
        for one in benchmark.results
        if one.prompt_tps is not None and one.first_token_seconds is not None
    ]  # fmt: skip
    return Grid(titles, rows, words=2)


def _tabulate_decoding(benchmark: Benchmark) -> Grid:
    titles = (
        "behind\nx batch", "model", "decode\ntokens/s", "ratio", "of the\nlimit", "peak\nmemory",
    )  # fmt: skip
    rows = [
        (
            f"{one.case.describe()} x {one.case.batch_size}", one.label,
            format_spread(one.decode_tps), _format_ratio(one.decode_ratio),
            f"{one.limit_share:.0%}", format_bytes(one.peak_memory_bytes),
        )
        for one in benchmark.results
    ]  # fmt: skip
    return Grid(titles, rows, words=2)


def format_spread(figure: Spread, scale: float = 1) -> str:
    """Format the median and, in brackets, the range of a figure, with three digits or more."""
    median, low, high = (scale * x for x in (figure.median, figure.low, figure.high))
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:,.{digits}f} ({low:,.{digits}f}..{high:,.{digits}f})"


def _format_ratio(figure: Spread | None) -> str:
    if figure is None:
        return ""
    return f"{figure.median:.2f} ({figure.low:.2f}..{figure.high:.2f})"
