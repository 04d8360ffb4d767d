"""Generation: what is sampled, what the cache holds, what is refused, what a comparison says."""

from __future__ import annotations

import gc
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from commands import script
from factory import EOS, make_checkpoint, make_llama
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers
from transformers import tokenization_utils_base
from zoo import make_model

from mlx_skipless import cli
from mlx_skipless.conversion import convert
from mlx_skipless.errors import UserError
from mlx_skipless.inference import caches, chat, comparison, generation, prompts
from mlx_skipless.inference.loading import load
from mlx_skipless.terminal import make_visible
from mlx_skipless.text import corpus

Loaded = tuple[nn.Module, TokenizerWrapper]
PROMPT = list(b"The quick brown fox jumps over the lazy dog.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder, head_dim=32)
    return folder


@pytest.fixture(scope="module")
def llama(folder: Path) -> Loaded:
    return load(folder)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("sliding")
    make_checkpoint(
        folder,
        norm="qkv",
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return load(folder)


def run(loaded: Loaded, prompt: str | list[int] = PROMPT, **options: Any) -> list[int]:
    """The tokens of an answer."""
    pieces = generation.stream(*loaded, prompt, **options)
    for _ in pieces:
        pass
    return pieces.tokens


def cacheless(model: nn.Module, ids: list[int], max_tokens: int) -> list[int]:
    """Greedy decoding by running the whole text for each token."""
    start = len(ids)
    while len(ids) - start < max_tokens and (len(ids) == start or ids[-1] != EOS):
        ids = [*ids, mx.argmax(model(mx.array([ids]))[0, -1]).item()]
    return ids[start:]


def test_temperature_zero_takes_the_likeliest_token_each_time(llama: Loaded):
    assert run(llama, max_tokens=30) == cacheless(llama[0], PROMPT, 30)


def test_a_sliding_window_model_decodes_as_it_computes(sliding: Loaded):
    assert run(sliding, max_tokens=30) == cacheless(sliding[0], PROMPT, 30)


def test_a_seed_reproduces_and_another_does_not(llama: Loaded):
    first = run(llama, max_tokens=30, temp=1.0, seed=7)
    assert run(llama, max_tokens=30, temp=1.0, seed=7) == first
    assert run(llama, max_tokens=30, temp=1.0, seed=8) != first
    assert run(llama, max_tokens=30, temp=1.0) != first


@pytest.mark.parametrize("narrow", [{"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_narrowest_sampling_is_greedy(llama: Loaded, narrow: dict[str, float]):
    greedy = run(llama, max_tokens=20)
    assert run(llama, max_tokens=20, temp=3.0, seed=0, **narrow) == greedy
    assert run(llama, max_tokens=20, temp=3.0, seed=0) != greedy


@pytest.mark.parametrize(("broken_at", "told_after"), [(0, 1), (5, 17), (30, 33), (38, 40)])
def test_logits_that_are_no_numbers_end_the_answer(
    folder: Path, broken_at: int, told_after: int
) -> None:
    """Soon, if not at once: what is broken stays so, here the final norm's gain."""
    model, tokenizer = load(folder)
    stream = generation.stream(model, tokenizer, PROMPT, max_tokens=40)
    with pytest.raises(UserError, match=f"no numbers after {told_after} tokens") as caught:
        for taken in range(41):
            if taken == broken_at:
                model.model.norm.weight = model.model.norm.weight * float("nan")
            next(stream)
    assert "--dtype" in str(caught.value) and len(stream.tokens) == told_after


@pytest.mark.parametrize("off", [{"top_p": 1.0}, {"top_p": 0.0}, {"min_p": 0.0}])
def test_sampling_limits_can_be_off(llama: Loaded, off: dict[str, float]):
    options = {"max_tokens": 20, "temp": 3.0, "seed": 0}
    assert run(llama, **options, **off) == run(llama, **options)


def test_an_answer_counts_and_joins_its_pieces(llama: Loaded):
    stream = generation.stream(*llama, PROMPT, max_tokens=25)
    with pytest.raises(RuntimeError):
        _ = stream.answer
    text = "".join(stream)
    answer = stream.answer
    assert answer.text == text == stream.text
    assert answer.prompt_tokens == len(PROMPT)
    assert answer.generation_tokens == len(stream.tokens) == 25
    assert answer.finish_reason == "length"
    assert answer.prompt_tps > 0 and answer.generation_tps > 0
    assert json.loads(json.dumps(answer.as_dict()))["text"] == text


def test_an_end_token_stops(folder: Path):
    model, tokenizer = load(folder)
    greedy = cacheless(model, PROMPT, 10)
    end = next(i for i, token in enumerate(greedy) if token not in greedy[:i] and i >= 1)
    tokenizer.add_eos_token(str(greedy[end]))
    stream = generation.stream(model, tokenizer, PROMPT, max_tokens=10)
    list(stream)
    assert stream.tokens == greedy[: end + 1]
    assert stream.answer.finish_reason == "stop"


def test_decoding_speed_counts_the_steps_after_the_first(llama: Loaded):
    assert generation.generate(*llama, PROMPT, max_tokens=1).generation_tps == 0


def test_peak_memory_is_of_this_answer_in_bytes(llama: Loaded):
    gc.collect()
    held = mx.get_active_memory()
    junk = mx.zeros((1 << 26,))
    mx.eval(junk)
    del junk
    answer = generation.generate(*llama, PROMPT, max_tokens=3)
    assert isinstance(answer.peak_memory_bytes, int)
    assert held < answer.peak_memory_bytes < held + (1 << 26)


def test_a_folder_serves_as_model(folder: Path, llama: Loaded):
    expected = generation.generate(*llama, PROMPT, max_tokens=8).text
    assert generation.generate(str(folder), None, PROMPT, max_tokens=8).text == expected


def test_text_goes_through_the_chat_template_unless_told(llama: Loaded):
    _, tokenizer = llama
    chat = prompts.encode_prompt(tokenizer, "Hi")
    assert tokenizer.decode(chat) == "<s>user: Hi\n<s>assistant: "
    assert prompts.encode_prompt(tokenizer, "Hi", chat=True) == chat
    plain = prompts.encode_prompt(tokenizer, "Hi", chat=False)
    assert plain == tokenizer.encode("Hi") != chat
    assert run(llama, "Hi", max_tokens=5) == run(llama, chat, max_tokens=5)


def test_without_a_template_text_is_plain_and_chat_is_refused(folder: Path):
    (bare := folder.parent / "bare").mkdir()
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    _, tokenizer = load(bare)
    assert prompts.encode_prompt(tokenizer, "Hi") == tokenizer.encode("Hi")
    with pytest.raises(UserError, match="no chat template"):
        prompts.encode_prompt(tokenizer, "Hi", chat=True)


@pytest.mark.parametrize("size", [5, 16])
def test_a_bounded_cache_stays_bounded(llama: Loaded, size: int):
    cache = caches.make_cache(llama[0], max_kv_size=size)
    run(llama, max_tokens=40, prompt_cache=cache)
    assert [c.keys.shape[2] for c in cache] == [size] * 3
    assert all(c.offset == len(PROMPT) + 40 for c in cache)


def test_a_bound_changes_what_is_said_only_when_reached(llama: Loaded):
    whole = run(llama, max_tokens=30)
    assert run(llama, max_tokens=30, max_kv_size=len(PROMPT) + 30) == whole
    assert run(llama, max_tokens=30, max_kv_size=8) != whole


def test_a_sliding_layer_keeps_the_smaller_window(sliding: Loaded):
    def sizes(size: int) -> list[tuple[int, int]]:
        cache = caches.make_cache(sliding[0], max_kv_size=size)
        run(sliding, max_tokens=20, prompt_cache=cache)
        return [(c.max_size, c.keys.shape[2]) for c in cache]

    assert sizes(12) == [(8, 8), (12, 12), (8, 8)]
    assert sizes(6) == [(6, 6)] * 3


def test_a_quantized_cache_is_smaller_and_close(llama: Loaded):
    def fill(**options: Any) -> tuple[int, mx.array]:
        cache = caches.make_cache(llama[0], **options)
        logits = [llama[0](mx.array([part]), cache=cache) for part in (PROMPT[:9], PROMPT[9:])]
        return sum(c.nbytes for c in cache), mx.concatenate(logits, axis=1)

    exact_size, exact = fill()
    last = 0.0
    for bits in reversed(caches.KV_BITS):
        size, logits = fill(kv_bits=bits)
        assert size == exact_size * (bits + 2) // 32  # and per group of 32 a scale and a bias
        error = mx.abs(logits - exact).max().item()
        assert error > last
        last = error
        if bits == 8:
            assert error < 0.02 * mx.abs(exact).max().item()


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("bits", caches.KV_BITS)
def test_every_width_quantizes_to_all_bits(tmp_path: Path, head_dim: int, bits: int):
    config = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    make_llama(tmp_path, head_dim=head_dim, **config)
    loaded = load(tmp_path)
    cache = caches.make_cache(loaded[0], kv_bits=bits)
    run(loaded, max_tokens=3, prompt_cache=cache)
    assert cache[0].keys[0].shape[-1] == head_dim * bits // 32
    assert cache[0].group_size == (32 if head_dim % 64 else 64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 0}, "--max-tokens 0"),
        ({"temp": -0.1}, "--temp -0.1"),
        ({"temp": float("nan")}, "--temp nan"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"top_p": -0.5}, "--top-p -0.5"),
        ({"min_p": 2}, "--min-p 2"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**64}, "--seed 18446744073709551616"),
        ({"kv_bits": 5}, "--kv-bits 5"),
        ({"kv_bits": "8"}, "--kv-bits '8': must be one of"),
        ({"max_kv_size": 4}, "--max-kv-size 4"),
        ({"max_kv_size": -5}, "--max-kv-size -5: must exceed 4"),
        ({"max_kv_size": "8"}, "--max-kv-size '8': must be a whole number"),
        ({"max_kv_size": 8.5}, "--max-kv-size 8.5: must be a whole number"),
        ({"kv_bits": 8, "max_kv_size": 64}, "drop one"),
        ({"prompt_cache": 3}, "prompt_cache: is no list of caches"),
        ({"prompt_cache": "ab"}, "prompt_cache: is no list of caches"),
        ({"prompt_cache": [KVCache()]}, "prompt_cache: has 1 caches and the model needs 3"),
    ],
)
def test_options_that_cannot_be_are_refused(llama: Loaded, options: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says) as refusal:
        generation.stream(*llama, PROMPT, **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("prompt", ["", " \n", []])
def test_an_empty_prompt_is_refused(llama: Loaded, prompt: str | list[int]):
    with pytest.raises(UserError, match="empty"):
        generation.stream(*llama, prompt)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "no NoneType"), (5, "no int"), (b"x", "no bytes"), ({"role": "user"}, "no dict"),
        (["a"], "'a' in the prompt"), ([1.0], "1.0 in the prompt"), ([[1, 2]], "no token id"),
    ],
)  # fmt: skip
def test_what_is_neither_text_nor_tokens_is_refused(llama: Loaded, prompt: Any, says: str):
    with pytest.raises(UserError, match=re.escape(says)):
        generation.stream(*llama, prompt)


