"""Matrices in the place of sub-layers: the least squares that they are, and how they run."""

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from drops import WAYS, Case, differ, open_case
from grids import only, thin, thorough
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_model
from zoo import make_model

from mlx_skipless import UserError, convert
from mlx_skipless.inference.stock import find_stock, open_network
from mlx_skipless.network.driver import is_held_out, split_batches
from mlx_skipless.network.stock import StockNetwork
from mlx_skipless.removal.standins import choose_stand_ins, fit_alone, fit_together
from mlx_skipless.removal.sublayers import Wish

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TEXT = np.random.default_rng(1).integers(0, 264, (32, 24))
# What each adds its sub-layers' outputs to the stream with; None: a norm stands between.
SHARES = {"qwen3": 1.0, "granite": "residual_multiplier", "cohere2": 1.0, "olmo2": None}


class Watched(nn.Module):
    """A module that keeps what it is given and gives."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.seen = inner, []

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> Any:
        out = self.inner(x, *args, **options)
        self.seen.append((np.array(x, np.float64), np.array(out, np.float64)))
        return out

    def __getattr__(self, name: str) -> Any:
        if name in self or "inner" not in self:
            return super().__getattr__(name)
        return getattr(self.inner, name)


class Linear(nn.Module):
    """A sub-layer that is a matrix."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        return self.linear(x)


class Projected(Watched):
    """A sub-layer that runs, and of whose output nothing is used."""

    def __init__(self, inner: Any, linear: nn.Linear):
        super().__init__(inner)
        self.linear = linear

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> Any:
        out = self.inner(x, *args, **options)
        given = self.linear(x)
        return (given, *out[1:]) if isinstance(out, tuple) else given


def put(model: Any, layer: int, path: str, wrap: Callable[[Any], Any]) -> Any:
    """Wrap a part of a block, or with no path the block; return the wrapper."""
    name = f"model.layers.{layer}" + (f".{path}" if path else "")
    there = wrap(dict(model.named_modules())[name])
    model.update_modules(tree_unflatten([(name, there)]))
    return there


def rows(seen: list[tuple[np.ndarray, np.ndarray]], which: int) -> np.ndarray:
    return np.concatenate([one[which].reshape(-1, one[which].shape[-1]) for one in seen])


