"""The folder of a run: ``training/`` in it holds settings, state, log and loss curve.

Every file but the log is replaced whole or not at all. This module knows nothing of networks.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ..checkpoints.files import TOKENIZER_BYTES, is_there, read_json
from ..checkpoints.output import lock_folder, replace_file, write_json
from ..checkpoints.writer import check_free
from ..errors import BadArgument, UserError, first_line
from ..options import name_folder, read_options

TRAINING = "training"
COMMANDS = {"recipe": "train", "treatment": "heal"}  # by what their settings hold
RUN, STATE, LOG, CURVE = "run.json", "state.safetensors", "log.jsonl", "loss.png"
Event = dict[str, Any]
Settings = TypeVar("Settings")


class RunFolder:
    """The files of a run; ``path`` is its folder, and ``training`` and ``state`` lie in it."""

    def __init__(self, path: Path):
        self.path, self.training = path, path / TRAINING
        self.state = self.training / STATE

    @contextlib.contextmanager
    def hold(self, resume: bool) -> Iterator[None]:
        """Make a new run's folder, and remove it if the run fails before its first checkpoint.

        Raises:
            UserError: if another process has a run in it.
        """
        if not resume:
            try:
                self.path.mkdir()
            except FileExistsError:  # another run has made it since
                self.check_free()
                raise
        try:
            with lock_folder(self.path.resolve()) as ours:
                if ours is False:
                    raise UserError(f"another process trains in {self.path}: wait until it ends")
                yield
        except BaseException:
            if not resume and not self.state.exists():
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def check_free(self) -> None:
        """Check that a new run can have its folder.

        Raises:
            UserError: if it exists, with what to do if another run made it.
        """
        if os.path.lexists(self.training / RUN):
            raise UserError(
                f"{self.path} exists already and holds a run: --resume goes on with it, or give "
                "another --mlx-path"
            )
        check_free(self.path)

    def begin(self, needed: int) -> None:
        """Make the folder in a new run's folder.

        Raises:
            UserError: if the disk lacks the ``needed`` bytes.
        """
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise UserError(
                f"{self.path.absolute().parent} has {free / 1e9:.2f} GB free, the run takes up to "
                f"{needed / 1e9:.2f} GB: make room or give another --mlx-path"
            )
        self.training.mkdir()

    def write_settings(self, settings: Any) -> None:
        """Write a run's settings, a dataclass; without a checkpoint they say how to begin again.

        So they are the last of what a run writes before its first step.
        """
        write_json(self.training / RUN, asdict(settings))

    def read_settings(self, read: Callable[[Event], Settings]) -> Settings:
        """Read the settings of a run that can be resumed; ``read`` makes them from JSON.

        Raises:
            UserError: if there is no such run, or its settings are broken or another version's.
        """
        file = self.training / RUN
        if not self.path.is_dir():
            raise UserError(f"{self.path} is no folder: there is nothing to resume")
        if not is_there(file):
            raise UserError(
                f"{self.path} has no {TRAINING}/{RUN}: there is nothing to resume; if a run was "
                "killed as it began, remove the folder and start it again"
            )
        content = read_json(file)
        try:
            return read(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            theirs = [command for key, command in COMMANDS.items() if key in content]
            if theirs and isinstance(error, KeyError) and error.args[0] in COMMANDS:
                raise UserError(
                    f"{self.path} holds a run of `{theirs[0]}`: its own --resume goes on with it"
                ) from error
            raise UserError(
                f"{file} is not of this version ({type(error).__name__}: {first_line(error)}): "
                "start the run again"
            ) from error
        except UserError as error:
            about = "" if str(file) in str(error) else f"{file}: "
            raise UserError(f"{about}{error}") from error

    def append_event(self, event: Event) -> None:
        """Add a line to the log."""
        with (self.training / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(event) + "\n")

    def cut_log(self, step: int) -> list[Event]:
        """Drop from the log what came after a step; returns the rest."""
        kept = [event for event in read_log(self.path) if event["step"] <= step]
        text = "".join(json.dumps(event) + "\n" for event in kept)
        replace_file(self.training / LOG, lambda file: file.write_text(text))
        return kept

    def draw_curve(self) -> None:
        """Draw the losses of the log."""
        from ..evaluation.plots import plot_losses  # matplotlib takes long to import

        events = {name_folder(self.path): read_log(self.path)}
        replace_file(self.training / CURVE, lambda file: plot_losses(events, file))


def check_own(flag: str, given: Any, usual: Any, own: Any) -> None:
    """Check what is given of a resumed run: nothing, which is the ``usual``, or the run's own.

    Raises:
        BadArgument: for anything else, which would be ignored.
    """
    if given not in (usual, own):
        raise BadArgument(f"{flag} {given}: the run to resume has {own}; only --steps may change")


def check_no_steps(steps: int | None) -> None:
    """Check that a new run is given no number of steps beside its recipe's or treatment's."""
    if steps is not None:
        raise BadArgument("steps is for a run to resume: a new one's stand with what it trains")


def read_whole(kind: type[Settings], what: str, given: Any) -> Settings:
    """Make an options dataclass of what ``run.json`` keeps: every field, no default.

    Raises:
        KeyError, UserError: if one is missing, unknown or wrong.
    """
    options = read_options(kind, what, given)
    if missing := {one.name for one in fields(kind)} - {*given}:  # type: ignore[arg-type]
        raise KeyError(min(missing))
    return options


def read_log(run: Path) -> list[Event]:
    """Read the events of a run's folder, in order; a last line that is cut off is left out.

    Raises:
        UserError: if it has no log, or a line of it is no event.
    """
    file = run / TRAINING / LOG
    if not is_there(file, TOKENIZER_BYTES):
        if (run / TRAINING).is_dir():
            return []
        raise UserError(f"{run} is no training run: it has no {TRAINING}/{LOG}")
    try:
        text = file.read_text(encoding="utf-8")
        *lines, last = text.rstrip("\n").split("\n")
        lines += [last] if text.endswith("\n") or _is_json(last) else []
        events = [_check_event(json.loads(line)) for line in lines]
        return [event for event in events if math.isfinite(event.get("validation_loss", 0))]
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{file} cannot be read ({first_line(error)}): put the whole log back, or start the "
            "run again"
        ) from error


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _check_event(event: Any) -> Event:
    """Return an event of a log, which anyone may have written, if its numbers are numbers."""
    if not isinstance(event, dict) or type(event.get("step")) is not int:
        raise TypeError("a line has no step")
    distances = [event.get(when, {}) for when in ("before", "after")]
    if not all(isinstance(one, dict) for one in distances):
        raise TypeError("a line has no distance")
    if any(one and "kl" not in one for one in distances):
        raise KeyError("kl")
    numbers = {key: event.get(key, 0) for key in ("step", "tokens", "loss", "validation_loss")}
    for key, value in [*numbers.items(), *(item for one in distances for item in one.items())]:
        finite = math.isfinite(value) or key == "validation_loss"  # older versions logged that
        if isinstance(value, bool) or not finite:
            raise ValueError(f"{key} of a line is no number")
    if event["step"] < 0 or numbers["tokens"] < 0:
        raise ValueError("a line has a step below 0")
    return event


def load_arrays(file: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Load a safetensors file of a run: its arrays and what it says of itself.

    Raises:
        UserError: if it is missing or broken.
    """
    try:
        if not is_there(file):
            raise FileNotFoundError("it is missing")
        with safe_open(str(file), "np"):  # which checks the header, as MLX does not
            loaded: Any = mx.load(str(file), return_metadata=True)
        mx.eval(loaded[0])
        return loaded
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be resumed from ({first_line(error)}): start the run again"
        ) from error
