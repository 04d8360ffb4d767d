"""Healing: the loss against NumPy, runs that stop and go on, and the models that result."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
from compiling import compiling
from factory import make_checkpoint, make_llama
from reference import Config, Weights
from zoo import make_model

import mlx_skipless
from mlx_skipless.cli import events
from mlx_skipless.cli.main import main
from mlx_skipless.text import corpus, samples
from mlx_skipless.training import healing
from mlx_skipless.training.folder import Event, read_log
from mlx_skipless.training.healing import Pair
from mlx_skipless.training.recipe import Pace, Treatment
from mlx_skipless.training.results import HealingResult as Result

SMALL = Treatment(steps=8, batch_size=2, context=24, sampled_tokens=1024, warmup=2, rank=4)
SHORT = dataclasses.replace(SMALL, steps=2)
PACE = Pace(log_every=2, eval_every=4, save_every=4, eval_tokens=96)
SPOKEN = 64  # tokens in a row; fewer are quicker
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}


HALVED = {"data": ["@/text.txt"], "validation_share": 0.5}


@pytest.fixture(scope="module", autouse=True)
def short_texts() -> Iterator[None]:
    """The original speaks few tokens in a row, of more texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(healing, "SPOKEN", SPOKEN)
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, Weights]:
    """A folder with a Llama "s", "r" without two of its attentions, and "q", that quantized."""
    folder = tmp_path_factory.mktemp("pair")
    config, weights = make_llama(folder / "s", **SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "CALIBRATION", (16, 16))
        patch.setattr(samples, "LONG_CHECK", (4, 32))
        for name, options in (
            ("r", {}),
            ("q", {"quantize": True, "q_bits": 8, "q_group_size": 32}),
        ):
            mlx_skipless.convert(folder / "s", folder / name, drop_attention=2, **options)  # type: ignore[arg-type]
    return folder, reference.llama_config(config), weights


@pytest.fixture(scope="module", params=["lora", "full"])
def whole(
    request: pytest.FixtureRequest,
    pair: tuple[Path, Config, Weights],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Treatment, Path, Result]:
    """A run that nothing stopped."""
    treatment = dataclasses.replace(SMALL, fine_tune_type=request.param)
    out = tmp_path_factory.mktemp("whole") / "h"
    with steps_of(treatment):
        result = mlx_skipless.heal(pair[0] / "r", pair[0] / "s", out, treatment, pace=PACE)
    return treatment, out, result


def steps_of(treatment: Treatment) -> contextlib.AbstractContextManager[None]:
    """Steps with adapters are compiled; those of all weights take twice as many kernels."""
    return compiling() if treatment.fine_tune_type == "lora" else contextlib.nullcontext()


def held_out(out: Path) -> np.ndarray:
    """The windows that measure, (count, length + 1)."""
    tokens: Any = mx.load(str(out / "training/tokens.safetensors"))
    (batch,) = corpus.cut_windows(np.array(tokens["held_out"]), 24, 100)
    return batch


def stock_weights(folder: Path) -> Weights:
    arrays: Any = mx.load(str(folder / "model.safetensors"))
    return {name: np.array(array).astype(np.float64) for name, array in arrays.items()}


def nll(logits: np.ndarray, targets: np.ndarray) -> float:
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(np.take_along_axis(log_p, targets[..., None], axis=-1).mean())


def log_of(out: Path) -> list[Any]:
    """What a run logged but for clock and memory."""
    own = {"tokens_per_second", "memory_bytes"}
    return [{k: v for k, v in event.items() if k not in own} for event in read_log(out)]


