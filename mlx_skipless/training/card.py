"""Model cards of what was trained and healed here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import hub

if TYPE_CHECKING:
    from ..network.model import ModelArgs
    from .healing import Distance
    from .healing import Result as HealingResult
    from .pretraining import Result


HEALING_FAILED = (
    "So it did not help: do not use the result. Other text, more of it or another --learning-rate "
    "may do; a quantized model is better healed before it is quantized, for then its matrices need "
    "no second rounding."
)


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
