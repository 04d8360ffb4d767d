"""What a model was made for, in tokens, and what happens beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from factory import make_llama
from mlx_lm.generate import stream_generate
from mlx_lm.models import gpt2
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load as load_stock
from zoo import make_model

from mlx_skipless import cli
from mlx_skipless.constants import BUNDLED
from mlx_skipless.errors import UserError
from mlx_skipless.evaluation import benchmark
from mlx_skipless.inference import caches, chat, context, generation
from mlx_skipless.inference.loading import load, load_network

Loaded = tuple[nn.Module, TokenizerWrapper]
PROMPT = list(b"The quick brown fox jumps over the lazy dog.")  # 44 tokens
SAMPLED: dict[str, Any] = {"temp": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for 64 tokens, without a chat template."""
    folder = tmp_path_factory.mktemp("short")
    make_llama(folder, head_dim=32, num_hidden_layers=2, max_position_embeddings=64)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def short(folder: Path) -> Loaded:
    model, tokenizer = load(folder)
    tokenizer.eos_token_ids = set()
    return model, tokenizer


@pytest.fixture(scope="module")
def table() -> nn.Module:
    """A GPT-2, whose 64 positions are rows of a table."""
    args = gpt2.ModelArgs(
        model_type="gpt2", n_ctx=64, n_embd=32, n_head=2, n_layer=1, n_positions=64,
        layer_norm_epsilon=1e-5, vocab_size=264,
    )  # fmt: skip
    return gpt2.Model(args)


def tokens(loaded: Loaded, prompt: list[int], **options: Any) -> list[int]:
    pieces = generation.stream(*loaded, prompt, **options)
    list(pieces)
    return pieces.tokens


def plain(loaded: Loaded, prompt: list[int], max_tokens: int, cache: list[Any]) -> list[int]:
    """mlx-lm's own tokens, as ``SAMPLED`` draws them."""
    mx.random.seed(SAMPLED["seed"])
    found = stream_generate(
        *loaded, prompt, max_tokens=max_tokens, prompt_cache=cache, sampler=make_sampler(1.5)
    )
    return [one.token for one in found]


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024, "n_ctx": 1024}, 1024),
        ({"max_sequence_length": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 128}}, 128),
        ({"max_position_embeddings": 7, "text_config": {"max_position_embeddings": 128}}, 128),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": "4096"}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": -5}, None),
        ({"max_position_embeddings": 4096.0}, None),
        # As Qwen 2.5 writes it, and as Llama 3.1 does.
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": YARN}, 131072),
        ({"max_position_embeddings": 64, "rope_scaling": {"factor": "x"}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": YARN | {"factor": float("inf")}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": [1]}, 64),
        # Windows that mlx-lm's network does not have bound what it may see.
        ({"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "max_position_embeddings": 64, "sliding_window": None}, 64),
        ({"model_type": "phi3", "max_position_embeddings": 4096, "sliding_window": 2047}, 2047),
        ({"model_type": "gemma2", "max_position_embeddings": 8192, "sliding_window": 4096}, 8192),
        (
            {"model_type": "qwen2", "max_position_embeddings": 32768, "sliding_window": 4096}
            | {"use_sliding_window": False},
            32768,
        ),
    ],
)  # fmt: skip
def test_a_config_says_how_long(config: dict[str, Any], length: int | None) -> None:
    assert context.read_context(config) == length


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, 16),
        ({"use_sliding_window": True, "max_window_layers": 2}, None),
        ({"use_sliding_window": False}, None),
    ],
    ids=["some layers", "no layer", "unused"],
)
def test_a_window_of_some_layers_that_mlx_lm_has_not_is_told(
    changes: dict[str, Any], window: int | None, tmp_path: Path
) -> None:
    make_model(tmp_path, "qwen2", num_hidden_layers=2, sliding_window=16, **changes)
    model = load_network(tmp_path)[0]
    assert model.lost_window == window
    for tokens in (16, 17):
        told = context.describe_overflow(model, tokens)
        assert told == context.check_windows(model, [3, tokens], "the prompt has")
        assert (told is not None) == (window is not None and tokens > window)
        assert told is None or "a window of 16: mlx-lm's own network shows" in told


def test_every_way_to_load_finds_the_same(folder: Path, table: nn.Module) -> None:
    assert context.find_context(load(folder)[0]) == 64
    assert context.find_context(load_stock(str(folder))[0]) == 64
    assert context.find_context(table) == 64
    assert context.find_context(load(BUNDLED)[0]) == 512
    assert context.find_context(nn.Module()) is None


def test_within_the_context_nothing_changes(short: Loaded) -> None:
    cache = [KVCache() for _ in short[0].layers]
    assert tokens(short, PROMPT, max_tokens=20, **SAMPLED) == plain(short, PROMPT, 20, cache)


@pytest.mark.parametrize("start", [PROMPT, PROMPT * 3], ids=["answer", "prompt"])
def test_beyond_it_the_cache_slides(short: Loaded, start: list[int]) -> None:
    """As if --max-kv-size were the context; what went before is the same.

    Of a longer prompt what the cache would not hold in the end is never read.
    """
    said = tokens(short, start, max_tokens=60, **SAMPLED)
    bounded = [RotatingKVCache(64, keep=caches.KEEP) for _ in short[0].layers]
    read = start if len(start) <= 64 else start[: caches.KEEP] + start[caches.KEEP - 64 :]
    assert said == plain(short, read, 60, bounded)
    whole = plain(short, start, 60, [KVCache() for _ in short[0].layers])
    same = max(0, 64 - len(start))
    assert said != whole and said[:same] == whole[:same]
    assert tokens(short, start, max_tokens=60, max_kv_size=10**6, **SAMPLED) == whole


