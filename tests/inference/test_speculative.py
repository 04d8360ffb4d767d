"""Speculative decoding: the model's own tokens, whoever drafts them, and how many were accepted."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from converted import made
from factory import make_checkpoint
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_skipless import cli, load
from mlx_skipless.constants import BUNDLED
from mlx_skipless.conversion.convert import convert
from mlx_skipless.errors import UserError
from mlx_skipless.inference import generation

PROMPT = list(b"Once upon a time")  # of the small models bytes, of the bundled one some words
EXACT = ("tales", "kp", "table", "parallel")  # the same function as their sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculative")
    for name in ("kp", "table", "parallel", "no attention 1, 2"):
        made(folder, name)
    make_checkpoint(folder / "other", seed=9, norm="qkv", head_dim=32)
    for out, remove in (("sources/tales", "none"), ("tales", "qp")):
        convert(BUNDLED, folder / out, remove=remove, dtype="float32", verify=False)
    shutil.copytree(folder / "tales", folder / "poor tales")
    spoil(folder / "poor tales/model.safetensors")
    return folder


def spoil(file: Path) -> None:
    """Change each weight by a fifth or so."""
    mx.random.seed(0)
    weights = {k: w * (1 + 0.2 * mx.random.normal(w.shape)) for k, w in mx.load(str(file)).items()}
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})


class Counted:
    """A model that counts its calls, with the caches of the last."""

    def __init__(self, model: nn.Module):
        self.model, self.calls, self.layers = model, 0, model.layers
        self.cache: list[Any] = []

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        self.calls, self.cache = self.calls + 1, cache
        return self.model(inputs, cache)

    def make_cache(self) -> list[Any]:
        return self.model.make_cache()

    @property
    def args(self) -> Any:
        return self.model.args


def tokens(model: nn.Module, tokenizer: TokenizerWrapper, **options: Any) -> list[int]:
    """What mlx-lm makes of it."""
    responses = stream_generate(model, tokenizer, PROMPT, max_tokens=20, **options)
    return [response.token for response in responses]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("removed_drafts", [True, False])
def test_an_exact_conversion_drafts_all_its_source_says(
    name: str, removed_drafts: bool, folder: Path
) -> None:
    pair = [load(folder / "sources" / name)[0], load(folder / name)[0]]
    model, draft = pair if removed_drafts else pair[::-1]
    tokenizer = load(folder / name)[1]
    plain = tokens(model, tokenizer)
    assert tokens(model, tokenizer, draft_model=draft, num_draft_tokens=4) == plain
    counted = Counted(draft)
    pieces = generation.stream(
        model, tokenizer, PROMPT, max_tokens=20, draft_model=counted, num_draft_tokens=4
    )
    list(pieces)
    assert pieces.tokens == plain
    answer = pieces.answer
    # Four rounds of four drafts and a token, and none to waste; the prompt is one call more.
    assert (answer.accepted_tokens, answer.drafted_tokens, counted.calls) == (16, 16, 17)


@pytest.mark.parametrize(
    "target, drafter, good",
    [
        ("tales", "poor tales", True),
        pytest.param("poor tales", "tales", True, marks=pytest.mark.thorough),
        ("no attention 1, 2", "sources/no attention 1, 2", True),
        ("sources/no attention 1, 2", "no attention 1, 2", True),
        ("table", "other", False),
        ("other", "table", False),
    ],
)
def test_a_poor_draft_changes_nothing(target: str, drafter: str, good: bool, folder: Path) -> None:
    """What is rejected is taken back from both caches, of which some lack layers."""
    model, tokenizer = load(folder / target)
    draft, _ = load(folder / drafter)
    plain = tokens(model, tokenizer)
    assert len(set(plain)) > 1 or not good
    responses = list(
        stream_generate(
            model, tokenizer, PROMPT, max_tokens=20, draft_model=draft, num_draft_tokens=3
        )
    )
    assert [response.token for response in responses] == plain
    counted = Counted(draft)
    pieces = generation.stream(
        model, tokenizer, PROMPT, max_tokens=20, draft_model=counted, num_draft_tokens=3
    )
    list(pieces)
    assert pieces.tokens == plain
    answer = pieces.answer
    assert answer.accepted_tokens == sum(response.from_draft for response in responses)
    assert answer.drafted_tokens == counted.calls - 1
    assert (answer.accepted_tokens > 0) == good
    assert answer.accepted_tokens < answer.drafted_tokens


def test_a_quantized_cache(folder: Path) -> None:
    model, tokenizer = load(folder / "other")
    options: dict[str, Any] = {"max_tokens": 20, "kv_bits": 8}
    plain = generation.generate(model, tokenizer, PROMPT, **options)
    pair = Counted(model), Counted(model)
    answer = generation.generate(pair[0], tokenizer, PROMPT, draft_model=pair[1], **options)
    assert all(isinstance(c, QuantizedKVCache) for one in pair for c in one.cache)
    assert answer.text == plain.text
    assert answer.accepted_tokens == answer.drafted_tokens == 15
    assert (plain.accepted_tokens, plain.drafted_tokens) == (0, 0)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_serves_as_draft_model(kind: type, folder: Path) -> None:
    model, tokenizer = load(folder / "other")
    plain = generation.generate(model, tokenizer, PROMPT, max_tokens=12)
    draft = kind(folder / "other")
    answer = generation.generate(model, tokenizer, PROMPT, max_tokens=12, draft_model=draft)
    assert answer.text == plain.text and answer.accepted_tokens == answer.drafted_tokens == 9


def test_a_cache_for_fewer_layers_is_refused(folder: Path) -> None:
    """mlx-lm parts a given list by layers: a target without some attention takes the draft's."""
    model, tokenizer = load(folder / "no attention 1, 2")
    draft, _ = load(folder / "other")
    cache = make_prompt_cache(model) + make_prompt_cache(draft)
    with pytest.raises(ValueError, match="1 caches for 3 layers with attention"):
        tokens(model, tokenizer, draft_model=draft, prompt_cache=cache)


