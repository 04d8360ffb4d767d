"""The largest numbers on the way through a network, against NumPy's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import architectures
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from factory import make_checkpoint, make_llama, stored
from reference import Config, Weights

import mlx_skipless
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.network.driver import StreamedNetwork
from mlx_skipless.network.magnitudes import NotFinite, Watch
from mlx_skipless.network.model import Block
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan

MATRICES = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("up_proj", "down_proj")}


def largest(config: Config, weights: Weights, layer: int, x: np.ndarray) -> dict[str, float]:
    """What enters and leaves a layer's matrices, by NumPy, for blocks without norms."""
    prefix = f"model.layers.{layer}."

    def behind(part: Any, matrix: str, inner: np.ndarray) -> np.ndarray:
        """What enters ``matrix``: the output of a part that ends in the identity instead."""
        changed = {**weights, f"{prefix}{matrix}.weight": np.eye(inner.shape[1])}
        return part(config, changed, layer, x if part is reference.attention else y)

    y = reference.attention(config, weights, layer, x)
    inputs = dict.fromkeys(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], x)
    inputs |= dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], y)
    for name, part in (
        ("self_attn.o_proj", reference.attention),
        ("mlp.down_proj", reference.feed_forward),
    ):
        inputs[name] = behind(part, name, weights[f"{prefix}{name}.weight"])
    found = {}
    for name, into in inputs.items():
        found[f"{prefix}{name}'s input"] = np.abs(into).max()
        found[f"{prefix}{name}'s output"] = np.abs(into @ weights[f"{prefix}{name}.weight"].T).max()
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("louder", ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"])
def test_a_layers_largest_number(tmp_path: Path, seed: int, louder: str) -> None:
    """Of all that enters and leaves its matrices, whichever of them is the largest."""
    config, weights = make_checkpoint(tmp_path, seed=seed, num_hidden_layers=1)
    (name,) = (n for n in weights if n.endswith(f"{louder}.weight"))
    weights[name] = weights[name] * 30
    checkpoint = open_checkpoint(tmp_path)
    block = Block(checkpoint.args, 0)
    block.load_weights([(n[len("model.layers.0.") :], mx.array(w.astype(np.float32)))
                        for n, w in weights.items() if ".layers.0." in n])  # fmt: skip
    x = np.random.default_rng(seed).standard_normal((2, 7, config["hidden_size"]))
    expected = largest(config, weights, 0, x)
    # RoPE turns pairs, which may put more into one of their two numbers.
    where = max(expected, key=expected.__getitem__)
    watch = Watch()
    out = watch.run("model.layers.0", block, mx.array(x.astype(np.float32)), "causal", None)
    assert reference.worst_relative_error(reference.block(config, weights, 0, x), out) < 1e-4
    (found,) = watch.layers
    if "rope" in found.where:
        assert expected[where] <= found.value <= 1.5 * expected[where]
    else:
        assert found.where == where or expected[found.where] == pytest.approx(expected[where])
        assert found.value == pytest.approx(expected[where], rel=1e-4)
    assert found.dtype == "float32" and found.share == pytest.approx(found.value / 3.4028235e38)
    again = block(mx.array(x.astype(np.float32)), "causal", None)
    assert mx.array_equal(again, out), "the block is as it was"
    assert all("_Probe" not in type(m).__name__ for m in block.modules())


@pytest.mark.parametrize(
    ("matrix", "side"),
    [
        ("self_attn.k_proj", "self_attn.k_proj's output"),
        ("self_attn.o_proj", "self_attn.o_proj's output"),
        ("mlp.up_proj", "mlp.up_proj's output"),
        ("mlp.down_proj", "mlp.down_proj's output"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_that_is_no_number(tmp_path: Path, matrix: str, side: str, value: float) -> None:
    make_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    plan = make_plan(checkpoint.args, remove="none")

    class Broken(Merger):
        def layer(self, layer: int) -> dict[str, mx.array]:
            out = super().layer(layer)
            if layer == 1:
                name = f"model.layers.1.{matrix}.weight"
                broken = np.array(out[name])
                broken[3, 2] = value
                out[name] = mx.array(broken)
            return out

    network = StreamedNetwork(checkpoint.args, Broken(checkpoint, plan, mx.float32))
    with pytest.raises(NotFinite) as caught:
        network.hidden(mx.array([[5, 6, 7]]), watch=Watch())
    assert caught.value.first.where == f"model.layers.1.{side}"


def louder(folder: Path, name: str, factor: float) -> None:
    file = folder / "model.safetensors"
    arrays: Any = dict(mx.load(str(file)))
    arrays[name] = arrays[name] * factor
    mx.eval(arrays)
    file.unlink()
    mx.save_safetensors(str(file), arrays)


@pytest.mark.parametrize("options", [{}, {"quantize": True}])
def test_an_overflow_names_its_layer_and_tensor(tmp_path: Path, options: dict[str, Any]) -> None:
    """A source of float32 that float16 holds, each weight, but not what flows between them."""
    make_checkpoint(tmp_path / "s", num_hidden_layers=3)
    louder(tmp_path / "s", "model.layers.0.mlp.down_proj.weight", 3e3)
    louder(tmp_path / "s", "model.layers.1.mlp.down_proj.weight", 1e-3)
    with pytest.raises(mlx_skipless.UserError) as caught:
        mlx_skipless.convert(
            tmp_path / "s", tmp_path / "out", remove="none", dtype="float16", **options
        )
    message = str(caught.value)
    assert re.search(r"result overflows float16 .* at model\.layers\.1\.\S+'s (in|out)put", message)
    assert "--dtype bfloat16" in message and not (tmp_path / "out").exists()
    mlx_skipless.convert(tmp_path / "s", tmp_path / "out", remove="none", **options)


def test_a_source_that_overflows_is_told_from_a_result(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s")
    for layer in range(3):
        louder(tmp_path / "s", f"model.layers.{layer}.mlp.down_proj.weight", 1e20)
    with pytest.raises(
        mlx_skipless.UserError,
        match=r"source itself overflows float32 .* at model\.layers\.[12]\.",
    ):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "out", remove="none")


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (6e3, True)])
@pytest.mark.parametrize("kind", ["stock", "own"])
def test_numbers_near_a_types_end_are_warned_about(
    tmp_path: Path, factor: float, warned: bool, kind: str
) -> None:
    """In mlx-lm's own network and in ours; the figures are those of the stored weights."""
    if kind == "stock":
        make_llama(tmp_path / "s", num_hidden_layers=2)
    else:
        make_checkpoint(tmp_path / "s", num_hidden_layers=2, norm="qkv")
    louder(tmp_path / "s", "model.layers.1.mlp.down_proj.weight", factor)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "out", remove="none", dtype="float16")
    assert report.stock == (kind == "stock")
    check = report.verification
    assert check is not None
    first, second = check.magnitudes
    assert first.dtype == second.dtype == "float16"
    assert first.where.startswith("model.layers.0.") and second.where.startswith("model.layers.1")
    assert first.share == pytest.approx(first.value / 65504) and first.share < 1 / 8
    told = [warning for warning in report.warnings if "of what float16 holds" in warning]
    assert bool(told) == warned == (second.share > 1 / 8)
    if warned:
        assert second.where in told[0] and "bfloat16" in told[0]
        weights = stored(tmp_path / "out")
        down = np.abs(np.array(weights["model.layers.1.mlp.down_proj.weight"]))
        assert down.max() < second.value <= 65504


LOUD = 6e3  # and a number of float16 comes near its end


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_copys_numbers_are_its_sources(tmp_path: Path, dtype: str) -> None:
    """What a copy has of its source is not laid at the conversion's door; what a type costs is."""
    make_llama(tmp_path / "s", num_hidden_layers=2, dtype="float16")
    louder(tmp_path / "s", "model.layers.1.mlp.down_proj.weight", LOUD)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "out", dtype=dtype)
    assert report.stock and report.verification is not None
    error = report.verification.max_rel_logit_error
    assert (error > 1e-3) == (dtype == "bfloat16") and (error == 0) == (dtype != "bfloat16")
    told = [warning for warning in report.warnings if "numbers reach" in warning]
    assert len(told) == (dtype == "float16")
    assert all(warning.startswith("the source itself: numbers reach") for warning in told)
    if dtype == "float16":
        louder(tmp_path / "s", "model.layers.1.mlp.up_proj.weight", 30)
        with pytest.raises(mlx_skipless.UserError, match=r"source itself .* use --dtype bfloat16"):
            mlx_skipless.convert(tmp_path / "s", tmp_path / "more")


