"""The loop of a run that can stop and go on bit for bit: steps, evaluations, log, signals.

A subclass says what is trained and on which loss.
"""

import json
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints.files import is_there
from ..checkpoints.output import replace_file
from ..errors import UserError, first_line
from ..memory import device_memory_bytes, format_bytes, peak_memory_bytes
from ..progress import Steps
from ..text.corpus import Batches
from .folder import Event, RunFolder, load_arrays, read_log
from .optimizer import Schedule
from .recipe import Pace, Recipe, Treatment
from .results import RunResult
from .signals import Signals, hear_signals
from .tokens import Tokens

Result = TypeVar("Result", bound=RunResult)
TRAINING_BYTES = 12  # per trained weight, at least: itself, its gradient and one moment


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
        _check_memory(TRAINING_BYTES * self.parameters, f"{self.parameters:,} weights to train")

    def load(self) -> None:
        """Go to the last checkpoint.

        Raises:
            UserError: if it is broken, another network's, or beyond the run's steps.
        """
        file = self._folder.state
        arrays, metadata = load_arrays(file)
        own = self._state()
        try:
            self._step, self._seconds = int(metadata["step"]), float(metadata["seconds"])
            losses = json.loads(metadata["losses"])
            if not isinstance(losses, list) or self._step < 0 or self._seconds < 0:
                raise ValueError("its step or its time is none")
            if not all(map(math.isfinite, [self._seconds, *losses])):
                raise ValueError("it holds what is no number")
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            raise UserError(
                f"{file} cannot be resumed from ({first_line(error)}): start the run again"
            ) from error
        kinds = [{k: (a.shape, a.dtype) for k, a in of.items()} for of in (arrays, own)]
        if kinds[0] != kinds[1]:
            raise UserError(f"{file} holds another network's state: start the run again")
        for name, array in arrays.items():
            if not bool(mx.isfinite(array).all()):
                raise UserError(f"{name} in {file} is no number: start the run again")
        both: Any = tree_unflatten(list(arrays.items()))
        self.model.update(both["weights"])
        self._optimizer.state = both["optimizer"]
        self._losses = [mx.array(loss) for loss in losses]
        self._saved = self._step
        if self._step > self._steps:
            raise UserError(
                f"{self._folder.path} is at step {self._step} already: --steps must be that or more"
            )
        kept = self._folder.cut_log(self._step)
        self._loss = next((e["loss"] for e in reversed(kept) if "loss" in e), self._loss)

    def _has_logged(self, key: str) -> bool:
        """Whether the log says this of this step."""
        log = read_log(self._folder.path)
        return any(key in event and event["step"] == self._step for event in log)

    def _state(self) -> dict[str, mx.array]:
        both = {"weights": self.model.trainable_parameters(), "optimizer": self._optimizer.state}
        return dict(tree_flatten(both))  # type: ignore[arg-type]

    def _write_model(self) -> None:
        """Write what others read of a checkpoint."""

    def _save(self) -> None:
        state = self._state()
        metadata = {"step": str(self._step), "seconds": repr(self._seconds)}
        metadata["losses"] = json.dumps([loss.item() for loss in self._losses])
        self._check_weights()
        try:
            replace_file(
                self._folder.state, lambda file: mx.save_safetensors(str(file), state, metadata)
            )
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

    def _describe_divergence(self, what: str) -> str:
        return (
            f"{what} is no number any more at step {self._step}: {self._describe_saved()}; lower "
            "--learning-rate, or give it a longer --warmup"
        )

    def _describe_saved(self) -> str:
        if self._saved is None:
            return "nothing was saved yet"
        return f"the checkpoint of step {self._saved} is kept"


