"""What a model could do without: figures against NumPy and against real conversions."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
from factory import make_checkpoint, make_llama
from mlx_lm.utils import quantize_model
from reference import Config, Weights

import mlx_skipless
from mlx_skipless.cli.analyze_tables import describe_analysis
from mlx_skipless.cli.main import main
from mlx_skipless.cli.tables import Grid
from mlx_skipless.constants import REMOVALS
from mlx_skipless.evaluation import analysis, sublayer_worth
from mlx_skipless.evaluation.findings import Analysis, Dropped, Layer, Removal

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
MATRICES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "p": "o_proj"}
TALE = "once upon a time there was a king who had three sons and a goose. " * 6


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sublayer_worth, "TEXT", (8, 64))


def made(folder: Path, **config: Any) -> tuple[Config, Weights]:
    """A random Llama, or with ``norm`` a network of our own; all attentions differ in size."""
    if "norm" in config:
        config, weights = make_checkpoint(folder, **SIZES | config)
    else:
        llama, weights = make_llama(folder, **SIZES | config)
        config = reference.llama_config(llama)
    rng = np.random.default_rng(5)
    if config["skip"] == "both":
        for name in weights:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] = weights[name] * 10 ** rng.uniform(-1, 0.5)
    arrays = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    return config, {name: np.array(a).astype(np.float64) for name, a in arrays.items()}


def measured_on(folder: Path) -> np.ndarray:
    """The tokens of TALE, as they are to be taken: eight pieces from all over it."""
    _, tokenizer = mlx_skipless.load(folder)
    ids = tokenizer.encode(TALE)
    step = len(ids) // 8
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    return np.array([ids[i * step : i * step + min(step, longest)] for i in range(8)])


def loss(config: Config, weights: Weights, gone: list[tuple[int, str]], rows: np.ndarray) -> float:
    marks = [f"layers.{layer}.{part}." for layer, part in gone]
    left = {name: w for name, w in weights.items() if not any(mark in name for mark in marks)}
    logits = reference.logits(config, left, rows)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(np.take_along_axis(log_p, rows[:, 1:, None], axis=-1).mean())


GRID: list[Config] = [
    {"num_hidden_layers": 5, "max_position_embeddings": 32},
    {"model_type": "mistral", "sliding_window": 5, "tie_word_embeddings": True},
    {"norm": "pre", "skip": "both", "block": "parallel", "num_key_value_heads": 4},
]


@pytest.mark.parametrize("config", GRID, ids=str)
def test_a_model_with_skips(config: Config, tmp_path: Path) -> None:
    source = made(tmp_path / "s", **config)
    (tmp_path / "t.txt").write_text(TALE)
    found = analysis.analyze(tmp_path / "s", calibration=tmp_path / "t.txt")
    assert found.text == str(tmp_path / "t.txt")
    rows = measured_on(tmp_path / "s")
    rows = rows[::2]  # judge the losses
    whole = loss(*source, [], rows)
    module = {"attention": "self_attn", "ffn": "mlp"}
    for one in found.layers:
        assert one.drop_cost is not None and one.importance is not None
        for part, name in module.items():
            cost = loss(*source, [(one.layer, name)], rows) - whole
            assert one.drop_cost[part] == pytest.approx(cost, abs=2e-4)
            assert one.weights[part] == sum(
                w.size for n, w in source[1].items() if f"layers.{one.layer}.{name}." in n
            )
    n = source[0]["num_hidden_layers"]
    order = sorted(range(n), key=lambda i: (found.layers[i].importance or {})["attention"])
    assert found.drops is not None and [len(d.layers) for d in found.drops] == [*range(n)]
    for one_drop in found.drops:
        assert set(one_drop.layers) == set(order[: len(one_drop.layers)])
        expected = loss(*source, [(i, "self_attn") for i in one_drop.layers], rows)
        assert one_drop.loss == pytest.approx(expected, rel=1e-4)
        assert one_drop.perplexity == pytest.approx(math.exp(one_drop.loss))


@pytest.mark.parametrize("config", GRID, ids=str)
def test_importance(config: Config, tmp_path: Path) -> None:
    config, weights = made(tmp_path / "s", **config)
    (tmp_path / "t.txt").write_text(TALE)
    found = analysis.analyze(tmp_path / "s", calibration=tmp_path / "t.txt")
    x = weights["model.embed_tokens.weight"][measured_on(tmp_path / "s")]

    def far(a: np.ndarray, b: np.ndarray) -> float:
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return float(np.mean(1 - (a * b).sum(-1) / lengths))

    for one in found.layers:
        middle = x + reference.attention(config, weights, one.layer, x)
        before = x if config["block"] == "parallel" else middle
        ffn = reference.feed_forward(config, weights, one.layer, before)
        after = middle + ffn
        assert one.importance is not None
        expected = {
            "attention": far(x, middle), "ffn": far(before, before + ffn), "block": far(x, after)
        }  # fmt: skip
        assert one.importance == pytest.approx(expected, rel=2e-3, abs=1e-6)
        x = after


CONDITIONED: list[Config] = [
    {},
    {"num_key_value_heads": 4, "head_dim": 32},
    {"norm": "none", "bias": ("q_proj",)},
    {"norm": "qkv", "block": "parallel", "num_key_value_heads": 1},
]


@pytest.mark.parametrize("config", CONDITIONED, ids=str)
def test_conditions(config: Config, tmp_path: Path) -> None:
    """Of matrices of any shape, by NumPy's singular values."""
    _, weights = made(tmp_path / "s", **config)
    found = analysis.analyze(tmp_path / "s")
    for one in found.layers:
        assert one.condition is not None and set(one.condition) == set("qkvp")
        for letter, name in MATRICES.items():
            matrix = weights[f"model.layers.{one.layer}.self_attn.{name}.weight"]
            assert one.condition[letter] == pytest.approx(np.linalg.cond(matrix), rel=0.03)