def test_tokens_may_come_in_an_array(llama: Loaded):
    answers = [
        generation.generate(*llama, prompt, max_tokens=3).text
        for prompt in ([5, 6, 7], (5, 6, 7), np.array([5, 6, 7]), mx.array([5, 6, 7]))
    ]
    assert len({*answers}) == 1


@pytest.mark.parametrize("token", [-1, -264, 264, 10**7])
@pytest.mark.parametrize("kind", ["llama", "sliding"])
def test_tokens_without_an_embedding_are_refused(
    kind: str, token: int, request: pytest.FixtureRequest
) -> None:
    """Of mlx-lm's own network and of one of ours; its last token has one."""
    loaded = request.getfixturevalue(kind)
    with pytest.raises(UserError, match=rf"token {token} .* not in .* \(264 tokens\)"):
        generation.stream(*loaded, [5, token, 5], max_tokens=1)
    assert len([*generation.stream(*loaded, [5, 263, 5], max_tokens=1)]) == 1


def test_text_that_is_not_unicode_is_refused(llama: Loaded):
    with pytest.raises(UserError, match="not valid Unicode at character 2"):
        generation.stream(*llama, "ab\udc80")


def test_a_sliding_window_cannot_be_quantized(sliding: Loaded):
    with pytest.raises(UserError, match=r"sliding window.*drop --kv-bits"):
        caches.make_cache(sliding[0], kv_bits=8)


