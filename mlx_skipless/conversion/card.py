"""The model card of a result: what was done to which model, and the measured effect."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..checkpoints import hub
from ..memory import format_bytes
from ..options import expand_path
from .report import Report

NAMES = {"q": "Q", "k": "K", "v": "V", "p": "P", "attention": "Attention", "ffn": "The FFN"}
TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}
{% for paragraph in paragraphs %}
{{ paragraph }}
{% endfor %}
{%- for title, content in sections.items() %}
## {{ title }}
{% if content is string %}
{{ content }}
{% else %}
{% for line in content %}- {{ line }}
{% endfor %}
{%- endif %}
{%- endfor %}"""
LOCAL = "a local model"  # in the place of a path whose last part says nothing, or too much
PATH = re.compile(r"(?<![\w:/.~<])~?(?:/[^\s/`'\"()<>*,;]+){2,}")
USE = """\
```python
from mlx_lm import load, generate

model, tokenizer = load("{name}"{trust})
print(generate(model, tokenizer, prompt="Once upon a time"))
```

or `mlx_lm.generate --model {name}{flag} --prompt 'Once upon a time'`."""


def name_source(source: str) -> str:
    """What a card calls a model: its Hub id, or the last part of its path.

    A card is published, and a path tells of the machine that wrote it.
    """
    if hub.is_id(source):
        return source
    path = Path(os.path.abspath(expand_path(source)))
    return LOCAL if path in (expand_path("~"), Path(path.anchor)) else path.name


def render_card(
    name: str,
    paragraphs: Sequence[str],
    sections: Mapping[str, str | Sequence[str]],
    *,
    base_model: str | None = None,
    tags: Sequence[str] = ("mlx",),
) -> str:
    """Write a model card, Markdown under the Hub's header.

    Args:
        name: the model's name, the title.
        paragraphs: what stands below the title.
        sections: by heading, a text as it is, or the points of a list.
        base_model: what the user called the model that this one was made from; the header names it
            if it is a Hub id.
        tags: the Hub's tags.
    """
    data = ModelCardData(
        base_model=base_model if base_model is not None and hub.is_id(base_model) else None,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=[*tags],
    )
    parts: Any = {"name": name, "paragraphs": paragraphs, "sections": sections}
    card = f"{ModelCard.from_template(data, template_str=TEMPLATE, **parts)}"
    return PATH.sub(lambda found: name_source(found[0]), card)


def describe_effect(report: Report) -> list[str]:
    """Describe the measured effect, a sentence each."""
    return [*_describe_size(report), *_describe_check(report)]


def _describe_size(report: Report) -> Iterator[str]:
    saved = 1 - report.params_after / report.params_before
    share = f"{abs(saved):.1%} {'fewer' if saved >= 0 else 'more'}"
    dense = " as dense weights" if report.packing else ""
    yield (
        f"{report.params_before:,} weights before, {report.params_after:,} after ({share}); "
        f"{format_bytes(report.bytes_before)}{dense} before, "
        f"{format_bytes(report.bytes_after)} after"
        + (f", {report.bits_per_weight:.2f} bits per weight." if report.packings else ".")
    )
    if (table := report.first_layer) is not None:
        one, some, many = (
            _compare(table.reads_before(batch), table.reads_after(batch)) for batch in (1, 16, 256)
        )
        yield (
            "The first layer's projections are read from a table by token: "
            f"{table.reads_after():,} numbers instead of {table.reads_before():,} at batch 1, "
            f"{one} ({some} at batch 16, {many} at 256). "
            f"That costs {table.growth:+,} weights, {table.growth / report.params_before:+.1%}."
        )
    if report.removed or report.replaced or report.first_layer:
        yield _describe_reads(report.speedup_from_bytes)
    if report.cache_bytes_after != report.cache_bytes_before:
        yield (
            f"Each token of context takes {report.cache_bytes_after:,} bytes of KV cache, "
            f"{report.cache_bytes_before:,} before."
        )


