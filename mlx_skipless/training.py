"""Training a skipless model: the loop, its checkpoints and what it reports.

A run is a folder. At its top is a source checkpoint (``docs/checkpoint.md``) that ``convert``
takes; ``training/`` beside it holds what ``resume`` and the curve need. Every file is replaced
whole or not at all.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import transformers
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import card, corpus, evaluation, generation, hub
from .checkpoint import read_json
from .conversion import peak_memory_bytes
from .corpus import Batches
from .curve import plot
from .errors import UserError, first_line
from .layout import tensors_of
from .loading import tokenizer_options
from .model import Model
from .recipe import Recipe, from_options
from .writer import check_free

TRAINING = "training"
RUN, STATE, LOG, CURVE = "run.json", "state.safetensors", "log.jsonl", "loss.png"
SAMPLE_TOKENS = 64
Event = dict[str, Any]


@dataclass(frozen=True)
class Sources:
    """Where a run's text comes from, as ``run.json`` keeps it."""

    data: list[str]
    validation: list[str]
    validation_share: float
    tokenizer: str | None


@dataclass(frozen=True)
class Text:
    """The text as token ids, int32 rows; ``held_out`` may be empty."""

    tokenizer: Any
    train: np.ndarray
    held_out: np.ndarray

    def fingerprint(self) -> str:
        """A digest, to tell whether a resumed run sees the same text."""
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.held_out.tobytes())
        return digest.hexdigest()[:32]


def _every(default: int, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Pace:
    """How often, in steps, a run logs, evaluates, saves and writes a sample; 0: never."""

    log_every: int = _every(20, "steps from one line of the log to the next")
    eval_every: int = _every(200, "steps from one evaluation to the next")
    save_every: int = _every(200, "steps from one checkpoint to the next")
    sample_every: int = _every(500, "steps from one sample to the next")
    eval_tokens: int = _every(65536, "held-out tokens of an evaluation; the last takes all")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            if getattr(self, option.name) < 0:
                raise UserError(f"--{option.name.replace('_', '-')}: must be at least 0")


@dataclass(frozen=True)
class Result:
    """How a run ended; ``bits_per_character`` and ``validation_loss`` (nats per token) are of all
    the held-out text, None if there is none."""

    output: str
    step: int
    tokens: int
    parameters: int
    loss: float
    validation_loss: float | None
    bits_per_character: float | None
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    data: Sequence[str | Path] | None,
    mlx_path: str | Path = "trained_model",
    recipe: Recipe | None = None,
    *,
    validation: Sequence[str | Path] = (),
    validation_share: float = 0.03,
    tokenizer: str | Path | None = None,
    pace: Pace | None = None,
    dtype: str = "auto",
    resume: bool = False,
    steps: int | None = None,
    report: Callable[[Event], None] = lambda event: None,
) -> Result:
    """Train a model, or go on with a run bit for bit as if it had never stopped.

    Args:
        data: text files, plain or .jsonl; None with ``resume``: where they were.
        mlx_path: the run's folder; must not exist, or with ``resume`` must.
        recipe: what to train and how; with ``resume`` the run's own holds.
        validation: held-out files; without any, the last ``validation_share`` of each file's lines.
        validation_share: between 0 and 1.
        tokenizer: a folder or Hub id whose tokenizer to use; None: a byte-level BPE made from the
            text.
        pace: how often to log, evaluate and save; with ``resume`` the run's own holds.
        dtype: of the arithmetic, "float32", "bfloat16" or "auto" (bfloat16 on a GPU, float32 on a
            CPU); weights and optimizer are float32 throughout; with ``resume`` the run's own holds.
        resume: go on from the last checkpoint.
        steps: with ``resume``, another number of steps in all (the decay moves with it).
        report: called with each event, as ``training/log.jsonl`` has it.

    Raises:
        UserError: for anything the user can mend, a loss that is no number, and an interruption;
            the last good checkpoint is kept.
    """
    out = Path(mlx_path)
    sources = Sources([], [], validation_share, None if tokenizer is None else str(tokenizer))
    dtype, digest = _compute_type(dtype), None
    if resume:
        recipe, pace, sources, dtype, digest = _read_run(out)
        recipe = recipe if steps is None else dataclasses.replace(recipe, steps=steps)
    elif not data:
        raise UserError("--data is missing: name text files to train on")
    else:
        check_free(out)
    if data:
        train_files, held_out = (
            [str(Path(file).absolute()) for file in part] for part in (data, validation)
        )
        sources = dataclasses.replace(sources, data=train_files, validation=held_out)
    text = _read_text(sources, recipe or Recipe(), out if resume else None)
    recipe = dataclasses.replace(recipe or Recipe(), vocab_size=len(text.tokenizer))
    if len(text.held_out):
        evaluation.check_length(text.held_out, recipe.context)
    if digest not in (None, text.fingerprint()):
        raise UserError(
            f"{out} was trained on other text than these files hold now: give the same --data"
        )
    with _made(out, resume):
        run = Run(out, recipe, pace or Pace(), sources, text, dtype)
        if resume:
            run.load()
        else:
            run.begin()
        with _signals() as stopped:
            return run.go(report, stopped)


