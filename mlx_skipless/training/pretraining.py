"""Training a skipless model: its text, its loss and what it reports.

At the top of the run's folder is a source checkpoint (``docs/checkpoint.md``) that ``convert``
takes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints import files
from ..checkpoints.tokenizer import fetch_tokenizer
from ..checkpoints.writer import check_free
from ..errors import UserError
from ..evaluation import perplexity
from ..inference import generation
from ..memory import peak_memory_bytes
from ..network.model import Model
from ..network.parts import tensors_of
from ..options import option
from ..text import corpus
from ..text.corpus import Batches
from . import card, loop
from .loop import Event
from .recipe import Recipe, read_recipe

SAMPLE_TOKENS = 64


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


@dataclass(frozen=True)
class Pace(loop.Pace):
    """How often, in steps, a run logs, evaluates, saves and writes a sample; 0: never."""

    sample_every: int = option(500, "steps from one sample to the next")


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        output: the run's folder.
        step: the last one.
        tokens: that were seen, repeated ones each time.
        parameters: weights of the network.
        loss: nats per token, the mean over the steps of the log's last line.
        validation_loss: of all the held-out text, nats per token, None if there is none.
        bits_per_character: likewise.
        seconds: of training, earlier sessions of a resumed run included.
        tokens_per_second: over these.
        peak_memory_bytes: the most that the process held.
    """

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
        perplexity.check_length(text.held_out, recipe.context)
    if digest not in (None, text.fingerprint()):
        raise UserError(
            f"{out} was trained on other text than these files hold now: give the same --data"
        )
    with loop.hold_folder(out, resume):
        run = Run(out, recipe, pace or Pace(), sources, text, dtype)
        if resume:
            run.load()
        else:
            run.begin()
        with loop.catch_signals() as stopped:
            return run.go(report, stopped)


class Run(loop.ResumableRun):
    """The training of a whole network to predict text."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        pace: Pace,
        sources: Sources,
        text: Text,
        dtype: str,
    ):
        self._recipe, self._sources, self._text, self._dtype = recipe, sources, text, dtype
        self._sample_every = pace.sample_every
        self._batches = Batches(text.train, recipe.context, recipe.batch_size, recipe.seed)
        model = Model(recipe.model_args())
        self.parameters = sum(w.size for w in tensors_of(model).values())
        recipe.initialise(model)
        step_tokens = recipe.batch_size * recipe.context
        super().__init__(out, model, recipe.optimizer(), recipe.steps, step_tokens, pace)

    def begin(self) -> None:
        """Write what never changes during a run."""
        # Weights twice, Muon's or Adam's moments, and all of it once more while it is replaced.
        loop.check_room(self._out, 32 * self.parameters)
        (self._out / loop.TRAINING).mkdir()
        self._text.tokenizer.save_pretrained(str(self._out))
        run = {
            "recipe": asdict(self._recipe),
            "pace": asdict(self._pace),
            "text": asdict(self._sources),
            "dtype": self._dtype,
            "fingerprint": self._text.fingerprint(),
        }
        files.write_json(self._out / loop.TRAINING / loop.RUN, run)
        config = {k: v for k, v in asdict(self.model.args).items() if v is not None}
        config |= {"eos_token_id": self._text.tokenizer.eos_token_id, "torch_dtype": "float32"}
        config |= {"architectures": ["SkiplessForCausalLM"]}
        files.write_json(self._out / "config.json", dict(sorted(config.items())))

    def _write_model(self) -> None:
        weights = tensors_of(self.model)
        files.replace_file(
            self._out / "model.safetensors",
            lambda file: mx.save_safetensors(str(file), weights, {"format": "mlx"}),
        )

    def go(self, report: Callable[[Event], None], stopped: Callable[[], bool]) -> Result:
        """Train to the end."""
        recipe, final = self._recipe, self.run(report, stopped)
        tokens = self._step * self._step_tokens
        result = Result(
            output=str(self._out),
            step=self._step,
            tokens=tokens,
            parameters=self.parameters,
            loss=self._loss,
            validation_loss=final.get("validation_loss"),
            bits_per_character=final.get("bits_per_character"),
            seconds=self._seconds,
            tokens_per_second=tokens / self._seconds if self._seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(),
        )
        text = card.write_training_card(
            result, self.model.args, asdict(recipe), [Path(f).name for f in self._sources.data]
        )
        files.replace_file(
            self._out / "README.md", lambda file: file.write_text(text, encoding="utf-8")
        )
        return result

    def _opening(self) -> Event:
        return {
            "parameters": self.parameters,
            "train_tokens": len(self._text.train),
            "validation_tokens": len(self._text.held_out),
        }

    def _rate(self, step: int) -> float:
        return self._recipe.rate(step)

    def _extra(self) -> Event:
        if self._step == self._steps or loop.is_due(self._step, self._sample_every):
            self._check_weights()
            return {"sample": self._sample()}
        return {}

    def _compiled_step(self) -> Callable[[int], mx.array]:
        optimizer, recipe = self._optimizer, self._recipe
        model: Any = self.model
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

        return lambda number: step(mx.array(self._batches.at(number)))

    def _nll(self, weights: dict[str, Any], batch: mx.array) -> mx.array:
        """``evaluation.nll`` with these weights in the type of the arithmetic."""
        if self._dtype != "float32":
            dtype = getattr(mx, self._dtype)
            weights = tree_map(lambda w: w.astype(dtype), weights)
        self.model.update(weights)
        return perplexity.sum_nll(self.model, batch)

    def _evaluation(self, limit: int | None) -> Event:
        """Loss of the held-out text, or of windows spread over it of ``limit`` tokens in all."""
        if not len(self._text.held_out):
            return {}
        weights = self.model.parameters()
        score = perplexity.score_tokens(
            partial(self._nll, weights),
            self._text.held_out,
            self._text.tokenizer,
            self._recipe.context,
            self._recipe.batch_size,
            limit,
        )
        self.model.update(weights)
        return {
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


def _read_run(out: Path) -> tuple[Recipe, Pace, Sources, str, str]:
    """What ``Run.begin`` wrote: recipe, pace, text, type of the arithmetic, digest of the text."""
    run = loop.read_run(out)
    with loop.check_version(out):
        recipe, pace = read_recipe(run["recipe"]), Pace(**run["pace"])
        sources, dtype = Sources(**run["text"]), _compute_type(run["dtype"])
        return recipe, pace, sources, dtype, str(run["fingerprint"])


def _read_text(sources: Sources, recipe: Recipe, run: Path | None) -> Text:
    files, validation = ([Path(f) for f in part] for part in (sources.data, sources.validation))
    texts = corpus.read_texts(files, validation, share=sources.validation_share)
    source = sources.tokenizer if run is None else str(run)
    if source is None:
        tokenizer = corpus.make_tokenizer(texts.train, recipe.vocab_size, chat=texts.chat)
    else:
        tokenizer = fetch_tokenizer(source)
    return Text(
        tokenizer,
        corpus.encode(texts.train, tokenizer),
        corpus.encode(texts.validation, tokenizer),
    )


def _compute_type(dtype: str) -> str:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: choose auto, float32 or bfloat16")
    if dtype == "auto":
        return "bfloat16" if mx.default_device().type == mx.DeviceType.gpu else "float32"
    return dtype