def test_narrow_heads_cannot_be_quantized(tmp_path: Path):
    make_llama(tmp_path, head_dim=16)
    with pytest.raises(UserError, match=r"heads of 16 values.*drop --kv-bits"):
        caches.make_cache(load(tmp_path)[0], kv_bits=8)


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"max_kv_size": 64}])
def test_a_cache_of_another_kind_is_refused(options: dict[str, int]):
    class Other(nn.Module):
        def make_cache(self) -> list[Any]:
            return [CacheList(KVCache(), RotatingKVCache(8))]

    with pytest.raises(UserError, match="CacheList"):
        caches.make_cache(Other(), **options)


def test_cache_options_with_a_given_cache_are_refused(llama: Loaded):
    cache = caches.make_cache(llama[0])
    with pytest.raises(UserError, match="make_cache"):
        generation.stream(*llama, PROMPT, prompt_cache=cache, max_kv_size=64)


def test_a_loaded_model_needs_its_tokenizer(llama: Loaded):
    with pytest.raises(UserError, match="tokenizer"):
        generation.generate(llama[0], None, PROMPT)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    make_llama(folder, hidden_size=256, intermediate_size=512, num_hidden_layers=12)
    return folder


def test_a_comparison_runs_both_and_says_which_is_faster(folder: Path, large: Path):
    result = comparison.compare([folder, str(large)], PROMPT, max_tokens=10)
    assert result.generation_tps_ratio == pytest.approx(
        result.first.generation_tps / result.second.generation_tps
    )
    assert result.prompt_tps_ratio == pytest.approx(
        result.first.prompt_tps / result.second.prompt_tps
    )
    assert result.generation_tps_ratio > 1
    assert json.loads(json.dumps(result.as_dict()))["second"]["generation_tokens"] == 10
    for path, answer in ((folder, result.first), (large, result.second)):
        assert answer.text == generation.generate(path, None, PROMPT, max_tokens=10).text


