"""Scores of models on held-out text, against NumPy in float64."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from factory import EOS, make_checkpoint, make_llama
from transformers import PreTrainedTokenizerFast

import mlx_skipless
from mlx_skipless import UserError, cli
from mlx_skipless.text import corpus

TEXT = "".join(f"{n} — the fox & {'é' * (n % 4)} the crow, {n * n}\n" for n in range(60))


def numpy_score(
    folder: Path, config: reference.Config, weights: reference.Weights, length: int
) -> tuple[float, float, int, int]:
    """Nats per token, bits per character, tokens and characters of whole windows of TEXT."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = TEXT.removesuffix("\n")
    tokens = np.array([*tokenizer.encode(text, add_special_tokens=False), EOS])
    count = (len(tokens) - 1) // length
    rows = np.stack([tokens[i * length : (i + 1) * length + 1] for i in range(count)])
    logits = reference.logits(config, weights, rows[:, :-1])
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, rows[:, 1:, None], -1).sum()
    seen = tokens[1 : count * length + 1]
    end = tokenizer.decode(seen[seen != EOS])
    characters = len(end) - end.startswith("\ufffd")  # begun before the first token that counts
    predicted = count * length
    return nats / predicted, nats / math.log(2) / characters, predicted, characters


def make(kind: str, folder: Path, **config: Any) -> tuple[reference.Config, reference.Weights]:
    if kind == "skipless":
        return make_checkpoint(folder, norm="qkv", **config)
    config, weights = make_llama(folder, model_type=kind, **config)
    return reference.llama_config(config), weights


@pytest.mark.parametrize("kind", ["skipless", "llama", "mistral"])
@pytest.mark.parametrize(("length", "batch_size"), [(16, 1), (50, 3), (333, 16)])
def test_scores(tmp_path: Path, kind: str, length: int, batch_size: int):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    config, weights = make(kind, model, seed=length)
    text.write_text(TEXT, encoding="utf-8")
    score = mlx_skipless.measure_perplexity(
        model, validation=[text], context=length, batch_size=batch_size
    ).as_dict()
    expected = numpy_score(model, config, weights, length)
    assert list(score.values()) == pytest.approx(expected, rel=1e-4)
    assert list(score) == ["loss", "bits_per_character", "tokens", "characters"]


@pytest.mark.parametrize("length", [1, 5, 8, 64])
@pytest.mark.parametrize("limit", [None, 200])
def test_characters_of_several_tokens_count_once(
    length: int, limit: int | None, tmp_path: Path
) -> None:
    """Wherever windows cut them; where not all windows count, a character does where it begins."""
    make_llama(tmp_path, num_hidden_layers=1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "".join("aé語👩"[i * i % 4] for i in range(600))
    starts = {len(text[:i].encode()) for i in range(len(text))}
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False))
    assert len(tokens) == len(text.encode())
    windows = [*corpus.cut_windows(np.arange(len(tokens)), length, 1, limit)]
    predicted = {int(i) for (row,) in windows for i in row[1:]}
    assert corpus.count_predicted(tokenizer, tokens, length, limit) == len(predicted & starts)


@pytest.mark.parametrize(("positions", "length"), [(40, 40), (512, 512), (4096, 512)])
def test_windows_are_as_long_as_the_model_was_made_for(tmp_path: Path, positions: int, length: int):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    make("skipless", model, max_position_embeddings=positions)
    text.write_text("a" * 600)
    default = mlx_skipless.measure_perplexity(model, validation=[text])
    assert default == mlx_skipless.measure_perplexity(model, validation=[text], context=length)
    assert default.tokens == 600 // length * length


@pytest.mark.parametrize("share", [0.03, 0.5])
def test_the_end_of_each_file_is_held_out(tmp_path: Path, share: float):
    model = tmp_path / "model"
    make("skipless", model)
    files, ends = [], []
    for i, count in enumerate((100, 37)):
        lines = [f"file {i}, line {n}" for n in range(count)]
        files.append(tmp_path / f"{i}.txt")
        ends.append(tmp_path / f"{i}-end.txt")
        files[-1].write_text("\n".join(lines))
        ends[-1].write_text("\n".join(lines[count - round(share * count) :]))
    held_out = mlx_skipless.measure_perplexity(model, files, validation_share=share, context=8)
    assert held_out == mlx_skipless.measure_perplexity(model, validation=ends, context=8)
    # Files of their own are taken alone.
    assert held_out == mlx_skipless.measure_perplexity(model, files, validation=ends, context=8)