def _describe_reads(ratio: float) -> str:
    """Say how many bytes decoding reads, from their number without the removals over that with."""
    without = "without the removals in the same number format"
    if abs(ratio - 1) < 5e-5:
        return f"Decoding a token reads as many bytes of weights as {without}."
    if ratio < 1:
        return f"Decoding a token reads {1 / ratio - 1:.2%} more bytes of weights than {without}."
    fewer = f"{ratio:.2f} times" if ratio >= 1.01 else f"{1 - 1 / ratio:.2%}"
    return (
        f"Decoding a token reads {fewer} fewer bytes of weights than {without}: "
        "the speed-up to expect at most."
    )


def _compare(before: int, after: int) -> str:
    """Say how many times fewer, or more, one number is than another."""
    if after > before:
        return f"{after / before:,.1f} times more"
    return f"{before / after:,.0f} times fewer"


def _describe_check(report: Report) -> Iterator[str]:
    check = report.verification
    if check is None:
        return
    yield (
        f"Against the source on {check.tokens} tokens ({check.text}): worst relative logit "
        f"error {check.max_rel_logit_error:.1e}, KL {check.kl:.2e} nats per token, the same "
        f"greedy token at {check.greedy_match:.1%}; perplexity {check.source_perplexity:.2f} "
        f"before, {check.perplexity:.2f} after."
    )
    plain, quantization = check.quantized_only, report.quantization
    if plain is not None and quantization is not None and check.kl_ratio is not None:
        yield (
            f"The source quantized alone, to nearest, in {quantization['bits']} bits"
            f"{', without removals' if any(report.removed.values()) else ''}: KL "
            f"{plain.kl:.2e}, perplexity {plain.perplexity:.2f}; so this result's KL is "
            f"{check.kl_ratio:.2f} times as large."
        )


def write_card(report: Report, name: str, given: Sequence[str] = ()) -> str:
    """Write the card of a conversion's result.

    Args:
        report: what was done.
        name: the result's name.
        given: what the user called the source and the text; of a path the card keeps its last part.
    """
    trust, flag = ("", "") if report.stock else (", trust_remote_code=True", " --trust-remote-code")
    card = render_card(
        name,
        [
            f"Made by mlx-skipless from `{name_source(report.source)}`.",
            *(f"**{warning}**" for warning in report.warnings),
        ],
        {
            "What was done": [*_describe_changes(report)],
            "Effect, measured on this model": describe_effect(report),
            "Use": USE.format(name=name, trust=trust, flag=flag),
        },
        base_model=report.source,
        tags=["mlx"] if report.stock else ["mlx", "mlx-skipless"],
    )
    for path in given:
        if "/" in path and not hub.is_data_set(path):  # notes quote it
            expanded = str(expand_path(path))
            for form in (os.path.realpath(expanded), os.path.abspath(expanded), expanded, path):
                card = card.replace(form, name_source(path))
    return card


def _describe_changes(report: Report) -> Iterator[str]:
    for part, layers in report.removed.items():
        yield f"{NAMES[part]} removed from layers {', '.join(map(str, layers))}."
    for part, layers in report.replaced.items():
        numbers = ", ".join(map(str, layers))
        yield f"{NAMES[part]} replaced by a fitted matrix in layers {numbers}."
    if report.folded:
        yield f"Gains of these norms folded into the matrices: {', '.join(report.folded)}."
    if report.packing:
        done = "stays so where nothing was changed" if report.kept_packed else "dequantized first"
        yield f"The source was quantized ({report.packing}) and {done}."
    if report.packings:
        formats = ", ".join(
            f"{one.matrices} matri{'x' if one.matrices == 1 else 'ces'} to {one.bits} bits "
            f"({one.mode}, groups of {one.group_size})"
            for one in report.packings
        )
        yield f"Quantized: {formats}."
    yield from (f"{note[0].upper()}{note[1:]}." for note in report.notes)