def test_a_comparison_takes_turns_and_medians(llama: Loaded, monkeypatch: pytest.MonkeyPatch):
    speeds = iter([0, 0, 3, 30, 900, 20, 5, 10])  # a warm-up each, then three turns each
    asked = []

    def fake(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> generation.Answer:
        asked.append((model, options["max_tokens"]))
        speed = next(speeds)
        return generation.Answer("", 1, speed, 2, speed, 100, "length")

    monkeypatch.setattr(comparison, "generate", fake)
    a, b = nn.Module(), nn.Module()
    result = comparison.compare([(a, llama[1]), (b, llama[1])], PROMPT, max_tokens=50)
    assert asked == [(a, 8), (b, 8)] + [(a, 50), (b, 50)] * 3
    assert (result.first.generation_tps, result.second.generation_tps) == (5, 20)
    assert result.prompt_tps_ratio == 0.25


def test_a_comparison_counts_each_models_memory_alone(folder: Path, large: Path):
    def size(path: Path) -> int:
        return sum(weight.nbytes for _, weight in tree_flatten(load(path)[0].parameters()))

    gc.collect()
    base = mx.get_active_memory()
    result = comparison.compare([folder, large], PROMPT, max_tokens=3, repeats=1)
    assert size(folder) < result.first.peak_memory_bytes - base < size(large)
    assert size(large) < result.second.peak_memory_bytes - base


def test_a_comparison_of_single_tokens_has_no_decoding_ratio(folder: Path):
    result = comparison.compare([folder, folder], PROMPT, max_tokens=1, repeats=1)
    assert result.generation_tps_ratio is None
    assert result.prompt_tps_ratio is not None


def test_a_comparison_takes_two_models(llama: Loaded):
    with pytest.raises(UserError, match="two models, not 1"):
        comparison.compare([llama], PROMPT)
    with pytest.raises(UserError, match="not one twice"):
        comparison.compare([llama, llama], PROMPT)


@pytest.mark.parametrize("template", [True, False])
def test_prompt_cache_of_mlx_lm(template: bool, folder: Path, tmp_path: Path) -> None:
    """A prompt in two parts, the first through `mlx_lm.cache_prompt`, is the prompt in one."""
    model, tokenizer = load(folder)
    if not template:
        tokenizer._tokenizer.chat_template = None
        tokenizer.has_chat_template = False
    first, second = "The quick brown fox", " jumps over the lazy dog."
    whole = prompts.encode_prompt(tokenizer, first + second)
    end = prompts.encode_prompt(tokenizer, second, continued=True)
    assert whole[-len(end) :] == end
    cache = caches.make_cache(model)
    model(mx.array([whole[: -len(end)]]), cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = caches.load_cache(tmp_path / "cache.safetensors", model)
    continued = generation.generate(model, tokenizer, end, prompt_cache=loaded, max_tokens=6)
    at_once = generation.generate(model, tokenizer, whole, max_tokens=6)
    assert continued.text == at_once.text
    assert continued.prompt_tokens == len(end)


@pytest.mark.parametrize("kind", ["quantized", "bounded"])
def test_a_quantized_or_bounded_prompt_cache(kind: str, folder: Path, tmp_path: Path) -> None:
    """One that `mlx_lm.cache_prompt` quantized or bounded is gone on from as it is."""
    model, tokenizer = load(folder)
    ids = prompts.encode_prompt(tokenizer, "The quick brown fox jumps over the lazy dog.")
    file = tmp_path / "cache.safetensors"
    cache = caches.make_cache(model, max_kv_size=40 if kind == "bounded" else None)
    model(mx.array([ids[:-3]]), cache)
    if kind == "quantized":
        cache = [one.to_quantized(group_size=32, bits=6) for one in cache]
    save_prompt_cache(str(file), cache)
    found = caches.load_cache(file, model)
    assert [*map(type, found)] == [*map(type, cache)] != [*map(type, caches.make_cache(model))]
    expected = generation.generate(model, tokenizer, ids[-3:], prompt_cache=cache, max_tokens=6)
    continued = generation.generate(model, tokenizer, ids[-3:], prompt_cache=found, max_tokens=6)
    assert continued.text == expected.text and continued.generation_tokens == 6
    make_llama(tmp_path / "narrow", head_dim=64, num_hidden_layers=2)
    with pytest.raises(UserError, match="another model"):
        caches.load_cache(file, load(tmp_path / "narrow")[0])


@pytest.mark.parametrize("kind", ["plain", "quantized", "bounded"])
@pytest.mark.parametrize("options", [{"drop_attention": 1}, {"replace_attention": 1}], ids=str)
def test_a_prompt_cache_of_a_model_that_lacks_an_attention(
    options: dict[str, int], kind: str, tmp_path: Path
) -> None:
    make_model(tmp_path / "src", "olmo2", head_dim=32)
    convert.convert(tmp_path / "src", tmp_path / "out", verify=False, **options)
    model, _ = load(tmp_path / "out")
    cache = make_prompt_cache(model, max_kv_size=40 if kind == "bounded" else None)
    model(mx.array([[1, 2, 3]]), cache=cache)
    if kind == "quantized":
        maybe_quantize_kv_cache(cache, 0, kv_group_size=32, kv_bits=8)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    found = caches.load_cache(tmp_path / "cache.safetensors", model)
    assert mx.array_equal(*(model(mx.array([[4, 5]]), cache=one) for one in (cache, found)))


def test_a_prompt_cache_of_another_model_is_refused(
    folder: Path, sliding: Loaded, tmp_path: Path
) -> None:
    model, _ = load(folder)
    cache = caches.make_cache(model)
    model(mx.array([[1, 2]]), cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    with pytest.raises(UserError, match="another model"):
        caches.load_cache(tmp_path / "cache.safetensors", sliding[0])
    make_llama(tmp_path / "narrow", head_dim=16)
    with pytest.raises(UserError, match="another model"):
        caches.load_cache(tmp_path / "cache.safetensors", load(tmp_path / "narrow")[0])
    (tmp_path / "text.safetensors").write_text("no cache")
    arrays, metadata = mx.load(str(tmp_path / "cache.safetensors"), return_metadata=True)
    same = f"elsewhere/{folder.name}"  # relative to a folder that nobody knows any more
    for made_with, told in (("other", True), (str(folder), False), (None, False), (same, False)):
        named = {} if made_with is None else {"model": made_with}
        save_prompt_cache(str(tmp_path / "named.safetensors"), cache, named)
        said: list[str] = []
        caches.load_cache(tmp_path / "named.safetensors", model, f"{folder}/.", said.append)
        assert bool(said) == told and all("was made with other" in line for line in said)
    for name in ("a/m", "b/m"):  # of the Hub
        said = []
        save_prompt_cache(str(tmp_path / "named.safetensors"), cache, {"model": "b/m"})
        caches.load_cache(tmp_path / "named.safetensors", model, name, said.append)
        assert bool(said) == (name == "a/m")
    cut = {key: value for key, value in metadata.items() if key != "1.0"}
    mx.save_safetensors(str(tmp_path / "cut.safetensors"), arrays, cut)
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, said in (
        ("cut", "no prompt cache"),
        ("pipe", "no regular file"),
        ("none", "no such"),
    ):
        with pytest.raises(UserError, match=said):
            caches.load_cache(tmp_path / f"{name}.safetensors", model)
    with pytest.raises(UserError, match="no prompt cache"):
        caches.load_cache(tmp_path / "text.safetensors", model)


# What an answer may not do: steer a terminal, end in a traceback, be timed from cold

STEERING = "\x1b]0;owned\x07\x9b2J\u202e"


@pytest.fixture(scope="module")
def hostile(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model each of whose tokens reads as a terminal's commands."""
    made = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(folder, made)
    tokenizer = json.loads((made / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"Regex": "."}, "content": STEERING}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [replace]}
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    return made


@pytest.mark.parametrize("flags", [(), ("--draft-model",)], ids=" ".join)
def test_an_answer_never_steers_the_terminal(
    hostile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...]
):
    """Nor a file that someone shows later; --json has what was said."""
    flags = (*flags, str(hostile)) if flags else ()
    command = ["generate", "--model", str(hostile), "--prompt", "hi", "--max-tokens", "3"]
    assert cli.main([*command, *flags, "--json", str(tmp_path / "j.json")]) == 0
    out, err = capfd.readouterr()
    assert out == make_visible(STEERING) * (out.count("owned")) + "\n" and "owned" in out
    assert "\x1b" not in err
    assert json.loads((tmp_path / "j.json").read_text())["text"].startswith(STEERING)
    assert cli.main([*command, "--compare", str(hostile), "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert out.isascii() and "\x1b" not in out + err  # JSON escapes it
    assert json.loads(out)["second"]["text"].startswith(STEERING)


@pytest.mark.parametrize("short", [0, 1])
def test_each_model_that_sees_less_of_the_prompt_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], short: int
):
    names = [str(tmp_path / name) for name in "ab"]
    for i, name in enumerate(names):
        make_llama(Path(name), max_position_embeddings=16 if i == short else 512)
    command = f"generate --model {names[0]} --compare {names[1]} --max-tokens 2 --prompt".split()
    assert cli.main([*command, "once upon a time there was a miller"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "context of 16" in line]
    assert len(warnings) == 1 and f"{names[short]}: the prompt has" in warnings[0]


@pytest.mark.parametrize("error", [IndexError, ValueError, KeyError, TypeError, RuntimeError])
@pytest.mark.parametrize("where", ["detokenizer", "sampler"])
def test_an_answer_that_breaks_off_says_so_in_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: type[Exception], where: str,
):  # fmt: skip
    def fail(*_: Any) -> Any:
        calls.append(1)
        if len(calls) > 9:
            raise error("no such\ntoken \x1b[2J")
        return mx.array([65])

    calls: list[int] = []
    if where == "sampler":
        made = {"sampler": fail, "logits_processors": None}
        monkeypatch.setattr(generation, "make_samplers", lambda **_: made)
    else:
        kind = type(load(folder)[1].detokenizer)
        monkeypatch.setattr(kind, "add_token", fail)
    code = cli.main(["generate", "--model", str(folder), "--prompt", "hi"])
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1 and "\x1b" not in err
    assert re.search(rf"breaks off after [4-7] tokens \({error.__name__}: '?no such", err)


@pytest.mark.parametrize("length", [1, 2, 44, 64, 65, 66, 130, 500, 1000])
def test_a_warm_up_is_of_the_same_kind_and_short(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, length: int
):
    """Its steps are as long as the answer's, less whole blocks of 64."""
    seen: list[int] = []
    call = type(llama[0]).__call__

    def count(self: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        seen.append(inputs.shape[1])
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(llama[0]), "__call__", count)
    generation.warm_up(*llama, length)
    warm, seen = seen, []
    run(llama, [65] * length, max_tokens=3)
    assert [one % 64 for one in warm] == [one % 64 for one in seen]
    assert sum(warm) < 140 and (length < 64 or warm[0] > 62)


def test_a_warm_up_leaves_no_trace(llama: Loaded):
    """In random numbers, in a cache to go on from, in the memory that is held."""
    cache = caches.make_cache(llama[0])
    run(llama, max_tokens=3, prompt_cache=cache)
    options = {"temp": 1.0, "prompt_cache": cache}
    answers = []
    for warm in (False, True):
        mx.random.seed(5)
        if warm:
            offsets = [c.offset for c in cache]
            free = mx.get_active_memory()
            generation.warm_up(*llama, 1000, **options, max_tokens=20)
            assert [c.offset for c in cache] == offsets
            gc.collect()
            assert mx.get_active_memory() < free + 50_000  # a cache for it takes 200,000
        before = mx.random.uniform(shape=(3,)).tolist()
        answer = generation.generate(*llama, PROMPT, max_tokens=8, temp=1.0)
        answers.append((before, answer.text))
    assert answers[0] == answers[1]


def test_the_first_steps_are_not_timed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As if each kind of step were compiled in half a second, the first time."""
    kind = type(load(folder)[0])
    call, known = kind.__call__, set()

    def compiled(self: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if inputs.shape[1] not in known:
            time.sleep(0.5)
        known.add(inputs.shape[1])
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", compiled)
    command = ["generate", "--model", str(folder), "--prompt", "Hi", "--max-tokens", "4"]
    assert cli.main([*command, "--json", str(tmp_path / "j.json")]) == 0
    answer = json.loads((tmp_path / "j.json").read_text())
    assert answer["prompt_tokens"] / answer["prompt_tps"] < 0.5 and answer["generation_tps"] > 6


def test_a_system_prompt_opens_the_conversation(llama: Loaded):
    tokenizer = llama[1]
    ids = prompts.encode_prompt(tokenizer, "Hi", system="Be brief.")
    assert tokenizer.decode(ids) == "<s>system: Be brief.\n<s>user: Hi\n<s>assistant: "


LEAVES_OUT = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}.{% endfor %}"
REFUSES = "{{ raise_exception('no such role') if messages[0]['role'] == 'system' else 'x' }}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "not taught to take turns"),
        (corpus.PLAIN_TEMPLATE, "not taught to take turns"),
        (LEAVES_OUT, "leaves it out; drop it"),
        (REFUSES, "takes none .*no such role"),
        ("{{ 1 / 0 }}", "chat template fails"),
    ],
)
def test_a_system_prompt_without_a_place_is_refused(folder: Path, template: str, says: str):
    _, tokenizer = load(folder)
    tokenizer._tokenizer.chat_template = template
    tokenizer = TokenizerWrapper(tokenizer._tokenizer)
    with pytest.raises(UserError, match=says):
        prompts.encode_prompt(tokenizer, "Hi", system="Be brief.")


def test_a_template_that_only_joins_is_no_chat(folder: Path):
    """A prompt is encoded as without one; mlx-lm's chat and server get the same text."""
    _, tokenizer = load(folder)
    tokenizer._tokenizer.chat_template = corpus.PLAIN_TEMPLATE
    tokenizer = TokenizerWrapper(tokenizer._tokenizer)
    assert tokenizer.has_chat_template and not prompts.has_turns(tokenizer)
    assert prompts.encode_prompt(tokenizer, "Hi there") == tokenizer.encode("Hi there")
    roles = ("system", "user", "assistant", "user")
    said = [{"role": role, "content": text} for role, text in zip(roles, "abcd", strict=True)]
    shown = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert shown == "a\nb c\nd"


def make_adapters(folder: Path, model: nn.Module) -> None:
    """LoRA adapters as mlx_lm.lora writes them, random ones."""
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, parameters)
    mx.random.seed(0)
    weights = {
        name: mx.random.normal(w.shape)
        for name, w in tree_flatten(model.parameters())
        if name.endswith(("lora_a", "lora_b"))
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_adapters(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_adapters(tmp_path / "adapters", load(folder)[0])
    command = ["generate", "--model", str(folder), "--prompt", "Hi", "--max-tokens", "20"]
    said = []
    for flags in ([], ["--adapter-path", str(tmp_path / "adapters")]):
        assert cli.main([*command, *flags]) == 0
        said.append(capsys.readouterr().out)
    adapted = load(folder, adapter_path=str(tmp_path / "adapters"))
    assert said[1] == make_visible(generation.generate(*adapted, "Hi", max_tokens=20).text) + "\n"
    assert said[0] != said[1]
    for wrong in (tmp_path / "none", folder):
        assert cli.main([*command, "--adapter-path", str(wrong)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1


# The command without a model, or without a prompt


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "template"])
def bundled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the bundled one's place, with and without a chat template."""
    folder = tmp_path_factory.mktemp("bundled") / "tales"
    make_checkpoint(
        folder, norm="qkv", hidden_size=32, intermediate_size=48, template=request.param
    )
    return folder


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Command:
    """Run `generate` in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert, "BUNDLED", bundled)

    def run(*arguments: str, stdin: str | int | bytes = os.devnull) -> tuple[int, str, str]:
        """`stdin`: a file, open or not, or the bytes that a pipe holds."""
        read = stdin
        if isinstance(stdin, bytes):
            read, write = os.pipe()
            os.write(write, stdin)
            os.close(write)
        with open(read, encoding="utf-8") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", file)
            code = cli.main(["generate", *arguments])
        return code, *capfd.readouterr()

    return run


def said(folder: Path, prompt: str, *, chat: bool | None = None, **options: Any) -> str:
    model, tokenizer = load(folder)
    ids = prompts.encode_prompt(tokenizer, prompt, chat=chat)
    return generation.generate(model, tokenizer, ids, **options).text


def test_without_arguments_the_bundled_model_is_converted_once(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code, out, err = command("--max-tokens", "4")
    assert code == 0 and out.startswith("Once upon a time")
    assert "no mlx_model here: converting the bundled model first" in err
    assert "fewer)" in err and "worst relative logit error" in err and "; answer " in err
    config = json.loads((tmp_path / "mlx_model/config.json").read_text())
    assert config["removed"] == {"q": [0, 1, 2], "p": [0, 1, 2]}
    monkeypatch.setattr(convert, "BUNDLED", tmp_path / "gone")
    code, out, err = command("--max-tokens", "4")
    assert code == 0 and "converting" not in err and out.startswith("Once upon a time")


def test_another_model_is_not_replaced_by_the_bundled_one(command: Command, tmp_path: Path):
    code, out, err = command("--model", "mlx_modell", "--max-tokens", "4")
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_bundled_model_that_cannot_be_converted_leaves_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(convert, "BUNDLED", tmp_path / "gone")
    code, out, err = command()
    assert (code, out) == (1, "") and "error: " in err and "gone" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "pieces", "shown"),
    [
        ("Ġman", ["man", " lived"], " man lived"),
        ("▁man", ["", "man lived"], " man lived"),
        ("Ġman", [" man", " lived"], " man lived"),
        ("ly", ["ly", " lived"], "ly lived"),
        ("Ċ", ["\n", "Far"], "\nFar"),
        (None, ["?", " lived"], "? lived"),  # a token that the tokenizer does not know
    ],
)
def test_a_tale_keeps_its_first_space(name: str | None, pieces: list[str], shown: str):
    """What goes on on the prompt's line opens with the space that its first token has."""
    known = {"token": 0, "logprobs": mx.zeros(1), "finish_reason": None}
    responses = (SimpleNamespace(text=piece, **known) for piece in pieces)
    tokenizer: Any = SimpleNamespace(convert_ids_to_tokens=[name].__getitem__)
    assert "".join(generation.restore_first_space(generation.Stream(responses), tokenizer)) == shown


def test_the_unasked_tale_is_sampled(command: Command, tmp_path: Path):
    """At 0.8 unless told, as plain text whatever the tokenizer has; its opening is shown first."""
    made = {}
    for flags in ((), ("--temp", "0.8"), ("--temp", "0"), ("--temp", "0.4")):
        code, out, _ = command(*flags, "--seed", "3", "--max-tokens", "30", "--json", "j.json")
        answer = json.loads((tmp_path / "j.json").read_text())
        text = answer["text"]
        assert code == 0 and out in (f"Once upon a time{text}\n", f"Once upon a time {text}\n")
        assert answer["generation_tokens"] == 30
        made[flags[1:]] = answer["text"]
    folder, tale = tmp_path / "mlx_model", {"chat": False, "max_tokens": 30, "seed": 3}
    assert made[()] == said(folder, generation.TALE, temp=0.8, **tale)
    assert made[("0",)] == said(folder, generation.TALE, temp=0.0, **tale)
    assert made[()] == made[("0.8",)] and len(set(made.values())) == 3


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (("--prompt", "Hi there"), os.devnull),
        (("--prompt", "Hi there"), b"ignored"),
        (("--prompt", "-"), b"Hi there"),
        ((), b"Hi there"),
    ],
)
def test_a_prompt_is_answered_greedily(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], stdin: str | bytes
):
    code, out, err = command(*arguments, "--seed", "3", "--max-tokens", "20", stdin=stdin)
    assert code == 0 and "converting" in err
    assert out == said(tmp_path / "mlx_model", "Hi there", max_tokens=20) + "\n"
    _, warm, _ = command(*arguments, "--seed", "3", "--max-tokens", "20", "--temp", "2",
                         stdin=stdin)  # fmt: skip
    assert warm != out


