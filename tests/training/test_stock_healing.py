"""Healing networks of mlx-lm's own: what is written is nearer to the original, in plain mlx-lm."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from grids import only
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from zoo import make_model

from mlx_skipless import UserError, convert, load
from mlx_skipless.network import reduced
from mlx_skipless.training.healing import heal
from mlx_skipless.training.recipe import Treatment
from mlx_skipless.training.trainable import make_trainable

TALE = "".join(f"the fox number {i} met {7 * i % 13} hens under a tree.\n" for i in range(60))
LOST = {
    "gemma3_text": "self_attn",
    "gpt_oss": "mlp",
    "mamba2": "mixer",
    "olmo2": "mlp",
    "qwen3_5": "mlp",
    "smollm3": "self_attn",
}


def measure_kl(teacher: Path, folder: Path, ids: mx.array) -> float:
    """KL(teacher || model), nats per token, of two folders as mlx-lm loads them."""
    models: list[Any] = [
        mlx_lm.load(str(one), trust_remote_code=True)[0]  # type: ignore[call-arg]
        for one in (teacher, folder)
    ]
    p, q = (m(ids).astype(mx.float32) for m in models)
    p, q = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (p, q))
    return float((mx.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", only(("lora",), ["lora", "full"]))
@pytest.mark.parametrize("model_type", only(("gemma3_text",), LOST))
def test_a_healed_model_is_nearer(model_type: str, kind: str, tmp_path: Path) -> None:
    teacher, student, out = tmp_path / "t", tmp_path / "s", tmp_path / "healed"
    make_model(teacher, model_type)
    part = LOST[model_type]
    config = json.loads((teacher / "config.json").read_text())
    config |= {"dropped_sublayers": {part: [1]}, "model_file": "model.py"}
    shutil.copytree(teacher, student)
    (student / "config.json").write_text(json.dumps(config))
    shutil.copy(str(reduced.__file__), student / "model.py")
    weights = mx.load(str(teacher / "model.safetensors"))
    assert isinstance(weights, dict)
    left = {n: a for n, a in weights.items() if f"layers.1.{part}." not in n}
    mx.save_safetensors(str(student / "model.safetensors"), left, metadata={"format": "mlx"})
    (tmp_path / "text.txt").write_text(TALE)
    treatment = Treatment(
        steps=12, context=16, batch_size=4, fine_tune_type=kind, learning_rate=3e-3
    )
    result = heal(student, teacher, out, treatment, data=[tmp_path / "text.txt"])
    assert result.after.kl < 0.9 * result.before.kl
    assert json.loads((out / "config.json").read_text()) == config
    assert (out / "model.py").read_bytes() == (student / "model.py").read_bytes()
    assert {*mx.load(str(out / "model.safetensors"))} == {*left}
    ids = mx.array(mlx_lm.load(str(teacher))[1].encode(TALE)[:200])[None]
    assert measure_kl(teacher, out, ids) < 0.9 * measure_kl(teacher, student, ids)


@pytest.mark.parametrize("kind", only(("lora",), ["lora", "full"]))
@pytest.mark.parametrize("dtype", only(("bfloat16",), ["bfloat16", "float16"]))
def test_experts_of_16_bits_are_healed(dtype: str, kind: str, tmp_path: Path) -> None:
    """On a CPU too, where MLX multiplies them in float32 alone; they are written as they were."""
    make_model(tmp_path / "t", "qwen3_moe", dtype=dtype)
    convert(tmp_path / "t", tmp_path / "s", drop_attention=1, verify=False)
    (tmp_path / "text.txt").write_text(TALE)
    treatment = Treatment(
        steps=12, context=16, batch_size=4, fine_tune_type=kind, learning_rate=3e-3
    )
    result = heal(tmp_path / "s", tmp_path / "t", tmp_path / "h", treatment,
                  data=[tmp_path / "text.txt"])  # fmt: skip
    assert result.after.kl < 0.9 * result.before.kl
    arrays = [mx.load(str(tmp_path / name / "model.safetensors")) for name in "sh"]
    types = [{name: array.dtype for name, array in part.items()} for part in arrays]
    assert types[0] == types[1] and getattr(mx, dtype) in types[0].values()
    changed = [
        name for name, array in arrays[0].items() if not mx.array_equal(array, arrays[1][name])
    ]
    assert any("switch_mlp" in name for name in changed)
    # What was measured is what is written, in float32 by mlx-lm.
    for name in "th":
        convert(tmp_path / name, tmp_path / f"{name}32", dtype="float32", verify=False)
    ids = mx.array(mlx_lm.load(str(tmp_path / "t"))[1].encode(TALE)[:200])[None]
    healed = measure_kl(tmp_path / "t32", tmp_path / "h32", ids)
    convert(tmp_path / "s", tmp_path / "s32", dtype="float32", verify=False)
    assert healed < 0.9 * measure_kl(tmp_path / "t32", tmp_path / "s32", ids)


@pytest.mark.parametrize("model_type", ["gemma3n", "kimi_k3"])
def test_matrices_that_the_network_reads_itself_stay(model_type: str, tmp_path: Path) -> None:
    """All others get adapters, which give nothing at first and have gradients."""
    make_model(tmp_path, model_type)
    model: Any = load(tmp_path)[0]
    ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    before = model(ids)
    mx.eval(before)

    make_trainable(model, Treatment(rank=4))

    adapted = {name for name, m in model.named_modules() if hasattr(m, "fuse")}
    read = {
        "gemma3n": {"prediction_coefs", "correction_coefs"},
        "kimi_k3": {"self_attention_res_proj", "mlp_res_proj"},
    }
    linear = {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | SwitchLinear) and ".layers." in name
    }
    stay = {name for name in linear if name.rpartition(".")[2] in read[model_type]}
    assert stay and {name.removesuffix(".linear") for name in linear} - stay == adapted
    assert mx.allclose(model(ids), before, atol=1e-4).item()
    _, gradients = nn.value_and_grad(model, lambda m: m(ids).square().mean())(model)
    assert any(mx.any(a != 0).item() for _, a in tree_flatten(gradients))


@pytest.mark.parametrize("model_type", ["deepseek_v41", "recurrent_gemma"])
def test_what_mlx_lm_cannot_train_is_refused(model_type: str, tmp_path: Path) -> None:
    make_model(tmp_path / "s", model_type)
    (tmp_path / "text.txt").write_text(TALE)
    treatment = Treatment(steps=1, context=16, batch_size=2)
    with pytest.raises(UserError, match="mlx-lm's network of this model cannot be trained"):
        heal(tmp_path / "s", tmp_path / "s", tmp_path / "h", treatment,
             data=[tmp_path / "text.txt"], validation_share=0.5)  # fmt: skip
    assert not (tmp_path / "h").exists()
