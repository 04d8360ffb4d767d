"""Tokenizers from strangers: bounded, fitted to their models, and carried with all their files."""

from __future__ import annotations

import base64
import json
import random
import resource
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import mlx.core as mx
import mlx_lm.utils
import pytest
import regex
from factory import CHAT_TEMPLATE, make_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

import mlx_skipless
from mlx_skipless.checkpoints import guarded, limits, tokenizer_json
from mlx_skipless.checkpoints.tekken import FIRST_SPECIALS, read_tekken
from mlx_skipless.checkpoints.tokenizer import fetch_tokenizer, has_tokenizer, load_tokenizer
from mlx_skipless.checkpoints.tokenizer_json import read_tokenizer
from mlx_skipless.conversion.convert import convert
from mlx_skipless.errors import UserError

Change = Callable[[dict[str, Any]], Any]
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    make_llama(folder, **SIZES)
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A model of 264 embeddings with a byte-level tokenizer of 258 tokens."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def edit(file: Path, change: Change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def load(folder: Path, rows: int = 264) -> guarded.GuardedTokenizer:
    config = {"model_type": "llama", "vocab_size": rows}
    return load_tokenizer(folder, config, trust_remote_code=False)


# What a file of a few kilobytes does to a text


def convert_to(out: Path, model: Path, stock: bool) -> None:
    """Convert a model into one of mlx-lm's own network, or into one of ours."""
    convert(model, out, verify=False, remove="none" if stock else "auto", skipless=not stock)


