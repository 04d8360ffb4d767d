"""Healing: a short distillation of a reduced model towards the one that it was made from.

The loss is KL(original || reduced) of the next token, on the user's text or on text that the
original speaks. mlx-lm's LoRA layers are trained and then fused, or all weights. The loop is ours:
mlx-lm's trainer does not keep the optimizer's state, and a run here goes on bit for bit.
"""

import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_map_with_path, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from ..checkpoints import hub
from ..checkpoints.files import check_links, read_json, take_fingerprint
from ..checkpoints.output import hide_paths, replace_file
from ..errors import BadArgument, UserError, explain_nan, first_line
from ..evaluation import perplexity
from ..inference.context import check_windows, find_context
from ..inference.loading import load
from ..network.metrics import measure_kl, measure_nll
from ..network.parts import tensors_of
from ..network.widening import attend_in_float32, widen
from ..options import check_kinds, expand_path
from ..progress import Progress, Steps
from ..text import corpus, samples
from .card import write_healing_card
from .folder import Event, RunFolder, check_no_steps, check_own, load_arrays, read_log, read_whole
from .loop import ResumableRun, carry_out
from .optimizer import make_healing_schedule
from .recipe import Pace, Treatment, fix_rate
from .results import Distance, HealingResult
from .tokens import TextFiles, Tokens, encode_texts, list_paths, read_sources
from .trainable import PROBE, make_trainable

TOKENS = "tokens.safetensors"
SPOKEN = 512  # tokens in a row that the original speaks
HELD_OUT = 8  # of that text, one part in so many measures
MEASURED_TOKENS = 8192  # of held-out text, before and after


@dataclass(frozen=True)
class Sources(TextFiles):
    """The two models and the text, as ``run.json`` keeps them; no files: the original speaks.

    Attributes:
        model: the reduced one, a folder's absolute path or a Hub id.
        teacher: the original.
    """

    model: str
    teacher: str


@dataclass(frozen=True)
class Settings:
    """All that decides how a run goes, as ``run.json`` keeps it.

    ``fingerprint`` tells whether a resumed run has the same models; a run of an older version has
    none.
    """

    treatment: Treatment
    pace: Pace
    sources: Sources
    fingerprint: str = ""


def _read_settings(run: Mapping[str, Any]) -> Settings:
    return Settings(
        read_whole(Treatment, "treatment", run["treatment"]),
        read_whole(Pace, "pace", run["pace"]),
        read_sources(Sources, run["sources"]),
        str(run.get("fingerprint", "")),
    )


def heal(
    model: str | Path | None,
    teacher: str | Path | None,
    mlx_path: str | Path = "healed_model",
    treatment: Treatment | None = None,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    validation: str | Path | Sequence[str | Path] = (),
    validation_share: float | None = None,
    pace: Pace | None = None,
    resume: bool = False,
    steps: int | None = None,
    trust_remote_code: bool = False,
    report: Callable[[Event], None] = lambda event: None,
    progress: Progress = lambda stage, done, total: None,
    warn: Callable[[str], None] = lambda line: None,
) -> HealingResult:
    """Distil a reduced model towards its original, or go on with such a run bit for bit.

    Args:
        model: the reduced model, a folder or Hub id; None with ``resume``: where it was.
        teacher: the original, a folder or Hub id; None with ``resume``: where it was.
        mlx_path: folder of the run and of the healed model; must not exist, or with ``resume``
            must.
        treatment: what to train and how; with ``resume`` the run's own holds.
        data: text files, plain or .jsonl; None: text that the original speaks.
        validation: held-out files; without any, the last ``validation_share`` of each file's lines.
        validation_share: between 0 and 1; None: 0.03, and with ``resume`` the run's own.
        pace: how often to log, evaluate and save; with ``resume`` the run's own holds.
        resume: go on from the last checkpoint.
        steps: with ``resume``, another number of steps in all (the decay moves with it).
        trust_remote_code: for models of other architectures that bring code.
        report: called with each event, as ``training/log.jsonl`` has it.
        progress: called with a stage ("text" where the original speaks, then "steps"), how much of
            it is done and how much there is.
        warn: called with a line if the context is longer than what the models were made for.

    Raises:
        UserError: for anything the user can mend, a loss that is no number, and an interruption;
            the last good checkpoint is kept.
    """
    folder = RunFolder(expand_path(mlx_path))
    check_kinds(treatment=(treatment, Treatment), pace=(pace, Pace))
    texts = list_paths(data or ()), list_paths(validation)
    if resume:
        settings = _resume(folder, model, teacher, texts, validation_share, steps)
    else:
        folder.check_free()
        check_no_steps(steps)
        sources = _name_sources(model, teacher, *texts, validation_share)
        settings = Settings(fix_rate(treatment or Treatment()), pace or Pace(), sources)
    pair = load_pair(settings.sources, trust_remote_code)
    settings = _check_models(folder, settings)
    _check_context(pair, settings.treatment.context, warn)

    def make_run() -> Run:
        return _make_run(folder, settings, pair, resume, partial(progress, "text"))

    return carry_out(folder, resume, make_run, report, partial(progress, "steps"))


