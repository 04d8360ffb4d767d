"""What the matrices of a layer do: which read the same, which write the stream."""

from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import zoo
from grids import only

from mlx_skipless.network.stock import StockNetwork
from mlx_skipless.quantization import roles
from mlx_skipless.quantization.roles import Readers, Writer, find_readers, find_writers

MOE, HYBRID = "qwen3_moe", "qwen3_5"
TOKENS = mx.arange(40).reshape(2, 20) * 7 % 250


def find_roles(folder: Path, kind: str, layer: int) -> tuple[Readers, dict[str, tuple]]:
    """The readers of a layer, and its writers' scales and what runs behind them."""
    zoo.make_model(folder, kind)
    network = StockNetwork(lambda: mlx_lm.utils.load_model(folder, lazy=True)[0], mx.float32)
    h = network.embed(TOKENS)
    for at in range(layer):
        h = network.run(at, h, TOKENS)
    block = network.layer(layer)
    paths = [path for path, module in block.named_modules() if hasattr(module, "to_quantized")]
    readers = find_readers(network, layer, block, h, TOKENS, paths)
    found = find_writers(network, layer, block, h, TOKENS, readers)
    scales = {p: (pytest.approx(w.scale, rel=1e-3), {*w.behind}) for p, w in found.items()}
    return readers, scales


GROUPS: dict[str, list[list[str]]] = {
    MOE: [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate"],
        ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"],
        ["mlp.switch_mlp.down_proj"],
    ],
    HYBRID: [
        [f"linear_attn.in_proj_{name}" for name in ("a", "b", "qkv", "z")],
        ["linear_attn.out_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
}


@pytest.mark.parametrize("kind", GROUPS)
def test_what_reads_the_same_is_found(kind: str, tmp_path: Path) -> None:
    found, _ = find_roles(tmp_path, kind, (1, 0)[kind == HYBRID])
    assert [{*group} for group in found.groups] == [{*group} for group in GROUPS[kind]]
    assert found.routed == ({"mlp.switch_mlp"} if kind == MOE else set())


SERIAL = {"self_attn.o_proj": (1.0, {"mlp"}), "mlp.down_proj": (1.0, set())}
WRITERS: dict[str, dict[str, tuple[float, set[str]]]] = {
    "qwen3": SERIAL,
    "granite": {path: (0.5, behind) for path, (_, behind) in SERIAL.items()},
    "cohere": {path: (1.0, set()) for path in SERIAL},  # attention and FFN side by side
    HYBRID: {"linear_attn.out_proj": (1.0, {"mlp"}), "mlp.down_proj": (1.0, set())},
    MOE: {"self_attn.o_proj": (1.0, {"mlp"})},  # experts are more than a matrix
    "olmo2": SERIAL,  # a norm stands between
    "gemma2": SERIAL,
    "glm4": SERIAL,
    "exaone4": SERIAL,
    # The others are read by what comes last, which the layer's own scalar multiplies.
    "gemma4_text": {"per_layer_projection": (1.2085, set())},
    "exaone": {"attn.attention.out_proj": (1.0, {"mlp"}), "mlp.c_proj": (1.0, set())},
    "mamba2": {"mixer.out_proj": (1.0, set())},
    "dbrx": {"norm_attn_norm.attn.out_proj": (1.0, {"ffn"})},
}


@pytest.mark.parametrize("kind", only(("granite", "cohere", MOE, "gemma2", "exaone"), WRITERS))
def test_what_writes_the_stream_is_found(kind: str, tmp_path: Path) -> None:
    _, found = find_roles(tmp_path, kind, 1 if kind == MOE else 0)
    assert found == WRITERS[kind]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_what_a_norm_makes_of_the_aim_is_what_the_stream_lacks(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To first order, as far as a norm's output can change at all; no gain is small."""
    monkeypatch.setattr(roles, "FLOOR", 0.0)
    rng = np.random.default_rng(0)
    gains = rng.choice([-1, 1], 64) * rng.uniform(0.5, 2, 64)
    y, step, other = rng.standard_normal((3, 5, 64)) * np.geomspace(0.1, 10, 5)[:, None]

    def norm(y: np.ndarray) -> np.ndarray:
        return gains * y / np.sqrt(np.mean(y**2, -1, keepdims=True))

    small = 1e-3
    wanted = other + scale * norm(y + small * step)
    writer = Writer(scale, frozenset(), frozenset(), mx.array(gains))
    aim, weights = writer.aim(*(mx.array(a) for a in (y, other + scale * norm(y), wanted)))
    got = other + scale * norm(np.array(aim).astype(np.float64))
    assert np.abs(got - wanted).max() < 1e-2 * np.abs(wanted - other - scale * norm(y)).max()
    # An error of the output counts by its share of it, and of the stream.
    size = [np.sqrt(np.mean(a**2, -1)) for a in (y, wanted)]
    assert np.array(weights)[:, 0] == pytest.approx(1 / size[0] / size[1], rel=1e-4)
    # What no turn of the output reaches is not asked for.
    aim, _ = writer.aim(mx.array(y), mx.array(other), mx.array(other + step))
    assert np.mean(np.array(aim) * y, -1) == pytest.approx(np.mean(y**2, -1), rel=1e-4)
