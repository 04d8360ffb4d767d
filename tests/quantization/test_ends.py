"""Tied embeddings are rounded by what their head reads: against the definition, and its worth."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
import reference
import zoo
from factory import make_llama
from grids import only

import mlx_skipless
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.network.driver import StreamedNetwork
from mlx_skipless.network.stock import StockNetwork
from mlx_skipless.quantization import ends
from mlx_skipless.quantization.calibration import CalibratedParts
from mlx_skipless.quantization.formats import Format, solve_feedback
from mlx_skipless.quantization.layout import Layout, quantize_nearest
from mlx_skipless.quantization.modules import CalibratedModules
from mlx_skipless.quantization.settings import Quantization
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan

FORM = Format(4, 32, "affine")
STOCK = ("qwen3", "gemma2", "smollm3", "exaone", "falcon_h1", "ernie4_5_moe")


def open_model(folder: Path) -> Any:
    return mlx_lm.utils.load_model(folder)[0]


def draw_tokens(seed: int, rows: int) -> mx.array:
    """Tokens of which some are much more common than others."""
    common = np.random.default_rng(seed).exponential(20, (rows, 32)).astype(int)
    return mx.array(common % 250)


def read_by_definition(model: nn.Module, tokens: mx.array, monkeypatch: Any) -> np.ndarray:
    """What a model's own forward multiplies with its embedding, in float64, (tokens, hidden)."""
    seen = []
    as_linear = nn.Embedding.as_linear
    with monkeypatch.context() as patch:
        patch.setattr(
            nn.Embedding, "as_linear", lambda self, x: seen.append(x) or as_linear(self, x)
        )
        mx.eval(model(tokens))
    (x,) = seen
    return np.array(x.reshape(-1, x.shape[-1])).astype(np.float64)


def round_as_stored(folder: Path, kind: str, tokens: mx.array) -> mx.array:
    """The embedding that a result has, as float32."""
    if kind != "llama":
        packed, _ = quantize_nearest(open_model(folder), Quantization(4, 32))
        network = StockNetwork(lambda: open_model(folder), mx.float32)
        CalibratedModules(network, packed, mx.float32, tokens).embedding()
        module = next(m for _, m in packed.named_modules() if isinstance(m, nn.QuantizedEmbedding))
        return FORM.dense({name: module[name] for name in ("weight", "scales", "biases")})
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint.args, remove="none", quantized=True)
    merger = Merger(checkpoint, plan, mx.float32)
    layout = Layout(plan.after, mx.float32, Quantization(4, 32))
    parts = CalibratedParts(StreamedNetwork(plan.before, merger), merger, layout, tokens)
    found = parts.embedding()
    return FORM.dense({name.rpartition(".")[2]: array for name, array in found.items()})


@pytest.mark.parametrize("kind", ["llama", *only(STOCK[:1], STOCK)])
def test_a_tied_embedding_is_rounded_for_its_head(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "llama":
        make_llama(tmp_path, hidden_size=64, tie_word_embeddings=True)
    else:
        zoo.make_model(tmp_path, kind)
    tokens, model = draw_tokens(1, 12), open_model(tmp_path)
    read = read_by_definition(model, tokens, monkeypatch)
    (path,) = (p for p, m in model.named_modules() if isinstance(m, nn.Embedding))
    weight = dict(model.named_modules())[path].weight
    size = weight.shape[1]
    gram = read.T @ read / np.sum(read**2) + 0.1 * np.eye(size) / size
    wanted = np.array(FORM.dense(FORM.with_feedback(np.array(weight), solve_feedback(gram))))
    got = np.array(round_as_stored(tmp_path, kind, tokens))
    # Float32 on the way to the gram decides a few near ties otherwise, and what follows on them.
    assert np.mean(np.abs(got - wanted).max(1) < 1e-5) > 0.9
    # On other tokens the logits err less than with the same embedding to nearest.
    other = read_by_definition(model, draw_tokens(2, 8), monkeypatch)
    nearest = np.array(FORM.dense(FORM.nearest(weight)))
    right = other @ np.array(weight).T
    mine, plain = (np.sum((other @ w.T - right) ** 2) for w in (got, nearest))
    assert mine < 0.8 * plain
    # Rows that enter the stream err little more than to nearest.
    mine, plain = (np.sum((w - np.array(weight)) ** 2) for w in (got, nearest))
    assert mine < 1.5 * plain


@pytest.mark.parametrize("options", [{"quantize": True}, {"target_bytes": 100_000}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_overflow_is_named(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """What a tied head reads is no number then, and no traceback comes of it."""
    if kind == "llama":
        make_llama(tmp_path / "s", hidden_size=64, tie_word_embeddings=True)
    else:
        zoo.make_model(tmp_path / "s", kind)
    (file,) = (tmp_path / "s").glob("*.safetensors")
    weights = dict(mx.load(str(file)))
    for name, weight in weights.items():
        if name.endswith(("up_proj.weight", "down_proj.weight")):
            weights[name] = 1e25 * weight
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(zoo.draw_text(1, 8000))
    text = {"calibration": tmp_path / "text.txt", "q_group_size": 32}
    with pytest.raises(mlx_skipless.UserError, match="overflow"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **text, **options)
    assert not (tmp_path / "o").exists()


def test_enough_of_a_text_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tokens for each number of the stream, in whole batches; nothing behind them."""
    zoo.make_model(tmp_path, "qwen3")
    network = StockNetwork(lambda: open_model(tmp_path), mx.float32)
    batches = [draw_tokens(seed, 4) for seed in range(6)]
    monkeypatch.setattr(ends, "HEAD_TOKENS", 5)
    path = "model.embed_tokens"
    found = ends.read_head(network, path, batches)
    assert len(found) == 3  # of 128 tokens each, for 5 * 64
    for x, tokens in zip(found, batches, strict=False):
        wanted = read_by_definition(open_model(tmp_path), tokens, monkeypatch)
        got = np.array(x.reshape(wanted.shape))
        assert reference.worst_relative_error(wanted[None], got[None]) < 1e-4


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_rows_are_rounded_one_part_at_a_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    weight, x = rng.standard_normal((75, 64)).astype(np.float32), rng.standard_normal((99, 64))
    form = Format(4, 32, mode, mx.bfloat16)
    whole = form.with_feedback(weight, solve_feedback(x.T @ x))
    monkeypatch.setattr(ends, "ROWS_BYTES", 4 * 64 * 20)
    parts = ends.round_rows(mx.array(weight), x.T @ x, form)
    assert parts.keys() == whole.keys()
    assert all(mx.array_equal(parts[name], whole[name]) for name in whole)
    # Where the text overflowed nothing is known of errors.
    unknown = ends.round_rows(mx.array(weight), np.full((64, 64), np.nan), form)
    nearest = form.nearest(mx.array(weight))
    assert all(mx.array_equal(unknown[name], nearest[name]) for name in nearest)
