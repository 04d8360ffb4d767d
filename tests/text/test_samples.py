"""Text to calibrate and to check with."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from mlx_lm.models.cache import make_prompt_cache

from mlx_skipless.errors import UserError
from mlx_skipless.text import samples


@pytest.fixture(autouse=True)
def less_text() -> None:
    """As much as users get, for that is what is tested here."""


def test_sampled_text_is_the_networks_own(network) -> None:
    """By the seed the same, by another one other; and likelier than chance under the network."""
    source, streamed = network
    tokens = np.array(samples.sample_text(streamed, 4, 32, seed=1, start=7))
    again = np.array(samples.sample_text(streamed, 4, 32, seed=1, start=7))
    other = np.array(samples.sample_text(streamed, 4, 32, seed=2, start=7))
    assert (tokens == again).all() and (tokens != other).any()
    assert (tokens[:, 0] == 7).all() and tokens.size == 128
    logits = reference.logits(*source, tokens)[:, 1:-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p, tokens[:, 2:, None], axis=-1)
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    assert -chosen.mean() == pytest.approx(entropy.mean(), abs=0.6)
    assert entropy.mean() < np.log(264) - 0.1


def test_sampling_keeps_no_more_than_it_says(network, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache's usual room is for 256 tokens, of each of many sequences."""
    made: list[Any] = []

    def make(model: Any) -> list[Any]:
        made.extend(make_prompt_cache(model))
        return made

    monkeypatch.setattr(samples, "make_prompt_cache", make)
    assert samples.sample_text(network[1], 3, 5, seed=0, start=None).shape == (3, 5)
    assert made and all(cache.keys.shape[2] <= 5 for cache in made)


@pytest.mark.parametrize("calibrating", [True, False])
def test_passages_that_the_network_speaks(network, calibrating: bool) -> None:
    _, streamed = network
    found = samples.sample_passages(
        streamed, seed=3, start=7, calibrating=calibrating, long_check=calibrating
    )
    assert "sampled" in found.origin
    if not calibrating:
        assert found.calibration is None and found.check.size >= 128
        return
    assert found.check.size == 2048 if streamed.resident else found.check.size >= 128
    assert found.calibration is not None and found.calibration.size >= 8192
    check, calibration = np.array(found.check), np.array(found.calibration)
    shared = min(check.shape[1], calibration.shape[1])
    assert (check[:, :shared] != calibration[: len(check), :shared]).any()


@pytest.mark.parametrize("start", [None, 7])
def test_what_lies_on_disk_is_read_once_for_the_text_to_check_with(
    network, start: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last tokens are the network's own all the same."""
    _, streamed = network
    loaded: list[int] = []
    load = streamed.load_layer
    monkeypatch.setattr(streamed, "load_layer", lambda layer: loaded.append(layer) or load(layer))
    found = samples.sample_passages(streamed, seed=3, start=start, calibrating=False)
    assert loaded == [*range(len(streamed.paths))]
    tokens = np.array(found.check)
    assert tokens.shape[1] > 2 and (start is None or (tokens[:, 0] == start).all())
    if not streamed.resident:
        logits = np.array(streamed.logits(streamed.hidden(found.check[:, :2])[:, -1:])[:, 0])
        drawn = np.random.default_rng(0).permuted(tokens[:, 2])
        chosen, other = (logits[range(len(tokens)), row].mean() for row in (tokens[:, 2], drawn))
        assert chosen > other


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("size", [5_000, 40_000, 1_000_000])
def test_passages_of_a_text(size: int) -> None:
    """The check gets the end, calibration places all over what comes before it."""
    text = "".join(chr(ord("a") + 26 * i // size) for i in range(size))
    found = samples.cut_passages("a.txt", text, encode, calibrating=True, long_check=True)
    assert found.calibration is not None
    check, calibration = np.array(found.check), np.array(found.calibration)
    count = min(16, size // 4 // 128)
    assert check.shape == (count, 128)
    assert bytes(check.reshape(-1).tolist()) == text[-count * 128 :].encode()
    assert calibration.shape[0] == 64 and 16 <= calibration.shape[1] <= 256
    seen = {chr(i) for i in np.unique(calibration)}
    assert {"a", "e", "i", "m", "q"} <= seen and "z" not in seen
    short = samples.cut_passages(
        "a.txt", text, encode, calibrating=True, long_check=True, longest=20
    )
    assert short.calibration is not None and short.calibration.shape == (64, 20)
    assert short.check.shape == (16, 20)
    plain = samples.cut_passages("a.txt", text, encode, calibrating=False)
    assert plain.calibration is None and plain.check.shape == (4, 32)
    assert mx.array_equal(plain.check, found.check[-1].reshape(4, 32)).item()


def test_conversations_are_taken_as_the_model_s_template_writes_them() -> None:
    tokenizer: Any = SimpleNamespace(
        encode=lambda piece, verbose: encode(piece),
        has_chat_template=True,
        apply_chat_template=lambda talk, tools, tokenize: "".join(
            f"<{m['content']}>" for m in talk
        ),
    )
    talks = [
        samples.corpus.Transcript([{"role": "user", "content": f"{n} apples and pears"}])
        for n in range(400)
    ]
    plain = "\n\n".join(f"<{n} apples and pears>" for n in range(400))
    seen = [
        samples.take_passages(
            lambda: None, tokenizer, text, "a", seed=0, longest=None, calibrating=True
        )
        for text in (talks, [plain])
    ]
    for of in ("check", "calibration"):
        ours, theirs = (getattr(one, of) for one in seen)
        assert mx.array_equal(ours, theirs).item()


@pytest.mark.parametrize(
    ("text", "calibrating", "said"),
    [("abc", False, "3 tokens"), ("a" * 99, True, "quarter"), ("a" * 999, True, "1,024")],
)
def test_short_text_is_refused(text: str, calibrating: bool, said: str) -> None:
    with pytest.raises(UserError, match=f"--calibration short.txt.*{said}"):
        samples.cut_passages("short.txt", text, encode, calibrating=calibrating)


def test_reading_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert samples.read_text(tmp_path / "a.txt") == ["one\ntwo"]
    records = [{"text": "one"}, {"prompt": "two", "completion": " three"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert samples.read_text(tmp_path / "a.jsonl") == ["one", "two three"]
    with pytest.raises(UserError, match=r"--calibration .*none\.txt"):
        samples.read_text(tmp_path / "none.txt")


def test_empty_rows_of_a_data_set_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "user", "content": "Once."}]
    rows = [{"messages": []}, {"messages": turns}, {"text": ""}, {"text": "More."}]
    monkeypatch.setattr(samples.hub, "is_data_set", lambda source: True)
    monkeypatch.setattr(samples.hub, "read_data_set", lambda source: iter(rows))
    assert samples.read_text("tales/rows") == [samples.corpus.Transcript(turns), "More."]
