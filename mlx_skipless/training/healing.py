"""Healing: a short distillation of a reduced model towards the one that it was made from.

The loss is KL(original || reduced) of the next token, on the user's text or on text that the
original speaks. mlx-lm's LoRA layers are trained and then fused, or all weights. The loop is ours:
mlx-lm's trainer does not keep the optimizer's state, and a run here goes on bit for bit.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..checkpoints import files, hub
from ..checkpoints.files import read_json
from ..checkpoints.writer import check_free
from ..errors import UserError, first_line
from ..evaluation import perplexity
from ..inference.loading import load
from ..memory import peak_memory_bytes
from ..network.metrics import measure_kl, measure_nll
from ..network.parts import tensors_of
from ..options import check_choices, flag_name, option, read_options
from ..text import corpus, samples
from ..text.corpus import Batches
from . import card, loop
from .loop import Event

TOKENS = "tokens.safetensors"
SPOKEN = 512  # tokens in a row that the original speaks
HELD_OUT = 8  # of that text, one part in so many measures
MEASURED_TOKENS = 8192  # of held-out text, before and after
LORA_SCALE = 2.0
LEARNING_RATES = {"lora": 1e-3, "full": 5e-5}


@dataclass(frozen=True)
class Treatment:
    """How to heal: what is trained and for how long."""

    fine_tune_type: str = option(
        "lora", "low-rank changes to the matrices, or all weights", ("lora", "full")
    )
    rank: int = option(16, "of the low-rank changes")
    steps: int = option(400, "optimizer steps")
    batch_size: int = option(4, "windows a step")
    context: int = option(256, "tokens of a window")
    learning_rate: float | None = option(
        None, "Adam's, at its highest; default: 1e-3 for lora, 5e-5 for full"
    )
    warmup: int = option(20, "steps of rising rate; then it falls to zero")
    clip: float = option(1.0, "largest norm of the whole gradient")
    sampled_tokens: int = option(65536, "text that the original speaks where no --data is given")
    seed: int = option(0, "of that text, its order and the low-rank changes")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("rank", "steps", "batch_size", "context", "sampled_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        for name, value in (("learning_rate", self.peak), ("clip", self.clip)):
            if not 0 < value < math.inf:
                raise UserError(f"{flag_name(name)} {value}: must be above 0")
        if self.warmup < 0 or self.seed < 0:
            raise UserError("--warmup and --seed must be at least 0")

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        rate = self.learning_rate
        return LEARNING_RATES[self.fine_tune_type] if rate is None else rate

    def schedule(self, step: mx.array) -> mx.array:
        """The learning rate at a step."""
        up = (step + 1) / max(1, self.warmup)
        down = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.peak * mx.clip(mx.minimum(up, down), 0.0, 1.0)


@dataclass(frozen=True)
class Pace(loop.Pace):
    """How often, in steps, a run logs, evaluates and saves; 0: never."""

    log_every: int = option(10, "steps from one line of the log to the next")
    eval_every: int = option(100, "steps from one evaluation to the next")
    save_every: int = option(100, "steps from one checkpoint to the next")
    eval_tokens: int = option(4096, "held-out tokens of an evaluation on the way")


@dataclass(frozen=True)
class Sources:
    """The two models and the text, as ``run.json`` keeps them."""

    model: str
    teacher: str
    data: list[str]
    validation: list[str]
    validation_share: float


@dataclass(frozen=True)
class Distance:
    """How far a network is from its teacher, on held-out text.

    Attributes:
        kl: mean KL(teacher || network), nats per token.
        loss, teacher_loss: nats per token.
        bits_per_character, teacher_bits_per_character: of the same text.
        tokens: how many were predicted.
    """

    kl: float
    loss: float
    teacher_loss: float
    bits_per_character: float
    teacher_bits_per_character: float
    tokens: int


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        output: the folder of the run and of the healed model.
        fine_tune_type: "lora" or "full".
        step: the last one.
        tokens: that were seen, repeated ones each time.
        trained_parameters: weights that were trained; of low-rank changes, theirs.
        text: names of the files that it learnt from, or "sampled".
        before: the distance from the original before the first step.
        after: that of what was written.
        seconds: of training, earlier sessions of a resumed run included.
        tokens_per_second: over these.
        peak_memory_bytes: the most that the process held.
    """

    output: str
    fine_tune_type: str
    step: int
    tokens: int
    trained_parameters: int
    text: str
    before: Distance
    after: Distance
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def heal(
    model: str | Path | None,
    teacher: str | Path | None,
    mlx_path: str | Path = "healed_model",
    treatment: Treatment | None = None,
    *,
    data: Sequence[str | Path] | None = None,
    validation: Sequence[str | Path] = (),
    validation_share: float = 0.03,
    pace: Pace | None = None,
    resume: bool = False,
    steps: int | None = None,
    trust_remote_code: bool = False,
    report: Callable[[Event], None] = lambda event: None,
) -> Result:
    """Distil a reduced model towards its original, or go on with such a run bit for bit.

    Args:
        model: the reduced model, a folder or Hub id; with ``resume`` the run's own holds.
        teacher: the original, likewise.
        mlx_path: folder of the run and of the healed model; must not exist, or with ``resume``
            must.
        treatment: what to train and how; with ``resume`` the run's own holds.
        data: text files, plain or .jsonl; None: text that the original speaks.
        validation: held-out files; without any, the last ``validation_share`` of each file's lines.
        validation_share: between 0 and 1.
        pace: how often to log, evaluate and save; with ``resume`` the run's own holds.
        resume: go on from the last checkpoint.
        steps: with ``resume``, another number of steps in all (the decay moves with it).
        trust_remote_code: for models of other architectures that bring code.
        report: called with each event, as ``training/log.jsonl`` has it.

    Raises:
        UserError: for anything the user can mend, a loss that is no number, and an interruption;
            the last good checkpoint is kept.
    """
    out = Path(mlx_path)
    if resume:
        treatment, pace, sources = _read_run(out)
        treatment = treatment if steps is None else dataclasses.replace(treatment, steps=steps)
    else:
        if model is None or teacher is None:
            raise UserError("give the reduced --model and its original, --teacher")
        check_free(out)
        texts, held = ([str(Path(f).absolute()) for f in part] for part in (data or (), validation))
        sources = Sources(_absolute(model), _absolute(teacher), texts, held, validation_share)
    treatment = treatment or Treatment()
    load_model = partial(load, trust_remote_code=trust_remote_code)
    files.check_links(hub.resolve(sources.model), code=True)  # mlx-lm copies what runs, too
    (student, tokenizer), (original, own) = load_model(sources.model), load_model(sources.teacher)
    _check_pair(student, tokenizer, original, own)
    with loop.hold_folder(out, resume):
        if resume:
            train, held_out = _read_tokens(out)
        else:
            train, held_out = make_tokens(sources, treatment, original, tokenizer)
        if len(held_out):
            perplexity.check_length(held_out, treatment.context)
        else:
            raise UserError("no text is held out: give --validation or a --validation-share")
        run = Run(
            out, treatment, pace or Pace(), sources, student, original, tokenizer, train, held_out
        )
        if resume:
            run.load()
        else:
            run.begin()
        with loop.catch_signals() as stopped:
            return run.go(report, stopped)


