"""What rounding a matrix and removing one cost, against the NumPy network."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from factory import make_checkpoint
from reference import Config, Weights

from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.network.driver import StreamedNetwork
from mlx_skipless.network.wiring import find_points
from mlx_skipless.quantization import sensitivity
from mlx_skipless.quantization.formats import Format
from mlx_skipless.quantization.layout import Layout, Quantization
from mlx_skipless.removal.candidates import find_mixed
from mlx_skipless.removal.choices import RemovalCost
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import isolate_removal, make_plan

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "norm": "qkv",
}  # fmt: skip
GRID: list[Config] = [
    {},
    {"block": "parallel", "final_norm": False, "skips": ("head",), "per_channel": True},
    {"tie_word_embeddings": True, "gains": True},
    {
        "skip": "ffn",
        "sliding_window": 5,
        "linear_paths": True,
        "skips": ("query", "head", "output"),
    },
    {"num_key_value_heads": 4, "bias": ("q_proj", "down_proj")},
]


def rounded(weights: Weights, names: list[str], bits: int) -> Weights:
    out = dict(weights)
    for name in names:
        w = mx.array(weights[f"{name}.weight"].astype(np.float32))
        packed = mx.quantize(w, 32, bits)
        out[f"{name}.weight"] = np.array(mx.dequantize(*packed, 32, bits)).astype(np.float64)
    return out


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("config", GRID, ids=str)
def test_rounding_costs(config: Config, bits: int, tmp_path: Path) -> None:
    """Each matrix alone, the embedding and the head among them."""
    source = make_checkpoint(tmp_path, **SIZES | config)
    checkpoint = open_checkpoint(tmp_path)
    plan = make_plan(checkpoint.args, remove="none")
    layout = Layout(plan.after, mx.float32, Quantization(bits, 32))
    tokens = np.random.default_rng(0).integers(0, 256, (4, 12))
    got = sensitivity.measure_rounding(
        StreamedNetwork(plan.after, Merger(checkpoint, plan, mx.float32)),
        layout.find_adjustable(),
        layout.format_of,
        mx.array(tokens),
    )
    matrices = {name.removesuffix(".weight") for name, w in source[1].items() if w.ndim == 2}
    assert set(got) == matrices
    exact = reference.logits(*source, tokens)
    for where, cost in got.items():
        other = reference.logits(source[0], rounded(source[1], [where], bits), tokens)
        nearest = reference.softmax_kl(exact, other)
        if where == "model.embed_tokens" and config.get("tie_word_embeddings"):
            assert 0 < cost < 0.5 * nearest  # test_ends.py: it is rounded for the head
        else:
            assert cost == pytest.approx(nearest, rel=0.02, abs=1e-8), where


def costs_of(
    folder: Path, letters: str, tokens: np.ndarray, bits: int = 4
) -> dict[str, RemovalCost]:
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint.args, remove=letters, quantized=True)
    found = find_points(plan.before)
    quantization = Quantization(bits, 32)
    trials = []
    for index, where in plan.eliminated.items():
        around = find_mixed(plan.before, found, index, where)
        if not around or any(m in ("lm_head", "model.embed_tokens") for m in around):
            continue
        single = isolate_removal(plan, index)
        merger = Merger(checkpoint, single, mx.float32)
        layout = Layout(single.after, mx.float32, quantization)
        trials.append(sensitivity.Trial(where, tuple(around), merger, layout))
    source = Merger(checkpoint, make_plan(checkpoint.args, remove="none"), mx.float32)
    format_of = Layout(plan.before, mx.float32, quantization).format_of
    network = StreamedNetwork(plan.before, source)
    return sensitivity.measure_removals(network, trials, format_of, mx.array(tokens))


REMOVALS = [
    ({}, "q"),
    ({"skip": "ffn"}, "q"),
    ({"block": "parallel"}, "q"),
    ({"block": "parallel"}, "p"),
    ({"num_key_value_heads": 4}, "k"),
    ({"sliding_window": 9, "linear_paths": True, "gains": True}, "q"),
]


@pytest.mark.parametrize(("config", "letters"), REMOVALS, ids=str)
def test_an_exact_removal_costs_nothing(
    config: Config, letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a format that loses nothing only the fit is left."""
    monkeypatch.setattr(Format, "nearest", lambda form, w: {"weight": w.astype(mx.float32)})
    monkeypatch.setattr(Format, "dense", lambda form, packed: packed["weight"])
    monkeypatch.setattr(
        Format, "with_feedback", lambda form, w, *_: {"weight": mx.array(w.astype(np.float32))}
    )
    make_checkpoint(tmp_path, **SIZES | config)
    tokens = np.random.default_rng(0).integers(0, 256, (16, 64))
    found = costs_of(tmp_path, letters, tokens)
    assert found
    for cost in found.values():
        assert cost.removed < 1e-5 and cost.rounded < 1e-9 and cost.pays


@pytest.mark.parametrize(("config", "letters"), REMOVALS, ids=str)
def test_removal_costs(config: Config, letters: str, tmp_path: Path) -> None:
    """The price of keeping is that of rounding; that of removing grows with the conditioning."""
    removed = {}
    for spread in (0.0, 3.0):
        folder = tmp_path / str(spread)
        source, weights = make_checkpoint(folder, **SIZES | config)
        name = {"q": "q_proj", "k": "k_proj", "p": "o_proj"}[letters]
        for key, w in weights.items():
            if key.endswith(f"{name}.weight"):
                u, s, v = np.linalg.svd(w)
                weights[key] = np.mean(s) * (u * np.logspace(0, -spread, len(s))) @ v
        arrays = {key: mx.array(w.astype(np.float32)) for key, w in weights.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
        tokens = np.random.default_rng(0).integers(0, 256, (16, 64))
        found = costs_of(folder, letters, tokens)
        removed[spread] = {where: cost.removed for where, cost in found.items()}
        args = open_checkpoint(folder).args
        plan = make_plan(args, remove=letters, quantized=True)
        held = tokens[14:]  # of batches of two rows the eighth
        exact = reference.logits(source, weights, held)
        for index, where in plan.eliminated.items():
            if where in found:
                names = [where, *find_mixed(args, find_points(args), index, where)]
                other = reference.logits(source, rounded(weights, names, 4), held)
                expected = reference.softmax_kl(exact, other)
                assert found[where].rounded == pytest.approx(expected, rel=0.05)
    assert sum(removed[3.0].values()) > 1.5 * sum(removed[0.0].values())


def test_what_pays() -> None:
    assert RemovalCost(0.01, 0.02).pays and not RemovalCost(0.02, 0.01).pays
    assert RemovalCost(5e-5, 0.0).pays  # no one notices
