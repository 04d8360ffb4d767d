"""How a token is chosen: by mlx-lm's samplers, and by what a model's own file recommends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from factory import make_llama
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_skipless.errors import UserError
from mlx_skipless.inference import generation, sampling
from mlx_skipless.inference.loading import load

Loaded = tuple[nn.Module, TokenizerWrapper]
PROMPT = list(b"The quick brown fox jumps over the lazy dog.")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder, head_dim=32, num_hidden_layers=2)
    model, tokenizer = load(folder)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


def tokens(loaded: Loaded, **options: Any) -> list[int]:
    pieces = generation.stream(*loaded, PROMPT, max_tokens=30, **options)
    list(pieces)
    return pieces.tokens


@pytest.mark.parametrize("k", [1, 3, 263, 264, 10**6])
def test_top_k(k: int) -> None:
    """Only the likeliest k are ever drawn; as many as there are, or more, leave all."""
    scores = mx.array(np.random.default_rng(0).permutation(264)[None] / 100.0)
    scores = scores.astype(mx.float32) - mx.logsumexp(scores.astype(mx.float32), keepdims=True)
    sampler = sampling.make_samplers(temp=2.0, top_k=k)["sampler"]
    mx.random.seed(0)
    drawn = {sampler(scores).item() for _ in range(200)}
    best = set(np.argsort(-np.array(scores[0]))[:k].tolist())
    assert drawn <= best and len(drawn) > min(k, 264) // 3


def test_top_k_of_everything_changes_nothing(llama: Loaded) -> None:
    free = tokens(llama, temp=2.0, seed=1)
    assert tokens(llama, temp=2.0, seed=1, top_k=10**6) == free
    assert tokens(llama, temp=2.0, seed=1, top_k=1) == tokens(llama) != free


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("temp", [1e-45, 1e-9, 1e-5, 1e-4])
def test_a_low_temperature_takes_the_likeliest(dtype: mx.Dtype, temp: float) -> None:
    """Though half precision holds no log-probability divided by it."""
    logits = mx.random.normal((1, 300), key=mx.random.key(3)).astype(dtype) * 4
    scores = logits - mx.logsumexp(logits, keepdims=True)
    sampler = sampling.make_samplers(temp=temp)["sampler"]
    assert {sampler(scores).item() for _ in range(20)} == {mx.argmax(scores).item()}


def test_a_high_temperature_draws_from_the_top_alone() -> None:
    scores = mx.array([[-0.1, -3.0, -5.0]], dtype=mx.float16)
    sampler = sampling.make_samplers(temp=1e30, top_k=1)["sampler"]
    assert {sampler(scores).item() for _ in range(20)} == {0}


def test_a_repetition_penalty(llama: Loaded) -> None:
    """The last 20 tokens, the prompt's too, are divided or multiplied by it; 1 is off."""
    assert tokens(llama, repetition_penalty=1.0) == tokens(llama)
    (process,) = sampling.make_samplers(repetition_penalty=2.0)["logits_processors"]
    scores = mx.array([[1.0, 4.0, -2.0, 8.0, -3.0]])
    assert process(mx.array([3, *[4] * 19, 1]), scores).tolist() == [[1.0, 2.0, -2.0, 8.0, -6.0]]
    said = PROMPT + tokens(llama, repetition_penalty=1e6)
    assert all(said[at] not in said[at - 20 : at] for at in range(len(PROMPT), len(said)))


def test_a_draft_is_sampled_so_too(llama: Loaded) -> None:
    """Greedy stays greedy; the penalty is refused, of which mlx-lm leaves the prompt out."""
    assert tokens(llama, draft_model=llama[0], top_k=5, repetition_penalty=1.0) == tokens(llama)
    with pytest.raises(UserError, match="drop --repetition-penalty"):
        tokens(llama, draft_model=llama[0], repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": -1}, "--top-k -1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"repetition_penalty": -1.0}, "--repetition-penalty -1.0"),
        ({"repetition_penalty": float("inf")}, "--repetition-penalty inf"),
        ({"repetition_penalty": float("nan")}, "--repetition-penalty nan"),
        ({"max_tokens": 2.5}, "--max-tokens 2.5: must be a whole number"),
        ({"top_k": 2.5}, "--top-k 2.5: must be a whole number"),
        ({"temp": "1"}, "--temp '1': must be a number"),
        ({"top_p": True}, "--top-p True: must be a number"),
        ({"seed": 1.5}, "--seed 1.5: must be a whole number"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        sampling.check_options(**options)


def test_an_unknown_option_is_no_option(llama: Loaded) -> None:
    with pytest.raises(TypeError, match="topk"):
        generation.stream(*llama, PROMPT, topk=3)


LLAMA3 = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}
QWEN = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, {}),
        (LLAMA3, {"temp": 0.6, "top_p": 0.9}),
        (QWEN, {"temp": 0.7, "top_k": 20, "repetition_penalty": 1.05}),
        ({"temperature": 0.6, "min_p": 0.1}, {"temp": 0.6, "min_p": 0.1}),
        ({"do_sample": True}, {"temp": 1.0}),
        (QWEN | {"do_sample": False}, {"repetition_penalty": 1.05}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"temperature": None, "top_k": None, "do_sample": None}, {}),
        (LLAMA3 | {"top_p": 1.0, "top_k": 0}, {"temp": 0.6}),
        (LLAMA3 | {"top_k": -1, "repetition_penalty": 1.0}, {"temp": 0.6, "top_p": 0.9}),
        ({"temperature": 1}, {"temp": 1}),
    ],
)
def test_what_a_model_recommends(
    tmp_path: Path, config: dict[str, Any], found: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert sampling.read_defaults(tmp_path) == found


def test_a_model_that_recommends_nothing(tmp_path: Path) -> None:
    assert sampling.read_defaults(tmp_path) == {}


@pytest.mark.parametrize(
    "text",
    [
        '{"temperature": "hot"}', '{"temperature": true}', '{"temperature": -1}',
        '{"temperature": NaN}', '{"temperature": Infinity}', '{"temperature": 1e400}',
        f'{{"temperature": 1{"0" * 400}}}', '{"top_k": 2.5}', '{"top_k": -7}', '{"top_p": 7}',
        '{"top_p": [0.9]}', '{"repetition_penalty": 0}', '{"min_p": {}}', "[]", "{", "",
        "\\udc80", '{"top_k": "\\u001b[2J"}',
    ],
)  # fmt: skip
def test_what_cannot_be_recommended(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json") as refusal:
        sampling.read_defaults(tmp_path)
    assert str(refusal.value).isprintable()
