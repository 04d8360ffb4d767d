"""Task scores before and after: lm-eval's own on a local task, against NumPy."""

import json
import math
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from factory import make_checkpoint

import mlx_skipless
from mlx_skipless import UserError, cli, evaluate, evaluation
from mlx_skipless.evaluation.tasks import Results, pair_scores

ANSWERS = ["yes", "no", "none of these", "both"]
QUESTIONS = 10
SHOWN = 101  # the example in the prompt
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def results(metrics: dict[str, Any], samples: list[dict[str, Any]]) -> Results:
    """What lm-eval gives back for a task, as far as it is read."""
    return {
        "results": {"own": {"name": "own", "sample_len": len(samples), **metrics}},
        "higher_is_better": {"own": {"acc": True, "ppl": False}},
        "samples": {"own": samples},
    }


@pytest.mark.parametrize("kind", ["none", "strict"])
@pytest.mark.parametrize("count", [2, 7, 100])
def test_a_difference_of_means_is_of_the_same_items(count: int, kind: str) -> None:
    rng = np.random.default_rng(count)
    a = rng.standard_normal(count)
    b = a + 0.1 * rng.standard_normal(count)  # alike: as of different items the error were larger
    runs = [
        results(
            {f"acc,{kind}": np.mean(items), f"acc_stderr,{kind}": stderr(items)},
            [{"doc_id": int(i), "filter": kind, "acc": items[i]} for i in rng.permutation(count)]
            + [{"doc_id": i, "filter": "other", "acc": 5.0} for i in range(count)],
        )
        for items in (a, b)
    ]
    (score,) = pair_scores(*runs)
    assert score.metric == ("acc" if kind == "none" else "acc,strict")
    assert (score.task, score.higher_is_better) == ("own", True)
    got = (score.source, score.result, score.difference)
    assert got == pytest.approx((a.mean(), b.mean(), b.mean() - a.mean()))
    errors = (score.source_stderr, score.result_stderr, score.difference_stderr)
    assert errors == pytest.approx((stderr(a), stderr(b), stderr(b - a)))


@pytest.mark.parametrize(
    ("pieces", "errors", "expected"),
    [
        pytest.param([1.0, 2.0, 4.0], (0.3, 0.4), 0.5, id="no mean of its items"),
        pytest.param([(1.0, 2), (2.0, 2), (4.0, 3)], (0.3, 0.4), 0.5, id="items of two numbers"),
        pytest.param([(1.0, 2)], ("N/A", "N/A"), None, id="no error"),
        pytest.param([(1.0, 2)], (0.3, "N/A"), None, id="one error"),
    ],
)
def test_other_metrics_are_as_of_different_items(
    pieces: list[Any], errors: tuple[Any, Any], expected: float | None
) -> None:
    samples = [{"doc_id": i, "filter": "none", "ppl": piece} for i, piece in enumerate(pieces)]
    runs = [
        results({"ppl,none": 10.0 + i, "ppl_stderr,none": errors[i]}, samples) for i in range(2)
    ]
    (score,) = pair_scores(*runs)
    assert (score.metric, score.higher_is_better, score.difference) == ("ppl", False, 1.0)
    assert score.difference_stderr == (None if expected is None else pytest.approx(expected))
    assert [score.source_stderr, score.result_stderr] == [
        None if error == "N/A" else error for error in errors
    ]