class ResumableRun(RunState, Generic[Result]):
    """A network that is trained, its optimizer, its text and its folder.

    Args:
        folder: where its files lie.
        text: the tokens to train on.
        plan: how many steps, and of which windows.
        pace: how often to do what.
        model: whose trainable parameters are trained.
        optimizer: of these parameters.
        schedule: the learning rate to log.
    """

    settings: Any  # a subclass's dataclass: all that decides how the run goes

    def __init__(
        self,
        folder: RunFolder,
        text: Tokens,
        plan: Recipe | Treatment,
        pace: Pace,
        model: nn.Module,
        optimizer: optim.Optimizer,
        schedule: Schedule,
    ):
        super().__init__(folder, model, optimizer, plan.steps)
        self._text, self._pace, self._schedule = text, pace, schedule
        self._step_tokens = plan.batch_size * plan.context
        logits = 4 * self._step_tokens * len(text.tokenizer)
        _check_memory(logits, f"--batch-size {plan.batch_size} and --context {plan.context}")
        self._batches = Batches(text.train, plan.context, plan.batch_size, plan.seed)
        self._logged_step, self._logged_at = 0, 0.0
        self._unheard: OSError | None = None  # why a report could not be made
        self.progress: Steps = lambda done, total: None
        self.signals = Signals()

    # What a subclass says.

    def begin(self) -> None:
        """Write what never changes during a run."""
        raise NotImplementedError

    def go(self, report: Callable[[Event], None]) -> Result:
        """Do all of the run: ``run``, and what comes before and after it."""
        raise NotImplementedError

    def _compile_step(self) -> Callable[[int], mx.array]:
        """Make a function that takes the step of a number, from 0, and returns its loss."""
        raise NotImplementedError

    def _evaluate(self, limit: int | None) -> Event:
        """Measure the network on held-out text of ``limit`` tokens; empty if there is none."""
        raise NotImplementedError

    def _observe(self) -> Event:
        """Return more for the log after this step, if it is time."""
        return {}

    # The loop.

    def run(self, report: Callable[[Event], None]) -> Event:
        """Train to the end and save; returns the last evaluation."""
        pace, step = self._pace, self._compile_step()
        started, before = time.perf_counter(), self._seconds
        self._logged_at, self._logged_step = started, self._step
        self._tell({"step": self._step, "steps": self._steps, **self._sizes()}, report)
        self.progress(self._step, self._steps)
        while self._step < self._steps:
            loss = self.signals.outlive(partial(step, self._step))
            changed = loss, self.model.state, self._optimizer.state
            self.signals.outlive(partial(mx.eval, *changed))
            self._losses.append(loss)
            self._step += 1
            self._seconds = before + time.perf_counter() - started
            last = self._step == self._steps
            if not bool(mx.isfinite(loss)):
                raise UserError(self._describe_divergence("the loss"))
            if last or is_due(self._step, pace.log_every):
                self._log_losses(report)
            if not last and is_due(self._step, pace.eval_every):
                evaluate = partial(self._evaluate, pace.eval_tokens)
                self._log(self.signals.outlive(evaluate), report)
            self._log(self.signals.outlive(self._observe), report)
            self.progress(self._step, self._steps)
            if (self.signals.came or self._unheard) and not last:
                self._save()
                said = f"interrupted at step {self._step}: --resume goes on from there"
                if gone := self._unheard:
                    raise OSError(gone.errno, f"{gone.strerror or gone}: {said}")
                raise UserError(said)
            if not last and is_due(self._step, pace.save_every):
                self._save()
            if self._logged_step == self._step:
                self._logged_at = time.perf_counter()
        if self._losses:  # of a run that ends where it was interrupted
            self._log_losses(report)
        final = self.signals.outlive(partial(self._evaluate, None))
        if not self._has_logged("validation_loss"):
            self._log(final, report)
        self._save()
        return final

    def _log(self, event: Event, report: Callable[[Event], None]) -> None:
        if not math.isfinite(event.get("validation_loss", 0)):
            raise UserError(self._describe_divergence("the loss of the held-out text"))
        if event:
            event = {"step": self._step, "tokens": self._step * self._step_tokens, **event}
            self._folder.append_event(event)
            self._tell(event, report)

    def _tell(self, event: Event, report: Callable[[Event], None]) -> None:
        """Report an event; where nobody hears it, as on a closed terminal, the run saves first."""
        try:
            report(event)
        except OSError as error:
            self._unheard = error

    def _log_losses(self, report: Callable[[Event], None]) -> None:
        """Log the steps since the last line; their speed leaves evaluating and saving out."""
        self._loss = mx.stack(self._losses).mean().item()  # type: ignore[assignment]
        event: Event = {
            "loss": self._loss,
            "learning_rate": self._schedule(mx.array(self._step - 1)).item(),
        }
        if tokens := (self._step - self._logged_step) * self._step_tokens:
            event["tokens_per_second"] = tokens / (time.perf_counter() - self._logged_at)
        event["memory_bytes"] = peak_memory_bytes()
        self._log(event, report)
        self._losses, self._logged_step = [], self._step

    def _sizes(self) -> Event:
        return {
            "parameters": self.parameters,
            "train_tokens": len(self._text.train),
            "validation_tokens": len(self._text.held_out),
        }

    def _figures(self) -> dict[str, Any]:
        """The fields of ``RunResult``."""
        tokens = self._step * self._step_tokens
        return {
            "output": str(self._folder.path),
            "step": self._step,
            "tokens": tokens,
            "seconds": self._seconds,
            "tokens_per_second": tokens / self._seconds if self._seconds else 0.0,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def carry_out(
    folder: RunFolder,
    resume: bool,
    make_run: Callable[[], ResumableRun[Result]],
    report: Callable[[Event], None],
    progress: Steps,
) -> Result:
    """Begin a run in a new folder or resume one, and train to the end or to a signal."""
    with folder.hold(resume):
        run = make_run()
        run.progress = progress
        if not resume:
            run.begin()
        else:
            if is_there(folder.state):
                run.load()
            else:  # killed before its first checkpoint
                folder.cut_log(-1)
            folder.write_settings(run.settings)  # which --resume may have changed
        with hear_signals() as run.signals:
            return run.go(report)


def _check_memory(needed: int, what: str) -> None:
    """Raise a UserError where training needs more memory than there is."""
    there = device_memory_bytes()
    if needed > there:
        raise UserError(
            f"{what} take {format_bytes(needed)} or more, and there are {format_bytes(there)}: "
            "train something smaller"
        )


def is_due(step: int, every: int) -> bool:
    """Whether it is time at a step for what is done ``every`` so many steps; 0: never."""
    return every > 0 and step % every == 0
