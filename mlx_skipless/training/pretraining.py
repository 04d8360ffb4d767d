"""Training a skipless model: its text, its loss and what it reports.

At the top of the run's folder is a source checkpoint (``docs/checkpoint.md``) that ``convert``
takes.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.output import hide_paths, replace_file, write_json
from ..checkpoints.tokenizer import NO_MODEL_TYPE, fetch_tokenizer
from ..errors import BadArgument, UserError
from ..evaluation import perplexity
from ..inference.generation import generate
from ..memory import format_bytes
from ..network.model import Model
from ..network.parts import tensors_of
from ..options import check_kinds, expand_path
from ..progress import Progress
from ..text import corpus
from .card import write_training_card
from .folder import Event, RunFolder, check_no_steps, check_own, read_whole
from .initialization import initialize, make_model_args
from .loop import ResumableRun, carry_out, is_due
from .optimizer import hold_skips, make_optimizer, make_schedule, pull_queries
from .recipe import Recipe, TrainingPace, fix_rate
from .results import TrainingResult
from .tokens import TextFiles, Tokens, encode_texts, list_paths, read_sources

LONG_TEXT = 5_000_000  # characters, which take a tokenizer seconds
SAMPLE_PROMPT, SAMPLE_TOKENS = 8, 64


@dataclass(frozen=True)
class TrainingText(TextFiles):
    """Where a run's text comes from, as ``run.json`` keeps it.

    Attributes:
        tokenizer: a folder or Hub id; None: made from the text.
    """

    tokenizer: str | None


@dataclass(frozen=True)
class Settings:
    """All that decides how a run goes, as ``run.json`` keeps it.

    Attributes:
        recipe: what is trained and how.
        pace: how often to do what.
        text: the files.
        dtype: of the arithmetic, "float32" or "bfloat16".
        fingerprint: of the text's tokens; empty until they are known.
    """

    recipe: Recipe
    pace: TrainingPace
    text: TrainingText
    dtype: str
    fingerprint: str = ""


def _read_settings(run: Mapping[str, Any]) -> Settings:
    # Runs from before there was a choice learned their skips, and their K and V read the stream.
    older = {} if "kv" in run["recipe"]["norms"] else {"learn_skips": True}
    recipe = read_whole(Recipe, "recipe", older | run["recipe"])
    make_model_args(recipe)
    return Settings(
        recipe,
        read_whole(TrainingPace, "pace", run["pace"]),
        read_sources(TrainingText, run["text"]),
        _choose_dtype(run["dtype"]),
        _read_fingerprint(run["fingerprint"]),
    )


def _read_fingerprint(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("the fingerprint is no text")
    return value


def train(
    data: str | Path | Sequence[str | Path] | None,
    mlx_path: str | Path = "trained_model",
    recipe: Recipe | None = None,
    *,
    validation: str | Path | Sequence[str | Path] = (),
    validation_share: float | None = None,
    tokenizer: str | Path | None = None,
    pace: TrainingPace | None = None,
    dtype: str = "auto",
    resume: bool = False,
    steps: int | None = None,
    report: Callable[[Event], None] = lambda event: None,
    progress: Progress = lambda stage, done, total: None,
) -> TrainingResult:
    """Train a model, or go on with a run bit for bit as if it had never stopped.

    Args:
        data: text files, plain or .jsonl; None with ``resume``: where they were.
        mlx_path: the run's folder; must not exist, or with ``resume`` must.
        recipe: what to train and how; with ``resume`` the run's own holds.
        validation: held-out files; without any, the last ``validation_share`` of each file's lines.
        validation_share: between 0 and 1; None: 0.03, and with ``resume`` the run's own. Not beside
            ``validation``.
        tokenizer: a folder or Hub id whose tokenizer to use; None: a byte-level BPE made from the
            text.
        pace: how often to log, evaluate and save; with ``resume`` the run's own holds.
        dtype: of the arithmetic, "float32", "bfloat16" or "auto" (bfloat16 on a GPU, float32 on a
            CPU); weights and optimizer are float32 throughout; with ``resume`` the run's own holds.
        resume: go on from the last checkpoint.
        steps: with ``resume``, another number of steps in all (the decay moves with it).
        report: called with each event, as ``training/log.jsonl`` has it.
        progress: called with "steps", how many are done and how many there are; where the text is
            long, before that with what is made of it, 0 and then 1, and 1.

    Raises:
        UserError: for anything the user can mend, a loss that is no number, and an interruption;
            the last good checkpoint is kept.
    """
    asked, dtype, folder = dtype, _choose_dtype(dtype), RunFolder(expand_path(mlx_path))
    paths, held_out = list_paths(data or ()), list_paths(validation)
    check_kinds(recipe=(recipe, Recipe), pace=(pace, TrainingPace))
    if resume:
        settings = _resume(folder, asked, tokenizer, validation_share, steps)
        settings = _find_text(settings, paths, held_out)
    elif data:
        folder.check_free()
        check_no_steps(steps)
        source = None if tokenizer is None else str(tokenizer)
        share = corpus.choose_share(validation_share, held_out, paths)
        text = TrainingText(paths, held_out, share, source)
        settings = Settings(fix_rate(recipe or Recipe()), pace or TrainingPace(), text, dtype)
        _check_sizes(settings.recipe)
    else:
        raise BadArgument("--data is missing: name text files to train on")
    settings, tokens = make_tokens(settings, folder.path if resume else None, progress)
    steps_done = partial(progress, "steps")
    return carry_out(folder, resume, lambda: Run(folder, settings, tokens), report, steps_done)


def _resume(
    folder: RunFolder,
    dtype: str,
    tokenizer: str | Path | None,
    share: float | None,
    steps: int | None,
) -> Settings:
    """Read the settings of a run to resume, which the arguments of ``train`` must fit."""
    settings = folder.read_settings(_read_settings)
    text = settings.text
    check_own("--dtype", dtype, "auto", settings.dtype)
    if tokenizer is not None and _is_at(tokenizer) != _is_at(text.tokenizer or "none"):
        check_own("--tokenizer", str(tokenizer), None, text.tokenizer or "one of its own")
    check_own("--validation-share", share, None, text.validation_share)
    recipe = settings.recipe if steps is None else dataclasses.replace(settings.recipe, steps=steps)
    return dataclasses.replace(settings, recipe=recipe)


def _find_text(settings: Settings, data: list[str], validation: list[str]) -> Settings:
    """Return the settings of a resumed run whose text is at these paths now, if there are any."""
    if validation and not data:
        raise BadArgument(
            "--validation: only --steps may change; together with --data it says where the same "
            "files are now"
        )
    if not data:
        return settings
    text = dataclasses.replace(settings.text, data=data, validation=validation)
    return dataclasses.replace(settings, text=text)


def _is_at(source: str | Path) -> str:
    """Where a tokenizer is, however its path is spelt."""
    return os.path.realpath(expand_path(source))


def _check_sizes(recipe: Recipe) -> None:
    """Check, before the text is read, that the sizes make a network."""
    try:
        make_model_args(recipe)
    except UserError as error:
        raise BadArgument(str(error)) from error


def make_tokens(
    settings: Settings,
    resumed: Path | None,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Settings, Tokens]:
    """Read the text, and complete the settings by what it says.

    Args:
        settings: with an empty fingerprint, unless the run is resumed.
        resumed: the folder of a resumed run, which has its tokenizer.
        progress: told what is made of a long text.

    Raises:
        UserError: if a resumed run's text is not what it was.
    """
    source = settings.text.tokenizer if resumed is None else str(resumed)
    texts = settings.text.read()
    if source is None:
        with _announce("making a tokenizer from {} of text", texts.train, progress):
            size = settings.recipe.vocab_size
            tokenizer = corpus.make_tokenizer(texts.train, size, chat=texts.chat)
    else:
        tokenizer = fetch_tokenizer(source)
    with _announce("making tokens of {} of text", [*texts.train, *texts.validation], progress):
        tokens = encode_texts(texts, tokenizer)
    if len(tokens.held_out):
        perplexity.check_held_out(tokens.held_out, settings.recipe.context, tokenizer)
    fingerprint = tokens.fingerprint()
    if resumed is not None and fingerprint != settings.fingerprint:
        raise UserError(
            f"{resumed} was trained on other text than these files hold now: give the same --data "
            "and --validation"
        )
    recipe = dataclasses.replace(settings.recipe, vocab_size=len(tokenizer))
    return dataclasses.replace(settings, recipe=recipe, fingerprint=fingerprint), tokens


@contextlib.contextmanager
def _announce(
    what: str, documents: Sequence[corpus.Document], progress: Progress
) -> Iterator[None]:
    """Tell of work on a long text, which a tokenizer does in one go, as a stage of one step."""
    size = sum(map(corpus.count_said, documents))
    stage = what.format(format_bytes(size))
    if size < LONG_TEXT:
        yield
        return
    progress(stage, 0, 1)
    yield
    progress(stage, 1, 1)


def _choose_dtype(dtype: str) -> str:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise BadArgument(f"--dtype {dtype}: choose auto, float32 or bfloat16")
    if dtype == "auto":
        return "bfloat16" if mx.default_device().type == mx.DeviceType.gpu else "float32"
    return dtype


class Run(ResumableRun[TrainingResult]):
    """The training of a whole network to predict text."""

    def __init__(self, folder: RunFolder, settings: Settings, tokens: Tokens):
        self.settings, self._recipe = settings, settings.recipe
        model = Model(make_model_args(self._recipe))
        initialize(model, self._recipe)
        super().__init__(
            folder,
            tokens,
            self._recipe,
            settings.pace,
            model,
            make_optimizer(self._recipe),
            make_schedule(self._recipe, self._recipe.peak),
        )

    def begin(self) -> None:
        """Write what never changes during a run: settings, tokenizer and config."""
        # Weights twice, Muon's or Adam's moments, and all of it once more while it is replaced.
        self._folder.begin(32 * self.parameters)
        tokenizer = self._text.tokenizer
        tokenizer.save_pretrained(str(self._folder.path))
        hide_paths(self._folder.path)
        config = {k: v for k, v in asdict(self.model.args).items() if v is not None}
        config |= {"eos_token_id": tokenizer.eos_token_id, "torch_dtype": "float32"}
        config |= {"architectures": ["SkiplessForCausalLM"], **NO_MODEL_TYPE}
        write_json(self._folder.path / "config.json", dict(sorted(config.items())))
        self._folder.write_settings(self.settings)

    def go(self, report: Callable[[Event], None]) -> TrainingResult:
        """Train to the end and write the card."""
        final = self.run(report)
        result = TrainingResult(
            **self._figures(),
            parameters=self.parameters,
            loss=self._loss,
            validation_loss=final.get("validation_loss"),
            bits_per_character=final.get("bits_per_character"),
        )
        names = [Path(file).name for file in self.settings.text.data]
        text = write_training_card(result, self.model.args, asdict(self._recipe), names)
        replace_file(
            self._folder.path / "README.md",
            lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace"),
        )
        return result

    def _write_model(self) -> None:
        weights = tensors_of(self.model)
        replace_file(
            self._folder.path / "model.safetensors",
            lambda file: mx.save_safetensors(str(file), weights, {"format": "mlx"}),
        )

    def _observe(self) -> Event:
        every = self.settings.pace.sample_every
        if self._step == self._steps or is_due(self._step, every):
            self._check_weights()
            return {"sample": self._sample()}
        return {}

    def _compile_step(self) -> Callable[[int], mx.array]:
        optimizer, recipe = self._optimizer, self._recipe
        model: Any = self.model
        state = [model.state, optimizer.state]

        def mean_loss(weights: dict[str, Any], batch: mx.array) -> mx.array:
            return self._nll(weights, batch) / (batch.shape[0] * (batch.shape[1] - 1))

        @partial(mx.compile, inputs=state, outputs=state)
        def step(batch: mx.array) -> mx.array:
            weights = model.trainable_parameters()
            loss, gradients = mx.value_and_grad(mean_loss)(weights, batch)
            gradients, _ = optim.clip_grad_norm(hold_skips(gradients, recipe), recipe.clip)
            model.update(weights)  # in float32 again
            before = optimizer.state["states"][0]["step"]
            optimizer.update(model, gradients)
            pull_queries(model, recipe, before)
            return loss

        return lambda number: step(mx.array(self._batches.make_batch(number)))

    def _nll(self, weights: dict[str, Any], batch: mx.array) -> mx.array:
        """The batch's summed NLL, with these weights in the type of the arithmetic."""
        if self.settings.dtype != "float32":
            dtype = getattr(mx, self.settings.dtype)
            weights = tree_map(lambda w: w.astype(dtype), weights)
        self.model.update(weights)
        return perplexity.sum_nll(self.model, batch)

    def _evaluate(self, limit: int | None) -> Event:
        """Score the held-out text, or windows spread over it of ``limit`` tokens in all."""
        if not len(self._text.held_out):
            return {}
        weights = self.model.parameters()
        try:
            score = perplexity.score_tokens(
                partial(self._nll, weights),
                self._text.held_out,
                self._text.tokenizer,
                self._recipe.context,
                self._recipe.batch_size,
                limit,
            )
        finally:
            self.model.update(weights)  # in float32 again
        return {
            "validation_loss": score.loss,
            "bits_per_character": score.bits_per_character,
            "validation_tokens": score.tokens,
        }

    def _sample(self) -> str:
        """Let the network go on from the first tokens of the held-out text."""
        source = self._text.held_out if len(self._text.held_out) else self._text.train
        prompt = source[:SAMPLE_PROMPT].tolist()
        tokenizer = TokenizerWrapper(self._text.tokenizer)
        options = {"max_tokens": SAMPLE_TOKENS, "temp": 0.8, "seed": self._recipe.seed}
        answer = generate(self.model, tokenizer, prompt, **options)
        return self._text.tokenizer.decode(prompt) + answer.text