def test_a_group_is_a_row_of_its_own() -> None:
    samples = [{"doc_id": i, "filter": "none", "acc": i % 2} for i in range(4)]
    run = dict(results({"acc,none": 0.5, "acc_stderr,none": 0.3}, samples))
    run["groups"] = {"all": {"sample_len": 8, "acc,none": 0.25, "acc_stderr,none": 0.1}}
    own, group = pair_scores(run, run)
    assert (own.task, own.difference_stderr, own.items) == ("own", 0, 4)
    assert (group.task, group.source, group.items) == ("all", 0.25, 8)
    assert group.difference_stderr == pytest.approx(np.hypot(0.1, 0.1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_shots": -1}, "--num-shots -1: must be at least 0"),
        ({"limit": 0}, "--limit 0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"include_path": "nowhere"}, "--include-path nowhere: no such folder"),
    ],
)
def test_arguments_are_checked_first(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        evaluate("no model", "no model", ["no task"], **options)


def test_without_lm_eval_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("mlx_skipless.evaluation.harness", "mlx_lm.evaluate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(evaluation, "harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["evaluate", "a", "b", "--tasks", "arc_easy"]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: --tasks needs lm-eval (")
    assert error.endswith("): pip install 'mlx-lm[evaluate]'\n") and error.count("\n") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Path]:
    """A folder of tasks: how likely is each answer after its question?

    The thousands of tasks that lm-eval brings take seconds to read, and only thorough tests do.
    """
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from mlx_skipless.evaluation import harness

    folder = tmp_path_factory.mktemp("tasks")
    for name, numbers in (("test", range(QUESTIONS)), ("train", [SHOWN])):
        lines = [json.dumps({"question": f"{i}?", "answer": ANSWERS[i % 4]}) for i in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for name, test in (("answers", "test"), ("broken", "missing")):
        (folder / f"{name}.yaml").write_text(
            f"""
            task: {name}
            dataset_path: json
            dataset_kwargs:
              data_files: {{train: {folder}/train.jsonl, test: {folder}/{test}.jsonl}}
              cache_dir: {folder}/cache
            fewshot_split: train
            test_split: test
            output_type: loglikelihood
            doc_to_text: "{{{{question}}}}"
            doc_to_target: "{{{{answer}}}}"
            metric_list: [{{metric: perplexity, aggregation: mean, higher_is_better: true}}]
            """
        )
    with pytest.MonkeyPatch.context() as patch:
        if not pytestconfig.getoption("--thorough"):
            patch.setattr(harness, "TaskManager", partial(TaskManager, include_defaults=False))
        yield folder


def log_likelihoods(folder: Path, network: tuple[Any, Any], shots: int, chat: bool) -> np.ndarray:
    """Of each question's answer, nats."""
    _, tokenizer = mlx_skipless.load(folder)
    found = []
    for i in range(QUESTIONS):
        prompt = f"{SHOWN}? {ANSWERS[SHOWN % 4]}\n\n" * shots + f"{i}?"
        if chat:
            prompt = f"<s>user: {prompt}\n<s>assistant: "
        row = tokenizer.encode(prompt + ANSWERS[i % 4], add_special_tokens=not chat)
        start = len(tokenizer.encode(prompt, add_special_tokens=not chat))
        logits = reference.logits(*network, np.array([row]))[0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found.append(log_p[np.arange(start - 1, len(row) - 1), row[start:]].sum())
    return np.array(found)


def test_scores_are_those_of_both_networks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source and a converted model of another one, whose own code is not run."""
    networks = [make_checkpoint(tmp_path / name, seed=i, **SMALL) for i, name in enumerate("st")]
    mlx_skipless.convert(tmp_path / "t", tmp_path / "out", remove="qp", verify=False)
    (tmp_path / "out" / "model.py").write_text("raise RuntimeError('run')")
    models = [str(tmp_path / name) for name in ("s", "out")]
    out = str(tmp_path / "scores.json")
    base = ["evaluate", *models, "--include-path", str(folder), "--json", out]
    runs: list[tuple[str, list[str], int, bool, int]] = [
        ("answ*", [], 0, True, QUESTIONS),
        ("answers", ["--no-apply-chat-template", "--num-shots", "1"], 1, False, QUESTIONS),
        (str(folder / "answers.yaml"), ["--limit", "5", "--batch-size", "2"], 0, True, 5),
    ]
    for task, flags, shots, chat, items in runs:
        assert cli.main([*base, "--tasks", task, *flags]) == 0
        (score,) = json.loads(Path(out).read_text())["scores"]
        a, b = (
            log_likelihoods(tmp_path / name, network, shots, chat)[:items]
            for name, network in zip("st", networks, strict=True)
        )
        figures = ("task", "metric", "items", "higher_is_better")
        assert [score[name] for name in figures] == ["answers", "perplexity", items, True]
        for name, values in (("source", a), ("result", b), ("difference", b - a)):
            assert score[name] == pytest.approx(values.mean(), rel=1e-4), (flags, name)
            error = score[f"{name}_stderr"]
            assert error == pytest.approx(stderr(values), rel=1e-4), (flags, name)
        (row,) = [line for line in capsys.readouterr().out.splitlines() if "answers" in line]
        assert row.endswith(f"{score['difference']:+.4f} ± {score['difference_stderr']:.4f}")


def test_what_is_quiet_writes_nothing_on_stderr(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No bars of lm-eval's, and no complaint of the git that it asks for a version; but errors."""
    make_checkpoint(tmp_path / "s", **SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w", closefd=False))  # as it is without pytest
    base = ["evaluate", "s", "s", "--include-path", str(folder), "--quiet", "--tasks"]
    capfd.readouterr()
    assert cli.main([*base, "answers", "--limit", "2", "--json", "scores.json"]) == 0
    assert capfd.readouterr() == ("", "") and "answers" in Path("scores.json").read_text()
    assert cli.main([*base, "broken"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: lm-eval cannot run broken: ") and error.count("\n") == 1


@pytest.mark.parametrize("broken", ["s", "t"])
def test_scores_that_are_no_numbers_are_refused(folder: Path, tmp_path: Path, broken: str) -> None:
    for name in "st":
        make_checkpoint(tmp_path / name, **SMALL)
    file = str(tmp_path / broken / "model.safetensors")
    weights: Any = mx.load(file)
    mx.eval(weights)
    weights["model.norm.weight"] *= math.nan
    mx.save_safetensors(file, weights)
    with pytest.raises(UserError, match=r"^the logits of a model are no numbers"):
        evaluate(tmp_path / "s", tmp_path / "t", ["answers"], include_path=folder, limit=3)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("no_such_task", "--tasks no_such_task: no such task or file"),
        ("broken", "lm-eval cannot run broken: "),
    ],
)
def test_a_task_that_cannot_be_run_is_one_line(
    folder: Path, tmp_path: Path, task: str, said: str
) -> None:
    make_checkpoint(tmp_path / "s", **SMALL)
    with pytest.raises(UserError, match=said) as caught:
        evaluate(tmp_path / "s", tmp_path / "s", [task], include_path=folder)
    assert "\n" not in str(caught.value)