def _name_sources(
    model: str | Path | None,
    teacher: str | Path | None,
    data: list[str],
    validation: list[str],
    share: float | None,
) -> Sources:
    """Name what a new run reads, unless something is missing or would have no effect."""
    if model is None or teacher is None:
        raise BadArgument("give the reduced --model and its original, --teacher")
    if validation and not data:
        raise BadArgument("--validation is for --data: the original's own text is held out in part")
    share = corpus.choose_share(share, validation, data)
    return Sources(data, validation, share, _make_absolute(model), _make_absolute(teacher))


def _check_context(pair: "Pair", context: int, warn: Callable[[str], None]) -> None:
    """Warn of a context longer than what a model was made for, or refuse it without positions."""
    smaller = min(pair.student, pair.teacher, key=lambda one: find_context(one) or math.inf)
    beyond = check_windows(smaller, [context], "--context")
    if beyond is not None:
        warn(beyond)


def _resume(
    folder: RunFolder,
    model: str | Path | None,
    teacher: str | Path | None,
    texts: tuple[list[str], list[str]],
    share: float | None,
    steps: int | None,
) -> Settings:
    """Read the settings of a run to resume, which the arguments of ``heal`` must fit."""
    if any(texts):
        raise BadArgument(
            "--data and --validation: --resume goes on with the run's own text, whose tokens it "
            "has; only --steps may change"
        )
    settings = folder.read_settings(_read_settings)
    sources, treatment = settings.sources, settings.treatment
    check_own("--validation-share", share, None, sources.validation_share)
    if model is not None:
        sources = dataclasses.replace(sources, model=_make_absolute(model))
    if teacher is not None:
        sources = dataclasses.replace(sources, teacher=_make_absolute(teacher))
    if steps is not None:
        treatment = dataclasses.replace(treatment, steps=steps)
    return dataclasses.replace(settings, treatment=treatment, sources=sources)


def _check_models(folder: RunFolder, settings: Settings) -> Settings:
    """Return settings with the models' fingerprint, which a resumed run has already.

    Raises:
        UserError: if a resumed run's models are not what they were.
    """
    sources = settings.sources
    models = (hub.resolve(name) for name in (sources.model, sources.teacher))
    fingerprint = " ".join(map(take_fingerprint, models))
    if settings.fingerprint not in ("", fingerprint):
        before, now = settings.fingerprint.split(), fingerprint.split()
        both = ("model", sources.model), ("teacher", sources.teacher)
        flag, name = both[before[0] == now[0]]
        raise UserError(
            f"{folder.path} was begun with another --{flag} than {name} holds now: give the same "
            "one, or start the run again"
        )
    return dataclasses.replace(settings, fingerprint=fingerprint)