class Run:
    """A network, its optimizer and its folder."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        pace: Pace,
        sources: Sources,
        text: Text,
        dtype: str,
    ):
        self._out, self._recipe, self._pace, self._sources = out, recipe, pace, sources
        self._text, self._dtype = text, dtype
        self._batches = Batches(text.train, recipe.context, recipe.batch_size, recipe.seed)
        self.model = Model(recipe.model_args())
        self.parameters = sum(w.size for w in tensors_of(self.model).values())
        recipe.initialise(self.model)
        self._optimizer = recipe.optimizer()
        self._optimizer.init(self.model.trainable_parameters())
        self._step, self._loss, self._seconds = 0, math.nan, 0.0
        self._losses: list[mx.array] = []  # of the steps since the last line of the log
        self._saved: int | None = None
        mx.eval(self.model.state, self._optimizer.state)

    # The folder.

    def begin(self) -> None:
        """Write what never changes during a run."""
        # Weights twice, Muon's or Adam's moments, and all of it once more while it is replaced.
        needed, free = 32 * self.parameters, shutil.disk_usage(self._out).free
        if needed > free:
            raise UserError(
                f"{self._out.absolute().parent} has {free / 1e9:.2f} GB free, the run takes up to "
                f"{needed / 1e9:.2f} GB: make room or give another --mlx-path"
            )
        (self._out / TRAINING).mkdir()
        self._text.tokenizer.save_pretrained(str(self._out))
        run = {
            "recipe": asdict(self._recipe),
            "pace": asdict(self._pace),
            "text": asdict(self._sources),
            "dtype": self._dtype,
            "fingerprint": self._text.fingerprint(),
        }
        _write_json(self._out / TRAINING / RUN, run)
        config = {k: v for k, v in asdict(self.model.args).items() if v is not None}
        config |= {"eos_token_id": self._text.tokenizer.eos_token_id, "torch_dtype": "float32"}
        config |= {"architectures": ["SkiplessForCausalLM"]}
        _write_json(self._out / "config.json", dict(sorted(config.items())))

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
        if self._step > self._recipe.steps:
            raise UserError(
                f"{self._out} is at step {self._step} already: --steps must be more than that"
            )
        kept = [event for event in read_log(self._out) if event["step"] <= self._step]
        self._loss = next((e["loss"] for e in reversed(kept) if "loss" in e), self._loss)
        _replace(
            self._out / TRAINING / LOG,
            lambda file: file.write_text("".join(json.dumps(e) + "\n" for e in kept)),
        )

    def _state(self) -> dict[str, mx.array]:
        both = {"weights": self.model.parameters(), "optimizer": self._optimizer.state}
        return dict(tree_flatten(both))  # type: ignore[arg-type]

    def _save(self) -> None:
        weights, state = tensors_of(self.model), self._state()
        metadata = {"step": str(self._step), "seconds": repr(self._seconds)}
        metadata["losses"] = json.dumps([loss.item() for loss in self._losses])
        if not all(bool(mx.isfinite(w).all()) for w in weights.values()):
            raise UserError(self._diverged())
        try:
            _replace(
                self._out / TRAINING / STATE,
                lambda file: mx.save_safetensors(str(file), state, metadata),
            )
            _replace(
                self._out / "model.safetensors",
                lambda file: mx.save_safetensors(str(file), weights, {"format": "mlx"}),
            )
            _replace(
                self._out / TRAINING / CURVE,
                lambda file: plot({self._out.name: read_log(self._out)}, file),
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"saving step {self._step} to {self._out} failed ({first_line(error)}): is the "
                f"disk full? {self._kept()}"
            ) from error
        self._saved = self._step

    def _log(self, event: Event, report: Callable[[Event], None]) -> None:
        with (self._out / TRAINING / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(event) + "\n")
        report(event)

    # The loop.

    def go(self, report: Callable[[Event], None], stopped: Callable[[], bool]) -> Result:
        """Train to the end."""
        recipe, pace = self._recipe, self._pace
        step = self._compiled_step()
        started, begun_at = time.perf_counter(), self._step
        before = self._seconds
        logged_at, logged_step = started, self._step
        report(
            {
                "step": self._step,
                "parameters": self.parameters,
                "train_tokens": len(self._text.train),
                "validation_tokens": len(self._text.held_out),
                "steps": recipe.steps,
            }
        )
        while self._step < recipe.steps:
            loss = step(mx.array(self._batches.at(self._step)))
            mx.eval(loss, self.model.state, self._optimizer.state)
            self._losses.append(loss)
            self._step += 1
            self._seconds = before + time.perf_counter() - started
            last = self._step == recipe.steps
            if not bool(mx.isfinite(loss)):
                raise UserError(self._diverged())
            if last or _due(self._step, pace.log_every):
                self._loss = mx.stack(self._losses).mean().item()  # type: ignore[assignment]
                now = time.perf_counter()
                size = recipe.batch_size * recipe.context
                done = (self._step - logged_step) * size
                event = {
                    "step": self._step,
                    "tokens": self._step * size,
                    "loss": self._loss,
                    "learning_rate": recipe.rate(self._step - 1),
                    "tokens_per_second": done / (now - logged_at),
                    "memory_bytes": peak_memory_bytes(),
                }
                self._log(event, report)
                self._losses, logged_step = [], self._step
            if not last and _due(self._step, pace.eval_every) and len(self._text.held_out):
                self._log(self._evaluation(pace.eval_tokens), report)
            if last or _due(self._step, pace.sample_every):
                self._log({"step": self._step, "sample": self._sample()}, report)
            if stopped() and not last:
                self._save()
                raise UserError(f"interrupted at step {self._step}: --resume goes on from there")
            if not last and _due(self._step, pace.save_every):
                self._save()
            if logged_step == self._step:
                logged_at = time.perf_counter()
        final: Event = self._evaluation(None) if len(self._text.held_out) else {}
        if final and self._step > begun_at:
            self._log(final, report)
        self._save()
        size = recipe.batch_size * recipe.context
        result = Result(
            output=str(self._out),
            step=self._step,
            tokens=self._step * size,
            parameters=self.parameters,
            loss=self._loss,
            validation_loss=final.get("validation_loss"),
            bits_per_character=final.get("bits_per_character"),
            seconds=self._seconds,
            tokens_per_second=self._step * size / self._seconds if self._seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(),
        )
        text = card.trained(
            result, self.model.args, asdict(recipe), [Path(f).name for f in self._sources.data]
        )
        _replace(self._out / "README.md", lambda file: file.write_text(text, encoding="utf-8"))
        return result

    def _compiled_step(self) -> Callable[[mx.array], mx.array]:
        model, optimizer, recipe = self.model, self._optimizer, self._recipe
        state = [model.state, optimizer.state]

        def mean_loss(weights: dict[str, Any], batch: mx.array) -> mx.array:
            return self._nll(weights, batch) / (batch.shape[0] * (batch.shape[1] - 1))

        @partial(mx.compile, inputs=state, outputs=state)
        def step(batch: mx.array) -> mx.array:
            weights = model.trainable_parameters()
            loss, gradients = mx.value_and_grad(mean_loss)(weights, batch)
            gradients, _ = optim.clip_grad_norm(gradients, recipe.clip)
            model.update(weights)  # in float32 again
            before = optimizer.state["states"][0]["step"]
            optimizer.update(model, gradients)
            recipe.condition(model, before)
            return loss

        return step

    def _nll(self, weights: dict[str, Any], batch: mx.array) -> mx.array:
        """``evaluation.nll`` with these weights in the type of the arithmetic."""
        if self._dtype != "float32":
            dtype = getattr(mx, self._dtype)
            weights = tree_map(lambda w: w.astype(dtype), weights)
        self.model.update(weights)
        return evaluation.nll(self.model, batch)

    def _evaluation(self, limit: int | None) -> Event:
        """Loss of the held-out text, or of windows spread over it of ``limit`` tokens in all."""
        weights = self.model.parameters()
        score = evaluation.score(
            partial(self._nll, weights),
            self._text.held_out,
            self._text.tokenizer,
            self._recipe.context,
            self._recipe.batch_size,
            limit,
        )
        self.model.update(weights)
        return {
            "step": self._step,
            "validation_loss": score.loss,
            "bits_per_character": score.bits_per_character,
            "validation_tokens": score.tokens,
        }

    def _sample(self) -> str:
        source = self._text.held_out if len(self._text.held_out) else self._text.train
        prompt = source[:8].tolist()
        tokenizer = TokenizerWrapper(self._text.tokenizer)
        stream = generation.stream(
            self.model,
            tokenizer,
            prompt,
            max_tokens=SAMPLE_TOKENS,
            temp=0.8,
            seed=self._recipe.seed,
        )
        for _ in stream:
            pass
        return self._text.tokenizer.decode(prompt) + stream.text

    def _diverged(self) -> str:
        return (
            f"the loss is no number any more at step {self._step}: {self._kept()}; lower "
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


def _read_run(out: Path) -> tuple[Recipe, Pace, Sources, str, str]:
    """What ``Run.begin`` wrote: recipe, pace, text, type of the arithmetic, digest of the text."""
    if not (out / TRAINING / STATE).is_file():
        raise UserError(f"{out} has no {TRAINING}/{STATE}: there is nothing to resume")
    run = read_json(out / TRAINING / RUN)
    try:
        recipe, pace = from_options(run["recipe"]), Pace(**run["pace"])
        sources, dtype = Sources(**run["text"]), _compute_type(run["dtype"])
        return recipe, pace, sources, dtype, str(run["fingerprint"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{out / TRAINING / RUN} is not of this version ({first_line(error)}): start the run "
            "again"
        ) from error


def _read_text(sources: Sources, recipe: Recipe, run: Path | None) -> Text:
    files, validation = ([Path(f) for f in part] for part in (sources.data, sources.validation))
    texts = corpus.read_texts(files, validation, share=sources.validation_share)
    source = sources.tokenizer if run is None else str(run)
    if source is None:
        tokenizer = corpus.make_tokenizer(texts.train, recipe.vocab_size, chat=texts.chat)
    else:
        tokenizer = _read_tokenizer(source)
    return Text(
        tokenizer,
        corpus.encode(texts.train, tokenizer),
        corpus.encode(texts.validation, tokenizer),
    )


def _read_tokenizer(source: str) -> Any:
    folder = hub.resolve(source, config_only=True)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), **tokenizer_options(config, trust_remote_code=False)
        )
    except Exception as error:  # transformers and tokenizers raise whatever their parsers do
        raise UserError(
            f"the tokenizer of {source} cannot be read ({first_line(error)}): give a folder or "
            "Hub id with a Hugging Face tokenizer"
        ) from error


def _compute_type(dtype: str) -> str:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: choose auto, float32 or bfloat16")
    if dtype == "auto":
        return "bfloat16" if mx.default_device().type == mx.DeviceType.gpu else "float32"
    return dtype


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=4) + "\n"
    _replace(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` make a file and put it in place of ``file`` at once."""
    partial = file.with_name(f".partial-{file.name}")
    try:
        write(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _made(out: Path, resume: bool) -> Iterator[None]:
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
def _signals() -> Iterator[Callable[[], bool]]:
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
