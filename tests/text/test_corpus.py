"""Text for training: files to documents, documents to tokens, tokens to windows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import EOS, make_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import ChatDataset
from transformers import PreTrainedTokenizerFast

from mlx_skipless import UserError
from mlx_skipless.checkpoints.guarded import GuardedTokenizer
from mlx_skipless.text import corpus

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMALLEST = 256 + len(SPECIAL)
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "wolves",
    "sleep",
)


def prose(lines: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(WORDS, 9)) for _ in range(lines)) + "\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return corpus.make_tokenizer([prose(100)], 300, chat=False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, content: str | bytes) -> Path:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def records(*content: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in content)


# Files to documents


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.floats(0, 0.99), st.booleans())
def test_the_last_share_of_each_file_is_held_out(
    tmp_path: Path, counts: list[int], share: float, jsonl: bool
):
    files, trained, held_out = [], [], []
    for i, count in enumerate(counts):
        lines = [f"{i} {n}" for n in range(count)]
        file = tmp_path / f"{i}{'.jsonl' if jsonl else '.txt'}"
        file.write_text(records(*({"text": x} for x in lines)) if jsonl else "\n".join(lines))
        files.append(file)
    texts = corpus.read_texts(files, share=share)
    for document in texts.train:
        trained += document.split("\n")
    for document in texts.validation:
        held_out += document.split("\n")
    for i, count in enumerate(counts):
        own, rest = ([x for x in part if x.startswith(f"{i} ")] for part in (trained, held_out))
        assert own + rest == [f"{i} {n}" for n in range(count)]
        assert abs(len(rest) - share * count) <= 0.5
    documents = sum(counts) if jsonl else len(texts.train + texts.validation)
    assert len(texts.train + texts.validation) == documents <= sum(counts)


def test_files_of_their_own_are_held_out_instead(write: Callable[..., Path]):
    files = [write("a.txt", "1\n2\n3\n"), write("b.txt", "4\n5\n")]
    held_out = [write("c.txt", "6\n7\n"), write("d.jsonl", records({"text": "8"}))]
    texts = corpus.read_texts(files, held_out, share=0.5)
    assert texts == corpus.Texts(["1\n2\n3", "4\n5"], ["6\n7", "8"])
    assert not texts.chat


def test_plain_text_keeps_every_character(write: Callable[..., Path]):
    text = '  a\n\n\t{"text": 1}\x0cb\u2028c é👩‍👩‍👧 '
    assert corpus.read_texts([write("a.txt", text)], share=0).train == [text]


def test_a_mark_of_the_byte_order_is_no_text(write: Callable[..., Path]):
    mark = "\ufeff".encode()
    assert corpus.read_texts([write("a.txt", mark + b"a b")], share=0).train == ["a b"]
    line = mark + records({"text": "c"}).encode()
    assert corpus.read_texts([write("a.jsonl", line)], share=0).train == ["c"]


def test_a_device_is_no_text():
    with pytest.raises(UserError, match="/dev/zero is a device"):
        corpus.read_texts([Path("/dev/zero")], share=0)


def test_records_of_each_kind(write: Callable[..., Path]):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\nthere"}]
    plain = [{"text": "a\nb"}, {"prompt": "2 + 2 = ", "completion": "4"}]
    file = write("a.JSONL", records(*plain) + "\n  \n")
    assert corpus.read_texts([file], share=0) == corpus.Texts(["a\nb", "2 + 2 = 4"], [])
    file = write("b.jsonl", records(*plain, {"messages": talk}))
    texts = corpus.read_texts([file], share=0)
    assert texts.chat and len(texts.train) == 3
    chat = corpus.make_tokenizer([prose(50)], SMALLEST, chat=True)
    assert texts.train[2] == corpus.Transcript(talk)
    written = corpus.write_document(texts.train[2])
    assert (
        written == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello\nthere<|im_end|>\n"
    )
    assert chat.apply_chat_template(talk, tokenize=False) == written
    asked = chat.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    answer = written.removeprefix(asked)
    assert answer.startswith("Hello") and answer.split(chat.eos_token) == ["Hello\nthere", "\n"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.txt", None),
        ("latin.txt", "é\n".encode("latin-1")),
        ("utf16.txt", "abc".encode("utf-16")),
        ("empty.txt", b""),
        ("blank.txt", b" \n\t\n"),
        ("empty.jsonl", b"\n"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, name: str, content: bytes | None):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    good = tmp_path / "good.txt"
    good.write_text("a\n")
    for files, validation in (([good, file], []), ([good], [file])):
        with pytest.raises(UserError, match=name) as refusal:
            corpus.read_texts(files, validation)
        assert "\n" not in str(refusal.value)


def test_a_folder_is_no_text(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot be read"):
        corpus.read_texts([tmp_path])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "once upon a time",
        "5",
        "null",
        '"text"',
        "[1]",
        '["text"]',
        "{}",
        '{"prompt": "a"}',
        '{"completion": "a"}',
        '{"text": 5}',
        '{"text": null}',
        '{"text": ["a"]}',
        '{"text": "\\ud800"}',
        '{"prompt": 1, "completion": 2}',
        '{"prompt": ["a"], "completion": ["b"]}',
        '{"messages": 3}',
        '{"messages": "ab"}',
        '{"messages": []}',
        '{"messages": [{}]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": [{"role": "user", "content": ["a"]}]}',
        '{"messages": [{"role": "user", "content": null, "tool_calls": []}]}',
        '{"messages": [{"content": "a"}]}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": "search"}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": ["search"]}',
        '{"messages": [{"role": "user", "content": "a", "name": "\\ud800"}]}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "\\ud83d"}]}',
        "[" * 200_000,
        '{"text":' * 100_000,
    ],
)
def test_lines_that_are_no_records(write: Callable[..., Path], line: str):
    file = write("a.jsonl", records({"text": "a"}) + "\n" + line + "\n")
    for share in (0, 0.2):  # among those to train on, and held out
        with pytest.raises(UserError, match=r"a\.jsonl: line 3 is no record") as refusal:
            corpus.read_texts([file], share=share)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_a_share_that_cannot_be(write: Callable[..., Path], share: float):
    with pytest.raises(UserError, match="--validation-share"):
        corpus.read_texts([write("a.txt", "a\n")], share=share)


# Documents to tokens

ODD = (
    "\r\n",
    "\r",
    "\n\n",
    "\x0b",
    "\x0c",
    "\x85",
    "\u2028",
    "  ",
    "\0",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "\ufeff",
)
ANY_TEXT = st.lists(st.text() | st.sampled_from(ODD)).map("".join).filter(bool)


@settings(max_examples=150)
@given(ANY_TEXT, st.sampled_from(("", *SPECIAL)))
def test_any_text_comes_back(tokenizer: Any, text: str, special: str):
    ids = corpus.encode([text + special + text], tokenizer)
    assert tokenizer.decode(ids[:-1].tolist()) == text + special + text


@settings(max_examples=50)
@given(ANY_TEXT)
def test_characters_are_counted_without_special_tokens(tokenizer: Any, text: str):
    ids = corpus.encode([text, text], tokenizer)
    assert corpus.count_characters(tokenizer, ids) == 2 * len(text)


def test_documents_are_encoded_a_few_at_a_time(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    """So a signal is heard between them; the tokens are the same."""
    documents = [f"{name} " * 9 for name in "abcdefg"]
    whole = corpus.encode(documents, tokenizer)
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 30)
    sizes: list[int] = []
    kind: Any = type(tokenizer)
    plain = kind.__call__

    def encode(self: Any, batch: list[str], **options: Any) -> Any:
        sizes.append(len(batch))
        return plain(self, batch, **options)

    monkeypatch.setattr(kind, "__call__", encode)
    assert np.array_equal(corpus.encode(documents, tokenizer), whole)
    assert sizes == [2, 2, 2, 1]


@settings(max_examples=50)
@given(st.lists(ANY_TEXT, max_size=5))
def test_each_document_ends_with_the_end_token(tokenizer: Any, documents: list[str]):
    ids = corpus.encode(documents, tokenizer)
    assert ids.dtype == np.int32 and ids.ndim == 1
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    parts = np.split(ids, np.flatnonzero(ids == end) + 1)
    assert len(parts.pop()) == 0
    assert [tokenizer.decode(part[:-1].tolist()) for part in parts] == documents


def test_an_empty_document_is_its_end(tokenizer: Any):
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert corpus.encode(["", "", "a"], tokenizer).tolist()[:2] == [end, end]


TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}({{ tool['function']['name'] }}){% endfor %}"
    "{% for m in messages %}"
    "{{ m['content'] or m['tool_calls'][0]['function']['name'] }} {% endfor %}"
)


def test_a_conversation_is_written_by_the_model_s_template(tmp_path: Path):
    """As mlx_lm.lora encodes it, and with a template that has no place for a role in one line."""
    make_llama(tmp_path, num_hidden_layers=1)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b"}]
    talk = corpus.Transcript(messages)
    other.chat_template = None
    bare = corpus.encode([corpus.write_document(talk)], other)
    assert corpus.encode([talk], other).tolist() == bare.tolist()
    other.chat_template = TEMPLATE
    theirs = ChatDataset([{"messages": messages}], TokenizerWrapper(other), mask_prompt=False)
    expected = [*theirs.process(theirs[0])[0], EOS]
    for tokenizer in (other, GuardedTokenizer(TokenizerWrapper(other), "m", None)):
        assert corpus.encode([talk], tokenizer).tolist() == expected != bare.tolist()
        assert corpus.join_documents(["x", talk], tokenizer) == "x\n\n[user] ab [assistant] b "
    other.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(UserError, match=r"fails on a conversation of the text \('ab': no system\)"):
        corpus.encode([talk], other)


def test_tools_are_written_by_the_model_s_template(write: Callable[..., Path], tmp_path: Path):
    """As mlx_lm.lora writes them, and never left out without a word."""
    make_llama(tmp_path, num_hidden_layers=1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.chat_template = TOOLS_TEMPLATE
    tools = [{"type": "function", "function": {"name": "ab", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "a", "arguments": {}}}
    asked = {"role": "user", "content": "b"}
    called = [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]
    full: list[dict[str, Any]] = [
        {"messages": called, "tools": tools},
        {"messages": [asked, {"role": "assistant", "tool_calls": [call]}], "tools": None},
        {"messages": [asked], "tools": tools},
    ]
    read = corpus.read_texts([write("a.jsonl", records(*full))], share=0).train
    theirs = ChatDataset(full, TokenizerWrapper(tokenizer), mask_prompt=False)
    expected = [token for row in full for token in (*theirs.process(row)[0], EOS)]
    assert corpus.encode(read, tokenizer).tolist() == expected
    assert [corpus.count_said(one) for one in read] == [1, 1, 1]
    bare = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    bare.chat_template = None
    for document in read:
        with pytest.raises(UserError, match=r"\('b'\) has tools"):
            corpus.encode([document], bare)
        with pytest.raises(UserError, match=r"\('b'\) has tools"):
            corpus.make_tokenizer([document], SMALLEST, chat=True)


def test_a_tokenizer_with_another_end_token(tmp_path: Path):
    make_llama(tmp_path, num_hidden_layers=1)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    a, b = (other.convert_tokens_to_ids(c) for c in "ab")
    assert corpus.encode(["ab", "b"], other).tolist() == [a, b, EOS, b, EOS]


def test_an_end_token_that_the_config_alone_knows(tmp_path: Path):
    make_llama(tmp_path, num_hidden_layers=1)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    other.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        corpus.encode(["a"], other)
    wrapped = GuardedTokenizer(TokenizerWrapper(other, eos_token_ids=[7, 5]), "m", None)
    assert corpus.encode(["a"], wrapped).tolist() == [other.convert_tokens_to_ids("a"), 5]


@pytest.mark.parametrize("size", [SMALLEST, 280, 300])
@pytest.mark.parametrize("chat", [True, False])
def test_a_tokenizer_of_its_size(tmp_path: Path, size: int, chat: bool):
    made = corpus.make_tokenizer([prose(100)], size, chat=chat)
    assert len(made) == size
    assert made.eos_token == ("<|im_end|>" if chat else "<|endoftext|>")
    assert made.chat_template == (corpus.CHAT_TEMPLATE if chat else corpus.PLAIN_TEMPLATE)
    text = prose(5)
    tokens = len(corpus.encode([text], made)) - 1
    assert tokens == len(text) if size == SMALLEST else tokens < len(text)
    made.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert np.array_equal(corpus.encode([text], again), corpus.encode([text], made))
    assert again.chat_template == made.chat_template


def test_a_tokenizer_learns_from_every_document():
    made = corpus.make_tokenizer(["zq" * 50, "xj" * 50], SMALLEST + 2, chat=False)
    assert {"zq", "xj"} <= set(made.get_vocab())


@pytest.mark.parametrize("size", [-1, 0, SMALLEST - 1])
def test_a_vocabulary_without_room_for_bytes(size: int):
    with pytest.raises(UserError, match=f"--vocab-size {size}: must be at least {SMALLEST}"):
        corpus.make_tokenizer([prose(100)], size, chat=False)


@pytest.mark.parametrize("documents", [[], ["ab"], [prose(1)]])
def test_a_vocabulary_larger_than_the_text(documents: list[str]):
    with pytest.raises(UserError, match=r"--vocab-size 5000: the text yields only \d+ entries"):
        corpus.make_tokenizer(documents, 5000, chat=False)


# Tokens to windows

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 60), st.integers(1, 7))


@given(SIZES, st.integers(0, 2**32))
def test_each_epoch_takes_each_window_once(sizes: tuple[int, int, int], seed: int):
    length, more, batch_size = sizes
    tokens = np.arange(100, 101 + 2 * length + more, dtype=np.int32)
    batches = corpus.Batches(tokens, length, batch_size, seed)
    count = (2 * length + more) // length - 1
    steps = -(-3 * count // batch_size)
    stacked = [batches.make_batch(step) for step in range(steps)]
    assert all(b.shape == (batch_size, length + 1) and b.dtype == np.int32 for b in stacked)
    rows = np.concatenate(stacked)
    assert (np.diff(rows, axis=1) == 1).all()
    assert rows.min() >= tokens[0] and rows.max() <= tokens[-1]
    for epoch in range(3):
        starts = np.sort(rows[epoch * count : (epoch + 1) * count, 0])
        assert (np.diff(starts) == length).all()
    again = corpus.Batches(tokens, length, batch_size, seed)
    for step in reversed(range(steps)):
        assert np.array_equal(again.make_batch(step), stacked[step])


def test_windows_move_from_epoch_to_epoch():
    tokens = np.arange(401, dtype=np.int32)
    batches = corpus.Batches(tokens, 8, 49, seed=3)
    epochs = [batches.make_batch(step)[:, 0] for step in range(64)]
    assert {int(starts[0]) % 8 for starts in epochs} == set(range(8))
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 64
    assert all(np.any(np.diff(starts) < 0) for starts in epochs)


def test_another_seed_takes_another_order():
    tokens = np.arange(401, dtype=np.int32)
    orders = {corpus.Batches(tokens, 8, 16, seed).make_batch(0).tobytes() for seed in range(50)}
    assert len(orders) == 50


@pytest.mark.parametrize("length", [1, 5, 16])
def test_a_text_shorter_than_two_windows(length: int):
    tokens = np.zeros(2 * length + 1, np.int32)
    assert corpus.Batches(tokens, length, 2, 0).make_batch(5).shape == (2, length + 1)
    with pytest.raises(UserError, match=f"{2 * length} tokens, too few for a context of {length}"):
        corpus.Batches(tokens[1:], length, 2, 0)


@given(SIZES)
def test_each_token_but_the_first_is_predicted_once(sizes: tuple[int, int, int]):
    length, n, batch_size = sizes
    tokens = np.arange(n, dtype=np.int32)
    batches = list(corpus.cut_windows(tokens, length, batch_size))
    assert all(len(b) == batch_size for b in batches[:-1])
    assert all(1 <= len(b) <= batch_size and b.shape[1] == length + 1 for b in batches)
    predicted = [token for b in batches for token in b[:, 1:].reshape(-1)]
    assert predicted == list(range(1, len(predicted) + 1))
    assert n - 1 - len(predicted) < length
    assert all((np.diff(b, axis=1) == 1).all() for b in batches)


@given(SIZES, st.integers(1, 80))
def test_a_limit_spreads_evenly(sizes: tuple[int, int, int], limit: int):
    length, more, batch_size = sizes
    tokens = np.arange(length + 1 + more, dtype=np.int32)
    whole = np.concatenate(list(corpus.cut_windows(tokens, length, batch_size)))
    rows = np.concatenate(list(corpus.cut_windows(tokens, length, batch_size, limit)))
    assert len(rows) == min(len(whole), max(1, limit // length))
    places = rows[:, 0] // length
    assert np.array_equal(rows, whole[places])
    assert places[0] == 0
    if len(rows) > 1:
        assert places[-1] == len(whole) - 1
        gaps = np.diff(places)
        assert gaps.min() >= 1 and np.ptp(gaps) <= 1
