"""The model card of a result: what was done to which model, and the measured effect."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import hub

if TYPE_CHECKING:
    from ..network.model import ModelArgs
    from ..training.healing import Distance
    from ..training.healing import Result as HealingResult
    from ..training.pretraining import Result
    from .report import Report

HEALING_FAILED = (
    "So it did not help: do not use the result. Other text, more of it or another --learning-rate "
    "may do; a quantized model is better healed before it is quantized, for then its matrices need "
    "no second rounding."
)
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


def write_training_card(
    result: "Result", args: "ModelArgs", recipe: Mapping[str, Any], sources: Sequence[str]
) -> str:
    """The card of a model that was trained here: its text, its recipe and its figures."""
    skips = {"none": "no skip", "ffn": "a skip around each FFN", "both": "both skips"}[args.skip]
    norms = {
        "none": "no norms",
        "qkv": "norms on the outputs of projections alone",
        "pre": "norms on the stream",
    }[args.norm]
    body = [
        *("---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx"),
        *("- mlx-skipless", "---", "", f"# {Path(result.output).name}", ""),
        f"A {args.block} transformer with {skips} and {norms}, {result.parameters:,} weights, "
        "trained by `mlx-skipless train`.",
        *("", "## Figures", "", f"- {result.tokens:,} tokens seen in {result.step:,} steps"),
        f"- training loss at the end: {result.loss:.4f} nats per token",
    ]
    if result.validation_loss is not None:
        body += [
            f"- held-out text: {result.validation_loss:.4f} nats per token, "
            f"{result.bits_per_character:.4f} bits per character"
        ]
    body += ["", "## Recipe", "", *(f"- {key}: {value}" for key, value in recipe.items())]
    body += ["", "## Text", "", *(f"- {name}" for name in sources), ""]
    return "\n".join(body)


def describe_healing(result: "HealingResult") -> list[str]:
    """What a distillation gave, a sentence each."""

    def figures(found: "Distance") -> str:
        return (
            f"KL to the original {found.kl:.4f} nats per token, loss {found.loss:.4f} "
            f"(x {found.loss / found.teacher_loss:.3f}), "
            f"{found.bits_per_character:.4f} bits per character"
        )

    original = result.before
    worse = result.after.kl >= result.before.kl
    return [
        f"Before: {figures(result.before)}.",
        f"After {result.step:,} steps on {result.tokens:,} tokens: {figures(result.after)}.",
        f"The original: loss {original.teacher_loss:.4f}, "
        f"{original.teacher_bits_per_character:.4f} bits per character; all on "
        f"{original.tokens:,} held-out tokens.",
        *([HEALING_FAILED] if worse else []),
    ]


def write_healing_card(result: "HealingResult", treatment: Mapping[str, Any], teacher: str) -> str:
    """The card of a model that learnt from the one that it was made from."""
    origin = teacher if hub.is_id(teacher) else Path(teacher).name
    header = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx"]
    header += [f"base_model: {teacher}"] if hub.is_id(teacher) else []
    body = [
        *("---", "", f"# {Path(result.output).name}", ""),
        f"A reduced model, distilled towards its original `{origin}` by `mlx-skipless heal`.",
        *(
            "",
            "## Effect, measured on this model",
            "",
            *(f"- {s}" for s in describe_healing(result)),
        ),
        *("", "## Treatment", "", *(f"- {key}: {value}" for key, value in treatment.items())),
        *(f"- text: {result.text}", ""),
    ]
    return "\n".join([*header, *body])
