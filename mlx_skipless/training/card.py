"""Model cards of what was trained and healed here."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..conversion.card import name_source, render_card
from ..network.model import ModelArgs
from ..options import name_folder
from .results import Distance, HealingResult, TrainingResult

SKIPS = {"none": "no skip", "ffn": "one skip, around each FFN,", "both": "both skips"}
NORMS = {
    "none": "no norms",
    "qkv": "norms that no removal crosses",
    "pre": "norms on the stream",
}
HEALING_FAILED = (
    "So it did not help: do not use the result. Other text, more of it or another --learning-rate "
    "may do; a quantized model is better healed before it is quantized, for then its matrices need "
    "no second rounding."
)


def write_training_card(
    result: TrainingResult, args: ModelArgs, recipe: Mapping[str, Any], sources: Sequence[str]
) -> str:
    """Write the card of a model that was trained here: its text, its recipe and its figures."""
    named = {"query": args.query_skip, "head": args.head_skip, "output": args.output_skip}
    merging = [f"{name} skips" for name, there in named.items() if there]
    skips = " and ".join([f"{SKIPS[args.skip]} on the stream", *merging])
    summary = (
        f"A {args.block} transformer with {skips}, and {NORMS[args.norm]}, "
        f"{result.parameters:,} weights, trained by `mlx-skipless train`."
    )
    figures = [
        f"{result.tokens:,} tokens seen in {result.step:,} steps",
        f"training loss at the end: {result.loss:.4f} nats per token",
    ]
    if result.validation_loss is not None:
        figures.append(
            f"held-out text: {result.validation_loss:.4f} nats per token, "
            f"{result.bits_per_character:.4f} bits per character"
        )
    sections = {
        "Figures": figures,
        "Recipe": [f"{key}: {value}" for key, value in recipe.items()],
        "Text": sources,
    }
    name = name_folder(result.output)
    return render_card(name, [summary], sections, tags=("mlx", "mlx-skipless"))


def describe_healing(result: HealingResult) -> list[str]:
    """Say what a distillation gave, a sentence each."""

    def describe(found: Distance) -> str:
        return (
            f"KL to the original {found.kl:.4f} nats per token, loss {found.loss:.4f} "
            f"(x {found.loss / found.teacher_loss:.3f}), "
            f"{found.bits_per_character:.4f} bits per character"
        )

    original = result.before
    worse = result.after.kl >= result.before.kl
    return [
        f"Before: {describe(result.before)}.",
        f"After {result.step:,} steps on {result.tokens:,} tokens: {describe(result.after)}.",
        f"The original: loss {original.teacher_loss:.4f}, "
        f"{original.teacher_bits_per_character:.4f} bits per character; all on "
        f"{original.tokens:,} held-out tokens.",
        *([HEALING_FAILED] if worse else []),
    ]


def write_healing_card(result: HealingResult, treatment: Mapping[str, Any], teacher: str) -> str:
    """Write the card of a model that learnt from the one that it was made from."""
    summary = (
        f"A reduced model, distilled towards its original `{name_source(teacher)}` by "
        "`mlx-skipless heal`."
    )
    sections = {
        "Effect, measured on this model": describe_healing(result),
        "Treatment": [
            *(f"{key}: {value}" for key, value in treatment.items()),
            f"text: {result.text}",
        ],
    }
    return render_card(name_folder(result.output), [summary], sections, base_model=teacher)