def test_a_prompt_of_any_length_takes_no_longer(short: Loaded) -> None:
    """In an answer and in a chat, whose next turn goes on from what was read."""
    text = bytes(PROMPT).decode() * 100
    assert generation.generate(*short, text, max_tokens=2).prompt_tokens == 64
    talk = chat.Conversation(*short, max_tokens=2)
    for said in (text, "hi", text):
        list(talk.ask(said))
        assert talk.last is not None and talk.last.prompt_tokens <= 64
        assert len(talk.cached) <= 66 and talk.cached[-3] == short[1].encode(said)[-1]
    state = [*caches.make_sliding_cache(short[0]), ArraysCache(2)]  # remembers what it read
    assert caches.cut_prompt(short[0], state, PROMPT * 2) == PROMPT * 2
    wide = chat.Conversation(*short, max_tokens=2, max_kv_size=128)
    list(wide.ask(text[:200]))
    assert len(wide.cached) > 200


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"prompt_cache": True}, {"draft_model": True}])
def test_what_cannot_slide_ends_at_the_context(
    short: Loaded, folder: Path, options: dict[str, Any]
) -> None:
    def fresh() -> dict[str, Any]:
        made = {"prompt_cache": caches.make_cache(short[0]), "draft_model": load(folder)[0]}
        return {key: made.get(key, value) for key, value in options.items()}

    pieces = generation.stream(*short, PROMPT, max_tokens=60, **fresh())
    list(pieces)
    assert len(pieces.tokens) == 64 - len(PROMPT) and pieces.cut == "the end of the model's context"
    assert "cut off by the end of" in generation.summarize(pieces.answer, cut=pieces.cut)
    with pytest.raises(UserError, match=r"the prompt has 88 tokens and the model's context 64"):
        generation.stream(*short, PROMPT * 2, **fresh())


def test_a_given_cache_counts(short: Loaded) -> None:
    cache = caches.make_cache(short[0])
    tokens(short, PROMPT, max_tokens=5, prompt_cache=cache)
    assert len(tokens(short, PROMPT[:5], max_tokens=60, prompt_cache=cache)) == 64 - 49 - 5


def test_a_table_of_positions_has_an_end(short: Loaded, table: nn.Module) -> None:
    assert len(tokens((table, short[1]), PROMPT, max_tokens=60)) == 64 - len(PROMPT)
    with pytest.raises(UserError, match=r"88 tokens and the model's context 64: shorten it$"):
        generation.stream(table, short[1], PROMPT * 2)
    with pytest.raises(UserError, match=r"--context 65 tokens.*no more positions"):
        context.check_windows(table, [3, 65], "--context")
    assert context.check_windows(table, [64], "--context") is None


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(one) for one in arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("repeats", "size", "warned", "told"),
    [(1, 4, None, None), (1, 60, None, "prompt and answer have "), (3, 4, "the prompt has ", None)],
)
def test_generate_says_so_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], repeats: int, size: int,
    warned: str | None, told: str | None,
) -> None:  # fmt: skip
    text = bytes(PROMPT).decode() * repeats
    flags = ("--max-tokens", size, "--quiet") if warned else ("--max-tokens", size)
    code, _, err = say(capsys, "generate", "--model", folder, "--prompt", text, *flags)
    lines = err.splitlines()
    assert code == 0 and len(lines) == (1 if warned else 2 if told else 1)
    if what := warned or told:
        assert what in lines[-1] and "more than the model's context of 64" in lines[-1]
        assert lines[-1].startswith("WARNING: ") == bool(warned)


def test_perplexity_and_bench_say_so(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (text := tmp_path / "text.txt").write_text("The quick brown fox.\n" * 30)
    score = ("perplexity", "--model", folder, "--validation", text)
    code, _, err = say(capsys, *score, "--context", 96)
    assert (code, err.count("\n")) == (0, 1)
    assert "WARNING: --context 96 tokens, more than the model's context of 64" in err
    assert say(capsys, *score)[0::2] == (0, "")
    monkeypatch.setattr(benchmark, "_measure_models", lambda found, notes, *rest: notes)
    for cases, said in (
        (
            {"prompt_lengths": [60]},
            "--prompt-lengths and --decode-tokens make 68 tokens",
        ),
        ({"prompt_lengths": [56]}, None),
        ({"prompt_lengths": [], "contexts": [8, 99]}, "--contexts and --decode-tokens make 107 "),
    ):
        notes = benchmark.benchmark([folder], batch_sizes=[1], decode_tokens=8, **cases)
        assert said is None or said in notes[-1]  # type: ignore[index]
        assert said is not None or "context" not in "".join(notes)  # type: ignore[arg-type]


def test_the_bundled_model_has_a_bounded_cache() -> None:
    assert {one.max_size for one in caches.make_sliding_cache(load(BUNDLED)[0])} == {512}


@pytest.mark.thorough
def test_the_bundled_model_stays_itself() -> None:
    """What it says after its context is as likely to itself as what it says within.

    The judge is the model on windows of 128 tokens; with a cache that grows on, it goes astray.
    """
    model, tokenizer = load(BUNDLED)
    model.set_dtype(mx.float32)
    start = tokenizer.encode(generation.TALE)

    def surprise(**options: Any) -> list[float]:
        said = tokens((model, tokenizer), start, max_tokens=900, temp=0.8, seed=1, **options)
        rows = mx.array([said[at - 128 : at] for at in (400, 700, 900)])
        losses = nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:])
        return losses.mean(axis=1).tolist()

    within, *beyond = surprise()
    assert max(beyond) < within + 0.3 < min(surprise(max_kv_size=10**6)[1:])