def same_end(out: Path, other: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert log_of(out) == log_of(other)


def test_a_link_out_of_the_model_is_not_copied(
    pair: tuple[Path, Config, Weights], tmp_path: Path
) -> None:
    """mlx-lm would copy it beside the result, code that nobody trusts too."""
    shutil.copytree(pair[0] / "r", tmp_path / "r")
    (tmp_path / "secret").write_text("{}")
    for name in ("generation_config.json", "own.py"):
        (tmp_path / "r" / name).symlink_to(tmp_path / "secret")
        with pytest.raises(mlx_skipless.UserError, match=f"{name} leads out of its folder"):
            mlx_skipless.heal(tmp_path / "r", pair[0] / "s", tmp_path / "h", SMALL, pace=PACE)
        (tmp_path / "r" / name).unlink()
    assert not (tmp_path / "h").exists()


def test_a_run_says_what_it_was(
    whole: tuple[Treatment, Path, Result], pair: tuple[Path, Config, Weights]
) -> None:
    """Both distances, by NumPy from the folders; and it got better."""
    treatment, out, result = whole
    _, config, weights = pair
    rows = held_out(out)
    wanted = reference.logits(config, weights, rows[:, :-1])
    for folder, found in ((pair[0] / "r", result.before), (out, result.after)):
        got = reference.logits(config, stock_weights(folder), rows[:, :-1])
        assert found.kl == pytest.approx(reference.softmax_kl(wanted, got), rel=1e-3)
        assert found.loss == pytest.approx(nll(got, rows[:, 1:]), rel=1e-4)
        assert found.teacher_loss == pytest.approx(nll(wanted, rows[:, 1:]), rel=1e-4)
        assert found.tokens == rows[:, 1:].size
    assert result.after.kl < 0.95 * result.before.kl
    events = read_log(out)
    assert events[0]["before"] == dataclasses.asdict(result.before)
    assert events[-1]["after"] == dataclasses.asdict(result.after)
    assert [e["step"] for e in events if "loss" in e] == [2, 4, 6, 8]
    assert result.tokens == 8 * 2 * 24 and result.text == "sampled"
    card = (out / "README.md").read_text()
    assert f"{result.after.kl:.4f}" in card and f"learning_rate: {treatment.peak}" in card
    run = json.loads((out / "training/run.json").read_text())
    assert run["treatment"]["learning_rate"] == treatment.peak


def test_the_first_step_follows_the_gradient_of_kl(
    pair: tuple[Path, Config, Weights], tmp_path: Path
) -> None:
    """Adam's first step is the learning rate times the gradient's sign, by finite differences."""
    folder, config, weights = pair
    treatment = dataclasses.replace(
        SMALL, fine_tune_type="full", steps=1, warmup=0, learning_rate=1e-5, clip=1e9
    )
    mlx_skipless.heal(
        folder / "r", folder / "s", tmp_path / "h", treatment,
        pace=dataclasses.replace(PACE, log_every=1),
    )  # fmt: skip
    tokens: Any = mx.load(str(tmp_path / "h/training/tokens.safetensors"))
    batch = corpus.Batches(np.array(tokens["train"]), 24, 2, treatment.seed).make_batch(0)[:, :-1]
    wanted = reference.logits(config, weights, batch)
    before, after = stock_weights(folder / "r"), stock_weights(tmp_path / "h")

    def kl(changed: Weights) -> float:
        return reference.softmax_kl(wanted, reference.logits(config, changed, batch))

    (event,) = [e for e in read_log(tmp_path / "h") if "loss" in e]
    assert event["loss"] == pytest.approx(kl(before), rel=1e-4)
    assert event["learning_rate"] == pytest.approx(1e-5)
    rng = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight",
                 "model.norm.weight", "lm_head.weight"):  # fmt: skip
        direction = rng.normal(size=before[name].shape)
        if "embed" in name:  # rows that the batch has
            direction *= np.isin(np.arange(len(direction)), batch)[:, None]
        h = 1e-4 / np.linalg.norm(direction)
        slope = (
            kl(before | {name: before[name] + h * direction})
            - kl(before | {name: before[name] - h * direction})
        ) / (2 * h)
        moved = after[name] - before[name]
        assert np.abs(moved).max() == pytest.approx(1e-5, rel=0.05)
        gain = kl(before | {name: after[name]}) - kl(before)
        assert gain < 0 and np.isfinite(slope)
        # The step lowers KL by as much as the slope along it says.
        along = moved / np.linalg.norm(moved)
        h = 1e-3
        slope = (
            kl(before | {name: before[name] + h * along})
            - kl(before | {name: before[name] - h * along})
        ) / (2 * h)
        assert gain == pytest.approx(slope * np.linalg.norm(moved), rel=0.05)


def stop_at(step: int, *signals: int) -> Callable[[Event], None]:
    def report(event: Event) -> None:
        if event["step"] == step and "loss" in event:
            for which in signals:
                os.kill(os.getpid(), which)

    return report


def flags(treatment: Treatment) -> list[str]:
    options = {**dataclasses.asdict(treatment), **dataclasses.asdict(PACE)}
    given = [(f"--{k.replace('_', '-')}", str(v)) for k, v in options.items() if v is not None]
    return [text for option in given for text in option]


