"""What a machine may do to a run, done to it: signals, kills, full disks, files that end early.

    python tools/faults.py [FAULT[=N] ...] [--tries N] [--json]

does each fault N times and prints a table of tries and losses. A loss is an OUT that is not whole,
a changed source, anything left behind, another exit code or more than one line of error. Every run
is forked from this process, which has imported all and computed nothing, so that a try costs a
fifth of a second; that is for Linux.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
from factory import make_checkpoint

from mlx_skipless.checkpoints import writer
from mlx_skipless.cli.main import main
from mlx_skipless.training import pretraining  # noqa: F401

SOURCE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "norm": "qkv"}
SHARD_BYTES = 1 << 16  # so that there are several, the largest of all files
TOUCHES_FILES = ("open", "os.", "shutil.", "tempfile.", "fcntl.", "glob.")
STEPS = 24
TRAIN = (
    "--hidden-size 16 --intermediate-size 32 --layers 2 --heads 2 --kv-heads 1 --vocab-size 270 "
    f"--context 16 --batch-size 4 --steps {STEPS} --warmup 2 --decay 1.0 --dtype float32 "
    "--log-every 2 --eval-every 4 --save-every 4 --sample-every 0 --eval-tokens 64"
).split()
INTERRUPTED = "error: interrupted\n"
WORDS = ("a", "cat", "sat", "on", "the", "mat", "and", "saw", "dogs")
Losses = list[str]


@dataclass
class Ended:
    """How a run ended: its exit code, or minus the signal that killed it, and its stderr."""

    code: int
    said: str


class Run:
    """A command in a process of its own, forked.

    Args:
        place: the folder to run in.
        command: as for ``mlx-skipless``.
        at: the number of the touch of a file, from 1, before which ``act`` is called; 0: never.
        act: what happens then, in the run's process.
        before: what is done in the run's process first.
    """

    def __init__(
        self,
        place: Path,
        *command: Any,
        at: int = 0,
        act: Callable[[], object] = lambda: None,
        before: Callable[[], object] = lambda: None,
    ):
        self._said, error = os.pipe()
        self._touched, count = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(error)
            os.close(count)
            return
        code = 70
        try:
            os.chdir(place)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0, 1)
            os.dup2(error, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            writer.SHARD_BYTES = SHARD_BYTES
            before()
            touched = _count_touches(at, act)
            code = main([*map(str, command)])
            os.write(count, str(touched()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def end(self, deadline: float = 120) -> Ended:
        """Wait for it."""
        end = time.monotonic() + deadline
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ended(124, f"still running after {deadline} s")
            time.sleep(0.002)
        with open(self._said, errors="replace") as said, open(self._touched) as touched:
            self.touches = int(touched.read() or 0)  # of files, if it ended by itself
            return Ended(os.waitstatus_to_exitcode(found[1]), said.read())


def _count_touches(at: int, act: Callable[[], object]) -> Callable[[], int]:
    touched = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if event.startswith(TOUCHES_FILES):
            touched += 1
            if touched == at:
                act()

    sys.addaudithook(hook)
    return lambda: touched


def contents(folder: Path) -> dict[str, str | None]:
    """What lies in a folder: digests of files, None for folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


