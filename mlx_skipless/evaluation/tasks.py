"""Task scores of two models, by lm-eval as mlx_lm.evaluate runs it.

lm-eval is optional: only ``harness`` imports it, and only once it is needed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..inference.loading import load
from ..inference.prompts import has_turns
from ..options import check_least, expand_path

Results = Mapping[str, Any]  # what lm_eval.simple_evaluate returns
SEED = 123  # mlx_lm.evaluate's


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, before and after.

    Attributes:
        task: name of the task or group of tasks.
        metric: name of the metric; if it has a filter, a comma and the filter's name follow.
        higher_is_better: None where lm-eval does not say.
        source, result: the scores of the two models.
        source_stderr, result_stderr: their standard errors over the task's items; None if lm-eval
            gives none.
        difference: ``result - source``.
        difference_stderr: standard error of the items' differences, where the metric is a mean over
            items. Groups and perplexities are no such means: theirs is computed as if the two
            models had seen different items, which is too large.
        items: how many were scored.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    source: float
    result: float
    source_stderr: float | None
    result_stderr: float | None
    difference: float
    difference_stderr: float | None
    items: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    source: str | Path,
    result: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool | None = None,
    seed: int = SEED,
    confirm_run_unsafe_code: bool = False,
    trust_remote_code: bool = False,
) -> list[TaskScore]:
    """Run lm-eval's tasks on two models, one after the other.

    Args:
        source, result: the models before and after: folders or Hub ids that ``load`` takes.
        tasks: names of tasks, groups or tags, with wildcards if need be, or .yaml files of them.
        include_path: a folder with more tasks.
        num_shots: examples in the prompt; default: what the task says.
        limit: items of each task to run; default: all.
        batch_size: sequences at once.
        apply_chat_template: ask in turns of a chat; default: if the source takes turns.
        seed: seed of the choice of examples.
        confirm_run_unsafe_code: let tasks run what the model wrote.
        trust_remote_code: let models of other architectures run the code that they bring.

    Returns:
        A score for each metric of each task.

    Raises:
        UserError: if lm-eval is not installed, or for a task or model that cannot be used.
    """
    for name, value, least in (
        ("num-shots", num_shots, 0), ("limit", limit, 1), ("batch-size", batch_size, 1)
    ):  # fmt: skip
        check_least(f"--{name}", value, least)
    folder = None if include_path is None else expand_path(include_path)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder")
    harness = _import_harness()
    names = harness.find_tasks(tasks, folder)
    # Both are opened before either is run, and neither is read before its turn.
    read = partial(load, trust_remote_code=trust_remote_code)
    tokenizers = [read(model, lazy=True)[1] for model in (source, result)]
    if apply_chat_template is None:
        apply_chat_template = has_turns(tokenizers[0])
    run = partial(
        harness.run_tasks, tasks=names, include_path=folder, batch_size=batch_size, seed=seed,
        apply_chat_template=apply_chat_template, num_fewshot=num_shots, limit=limit,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )  # fmt: skip
    return list(pair_scores(*(run(*read(model)) for model in (source, result))))


def _import_harness() -> Any:
    try:
        from . import harness
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval ({first_line(error)}): pip install 'mlx-lm[evaluate]'"
        ) from error
    return harness


def pair_scores(source: Results, result: Results) -> Iterator[TaskScore]:
    """Pair what two runs of the same tasks scored, a metric at a time."""
    before, after = ({**run["results"], **run.get("groups", {})} for run in (source, result))
    for task, metrics in before.items():
        for key, a in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(a, Real):
                continue
            a, b = float(a), float(after[task][key])
            errors = [_read_stderr(run[task], metric, kind) for run in (before, after)]
            items = [_read_items(run, task, metric, kind) for run in (source, result)]
            paired = _compute_paired_stderr(items, (a, b))
            if paired is None and None not in errors:
                paired = math.hypot(*errors)  # type: ignore[arg-type]
            yield TaskScore(
                task=task,
                metric=metric if kind == "none" else key,
                higher_is_better=source["higher_is_better"].get(task, {}).get(metric),
                source=a,
                result=b,
                source_stderr=errors[0],
                result_stderr=errors[1],
                difference=b - a,
                difference_stderr=paired,
                items=metrics["sample_len"],
            )


def _read_stderr(metrics: Mapping[str, Any], metric: str, kind: str) -> float | None:
    value = metrics.get(f"{metric}_stderr,{kind}")
    return float(value) if isinstance(value, Real) else None  # "N/A" where there is none


def _read_items(run: Results, task: str, metric: str, kind: str) -> dict[int, Any]:
    """Read what each item of a task scored, by its number."""
    samples = run["samples"].get(task, [])
    return {s["doc_id"]: s[metric] for s in samples if s["filter"] == kind and metric in s}


def _compute_paired_stderr(
    runs: Sequence[Mapping[int, Any]], aggregates: Sequence[float]
) -> float | None:
    """Compute the standard error of a mean of differences, two runs' of the same items.

    Returns None unless ``aggregates``, the runs' scores, are the means of their items.
    """
    a, b = runs
    numbers = all(isinstance(value, Real) for run in runs for value in run.values())
    if len(a) < 2 or a.keys() != b.keys() or not numbers:
        return None
    means = [sum(run.values()) / len(run) for run in runs]
    if not all(map(math.isclose, means, aggregates)):
        return None
    mean = means[1] - means[0]
    variance = sum((b[i] - a[i] - mean) ** 2 for i in a) / (len(a) - 1)
    return math.sqrt(variance / len(a))
