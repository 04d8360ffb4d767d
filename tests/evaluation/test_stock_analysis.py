"""What networks of mlx-lm's own could do without, and what they score, against their whole runs."""

import json
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from grids import only, thorough
from mlx.utils import tree_flatten
from zoo import make_model

from mlx_skipless.cli.main import main
from mlx_skipless.evaluation import analysis, sublayer_worth
from mlx_skipless.evaluation.perplexity import measure_perplexity
from mlx_skipless.network import reduced

PARTS = {
    "attention": ("self_attn", "linear_attn", "mamba", "mixer"),
    "ffn": ("mlp", "block_sparse_moe", "feed_forward", "shared_mlp"),
}
KINDS = ("gemma3_text", "gpt_oss", "olmo2", "qwen3_5", "smollm3", "deepseek_v3", "mamba2")
TALE = "once upon a time there was a king who had three sons and a goose. " * 3
LENGTH = 16
Drops = Collection[tuple[int, str]]


class Silent(nn.Module):
    """A sub-layer that runs and is then multiplied by zero."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        return 0 * self.inner(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name in self or "inner" not in self:
            return super().__getattr__(name)
        return getattr(self["inner"], name)


def parts_of(layer: nn.Module, part: str) -> list[str]:
    return [name for name in PARTS[part] if name in layer]


def measure_loss(folder: Path, rows: mx.array, drops: Drops = ()) -> float:
    """The loss of mlx-lm's network whose sub-layers in ``drops`` give zeros."""
    model: Any = mlx_lm.load(str(folder))[0]
    for layer, part in drops:
        for name in parts_of(model.layers[layer], part):
            setattr(model.layers[layer], name, Silent(model.layers[layer][name]))
    logits = model(rows[:, :-1]).astype(mx.float32)
    return float(nn.losses.cross_entropy(logits, rows[:, 1:], reduction="mean"))


def take_rows(folder: Path) -> mx.array:
    """The tokens that judge: of eight pieces from all over the text every other one."""
    tokenizer = mlx_lm.load(str(folder))[1]
    step = len(TALE) // 8
    rows = [tokenizer.encode(TALE[i * step : (i + 1) * step])[:LENGTH] for i in range(8)]
    return mx.array(rows)[::2]


def make_reduced(source: Path, folder: Path, part: str, layer: int) -> None:
    """Write a model without one part of one layer, as its format says."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text())
    config |= {"dropped_sublayers": {part: [layer]}, "model_file": "model.py"}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(str(reduced.__file__), folder / "model.py")
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    left = {n: a for n, a in weights.items() if f"layers.{layer}.{part}." not in n}
    assert len(left) < len(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), left, metadata={"format": "mlx"})


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sublayer_worth, "TEXT", (8, LENGTH))


@pytest.mark.parametrize("model_type", only(("gemma3_text",), KINDS))
def test_costs_are_those_of_silent_sublayers(model_type: str, tmp_path: Path) -> None:
    make_model(tmp_path / "s", model_type)
    (tmp_path / "t.txt").write_text(TALE)
    found = analysis.analyze(tmp_path / "s", calibration=tmp_path / "t.txt")
    rows = take_rows(tmp_path / "s")
    whole = measure_loss(tmp_path / "s", rows)
    model: Any = mlx_lm.load(str(tmp_path / "s"))[0]
    assert found.weights == sum(a.size for _, a in tree_flatten(model.parameters()))
    assert sum(found.parts.values()) == found.weights
    for one in found.layers:
        assert one.drop_cost is not None and one.importance is not None
        layer = model.layers[one.layer]
        for part in PARTS:
            there = [layer[name] for name in parts_of(layer, part)]
            sizes = (a.size for m in there for _, a in tree_flatten(m.parameters()))
            assert one.weights[part] == sum(sizes)
            if not there:
                assert one.importance[part] is None and part not in one.drop_cost
                continue
            cost = measure_loss(tmp_path / "s", rows, [(one.layer, part)]) - whole
            assert one.drop_cost[part] == pytest.approx(cost, abs=2e-4)
    assert found.drops is not None and len(found.drops) == len(found.layers)
    for dropped in found.drops:
        expected = measure_loss(tmp_path / "s", rows, [(n, "attention") for n in dropped.layers])
        assert dropped.loss == pytest.approx(expected, abs=2e-4)
        gone = sum(found.layers[n].weights["attention"] for n in dropped.layers)
        assert dropped.weights == found.weights - gone
    assert not found.removals and found.first_layer is None
    assert "only mlx-lm's network is known" in found.notes[0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "s"
    make_model(source, "olmo2")
    (tmp_path / "t.txt").write_text(TALE)
    arguments = ["--calibration", str(tmp_path / "t.txt")]
    assert main(["analyze", str(source), *arguments]) == 0
    out = capsys.readouterr().out
    assert "cost of no" in out and "attentions" in out and "--remove" not in out
    assert main(["analyze", str(source / "config.json")]) == 0
    assert "nothing could be measured" in capsys.readouterr().out
    assert main(["analyze", str(source / "config.json"), *arguments]) == 1
    assert "give the model" in capsys.readouterr().err


@thorough
def test_the_plot(tmp_path: Path) -> None:
    make_model(tmp_path / "s", "olmo2")
    assert main(["analyze", str(tmp_path / "s"), "--plot", str(tmp_path / "f.png")]) == 0
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_a_reduced_model_is_scored_and_analyzed_without_trust(tmp_path: Path) -> None:
    make_model(tmp_path / "s", "gemma3_text")
    make_reduced(tmp_path / "s", tmp_path / "r", "self_attn", 2)
    (tmp_path / "t.txt").write_text(TALE)
    score = measure_perplexity(tmp_path / "r", validation=[tmp_path / "t.txt"], context=LENGTH)
    ids = mlx_lm.load(str(tmp_path / "s"))[1].encode(TALE)
    windows = [ids[i : i + LENGTH + 1] for i in range(0, len(ids) - LENGTH, LENGTH)]
    expected = measure_loss(tmp_path / "s", mx.array(windows), [(2, "attention")])
    assert score.loss == pytest.approx(expected, abs=1e-4)
    found = analysis.analyze(tmp_path / "r", calibration=tmp_path / "t.txt")
    one = found.layers[2]
    assert one.importance is not None and one.importance["attention"] is None
    assert one.weights["attention"] == 0
    assert found.drops is not None and math.isclose(
        found.drops[0].loss,
        measure_loss(tmp_path / "s", take_rows(tmp_path / "s"), [(2, "attention")]),
        abs_tol=2e-4,
    )