def test_a_window_that_has_moved_on_takes_nothing_back(folder: Path, tmp_path: Path) -> None:
    """mlx-lm would go on with rejected tokens in the cache."""
    window = len(PROMPT) + 21
    make_checkpoint(tmp_path, norm="pre", skip="both", sliding_window=window)
    model, tokenizer = load(tmp_path)
    draft, _ = load(folder / "other")
    plain = generation.generate(model, tokenizer, PROMPT, max_tokens=20)
    within = generation.generate(model, tokenizer, PROMPT, max_tokens=20, draft_model=draft)
    assert within.text == plain.text and len(set(plain.text)) > 1
    assert within.accepted_tokens < within.drafted_tokens
    for pair in ((model, draft), (draft, model)):
        with pytest.raises(UserError, match=f"make {window} tokens, which a RotatingKVCache"):
            generation.stream(pair[0], tokenizer, PROMPT, max_tokens=21, draft_model=pair[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_draft_tokens": 0}, "--num-draft-tokens 0"),
        ({"max_kv_size": 64}, "--max-kv-size"),
        ({"prompt_cache": []}, "a cache to go on from"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, folder: Path) -> None:
    model, tokenizer = load(folder / "other")
    with pytest.raises(UserError, match=message):
        generation.stream(model, tokenizer, PROMPT, draft_model=model, **options)


def run(*arguments: str | Path) -> int:
    return cli.main(["generate", *map(str, arguments)])


def test_the_command_reports_what_was_accepted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", folder / "sources/kp", "--prompt", "the king", "--max-tokens", "8")
    assert run(*options, "--json", tmp_path / "plain.json") == 0
    plain = capsys.readouterr()
    draft = ("--draft-model", folder / "kp", "--num-draft-tokens", "7")
    assert run(*options, *draft, "--json", tmp_path / "drafted.json") == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    assert "7 of 7 drafts accepted" in drafted.err and "drafts" not in plain.err
    found = json.loads((tmp_path / "drafted.json").read_text())
    assert (found["accepted_tokens"], found["drafted_tokens"]) == (7, 7)
    assert json.loads((tmp_path / "plain.json").read_text())["drafted_tokens"] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "need a --prompt"),
        (("--prompt", "a", "--compare", "x"), "neither --compare"),
        (("--prompt", "a", "--prompt-cache-file", "x"), "nor --prompt-cache-file"),
    ],
)
def test_the_command_refuses(
    options: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", folder / "kp", "--draft-model", folder / "kp", *options) != 0
    assert message in capsys.readouterr().err


def test_other_tokens_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", folder / "kp", "--draft-model", BUNDLED, "--prompt", "a") != 0
    assert "has other tokens than the model" in capsys.readouterr().err
