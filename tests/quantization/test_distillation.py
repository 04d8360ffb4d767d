"""Training scales and biases: what moves, what stays, and that it helps."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from factory import make_checkpoint
from grids import only, thin

import mlx_skipless
from mlx_skipless.network.model import Model, ModelArgs
from mlx_skipless.quantization import distillation
from mlx_skipless.quantization.distillation import distill
from mlx_skipless.quantization.formats import Format
from mlx_skipless.text import samples

ARGS = ModelArgs(
    "skipless", hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
    vocab_size=50, norm="qkv", final_norm=True, gains=["final"],
)  # fmt: skip


def kl(teacher: Model, student: Model, tokens: mx.array) -> float:
    return reference.softmax_kl(np.array(teacher(tokens)), np.array(student(tokens)))


def network(seed: int) -> Model:
    mx.random.seed(seed)
    model = Model(ARGS)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(("bits", "steps"), thin([(3, 0), (3, 150), (4, 0), (4, 150)], set))
def test_scales_and_biases_move_towards_the_source(bits: int, steps: int) -> None:
    teacher, student = network(0), network(0)
    form = Format(bits, 32, "affine")
    packed: dict[str, mx.array] = {}
    forms = {}
    for where, module in student.named_modules():
        if hasattr(module, "to_quantized"):
            forms[where] = form
            parts = form.nearest(module.weight)
            packed |= {f"{where}.{part}": array for part, array in parts.items()}
            module.weight = form.dense(parts)
    rng = np.random.default_rng(0)
    tokens, others = (mx.array(rng.integers(0, 50, (32, 16))) for _ in range(2))
    before = kl(teacher, student, others)
    got = distill(teacher, student, packed, forms, tokens, steps=steps, seed=0)
    assert set(got) == {f"{where}.{part}" for where in forms for part in ("scales", "biases")}
    for where in forms:
        new = {"weight": packed[f"{where}.weight"]}
        new |= {part: got[f"{where}.{part}"] for part in ("scales", "biases")}
        for part in ("scales", "biases"):
            old = packed[f"{where}.{part}"]
            assert new[part].shape == old.shape
            if not steps:
                assert mx.allclose(new[part], old, atol=1e-6).item()
        module = dict(student.named_modules())[where]
        module.weight = form.dense(new)
    after = kl(teacher, student, others)
    assert after < 0.95 * before if steps else after == pytest.approx(before, rel=1e-4)


def test_a_training_that_does_not_help_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does best on the text that judges is kept, be it the start."""
    monkeypatch.setattr(distillation, "LEARNING_RATE", 50.0)
    teacher, student = network(0), network(0)
    form, where = Format(8, 32, "affine"), "lm_head"
    packed = {f"{where}.{p}": a for p, a in form.nearest(teacher.lm_head.weight).items()}
    tokens = mx.array(np.random.default_rng(0).integers(0, 50, (32, 16)))
    got = distill(teacher, student, packed, {where: form}, tokens, steps=60, seed=0)
    for part in ("scales", "biases"):
        assert mx.allclose(got[f"{where}.{part}"], packed[f"{where}.{part}"], atol=1e-6).item()


@pytest.mark.parametrize("dtype", only(["bfloat16"], ["float32", "bfloat16"]))
def test_convert_distills(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed weights stay bit for bit, scales and biases change, the check sees it."""
    monkeypatch.setattr(samples, "CALIBRATION", (64, 32))
    monkeypatch.setattr(samples, "LONG_CHECK", (8, 32))
    make_checkpoint(
        tmp_path / "s", norm="qkv", hidden_size=64, intermediate_size=128, num_hidden_layers=2
    )
    options: dict[str, Any] = {"quantize": True, "remove": "qp", "q_bits": 3, "dtype": dtype}
    kls, weights = [], []
    for steps in (0, 60):
        out = tmp_path / str(steps)
        report = mlx_skipless.convert(tmp_path / "s", out, distill=steps, **options)
        assert report.verification is not None
        kls.append(report.verification.kl)
        weights.append(mx.load(str(out / "model.safetensors")))
    assert kls[1] < 0.97 * kls[0]
    before: Any = weights[0]
    after: Any = weights[1]
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        moved = not mx.array_equal(array, after[name]).item()
        assert moved == name.endswith((".scales", ".biases")), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"distill": 5}, "needs -q in affine"),
        ({"distill": 5, "quantize": True, "q_mode": "mxfp4"}, "needs -q in affine"),
        ({"distill": -1, "quantize": True}, "0 or more"),
    ],
)
def test_distillation_that_cannot_be(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(mlx_skipless.UserError, match=said):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **options)
