"""What a checkpoint of a run holds: weights, optimizer, and where the run stands."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import UserError, first_line
from .folder import Event, Position, RunFolder


class RunState:
    """A network in training at a step, which its folder saves and loads bit for bit.

    Args:
        folder: where its files lie.
        model: whose trainable parameters are trained.
        optimizer: of these parameters.
        steps: how many the run has in all.
    """

    def __init__(self, folder: RunFolder, model: nn.Module, optimizer: optim.Optimizer, steps: int):
        self._folder, self.model, self._optimizer, self._steps = folder, model, optimizer, steps
        self._optimizer.init(self.model.trainable_parameters())
        trained: Any = tree_flatten(self.model.trainable_parameters())
        self.parameters = sum(array.size for _, array in trained)
        self._step, self._loss, self._seconds = 0, math.nan, 0.0
        self._losses: list[mx.array] = []  # of the steps since the last line of the log
        self._saved: int | None = None
        mx.eval(self.model.state, self._optimizer.state)

    def load(self) -> None:
        """Go to the last checkpoint."""
        arrays, position = self._folder.load_state(self._state())
        both: Any = tree_unflatten(list(arrays.items()))
        self.model.update(both["weights"])
        self._optimizer.state = both["optimizer"]
        mx.eval(self.model.state, self._optimizer.state)
        self._step, self._seconds = position.step, position.seconds
        self._losses = [mx.array(loss) for loss in position.losses]
        self._saved = self._step
        if self._step > self._steps:
            raise UserError(
                f"{self._folder.path} is at step {self._step} already: --steps must be more than "
                "that"
            )
        kept = self._folder.cut_log(self._step)
        self._loss = next((e["loss"] for e in reversed(kept) if "loss" in e), self._loss)

    def _state(self) -> dict[str, mx.array]:
        both = {"weights": self.model.trainable_parameters(), "optimizer": self._optimizer.state}
        return dict(tree_flatten(both))  # type: ignore[arg-type]

    def _write_model(self) -> None:
        """Write what others read of a checkpoint."""

    def _save(self) -> None:
        state = self._state()
        losses: list[Any] = [loss.item() for loss in self._losses]
        self._check_weights()
        try:
            self._folder.save_state(state, Position(self._step, self._seconds, losses))
            self._write_model()
            self._folder.draw_curve()
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"saving step {self._step} to {self._folder.path} failed ({first_line(error)}): "
                f"is the disk full? {self._describe_saved()}"
            ) from error
        self._saved = self._step

    def _check_weights(self) -> None:
        weights: Any = tree_flatten(self.model.trainable_parameters())
        for name, array in weights:
            if not bool(mx.isfinite(array).all()):
                raise UserError(self._describe_divergence(name))

    def _log(self, event: Event, report: Callable[[Event], None]) -> None:
        if event:
            event = {"step": self._step, **event}
            self._folder.append_event(event)
            report(event)

    def _describe_divergence(self, what: str) -> str:
        return (
            f"{what} is no number any more at step {self._step}: {self._describe_saved()}; lower "
            "--learning-rate, or give it a longer --warmup"
        )

    def _describe_saved(self) -> str:
        if self._saved is None:
            return "nothing was saved yet"
        return f"the checkpoint of step {self._saved} is kept"