class Lab:
    """A source, and what converting it gives when nothing happens; ``tries`` of each fault.

    ``trained`` is the outcome of a training run to which nothing happens, and its seconds.
    """

    trained: tuple[tuple[Any, ...], float] | None = None

    def __init__(self, folder: Path, tries: int = 1):
        self.folder, self.tries = folder, tries
        self.random = random.Random(0)
        self.source = folder / "source"
        _in_a_fork(lambda: make_checkpoint(self.source, **SOURCE))
        self.source_contents = contents(self.source)
        place = self.place()
        started = time.monotonic()
        undisturbed = Run(place, *self.command())
        assert undisturbed.end() == Ended(0, ""), undisturbed.end()
        self.seconds = time.monotonic() - started
        self.touches = undisturbed.touches
        self.whole = contents(place / "out")

    def command(self, out: str = "out") -> tuple[Any, ...]:
        return "convert", "--model", self.source, "--mlx-path", out, "--remove", "qp"

    def place(self) -> Path:
        """A new, empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def moments(self, last: int) -> Iterator[int]:
        """So many as there are tries, spread over 1 to ``last``, the first and it among them."""
        for i in range(self.tries):
            yield 1 + i * (last - 1) // max(1, self.tries - 1)

    def losses(self, place: Path, ended: Ended, codes: dict[int, str]) -> Losses:
        """What is wrong after a run that may have ended with these codes, and said so (or so)."""
        found = []
        left = sorted(os.listdir(place))
        killed = ended.code < 0
        if ended.code not in codes:
            found.append(f"exit code {ended.code}: {ended.said}")
        elif codes[ended.code] not in ended.said:
            found.append(f"said {ended.said!r}")
        if ended.code > 0 and (ended.said.count("\n") != 1 or not ended.said.startswith("error: ")):
            found.append(f"said {ended.said!r}")
        if "out" in left and contents(place / "out") != self.whole:
            found.append("OUT is not whole")
        if ended.code == 0 and "out" not in left:
            found.append("no OUT")
        if not killed and set(left) - {"out"}:
            found.append(f"left {left}")
        if contents(self.source) != self.source_contents:
            found.append("the source has changed")
        return found

    def losses_with_the_next(self, place: Path, ended: Ended, codes: dict[int, str]) -> Losses:
        """Likewise, and after the next run to the same place, which has nothing in its way."""
        found = self.losses(place, ended, codes)
        if (place / "out").exists():
            return found
        again = Run(place, *self.command()).end()
        found += [f"the next run: {loss}" for loss in self.losses(place, again, {0: ""})]
        if os.listdir(place) != ["out"]:
            found.append(f"the next run left {sorted(os.listdir(place))}")
        return found


def _in_a_fork(do: Callable[[], object]) -> None:
    """Compute without this process computing anything."""
    pid = os.fork()
    if not pid:
        try:
            do()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def signalled(lab: Lab, which: signal.Signals, codes: dict[int, str]) -> Losses:
    """Half of the tries at a touch of a file, half at any time."""
    found = []
    for i, at in enumerate(lab.moments(lab.touches)):
        place = lab.place()
        if i % 2:
            run = Run(place, *lab.command())
            time.sleep(lab.random.uniform(0.03, 1.1 * lab.seconds))
            os.kill(run.pid, which)
        else:
            run = Run(place, *lab.command(), at=at, act=lambda: os.kill(os.getpid(), which))
        found += lab.losses_with_the_next(place, run.end(), codes)
        shutil.rmtree(place)
    return found


def interrupted(lab: Lab) -> Losses:
    return signalled(lab, signal.SIGINT, {1: INTERRUPTED, 0: ""})


def terminated(lab: Lab) -> Losses:
    # Before the command line has begun to run there is nothing to undo.
    return signalled(lab, signal.SIGTERM, {1: INTERRUPTED, 0: "", -signal.SIGTERM: ""})


def killed(lab: Lab) -> Losses:
    return signalled(lab, signal.SIGKILL, {-signal.SIGKILL: "", 0: ""})


def file_too_large(lab: Lab) -> Losses:
    """The system refuses to let any file grow beyond a limit (RLIMIT_FSIZE)."""
    largest = max((lab.folder / name).stat().st_size for name in lab.folder.glob("*/out/*"))
    found = []
    for limit in lab.moments(largest - 1):
        place = lab.place()
        most = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        run = Run(place, *lab.command(), before=most)
        found += lab.losses(place, run.end(), {1: "is the disk full?"})
        shutil.rmtree(place)
    return found


@contextmanager
def small_disk(lab: Lab) -> Iterator[Path]:
    """A file system of its own, in memory."""
    place = lab.place()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "none", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def disk_full(lab: Lab) -> Losses:
    """Another program takes all that is left of a small file system while the run writes there."""
    found = []
    for at in lab.moments(lab.touches - 1):
        with small_disk(lab) as place:

            def fill(place: Path = place) -> None:
                with (place / "filler").open("wb") as filler:
                    size = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
                    os.posix_fallocate(filler.fileno(), 0, max(1, size))

            ended = Run(place, *lab.command(), at=at, act=fill).end()
            (place / "filler").unlink()
            found += lab.losses(place, ended, {1: "", 0: ""})
    return found


def cut_short(lab: Lab) -> Losses:
    """The source's weights end before their end, from some moment on."""
    found, good = [], lab.source
    for at in lab.moments(lab.touches - 1):
        place, source = lab.place(), lab.place() / "source"
        shutil.copytree(good, source)
        file = source / "model.safetensors"

        def cut(file: Path = file) -> None:
            os.truncate(file, lab.random.randrange(file.stat().st_size))

        command = ("convert", "--model", source, *lab.command()[3:])
        ended = Run(place, *command, at=at, act=cut).end()
        codes = {1: str(file)}
        if (place / "out").exists():  # all had been read by then
            codes = {0: ""}
        found += lab.losses(place, ended, codes)
        shutil.rmtree(place)
        shutil.rmtree(source.parent)
    return found


def at_once(lab: Lab) -> Losses:
    """Three runs to one place: one writes it, the others are refused."""
    found = []
    for _ in range(lab.tries):
        place = lab.place()
        runs = []
        for _ in range(3):
            runs.append(Run(place, *lab.command()))
            time.sleep(lab.random.uniform(0, lab.seconds / 2))
        ended = [run.end() for run in runs]
        if [one.code for one in ended].count(0) != 1:
            found.append(f"not one run succeeded: {ended}")
        for one in ended:
            found += lab.losses(place, one, {0: "", 1: "out"})
        shutil.rmtree(place)
    return found


