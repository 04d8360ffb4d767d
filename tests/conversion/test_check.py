"""The check's own figures, text and streaming, against independent ones."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import reference
from factory import make_checkpoint

import mlx_skipless
from mlx_skipless.architectures.families import FAMILIES
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.conversion import check
from mlx_skipless.errors import UserError
from mlx_skipless.network import driver


@pytest.mark.parametrize("scale", [1e-6, 0.1, 3.0])
def test_figures(scale: float) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 7, 50)).astype(np.float32) * 4
    b = (a + scale * rng.standard_normal(a.shape)).astype(np.float32)
    tokens = rng.integers(0, 50, (3, 7))
    got = check.compare_logits(zip(a, b, strict=True), tokens, "random")
    assert got.kl == pytest.approx(reference.softmax_kl(a, b), rel=1e-6, abs=1e-15)
    assert got.max_rel_logit_error == pytest.approx(reference.worst_relative_error(a, b))
    assert got.greedy_match == pytest.approx(np.mean(a.argmax(-1) == b.argmax(-1)))
    assert got.tokens == 21
    for logits, perplexity in ((a, got.source_perplexity), (b, got.perplexity)):
        p = np.exp(logits[:, :-1].astype(np.float64))
        p /= p.sum(-1, keepdims=True)
        chosen = np.take_along_axis(p, tokens[:, 1:, None], axis=-1)
        assert perplexity == pytest.approx(np.prod(1 / chosen) ** (1 / 18), rel=1e-9)


def test_tokens_that_both_forbid_are_no_overflow() -> None:
    a = np.random.default_rng(1).normal(0, 3, (1, 4, 9)).astype(np.float32)
    a[..., 2], tokens = -np.inf, np.full((1, 4), 3)
    b = a + np.float32(0.25) * (np.arange(9) == 5)
    got = check.compare_logits(zip(a, b, strict=True), tokens, "")
    without = check.compare_logits(
        zip(np.delete(a, 2, -1), np.delete(b, 2, -1), strict=True), tokens - 1, ""
    )
    assert got.max_rel_logit_error == without.max_rel_logit_error > 0
    assert got.kl == pytest.approx(without.kl) and got.kl > 0
    assert got.perplexity == pytest.approx(without.perplexity)
    every = np.full_like(a, -np.inf)
    with pytest.raises(UserError, match="overflows"):
        check.compare_logits(zip(every, every, strict=True), tokens, "")
    one = np.where(np.arange(4)[:, None] == 1, -np.inf, b)  # at one position alone
    with pytest.raises(UserError, match="overflows"):
        check.compare_logits(zip(one, one, strict=True), tokens, "")


@pytest.mark.parametrize(("which", "words"), [(0, "source itself"), (1, "--dtype bfloat16")])
def test_overflow_is_named(which: int, words: str) -> None:
    logits = [np.ones((1, 2, 5)), np.ones((1, 2, 5))]
    logits[which][0, 1, 3] = np.inf
    with pytest.raises(UserError, match=words):
        check.compare_logits(zip(*logits, strict=True), np.zeros((1, 2), dtype=int), "")


@pytest.mark.filterwarnings("error")
def test_a_perplexity_may_be_infinite() -> None:
    a = np.array([[[0.0, 1e4], [0.0, 1e4]]], dtype=np.float32)
    got = check.compare_logits(zip(a, a, strict=True), np.zeros((1, 2), dtype=int), "")
    assert got.perplexity == np.inf and got.max_rel_logit_error == 0


def test_streaming_is_the_network(network) -> None:
    source, streamed = network
    tokens = np.random.default_rng(0).integers(0, 256, (2, 12))
    expected = reference.logits(*source, tokens)
    for _ in range(2):  # a second pass reads the layers again, or finds them
        got = np.array(streamed.logits(streamed.hidden(mx.array(tokens))))
        assert reference.worst_relative_error(expected, got) <= 1e-5


def test_written_quantized_parts(tmp_path: Path) -> None:
    """A packed result streams as mlx-lm runs it."""
    make_checkpoint(tmp_path / "s", norm="qkv", hidden_size=128, intermediate_size=256, spread=2.0)
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "out", remove="qp", quantize=True, verify=False
    )
    model, _ = mlx_skipless.load(tmp_path / "out")
    args = open_checkpoint(tmp_path / "out").args
    parts = check.WrittenParts(tmp_path / "out", args, FAMILIES["skipless"])
    streamed = driver.StreamedNetwork(args, parts, report.quantization)
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (1, 9)))
    got = streamed.logits(streamed.hidden(tokens))
    assert mx.abs(got - model(tokens)).max().item() < 1e-4
