"""Dropped sub-layers: importance, losses and choices against NumPy, and the models that result."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
import zoo
from factory import make_checkpoint, make_llama, stored
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model
from reference import Config, Weights

import mlx_skipless
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.cli.main import main
from mlx_skipless.network.driver import StreamedNetwork
from mlx_skipless.removal import sublayers
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan
from mlx_skipless.removal.sublayers import Wish
from mlx_skipless.text import samples

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CALIBRATION", (16, 16))
    monkeypatch.setattr(samples, "LONG_CHECK", (4, 32))


def made(folder: Path, **config: Any) -> tuple[Config, Weights]:
    """A random Llama, or with ``block`` a network of our own, whose sub-layers differ in size."""
    if "block" in config:
        source = make_checkpoint(folder, norm="pre", skip="both", **SIZES | config)
    else:
        llama, weights = make_llama(folder, **SIZES | config)
        source = reference.llama_config(llama), weights
    weights = dict(source[1])
    rng = np.random.default_rng(5)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * 10 ** rng.uniform(-1, 0.5)
    arrays = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    return source[0], {name: np.array(a).astype(np.float64) for name, a in arrays.items()}


def opened(folder: Path, *, resident: bool = False) -> StreamedNetwork:
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint.args, remove="none")
    merger = Merger(checkpoint, plan, mx.float32)
    return StreamedNetwork(checkpoint.args, merger, resident=resident)


def without(weights: Weights, dropped: dict[str, Any]) -> Weights:
    module = {"attention": "self_attn", "ffn": "mlp"}
    gone = [f"layers.{i}.{module[part]}." for part, layers in dropped.items() for i in layers]
    return {name: w for name, w in weights.items() if not any(g in name for g in gone)}


def loss(source: tuple[Config, Weights], dropped: dict[str, Any], tokens: np.ndarray) -> float:
    logits = reference.logits(source[0], without(source[1], dropped), tokens)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean())


def text(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (10, 12))


GRID: list[Config] = [
    {},
    {"model_type": "mistral", "sliding_window": 5},
    {"block": "parallel", "tie_word_embeddings": True},
    {"block": "serial", "num_key_value_heads": 1},
    {"block": "serial", "skips": ("query", "head")},
    {"block": "parallel", "skips": ("head",), "per_channel": True},
]


@pytest.mark.parametrize("config", GRID, ids=str)
@pytest.mark.parametrize("dropped", [{}, {"attention": [1], "ffn": [1, 2]}], ids=str)
def test_importance(config: Config, dropped: dict[str, list[int]], tmp_path: Path) -> None:
    """1 - cosine, written out with the reference's own sub-layers."""
    source, weights = made(tmp_path, **config)
    tokens = text()
    got = sublayers.measure_importance(opened(tmp_path), mx.array(tokens), dropped)
    x, before = weights["model.embed_tokens.weight"][tokens], None

    def far(a: np.ndarray, b: np.ndarray) -> float:
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return float(np.mean(1 - (a * b).sum(-1) / norms))

    for layer in range(4):
        h = x
        a, heads = np.zeros_like(x), None
        if layer not in dropped.get("attention", ()):
            a = reference.attention(source, weights, layer, x, before)
            heads = reference.attend(source, weights, layer, x, before)
        h = x if source["block"] == "parallel" else x + a
        f = np.zeros_like(x)
        if layer not in dropped.get("ffn", ()):
            f = reference.feed_forward(source, weights, layer, h)
        expected = {"attention": far(x, x + a), "ffn": far(h, h + f), "block": far(x, x + a + f)}
        for kind, value in expected.items():
            assert got[kind][layer] == pytest.approx(value, rel=1e-3, abs=1e-6), (kind, layer)
        x, before = x + a + f, heads


@pytest.mark.parametrize("config", GRID, ids=str)
def test_losses(config: Config, tmp_path: Path) -> None:
    source = made(tmp_path, **config)
    tokens = text()
    variants: list[dict[str, Any]] = [
        {}, {"attention": [3]}, {"attention": [0, 3]}, {"ffn": {3}}, {"attention": [2], "ffn": [2]},
    ]  # fmt: skip
    got = sublayers.measure_losses(opened(tmp_path), mx.array(tokens), variants)
    assert got == pytest.approx([loss(source, v, tokens) for v in variants], rel=1e-5)


