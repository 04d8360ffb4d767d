"""The loop of a run that can stop and go on bit for bit: steps, evaluations, log, signals.

A subclass says what is trained and on which loss.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..errors import UserError
from ..memory import peak_memory_bytes
from ..text.corpus import Batches
from .folder import Event, RunFolder
from .optimizer import Schedule
from .pace import Pace
from .recipe import Recipe
from .state import RunState
from .tokens import Tokens
from .treatment import Treatment


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended.

    Attributes:
        output: the run's folder.
        step: the last one.
        tokens: how many were seen, repeated ones each time.
        seconds: of training, earlier sessions of a resumed run included.
        tokens_per_second: over these seconds.
        peak_memory_bytes: the most that the process held.
    """

    output: str
    step: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON can hold it."""
        return asdict(self)


Result = TypeVar("Result", bound=RunResult)


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
        self._batches = Batches(text.train, plan.context, plan.batch_size, plan.seed)
        self._logged_step, self._logged_at = 0, 0.0

    # What a subclass says.

    def begin(self) -> None:
        """Write what never changes during a run."""
        raise NotImplementedError

    def go(self, report: Callable[[Event], None], stopped: Callable[[], bool]) -> Result:
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

    def run(self, report: Callable[[Event], None], stopped: Callable[[], bool]) -> Event:
        """Train to the end and save; returns the last evaluation."""
        pace, step = self._pace, self._compile_step()
        started, begun_at, before = time.perf_counter(), self._step, self._seconds
        self._logged_at, self._logged_step = started, self._step
        report({"step": self._step, "steps": self._steps, **self._sizes()})
        while self._step < self._steps:
            loss = step(self._step)
            mx.eval(loss, self.model.state, self._optimizer.state)
            self._losses.append(loss)
            self._step += 1
            self._seconds = before + time.perf_counter() - started
            last = self._step == self._steps
            if not bool(mx.isfinite(loss)):
                raise UserError(self._describe_divergence("the loss"))
            if last or is_due(self._step, pace.log_every):
                self._log_losses(report)
            if not last and is_due(self._step, pace.eval_every):
                self._log(self._evaluate(pace.eval_tokens), report)
            self._log(self._observe(), report)
            if stopped() and not last:
                self._save()
                raise UserError(f"interrupted at step {self._step}: --resume goes on from there")
            if not last and is_due(self._step, pace.save_every):
                self._save()
            if self._logged_step == self._step:
                self._logged_at = time.perf_counter()
        final = self._evaluate(None)
        if self._step > begun_at:
            self._log(final, report)
        self._save()
        return final

    def _log_losses(self, report: Callable[[Event], None]) -> None:
        """Log the steps since the last line; their speed leaves evaluating and saving out."""
        self._loss = mx.stack(self._losses).mean().item()  # type: ignore[assignment]
        tokens = (self._step - self._logged_step) * self._step_tokens
        event = {
            "tokens": self._step * self._step_tokens,
            "loss": self._loss,
            "learning_rate": self._schedule(mx.array(self._step - 1)).item(),
            "tokens_per_second": tokens / (time.perf_counter() - self._logged_at),
            "memory_bytes": peak_memory_bytes(),
        }
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
) -> Result:
    """Begin a run in a new folder or resume one, and train to the end or to a signal."""
    with folder.hold(resume):
        run = make_run()
        if resume:
            run.load()
        else:
            run.begin()
        with catch_signals() as stopped:
            return run.go(report, stopped)


def is_due(step: int, every: int) -> bool:
    """Whether it is time at a step for what is done ``every`` so many steps; 0: never."""
    return every > 0 and step % every == 0


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Note SIGINT and SIGTERM instead of ending; the function yielded tells whether one came.

    The loop then finishes its step and saves. A second signal ends at once.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(signum: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(signum)

    before = {which: signal.signal(which, note) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