def _make_absolute(model: str | Path) -> str:
    return str(model) if hub.is_id(str(model)) else str(expand_path(model).absolute())


@dataclass(frozen=True)
class Pair:
    """A reduced model and its original, which have one vocabulary."""

    student: nn.Module
    teacher: nn.Module
    tokenizer: Any

    @property
    def context(self) -> int | None:
        """The fewest tokens in a row that either was made for; None where nothing says so."""
        return min(filter(None, map(find_context, (self.student, self.teacher))), default=None)


def load_pair(sources: Sources, trust_remote_code: bool) -> Pair:
    """Load the two models.

    Raises:
        UserError: if one cannot be loaded, or they have other vocabularies.
    """
    check_links(hub.resolve(sources.model), code=True)  # mlx-lm copies what runs, too
    student, tokenizer = load(sources.model, trust_remote_code=trust_remote_code)
    teacher, own = load(sources.teacher, trust_remote_code=trust_remote_code)
    probe = mx.array(PROBE)
    sizes = [network(probe).shape[-1] for network in (student, teacher)]  # type: ignore[operator]
    if sizes[0] != sizes[1] or tokenizer.get_vocab() != own.get_vocab():
        raise UserError(
            f"--model and --teacher have other vocabularies ({sizes[0]:,} and {sizes[1]:,} "
            "entries): the teacher must be what the model was made from"
        )
    return Pair(student, widen(teacher), tokenizer)


def _make_run(
    folder: RunFolder, settings: Settings, pair: Pair, resume: bool, progress: Steps
) -> "Run":
    if resume:
        tokens = _read_tokens(folder, pair)
    else:
        tokens = make_tokens(settings.sources, settings.treatment, pair, progress)
    if not len(tokens.held_out):
        raise UserError("no text is held out: give --validation or a --validation-share")
    perplexity.check_held_out(tokens.held_out, settings.treatment.context, tokens.tokenizer)
    return Run(folder, settings, pair, tokens)


def make_tokens(
    sources: Sources,
    treatment: Treatment,
    pair: Pair,
    progress: Steps = lambda done, total: None,
) -> Tokens:
    """Make tokens to train on and tokens to measure with.

    They are the user's files, or what the teacher says at temperature 1.
    """
    tokenizer = pair.tokenizer._tokenizer
    if sources.data:
        return encode_texts(sources.read(), pair.tokenizer)
    teacher: Any = pair.teacher
    length, sequences = _choose_rows(treatment, pair)
    cache, spoken = make_prompt_cache(teacher), itertools.count(1)

    def next_logits(fresh: mx.array) -> mx.array:
        logits = teacher(fresh, cache=cache)[:, -1].astype(mx.float32)
        mx.eval(logits)
        progress(next(spoken), length)
        return logits

    tokens = samples.sample_tokens(
        next_logits,
        teacher(mx.array([[0]])).shape[-1],
        sequences,
        length,
        seed=treatment.seed,
        start=pair.tokenizer.bos_token_id,
    )
    rows = np.array(tokens, dtype=np.int32)
    cut = _count_held_out(sequences)
    return Tokens(tokenizer, rows[cut:].reshape(-1), rows[:cut].reshape(-1))