def test_a_resumed_run_is_the_whole_one(
    whole: tuple[Treatment, Path, Result],
    pair: tuple[Path, Config, Weights],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit, and until then there is no model in its folder."""
    with steps_of(whole[0]):
        resume_what_was_stopped(whole, pair, tmp_path, monkeypatch, capsys)


def resume_what_was_stopped(
    whole: tuple[Treatment, Path, Result],
    pair: tuple[Path, Config, Weights],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    treatment, finished, result = whole
    out = tmp_path / "h"
    models = ["--model", str(pair[0] / "r"), "--teacher", str(pair[0] / "s")]
    with monkeypatch.context() as patch:
        patch.setattr(events, "describe_event", stop_at(6, signal.SIGHUP, signal.SIGHUP))
        assert main(["heal", *models, "--mlx-path", str(out), *flags(treatment)]) == 1
    assert "interrupted at step 6: --resume goes on" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["training"]
    assert main(["heal", "--resume", "--mlx-path", str(out), "--json", str(tmp_path / "j")]) == 0
    same_end(out, finished)
    said = json.loads((tmp_path / "j").read_text())
    assert said["before"] == dataclasses.asdict(result.before)
    assert said["after"] == dataclasses.asdict(result.after)
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and f"{result.after.kl:.4f}" in printed
    # A run at its end writes the same again.
    (out / "model.safetensors").unlink()
    assert main(["heal", "--resume", "--mlx-path", str(out)]) == 0
    same_end(out, finished)
    assert main(["heal", "--resume", "--mlx-path", str(out), "--validation-share", "0.5"]) == 2
    assert "only --steps may change" in capsys.readouterr().err
    assert main(["heal", "--resume", "--mlx-path", str(out), "--steps", "4"]) == 1
    assert "at step 8 already" in capsys.readouterr().err


def test_more_steps(pair: tuple[Path, Config, Weights], tmp_path: Path) -> None:
    folder = pair[0]
    mlx_skipless.heal(folder / "r", folder / "s", tmp_path / "h", SMALL, pace=PACE)
    result = mlx_skipless.heal(None, None, tmp_path / "h", resume=True, steps=10)
    assert result.step == 10
    assert [e["step"] for e in read_log(tmp_path / "h") if "after" in e] == [8, 10]


STUDENTS: list[Any] = [  # with bfloat16 all weights are trained
    pytest.param(
        {"block": "parallel", "norm": "pre", "skip": "both"},
        {"drop_attention": 1},
        "float32",
        marks=pytest.mark.thorough,
    ),
    ({"norm": "pre", "skip": "both", "tie_word_embeddings": True}, {"drop_ffn": 1}, "bfloat16"),
    ({"norm": "qkv"}, {"quantize": True, "q_bits": 8, "q_group_size": 32}, "float32"),
]


@pytest.mark.parametrize(("config", "options", "dtype"), STUDENTS, ids=str)
def test_our_own_networks(
    config: Config,
    options: dict[str, Any],
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Healed in the types and packing that they have."""
    monkeypatch.setattr(samples, "CALIBRATION", (16, 16))
    monkeypatch.setattr(samples, "LONG_CHECK", (4, 32))
    make_checkpoint(tmp_path / "s", dtype=dtype, **SIZES | config)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "r[1]", **options)
    kind = "full" if dtype == "bfloat16" else "lora"
    treatment = dataclasses.replace(SMALL, fine_tune_type=kind)
    result = mlx_skipless.heal(
        tmp_path / "r[1]", tmp_path / "s", tmp_path / "h", treatment, pace=PACE
    )
    reduced: Any = mx.load(str(tmp_path / "r[1]/model.safetensors"))
    healed: Any = mx.load(str(tmp_path / "h/model.safetensors"))
    assert {k: (a.shape, a.dtype) for k, a in reduced.items()} == {
        k: (a.shape, a.dtype) for k, a in healed.items()
    }
    state: Any = mx.load(str(tmp_path / "h/training/state.safetensors"))
    trained = [array for name, array in state.items() if name.startswith("weights.")]
    assert {array.dtype for array in trained} == {mx.float32}  # where small steps add up
    helped = result.after.kl < result.before.kl
    assert helped == ("quantize" not in options)  # those matrices were fitted to begin with
    assert ("it did not help" in (tmp_path / "h/README.md").read_text()) == (not helped)
    rows = mx.array(held_out(tmp_path / "h"))
    trust = {"trust_remote_code": True}
    (a, _), (b, _) = (mlx_skipless.load(tmp_path / "s"), mlx_lm.load(str(tmp_path / "h"), **trust))  # type: ignore[arg-type]
    wanted, got = (np.array(m(rows[:, :-1]).astype(mx.float32)) for m in (a, b))
    measured = reference.softmax_kl(wanted, got)
    assert result.after.kl == pytest.approx(measured, rel=0.02 if dtype == "float32" else 0.2)


