"""Where a conversion has its result trained towards its source. How, only the trainer knows."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..checkpoints.output import sync_file, temporary_folder
from ..checkpoints.safetensors import INDEX
from ..errors import UserError
from ..progress import Progress
from ..text.corpus import Document
from .options import Options


@dataclass(frozen=True)
class Healing:
    """What training a result towards its source did.

    Attributes:
        steps: of training.
        tokens: that it saw, repeated ones each time.
        kl_before, kl_after: from the source on held-out text, nats per token.
        kept: whether the trained weights were taken, because they are closer.
        rounded: whether its matrices were rounded by then, and were rounded again.
    """

    steps: int
    tokens: int
    kl_before: float
    kl_after: float
    kept: bool
    rounded: bool = False


class Trainer(Protocol):
    """Trains a model in a folder towards another, and writes it to a third."""

    def __call__(
        self,
        model: Path,
        teacher: Path,
        out: Path,
        *,
        options: Options,
        text: Sequence[Document] | None,
        progress: Progress,
    ) -> Healing:
        """Train the model; ``text`` is the user's, None: the teacher's own."""
        ...


@dataclass(frozen=True)
class Ward:
    """Where a conversion's results are trained.

    Attributes:
        trainer: trains them.
        options: what the user asked for.
        teacher: the source's folder.
        text: the user's, None: there is none.
        folder: for what is written on the way; private, and gone in the end.
        progress: called with (stage, done, total).
    """

    trainer: Trainer
    options: Options
    teacher: Path
    text: Sequence[Document] | None
    folder: Path
    progress: Progress

    def make_room(self) -> Path:
        """Make an empty folder for one result."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def train(self, model: Path) -> tuple[Healing, Path]:
        """Train the model in a folder; return also the folder of the trained one."""
        out = self.make_room() / "healed"
        healing = self.trainer(
            model,
            self.teacher,
            out,
            options=self.options,
            text=self.text,
            progress=self.progress,
        )
        return healing, out

    def train_in_place(self, model: Path) -> Healing:
        """Train the model in a folder and put its new weights there, if they are closer."""
        healing, out = self.train(model)
        if healing.kept:
            for old in model.glob("*.safetensors"):
                old.unlink()
            (model / INDEX).unlink(missing_ok=True)
            for new in [*out.glob("*.safetensors"), *out.glob(INDEX)]:
                os.replace(new, model / new.name)
                sync_file(model / new.name)
        return healing


@contextmanager
def open_ward(
    options: Options,
    trainer: Trainer | None,
    teacher: Path,
    text: Sequence[Document] | None,
    progress: Progress,
) -> Iterator[Ward | None]:
    """Make room to train in, beside the result, for as long as the block lasts.

    It yields None if no training is asked for; the arguments are those of ``Ward``.

    Raises:
        UserError: if this source cannot teach.
    """
    if not options.heal:
        yield None
        return
    if trainer is None:
        raise UserError("--heal: call mlx_skipless.convert, which knows how to train")
    if not teacher.is_dir():
        raise UserError(
            f"--heal: {teacher} is no folder to load as a teacher: convert its Hugging Face model"
        )
    with temporary_folder(Path(options.mlx_path)) as folder:
        yield Ward(trainer, options, teacher, text, folder, progress)