def test_the_command_is_the_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, text, report = tmp_path / "model", tmp_path / "text.txt", tmp_path / "score.json"
    make("skipless", model)
    text.write_text(TEXT)
    score = mlx_skipless.measure_perplexity(model, [text], context=32, validation_share=0.4)
    arguments = ["perplexity", "--model", model, "--data", text, "--context", 32, "--json", report]
    assert cli.main([*map(str, arguments), "--validation-share", "0.4"]) == 0
    assert json.loads(report.read_text()) == score.as_dict()
    printed = capsys.readouterr().out
    assert f"{score.loss:.4f} nats per token" in printed
    assert f"{score.bits_per_character:.4f} bits per character" in printed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"context": 0}, "--context 0: must be at least 1"),
        ({"context": "8"}, "--context '8': must be a whole number"),
        ({"context": True}, "--context True: must be a whole number"),
        ({"batch_size": 2.5}, "--batch-size 2.5: must be a whole number"),
        ({"validation_share": 0.9}, "--validation's are taken whole"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"validation": ["@/blank.jsonl"]}, "the held-out text has no characters"),
        ({"validation": []}, "no text: give --data, whose end is held out, or --validation"),
        (
            {"validation": [], "data": ["@/line.txt"]},
            r"-share 0\.03 of .* no text.*--validation FILE",
        ),
        (
            {"validation": [], "data": ["@/text.txt"], "validation_share": 0.0},
            "-share 0.0 of .* no",
        ),
        ({"context": 10**6}, "too few for a context of 1,000,000"),
        ({"model": "@/none"}, "none"),
        ({"validation": ["@/none.txt"]}, r"none\.txt cannot be read"),
        ({"data": ["@/none.txt"]}, r"none\.txt cannot be read"),
        ({"validation": [], "data": ["@/text.txt"], "validation_share": 1.0}, "--validation-share"),
    ],
)
def test_what_cannot_be_scored(tmp_path: Path, options: dict[str, Any], says: str):
    make("skipless", tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "line.txt").write_text(TEXT.replace("\n", " "))
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n' * 600)

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(v) for v in value]
        return value.replace("@", str(tmp_path)) if isinstance(value, str) else value

    given = {"model": "@/model", "validation": ["@/text.txt"]} | options
    with pytest.raises(UserError, match=says) as refusal:
        mlx_skipless.measure_perplexity(**{key: placed(value) for key, value in given.items()})
    assert "\n" not in str(refusal.value)


def test_logits_that_are_no_numbers(tmp_path: Path):
    make("llama", tmp_path / "model")
    weights: Any = mx.load(str(tmp_path / "model/model.safetensors"))
    weights["model.norm.weight"] = mx.full(weights["model.norm.weight"].shape, math.nan)
    mx.save_safetensors(str(tmp_path / "model/model.safetensors"), weights)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(UserError, match="model are no numbers on this text"):
        mlx_skipless.measure_perplexity(tmp_path / "model", validation=[tmp_path / "text.txt"])


def test_one_file_stands_for_a_list(tmp_path: Path):
    make("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    one, many = (
        mlx_skipless.measure_perplexity(tmp_path / "model", validation=given, context=16)
        for given in (tmp_path / "text.txt", [tmp_path / "text.txt"])
    )
    assert one == many


def test_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    plain = mlx_skipless.measure_perplexity(
        "~/model", ["~/text.txt"], validation=["~/text.txt"], context=16
    )
    assert plain == mlx_skipless.measure_perplexity(
        tmp_path / "model", validation=[tmp_path / "text.txt"], context=16
    )


def test_the_command_without_text(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["perplexity", "--model", "none"]) == 2
    assert "no text: give --data" in capsys.readouterr().err