def test_a_singular_matrix(tmp_path: Path) -> None:
    made(tmp_path / "s", norm="none")
    arrays: Any = mx.load(str(tmp_path / "s/model.safetensors"))
    for name in ("q_proj", "k_proj"):
        full = f"model.layers.1.self_attn.{name}.weight"
        arrays[full][3] = arrays[full][4]
    mx.save_safetensors(str(tmp_path / "s/model.safetensors"), arrays, metadata={"format": "pt"})
    found = analysis.analyze(tmp_path / "s")
    assert found.layers[1].condition is not None
    assert all(found.layers[1].condition[letter] > 1e7 for letter in "qk")
    main(["analyze", str(tmp_path / "s"), "--json", str(tmp_path / "j")])
    told = json.loads((tmp_path / "j").read_text(), parse_constant=pytest.fail)
    assert told["layers"][1]["condition"]["k"] is None  # JSON has no infinity


SAVED: list[Config] = [
    {"norm": "none"},
    {"norm": "qkv", "num_key_value_heads": 4, "tie_word_embeddings": True, "bias": ("o_proj",)},
    {"norm": "none", "block": "parallel"},
    {"norm": "qkv", "skip": "ffn"},
    {"norm": "none", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
    {},
]


@pytest.mark.parametrize("config", SAVED, ids=str)
def test_what_a_removal_saves(config: Config, tmp_path: Path) -> None:
    """Is what it does save, in weights and in bytes read for a token; or it is refused."""
    made(tmp_path / "s", **config)
    found = analysis.analyze(tmp_path / "s")
    assert [one.letters for one in found.removals] == [*REMOVALS[1:-1]]
    skipless = not config
    for one in found.removals:
        options: Any = {"remove": one.letters, "skipless": skipless, "verify": False}
        out = tmp_path / one.letters
        if one.obstacle is not None:
            with pytest.raises(mlx_skipless.UserError, match=one.letters):
                mlx_skipless.convert(tmp_path / "s", out, **options)
            continue
        report = mlx_skipless.convert(tmp_path / "s", out, **options)
        assert one.skipless == skipless
        assert one.weights == report.params_before - report.params_after
        assert one.speedup == pytest.approx(report.params_before / report.params_after)
        assert one.share == pytest.approx(one.weights / report.params_before)
        assert one.reads == pytest.approx(report.speedup_from_bytes)
        assert one.bytes == report.bytes_before - report.bytes_after
        assert one.bytes_per_token == one.bytes  # none of them an embedding's


@pytest.mark.parametrize("config", GRID, ids=str)
def test_what_a_drop_saves(config: Config, tmp_path: Path) -> None:
    """Is what a conversion saves that drops as many, whichever they are."""
    made(tmp_path / "s", **config)
    (tmp_path / "t.txt").write_text(TALE * 8)
    shared: dict[str, Any] = {"calibration": tmp_path / "t.txt"}
    found = analysis.analyze(tmp_path / "s", **shared)
    assert found.drops is not None and found.drops[0].weights == found.weights
    for one in found.drops[1:3]:
        out, count = tmp_path / f"{len(one.layers)}", len(one.layers)
        report = mlx_skipless.convert(
            tmp_path / "s", out, drop_attention=count, remove="none", verify=False, **shared
        )
        assert len(report.removed["attention"]) == count
        assert one.weights == report.params_after
        assert one.cache_bytes == report.cache_bytes_after
        ratio = found.drops[0].bytes_per_token / one.bytes_per_token
        assert ratio == pytest.approx(report.speedup_from_bytes)


@pytest.mark.parametrize("config", [*GRID, *SAVED], ids=str)
def test_parts_are_the_whole(config: Config, tmp_path: Path) -> None:
    _, weights = made(tmp_path / "s", **config)
    found = analysis.analyze(tmp_path / "s")
    assert found.weights == sum(w.size for w in weights.values()) == sum(found.parts.values())
    for letter, name in MATRICES.items():
        expected = sum(w.size for n, w in weights.items() if f"{name}." in n)
        assert found.parts[letter] == expected
    assert found.parts["ffn"] == sum(w.size for n, w in weights.items() if ".mlp." in n)


MISTRAL: Config = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_the_papers_figures_from_a_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mistral-7B: 7.2B weights, 6.2B without Q and P, 15 %, 1.17 x (arXiv 2404.12362)."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    found = analysis.analyze(tmp_path / "config.json")
    qp = next(one for one in found.removals if one.letters == "qp")
    assert qp.weights == 2 * 32 * 4096**2 and qp.skipless
    assert round(found.weights / 1e9, 1) == 7.2
    assert round((found.weights - qp.weights) / 1e9, 1) == 6.2
    assert qp.share is not None and round(qp.share, 2) == 0.15
    assert qp.speedup is not None and round(qp.speedup, 2) == 1.17
    assert {n: round(times) for n, times in (found.first_layer_reads or {}).items()} == {
        1: 2458, 16: 154, 256: 10, 1024: 3
    }  # fmt: skip
    assert found.layers[0].condition is None and found.drops is None and found.text is None
    assert main(["analyze", str(tmp_path / "config.json")]) == 0
    printed = capsys.readouterr().out
    assert "1,073,741,824" in printed and "2,458 at batch 1" in printed
    assert "not kp, k: K maps 4096 to 1024" in printed and "a config alone" in printed


@pytest.mark.parametrize("weights", [False, True])
def test_a_folder_and_its_config_alone(weights: bool, tmp_path: Path) -> None:
    """A folder without weights is its config; with ``config_only`` any is."""
    made(tmp_path / "s")
    if not weights:
        (tmp_path / "s/model.safetensors").unlink()
    config = tmp_path / "s/config.json"
    expected = replace(analysis.analyze(config), source=str(tmp_path / "s"))
    assert analysis.analyze(tmp_path / "s", config_only=weights) == expected
    assert expected.weights and expected.layers[0].condition is None


def test_a_layer_without_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that a drop made, a layer without attention says so and cannot drop it again."""
    made(tmp_path / "s", model_type="mistral", sliding_window=5)
    (tmp_path / "t.txt").write_text(TALE * 8)
    options: dict[str, Any] = {"calibration": tmp_path / "t.txt", "verify": False}
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", drop_attention=1, **options)
    (gone,) = report.removed["attention"]
    shared = ["analyze", str(tmp_path / "o"), "--calibration", str(tmp_path / "t.txt")]
    assert main([*shared, "--plot", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.count("gone") == 6  # two figures of text, four matrices
    found = analysis.analyze(tmp_path / "o", calibration=tmp_path / "t.txt")
    importance = found.layers[gone].importance
    assert importance is not None and importance["attention"] is None
    assert importance["ffn"] == importance["block"] and (importance["ffn"] or 0) > 0
    assert found.drops is not None and len(found.drops) == 2
    assert all(gone not in one.layers for one in found.drops)


def test_a_loss_beyond_all_numbers(tmp_path: Path) -> None:
    made(tmp_path / "s")
    arrays: Any = mx.load(str(tmp_path / "s/model.safetensors"))
    arrays["lm_head.weight"] = arrays["lm_head.weight"] * 1e4
    mx.save_safetensors(str(tmp_path / "s/model.safetensors"), arrays, metadata={"format": "pt"})
    (tmp_path / "t.txt").write_text(TALE)
    arguments = ["--calibration", str(tmp_path / "t.txt"), "--json", str(tmp_path / "j")]
    assert main(["analyze", str(tmp_path / "s"), *arguments]) == 0
    told = json.loads((tmp_path / "j").read_text(), parse_constant=pytest.fail)
    assert told["drops"][0]["loss"] > 1000 and told["drops"][0]["perplexity"] is None


def test_a_quantized_source(tmp_path: Path) -> None:
    """As the dense weights that it stands for."""
    made(tmp_path / "f")
    model, tokenizer = mlx_lm.load(str(tmp_path / "f"))  # type: ignore[misc]
    config = json.loads((tmp_path / "f/config.json").read_text())
    model, config = quantize_model(model, config, 32, 8)
    mlx_lm.utils.save(tmp_path / "q", tmp_path / "f", model, tokenizer, config)
    (tmp_path / "t.txt").write_text(TALE)
    a, b = (analysis.analyze(tmp_path / n, calibration=tmp_path / "t.txt") for n in "fq")
    assert a.weights == b.weights and a.parts == b.parts
    for one, other in zip(a.layers, b.layers, strict=True):
        assert other.importance == pytest.approx(one.importance, rel=0.05, abs=1e-4)
        assert other.condition == pytest.approx(one.condition, rel=0.05)


def test_sampled_text_is_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file it is measured on what the model says, by the seed."""
    monkeypatch.setattr(sublayer_worth, "TEXT", (4, 64))
    made(tmp_path / "s")
    found = [analysis.analyze(tmp_path / "s", seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] and found[0].drops != found[2].drops
    assert found[0].text == "sampled from the model"
    assert found[0].drops and found[0].drops[0].loss < math.log(264)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "s")
    files = {name: str(tmp_path / name) for name in ("a.json", "a.png")}
    assert (
        main(["analyze", str(tmp_path / "s"), "--json", files["a.json"], "--plot", files["a.png"]])
        == 0
    )
    printed = capsys.readouterr().out
    told = json.loads((tmp_path / "a.json").read_text())
    for kind, one in (
        (Analysis, told), (Removal, told["removals"][0]), (Layer, told["layers"][0]),
        (Dropped, told["drops"][0]),
    ):  # fmt: skip
        assert list(one) == [*kind.__dataclass_fields__]
    for one in told["layers"]:
        assert f"{one['importance']['attention']:.4f}" in printed
        assert f"{one['drop_cost']['ffn']:+.4f}" in printed
        assert f"{one['condition']['q']:.1e}" in printed
    assert f"{told['drops'][-1]['perplexity']:.2f}" in printed
    picture = matplotlib.image.imread(files["a.png"])
    assert picture.shape[1] > 2.5 * picture.shape[0]  # three panels side by side
    assert picture[:8, :8, :3].min() == 1.0  # white behind
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.png", "s"]


def test_a_skipless_model_has_conditions_alone(tmp_path: Path) -> None:
    made(tmp_path / "s", norm="none")
    assert main(["analyze", str(tmp_path / "s"), "--plot", str(tmp_path / "a.png")]) == 0
    found = analysis.analyze(tmp_path / "s")
    (tmp_path / "t.txt").write_text(TALE)
    told = analysis.analyze(tmp_path / "s", calibration=tmp_path / "t.txt")
    assert told == replace(found, notes=told.notes) and "not needed" in told.notes[1]
    assert found.drops is None and all(one.importance is None for one in found.layers)
    assert "no sub-layer can be dropped" in found.notes[0]
    grids = [part for part in describe_analysis(found) if isinstance(part, Grid)]
    assert not any("attentions" in title for grid in grids for title in grid.titles)
    picture = matplotlib.image.imread(tmp_path / "a.png")
    assert picture.shape[1] < 1.5 * picture.shape[0]  # one panel


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["@/none"], "no such file or folder"),
        (["@/s", "--calibration", "@/none.txt"], "cannot be read"),
        (["@/s", "--calibration", "@/short.txt"], "at least 16 are needed"),
        (["@/bare", "--calibration", "@/tale.txt"], "the source has none"),
        (["@/s", "--seed", "-1"], "--seed -1"),
        (["@/s", "--plot", "@/a.jpg"], "ends in .png"),
        (["@/s", "--plot", "@/a.png", "--json", "@/a.png"], "give two files"),
        (["@/s", "--config-only", "--plot", "@/a.png"], "a config has no weights"),
        (["@/s", "--json", "@/no/a.json"], "cannot be written"),
        (["@/s", "--plot", "@/s"], "--plot"),
        (["@/s/config.json", "--plot", "@/a.png"], "a config has no weights"),
        (["@/s/config.json", "--calibration", "@/short.txt"], "a config has no weights"),
    ],
)
def test_what_cannot_be_analyzed(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "s")
    (tmp_path / "short.txt").write_text("once upon a time")
    (tmp_path / "tale.txt").write_text(TALE)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "s" / name, tmp_path / "bare")
    before = sorted(tmp_path.rglob("*"))
    assert main(["analyze", *(a.replace("@", str(tmp_path)) for a in arguments)]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
