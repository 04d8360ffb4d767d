"""Training runs: what they write, resume and refuse, their figures, and the commands."""

import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import matplotlib.text
import mlx.core as mx
import numpy as np
import pytest
import reference
from factory import EOS, make_llama, stored
from matplotlib.figure import Figure
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

import mlx_skipless
from mlx_skipless import UserError, cli
from mlx_skipless.cli import events
from mlx_skipless.terminal import make_visible
from mlx_skipless.training import optimizer, pretraining
from mlx_skipless.training.folder import Event, RunFolder, read_log
from mlx_skipless.training.optimizer import Schedule
from mlx_skipless.training.recipe import Recipe
from mlx_skipless.training.recipe import TrainingPace as Pace
from mlx_skipless.training.results import TrainingResult as Result

SMALL = Recipe(
    hidden_size=16, intermediate_size=32, layers=2, heads=2, kv_heads=1, vocab_size=300,
    context=16, batch_size=4, steps=12, warmup=2, decay=1.0, learning_rate=0.02,
)  # fmt: skip
PACE = Pace(log_every=2, eval_every=4, save_every=4, sample_every=0, eval_tokens=64)
LINES = 300
SHARE = 0.1
WORDS = ("the", "cat", "sat", "on", "a", "mat", "who", "saw", "red", "dogs", "run", "far", "blue",
         "birds", "sing", "loudly", "over", "quick", "foxes")  # fmt: skip


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The commands handle SIGTERM and SIGHUP; pytest gets its own handling back."""
    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of words, each of which is followed by one of two others; some are not ASCII."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    lines = []
    for _ in range(LINES):
        word, line = rng.integers(len(WORDS)), []
        for _ in range(9):
            line.append(WORDS[word])
            word = (3 * word + 1 + rng.integers(2)) % len(WORDS)
        lines.append(" ".join(line) + " é—.")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def run(data: Path | None, out: Path, recipe: Recipe | None = SMALL, **options: Any) -> Result:
    share = {} if options.get("validation") else {"validation_share": SHARE}
    options = {"pace": PACE, "dtype": "float32", **share} | options
    return pretraining.train(None if data is None else [data], out, recipe, **options)


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run of twelve steps; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, run(text, out)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def saved(out: Path) -> dict[str, bytes]:
    """The two files that a checkpoint replaces."""
    names = ("model.safetensors", "training/state.safetensors")
    return {name: (out / name).read_bytes() for name in names}


def losses(out: Path) -> list[tuple[Any, ...]]:
    """What the log says but for times and memory."""
    keys = ("step", "tokens", "loss", "learning_rate", "validation_loss", "bits_per_character")
    return [tuple(event.get(key) for key in keys) for event in read_log(out)]


def no_partial_files(out: Path) -> bool:
    return not [path for path in out.rglob("*") if "partial" in path.name]


def command(*arguments: Any) -> int:
    return cli.main([str(a) for a in arguments])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
    return error


def flags(recipe: Recipe = SMALL, pace: Pace = PACE) -> list[str]:
    """The command line of a recipe and a pace."""
    given = []
    for part in (recipe, pace):
        for option in dataclasses.fields(part):
            value = getattr(part, option.name)
            if value != option.default:
                given += [f"--{option.name.replace('_', '-')}", str(value)]
    return [*given, "--dtype", "float32", "--validation-share", str(SHARE)]


# What is learnt and written


@pytest.mark.thorough
@pytest.mark.usefixtures("compiled")
def test_a_run_learns(text: Path, tmp_path: Path):
    """It ends below the entropy of single tokens, which takes knowing what follows what."""
    recipe = dataclasses.replace(SMALL, steps=80, batch_size=8, adam_learning_rate=0.02)
    result = run(text, tmp_path / "run", recipe, pace=Pace(20, 0, 0, 0))
    logged = [event["loss"] for event in read_log(tmp_path / "run") if "loss" in event]
    assert len(logged) == 4 and logged == sorted(logged, reverse=True)
    assert 2.5 < logged[0] < 6
    tokens = held_out_tokens(text, tmp_path / "run")
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    assert result.validation_loss is not None
    assert result.validation_loss < -np.sum(shares * np.log(shares)) - 0.5


def held_out_tokens(text: Path, out: Path) -> np.ndarray:
    """The last tenth of the lines through the saved tokenizer, with its end token."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    lines = text.read_text(encoding="utf-8").split("\n")[:-1]
    kept = "\n".join(lines[LINES - LINES // 10 :])
    return np.array([*tokenizer(kept)["input_ids"], tokenizer.eos_token_id])


def numpy_score(text: Path, out: Path) -> tuple[float, float]:
    """Nats per token and bits per character of a saved model, all in NumPy float64."""
    config = json.loads((out / "config.json").read_text())
    arrays: Any = mx.load(str(out / "model.safetensors"))
    weights = {name: np.array(w, np.float64) for name, w in arrays.items()}
    tokens, length = held_out_tokens(text, out), SMALL.context
    rows = np.array(
        [tokens[i : i + length + 1] for i in range(0, len(tokens) - length, length)]
    )  # fmt: skip
    logits = reference.logits(config, weights, rows[:, :-1])
    norms = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    chosen = np.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
    nats = np.sum(norms - chosen)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    written = [tokenizer.decode(row[1:].tolist(), skip_special_tokens=True) for row in rows]
    return nats / rows[:, 1:].size, nats / math.log(2) / sum(map(len, written))


def test_the_figures_are_those_of_the_saved_model(finished: tuple[Path, Result], text: Path):
    out, result = finished
    loss, bits = numpy_score(text, out)
    assert result.validation_loss == pytest.approx(loss, rel=1e-5)
    assert result.bits_per_character == pytest.approx(bits, rel=1e-5)
    last = read_log(out)[-1]
    assert (last["validation_loss"], last["step"]) == (result.validation_loss, 12)
    score = mlx_skipless.measure_perplexity(out, [text], validation_share=SHARE, batch_size=3)
    assert score.loss == pytest.approx(loss, rel=1e-5)
    assert score.bits_per_character == pytest.approx(bits, rel=1e-5)


def test_the_result_counts(finished: tuple[Path, Result]):
    out, result = finished
    arrays: Any = mx.load(str(out / "model.safetensors"))
    assert result.output == str(out) and result.step == 12
    assert result.tokens == 12 * 4 * 16
    assert result.parameters == sum(w.size for w in arrays.values())
    events = read_log(out)
    assert [e["step"] for e in events if "loss" in e] == [2, 4, 6, 8, 10, 12]
    assert [e["tokens"] for e in events if "loss" in e] == [64 * n for n in (2, 4, 6, 8, 10, 12)]
    assert [e["validation_tokens"] for e in events if "validation_loss" in e][:2] == [64, 64]
    assert [e["step"] for e in events if "validation_loss" in e] == [4, 8, 12]
    assert [e["step"] for e in events if "sample" in e] == [12]
    assert events[-1]["validation_tokens"] > 64
    assert result.loss == [e["loss"] for e in events if "loss" in e][-1]
    rates = [e["learning_rate"] for e in events if "loss" in e]
    assert rates == pytest.approx([0.02 * (13 - n) / 12 for n in (2, 4, 6, 8, 10, 12)], rel=1e-5)
    assert 0 < result.seconds < 600 and result.peak_memory_bytes > 1e6
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.as_dict() == json.loads(json.dumps(result.as_dict()))


def test_the_first_loss_is_the_untrained_models(text: Path, tmp_path: Path):
    recipe = dataclasses.replace(SMALL, steps=1, seed=5)
    run(text, tmp_path / "run", recipe)
    logged = read_log(tmp_path / "run")[0]["loss"]
    assert logged == pytest.approx(math.log(300), rel=0.05)


def test_the_folder_is_a_source(finished: tuple[Path, Result], tmp_path: Path):
    out, _ = finished
    assert sorted(name for name in contents(out) if "token" not in name) == [
        "README.md", "chat_template.jinja", "config.json", "model.safetensors", "training",
        "training/log.jsonl", "training/loss.png", "training/run.json",
        "training/state.safetensors",
    ]  # fmt: skip
    model, tokenizer = mlx_skipless.load(out)
    tokens = np.arange(40).reshape(2, 20)
    config = json.loads((out / "config.json").read_text())
    arrays: Any = mx.load(str(out / "model.safetensors"))
    assert {str(w.dtype) for w in arrays.values()} == {"mlx.core.float32"}
    weights = {name: np.array(w, np.float64) for name, w in arrays.items()}
    logits = np.array(model(mx.array(tokens)))
    expected = reference.logits(config, weights, tokens)
    assert reference.worst_relative_error(expected, logits) < 1e-4
    assert tokenizer.decode(tokenizer.encode("a é\n—👩‍👩‍👧")) == "a é\n—👩‍👩‍👧"
    assert config["eos_token_id"] == tokenizer.eos_token_id == 0
    for kind, bound in (("p", 1e-4), ("qp", 1e-3)):
        report = mlx_skipless.convert(out, tmp_path / kind, remove=kind)
        # The output skip holds the embedding, which is tied to the head: Q of layer 0 stays.
        removed = {letter: [1] if letter == "q" else [0, 1] for letter in kind}
        assert report.removed == removed
        gone = {name for name in weights if "_proj" in name} - set(stored(tmp_path / kind))
        names = {"p": "o_proj", "q": "q_proj"}
        assert gone == {
            f"model.layers.{i}.self_attn.{names[letter]}.weight"
            for letter, layers in removed.items()
            for i in layers
        }
        assert report.verification is not None
        assert report.verification.max_rel_logit_error < bound
        assert mlx_skipless.load(tmp_path / kind)


@pytest.mark.parametrize(
    ("options", "remove"),
    [
        ({"block": "parallel", "output_skip": None}, "p"),
        ({"skip": "ffn"}, "auto"),
        ({"block": "sas"}, "auto"),
    ],
)
def test_other_rungs_convert(text: Path, tmp_path: Path, options: dict[str, Any], remove: str):
    recipe = dataclasses.replace(SMALL, steps=2, **options)
    run(text, tmp_path / "run", recipe, pace=Pace(0, 0, 0, 0))
    report = mlx_skipless.convert(tmp_path / "run", tmp_path / "out", remove=remove)
    assert report.verification is not None and report.verification.max_rel_logit_error < 1e-3
    assert remove == "auto" or report.removed == {remove: [0, 1]}


def test_the_card_names_text_recipe_and_figures(finished: tuple[Path, Result], text: Path):
    out, result = finished
    card = (out / "README.md").read_text()
    assert f"- {text.name}\n" in card and str(text.parent) not in card
    recipe = json.loads((out / "training/run.json").read_text())["recipe"]
    assert recipe == dataclasses.asdict(SMALL)
    for key, value in recipe.items():
        assert f"- {key}: {value}\n" in card
    for figure in (f"{result.loss:.4f} nats", f"{result.validation_loss:.4f} nats",
                   f"{result.bits_per_character:.4f} bits", f"{result.parameters:,} weights",
                   "768 tokens seen in 12 steps", "no skip", "serial", "# finished"):  # fmt: skip
        assert figure in card


def test_a_run_keeps_the_rate_that_was_the_default_when_it_began(text: Path, tmp_path: Path):
    recipe = dataclasses.replace(SMALL, learning_rate=None, without="qp", steps=1)
    run(text, tmp_path / "run", recipe, pace=Pace(0, 0, 0, 0))
    kept = json.loads((tmp_path / "run/training/run.json").read_text())["recipe"]
    assert kept["learning_rate"] == recipe.peak


def test_nothing_held_out(text: Path, tmp_path: Path):
    result = run(text, tmp_path / "run", validation_share=0.0)
    assert result.validation_loss is None and result.bits_per_character is None
    assert not any("validation_loss" in event for event in read_log(tmp_path / "run"))
    assert "held-out" not in (tmp_path / "run/README.md").read_text()


@pytest.mark.thorough
def test_held_out_files(text: Path, tmp_path: Path):
    result = run(text, tmp_path / "run", validation=[text])
    tail = run(text, tmp_path / "tail", validation_share=0.9)
    assert result.validation_loss is not None and tail.validation_loss is not None
    lines = read_log(tmp_path / "run")[-1]["validation_tokens"]
    assert lines > read_log(tmp_path / "tail")[-1]["validation_tokens"]


def test_one_file_stands_for_a_list(text: Path, tmp_path: Path):
    result = pretraining.train(str(text), tmp_path / "run", dataclasses.replace(SMALL, steps=1))
    assert result.step == 1


def test_held_out_text_too_short_for_a_window(text: Path, tmp_path: Path):
    """It is refused before the work; or else a run that saves would die after it."""
    short = tmp_path / "short.txt"
    short.write_text("the cat\n")
    with pytest.raises(UserError, match="held-out"):
        run(text, tmp_path / "run", validation=[short], pace=Pace(2, 0, 2, 0))
    assert not (tmp_path / "run").exists()


def test_conversations_make_a_chat_model(text: Path, tmp_path: Path):
    file = tmp_path / "talks.jsonl"
    talk = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello"}]
    lines = text.read_text().split("\n")
    content = [{"messages": talk}] * 100 + [{"text": line} for line in lines]
    file.write_text("".join(json.dumps(record) + "\n" for record in content))
    run(file, tmp_path / "run", dataclasses.replace(SMALL, steps=2))
    _, tokenizer = mlx_skipless.load(tmp_path / "run")
    asked = "<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True)
    assert tokenizer.decode(ids) == asked
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["eos_token_id"] == tokenizer.encode("<|im_end|>")[0]


def test_bfloat16_arithmetic_on_float32_weights(
    finished: tuple[Path, Result], text: Path, tmp_path: Path
):
    out = tmp_path / "run"
    result = run(text, out, dtype="bfloat16")
    for name in saved(out):
        arrays: Any = mx.load(str(out / name))
        kinds = {str(a.dtype) for key, a in arrays.items() if not key.endswith("step")}
        assert kinds == {"mlx.core.float32"}
        if name == "model.safetensors":
            rounded = [w.astype(mx.bfloat16).astype(mx.float32) for w in arrays.values()]
            assert not any(
                mx.array_equal(w, r).item()
                for w, r in zip(arrays.values(), rounded, strict=True)
                if w.ndim == 2
            )
    ours, exact = losses(out), losses(finished[0])
    assert [a[2] for a in ours if a[2]] != [a[2] for a in exact if a[2]]
    assert [a[2] for a in ours if a[2]] == pytest.approx([a[2] for a in exact if a[2]], rel=0.02)
    loss, _ = numpy_score(text, out)
    assert result.validation_loss != pytest.approx(loss, rel=1e-6)
    assert result.validation_loss == pytest.approx(loss, rel=0.01)


def test_bfloat16_loses_no_small_steps(text: Path, tmp_path: Path):
    """The weights are rounded for the arithmetic alone."""
    rates: dict[str, Any] = {
        "orthogonal_q": 0.0,
        "steps": 4,
        "learning_rate": 1e-7,
        "adam_learning_rate": 1e-7,
    }
    exact = trained_weights(text, tmp_path / "exact", **rates)
    ours = trained_weights(text, tmp_path / "ours", "bfloat16", **rates)
    assert all(np.abs(ours[name] - w).max() < 2e-6 for name, w in exact.items())


def test_a_given_tokenizer(text: Path, tmp_path: Path):
    make_llama(tmp_path / "llama", num_hidden_layers=1)
    given = PreTrainedTokenizerFast.from_pretrained(tmp_path / "llama")
    out = tmp_path / "run"
    run(text, out, tokenizer=tmp_path / "llama", pace=Pace(2, 0, 4, 0))
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(given) == 258 and config["eos_token_id"] == EOS
    arrays: Any = mx.load(str(out / "model.safetensors"))
    assert arrays["model.embed_tokens.weight"].shape == (258, 16)
    _, tokenizer = mlx_skipless.load(out)
    sample = "a cat é\n"
    assert tokenizer.encode(sample) == given.encode(sample)
    assert tokenizer.chat_template == given.chat_template
    before = contents(out)
    shutil.rmtree(tmp_path / "llama")
    run(None, out, None, resume=True)
    assert contents(out).keys() == before.keys()
    run(None, out, None, resume=True, tokenizer=f"{tmp_path}/run/../llama/")
    with pytest.raises(UserError, match="--tokenizer other: the run to resume has"):
        run(None, out, None, resume=True, tokenizer="other")


def test_a_tokenizer_without_an_end_token(text: Path, tmp_path: Path):
    make_llama(tmp_path / "llama", num_hidden_layers=1)
    file = tmp_path / "llama/tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="end token"):
        run(text, tmp_path / "run", tokenizer=tmp_path / "llama")
    assert not (tmp_path / "run").exists()


def trained_weights(
    text: Path, out: Path, dtype: str = "float32", **options: Any
) -> dict[str, np.ndarray]:
    recipe = dataclasses.replace(SMALL, **options)
    run(text, out, recipe, pace=Pace(0, 0, 0, 0), dtype=dtype)
    arrays: Any = mx.load(str(out / "model.safetensors"))
    return {name: np.array(w) for name, w in arrays.items()}


def test_gradients_are_clipped(text: Path, tmp_path: Path):
    """To next to nothing, where AdamW's epsilon holds the embedding still."""
    first, still, moved = (
        trained_weights(text, tmp_path / name, steps=steps, clip=clip)["model.embed_tokens.weight"]
        for name, steps, clip in (("a", 1, 1e-12), ("b", 6, 1e-12), ("c", 6, 1.0))
    )
    assert np.abs(still - first).max() < 1e-4 < 1e-3 < np.abs(moved - first).max()


def test_queries_stay_invertible(text: Path, tmp_path: Path):
    options: dict[str, Any] = {"steps": 8, "learning_rate": 0.5, "decay": 0.0}
    options |= {"norms": "q,k,v,heads"}  # K and V read what Q is inverted for
    for name, pull in (("free", 0.0), ("held", 1.0)):
        weights = trained_weights(text, tmp_path / name, orthogonal_q=pull, **options)
        queries = [w for key, w in weights.items() if "q_proj" in key]
        values = np.linalg.svd(np.array(queries), compute_uv=False)
        assert ((values > 0.65) & (values < 1.25)).all() == (name == "held")


# Stopped and resumed


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of forty steps that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    recipe = dataclasses.replace(SMALL, steps=40)
    run(text, out, recipe, pace=dataclasses.replace(PACE, save_every=0))
    return out


def same_end(a: Path, b: Path) -> None:
    assert saved(a).keys() == saved(b).keys()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert losses(a) == losses(b)


def test_a_killed_run_goes_on_as_if_nothing_had_been(whole: Path, text: Path, tmp_path: Path):
    out = tmp_path / "run"
    recipe = dataclasses.replace(SMALL, steps=40)
    arguments = [sys.executable, "-m", "mlx_skipless.cli", "train", "--data", text,
                 "--mlx-path", out, *flags(recipe)]  # fmt: skip
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    while not (out / "model.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.8))
    process.kill()
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    for name in saved(out):
        mx.eval(mx.load(str(out / name)))
    state: Any = mx.load(str(out / "training/state.safetensors"), return_metadata=True)
    step = int(state[1]["step"])
    assert step % 4 == 0 and 0 < step < 40
    assert command("train", "--resume", "--mlx-path", out, "--dtype", "float32") == 0
    same_end(out, whole)
    assert no_partial_files(out)


def stop_at(step: int, *signals: int) -> Callable[[Event], None]:
    """A report that sends this process signals at the loss of a step."""

    def report(event: Event) -> None:
        if event["step"] == step and "loss" in event:
            for which in signals:
                os.kill(os.getpid(), which)

    return report


@pytest.mark.thorough
@pytest.mark.usefixtures("compiled")
def test_a_run_of_compiled_steps_goes_on_as_if_nothing_had_been(text: Path, tmp_path: Path):
    """Nothing of a run's state is a constant of its step."""
    run(text, tmp_path / "whole")
    with pytest.raises(UserError, match="interrupted"):
        run(text, tmp_path / "run", report=stop_at(6, signal.SIGINT))
    run(None, tmp_path / "run", None, resume=True)
    same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "which",
    [
        [signal.SIGINT],
        [signal.SIGTERM],
        [signal.SIGHUP],
        [signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP],  # a session that ends
        [signal.SIGTERM, signal.SIGHUP],
    ],
    ids=str,
)
def test_an_interrupted_run_saves_and_tells(
    finished: tuple[Path, Result],
    text: Path,
    tmp_path: Path,
    which: list[signal.Signals],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(events, "describe_event", stop_at(6, *which))
        assert command("train", "--data", text, "--mlx-path", out, *flags()) == 1
    assert "interrupted at step 6: --resume goes on" in one_error(capsys)
    assert signal.getsignal(signal.SIGINT) == handler
    state: Any = mx.load(str(out / "training/state.safetensors"), return_metadata=True)
    assert state[1]["step"] == "6"
    assert [event["step"] for event in read_log(out)] == [2, 4, 4, 6]
    assert no_partial_files(out)
    result = run(None, out, None, resume=True)
    same_end(out, finished[0])
    assert result.loss == finished[1].loss


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "x")])
def test_a_run_that_nobody_hears_saves(
    finished: tuple[Path, Result], text: Path, tmp_path: Path, error: OSError
):
    """A terminal that is gone, a pipe whose reader ended, a full disk behind standard output."""
    out = tmp_path / "run"

    def report(event: Event) -> None:
        if event["step"] >= 6:
            raise error

    with pytest.raises(type(error), match="interrupted at step 6: --resume goes on") as told:
        run(text, out, report=report)
    assert told.value.errno == error.errno
    with contextlib.suppress(OSError):  # at the last step the work is done whoever hears it
        run(None, out, None, resume=True, report=lambda event: report({"step": event["step"] // 2}))
    same_end(out, finished[0])
    assert (out / "README.md").exists()


@pytest.mark.parametrize("quiet", [False, True])
def test_a_long_text_is_announced(
    text: Path,
    tmp_path: Path,
    quiet: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A tokenizer hears no signal and tells nothing while it reads."""
    monkeypatch.setattr(pretraining, "LONG_TEXT", 1000)

    def end(*_: Any) -> None:
        raise UserError("enough")

    monkeypatch.setattr(pretraining, "carry_out", end)
    asked = ["--quiet"] if quiet else []
    out = tmp_path / "run"
    assert command("train", "--data", text, "--mlx-path", out, *flags(), *asked) == 1
    said = capsys.readouterr().err.splitlines()[:-1]
    known = ("making a tokenizer from", "making tokens of")
    assert len(said) == (0 if quiet else 2)
    for line, words in zip(said, known, strict=False):
        assert re.fullmatch(f"{words} [\\d.]+ [kM]B of text", line)


@pytest.mark.parametrize("method", ["_compile_step", "_evaluate", "_observe"])
@pytest.mark.parametrize("kind", [RuntimeError, UserError])
def test_a_compiler_that_a_hangup_ends_costs_nothing(
    finished: tuple[Path, Result],
    text: Path,
    tmp_path: Path,
    method: str,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
):
    """A terminal hangs up on it too, and MLX fails where one of its compilers has died."""
    whole: Any = getattr(pretraining.Run, method)
    left = [2, 2]  # at once, for a session that ends sends more than one

    def fail_at_first() -> None:
        if left:
            left.pop()
            os.kill(os.getpid(), signal.SIGHUP)
            raise kind("Could not load C++ shared library")

    def change(*arguments: Any) -> Any:
        if method != "_compile_step":
            found = whole(*arguments)
            fail_at_first()
            return found
        step = whole(*arguments)
        return lambda number: (fail_at_first(), step(number))[1]

    monkeypatch.setattr(pretraining.Run, method, change)
    with pytest.raises(UserError, match="interrupted at step"):
        run(text, tmp_path / "run")
    run(None, tmp_path / "run", None, resume=True)
    same_end(tmp_path / "run", finished[0])
    left.append(1)
    monkeypatch.setattr(os, "kill", lambda *_: None)
    with pytest.raises(kind, match="Could not load"):  # without a signal it is a failure
        run(text, tmp_path / "other")


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="a Mac's GPU has no such compilers")
@pytest.mark.usefixtures("compiled")
def test_a_hangup_while_a_kernel_is_compiled(text: Path, tmp_path: Path):
    """The first compiler hangs up on its process group, as a terminal would."""
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin/g++"
    mark, real = tmp_path / "mark", shutil.which("g++")
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *.so) mkdir "{mark}" && kill -HUP 0 && exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    compiler.chmod(0o700)
    kernels = Path("mlx", mx.__version__, "cpu")
    (tmp_path / kernels).mkdir(parents=True)
    (tmp_path / kernels / "mlx").symlink_to(Path(tempfile.gettempdir()) / kernels / "mlx")
    recipe, out = dataclasses.replace(SMALL, steps=4), tmp_path / "run"
    command = [sys.executable, "-m", "mlx_skipless.cli", "train", "--data", text]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, "--mlx-path", out, *flags(recipe)],
        env=os.environ | {"TMPDIR": str(tmp_path), "PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    assert mark.is_dir()
    assert "error: interrupted at step 1: --resume goes on from there" in done.stderr
    run(None, out, None, resume=True)
    run(text, tmp_path / "whole", recipe)
    same_end(out, tmp_path / "whole")


def test_hangups_that_were_ignored_stay_ignored(text: Path, tmp_path: Path):
    """As under nohup, whose run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(text, tmp_path / "run", report=stop_at(6, signal.SIGHUP)).step == 12
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    finished: tuple[Path, Result], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing
        with pytest.raises(ZeroDivisionError):
            run(text, out, pace=dataclasses.replace(PACE, save_every=0), report=lambda e: 1 // 0)
        (out / "training/log.jsonl").write_text('{"step": 2, "tokens": 128, "loss": 9.0}\n')
        with pytest.raises(UserError, match=r"holds a run: --resume goes on with it, or give"):
            run(text, out)
        with pytest.raises(UserError, match="cannot be read"):
            run(tmp_path / "none.txt", out, None, resume=True)
    run(None, out, None, resume=True)
    same_end(out, finished[0])
    (tmp_path / "begun/training").mkdir(parents=True)
    resume_refused(tmp_path / "begun", "nothing to resume.*remove the folder and start it again")
    with pytest.raises(UserError, match="exists already: remove it"):
        run(text, tmp_path / "begun")


def test_an_interruption_between_two_lines_of_the_log(
    finished: tuple[Path, Result], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The line after it means all steps since the line before it, as if nothing had been."""
    out = tmp_path / "run"
    before = pretraining.Run._save

    def save(self: pretraining.Run) -> None:
        before(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretraining.Run, "_save", save)
        with pytest.raises(KeyboardInterrupt):
            run(text, out, pace=dataclasses.replace(PACE, save_every=5))
    run(None, out, None, resume=True)
    same_end(out, finished[0])


def test_a_second_signal_ends_at_once(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "run"
    monkeypatch.setattr(events, "describe_event", stop_at(6, signal.SIGINT, signal.SIGINT))
    assert command("train", "--data", text, "--mlx-path", out, *flags()) == 1
    assert one_error(capsys) == "error: interrupted\n"
    state: Any = mx.load(str(out / "training/state.safetensors"), return_metadata=True)
    assert state[1]["step"] == "4"


@pytest.mark.thorough
def test_other_steps_are_obeyed(text: Path, tmp_path: Path):
    """Rates that never fall do not depend on the end, so that six and six are twelve."""
    recipe = dataclasses.replace(SMALL, decay=0.0)
    run(text, tmp_path / "twelve", recipe)
    run(text, tmp_path / "six", dataclasses.replace(recipe, steps=6))
    result = run(None, tmp_path / "six", None, resume=True, steps=12)
    assert result.step == 12 and result.tokens == 12 * 64
    model = "model.safetensors"
    assert (tmp_path / "six" / model).read_bytes() == (tmp_path / "twelve" / model).read_bytes()


def test_an_older_run_goes_on_as_it_began(text: Path, tmp_path: Path):
    """Its recipe does not say that skips are learned, and they are."""
    recipe = dataclasses.replace(SMALL, decay=0.0, norms="q,k,v,heads", steps=8)
    run(text, tmp_path / "whole", recipe)
    run(text, tmp_path / "older", dataclasses.replace(recipe, steps=4))
    file = tmp_path / "older/training/run.json"
    settings = json.loads(file.read_text())
    assert settings["recipe"].pop("learn_skips") is None
    file.write_text(json.dumps(settings))
    run(None, tmp_path / "older", None, resume=True, steps=8)
    model = "model.safetensors"
    assert (tmp_path / "older" / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    skips = [w for n, w in mx.load(str(tmp_path / "whole" / model)).items() if "query_skip" in n]
    assert skips and all((w != 1).all().item() for w in skips)


def test_held_skips_stay_what_they_start_as(finished: tuple[Path, Result]):
    weights: Any = mx.load(str(finished[0] / "model.safetensors"))
    skips = [w for name, w in weights.items() if name.endswith("_skip")]
    assert len(skips) == 4 and all((w == 1).all().item() for w in skips)


def test_the_decay_moves_with_the_steps(finished: tuple[Path, Result], text: Path, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="interrupted"):
        run(text, out, report=stop_at(6, signal.SIGINT))
    assert command("train", "--resume", "--mlx-path", out, "--steps", 8) == 0
    rates = [event["learning_rate"] for event in read_log(out) if "loss" in event]
    assert rates[:3] == pytest.approx([0.02 * n / 12 for n in (11, 9, 7)], rel=1e-5)
    assert rates[3:] == pytest.approx([0.02 / 8], rel=1e-5)


def test_a_finished_run_resumed_says_the_same(text: Path, tmp_path: Path):
    out = tmp_path / "run"
    told: list[tuple[str, int, int]] = []
    first = run(text, out, progress=lambda *stage: told.append(stage))
    assert told == [("steps", n, 12) for n in range(13)]
    before = contents(out)
    again = run(None, out, None, resume=True)
    for key in ("step", "tokens", "parameters", "loss", "validation_loss", "bits_per_character"):
        assert getattr(again, key) == getattr(first, key), key
    after = contents(out)
    assert after.keys() == before.keys()
    for name in ("model.safetensors", "training/log.jsonl", "README.md"):
        assert after[name] == before[name], name


@pytest.mark.parametrize("log_every", [4, 0])  # step 4 is in the log, or no step is
def test_a_run_that_ends_where_it_was_interrupted(log_every: int, text: Path, tmp_path: Path):
    """Its loss is that of its last steps, and it is measured as any run that ends."""

    def progress(stage: str, done: int, total: int) -> None:
        if done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    out, pace = tmp_path / "run", Pace(log_every, 0, 0, 0)
    with pytest.raises(UserError, match="interrupted at step 4"):
        run(text, out, progress=progress, pace=pace)
    with safe_open(str(out / "training/state.safetensors"), "np") as state:
        kept = json.loads(state.metadata()["losses"])
    assert len(kept) == (0 if log_every else 4)
    result = run(None, out, None, resume=True, steps=4)
    mean = np.mean(kept) if kept else read_log(out)[0]["loss"]
    assert result.step == 4 and result.loss == pytest.approx(mean)
    assert f"training loss at the end: {mean:.4f}" in (out / "README.md").read_text()
    (measured,) = (e["validation_loss"] for e in read_log(out) if "validation_loss" in e)
    assert measured == result.validation_loss
    before = contents(out)
    assert run(None, out, None, resume=True).loss == result.loss
    assert contents(out) == before


def test_more_steps_are_the_run_s_own_from_then_on(
    finished: tuple[Path, Result], text: Path, tmp_path: Path
):
    """An interrupted run that was given more steps is resumed without saying so again."""
    run(None, whole := copied(finished, tmp_path / "whole"), None, resume=True, steps=18)
    out = copied(finished, tmp_path)
    with pytest.raises(UserError, match="interrupted at step 16"):
        run(None, out, None, resume=True, steps=18, report=stop_at(16, signal.SIGINT))
    assert run(None, out, None, resume=True).step == 18
    same_end(out, whole)


def test_two_at_once_in_one_folder(text: Path, tmp_path: Path):
    out, said = tmp_path / "run", []

    def intrude(event: Event) -> None:
        if event.get("step") == 6:
            with pytest.raises(UserError, match="another process trains in") as refused:
                run(None, out, None, resume=True)
            said.append(str(refused.value))

    assert run(text, out, report=intrude).step == 12
    assert said and len(read_log(out)) == len({json.dumps(event) for event in read_log(out)})


def test_a_run_interrupted_at_its_last_step_ends_whole(
    finished: tuple[Path, Result], text: Path, tmp_path: Path
):
    out = tmp_path / "run"
    with contextlib.suppress(UserError):
        run(text, out, report=stop_at(12, signal.SIGINT))
    if not (out / "README.md").exists():
        run(None, out, None, resume=True)
    same_end(out, finished[0])
    assert (out / "README.md").exists()


@pytest.mark.thorough
def test_bfloat16_goes_on_in_bfloat16(text: Path, tmp_path: Path):
    """The type of the arithmetic is the run's own; on a CPU "auto" would be float32."""
    run(text, tmp_path / "whole", dtype="bfloat16")
    with pytest.raises(UserError, match="interrupted"):
        run(text, tmp_path / "run", dtype="bfloat16", report=stop_at(6, signal.SIGINT))
    pretraining.train(None, tmp_path / "run", resume=True)
    same_end(tmp_path / "run", tmp_path / "whole")


def resume_refused(out: Path, says: str, **options: Any) -> None:
    before = contents(out.parent)
    with pytest.raises(UserError, match=says) as refusal:
        run(options.pop("data", None), out, None, resume=True, **options)
    assert "\n" not in str(refusal.value)
    assert contents(out.parent) == before


def copied(finished: tuple[Path, Result], folder: Path) -> Path:
    out = folder / "run"
    for name, content in contents(finished[0]).items():
        if content is None:
            (out / name).mkdir(parents=True)
        else:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
    return out


def test_resuming_on_other_text(finished: tuple[Path, Result], text: Path, tmp_path: Path):
    out = copied(finished, tmp_path)
    words, other = text.read_text(), tmp_path / "other.txt"
    last = words.rindex("the")
    for changed in (words.replace("cat", "dog"), words[:last] + "a" + words[last:]):
        other.write_text(changed)
        resume_refused(out, "was trained on other text", data=other)
    resume_refused(out, "was trained on other text", data=text, validation=[text])
    resume_refused(out, "cannot be read", data=tmp_path / "none.txt")
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text.read_bytes())
    assert run(moved, out, None, resume=True).step == 12


@pytest.mark.parametrize("steps", [11, 1, 0])
def test_resuming_with_fewer_steps(finished: tuple[Path, Result], tmp_path: Path, steps: int):
    says = "at step 12 already" if steps else "--steps 0: must be at least 1"
    resume_refused(copied(finished, tmp_path), says, steps=steps)


def test_resuming_what_is_no_run(finished: tuple[Path, Result], text: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    resume_refused(tmp_path / "empty", "there is nothing to resume")
    resume_refused(tmp_path / "none", "there is nothing to resume")
    out = copied(finished, tmp_path)
    state, settings = (out / "training" / name for name in ("state.safetensors", "run.json"))
    whole, given = state.read_bytes(), json.loads(settings.read_text())
    for broken in (b"", whole[:1000], whole[:-100], b"once upon a time"):
        state.write_bytes(broken)
        resume_refused(out, "cannot be resumed from")
    (tmp_path / "other").mkdir()
    run(text, tmp_path / "other/run", dataclasses.replace(SMALL, layers=1, steps=2))
    state.write_bytes((tmp_path / "other/run/training/state.safetensors").read_bytes())
    resume_refused(out, "another network")
    state.write_bytes(whole)
    for broken in ({}, given | {"recipe": {"depth": 1}}, given | {"pace": {"x": 1}}):
        settings.write_text(json.dumps(broken))
        resume_refused(out, r"is not of this version|no part of a (recipe|pace)")
    settings.write_text("{")
    resume_refused(out, "JSON")
    settings.write_text(json.dumps({"treatment": {}, "pace": {}, "sources": {}}))
    resume_refused(out, "holds a run of `heal`")


@pytest.mark.parametrize(
    "flag",
    [
        ["--layers", "3"],
        ["--log-every", "3"],
        ["--no-tie"],
        ["--config", "x.yaml"],
        ["--tokenizer", "x"],
        ["--dtype", "bfloat16"],
        ["--validation", "x"],
        ["--validation-share", "0.5"],
        ["--validation-share", "0.03"],
    ],
)
def test_resuming_takes_no_other_recipe(
    finished: tuple[Path, Result], flag: list[str], capsys: pytest.CaptureFixture[str]
):
    before = contents(finished[0])
    assert command("train", "--resume", "--mlx-path", finished[0], *flag) == 2
    said = one_error(capsys)
    assert "only --steps may change" in said and flag[0].replace("--no-", "--") in said
    assert contents(finished[0]) == before


def test_a_tokenizer_has_its_own_size(text: Path, capsys: pytest.CaptureFixture[str]):
    given = ["--tokenizer", "x", "--vocab-size", "300"]
    assert command("train", "--data", text, "--mlx-path", "never", *given) == 2
    assert "--vocab-size is for the tokenizer that is made" in one_error(capsys)


# Failures


def poison(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless learning rate at one step, counted from 0, leaves no number in the weights."""
    sane = optimizer.make_schedule

    def make_schedule(recipe: Recipe, peak: float) -> Schedule:
        rate = sane(recipe, peak)
        return lambda step: mx.where(step == at, mx.array(math.inf), rate(step))

    monkeypatch.setattr(optimizer, "make_schedule", make_schedule)


@pytest.mark.parametrize(
    ("at", "told", "kept"), [(4, 6, 4), (5, 7, 4), (7, 8, 4), (8, 10, 8), (10, 12, 8), (11, 12, 8)]
)
def test_a_loss_that_is_no_number_stops(
    text: Path,
    tmp_path: Path,
    at: int,
    told: int,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """By its loss in the next step, or by its weights where it would be saved."""
    out = tmp_path / "run"
    copies = {}
    sane_save = pretraining.Run._save

    def save(self: pretraining.Run) -> None:
        sane_save(self)
        copies[self._step] = saved(out)

    with monkeypatch.context() as patch:
        poison(at, patch)
        patch.setattr(pretraining.Run, "_save", save)
        assert command("train", "--data", text, "--mlx-path", out, *flags()) == 1
    error = one_error(capsys)
    assert f"no number any more at step {told}: the checkpoint of step {kept} is kept" in error
    assert "--learning-rate" in error
    assert saved(out) == copies[kept] and no_partial_files(out)
    assert all(math.isfinite(event.get("loss", 0)) for event in read_log(out))
    assert mlx_skipless.load(out)


def test_an_absurd_learning_rate(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = dataclasses.replace(SMALL, learning_rate=1e38)
    assert command("train", "--data", text, "--mlx-path", tmp_path / "run", *flags(recipe)) == 1
    assert "nothing was saved yet" in one_error(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError, ZeroDivisionError])
@pytest.mark.parametrize("where", ["begin", "go", "_log", "_evaluate"])
def test_a_failure_before_the_first_checkpoint_leaves_nothing(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    failure: type[BaseException],
):
    def fail(*arguments: Any) -> None:
        raise failure("in the middle")

    monkeypatch.setattr(pretraining.Run, where, fail)
    with pytest.raises(failure):
        run(text, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipe": dataclasses.replace(SMALL, context=10**6)}, "too few for a context"),
        ({"recipe": dataclasses.replace(SMALL, hidden_size=2**20)}, "hidden_size"),
        ({"recipe": dataclasses.replace(SMALL, vocab_size=10**5)}, "--vocab-size 100000"),
        ({"tokenizer": "@/none"}, "none"),
        ({"tokenizer": "@"}, "tokenizer"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"data": None}, "--data is missing"),
        ({"data": "@/none.txt"}, r"none\.txt cannot be read"),
        ({"out": "@/no/run"}, "is no folder: create it first"),
        ({"validation_share": 1.0}, "--validation-share"),
        ({"validation": ["x"], "validation_share": 0.5}, "--validation's are taken whole"),
        ({"steps": 3}, "steps is for a run to resume"),
        ({"recipe": {"layers": 2}}, "recipe {'layers': 2}: must be a Recipe"),
        ({"pace": 5}, "pace 5: must be a TrainingPace"),
    ],
)
def test_what_cannot_be_leaves_nothing(
    text: Path, tmp_path: Path, options: dict[str, Any], says: str
):
    options = {"data": text, "out": tmp_path / "run"} | {
        key: value.replace("@", str(tmp_path)) if isinstance(value, str) else value
        for key, value in options.items()
    }
    data, out = options.pop("data"), Path(options.pop("out"))
    with pytest.raises(UserError, match=says) as refusal:
        run(data and Path(data), out, **options)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_that_begin_at_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One begins after the other has looked whether the folder is free."""
    out, before = tmp_path / "run", RunFolder.check_free

    def check(folder: RunFolder) -> None:
        before(folder)
        (folder.path / "training").mkdir(parents=True)
        (folder.path / "training/run.json").write_text("the other's")

    monkeypatch.setattr(RunFolder, "check_free", check)
    with pytest.raises(UserError, match=r"holds a run: --resume goes on with it, or give"):
        run(text, out)
    assert (out / "training/run.json").read_text() == "the other's"


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(Pace)])
def test_a_pace_below_zero(key: str):
    with pytest.raises(UserError, match=f"--{key.replace('_', '-')}: must be at least 0"):
        Pace(**{key: -1})


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_lies_there_stays(
    text: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    assert command("train", "--data", text, "--mlx-path", out, *flags()) == 1
    assert "exists already" in one_error(capsys)
    assert list(tmp_path.iterdir()) == [out]
    if kind != "link":
        assert (out if kind == "file" else out / "mine").read_text() == "mine"


def test_a_disk_without_room_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(UserError, match="GB free"):
        run(text, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["state", "model"])
def test_a_checkpoint_that_cannot_be_written(
    finished: tuple[Path, Result],
    text: Path,
    tmp_path: Path,
    failing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The one before it stays whole, and the run can go on from there."""
    out = tmp_path / "run"
    write, before = mx.save_safetensors, {}

    def full(file: str, *arguments: Any) -> None:
        if (out / "training/loss.png").exists():
            before.setdefault("saved", saved(out))
            if Path(file).name.startswith(failing):
                Path(file).write_bytes(b"half")
                raise RuntimeError("[write] Unable to write\nto the file")
        write(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        assert command("train", "--data", text, "--mlx-path", out, *flags()) == 1
    error = one_error(capsys)
    assert f"saving step 8 to {out} failed" in error and "step 4 is kept" in error
    after = saved(out)
    assert after["model.safetensors"] == before["saved"]["model.safetensors"]
    if failing == "state":
        assert after == before["saved"]
    assert no_partial_files(out)
    run(None, out, None, resume=True)
    same_end(out, finished[0])


FULL_DISK = """
import resource, signal, sys
from mlx_skipless import cli
from mlx_skipless.cli import events

def report(event):
    if event["step"] == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

events.describe_event = report
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.thorough
def test_a_full_disk(finished: tuple[Path, Result], text: Path, tmp_path: Path):
    out = tmp_path / "run"
    arguments = ["train", "--data", text, "--mlx-path", out, *flags()]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: saving step 8") and done.stderr.count("\n") == 1
    assert "the checkpoint of step 4 is kept" in done.stderr
    assert no_partial_files(out)
    state: Any = mx.load(str(out / "training/state.safetensors"), return_metadata=True)
    assert state[1]["step"] == "4"
    stored: Any = mx.load(str(out / "model.safetensors"))
    for name, weight in stored.items():
        assert mx.array_equal(weight, state[0][f"weights.{name}"]).item()
    run(None, out, None, resume=True)
    same_end(out, finished[0])


# Commands


def test_the_command_is_the_function(
    finished: tuple[Path, Result], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    report = tmp_path / "result.json"
    arguments = ["--data", text, "--mlx-path", out, *flags(), "--json", report]
    assert command("train", *arguments) == 0
    same_end(out, finished[0])
    result = json.loads(report.read_text())
    expected = finished[1].as_dict()
    assert result.keys() == expected.keys()
    for key in ("step", "tokens", "parameters", "loss", "validation_loss", "bits_per_character"):
        assert result[key] == expected[key]
    assert result["output"] == str(out)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"{expected['parameters']:,} weights" in printed.out
    for event in read_log(out):
        if "loss" in event:
            assert f"step {event['step']:>6,}  loss {event['loss']:.4f}" in printed.out
        elif "validation_loss" in event:
            assert f"held-out loss {event['validation_loss']:.4f}" in printed.out
        else:
            assert f"sample: {make_visible(event['sample'])}" in printed.out
    assert f"wrote {out}" in printed.out


@pytest.mark.parametrize("where", ["no/result.json", "."])
def test_json_that_cannot_be_written_is_refused_before(
    text: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--data", text, "--mlx-path", tmp_path / "run", *flags()]
    assert command("train", *arguments, "--json", tmp_path / where) == 1
    assert "--json" in one_error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_json_in_the_place_of_the_run_is_refused_before(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    assert command("train", "--data", text, "--mlx-path", out, *flags(), "--json", out) == 2
    assert "--json" in one_error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_from_yaml_and_flags_that_come_first(text: Path, tmp_path: Path):
    recipe = {"hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1,
              "vocab_size": 300, "context": 16, "steps": 5, "batch_size": 4,
              "gate_offset": None, "tie": False, "learning_rate": 0.01}  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # which is YAML
    first = ["--steps", 2, "--tie", "--value-skip", "none", "--log-every", 1]
    out = tmp_path / "run"
    assert command("train", "--data", text, "--mlx-path", out, "--config", file, *first) == 0
    used = json.loads((out / "training/run.json").read_text())["recipe"]
    given = recipe | {"steps": 2, "tie": True, "value_skip": None}
    assert used == dataclasses.asdict(Recipe()) | given
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] and not config["gate_offset"] and not config["value_skip"]


@pytest.mark.parametrize(
    ("content", "given", "says"),
    [
        ("heads: 3", [], "--config {}: --heads 3: must divide --hidden-size 256"),
        ("heads: 3", ["--hidden-size", "48"], "--config {}: --kv-heads 2: must divide --heads 3"),
        ("hidden_size: 48", ["--heads", "5"], "--heads 5: must divide --hidden-size 48"),
        ("heads: 3", ["--hidden-size", "48", "--kv-heads", "1"], None),
    ],
)
def test_a_recipe_is_judged_together_with_its_flags(
    content: str,
    given: list[str],
    says: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def begin(*_: Any, recipe: Recipe, **__: Any) -> None:
        raise UserError(f"{recipe.hidden_size} {recipe.heads} {recipe.kv_heads}")

    monkeypatch.setattr(pretraining, "train", begin)
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    assert command("train", "--data", "x", "--config", file, *given) in (1, 2)
    said = "48 3 1" if says is None else says.format(file)
    assert one_error(capsys) == f"error: {said}\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"", "must map"),
        (b"- 1", "must map"),
        (b"layers: [", "recipe.yaml: line 1: expected the node content"),
        (b"layers: 2\nsteps: @", "recipe.yaml: line 2: "),
        (b"\xff\xfe\xfa", "recipe.yaml"),
        (b"depth: 4", "'depth' is no part of a recipe"),
        (b"layers: many", "must be a whole number"),
        (b"block: ring", "choose one of"),
        (b"steps: " + b"[" * 9999, "recipe.yaml"),
        (b"steps: 2001-99-99", "recipe.yaml"),
        (b"steps: " + b"9" * 5000, "recipe.yaml"),
        (b"steps: " + b"9" * 400, "must be below 2,147,483,648"),
        (b"clip: .nan", "clip"),
        (b"steps: 3\nlayers: 2\nsteps: 4", "recipe.yaml: 'steps' is there twice"),
        (b"1: 2", "1 is no part of a recipe"),
        (
            b"a: &a [x]\n"
            + b"".join(
                b"%c: &%c [%s]\n" % (i + 1, i + 1, b", ".join([b"*%c" % i] * 9))
                for i in range(97, 113)
            ),
            "'a' is no part of a recipe",
        ),
        (
            b"steps: [&a [x]"
            + b"".join(
                b", &%c [%s]" % (i + 1, b", ".join([b"*%c" % i] * 9)) for i in range(97, 113)
            )
            + b"]",
            "must be a whole number",
        ),
    ],
)
def test_yaml_that_is_no_recipe(
    text: Path, tmp_path: Path, content: bytes | None, says: str, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_bytes(content)
    out = tmp_path / "run"
    assert command("train", "--data", text, "--mlx-path", out, "--config", file) == 1
    assert says in one_error(capsys)
    assert not out.exists()


def test_an_exponent_in_yaml_is_a_number(text: Path, tmp_path: Path):
    """Where YAML 1.1 reads a word, as nobody means it."""
    file = tmp_path / "recipe.yaml"
    file.write_text("learning_rate: 2e-2\n")
    arguments = ["--data", text, "--mlx-path", tmp_path / "run", *flags()]
    assert command("train", *arguments, "--config", file) == 0


# Curves and logs


@pytest.fixture
def figures(curves: None, monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written from here on."""
    seen: list[Figure] = []
    write = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **options: Any) -> None:
        seen.append(self)
        write(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def drawn(figure: Figure) -> list[np.ndarray]:
    """The points (n, 2) of each line."""
    return [np.array(line.get_xydata()) for line in figure.axes[0].lines]


@pytest.mark.usefixtures("curves")
def test_a_run_draws_its_curve(finished: tuple[Path, Result], tmp_path: Path):
    run(None, copied(finished, tmp_path), None, resume=True)
    file = tmp_path / "run/training/loss.png"
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert matplotlib.image.imread(file).shape[:2] == (600, 960)


def test_curves_of_runs(
    finished: tuple[Path, Result],
    whole: Path,
    tmp_path: Path,
    figures: list[Figure],
    capsys: pytest.CaptureFixture[str],
):
    assert command("curves", finished[0], whole, "--output", tmp_path / "both.png") == 0
    assert "both.png" in capsys.readouterr().out
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = drawn(figures[0])
    for i, out in enumerate((finished[0], whole)):
        events = read_log(out)
        tokens = {e["step"]: e["step"] * 64 / 1e6 for e in events}
        for line, key in ((lines[2 * i], "loss"), (lines[2 * i + 1], "validation_loss")):
            points = [(tokens[e["step"]], e[key]) for e in events if key in e]
            assert np.allclose(line, points)
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[::2] == ["finished, training", "whole, training"]
    assert [label.split(":")[0] for label in labels[1::2]] == [
        "finished, held out",
        "whole, held out",
    ]
    assert labels[1].endswith(f": {finished[1].validation_loss:.3f}")


@pytest.mark.parametrize("old", [False, True], ids=["log of this version", "of an older one"])
@pytest.mark.parametrize("log_every", [0, 3, 5, 7])
def test_evaluations_between_lines_of_the_log_are_drawn(
    log_every: int, old: bool, tmp_path: Path, figures: list[Figure]
):
    """Also those after the last line of the log, and those that are worse than all that came."""
    events: list[Event] = []
    for step in range(1, 23):
        if log_every and step % log_every == 0:
            events.append({"step": step, "tokens": 64 * step, "loss": 5 - step / 10})
        if step % 2 == 0:
            event = {"step": step, "tokens": 64 * step, "validation_loss": 3 + step / 5}
            events.append({k: v for k, v in event.items() if not old or k != "tokens"})
    (tmp_path / "run/training").mkdir(parents=True)
    log = tmp_path / "run/training/log.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert command("curves", tmp_path / "run", "--output", tmp_path / "x.svg") == 0
    per_step = 64 if log_every or not old else 1  # nothing says how many tokens
    line = drawn(figures[0])[-1]
    assert np.allclose(line, [(per_step * n / 1e6, 3 + n / 5) for n in range(2, 23, 2)])
    low, high = figures[0].axes[0].get_ylim()
    assert low < line[:, 1].min() and line[:, 1].max() < high


def test_curves_of_runs_with_one_name(
    finished: tuple[Path, Result], whole: Path, tmp_path: Path, figures: list[Figure]
):
    places = []
    for name, source in (("a", finished[0]), ("b", whole)):
        log = tmp_path / name / "run/training/log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_bytes((source / "training/log.jsonl").read_bytes())
        places.append(log.parent.parent)
    assert command("curves", *places, "--output", tmp_path / "both.png") == 0
    assert len(drawn(figures[0])) == 4
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert len(set(labels)) == 4


@pytest.mark.usefixtures("curves")
def test_curves_of_a_run_with_an_odd_name(finished: tuple[Path, Result], tmp_path: Path):
    out = tmp_path / r"$\run$"
    (out / "training").mkdir(parents=True)
    (out / "training/log.jsonl").write_bytes((finished[0] / "training/log.jsonl").read_bytes())
    assert command("curves", out, "--output", tmp_path / "x.png") == 0


@pytest.mark.parametrize("place", [".", "training/.."])
def test_a_run_is_called_by_its_folder_wherever_one_stands(
    place: str, finished: tuple[Path, Result], tmp_path: Path, figures: list[Figure],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    out = copied(finished, tmp_path)
    monkeypatch.chdir(out)
    assert command("curves", place, "--output", tmp_path / "x.png") == 0
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels and all(label.startswith(f"{out.name}, ") for label in labels)
    run(None, Path(place), None, resume=True)
    assert (out / "README.md").read_text() == (finished[0] / "README.md").read_text().replace(
        "# finished", f"# {out.name}"
    )


def test_curves_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command("curves", tmp_path, "--output", tmp_path / "x.png") == 1
    assert "is no training run" in one_error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_curves_that_cannot_be_written(
    finished: tuple[Path, Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert command("curves", finished[0], "--output", tmp_path / "no/x.png") == 1
    one_error(capsys)


def test_a_log_that_ends_in_the_middle(tmp_path: Path):
    (tmp_path / "training").mkdir()
    assert read_log(tmp_path) == []
    log = tmp_path / "training/log.jsonl"
    log.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.5}]
    whole = {"step": 0, "before": {"kl": 0.5}}
    for cut in (1, 2, 9):  # the first only lacks its end of the line
        log.write_text(f'{{"step": 0}}\n{json.dumps(whole)}\n'[:-cut])
        assert read_log(tmp_path) == [{"step": 0}, *([whole] if cut == 1 else [])]
    log.write_text('{"step": 0, "before": {"loss": 1.0}}\n')
    with pytest.raises(UserError, match=r"log\.jsonl cannot be read"):
        read_log(tmp_path)
    log.write_text('{"step": 1}\n{no}\n')
    with pytest.raises(UserError, match=r"log\.jsonl cannot be read"):
        read_log(tmp_path)