@pytest.mark.parametrize("kind", ["attention", "ffn", "block"])
@pytest.mark.parametrize("count", [1, 2])
def test_one_shot_takes_what_costs_least_alone(kind: str, count: int, tmp_path: Path) -> None:
    """Among twice as many, the least important; by the reference's losses."""
    source = made(tmp_path, num_hidden_layers=6)
    network = opened(tmp_path)
    tokens = text()
    names = ["attention", "ffn"] if kind == "block" else [kind]
    measured = sublayers.measure_importance(network, mx.array(tokens))[kind]
    short = np.argsort(measured)[: 2 * count].tolist()
    costs = {layer: loss(source, {name: [layer] for name in names}, tokens) for layer in short}
    got, path = sublayers.choose_drops(
        network, mx.array(tokens), [Wish(kind, count)], greedy=False, max_loss=0.0
    )
    least = sorted(sorted(short, key=costs.__getitem__)[:count])
    assert got == dict.fromkeys(names, least) and not path
    assert len({*short} - {*least}) == count


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_greedy_takes_what_costs_least_each_time(kind: str, tmp_path: Path) -> None:
    """Against all choices, by the reference's losses."""
    source = made(tmp_path)
    tokens = text()
    got, path = sublayers.choose_drops(
        opened(tmp_path), mx.array(tokens), [Wish(kind, 3)], greedy=True, max_loss=0.0
    )
    dropped: list[int] = []
    losses = [loss(source, {}, tokens)]
    for _ in range(3):
        left = [layer for layer in range(4) if layer not in dropped]
        found = {layer: loss(source, {kind: [*dropped, layer]}, tokens) for layer in left}
        best = min(found, key=found.__getitem__)
        dropped.append(best)
        losses.append(found[best])
    assert got == {kind: sorted(dropped)}
    assert [step.loss for step in path] == pytest.approx(losses, rel=1e-5)
    taken = [(step.kind, step.layer) for step in path]
    assert taken == [(None, None), *((kind, layer) for layer in dropped)]


@pytest.mark.thorough
def test_greedy_weighs_what_a_drop_costs_by_what_goes(tmp_path: Path) -> None:
    """What costs least here is an FFN, which is a quarter of an attention."""
    source = made(tmp_path, intermediate_size=16, seed=1)
    network = opened(tmp_path, resident=True)
    # Drops cost something on what the network says.
    tokens = samples.sample_text(network, 16, 64, seed=0, start=None)
    kinds = {"attention": 2 * 64 * (4 + 2) * 16, "ffn": 3 * 64 * 16}
    whole = loss(source, {}, np.array(tokens))
    costs = {
        (kind, layer): loss(source, {kind: [layer]}, np.array(tokens)) - whole
        for kind in kinds
        for layer in range(4)
    }
    best = min(costs, key=lambda one: costs[one] / kinds[one[0]])
    assert best[0] == "attention" != min(costs, key=costs.__getitem__)[0]
    wishes = [Wish(kind, 1) for kind in kinds]
    _, path = sublayers.choose_drops(network, tokens, wishes, greedy=True, max_loss=0.0)
    assert (path[1].kind, path[1].layer) == best


@pytest.mark.parametrize("max_loss", [0.001, 0.03, 0.1, 0.2, 10.0])
def test_auto_stops_before_the_limit(max_loss: float, tmp_path: Path) -> None:
    source = made(tmp_path)
    tokens = text()
    wishes = [Wish("attention", None)]
    got, path = sublayers.choose_drops(
        opened(tmp_path), mx.array(tokens), wishes, greedy=False, max_loss=max_loss
    )
    dropped = got.get("attention", [])
    limit = (1 + max_loss) * loss(source, {}, tokens)
    assert len(path) == len(dropped) + 1 and path[-1].loss <= limit
    assert loss(source, {"attention": dropped}, tokens) <= limit * 1.00001
    assert len(dropped) <= 3  # one layer keeps its attention in any case
    if len(dropped) < 3:
        left = [layer for layer in range(4) if layer not in dropped]
        assert all(loss(source, {"attention": [*dropped, i]}, tokens) > limit for i in left)