def test_a_pipe_that_is_silent_is_not_waited_for(command: Command, monkeypatch: pytest.MonkeyPatch):
    """Unless it is asked for; where a prompt may still come, that is told."""
    read, write = os.pipe()
    code, out, err = command("--max-tokens", "4", stdin=read)
    os.close(write)
    assert code == 0 and out.startswith("Once upon a time")
    assert "nothing has come through the pipe: --prompt - waits" in err
    _, _, err = command("--max-tokens", "4")
    assert "pipe" not in err


def test_long_prompts_bring_no_word_of_transformers(bundled: Path, monkeypatch: pytest.MonkeyPatch):
    """It warns of indexing errors, which MLX does not make; our own warning is of the context."""
    said: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    _, tokenizer = load(bundled)
    tokenizer._tokenizer.model_max_length = 8
    assert len(prompts.encode_prompt(tokenizer, "a b c d e f g h " * 9)) > 8
    assert not said


def test_a_piped_file_is_a_prompt(command: Command, tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("Hi there")
    code, out, _ = command("--max-tokens", "20", stdin="prompt.txt")
    assert code == 0
    assert out == said(tmp_path / "mlx_model", "Hi there", max_tokens=20) + "\n"


@pytest.mark.parametrize(("prompt", "stdin"), [("", b"text"), (" ", b"text"), ("-", b"")])
def test_an_empty_prompt_that_was_asked_is_no_tale(command: Command, prompt: str, stdin: bytes):
    code, out, err = command("--prompt", prompt, stdin=stdin)
    assert (code, out) == (1 if prompt == "-" else 2, "") and "prompt is empty" in err


@pytest.mark.parametrize("flag", ["--compare", "--prompt-cache-file"])
def test_a_system_prompt_is_one_answers(command: Command, flag: str):
    code, out, err = command("--prompt", "Hi", "--system-prompt", "Be brief.", flag, "other")
    assert (code, out) == (2, "") and err.startswith("error: --system-prompt goes with neither")


def test_a_system_prompt_of_a_tale_or_of_nothing(command: Command):
    for arguments in (["--system-prompt", "Hush."], ["--system-prompt", " ", "--prompt", "Hi"]):
        code, out, err = command(*arguments)
        last = err.splitlines()[-1]
        assert (code, out) == (2, "") and last.startswith("error: ")
        assert "--system-prompt" in last


@pytest.mark.parametrize("flag", ["--compare", "--prompt-cache-file"])
def test_flags_that_need_a_prompt_say_so_before_any_work(
    command: Command, tmp_path: Path, flag: str
):
    code, out, err = command(flag, "other")
    assert (code, out) == (2, "") and err.startswith("error: --compare") and "--prompt" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temp", [None, 0.3])
def test_a_terminal_chats(
    bundled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    temp: float | None,
):
    """With a tale to open it and warm, or after a template's own manner and greedy."""
    monkeypatch.setattr(convert, "BUNDLED", bundled)
    monkeypatch.chdir(tmp_path)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(chat, "chat", lambda model, tokenizer, **options: asked.append(options))
    flags = [] if temp is None else ["--temp", str(temp)]
    ours, side = pty.openpty()
    with open(side) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert cli.main(["generate", *flags]) == 0
        template = load(bundled)[1].has_chat_template
        unasked = (None, 0.0) if template else ("Once upon a time", 0.8)
        assert [(options["opening"], options["temp"]) for options in asked] == [
            (unasked[0], unasked[1] if temp is None else temp)
        ]
        capsys.readouterr()
        assert cli.main(["generate", "--json", "j.json", "--max-tokens", "4", *flags]) == 0
        assert len(asked) == 1 and capsys.readouterr().out.startswith("Once upon a time")
        assert json.loads(Path("j.json").read_text())["generation_tokens"] == 4
    os.close(ours)


@pytest.mark.parametrize(
    ("flags", "taken"),
    [
        ([], {"temp": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}),
        (["--top-p", "1", "--top-k", "0"], {"temp": 0.6, "repetition_penalty": 1.05}),
        (["--temp", "0"], {"repetition_penalty": 1.05}),
        (["--temp", "0", "--repetition-penalty", "1"], {}),
    ],
)
@pytest.mark.parametrize("bundled", [True], indirect=True)
def test_a_chat_samples_as_the_model_recommends(
    bundled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    taken: dict[str, float],
):
    """Where no flag says otherwise, and it says what it took; --prompt is answered greedily."""
    shutil.copytree(bundled, tmp_path / "m")
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    config |= {"repetition_penalty": 1.05, "eos_token_id": [EOS]}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(config))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(chat, "chat", lambda model, tokenizer, **options: asked.update(options))
    ours, side = pty.openpty()
    with open(side) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        command = ["generate", "--model", str(tmp_path / "m"), "--system-prompt", "Hush.", *flags]
        assert cli.main(command) == 0
        assert asked["system_prompt"] == "Hush."
        told = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in taken.items())
        assert asked["remarks"] == ([f"As generation_config.json recommends: {told}"] * bool(taken))
        given = {name: float(value) for name, value in zip(*[iter(flags)] * 2, strict=True)}
        given = {name.strip("-").replace("-", "_"): value for name, value in given.items()}
        assert {name: asked[name] for name in taken | given} == taken | given
        seen: dict[str, Any] = {}
        original = generation.stream

        def stream(*given: Any, **options: Any) -> generation.Stream:
            seen.update(options)
            return original(*given, **options)

        monkeypatch.setattr(generation, "stream", stream)
        assert cli.main([*command, "--prompt", "Hi", "--max-tokens", "2"]) == 0
        assert {
            k: v for k, v in seen.items() if k not in ("max_tokens", "prompt_cache", "seed")
        } == {"temp": 0} | given
    os.close(ours)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "bundled", [False, pytest.param(True, marks=pytest.mark.thorough)], indirect=True
)
def test_a_silent_pipe_is_not_waited_for(bundled: Path, tmp_path: Path):
    """What a service manager or an editor gives as standard input: open, and nothing comes."""
    read, write = os.pipe()
    command = script(bundled, "generate.py", "--max-tokens", "4")
    run = subprocess.run(
        command, stdin=read, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    os.close(read)
    os.close(write)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Once upon a time") and "Traceback" not in run.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("bundled", [False], indirect=True)
def test_a_closed_standard_input(bundled: Path, tmp_path: Path):
    """The next file opened is descriptor 0 then."""
    for name, flags in (("convert.py", ()), ("generate.py", ("--max-tokens", "4"))):
        run = subprocess.run(
            ["sh", "-c", 'exec "$@" <&-', "sh", *script(bundled, name, *flags)],
            capture_output=True, text=True, cwd=tmp_path, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "Traceback" not in run.stderr
    assert run.stdout.startswith("Once upon a time") and "converting" not in run.stderr
