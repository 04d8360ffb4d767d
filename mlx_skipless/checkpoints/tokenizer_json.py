"""A tokenizer.json, looked at before it is used: what tokenizers would obey, and mlx-lm trip over.

A file of a few kilobytes can describe steps that make any text a million times as long.
"""

import base64
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from . import files

STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")
MOST_STEPS, MOST_GROWTH, MOST_SPECIALS, MOST_HOLES = 64, 256, 4096, 1 << 20
# Steps of which none makes a text longer, however often it is repeated.
STEADY = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer",
    "Split", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "BertPreTokenizer",
    "UnicodeScripts", "CharDelimiterSplit", "FixedLength", "Metaspace", "Fuse", "ByteFallback",
    "RobertaProcessing", "BertProcessing",
}  # fmt: skip

UNNAMED = "<|unnamed "
ADDED = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer(file: Path) -> dict[str, Any]:
    """Read a tokenizer.json and check that what it does to a text is bounded.

    Raises:
        UserError: if it cannot be read, has ids that no model has, or makes texts far longer.
    """
    content = files.read_json(file, most=files.TOKENIZER_BYTES)
    try:
        steps = {stage: list(_list_steps(content.get(stage))) for stage in STAGES}
        growth = math.prod(_measure_growth(step) for found in steps.values() for step in found)
        count = max(map(len, steps.values()))
        ids = _list_ids(content).values()
        highest, twice = max(ids, default=0), len(ids) - len({*ids})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is broken ({error!r}): download it again") from error
    if growth > MOST_GROWTH or count > MOST_STEPS:
        raise UserError(
            f"{file} makes a text up to {growth:,.0f} times as long, in {count} steps, and no "
            "model's does: download it again"
        )
    if highest > files.MOST_TOKENS:
        raise UserError(f"{file} has a token of the id {highest:,}, and no model has so many")
    if twice:
        raise UserError(f"{file} gives {twice:,} ids to two tokens each: download it again")
    return content


def _list_steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a stage, those inside of sequences too."""
    if not isinstance(step, Mapping):
        return
    inner = [one for key in SEQUENCES for one in step.get(key) or ()]
    for one in inner:
        yield from _list_steps(one)
    if not inner:
        yield step


def _measure_growth(step: Mapping[str, Any]) -> float:
    """How many times as long a step may make a text; its fields decide, it may name no type."""
    if "content" in step and "pattern" in step:
        length = len(step["pattern"].get("String", "")) if isinstance(step["pattern"], dict) else 0
        return max(1, len(step["content"]) / length if length else len(step["content"]) + 1)
    if "prepend" in step:
        return max(1, len(step["prepend"]))
    if "precompiled_charsmap" in step:
        return _measure_charsmap(base64.b64decode(step["precompiled_charsmap"] or ""))
    if "single" in step:
        return _measure_template(step)
    return 1 if step.get("type") in STEADY else 2


def _measure_charsmap(table: bytes) -> float:
    """The longest text that SentencePiece's table has for a character: a trie, then the texts."""
    start = 4 + int.from_bytes(table[:4], "little")
    return max((len(text.decode()) for text in table[start:].split(b"\0")), default=1) or 1


def _measure_template(step: Mapping[str, Any]) -> float:
    """How often a template repeats a text."""
    specials = step.get("special_tokens") or {}
    texts = 1
    for pieces in (step["single"], step.get("pair") or ()):
        texts = max(texts, sum("Sequence" in piece for piece in pieces))
        named = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        if sum(len(specials[name]["ids"]) for name in named) > MOST_SPECIALS:
            raise ValueError("its template adds thousands of tokens")
    return max(1, texts / 2)  # a pair is two texts


def _list_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the model's own tokens, to which others are added."""
    vocab = (content.get("model") or {}).get("vocab") or {}
    return vocab if isinstance(vocab, dict) else {token[0]: i for i, token in enumerate(vocab)}


def has_holes(content: Mapping[str, Any], file: Path) -> bool:
    """Whether some ids below the highest one of the model's own tokens have no token.

    Raises:
        UserError: if most of a great many have none.
    """
    ids = _list_ids(content)
    holes = max(ids.values(), default=-1) + 1 - len(ids)
    if holes > MOST_HOLES:
        raise UserError(f"{file} has no token for {holes:,} ids between others: download it again")
    return holes > 0


def fill_holes(content: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the ids without a token: mlx-lm counts tokens and takes that for the highest id.

    No text is encoded as one of the new names, since no merge leads there.

    Args:
        content: of the tokenizer.json.
        tokenizer: what transformers makes of it, whose ids count.

    Returns:
        The content of the file to take instead.
    """
    found = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    names = {i: f"{UNNAMED}{i}|>" for i in range(max(found.values()))}
    vocab = names | {i: token for token, i in found.items()}
    model = {**content["model"], "vocab": {token: i for i, token in sorted(vocab.items())}}
    entries = [
        {"id": i} | {key: getattr(token, key) for key in ADDED}
        for i, token in sorted(added.items())
    ]
    return json.dumps({**content, "model": model, "added_tokens": entries}, ensure_ascii=False)