def test_a_quantized_student(pair: tuple[Path, Config, Weights], tmp_path: Path) -> None:
    """What is measured is what is written: fused and packed again."""
    folder, config, weights = pair
    result = mlx_skipless.heal(folder / "q", folder / "s", tmp_path / "h", SMALL, pace=PACE)
    assert result.after.kl < 0.95 * result.before.kl
    settings = [json.loads((f / "config.json").read_text()) for f in (folder / "q", tmp_path / "h")]
    assert settings[0]["quantization"] == settings[1]["quantization"]
    rows = held_out(tmp_path / "h")
    model, _ = mlx_lm.load(str(tmp_path / "h"))  # type: ignore[misc]
    got = np.array(model(mx.array(rows[:, :-1])))
    wanted = reference.logits(config, weights, rows[:, :-1])
    assert result.after.kl == pytest.approx(reference.softmax_kl(wanted, got), rel=1e-3)


def test_the_users_text(pair: tuple[Path, Config, Weights], tmp_path: Path) -> None:
    """Read as train reads it."""
    folder = pair[0]
    (tmp_path / "a.txt").write_text("once upon a time there was a king\n" * 40)
    (tmp_path / "b.txt").write_text("the fox met the crow\n" * 10)
    result = mlx_skipless.heal(
        folder / "r", folder / "s", tmp_path / "h", SMALL, pace=PACE,
        data=[tmp_path / "a.txt"], validation=[tmp_path / "b.txt"],
    )  # fmt: skip
    assert result.text == "a.txt" and result.after.kl < result.before.kl
    tokens: Any = mx.load(str(tmp_path / "h/training/tokens.safetensors"))
    _, tokenizer = mlx_skipless.load(folder / "s")
    for name, line, count in (("train", "once upon a time there was a king\n", 40),
                              ("held_out", "the fox met the crow\n", 10)):  # fmt: skip
        said = tokenizer.decode(tokens[name].tolist()[:-1])
        assert said.rstrip("\n") == (line * count).rstrip("\n")


