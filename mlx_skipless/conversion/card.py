"""The model card of a result: what was done to which model, and the measured effect."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints import hub

if TYPE_CHECKING:
    from .report import Report

NAMES = {"q": "Q", "k": "K", "v": "V", "p": "P", "attention": "Attention", "ffn": "The FFN"}


def describe_effect(report: "Report") -> list[str]:
    """The measured effect, a sentence each."""
    saved = 1 - report.params_after / report.params_before
    share = f"{abs(saved):.1%} {'fewer' if saved >= 0 else 'more'}"
    lines = [
        f"{report.params_before:,} weights before, {report.params_after:,} after ({share}); "
        f"{report.bytes_before / 1e6:,.1f} MB before, {report.bytes_after / 1e6:,.1f} MB after."
    ]
    if (table := report.first_layer) is not None:
        times = [table.reads_before(batch) / table.reads_after(batch) for batch in (1, 16, 256)]
        lines.append(
            "The first layer's projections are read from a table by token: "
            f"{table.reads_after():,} numbers instead of {table.reads_before():,} at batch 1, "
            f"{times[0]:,.0f} times fewer ({times[1]:,.0f} at batch 16, {times[2]:,.0f} at 256). "
            f"That costs {table.growth:+,} weights, {table.growth / report.params_before:+.1%}."
        )
    if report.removed or report.first_layer:
        ratio = report.speedup_from_bytes
        fewer = f"{ratio:.2f} times" if ratio >= 1.01 else f"{1 - 1 / ratio:.2%}"
        lines.append(
            f"Decoding a token reads {fewer} fewer bytes of weights than without "
            "the removals in the same number format: the speed-up to expect at most."
        )
    if report.cache_bytes_after != report.cache_bytes_before:
        lines.append(
            f"Each token of context takes {report.cache_bytes_after:,} bytes of KV cache, "
            f"{report.cache_bytes_before:,} before."
        )
    if (check := report.verification) is not None:
        lines.append(
            f"Against the source on {check.tokens} tokens ({check.text}): worst relative logit "
            f"error {check.max_rel_logit_error:.1e}, KL {check.kl:.2e} nats per token, the same "
            f"greedy token at {check.greedy_match:.1%}; perplexity {check.source_perplexity:.2f} "
            f"before, {check.perplexity:.2f} after."
        )
        if (plain := check.quantized_only) is not None and check.kl_ratio is not None:
            lines.append(
                "The source quantized alone, to nearest, without removals: KL "
                f"{plain.kl:.2e}, perplexity {plain.perplexity:.2f}; so this result's KL is "
                f"{check.kl_ratio:.2f} times as large."
            )
    return lines


def write_card(report: "Report", name: str) -> str:
    """The card, Markdown with the Hub's header."""
    header = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx"]
    header += [] if report.stock else ["- mlx-skipless"]
    if hub.is_id(report.source):
        header.append(f"base_model: {report.source}")
    header += ["---", ""]
    origin = report.source if hub.is_id(report.source) else Path(report.source).name
    body = [f"# {name}", "", f"Made by mlx-skipless from `{origin}`.", ""]
    body += [f"**{warning}**\n" for warning in report.warnings]
    body += ["## What was done", ""]
    for letter, layers in report.removed.items():
        body.append(f"- {NAMES[letter]} removed from layers {', '.join(map(str, layers))}.")
    if report.folded:
        body.append(f"- Gains of these norms folded into the matrices: {', '.join(report.folded)}.")
    if report.packing:
        body.append(f"- The source was quantized ({report.packing}) and dequantized first.")
    if report.quantization:
        q = report.quantization
        widths = [own["bits"] for own in q.values() if isinstance(own, dict)] or [q["bits"]]
        bits = f"{min(widths)} to {max(widths)}" if len({*widths}) > 1 else f"{widths[0]}"
        body.append(f"- Quantized: {q['mode']}, {bits} bits, groups of {q['group_size']}.")
    body += [f"- {note[0].upper()}{note[1:]}." for note in report.notes]
    body += ["", "## Effect, measured on this model", ""]
    body += [f"- {line}" for line in describe_effect(report)]
    trust = "" if report.stock else ", trust_remote_code=True"
    flag = "" if report.stock else " --trust-remote-code"
    body += [
        "",
        "## Use",
        "",
        "```python",
        "from mlx_lm import load, generate",
        "",
        f'model, tokenizer = load("{name}"{trust})',
        'print(generate(model, tokenizer, prompt="Once upon a time"))',
        "```",
        "",
        f"or `mlx_lm.generate --model {name}{flag} --prompt 'Once upon a time'`.",
        "",
    ]
    return "\n".join([*header, *body])
