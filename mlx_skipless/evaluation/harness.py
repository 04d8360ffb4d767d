"""lm-eval on a loaded model, as mlx_lm.evaluate does it. Imports lm-eval, which is optional."""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import mlx.nn as nn
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from mlx_lm.evaluate import MLXLM
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UserError, explain_nan, first_line
from ..options import expand_path


class LoadedLM(MLXLM):
    """mlx_lm.evaluate's model around a loaded one: its own loader would run a checkpoint's code."""

    def __init__(
        self, model: nn.Module, tokenizer: TokenizerWrapper, batch_size: int, chat: bool
    ) -> None:
        LM.__init__(self)
        self._model, self.tokenizer = model, tokenizer
        self.use_chat_template = chat
        self._batch_size = batch_size
        self._max_tokens = self._sampler = None

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        """Score answers; a UserError if a score is no number: lm-eval would rank it like any."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests)
        _check_scores(score for score, _ in found)
        return found

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        """Score whole texts; a UserError if a score is no number."""
        found: list[float] = super().loglikelihood_rolling(requests)
        _check_scores(found)
        return found


def _check_scores(scores: Iterable[float]) -> None:
    if any(map(math.isnan, scores)):
        raise explain_nan("a model")


@cache
def _make_manager(include_path: Path | None) -> TaskManager:
    return TaskManager(include_path=include_path)


def find_tasks(tasks: Sequence[str], include_path: Path | None) -> list[str]:
    """Replace wildcards by the names that match; leave task files as they are.

    Raises:
        UserError: for a task that does not exist.
    """
    found = []
    for task in tasks:
        matches = _make_manager(include_path).match_tasks([task])
        if not matches and expand_path(task).is_file():
            matches = [str(expand_path(task))]
        if not matches:
            raise UserError(
                f"--tasks {task}: no such task or file; `lm-eval ls tasks` lists the tasks, "
                "--include-path adds a folder of yours"
            )
        found += matches
    return found


def run_tasks(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    *,
    tasks: Sequence[str],
    include_path: Path | None,
    batch_size: int,
    apply_chat_template: bool,
    seed: int,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks with ``lm_eval.simple_evaluate``, as mlx_lm.evaluate does.

    Args:
        model, tokenizer: what is scored.
        tasks: names of tasks, or task files.
        include_path: a folder with more tasks.
        batch_size: sequences at once.
        apply_chat_template: ask in turns of a chat.
        seed: seed of all random choices.
        options: more keywords of ``lm_eval.simple_evaluate``.

    Raises:
        UserError: if lm-eval cannot run the tasks.
    """
    try:
        return lm_eval.simple_evaluate(
            model=LoadedLM(model, tokenizer, batch_size, apply_chat_template),
            tasks=list(tasks),
            task_manager=_make_manager(include_path),
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            **options,
        )
    except UserError:
        raise
    except Exception as error:  # tasks, data sets and metrics raise whatever they like
        raise UserError(f"lm-eval cannot run {', '.join(tasks)}: {first_line(error)}") from error
