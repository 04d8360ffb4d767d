"""What a run of train or heal tells on the way and at its end."""

from typing import Any

from ..memory import format_bytes
from ..terminal import make_visible
from ..training.results import RunResult


def describe_event(event: dict[str, Any]) -> str:
    """Say in a line what an event of ``loop.ResumableRun`` says."""
    step = f"step {event['step']:>6,}"
    if "parameters" in event:
        return (
            f"{event['parameters']:,} weights and {event['train_tokens']:,} tokens to train on, "
            f"{event['validation_tokens']:,} held out; {event['steps']:,} steps"
        )
    if "sample" in event:
        return f"{step}  sample: {make_visible(event['sample'])}"
    if "before" in event or "after" in event:
        when, found = next((k, event[k]) for k in ("before", "after") if k in event)
        return (
            f"{step}  {when}: KL {found['kl']:.4f}  loss {found['loss']:.4f}  the original's "
            f"{found['teacher_loss']:.4f}"
        )
    if "perplexity" in event:
        return (
            f"{step}  held-out KL {event['validation_loss']:.4f}  perplexity "
            f"{event['perplexity']:.2f}"
        )
    if "validation_loss" in event:
        return (
            f"{step}  held-out loss {event['validation_loss']:.4f}  "
            f"bits per character {event['bits_per_character']:.4f}"
        )
    speed = event.get("tokens_per_second")  # None where a run goes on for no step
    return (
        f"{step}  loss {event['loss']:.4f}  learning rate {event['learning_rate']:.1e}  "
        + ("" if speed is None else f"{speed:,.0f} tokens/s  ")
        + f"memory {format_bytes(event['memory_bytes'])}"
    )


def describe_end(result: RunResult, counts: str) -> str:
    """Say in a line what a run wrote; ``counts`` says of how many weights."""
    return (
        f"wrote {result.output}: {counts}, {result.seconds:,.0f} s, "
        f"peak memory {format_bytes(result.peak_memory_bytes)}"
    )