@pytest.mark.parametrize("which", ["model", "teacher"])
def test_a_resumed_run_has_the_models_that_it_had(
    which: str,
    pair: tuple[Path, Config, Weights],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wherever they are now; others, of the same shapes, are refused."""
    for name in "sr":
        shutil.copytree(pair[0] / name, tmp_path / name)
    out = str(tmp_path / "h")
    mlx_skipless.heal(tmp_path / "r", tmp_path / "s", out, SHORT, pace=PACE)
    (tmp_path / "s").rename(tmp_path / "s2")
    (tmp_path / "r").rename(tmp_path / "r2")
    found = ["--model", str(tmp_path / "r2"), "--teacher", str(tmp_path / "s2")]
    again = ["heal", "--resume", "--mlx-path", out, "--steps", "3"]
    assert main(again) == 1 and "no such file or folder" in capsys.readouterr().err
    assert main([*again, *found]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    file = str(tmp_path / ("r2" if which == "model" else "s2") / "model.safetensors")
    weights: Any = mx.load(file)
    mx.eval(weights)
    weights["model.norm.weight"] *= 1.01
    mx.save_safetensors(file, weights)
    assert main(["heal", "--resume", "--mlx-path", out, "--steps", "4"]) == 1
    assert f"was begun with another --{which} than" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def test_texts_are_no_longer_than_the_models_were_made_for(tmp_path: Path) -> None:
    """A network with a table of positions speaks to its end, and a longer context is told."""
    make_model(tmp_path / "g", "gpt2", n_positions=48, n_ctx=48)
    model, tokenizer = mlx_skipless.load(tmp_path / "g")
    sources = healing.Sources([], [], 0.0, "", "")
    tokens = healing.make_tokens(sources, SMALL, Pair(model, model, tokenizer))
    rows = np.concatenate([tokens.held_out, tokens.train]).reshape(-1, 48)
    logits = np.array(model(mx.array(rows[:, :-1]))).astype(np.float64)
    assert np.isfinite(logits).all() and len(rows) == -(-SMALL.sampled_tokens // 48)
    make_llama(tmp_path / "l", max_position_embeddings=20, **SIZES)
    said: list[str] = []
    given = [tmp_path / "l", tmp_path / "l", tmp_path / "h", SHORT]
    mlx_skipless.heal(*given, pace=PACE, warn=said.append)
    assert said == ["--context 24 tokens, more than the model's context of 20"]


def test_sampled_text_is_the_originals(pair: tuple[Path, Config, Weights]) -> None:
    """As likely to the original as its entropy says, and it depends on the seed."""
    folder, config, weights = pair
    model, tokenizer = mlx_skipless.load(folder / "s")
    sources = healing.Sources([], [], 0.0, "", "")
    found = []
    for seed in (1, 1, 2):
        treatment = dataclasses.replace(SMALL, seed=seed)
        told: dict[int, int] = {}
        pair_of_one = Pair(model, model, tokenizer)
        tokens = healing.make_tokens(sources, treatment, pair_of_one, told.__setitem__)
        assert [*told] == [*range(1, len(told) + 1)] and {*told.values()} == {SPOKEN}
        assert SPOKEN - 2 <= len(told) < SPOKEN
        train, judge = tokens.train, tokens.held_out
        assert train.dtype == judge.dtype == np.int32 and len(train) + len(judge) == 1024
        found.append(train)
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    rows = found[0].reshape(-1, SPOKEN)
    logits = reference.logits(config, weights, rows[:, :-1])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    entropy = -(np.exp(log_p) * log_p).sum(-1).mean()
    assert nll(logits, rows[:, 1:]) == pytest.approx(entropy, abs=0.15)


@pytest.mark.parametrize("whole", ["lora"], indirect=True)
def test_mlx_lm_runs_it_without_us(whole: tuple[Treatment, Path, Result]) -> None:
    _, out, _ = whole
    code = (
        "import sys; sys.modules['mlx_skipless'] = None; import mlx_lm; "
        f"m, t = mlx_lm.load({str(out)!r}); print(mlx_lm.generate(m, t, 'once', max_tokens=4))"
    )
    python = os.environ.get("MLX_LM_PYTHONS", sys.executable).split(":")[0]
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(out.glob("*.py"))  # an architecture of mlx-lm's own


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": None}, "give the reduced --model and its original"),
        ({"teacher": "@/none"}, "no such file or folder"),
        ({"teacher": "@/other"}, "other vocabularies"),
        ({"model": "@/q", "treatment": {"fine_tune_type": "full"}}, "packed weights cannot"),
        ({"out": "@/r"}, "exists already"),
        ({"out": "@/no/h"}, "is no folder: create it first"),
        ({"treatment": {"context": 600}}, "1024: too few for a --context of 600: give 5,120 or"),
        ({"treatment": {"sampled_tokens": 10}}, "10: too few for a --context of 24: give 128 or"),
        ({"treatment": {"context": 600}, **HALVED}, "the held-out text has 340 tokens, too few"),
        ({"model": "@/g", "teacher": "@/g", **HALVED}, "--context 24 tokens, more than the model"),
        ({"treatment": {"fine_tune_type": "dora"}}, "choose one of lora, full"),
        ({"treatment": {"learning_rate": 0.0}}, "--learning-rate 0.0: must be above 0"),
        ({"treatment": {"steps": 0}}, "--steps 0: must be at least 1"),
        ({"treatment": {"warmup": -1}}, "must be at least 0"),
        ({"data": ["@/none.txt"]}, "cannot be read"),
        ({"validation": ["@/text.txt"]}, "--validation is for --data"),
        ({"validation_share": 0.5}, "--validation-share is of the lines of --data's files"),
        ({**HALVED, "validation": ["@/text.txt"]}, "--validation's are taken whole"),
        ({"steps": 5}, "steps is for a run to resume"),
        ({"pace": 5}, "pace 5: must be a Pace"),
        ({"resume": True, "data": ["@/text.txt"]}, "the run's own text.*only --steps may change"),
        ({"data": ["@/text.txt"], "validation_share": 0.0}, "no text is held out"),
        ({"resume": True}, "there is nothing to resume"),
        ({"teacher": "@/nan", **HALVED}, "the logits of --teacher are no numbers"),
        ({"model": "@/nan", **HALVED}, "the logits of --model are no numbers"),
    ],
    ids=str,
)
def test_what_cannot_be_healed(
    options: dict[str, Any], said: str, pair: tuple[Path, Config, Weights], tmp_path: Path
) -> None:
    """One line, and nothing left behind."""
    make_llama(tmp_path / "other", **SIZES | {"vocab_size": 272})
    (tmp_path / "text.txt").write_text("once upon a time\n" * 40)
    shutil.copytree(pair[0] / "s", tmp_path / "nan")
    weights: Any = mx.load(str(tmp_path / "nan/model.safetensors"))
    weights["model.norm.weight"] *= math.nan
    mx.save_safetensors(str(tmp_path / "nan/model.safetensors"), weights)
    if options.get("model") == "@/g":
        make_model(tmp_path / "g", "gpt2", n_positions=20, n_ctx=20)
    for name in "srq":
        (tmp_path / name).symlink_to(pair[0] / name)
    before = sorted(tmp_path.iterdir())

    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(one) for one in value]
        return value.replace("@", str(tmp_path)) if isinstance(value, str) else value

    options = {"model": "@/r", "teacher": "@/s", "out": "@/h"} | options
    with pytest.raises(mlx_skipless.UserError, match=said) as error:
        treatment = Treatment(**dataclasses.asdict(SMALL) | options.pop("treatment", {}))
        mlx_skipless.heal(
            given(options.pop("model")), given(options.pop("teacher")), given(options.pop("out")),
            treatment, **{k: given(v) for k, v in options.items()},
        )  # fmt: skip
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "more",
    [
        ["--rank", "8"],
        ["--log-every", "1"],
        ["--data", "x"],
        ["--validation", "x"],
    ],
)
def test_a_resumed_run_keeps_its_treatment(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["heal", "--resume", "--mlx-path", str(tmp_path / "h"), *more]) == 2
    said = capsys.readouterr().err
    assert "only --steps may change" in said and more[0] in said


def test_sampled_tokens_are_of_no_text_of_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "a", "--teacher", "b", "--data", "t", "--sampled-tokens", "7"]
    assert main(["heal", *given]) == 2
    assert "--sampled-tokens are of the original's own text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", ["tokens.safetensors", "state.safetensors", "run.json", "log.jsonl"]
)
def test_a_broken_run(file: str, whole: tuple[Treatment, Path, Result], tmp_path: Path) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "h/training").symlink_to(whole[1] / "training")
    copy = tmp_path / "c/training"
    copy.mkdir(parents=True)
    for one in (whole[1] / "training").iterdir():
        (copy / one.name).write_bytes(b"{}" if one.name == file else one.read_bytes())
    with pytest.raises(mlx_skipless.UserError, match=file):
        mlx_skipless.heal(None, None, tmp_path / "c", resume=True)
    if file == "log.jsonl":
        (copy / file).write_text('{"step": 0, "before": {"kl": 1.0}}\n')
        with pytest.raises(mlx_skipless.UserError, match="what the model was before"):
            mlx_skipless.heal(None, None, tmp_path / "c", resume=True)


@pytest.mark.parametrize("where", ["save", "replace"])
def test_a_disk_that_fills_up_at_the_end(
    where: str, pair: tuple[Path, Config, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained is kept, and written when there is room; half a model has no config."""
    folder, out = pair[0], tmp_path / "h"
    replace = os.replace

    def full(*arguments: Any, **options: Any) -> None:
        if where == "save":
            (out / ".partial-model").mkdir()
        elif Path(arguments[1]).name != "tokenizer_config.json":
            return replace(*arguments)
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((mlx_lm.utils, "save") if where == "save" else (os, "replace")), full)
        with pytest.raises(mlx_skipless.UserError, match=r"disk full\? .* --resume writes it"):
            mlx_skipless.heal(folder / "r", folder / "s", out, SHORT, pace=PACE)
    assert not {"config.json", ".partial-model"} & {p.name for p in out.iterdir()}
    mlx_skipless.heal(None, None, out, resume=True)
    assert (out / "config.json").is_file()