@pytest.mark.parametrize("kind", architectures.ARCHITECTURES)
def test_every_architecture_can_be_watched(tmp_path: Path, kind: str) -> None:
    """Whatever its modules are: experts' take more than the stream, namely which experts."""
    architectures.make(tmp_path, kind)
    checkpoint = open_checkpoint(tmp_path)
    plan = make_plan(checkpoint.args, remove="none")
    network = StreamedNetwork(checkpoint.args, Merger(checkpoint, plan, mx.float32))
    watch = Watch()
    watched = network.hidden(mx.array([[5, 6, 7]]), watch=watch)
    assert len(watch.layers) == checkpoint.args.num_hidden_layers
    assert mx.array_equal(watched, network.hidden(mx.array([[5, 6, 7]])))


@pytest.mark.parametrize("skips", [(), ("query", "head", "output")], ids=str)
def test_what_comes_out_of_a_table_is_watched(skips: tuple[str, ...], tmp_path: Path) -> None:
    """An attention of no matrix of its own gets q, k and v, and gives its heads twice, perhaps."""
    make_checkpoint(tmp_path / "model", num_key_value_heads=4, skips=skips)
    report = mlx_skipless.convert(
        tmp_path / "model", tmp_path / "out", remove="p", precompute_first_layer="force"
    )
    assert report.verification is not None and len(report.verification.magnitudes) == 3


def test_numbers_of_experts_are_passed_over() -> None:
    """A gate gives places, which are no floats, and what they weigh; its block asks it for more."""

    class Gate(nn.Module):
        top = 2

        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            return mx.argpartition(x, -self.top, axis=-1)[..., -self.top :], 3 * x

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()

        def __call__(self, x: mx.array) -> mx.array:
            places, scores = self.gate(x)
            return mx.take_along_axis(scores, places, axis=-1)[..., : self.gate.top]

    watch = Watch()
    watch.run("layer", Layer(), mx.array([[1.0, -5.0, 2.0, 4.0]]))
    assert (watch.layers[0].where, watch.layers[0].value) == ("layer.gate's output", 15)