def elsewhere(lab: Lab) -> Losses:
    """OUT on another file system, and the run killed half of the times."""
    found = []
    other = Path("/dev/shm")
    assert other.stat().st_dev != lab.folder.stat().st_dev, "no other file system here"
    for i, at in enumerate(lab.moments(lab.touches)):
        place = Path(tempfile.mkdtemp(dir=other))
        kill: Callable[[], object] = (
            (lambda: os.kill(os.getpid(), signal.SIGKILL)) if i % 2 else int
        )
        ended = Run(place, *lab.command(), at=at, act=kill).end()
        found += lab.losses_with_the_next(place, ended, {-signal.SIGKILL: "", 0: ""})
        shutil.rmtree(place)
    return found


def training_killed(lab: Lab) -> Losses:
    return train_through(lab, signal.SIGKILL)


def training_hung_up(lab: Lab) -> Losses:
    """Its terminal goes: no step that was done is lost."""
    return train_through(lab, signal.SIGHUP)


def train_through(lab: Lab, which: signal.Signals) -> Losses:
    """Train, with a signal at any time, over and over, and resume each time."""
    words = lab.folder / "words.txt"
    text = random.Random(1)
    words.write_text(
        "\n".join(" ".join(text.choices(WORDS, k=9))
                  for _ in range(300))
    )  # fmt: skip
    begin = ("train", "--data", words, "--mlx-path", "run", *TRAIN)
    resume = ("train", "--resume", "--mlx-path", "run", "--dtype", "float32")
    if lab.trained is None:
        undisturbed, started = lab.place(), time.monotonic()
        ended = Run(undisturbed, *begin).end()
        assert ended.code == 0, ended
        lab.trained = _outcome(undisturbed / "run"), time.monotonic() - started
    expected, seconds = lab.trained
    found = []
    for _ in range(lab.tries):
        place = lab.place()
        for _ in range(100):
            begun = place / "run" / "training" / "run.json"
            if not begun.exists():  # ended before its settings were written: begin again
                shutil.rmtree(place / "run", ignore_errors=True)
            run = Run(place, *(resume if begun.exists() else begin))
            time.sleep(lab.random.uniform(0.1, 0.8) * seconds)
            os.kill(run.pid, which)
            ended = run.end()
            if ended.code not in (-which, 1):
                break
            if ended.code == 1 and not _saved(place / "run", ended.said):
                found.append(f"lost what was done and said {ended.said!r}")
        if ended.code != 0:
            found.append(f"exit code {ended.code}: {ended.said}")
        elif _outcome(place / "run") != expected:
            found.append("another end")
        if left := [path.name for path in place.rglob("*partial*")]:
            found.append(f"left {left}")
        shutil.rmtree(place)
    return found


def _saved(run: Path, said: str) -> bool:
    """Whether a run that a signal ended kept the step that it says, or had done none."""
    if said == INTERRUPTED:
        return True  # outside its loop
    match = re.fullmatch(r"error: interrupted at step (\d+): --resume goes on from there\n", said)
    if match is None or not (run / "training" / "state.safetensors").exists():
        return False
    log = run / "training" / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []  # none before --log-every steps
    return all(json.loads(line)["step"] <= int(match[1]) for line in lines)


def _outcome(run: Path) -> tuple[Any, ...]:
    """Weights and losses of a training run, bit for bit."""
    lines = (run / "training" / "log.jsonl").read_text().splitlines()
    timed = ("tokens_per_second", "memory_bytes")
    events = [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(), events


FAULTS: dict[str, Callable[[Lab], Losses]] = {
    "SIGINT": interrupted,
    "SIGTERM": terminated,
    "SIGKILL": killed,
    "disk-full": disk_full,
    "file-too-large": file_too_large,
    "source-cut-short": cut_short,
    "three-at-once": at_once,
    "other-file-system": elsewhere,
    "training-killed": training_killed,
    "training-hung-up": training_hung_up,
}


def do(faults: dict[str, int]) -> dict[str, Losses]:
    """The losses of each fault, tried so often."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        for fault, tries in faults.items():
            lab.tries = tries
            found[fault] = FAULTS[fault](lab)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT[=N]", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--tries", type=int, default=20, help="of each (default: 20)")
    parser.add_argument("--json", action="store_true", help="print losses as JSON")
    given = parser.parse_args()
    asked = [fault.partition("=") for fault in given.faults or FAULTS]
    faults = {name: int(count or given.tries) for name, _, count in asked}
    outcome = do(faults)
    if given.json:
        print(json.dumps(outcome))
    else:
        print("| fault | tries | losses |\n|---|---:|---:|")
        for fault, lost in outcome.items():
            print(f"| {fault} | {faults[fault]} | {len(lost)} |")
        for fault, lost in outcome.items():
            for loss in lost:
                print(f"{fault}: {loss}", file=sys.stderr)
    sys.exit(any(outcome.values()))
