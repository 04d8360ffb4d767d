"""The loop of a run that can stop and go on bit for bit: steps, log, checkpoints, signals.

A run is a folder. ``training/`` in it holds what ``resume`` and the curve need. Every file is
replaced whole or not at all. What is trained, on what and towards what, a subclass says.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints.files import read_json, replace_file
from ..errors import UserError, first_line
from ..evaluation.plots import plot_losses
from ..memory import peak_memory_bytes
from ..options import flag_name, option

TRAINING = "training"
RUN, STATE, LOG, CURVE = "run.json", "state.safetensors", "log.jsonl", "loss.png"
Event = dict[str, Any]


@dataclass(frozen=True)
class Pace:
    """How often, in steps, a run logs, evaluates and saves; 0: never."""

    log_every: int = option(20, "steps from one line of the log to the next")
    eval_every: int = option(200, "steps from one evaluation to the next")
    save_every: int = option(200, "steps from one checkpoint to the next")
    eval_tokens: int = option(65536, "held-out tokens of an evaluation; the last takes all")

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            if getattr(self, one.name) < 0:
                raise UserError(f"{flag_name(one.name)}: must be at least 0")


class ResumableRun:
    """A network, its optimizer and its folder.

    Args:
        out: the folder.
        model: whose trainable parameters are trained.
        optimizer: with state for them.
        steps: in all.
        step_tokens: tokens that a step sees.
        pace: how often to do what.
    """

    def __init__(
        self,
        out: Path,
        model: nn.Module,
        optimizer: optim.Optimizer,
        steps: int,
        step_tokens: int,
        pace: Pace,
    ):
        self._out, self.model, self._optimizer = out, model, optimizer
        self._steps, self._step_tokens, self._pace = steps, step_tokens, pace
        self._optimizer.init(self.model.trainable_parameters())
        self._step, self._loss, self._seconds = 0, math.nan, 0.0
        self._losses: list[mx.array] = []  # of the steps since the last line of the log
        self._saved: int | None = None
        mx.eval(self.model.state, self._optimizer.state)

    # What a subclass says.

    def _compiled_step(self) -> Callable[[int], mx.array]:
        """A function that takes the step of a number, from 0, and gives its loss."""
        raise NotImplementedError

    def _rate(self, step: int) -> float:
        """The learning rate of a step."""
        raise NotImplementedError

    def _opening(self) -> Event:
        """What there is to say before the first step."""
        raise NotImplementedError

    def _evaluation(self, limit: int | None) -> Event:
        """How good the network is, on held-out text of ``limit`` tokens; empty if there is none."""
        raise NotImplementedError

    def _extra(self) -> Event:
        """More for the log behind this step, if it is time."""
        return {}

    def _write_model(self) -> None:
        """Write what others read of a checkpoint."""

    # The folder.

    def load(self) -> None:
        """Take up the last checkpoint."""
        file = self._out / TRAINING / STATE
        try:
            loaded: Any = mx.load(str(file), return_metadata=True)
            arrays, metadata = loaded
            self._step, self._seconds = int(metadata["step"]), float(metadata["seconds"])
            self._losses = [mx.array(loss) for loss in json.loads(metadata["losses"])]
            own = self._state()
            if {k: a.shape for k, a in arrays.items()} != {k: a.shape for k, a in own.items()}:
                raise ValueError("it holds another network's state")
            both: Any = tree_unflatten(list(arrays.items()))
            self.model.update(both["weights"])
            self._optimizer.state = both["optimizer"]
        except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{file} cannot be resumed from ({first_line(error)}): start the run again"
            ) from error
        mx.eval(self.model.state, self._optimizer.state)
        self._saved = self._step
        if self._step > self._steps:
            raise UserError(
                f"{self._out} is at step {self._step} already: --steps must be more than that"
            )
        kept = [event for event in read_log(self._out) if event["step"] <= self._step]
        self._loss = next((e["loss"] for e in reversed(kept) if "loss" in e), self._loss)
        replace_file(
            self._out / TRAINING / LOG,
            lambda file: file.write_text("".join(json.dumps(e) + "\n" for e in kept)),
        )

    def _state(self) -> dict[str, mx.array]:
        both = {"weights": self.model.trainable_parameters(), "optimizer": self._optimizer.state}
        return dict(tree_flatten(both))  # type: ignore[arg-type]

    def _save(self) -> None:
        state = self._state()
        metadata = {"step": str(self._step), "seconds": repr(self._seconds)}
        metadata["losses"] = json.dumps([loss.item() for loss in self._losses])
        self._check_weights()
        try:
            replace_file(
                self._out / TRAINING / STATE,
                lambda file: mx.save_safetensors(str(file), state, metadata),
            )
            self._write_model()
            replace_file(
                self._out / TRAINING / CURVE,
                lambda file: plot_losses({self._out.name: read_log(self._out)}, file),
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"saving step {self._step} to {self._out} failed ({first_line(error)}): is the "
                f"disk full? {self._kept()}"
            ) from error
        self._saved = self._step

    def _check_weights(self) -> None:
        weights: Any = tree_flatten(self.model.trainable_parameters())
        for name, array in weights:
            if not bool(mx.isfinite(array).all()):
                raise UserError(self._diverged(name))

    def _log(self, event: Event, report: Callable[[Event], None]) -> None:
        with (self._out / TRAINING / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(event) + "\n")
        report(event)

    # The loop.

    def run(self, report: Callable[[Event], None], stopped: Callable[[], bool]) -> Event:
        """Train to the end and save; returns the last evaluation."""
        pace, step = self._pace, self._compiled_step()
        started, begun_at = time.perf_counter(), self._step
        before = self._seconds
        logged_at, logged_step = started, self._step
        report({"step": self._step, "steps": self._steps, **self._opening()})
        while self._step < self._steps:
            loss = step(self._step)
            mx.eval(loss, self.model.state, self._optimizer.state)
            self._losses.append(loss)
            self._step += 1
            self._seconds = before + time.perf_counter() - started
            last = self._step == self._steps
            if not bool(mx.isfinite(loss)):
                raise UserError(self._diverged())
            if last or is_due(self._step, pace.log_every):
                self._loss = mx.stack(self._losses).mean().item()  # type: ignore[assignment]
                now = time.perf_counter()
                event = {
                    "step": self._step,
                    "tokens": self._step * self._step_tokens,
                    "loss": self._loss,
                    "learning_rate": self._rate(self._step - 1),
                    "tokens_per_second": (self._step - logged_step)
                    * self._step_tokens
                    / (now - logged_at),
                    "memory_bytes": peak_memory_bytes(),
                }
                self._log(event, report)
                self._losses, logged_step = [], self._step
            if not last and is_due(self._step, pace.eval_every):
                self._note(self._evaluation(pace.eval_tokens), report)
            self._note(self._extra(), report)
            if stopped() and not last:
                self._save()
                raise UserError(f"interrupted at step {self._step}: --resume goes on from there")
            if not last and is_due(self._step, pace.save_every):
                self._save()
            if logged_step == self._step:
                logged_at = time.perf_counter()
        final = self._evaluation(None)
        if self._step > begun_at:
            self._note(final, report)
        self._save()
        return final

    def _note(self, event: Event, report: Callable[[Event], None]) -> None:
        if event:
            self._log({"step": self._step, **event}, report)

    def _diverged(self, where: str = "the loss") -> str:
        return (
            f"{where} is no number any more at step {self._step}: {self._kept()}; lower "
            "--learning-rate, or give it a longer --warmup"
        )

    def _kept(self) -> str:
        if self._saved is None:
            return "nothing was saved yet"
        return f"the checkpoint of step {self._saved} is kept"


def read_log(run: Path) -> list[Event]:
    """The events of a run's folder, in order.

    Raises:
        UserError: if it has no log.
    """
    file = run / TRAINING / LOG
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]
    except FileNotFoundError:
        if (run / TRAINING).is_dir():
            return []
        raise UserError(f"{run} is no training run: it has no {TRAINING}/{LOG}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)})") from error


def read_run(out: Path) -> Event:
    """What a run that can be resumed wrote when it began.

    Raises:
        UserError: if there is none.
    """
    if not (out / TRAINING / STATE).is_file():
        raise UserError(f"{out} has no {TRAINING}/{STATE}: there is nothing to resume")
    return read_json(out / TRAINING / RUN)


@contextlib.contextmanager
def check_version(out: Path) -> Iterator[None]:
    """What cannot be understood of ``read_run`` becomes a UserError."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{out / TRAINING / RUN} is not of this version ({first_line(error)}): start the run "
            "again"
        ) from error


def check_room(out: Path, needed: int) -> None:
    """Raises UserError if the disk of a run's folder lacks so many bytes."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out.absolute().parent} has {free / 1e9:.2f} GB free, the run takes up to "
            f"{needed / 1e9:.2f} GB: make room or give another --mlx-path"
        )


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def hold_folder(out: Path, resume: bool) -> Iterator[None]:
    """A new run's folder, which goes again if the run fails before its first checkpoint."""
    if not resume:
        out.mkdir()
    try:
        yield
    except BaseException:
        if not (out / TRAINING / STATE).exists():
            shutil.rmtree(out, ignore_errors=True)
        raise


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came: the step is finished and saved; a second one ends at once."""
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
