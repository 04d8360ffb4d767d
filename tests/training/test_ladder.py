"""The tool that trains a table of networks: the text and the runs of `train`, and its tables."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import ladder
import numpy as np
import pytest
import yaml
from commands import ROOT

from mlx_skipless.checkpoints.tokenizer import fetch_tokenizer
from mlx_skipless.training import pretraining
from mlx_skipless.training.folder import read_log
from mlx_skipless.training.recipe import Recipe, TrainingPace

BASE = {"hidden_size": 16, "intermediate_size": 32, "heads": 2, "kv_heads": 1, "context": 16,
        "batch_size": 4, "vocab_size": 270, "warmup": 1}  # fmt: skip
TABLE = {
    "base": BASE,
    "depths": {1: {"steps": 3}, 2: {"steps": 2}},
    "networks": {
        "a": {},
        "b": {"query_skip": None, "depths": [2], "rates": [0.02, 0.01], "weights": "a"},
    },
    "rates": [0.02],
    "pace": {"log_every": 1},
}
LINES = "".join(f"the quick red fox saw {i} lazy dogs on a mat\n" for i in range(120))


def carry_out_here(jobs: list[ladder.Job], settings: Any, count: int, deadline: float) -> None:
    """As `carry_out_all` does, in this process."""
    ladder.TOKENS = ladder.read_tokens(jobs[0].file.parent)
    ladder.SETTINGS = ladder.dataclasses.replace(settings, fingerprint=ladder.TOKENS.fingerprint())
    for job in jobs:
        if ladder.is_open(job, jobs, ladder.Counter()):
            ladder.carry_out(job, time.time() + 600)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "tokenizer",
    [pytest.param(False, id="made"), pytest.param(True, id="given", marks=pytest.mark.thorough)],
)
def test_its_runs_are_those_of_train(
    tokenizer: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the same tokens, bit for bit; a finished run is not run again."""
    (tmp_path / "text").write_text(LINES)
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(TABLE))
    recipe = Recipe(**BASE, layers=1, steps=3, learning_rate=0.02)  # type: ignore[arg-type]
    pace = TrainingPace(1, 0, 0, 65536, 0)
    given: dict[str, Any] = {"tokenizer": tmp_path / "made"} if tokenizer else {}
    if tokenizer:  # of another run, with more entries than the table says
        settings = pretraining.Settings(
            Recipe(vocab_size=280), pace,
            pretraining.TrainingText([str(tmp_path / "text")], [], 0.0, None), "float32",
        )  # fmt: skip
        pretraining.make_tokens(settings, None)[1].tokenizer.save_pretrained(str(tmp_path / "made"))
    pretraining.train(
        [tmp_path / "text"], tmp_path / "train", recipe, pace=pace, dtype="float32", **given
    )
    monkeypatch.setattr(ladder, "carry_out_all", carry_out_here)
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv",
        ["ladder.py", str(tmp_path / "table.yaml"), "--data", str(tmp_path / "text"),
         "--output", str(out), "--figure", str(tmp_path / "depth.svg"), "--figure-size", "column",
         *(["--tokenizer", str(tmp_path / "made")] if tokenizer else [])],
    )  # fmt: skip
    ladder.main()
    assert len(fetch_tokenizer(str(out / "tokenizer"))) == (280 if tokenizer else 270)
    model = "model.safetensors"
    assert (out / "a-1-0.02-0" / model).read_bytes() == (tmp_path / "train" / model).read_bytes()
    said = capsys.readouterr().out
    names = ["a-1-0.02-0", "a-2-0.02-0", "b-2-0.01-0", "b-2-0.02-0"]
    assert sorted(file.stem for file in out.glob("*-*.json")) == names
    for name in names:
        found = json.loads((out / f"{name}.json").read_text())
        losses = [e["validation_loss"] for e in read_log(out / name) if "validation_loss" in e]
        assert found["validation_loss"] == losses[-1] and f"{losses[-1]:.3f}" in said
    weights = [json.loads((out / f"{name}.json").read_text())["parameters"] for name in names[1:3]]
    assert np.allclose(*weights, rtol=0.05)  # `weights: a`
    text = (tmp_path / "depth.svg").read_text()
    assert "layers" in text and ">a<" in text and ">b<" not in text  # which ran at one depth alone
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.json")}
    ladder.main()
    assert all(
        file.stat().st_mtime_ns == at for file, at in before.items() if file.stem != "results"
    )


def test_the_large_table_is_as_large_as_it_says() -> None:
    """Weights by hand, those of the twin that is to have as many, and the tokens of a run."""
    table = yaml.safe_load((ROOT / "recipes/large.yaml").read_text())
    made = {name: ladder.make_recipe(table, name, 12) for name in table["networks"]}
    counts = {name: ladder.count_weights(recipe) for name, recipe in made.items()}
    d, f, kv = 512, 1152, 2 * 64
    layer = 2 * d * d + 2 * d * kv + 3 * d * f + 2 * d
    assert counts["vanilla"] == 4096 * d + 12 * layer + d
    assert counts["vanilla without the final norm"] == counts["vanilla"] - d
    for count in counts.values():
        assert 25e6 < count < 60e6 and count == pytest.approx(counts["vanilla"], rel=2e-3)
    for recipe in made.values():
        assert recipe.steps * recipe.batch_size * recipe.context > 200e6
        assert ("q" in recipe.without) == (recipe.intermediate_size > f)
