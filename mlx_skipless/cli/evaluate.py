"""evaluate: score two models on lm-eval's tasks."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from .shared import add_output_arguments, open_output
from .tables import Grid

EXAMPLES = (
    (
        "SRC OUT --tasks arc_easy hellaswag --limit 200",
        "scores before and after, and the difference",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="A", help="model folder or Hub id, before")
    parser.add_argument("result", metavar="B", help="model folder or Hub id, after")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK",
        help="lm-eval's names of tasks, or .yaml files; needs mlx-lm[evaluate]",
    )  # fmt: skip
    parser.add_argument("--include-path", metavar="FOLDER", help="folder with more tasks")
    parser.add_argument(
        "--num-shots", type=int, metavar="N",
        help="examples in the prompt (default: the task's own)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="items of a task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at once (default: 8)")
    parser.add_argument(
        "--apply-chat-template", action=argparse.BooleanOptionalAction,
        help="ask in turns of a chat (default: if A has a chat template)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=123, help="of the examples (default: %(default)s)"
    )
    parser.add_argument(
        "--confirm-run-unsafe-code", action="store_true",
        help="let tasks run the code that a model writes",
    )  # fmt: skip
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model of another kind run its code"
    )
    add_output_arguments(parser, "the scores")


def run(options: dict[str, Any]) -> None:
    from ..evaluation.tasks import evaluate  # imports MLX, which --help need not wait for

    with open_output(options) as shown:
        with _drop_stderr() if shown.quiet else contextlib.nullcontext():
            scores = evaluate(**options)
        rows = [
            (
                score.task, score.metric,
                _with_error(f"{score.source:.4f}", score.source_stderr),
                _with_error(f"{score.result:.4f}", score.result_stderr),
                _with_error(f"{score.difference:+.4f}", score.difference_stderr),
            )
            for score in scores
        ]  # fmt: skip
        Grid(("task", "metric", "A", "B", "difference"), rows, words=2).show(shown.console)
        shown.write_json({"scores": [score.as_dict() for score in scores]})


@contextlib.contextmanager
def _drop_stderr() -> Iterator[None]:
    """Drop what is written to stderr, lm-eval's bars and its programs' lines; a failure passes."""
    from ..checkpoints.guarded import hold_stderr

    with hold_stderr() as drop:
        try:
            yield
        finally:
            sys.stderr.flush()
            drop()


def _with_error(figure: str, stderr: float | None) -> str:
    return figure if stderr is None else f"{figure} ± {stderr:.4f}"