def _absolute(model: str | Path) -> str:
    return str(model) if hub.is_id(str(model)) else str(Path(model).expanduser().absolute())


class Run(loop.ResumableRun):
    """A reduced network that learns from its original."""

    def __init__(
        self,
        out: Path,
        treatment: Treatment,
        pace: Pace,
        sources: Sources,
        student: nn.Module,
        teacher: nn.Module,
        tokenizer: Any,
        train: np.ndarray,
        held_out: np.ndarray,
    ):
        self._treatment, self._sources, self._teacher = treatment, sources, teacher
        self._tokenizer, self._train, self._held_out = tokenizer, train, held_out
        self._batches = Batches(train, treatment.context, treatment.batch_size, treatment.seed)
        self._types = {name: array.dtype for name, array in tensors_of(student).items()}
        teacher.freeze()
        teacher.eval()
        _open(student, treatment)
        trained: Any = tree_flatten(student.trainable_parameters())
        self.parameters = sum(array.size for _, array in trained)
        optimizer = optim.Adam(treatment.schedule, betas=[0.9, 0.95], bias_correction=True)  # type: ignore[arg-type]
        step_tokens = treatment.batch_size * treatment.context
        super().__init__(out, student, optimizer, treatment.steps, step_tokens, pace)

    def begin(self) -> None:
        """Write what never changes during a run."""
        # What is trained and its two moments, twice while they are replaced, and the result.
        whole = sum(array.nbytes for array in tensors_of(self.model).values())
        loop.check_room(self._out, 24 * self.parameters + whole)
        folder = self._out / loop.TRAINING
        folder.mkdir()
        tokens = {"train": mx.array(self._train), "held_out": mx.array(self._held_out)}
        files.replace_file(folder / TOKENS, lambda file: mx.save_safetensors(str(file), tokens))
        run = {
            "treatment": asdict(self._treatment),
            "pace": asdict(self._pace),
            "sources": asdict(self._sources),
        }
        files.write_json(folder / loop.RUN, run)

    def go(self, report: Callable[[Event], None], stopped: Callable[[], bool]) -> Result:
        """Train to the end, fuse, measure and write."""
        if self._step == 0:
            self._note({"before": asdict(self._distance(self.model))}, report)
        begun = self._seconds
        self.run(report, stopped)
        log = loop.read_log(self._out)
        before = Distance(**next(event["before"] for event in log if "before" in event))
        self._close()
        after = self._distance(self.model)
        if self._seconds > begun:
            self._note({"after": asdict(after)}, report)
        tokens = self._step * self._step_tokens
        result = Result(
            output=str(self._out),
            fine_tune_type=self._treatment.fine_tune_type,
            step=self._step,
            tokens=tokens,
            trained_parameters=self.parameters,
            text=", ".join(Path(file).name for file in self._sources.data) or "sampled",
            before=before,
            after=after,
            seconds=self._seconds,
            tokens_per_second=tokens / self._seconds if self._seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(),
        )
        self._write(result)
        return result

    def _close(self) -> None:
        """Fuse what was trained into the matrices, in the types that they had."""
        fused = [(name, m.fuse()) for name, m in self.model.named_modules() if hasattr(m, "fuse")]
        self.model.update_modules(tree_unflatten(fused))
        types = self._types
        self.model.update(
            tree_map_with_path(lambda name, a: a.astype(types[name]), self.model.parameters())
        )
        mx.eval(self.model.parameters())

    def _write(self, result: Result) -> None:
        """Put the healed model beside the run's folder, its config last."""
        partial_folder = self._out / ".partial-model"
        shutil.rmtree(partial_folder, ignore_errors=True)
        source = hub.resolve(self._sources.model)
        config = read_json(source / "config.json")
        try:
            mlx_lm.utils.save(
                partial_folder, source, self.model, self._tokenizer, config, donate_model=False
            )
            text = card.write_healing_card(result, asdict(self._treatment), self._sources.teacher)
            (partial_folder / "README.md").write_text(text, encoding="utf-8")
            names = sorted(file.name for file in partial_folder.iterdir())
            for name in sorted(names, key=lambda name: name == "config.json"):
                os.replace(partial_folder / name, self._out / name)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"writing {self._out} failed ({first_line(error)}): is the disk full? "
                f"{self._kept()}, --resume writes it again"
            ) from error
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)

    # What the loop asks for.

    def _opening(self) -> Event:
        return {
            "parameters": self.parameters,
            "train_tokens": len(self._train),
            "validation_tokens": len(self._held_out),
        }

    def _rate(self, step: int) -> float:
        return float(self._treatment.schedule(mx.array(step)).item())  # type: ignore[arg-type]

    def _compiled_step(self) -> Callable[[int], mx.array]:
        model, teacher, optimizer = self.model, self._teacher, self._optimizer
        state = [model.state, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(inputs: mx.array, wanted: mx.array) -> mx.array:
            def mean_kl(network: nn.Module) -> mx.array:
                return measure_kl(wanted, network(inputs)).mean()

            loss, gradients = nn.value_and_grad(model, mean_kl)(model)
            gradients, _ = optim.clip_grad_norm(gradients, self._treatment.clip)
            optimizer.update(model, gradients)
            return loss

        def numbered(number: int) -> mx.array:
            inputs = mx.array(self._batches.at(number)[:, :-1])
            wanted = teacher(inputs)
            mx.eval(wanted)
            return step(inputs, wanted)

        return numbered

    def _evaluation(self, limit: int | None) -> Event:
        if limit is None:  # what is written is measured, when it is fused
            return {}
        found = self._distance(self.model, limit)
        return {"validation_loss": found.kl, "perplexity": math.exp(found.loss)}

    def _distance(self, network: nn.Module, limit: int = MEASURED_TOKENS) -> Distance:
        """On the held-out text, or windows spread over it of ``limit`` tokens in all."""
        kl = loss = teacher_loss = 0.0
        count = characters = 0
        size, context = self._treatment.batch_size, self._treatment.context
        for batch in corpus.cut_windows(self._held_out, context, size, limit):
            inputs, targets = mx.array(batch[:, :-1]), mx.array(batch[:, 1:])
            wanted, got = self._teacher(inputs), network(inputs)
            kl += _total(measure_kl(wanted, got))
            teacher_loss += _total(measure_nll(wanted, targets))
            loss += _total(measure_nll(got, targets))
            count += targets.size
            characters += sum(corpus.count_characters(self._tokenizer, row) for row in batch[:, 1:])
        bits = 1 / (math.log(2) * max(1, characters))
        return Distance(
            kl / count, loss / count, teacher_loss / count, loss * bits, teacher_loss * bits, count
        )


def _total(array: mx.array) -> float:
    return float(array.sum().item())  # type: ignore[arg-type]


def _open(student: nn.Module, treatment: Treatment) -> None:
    """Make trainable what is to be trained.

    Raises:
        UserError: for all weights of a quantized network.
    """
    student.train()
    if treatment.fine_tune_type == "full":
        if any(hasattr(module, "bits") for module in student.modules()):
            raise UserError(
                "--fine-tune-type full: packed weights cannot be trained; heal the model before it "
                "is quantized, or use lora"
            )
        student.set_dtype(mx.float32)  # steps smaller than a narrow type's rounding add up
        student.unfreeze()
        return
    student.freeze()
    mx.random.seed(treatment.seed)
    layers: Any = student.layers
    lora = {"rank": treatment.rank, "scale": LORA_SCALE, "dropout": 0.0}
    linear_to_lora_layers(student, len(layers), lora)


def _check_pair(student: nn.Module, tokenizer: Any, teacher: nn.Module, own: Any) -> None:
    probe = mx.array([[0, 1]])
    sizes = [network(probe).shape[-1] for network in (student, teacher)]
    if sizes[0] != sizes[1] or tokenizer.get_vocab() != own.get_vocab():
        raise UserError(
            f"--model and --teacher have other vocabularies ({sizes[0]:,} and {sizes[1]:,} "
            "entries): the teacher must be what the model was made from"
        )


def make_tokens(
    sources: Sources, treatment: Treatment, teacher: nn.Module, tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to train on and tokens to measure with, a row of int32 each.

    Of the user's files, or what the teacher says at temperature 1.
    """
    if sources.data:
        files, validation = ([Path(f) for f in part] for part in (sources.data, sources.validation))
        texts = corpus.read_texts(files, validation, share=sources.validation_share)
        encode = partial(corpus.encode, tokenizer=tokenizer._tokenizer)
        return encode(texts.train), encode(texts.validation)
    sequences = -(-treatment.sampled_tokens // SPOKEN)
    cache = make_prompt_cache(teacher)

    def next_logits(fresh: mx.array) -> mx.array:
        return teacher(fresh, cache=cache)[:, -1].astype(mx.float32)  # type: ignore[operator]

    tokens = samples.sample_tokens(
        next_logits,
        teacher(mx.array([[0]])).shape[-1],
        sequences,
        min(SPOKEN, treatment.sampled_tokens),
        seed=treatment.seed,
        start=tokenizer.bos_token_id,
    )
    rows = np.array(tokens, dtype=np.int32)
    cut = max(1, len(rows) // HELD_OUT)
    return rows[cut:].reshape(-1), rows[:cut].reshape(-1)


def _read_tokens(out: Path) -> tuple[np.ndarray, np.ndarray]:
    file = out / loop.TRAINING / TOKENS
    try:
        tokens: Any = mx.load(str(file))
        return np.array(tokens["train"]), np.array(tokens["held_out"])
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{file} cannot be read ({first_line(error)}): start the run again"
        ) from error


def _read_run(out: Path) -> tuple[Treatment, Pace, Sources]:
    run = loop.read_run(out)
    with loop.check_version(out):
        treatment = read_options(Treatment, "treatment", run["treatment"])
        return treatment, Pace(**run["pace"]), Sources(**run["sources"])