@pytest.mark.thorough
def test_the_limit_is_of_the_whole_loss(tmp_path: Path) -> None:
    """Not of each drop's share of it."""
    made(tmp_path)
    network = opened(tmp_path, resident=True)
    tokens = samples.sample_text(
        network, 16, 64, seed=0, start=None
    )  # so that drops cost something
    wishes = [Wish("attention", None)]
    _, steps = sublayers.choose_drops(network, tokens, wishes, greedy=False, max_loss=10.0)
    path = [step.loss for step in steps]
    known = False
    for i in range(2, len(path)):
        least = max([path[i - 1] / path[0], path[i] / path[i - 1]])
        if least < path[i] / path[0]:
            limit = (least + path[i] / path[0]) / 2 - 1
            got, _ = sublayers.choose_drops(network, tokens, wishes, greedy=False, max_loss=limit)
            assert len(got["attention"]) == i - 1
            known = True
    assert known


def greedy_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    cache = make_prompt_cache(model)
    out, step = [], mx.array([prompt])
    for _ in range(count):
        out.append(int(model(step, cache=cache)[0, -1].argmax().item()))
        step = mx.array([[out[-1]]])
    return out


SLIDING: Config = {"model_type": "mistral", "sliding_window": 7}
SOME_SLIDING: Config = {
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "sliding_window": 7,
}
CONVERSIONS: list[tuple[Config, dict[str, Any], bool]] = [
    ({}, {"drop_attention": 2}, True),
    ({"attention_bias": True}, {"drop_block": 1}, True),
    ({"tie_word_embeddings": True}, {"drop_ffn": 1, "drop_attention": 1}, True),
    (SLIDING, {"drop_attention": 2}, False),
    (SOME_SLIDING, {"drop_attention": 1}, False),
    ({"intermediate_size": 96}, {"drop_attention": 3, "greedy": True}, False),
    ({"block": "parallel"}, {"drop_attention": 1, "drop_ffn": 2}, False),
    ({"block": "serial", "skips": ("query", "head")}, {"drop_attention": 2}, False),
    (
        {"block": "parallel", "skips": ("head",), "per_channel": True},
        {"drop_attention": 1, "greedy": True},
        False,
    ),
]


@pytest.mark.parametrize(("config", "options", "stock"), CONVERSIONS, ids=str)
def test_converted(config: Config, options: dict[str, Any], stock: bool, tmp_path: Path) -> None:
    """The result is the source without these sub-layers, in mlx-lm's own code where that can be."""
    source = made(tmp_path / "s", **{"intermediate_size": 256} | config)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **options)
    assert report.stock == stock == (not (tmp_path / "o" / "model.py").exists())
    dropped = report.removed
    counts = {kind: options.get(f"drop_{kind}", 0) for kind in ("attention", "ffn", "block")}
    assert len(dropped.get("attention", [])) == counts["attention"] + counts["block"]
    assert len(dropped.get("ffn", [])) == counts["ffn"] + counts["block"]
    tokens = text(1)
    expected = reference.logits(source[0], without(source[1], dropped), tokens)
    model, _ = mlx_lm.load(str(tmp_path / "o"), trust_remote_code=not stock)  # type: ignore[misc]
    whole = counts["block"] > 0  # layers are left out, and the others renumbered
    assert type(model).__module__.endswith("nemotron-nas") == (stock and not whole)
    assert len(model.layers) == 4 - counts["block"]
    got = np.array(model(mx.array(tokens)))
    assert reference.worst_relative_error(expected, got) < 1e-4
    attention = 4 - len(dropped.get("attention", []))
    assert len(make_prompt_cache(model)) == attention
    assert report.cache_bytes_after * 4 == report.cache_bytes_before * attention
    width = source[0]["num_key_value_heads"] * reference.head_dim(source[0])
    assert report.cache_bytes_before == 2 * 4 * width * 4  # keys and values, layers, float32
    prompt = tokens[0, :5].tolist()
    whole = list(prompt)
    for _ in range(6):  # without a cache
        whole.append(int(model(mx.array([whole]))[0, -1].argmax().item()))
    assert greedy_tokens(model, prompt, 6) == whole[5:]
    own, _ = mlx_skipless.load(tmp_path / "o")
    assert mx.allclose(own(mx.array(tokens)), model(mx.array(tokens)), atol=1e-4).item()
    names = {row.name: row.goes for row in report.rows}
    for part, layers in dropped.items():
        for layer in range(4):
            assert (part in names[f"layers.{layer}"]) == (layer in layers)
    check = report.verification
    assert check is not None and check.kl > 0 and not report.warnings


