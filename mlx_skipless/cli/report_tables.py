"""A device's report as Markdown, to be pasted into an issue."""

from collections.abc import Iterator

from ..evaluation.device_report import DeviceReport, FormatReport
from ..evaluation.exactness import Exactness
from ..evaluation.timing import Result, Spread
from ..memory import format_bytes
from .tables import Grid, format_count


def write_report(report: DeviceReport) -> str:
    """Write all of a report."""
    name = report.device.partition(" (")[0]
    parts = [f"## mlx-skipless on {name}", "\n".join(_list_facts(report))]
    for one in report.formats:
        parts += _write_format(one, report.layers)
    parts += ["### Conversion", _describe_conversion(report)]
    parts += ["### Exactness", *_write_exactness(report.exactness)]
    return "\n\n".join(parts) + "\n"


def _list_facts(report: DeviceReport) -> Iterator[str]:
    yield f"- {report.device}"
    yield f"- {report.system}"
    memory, machine = report.device_memory_bytes, report.machine_memory_bytes
    beside = "" if memory == machine else f" ({format_bytes(machine)} of the machine)"
    yield (
        f"- memory {format_bytes(memory)}{beside}; "
        f"{report.bandwidth / 1e9:,.1f} GB/s of it read or copied by MLX"
    )
    yield f"- exact here: {'yes' if report.exactness.exact else '**no**'}"
    yield (
        f"- `mlx-skipless bench --report`, {report.date}, {report.seconds / 60:.1f} minutes; "
        f"{report.shape}'s shape, random weights, batch 1"
    )


def _write_format(one: FormatReport, layers: int) -> list[str]:
    """Write the tables of a number format."""
    title = f"### {one.name}"
    if one.effort is None:
        return [title, f"{one.cuts[0].upper()}{one.cuts[1:]}."]
    by_place = {(result.case.length, result.label): result for result in one.results}
    lengths = one.effort.contexts
    plain = one.networks[0]
    decoding = [
        (
            network.label,
            _beside(format_bytes(network.whole_bytes_per_token),
                    plain.whole_bytes_per_token / network.whole_bytes_per_token, network == plain),
            _beside(format_bytes(network.bytes_per_token),
                    plain.bytes_per_token / network.bytes_per_token, network == plain),
            *(_show_decoding(by_place[length, network.label]) for length in lengths),
        )
        for network in one.networks
    ]  # fmt: skip
    titles = (
        "decoding, tokens/s", f"weights read for a token, {layers} layers",
        f"as measured, {_count(one.effort.layers, 'layer')}",
        *(f"behind {length:,}" for length in lengths),
    )  # fmt: skip
    parts = [title, _describe_effort(one), Grid(titles, decoding).markdown()]
    if one.effort.prompts:
        prompts = [
            (network.label, *(_show_prompt(by_place[length, network.label])
                              for length in one.effort.prompts))
            for network in one.networks
        ]  # fmt: skip
        titles = ("prompt, tokens/s", *(f"of {length:,}" for length in one.effort.prompts))
        parts.append(Grid(titles, prompts).markdown())
    return parts


def _describe_effort(one: FormatReport) -> str:
    assert one.effort is not None
    cuts = f"For lack of time or memory: {one.cuts}. " if one.cuts else ""
    ratios = [r for result in one.results for r in (result.prompt_ratio, result.decode_ratio) if r]
    spread = max((max(r.high / r.median, r.median / r.low) - 1 for r in ratios), default=0)
    within = f" Those of single rounds lie within {spread:.1%}." if spread else ""
    rounds, tokens = _count(one.effort.repeats, "round"), _count(one.effort.decode_tokens, "token")
    return (
        f"{cuts}Medians of {rounds} in turn, {tokens} decoded. In brackets: how many times as "
        f"fast as plain mlx-lm, and how many times less it reads.{within}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _show_decoding(result: Result) -> str:
    return _show(result.decode_tps, result.decode_ratio)


def _show_prompt(result: Result) -> str:
    assert result.prompt_tps is not None
    return _show(result.prompt_tps, result.prompt_ratio)


def _show(speed: Spread, ratio: Spread | None) -> str:
    digits = 0 if speed.median >= 100 else 1 if speed.median >= 10 else 2
    return _beside(f"{speed.median:,.{digits}f}", ratio.median if ratio else 1.0, ratio is None)


def _beside(figure: str, ratio: float, plain: bool) -> str:
    return figure if plain else f"{figure} ({ratio:.2f})"


def _describe_conversion(report: DeviceReport) -> str:
    one, whole = report.conversion, report.conversion.whole_seconds / 60
    # A part of the work grows with the weights alone, so that narrow layers say too much.
    most = "about" if one.hidden_size == report.hidden_size else "at most"
    return (
        f"Q and P out of {_count(one.layers, 'layer')} of width {one.hidden_size:,} "
        f"({format_count(one.parameters)} weights, bfloat16), check included: {one.seconds:.1f} s, "
        f"peak memory {format_bytes(one.peak_memory_bytes)}. By weights times width {report.shape} "
        f"would take {most} {whole:,.1f} minutes."
    )


def _write_exactness(found: Exactness) -> list[str]:
    gone = ", ".join(f"{letter.upper()} of {len(at)}" for letter, at in found.removed.items())
    rows = [
        ("source, float32 on this device, against float64", found.source_error),
        ("result, all tokens at once, against float64", found.result_error),
        ("result, token by token, against float64", found.stepwise_error),
        ("result against source, `convert`'s own check", found.check_error),
    ]
    cells = [(what, f"{error:.1e}") for what, error in rows]
    same = "the same" if found.same_tokens else "**not all the same**"
    return [
        "A random skipless network with query, head and output skips, without "
        f"{gone} layers. The next tokens that it prefers are {same} as in float64.",
        Grid(("worst token's relative logit error", ""), cells).markdown(),
    ]