def replace_(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def in_sequence(key: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


def charsmap(*texts: str) -> str:
    trie = bytes(16)
    table = len(trie).to_bytes(4, "little") + trie + b"".join(t.encode() + b"\0" for t in texts)
    return base64.b64encode(table).decode()


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WHOLE = {"Sequence": {"id": "A", "type_id": 0}}
BOMB = replace_("a", "a" * 100)
UNTYPED = {key: BOMB[key] for key in ("pattern", "content")}
FRAME = {"type": "TemplateProcessing", "single": [WHOLE], "pair": [WHOLE] * 2, "special_tokens": {}}
SPECIAL = {"SpecialToken": {"id": "x", "type_id": 0}}
SPECIAL_IDS = {"x": {"id": "x", "ids": [0] * 9999, "tokens": ["!"] * 9999}}
BOMBS = {
    "replaced": {"normalizer": in_sequence("normalizers", *[BOMB] * 6)},
    "nested": {"normalizer": in_sequence("normalizers", in_sequence("normalizers", *[BOMB] * 3))},
    "without types": {"normalizer": {"normalizers": [UNTYPED] * 6}},
    "once": {"normalizer": replace_("a", "a" * 10_000)},
    "by a rule": {"normalizer": in_sequence("normalizers", *[replace_("a", "aaaa", "Regex")] * 6)},
    "between": {"normalizer": in_sequence("normalizers", *[replace_("", "aaaa")] * 6)},
    "prepended": {"normalizer": {"type": "Prepend", "prepend": "a" * 1000}},
    "table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("a" * 999)}},
    "bytes of bytes": {"pre_tokenizer": in_sequence("pretokenizers", *[BYTES] * 40)},
    "decoded": {"decoder": in_sequence("decoders", *[BOMB] * 6)},
    "framed": {"post_processor": FRAME | {"single": [WHOLE] * 1000}},
    "specials": {"post_processor": FRAME | {"single": [SPECIAL], "special_tokens": SPECIAL_IDS}},
    "many steps": {"normalizer": in_sequence("normalizers", *[{"type": "NFC"}] * 1000)},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_tokenizer_that_makes_texts_grow_is_refused(model: Path, name: str):
    edit(model / "tokenizer.json", lambda content: content.update(BOMBS[name]))
    with pytest.raises(
        UserError, match=r"tokenizer\.json (makes a text up to|is broken.*template)"
    ):
        load(model)


USUAL = {
    "sentencepiece": {
        "normalizer": in_sequence(
            "normalizers", {"type": "Prepend", "prepend": "▁"}, replace_(" ", "▁")
        ),
        "decoder": in_sequence(
            "decoders", replace_("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
    },
    "table of compositions": {
        "normalizer": in_sequence(
            "normalizers",
            {"type": "Precompiled", "precompiled_charsmap": charsmap("صلى الله عليه وسلم", "a")},
            replace_(" {2,}", " ", "Regex"),
        )
    },
    "names for spaces": {
        "normalizer": in_sequence("normalizers", replace_("\n", "<n>"), replace_("\t", "<|tab|>"))
    },
    "bytes": {"normalizer": {"type": "ByteLevel"}, "pre_tokenizer": BYTES, "decoder": BYTES},
}  # fmt: skip


@pytest.mark.parametrize("name", USUAL)
def test_what_real_tokenizers_do_is_let_through(model: Path, name: str):
    edit(model / "tokenizer.json", lambda content: content.update(USUAL[name]))
    assert read_tokenizer(model / "tokenizer.json")["model"]


RULE = "(a+)+$|(a|aa)+b"  # takes as many steps as there are ways to cut a run of a
RUNAWAY = {"type": "Split", "pattern": {"Regex": RULE}, "behavior": "Isolated", "invert": False}
LONG = "a" * 40 + "!"


def test_a_panic_of_tokenizers_is_one_line(model: Path, capfd: pytest.CaptureFixture[str]):
    edit(model / "tokenizer.json", lambda content: content.update(pre_tokenizer=RUNAWAY))
    tokenizer = load(model)
    capfd.readouterr()
    for call in (
        lambda: tokenizer.encode(LONG),
        lambda: tokenizer([LONG]),
        lambda: mlx_skipless.generate(model, None, LONG),
    ):
        with pytest.raises(UserError, match="gives up on this text"):
            call()
    assert capfd.readouterr().err == ""


def test_a_panic_while_a_tokenizer_loads_or_decodes(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    def decode_badly(content: dict[str, Any]) -> None:
        content["model"]["vocab"] = {"b": 0, LONG: 1}
        content["decoder"] = replace_(RULE, "x", "Regex")

    def add_badly(content: dict[str, Any]) -> None:
        content["normalizer"] = replace_(RULE, "x", "Regex")
        token = {**content["added_tokens"][0], "id": 258, "content": LONG, "normalized": True}
        content["added_tokens"].append(token | {"special": False})

    other = Path(shutil.copytree(model, tmp_path / "other"))
    edit(model / "tokenizer.json", decode_badly)
    edit(other / "tokenizer.json", add_badly)
    tokenizer = load(model)
    capfd.readouterr()
    detokenizer = tokenizer.detokenizer
    detokenizer.add_token(1)
    for call in (
        lambda: tokenizer.decode([1]),
        lambda: detokenizer.text,
        lambda: load(other),
        lambda: convert(other, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="gives up on this text"):
            call()
    assert capfd.readouterr().err == "" and not (tmp_path / "out").exists()


def test_an_error_of_tokenizers_is_told_as_a_panic_is(model: Path):
    """A WordPiece model whose token for unknown words is missing."""
    words = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "vocab": {"a": 0},
        "max_input_chars_per_word": 9,
    }
    words["continuing_subword_prefix"] = "##"
    edit(model / "tokenizer.json", lambda content: content.update(model=words))
    tokenizer = load(model)
    assert tokenizer.encode("a")
    with pytest.raises(UserError, match="gives up on this text"):
        tokenizer.encode("b")


def test_what_else_is_written_to_stderr_is_shown_in_the_end(capfd: pytest.CaptureFixture[str]):
    with guarded.explain_panics("model"):
        guarded.os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "filters": "{{ (range(99999) | list * 1000) | map('string') | join | length }}",
    "lists": "{{ (range(99999) | list * 2999) | length }}",
    "doubled": "{% set n = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
    "power": "{{ 2 ** 10000000000 % 7 }}",
    "long": "{{ 'x' * 2000000 }}",
}
SLOW = [pytest.param(name, marks=pytest.mark.thorough) for name in ("filters", "doubled")]


@pytest.mark.parametrize("name", ["loops", "lists", "power", "long", *SLOW])
def test_a_chat_template_without_an_end_is_ended(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    monkeypatch.setattr(limits, "MEMORY", 1 << 30)
    monkeypatch.setattr(guarded, "LONGEST_CHAT", 1_000_000)
    (model / "chat_template.jinja").write_text(ENDLESS[name])
    before = sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=r"the chat template of .* (takes more|raises|makes)"):
        mlx_skipless.generate(model, None, "hi")
    assert (sys.gettrace(), resource.getrlimit(resource.RLIMIT_AS)) == before


def test_keyword_arguments_of_a_chat_template_are_no_power(model: Path):
    (model / "chat_template.jinja").write_text(
        "{% macro say(a, b) %}{{ a }}{{ b }}{% endmacro %}"
        "{{ say(**{'a': 'x', 'b': 'y'}) }}{{ say('x', **{'b': 'y'}) }} **bold**"
    )
    messages = [{"role": "user", "content": "hi"}]
    assert load(model).apply_chat_template(messages, tokenize=False) == "xyxy **bold**"


# More tokens than embeddings


def add_to_file(folder: Path, token: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def add_to_config(folder: Path, token: str) -> None:
    added = {"260": {"content": token, "special": True}}
    edit(
        folder / "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=added)
    )


def add_extra(folder: Path, token: str) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(extra_special_tokens=[token]))


ADDERS = [add_to_file, add_to_config, add_extra]


@pytest.mark.parametrize("add", ADDERS, ids=lambda add: add.__name__)
def test_a_token_beyond_the_embeddings_is_refused_in_text_and_told(
    model: Path, tmp_path: Path, add: Callable[[Path, str], None]
):
    add(model, "<pad>")
    edit(model / "config.json", lambda content: content.update(vocab_size=258))
    cut_embeddings(model, 258)

    report = convert(model, tmp_path / "out", verify=False)

    (warning,) = report.warnings
    assert "258 embeddings" in warning and "'<pad>' (258)" in warning
    network, tokenizer = mlx_skipless.load(tmp_path / "out")
    with pytest.raises(UserError, match=r"'<pad>' \(258\).*258 embeddings: take it out"):
        mlx_skipless.generate(network, tokenizer, "a <pad> b")
    with pytest.raises(UserError, match=r"'<pad>' \(258\)"):
        tokenizer(["fine", "a <pad> b"])


def cut_embeddings(model: Path, rows: int) -> None:
    tensors: Any = mx.load(str(model / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:rows]
    mx.eval(tensors)
    mx.save_safetensors(str(model / "model.safetensors"), tensors)


def write_in_template(folder: Path) -> None:
    add_to_file(folder, "<|im_end|>")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "<|im_end|>")


def write_in_named_template(folder: Path) -> None:
    add_to_file(folder, "<|im_end|>")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("<|im_end|>")


def begin_with(folder: Path) -> None:
    add_to_file(folder, "<|im_end|>")
    edit(folder / "tokenizer_config.json", lambda c: c.update(bos_token="<|im_end|>"))


def take_anothers(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda c: c["model"]["vocab"].update({"Ġa": 258}))


@pytest.mark.parametrize(
    "change",
    [write_in_template, write_in_named_template, begin_with, take_anothers],
    ids=lambda change: change.__name__,
)
def test_tokens_beyond_the_embeddings_that_are_needed_are_refused(
    model: Path, change: Callable[[Path], None]
):
    change(model)
    with pytest.raises(
        UserError, match=r"258 embeddings, and . of its tokenizer's tokens have none"
    ):
        load(model, rows=258)
    assert load(model, rows=264).encode("abc")


# Ids without a token


def sentencepiece(*, prefix: bool) -> Tokenizer:
    """As Llama 2's: characters, and bytes for the rest."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghij"]
    vocab = {token: i for i, token in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


KINDS = {
    "bytes": byte_level,
    "sentencepiece": lambda: sentencepiece(prefix=True),
    "sentencepiece, no prefix": lambda: sentencepiece(prefix=False),
}


@pytest.mark.parametrize("holes", [False, True], ids=["padded", "holed"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_id_of_a_model_can_be_streamed(model: Path, kind: str, holes: bool):
    """An id without a token stands for nothing, every other for what the library says."""
    original = KINDS[kind]()
    content = json.loads(original.to_str())
    if holes:
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = {t: i + 7 * (i > 40) for t, i in vocab.items()}
        original = Tokenizer.from_str(json.dumps(content))
    (model / "tokenizer.json").write_text(json.dumps(content))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = load(model, rows=300)

    text = "abc def\n日本 gé  hij"
    ids = original.encode(text).ids
    unnamed = sorted(set(range(300)) - {*original.get_vocab().values()})
    assert tokenizer.encode(text) == ids
    for extra in (unnamed[:1], unnamed[-1:], unnamed):
        streamed = tokenizer.detokenizer
        for i in [*ids[:5], *extra, *ids[5:]]:
            streamed.add_token(i)
        streamed.finalize()
        shown = streamed.text
        for i in extra:
            shown = shown.replace(f"<|unnamed {i}|>", "")
        assert shown == text
    everything = tokenizer.detokenizer
    for i in range(300):
        everything.add_token(i)
        assert everything.text is not None
    everything.finalize()


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "own"])
def test_a_result_of_a_holed_tokenizer_runs_in_mlx_lm(model: Path, tmp_path: Path, stock: bool):
    """mlx-lm takes the number of tokens for the highest id: others' text would be a "!"."""
    edit(model / "tokenizer.json", lambda c: c["model"]["vocab"].update({"zz": 260, "yy": 261}))
    edit(model / "tokenizer.json", lambda c: c["model"]["vocab"].pop("b"))
    before = AutoTokenizer.from_pretrained(model)
    convert_to(tmp_path / "out", model, stock)
    tokenizer = mlx_lm.utils.load_tokenizer(tmp_path / "out")
    assert {
        t: i for t, i in tokenizer.get_vocab().items() if "unnamed" not in t
    } == before.get_vocab()
    assert tokenizer.encode("a <s> z") == before.encode("a <s> z")
    streamed = tokenizer.detokenizer
    for i in (before.vocab["zz"], before.vocab["yy"]):
        streamed.add_token(i)
    streamed.finalize()
    assert streamed.text == "zzyy"


# tekken.json


WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = [b"ab", b"abc", b"bc", b" a", b"aa", b"aaa", b" abc", "é".encode(), b"ing", b"in", b"\n\n"]
SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
SPECIALS += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
SPECIALS += ["[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]"]
SPECIALS += ["[CALL_ID]", "[ARGS]"]


def write_tekken(file: Path, *, version: str = "v7", listed: bool = True, **changes: Any) -> int:
    """Write a tekken.json of all bytes and some pieces; return how many special tokens it has."""
    ranked = [bytes([b]) for b in range(256)] + PIECES
    count = 20
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None}
        for i, t in enumerate([*ranked, b"padding"])
    ]
    config = {
        "pattern": WORDS,
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(ranked) + count,
        "default_num_special_tokens": count,
        "version": version,
    }
    content: dict[str, Any] = {"config": config, "vocab": vocab}
    if listed:
        content["special_tokens"] = [
            {"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(SPECIALS)
        ]
    content["config"] |= changes
    file.write_text(json.dumps(content))
    return count


def merge(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """As tiktoken: a whole token stays, else the pair of the lowest rank is joined, and again."""
    parts = [word] if word in ranks else [bytes([b]) for b in word]
    while True:
        joined = [ranks.get(a + b, 1 << 30) for a, b in pairwise(parts)]
        if not joined or min(joined) == 1 << 30:
            return [ranks[part] for part in parts]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "silent"])
def test_a_tekken_file_tokenizes_as_its_rule_says(tmp_path: Path, listed: bool):
    count = write_tekken(tmp_path / "tekken.json", listed=listed)
    tokenizer = read_tekken(tmp_path / "tekken.json")
    ranks = {t: i for i, t in enumerate([bytes([b]) for b in range(256)] + PIECES)}
    rng = random.Random(0)
    texts = ["", " ", "abc abc", "aaaa ab\n\nc", "é日本 in, ing; 123"]
    texts += ["".join(rng.choices("abc ing\né日1,", k=rng.randint(0, 40))) for _ in range(300)]
    for text in texts:
        words = [word.encode() for word in regex.findall(WORDS, text)]
        expected = [i + count for word in words for i in merge(word, ranks)]
        assert tokenizer.encode(text, add_special_tokens=False) == expected, repr(text)
        assert tokenizer.decode(expected) == text
        assert tokenizer.encode(text) == [1, *expected]
    assert len(tokenizer) == count + len(ranks)
    names = [*(SPECIALS if listed else FIRST_SPECIALS), *(f"<SPECIAL_{i}>" for i in range(16, 20))]
    assert tokenizer.convert_ids_to_tokens([*range(count)]) == names[:count]
    assert tokenizer.encode("[INST]ab[/INST]", add_special_tokens=False) == [
        3,
        ranks[b"ab"] + count,
        4,
    ]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("v3", "<s>[INST]a[/INST]b</s>[INST]be kind\n\nc[/INST]"),
        ("v7", "<s>[SYSTEM_PROMPT]be kind[/SYSTEM_PROMPT][INST]a[/INST]b</s>[INST]c[/INST]"),
        ("v13", "<s>[SYSTEM_PROMPT]be kind[/SYSTEM_PROMPT][INST]a[/INST]b</s>[INST]c[/INST]"),
        ("v15", None),
    ],
)
def test_a_tekken_file_chats_as_its_version_does(
    model: Path, tmp_path: Path, version: str, expected: str | None
):
    """The expected texts are those of mistral-common 1.13."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    cut_embeddings(model, 264)
    write_tekken(model / "tekken.json", version=version, default_vocab_size=264)
    for form in ("stock", "own"):
        report = convert(
            model, tmp_path / form, verify=False, skipless=form == "own", remove="none"
        )
        assert any("of version v15 is not known" in n for n in report.notes) == (expected is None)
        tokenizer = mlx_lm.utils.load_tokenizer(tmp_path / form)
        chat = [("system", "be kind"), ("user", "a"), ("assistant", "b "), ("user", "c")]
        messages = [{"role": role, "content": content} for role, content in chat]
        assert tokenizer.has_chat_template == (expected is not None)
        if expected is not None:
            assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
        assert tokenizer.eos_token_ids == {2} and tokenizer.encode("ab") == [1, 117, 118]
    assert load(model).encode("ab") == [1, 117, 118]  # before it is converted, too


TOOL = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOLS = '[AVAILABLE_TOOLS][{"type": "function", "function": ' + json.dumps(TOOL)
TOOLS += "}][/AVAILABLE_TOOLS]"
CALLS = [
    {"id": f"call0000{i}", "type": "function", "function": {"name": "f", "arguments": arguments}}
    for i, arguments in enumerate(['{"a": 1}', {"b": "é"}])
]
IN_JSON = "[TOOL_CALLS][" + ", ".join(
    f'{{"name": "f", "arguments": {arguments}, "id": "call0000{i}"}}'
    for i, arguments in enumerate(['{"a": 1}', '{"b": "é"}'])
) + "]</s>"  # fmt: skip


@pytest.mark.parametrize(
    ("version", "system", "called", "later"),
    [
        (
            "v3",
            "[INST]a\n\nb[/INST]",
            IN_JSON + '[TOOL_RESULTS]{"content": "x", "call_id": "call00000"}[/TOOL_RESULTS]'
            '[TOOL_RESULTS]{"content": "\\"y\\"", "call_id": "call00001"}[/TOOL_RESULTS]',
            TOOLS + "[INST]be kind\n\nc\n\nd[/INST]",
        ),
        (
            "v7",
            "[SYSTEM_PROMPT]be kind[/SYSTEM_PROMPT][INST]a\n\nb[/INST]",
            IN_JSON + "[TOOL_RESULTS]call00000[TOOL_CONTENT]x[/TOOL_RESULTS]"
            '[TOOL_RESULTS]call00001[TOOL_CONTENT]"y"[/TOOL_RESULTS]',
            TOOLS + "[INST]c\n\nd[/INST]",
        ),
        (
            "v11",
            "[SYSTEM_PROMPT]be kind[/SYSTEM_PROMPT][INST]a\n\nb[/INST]",
            '[TOOL_CALLS]f[CALL_ID]call00000[ARGS]{"a": 1}'
            '[TOOL_CALLS]f[CALL_ID]call00001[ARGS]{"b": "é"}</s>'
            "[TOOL_RESULTS]call00000[TOOL_CONTENT]x[/TOOL_RESULTS]"
            '[TOOL_RESULTS]call00001[TOOL_CONTENT]"y"[/TOOL_RESULTS]',
            TOOLS + "[INST]c\n\nd[/INST]",
        ),
        (
            "v13",
            "[SYSTEM_PROMPT]be kind[/SYSTEM_PROMPT]" + TOOLS + "[INST]a\n\nb[/INST]",
            '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{"b": "é"}</s>'
            '[TOOL_RESULTS]x[/TOOL_RESULTS][TOOL_RESULTS]"y"[/TOOL_RESULTS]',
            "[INST]c\n\nd[/INST]",
        ),
    ],
)
def test_a_tekken_file_calls_tools_as_its_version_does(
    tmp_path: Path, version: str, system: str, called: str, later: str
):
    """The expected texts are those of mistral-common 1.13."""
    write_tekken(tmp_path / "tekken.json", version=version)
    tokenizer = read_tekken(tmp_path / "tekken.json")
    pieces = [{"type": "text", "text": text} for text in ("c", "d")]
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "x", "tool_call_id": "call00000"},
        {"role": "tool", "content": '"y"', "tool_call_id": "call00001"},
        {"role": "assistant", "content": "so\n "},
        {"role": "user", "content": pieces},
    ]
    tools = [{"type": "function", "function": TOOL | {"strict": True}}]
    found = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert found == "<s>" + system + called + "so\n</s>" + later


def test_nothing_said_in_a_tekken_chat(tmp_path: Path):
    write_tekken(tmp_path / "tekken.json", version="v3")
    chat = [("system", ""), ("system", "x"), ("user", "a"), ("user", ""), ("user", "b")]
    messages = [{"role": role, "content": content} for role, content in chat]
    found = read_tekken(tmp_path / "tekken.json").apply_chat_template(messages, tokenize=False)
    assert found == "<s>[INST]x\n\na\n\nb[/INST]"


def test_a_picture_in_a_tekken_chat_is_refused(tmp_path: Path):
    write_tekken(tmp_path / "tekken.json")
    messages = [{"role": "user", "content": [{"type": "image", "image": "x"}]}]
    with pytest.raises(jinja2.TemplateError, match="only text"):
        read_tekken(tmp_path / "tekken.json").apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"default_num_special_tokens": 1 << 40},
        {"default_num_special_tokens": -1},
        {"default_num_special_tokens": 4},
        {"default_vocab_size": 9999},
        {"default_vocab_size": None},
        {"pattern": None},
        {"pattern": "("},
        {"version": "v11", "listed": False},
    ],
    ids=str,
)
def test_a_broken_tekken_file_is_refused(model: Path, changes: dict[str, Any]):
    (model / "tokenizer.json").unlink()
    write_tekken(model / "tekken.json", **changes)
    with pytest.raises(UserError, match=r"tekken.json|tokenizer"):
        load(model)


# What belongs to a tokenizer


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "own"])
def test_all_chat_templates_are_carried(model: Path, tmp_path: Path, stock: bool):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ tools }}")
    convert_to(tmp_path / "out", model, stock)
    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert found == {"default": CHAT_TEMPLATE, "tool_use": "tools {{ tools }}"}


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "own"])
def test_a_processors_chat_template_serves_its_tokenizer(model: Path, tmp_path: Path, stock: bool):
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    convert_to(tmp_path / "out", model, stock)
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = mlx_lm.utils.load_tokenizer(tmp_path / "out")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>user: hi\n"
    assert load(model).apply_chat_template(messages, tokenize=False) == "<s>user: hi\n"


@pytest.mark.parametrize("name", ["spiece.model", "qwen.tiktoken", "vocab.json", "tekken.json"])
def test_a_vocabulary_of_any_kind_is_a_tokenizer(tmp_path: Path, name: str):
    assert not has_tokenizer(tmp_path)
    (tmp_path / f"._{name}").write_text("what macOS leaves beside a file")
    assert not has_tokenizer(tmp_path)
    (tmp_path / name).write_text("{}")
    assert has_tokenizer(tmp_path)


def test_a_source_without_a_tokenizer_says_so(model: Path, tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    report = convert(model, tmp_path / "out", verify=False)
    assert any("no tokenizer" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_settings_alone_are_no_tokenizer(model: Path, kind: str):
    """transformers makes an empty one of them, whose every text is special tokens."""
    (model / "tokenizer.json").unlink()
    added = {"256": {"content": "<s>", "special": True}}
    edit(
        model / "tokenizer_config.json",
        lambda c: c.update(tokenizer_class=kind, added_tokens_decoder=added),
    )
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer.json, .*: copy it there"):
        mlx_skipless.load(model)
    with pytest.raises(UserError, match="has no tokenizer"):
        fetch_tokenizer(str(model))


def test_a_tokenizer_that_brings_code_asks_for_trust(model: Path, tmp_path: Path):
    names = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    edit(
        model / "tokenizer_config.json",
        lambda c: c.update(tokenizer_class="OwnTokenizer", auto_map=names),
    )
    for act in (mlx_skipless.load, lambda source: convert(source, tmp_path / "out")):
        with pytest.raises(UserError, match=r"brings its own code: add --trust-remote-code") as e:
            act(model)
        assert "partial" not in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("stock", [True, False], ids=["stock", "own"])
def test_a_legacy_sentencepiece_stays_one(model: Path, tmp_path: Path, legacy: bool, stock: bool):
    """One puts a space before any text, the other before the first alone."""
    tokenizer = sentencepiece(prefix=True)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "unk_token": "<unk>"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    edit(model / "config.json", lambda config: config.update(vocab_size=300))
    sizes = SIZES | {"vocab_size": 300}
    make_llama(tmp_path / "larger", **sizes)
    shutil.copyfile(tmp_path / "larger" / "model.safetensors", model / "model.safetensors")
    convert_to(tmp_path / "out", model, stock)
    ids = [
        mlx_skipless.load(folder)[1].encode("<s>ab</s>cd<s> e", add_special_tokens=False)
        for folder in (model, tmp_path / "out")
    ]
    assert ids[0] == ids[1]
    assert ids[0].count(tokenizer.token_to_id("▁")) == (3 if legacy else 1)


def test_settings_are_written_whatever_the_locale(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that has no letter of the settings' own, as ASCII has none of these."""
    edit(
        model / "tokenizer_config.json",
        lambda c: c.update(legacy=True, extra_special_tokens=["<\uff5cend\uff5c>"]),
    )
    write = Path.write_text

    def write_as_ascii(self: Path, text: str, encoding: str | None = None, **options: Any) -> int:
        return write(self, text, encoding or "ascii", **options)

    monkeypatch.setattr(Path, "write_text", write_as_ascii)
    convert_to(tmp_path / "out", model, stock=False)
    written = (tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8")
    assert "<\uff5cend\uff5c>" in written and json.loads(written)["legacy"] is True


def test_an_id_of_two_tokens(model: Path):
    edit(model / "tokenizer.json", lambda c: c["model"]["vocab"].update(zz=7))
    with pytest.raises(UserError, match="1 ids to two tokens"):
        load(model)


def test_a_token_id_that_no_model_has(model: Path):
    edit(model / "tokenizer.json", lambda c: c["model"]["vocab"].update(zz=2**32 - 1))
    with pytest.raises(UserError, match="id 4,294,967,295"):
        load(model)
    edit(
        model / "tokenizer.json",
        lambda c: c["model"]["vocab"].update(zz=tokenizer_json.MOST_HOLES * 2),
    )
    with pytest.raises(UserError, match=r"no token for .* ids"):
        load(model)


def test_a_config_that_transformers_refuses_is_no_fault_of_the_tokenizer(model: Path) -> None:
    edit(model / "config.json", lambda config: config.update(initializer_range="small"))
    with pytest.raises(UserError) as refusal:
        load(model)
    said = str(refusal.value)
    assert "config.json" in said and "'initializer_range'" in said and "correct it" in said
    assert "tokenizer" not in said and "\n" not in said