def test_blocks_in_llama_cpps_terms(tmp_path: Path) -> None:
    """Its converter asks every block what is null, and nothing else."""
    made(tmp_path / "s", intermediate_size=256)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "o", drop_attention=2, drop_block=1)
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    names = mx.load(str(tmp_path / "o" / "model.safetensors")).keys()
    gone = 0
    for layer, block in enumerate(config["block_configs"]):
        for part, module, key in (
            ("attention", "self_attn", "n_heads_in_group"), ("ffn", "mlp", "ffn_mult")
        ):  # fmt: skip
            there = any(name.startswith(f"model.layers.{layer}.{module}.") for name in names)
            assert (block[part][key] is not None) == there
            assert block[part]["replace_with_linear"] is False
            gone += not there
    assert gone == 4


def test_a_packed_source_stays_packed(tmp_path: Path) -> None:
    """Every tensor that stays is the source's, bit for bit, and mlx-lm runs it."""
    made(tmp_path / "s", intermediate_size=256)
    model, tokenizer = mlx_lm.load(str(tmp_path / "s"))  # type: ignore[misc]
    config = json.loads((tmp_path / "s/config.json").read_text())
    model, config = quantize_model(model, config, 32, 4)
    mlx_lm.utils.save(tmp_path / "q", tmp_path / "s", model, tokenizer, config)
    report = mlx_skipless.convert(tmp_path / "q", tmp_path / "o", drop_attention=2)
    assert report.kept_packed and report.stock and not report.folded
    card = (tmp_path / "o/README.md").read_text()
    assert "stays so where nothing was changed" in card and "dequantized" not in card
    source: Any = mx.load(str(tmp_path / "q/model.safetensors"))
    result = stored(tmp_path / "o")
    gone = [
        f"layers.{layer}.{part}"
        for layer in report.removed["attention"]
        for part in ("self_attn", "input_layernorm")
    ]
    assert set(result) == {name for name in source if not any(g in name for g in gone)}
    for name, array in result.items():
        assert array.dtype == source[name].dtype and mx.array_equal(array, source[name]).item()
    assert sum(array.nbytes for array in result.values()) == report.bytes_after
    read, _ = mlx_lm.load(str(tmp_path / "o"))  # type: ignore[misc]
    model, _ = mlx_lm.load(str(tmp_path / "q"))  # type: ignore[misc]
    for layer in report.removed["attention"]:
        model.model.layers[layer].self_attn.o_proj.scales *= 0
        model.model.layers[layer].self_attn.o_proj.biases *= 0
    x = mx.array(text())
    assert mx.allclose(read(x), model(x), atol=1e-4).item()