def _count_held_out(rows: int) -> int:
    return max(1, rows // HELD_OUT)


def _choose_rows(treatment: Treatment, pair: Pair) -> tuple[int, int]:
    """Choose how many tokens the teacher speaks in a row, as it was made for, and in how many rows.

    Raises:
        UserError: if these are too few to train on or to measure with.
    """
    length = min(SPOKEN, pair.context or SPOKEN)
    rows, context = -(-treatment.sampled_tokens // length), treatment.context

    def suffices(rows: int) -> bool:
        held_out = _count_held_out(rows)
        return length * held_out > context and length * (rows - held_out) > 2 * context

    if not suffices(rows):
        least = length * next(filter(suffices, itertools.count(rows + 1)))
        raise UserError(
            f"--sampled-tokens {treatment.sampled_tokens}: too few for a --context of {context}: "
            f"give {least:,} or more, or a shorter --context"
        )
    return length, rows


def _read_tokens(folder: RunFolder, pair: Pair) -> Tokens:
    file = folder.training / TOKENS
    arrays, _ = load_arrays(file)
    rows = [arrays.get(name, mx.zeros(())) for name in ("train", "held_out")]
    for row in rows:
        vocabulary = pair.student(mx.array([[0]])).shape[-1]  # type: ignore[operator]
        if row.ndim != 1 or row.dtype != mx.int32 or not _lies_within(row, vocabulary):
            raise UserError(f"{file} does not hold the run's tokens: start the run again")
    train, held_out = map(np.array, rows)
    return Tokens(pair.tokenizer._tokenizer, train, held_out)


def _lies_within(row: mx.array, vocabulary: int) -> bool:
    return bool(((row >= 0) & (row < vocabulary)).all())


def read_before(folder: RunFolder) -> Distance:
    """Read from a run's log how far the model was from its original.

    Raises:
        UserError: if it does not say so.
    """
    try:
        return Distance(**next(e["before"] for e in read_log(folder.path) if "before" in e))
    except (StopIteration, TypeError) as error:
        raise UserError(
            f"the log of {folder.path} does not say what the model was before: start the run again"
        ) from error


class Run(ResumableRun[HealingResult]):
    """A reduced network that learns from its original."""

    def __init__(self, folder: RunFolder, settings: Settings, pair: Pair, tokens: Tokens):
        self.settings, self._treatment = settings, settings.treatment
        self._teacher, self._tokenizer = pair.teacher, pair.tokenizer
        self._held_out = tokens.held_out
        self._types = {name: array.dtype for name, array in tensors_of(pair.student).items()}
        pair.teacher.eval()
        make_trainable(pair.student, self._treatment)
        widen(pair.student)
        rate = make_healing_schedule(self._treatment)
        optimizer = optim.Adam(rate, betas=[0.9, 0.95], bias_correction=True)  # type: ignore[arg-type]
        super().__init__(
            folder, tokens, self._treatment, settings.pace, pair.student, optimizer, rate
        )

    def begin(self) -> None:
        """Write what never changes during a run: settings and tokens."""
        # What is trained and its two moments, twice while they are replaced, and the result.
        whole = sum(array.nbytes for array in tensors_of(self.model).values())
        self._folder.begin(24 * self.parameters + whole)
        tokens = {"train": mx.array(self._text.train), "held_out": mx.array(self._text.held_out)}
        replace_file(
            self._folder.training / TOKENS, lambda file: mx.save_safetensors(str(file), tokens)
        )
        self._folder.write_settings(self.settings)

    def load(self) -> None:
        """Go to the last checkpoint; the log must say how far away the model began.

        Raises:
            UserError: if the checkpoint or the log is broken.
        """
        super().load()
        read_before(self._folder)

    @attend_in_float32()
    def go(self, report: Callable[[Event], None]) -> HealingResult:
        """Train to the end, fuse, measure and write."""
        if self._step == 0:
            before = self.signals.outlive(partial(self._distance, self.model))
            if not math.isfinite(before.kl):
                whole = math.isfinite(before.teacher_loss)
                raise explain_nan("--model" if whole else "--teacher")
            self._log({"before": asdict(before)}, report)
        self.run(report)
        self.signals.outlive(self._fuse)
        after = self.signals.outlive(partial(self._distance, self.model))
        if not self._has_logged("after"):
            self._log({"after": asdict(after)}, report)
        names = [Path(file).name for file in self.settings.sources.data]
        result = HealingResult(
            **self._figures(),
            fine_tune_type=self._treatment.fine_tune_type,
            trained_parameters=self.parameters,
            text=", ".join(names) or "sampled",
            before=read_before(self._folder),
            after=after,
        )
        self._write(result)
        return result

    def _fuse(self) -> None:
        """Fuse what was trained into the matrices, to be measured with the numbers written."""
        fused = [(name, m.fuse()) for name, m in self.model.named_modules() if hasattr(m, "fuse")]
        self.model.update_modules(tree_unflatten(fused))
        self._restore_types()
        widen(self.model)

    def _restore_types(self) -> None:
        """Give all weights the types that they had."""
        types = self._types
        self.model.update(
            tree_map_with_path(lambda name, a: a.astype(types[name]), self.model.parameters())
        )
        mx.eval(self.model.parameters())

    def _write(self, result: HealingResult) -> None:
        """Put the healed model beside the run's folder, its config last."""
        self._restore_types()
        out, sources = self._folder.path, self.settings.sources
        partial_folder = out / ".partial-model"
        shutil.rmtree(partial_folder, ignore_errors=True)
        source = hub.resolve(sources.model)
        try:
            self._folder.draw_curve()
            _save_model(partial_folder, source, self.model, self._tokenizer)
            text = write_healing_card(result, asdict(self._treatment), sources.teacher)
            (partial_folder / "README.md").write_text(
                text, encoding="utf-8", errors="backslashreplace"
            )
            names = sorted(file.name for file in partial_folder.iterdir())
            for name in sorted(names, key=lambda name: name == "config.json"):
                os.replace(partial_folder / name, out / name)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"writing {out} failed ({first_line(error)}): is the disk full? "
                f"{self._describe_saved()}, --resume writes it again"
            ) from error
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)

    def _compile_step(self) -> Callable[[int], mx.array]:
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
            inputs = mx.array(self._batches.make_batch(number)[:, :-1])
            wanted = teacher(inputs)
            mx.eval(wanted)
            return step(inputs, wanted)

        return numbered

    def _evaluate(self, limit: int | None) -> Event:
        if limit is None:  # what is written is measured, when it is fused
            return {}
        found = self._distance(self.model, limit)
        return {"validation_loss": found.kl, "perplexity": math.exp(min(found.loss, 700.0))}

    def _distance(self, network: nn.Module, limit: int = MEASURED_TOKENS) -> Distance:
        """On the held-out text, or windows spread over it of ``limit`` tokens in all."""
        kl = loss = teacher_loss = 0.0
        count = 0
        size, context = self._treatment.batch_size, self._treatment.context
        for batch in corpus.cut_windows(self._held_out, context, size, limit):
            inputs, targets = mx.array(batch[:, :-1]), mx.array(batch[:, 1:])
            wanted, got = self._teacher(inputs), network(inputs)
            kl += _total(measure_kl(wanted, got))
            teacher_loss += _total(measure_nll(wanted, targets))
            loss += _total(measure_nll(got, targets))
            count += targets.size
        characters = corpus.count_predicted(self._tokenizer, self._held_out, context, limit)
        bits = 1 / (math.log(2) * max(1, characters))
        return Distance(
            kl / count, loss / count, teacher_loss / count, loss * bits, teacher_loss * bits, count
        )


def _total(array: mx.array) -> float:
    return float(array.sum().item())  # type: ignore[arg-type]


def _save_model(folder: Path, source: Path, model: nn.Module, tokenizer: Any) -> None:
    """Save a model with what it has beside its weights in the folder that it comes from."""
    config = read_json(source / "config.json")
    mlx_lm.utils.save(folder, source, model, tokenizer, config, donate_model=False)
    for pattern in ("*.py", "generation_config.json"):
        for file in source.glob(pattern):  # mlx-lm finds none in a folder called "a[1]"
            shutil.copy(file, folder)
    hide_paths(folder)