def regress(
    x: np.ndarray, y: np.ndarray, after: np.ndarray, held: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """The best of several ridge regressions of weighted rows, as one least-squares problem each."""
    weight = 1 / np.sqrt((after**2).mean(-1, keepdims=True))
    x, y = np.hstack([x, np.ones_like(x[:, :1])]) * weight, y * weight

    def solve(use: np.ndarray, ridge: float) -> np.ndarray:
        size = (x[use] ** 2).sum(0).mean()
        wall = np.sqrt(ridge * size) * np.eye(x.shape[1])
        wide = np.vstack([x[use], wall]), np.vstack([y[use], np.zeros((len(wall), y.shape[1]))])
        return np.linalg.lstsq(*wide, rcond=None)[0]

    def judge(ridge: float) -> float:
        return ((x[held] @ solve(~held, ridge) - y[held]) ** 2).sum()

    best = min(RIDGES, key=judge)
    w = solve(np.ones(len(x), bool), best)
    return w[:-1].T, w[-1], judge(best) / y[held].size


def held_out() -> np.ndarray:
    batches = split_batches(mx.array(TEXT))
    return np.concatenate([np.full(batch.size, is_held_out(i)) for i, batch in enumerate(batches)])


def watch(folder: Path, layer: int, path: str, change: Callable[[Any], None]) -> dict[str, Any]:
    """Run a model on the text; return what a part reads and gives, and the streams around it."""
    model: Any = load_model(folder)[0]
    change(model)
    block = put(model, layer, "", Watched)
    part = put(model, layer, "inner." + path, Watched)
    attention = part if "attn" in path else put(model, layer, "inner.self_attn", Watched)
    model(mx.array(TEXT))
    stream, out = rows(block.seen, 0), rows(block.seen, 1)
    return {
        "x": rows(part.seen, 0), "y": rows(part.seen, 1), "stream": stream, "out": out,
        "attention": rows(attention.seen, 1),
    }  # fmt: skip


def around(seen: dict[str, Any], name: str, share: float | None, kind: str) -> tuple[Any, Any]:
    """The stream before and behind a sub-layer, by what the architecture says of it."""
    if share is None:  # olmo2: h = x + norm(attention(x)), out = h + norm(ffn(h)), read without one
        middle = seen["x"] if kind == "ffn" else None
        return (middle, seen["out"]) if kind == "ffn" else (seen["stream"], None)
    middle = seen["stream"] + share * seen["attention"]
    return (seen["stream"], middle) if kind == "attention" else (middle, seen["out"])


def find_share(name: str, config: dict[str, Any]) -> float | None:
    share = SHARES[name]
    return config[share] if isinstance(share, str) else share  # type: ignore[return-value]


def close(got: nn.Linear, weight: np.ndarray, bias: np.ndarray) -> None:
    largest = np.abs(weight).max()
    np.testing.assert_allclose(np.array(got.weight), weight, atol=2e-3 * largest)
    np.testing.assert_allclose(np.array(got.bias), bias, atol=2e-3 * max(largest, abs(bias).max()))


@pytest.mark.parametrize("name", only({"granite", "olmo2"}, SHARES))
def test_the_fit_is_a_ridge_regression(name: str, tmp_path: Path) -> None:
    """Of a sub-layer's output on what it reads, a token by the size of its stream behind it."""
    config = make_model(tmp_path, name)
    network, share = opened(tmp_path), find_share(name, config)
    free = {"attention": {1}, "ffn": {2}}
    got = fit_alone(network, mx.array(TEXT), free)
    assert {*got} == {("attention", 1), ("ffn", 2)}
    for (kind, layer), fit in got.items():
        path = {"attention": "self_attn", "ffn": "mlp"}[kind]
        seen = watch(tmp_path, layer, path, lambda model: None)
        _, after = around(seen, name, share, kind)
        if after is None:
            inner: Any = load_model(tmp_path)[0].layers[layer]
            after = seen["stream"] + np.array(inner.post_attention_layernorm(mx.array(seen["y"])))
        weight, bias, error = regress(seen["x"], seen["y"], after, held_out())
        close(fit.linear, weight, bias)
        assert fit.error == pytest.approx(error * (share or 1) ** 2, rel=1e-3)


@pytest.mark.parametrize("name", only({"granite", "olmo2"}, SHARES))
def test_a_stand_in_makes_up_for_those_before_it(name: str, tmp_path: Path) -> None:
    """It gives what the stream lacks, too, where its output is added as it is."""
    config = make_model(tmp_path, name)
    network, share = opened(tmp_path), find_share(name, config)
    chosen = {"attention": [1], "ffn": [2]}
    got = fit_together(network, network, mx.array(TEXT), chosen)
    alone = fit_alone(network, mx.array(TEXT), chosen)
    first = got["attention", 1]
    assert differ(first.weight, alone["attention", 1].linear.weight) == 0

    whole = watch(tmp_path, 2, "mlp", lambda model: None)
    lacks = watch(
        tmp_path, 2, "mlp", lambda model: put(model, 1, "self_attn", lambda a: Projected(a, first))
    )
    before, after = around(whole, name, share, "ffn")
    now, _ = around(lacks, name, share, "ffn")
    wanted = whole["y"] + ((before - now) / share if share is not None else 0)
    close(got["ffn", 2], *regress(lacks["x"], wanted, after, held_out())[:2])
    assert differ(got["ffn", 2].weight, alone["ffn", 2].linear.weight) > 0


def opened(folder: Path) -> StockNetwork:
    source = find_stock(folder, any_family=True)
    assert source is not None
    return open_network(source)


def test_what_is_linear_is_replaced_without_a_loss(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen3")
    linear = nn.Linear(64, 64)

    def build() -> nn.Module:
        model = load_model(tmp_path, lazy=True)[0]
        put(model, 2, "self_attn", lambda inner: Linear(linear))
        return model

    fits = fit_alone(StockNetwork(build, resident=True), mx.array(TEXT), {"attention": {2}})
    found = fits["attention", 2]
    assert found.error < 1e-8
    np.testing.assert_allclose(np.array(found.linear.weight), np.array(linear.weight), atol=1e-3)


@pytest.mark.parametrize("kind", only({"attention"}, ["attention", "ffn"]))
def test_those_with_the_least_loss_are_chosen(kind: str, tmp_path: Path) -> None:
    """Each with its stand-in alone, by mlx-lm's own network."""
    make_model(tmp_path, "qwen3")
    network, tokens = opened(tmp_path), mx.array(TEXT)
    alone = fit_alone(network, tokens, {kind: range(4)})
    path = {"attention": "self_attn", "ffn": "mlp"}[kind]

    def loss(layer: int) -> float:
        model: Any = load_model(tmp_path)[0]
        put(model, layer, path, lambda inner: Projected(inner, alone[kind, layer].linear))
        logits = model(tokens)[:, :-1].astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean").item()

    got, steps = choose_stand_ins(
        network, tokens, [Wish(kind, 2)], greedy=False, max_loss=0.0, spared={}
    )
    assert got == {kind: sorted(sorted(range(4), key=loss)[:2])} and not steps
    _, (whole, one) = choose_stand_ins(
        network, tokens, [Wish(kind, 1)], greedy=True, max_loss=0.0, spared={}
    )
    assert one.layer == min(range(4), key=loss)
    assert one.loss == pytest.approx(min(map(loss, range(4))), rel=1e-4) and whole.kind is None


@pytest.fixture(scope="session")
def open_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return lru_cache(lambda name: open_case(tmp_path_factory.mktemp(name), name))


RUNS = [
    (name, way)
    for name in ("qwen3", "gpt_oss", "gemma4_text", "qwen3_5", "phi", "deepseek_v3")
    for way in WAYS
    if way not in ("4 bits", "saved")
]


@pytest.mark.parametrize(
    "case", thin(RUNS, lambda case: case, whole=True), ids=lambda case: "-".join(case)
)
def test_it_runs_as_if_the_sub_layer_were_there(
    case: tuple[str, str], open_once: Callable[[str], Case]
) -> None:
    """Caches count tokens, whatever reads them; what is handed on is."""
    name, way = case
    network = open_once(name)
    if (reason := network.find_obstacle(way)) is not None:
        pytest.skip(f"{name} itself cannot: {reason}")
    for kind in ("attention", "ffn"):
        for layer in network.droppable(kind):
            linear = nn.Linear(64, 64)
            project = partial(Projected, linear=linear)
            with network.lacking(network.model, layer, kind, project):
                wanted = WAYS[way](network.model)
            with network.lacking(network.model, layer, kind, linear=linear):
                got = WAYS[way](network.model)
            assert differ(got, wanted) == 0, (kind, layer)


CONVERTED = [
    ("qwen3_moe", {"replace_attention": 1, "replace_ffn": 1}),
    ("gemma4_text", {"replace_attention": "auto", "max_loss": 0.5, "drop_ffn": 1}),
    ("gpt_oss", {"replace_ffn": 2, "drop_block": 1, "quantize": True, "q_group_size": 32}),
    ("llama", {"replace_attention": 2, "greedy": True, "dtype": "float16"}),
    ("plamo", {"replace_attention": 1}),  # whose blocks name what they give their attention
]


@pytest.mark.parametrize(
    "case", only(CONVERTED[2:3] + CONVERTED[4:], CONVERTED), ids=lambda case: case[0]
)
def test_converted(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """The result, loaded by mlx-lm alone, is the source with matrices in these places."""
    name, asked = case
    config = make_model(tmp_path / "s", name)
    (tmp_path / "text.txt").write_text(" ".join(map(str, TEXT.flatten())) * 30)
    report = convert(tmp_path / "s", tmp_path / "o", calibration=tmp_path / "text.txt", **asked)
    model: Any = load_model(tmp_path / "o", trust_remote_code=True)[0]
    written = json.loads((tmp_path / "o/config.json").read_text())
    replaced = {(kind, n) for kind, layers in report.replaced.items() for n in layers}
    counts = {kind: len(layers) for kind, layers in report.replaced.items()}
    for kind in ("attention", "ffn"):
        if isinstance(count := asked.get(f"replace_{kind}", 0), int):
            assert counts.get(kind, 0) == count
    assert replaced and written["replaced_width"] == config["hidden_size"]
    assert sum(map(len, written["replaced_sublayers"].values())) == len(replaced)
    linear = [module.linear for module in model.modules() if type(module).__name__ == "StandIn"]
    assert len(linear) == len(replaced)
    whole = dict.fromkeys(counts, report.params_before)
    assert report.params_after < whole[next(iter(counts))]
    if "quantize" not in asked:
        dtype = getattr(mx, asked.get("dtype", "float32"))
        assert {one.weight.dtype for one in linear} == {dtype}
    assert report.verification is not None and not report.stock
    logits = model(mx.array(TEXT[:1]))
    assert mx.isfinite(logits.astype(mx.float32)).all().item()


@pytest.mark.parametrize("window", [None, 7])
def test_a_window_that_mlx_lm_does_not_have_is_told(window: int | None, tmp_path: Path) -> None:
    """And what config.json leaves to defaults is written as it is meant."""
    config = make_model(tmp_path / "s", "llama") | {"model_type": "mistral"}
    (tmp_path / "s/config.json").write_text(json.dumps(config | {"sliding_window": window}))
    report = convert(tmp_path / "s", tmp_path / "o", replace_ffn=1, verify=False)
    assert any("looks back on all" in note for note in report.notes) == (window is not None)
    written = json.loads((tmp_path / "o/config.json").read_text())
    assert written["tie_word_embeddings"] is config["tie_word_embeddings"]


def test_our_own_networks_are_none_of_mlx_lms(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--replace-ffn: that is for models that mlx-lm's own"):
        convert(mlx_path=tmp_path / "o", replace_ffn=1)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("qwen3", {"replace_attention": 4}, "layers 1 to 3 can lose theirs"),
        (
            "qwen3",
            {"replace_attention": 2, "drop_attention": 3},
            "--drop-attention 3 and --replace-attention 2: .* can lose their attention",
        ),
        ("qwen3", {"replace_attention": 1, "skipless": True}, "--skipless"),
        ("qwen3", {"replace_ffn": 1, "fold_norms": True}, "--fold-norms and --replace-ffn"),
        ("falcon_h1", {"replace_attention": 1}, "2 of them, side by side"),
        pytest.param("gemma3n", {"replace_ffn": 1}, "more than the stream", marks=thorough),
    ],
)
def test_what_cannot_be(name: str, asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    make_model(tmp_path / "s", name)
    with pytest.raises(UserError, match=said):
        convert(tmp_path / "s", tmp_path / "o", **asked)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", [*only(["qwen3"], ["llama", "qwen3", "olmo2"])])
def test_a_result_with_stand_ins_is_a_source(tmp_path: Path, kind: str) -> None:
    """As it is, and quantized as mlx-lm quantizes what runs it."""
    make_model(tmp_path / "whole", kind)
    (text := tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 300)
    once = tmp_path / "once"
    convert(tmp_path / "whole", once, calibration=text, replace_ffn=1, verify=False)
    tokens = mx.array(TEXT[:2])

    def run(folder: Path, *, rounded: bool = False) -> np.ndarray:
        model, _ = load_model(folder, model_config={}, trust_remote_code=True)
        if rounded:
            nn.quantize(model, group_size=32, bits=4)
        return np.array(model(tokens).astype(mx.float32))

    convert(once, tmp_path / "again", remove="none", verify=False)
    np.testing.assert_array_equal(run(tmp_path / "again"), run(once))
    convert(once, tmp_path / "packed", quantize=True, q_group_size=32, verify=False)
    np.testing.assert_allclose(run(tmp_path / "packed"), run(once, rounded=True), atol=1e-4)