@pytest.mark.parametrize("calibrated", [False, True])
def test_drops_compose_with_folding_and_quantization(calibrated: bool, tmp_path: Path) -> None:
    source = made(tmp_path / "s", intermediate_size=256)
    (tmp_path / "t.txt").write_text("once upon a time there was a king " * 200)
    options: dict[str, Any] = {"calibration": tmp_path / "t.txt"} if calibrated else {}
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", drop_attention=1, fold_norms=True, quantize=True,
        q_bits=8, q_group_size=32, **options,
    )  # fmt: skip
    assert report.stock and report.folded and report.quantization
    model, _ = mlx_lm.load(str(tmp_path / "o"))  # type: ignore[misc]
    tokens = text(1)
    expected = reference.logits(source[0], without(source[1], report.removed), tokens)
    got = np.array(model(mx.array(tokens)))
    if not calibrated:  # fitted matrices answer for the sub-layer that is gone
        assert reference.softmax_kl(expected, got) < 0.01
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop_attention": 4}, "1 to 3"),
        ({"drop_attention": 0}, "at least 1"),
        ({"drop_ffn": -1}, "at least 1"),
        ({"drop_block": "some"}, "give a number of layers, or auto"),
        ({"drop_attention": 1, "max_loss": 0.1}, "--max-loss is for"),
        ({"drop_attention": "auto", "max_loss": 0.0}, "positive share"),
        ({"greedy": True}, "--greedy is for"),
        ({"drop_attention": 1, "skipless": True}, "drops every skip"),
    ],
)
def test_drops_that_cannot_be(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    made(tmp_path / "s")
    with pytest.raises(mlx_skipless.UserError, match=said):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_skipless_model_drops_nothing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", norm="qkv")
    with pytest.raises(mlx_skipless.UserError, match=r"--drop-attention auto: nothing passes"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", drop_attention="auto")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "s", intermediate_size=256)
    shared = ["convert", "--model", str(tmp_path / "s"), "--mlx-path", str(tmp_path / "o")]
    main([*shared, "--drop-attention", "2", "--dry-run"])
    assert (
        "which layers lose it is measured when converting: 2 x attention" in capsys.readouterr().out
    )
    main([*shared, "--drop-attention", "auto", "--max-loss", "40%", "--json", str(tmp_path / "j")])
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "j").read_text())
    assert "whole and after each step" in out and report["removed"]["attention"]
    assert report["cache_bytes_after"] < report["cache_bytes_before"]
    for wrong in (["--drop-attention", "x"], ["--drop-attention", "auto", "--max-loss", "x%"]):
        assert main([*shared, *wrong]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"drop_block": 1, "drop_attention": 1}, {"drop_block": 1, "drop_attention": 1, "drop_ffn": 1}],
    ids=str,
)
def test_one_attention_stays_whatever_is_added_up(options: dict[str, Any], tmp_path: Path) -> None:
    make_llama(tmp_path / "s", **SIZES | {"num_hidden_layers": 2})
    with pytest.raises(mlx_skipless.UserError, match="layers 1 can lose their attention"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "options", [{"drop_attention": 1}, {"drop_attention": 1, "greedy": True}, {"drop_ffn": 2}],
    ids=str,
)  # fmt: skip
def test_what_is_gone_is_not_dropped_again(options: dict[str, Any], tmp_path: Path) -> None:
    """It matters least of all: nothing changes without it."""
    make_llama(tmp_path / "s", **SIZES)
    first = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "r", drop_attention=2, drop_ffn=1, greedy=True
    )
    again = mlx_skipless.convert(tmp_path / "r", tmp_path / "rr", **options)
    for kind in ("attention", "ffn"):
        new = {*again.removed.get(kind, ())}
        assert len(new) == options.get(f"drop_{kind}", 0) and not new & {*first.removed[kind]}
    assert again.params_after < again.params_before
    with pytest.raises(mlx_skipless.UserError, match="layers 1 to 1 can lose theirs"):
        mlx_skipless.convert(tmp_path / "r", tmp_path / "o", drop_attention=2)
    last = mlx_skipless.convert(tmp_path / "r", tmp_path / "rrr", drop_attention=1, verify=False)
    assert not {*last.removed["attention"]} & {*first.removed["attention"]}
    with pytest.raises(mlx_skipless.UserError, match="none left that can go"):
        mlx_skipless.convert(tmp_path / "rrr", tmp_path / "o", drop_attention=1)


@pytest.mark.parametrize(
    ("kind", "changes", "asked"),
    [
        ("gemma4_text", {}, {"drop_attention": 4}),
        ("olmo2", {"num_hidden_layers": 3}, {"drop_attention": 2, "replace_attention": 1}),
        ("olmo2", {"num_hidden_layers": 3}, {"drop_block": 1, "replace_attention": 2}),
    ],
    ids=str,
)
def test_a_greedy_search_drops_as_many_as_are_asked_for(
    kind: str, changes: Config, asked: dict[str, int], tmp_path: Path
) -> None:
    """Also where all that may go do; the path names each step, of drops and of stand-ins."""
    zoo.make_model(tmp_path / "s", kind, **changes)
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", greedy=True, calibration=tmp_path / "t.txt", verify=False,
        **asked,
    )  # fmt: skip
    blocks = asked.get("drop_block", 0)
    dropped = asked.get("drop_attention", 0) + blocks
    assert len(report.removed.get("attention", ())) == dropped
    assert len(report.replaced.get("attention", ())) == asked.get("replace_attention", 0)
    (told,) = [note for note in report.notes if "whole and after each step" in note]
    assert told.count("attention") + told.count("block") == sum(asked.values())
    assert len(told.split(": ")[1].split(", ")) == 1 + sum(asked.values())
