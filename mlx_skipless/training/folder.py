"""The folder of a run: ``training/`` in it holds settings, state, log and loss curve.

Every file but the log is replaced whole or not at all. This module knows nothing of networks.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoints.files import read_json
from ..checkpoints.output import replace_file, write_json
from ..errors import UserError, first_line

TRAINING = "training"
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
        """Make a new run's folder, and remove it if the run fails before its first checkpoint."""
        if not resume:
            self.path.mkdir()
        try:
            yield
        except BaseException:
            if not self.state.exists():
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def begin(self, settings: Any, needed: int) -> None:
        """Write a new run's settings, a dataclass.

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
        write_json(self.training / RUN, asdict(settings))

    def read_settings(self, read: Callable[[Event], Settings]) -> Settings:
        """Read the settings of a run that can be resumed; ``read`` makes them from JSON.

        Raises:
            UserError: if there is no such run, or another version began it.
        """
        if not self.state.is_file():
            raise UserError(f"{self.path} has no {TRAINING}/{STATE}: there is nothing to resume")
        file = self.training / RUN
        try:
            return read(read_json(file))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not of this version ({first_line(error)}): start the run again"
            ) from error

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

        events = {self.path.name: read_log(self.path)}
        replace_file(self.training / CURVE, lambda file: plot_losses(events, file))


def read_log(run: Path) -> list[Event]:
    """Read the events of a run's folder, in order; a last line that is cut off is left out.

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
