"""Conversions of a tiny model of each of mlx-lm's architectures that only mlx-lm knows."""

import math
from pathlib import Path

import mlx.core as mx
import pytest
from grids import only
from mlx_lm.utils import load
from zoo import CONFIGS, make_model

import mlx_skipless
from mlx_skipless.architectures.families import FAMILIES

DROPS = {"drop_attention": 1, "drop_ffn": 1}
NO_FFN = "--drop-ffn 1: its block calls no module that is its ffn"
REFUSED = {
    "deepseek_v41": "--drop-attention 1: its self_attn keeps what only itself can write",
    "iquestloopcoder": "--drop-attention 1: its block calls no module that is its attention",
    "llama4_text": "mlx-lm cannot run the result",
    "mamba": NO_FFN,
    "mamba2": NO_FFN,
    "phi3small": "the source itself overflows float32",
    "prism_hadamard_qwen35": "cannot be loaded",
}
CASES = only(
    {"falcon_h1", "gemma4_text", "llama4_text"}, [name for name in CONFIGS if name not in FAMILIES]
)


@pytest.mark.parametrize("name", CASES)
def test_it_drops_and_quantizes(name: str, tmp_path: Path) -> None:
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    make_model(source, name)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = {"quantize": True, "q_group_size": 32, "calibration": text, **DROPS}
    if name in REFUSED:
        with pytest.raises(mlx_skipless.UserError, match=REFUSED[name]):
            mlx_skipless.convert(source, out, **options)
        assert not out.exists()
        return
    report = mlx_skipless.convert(source, out, **options)
    assert {kind: len(layers) for kind, layers in report.removed.items()} == {
        "attention": 1,
        "ffn": 1,
    }
    assert report.cache_bytes_after <= report.cache_bytes_before
    assert report.verification is not None
    assert 1e-4 < report.verification.kl < 5 and math.isfinite(report.verification.perplexity)
    model, _ = load(str(out), trust_remote_code=True)  # type: ignore[misc]
    assert not mx.isnan(model(mx.array([[1, 2, 3]]))).any()
