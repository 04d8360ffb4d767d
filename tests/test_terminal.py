"""What a model says, made safe to show."""

import itertools
import sys
import unicodedata

import pytest

from mlx_skipless.cli.events import describe_event
from mlx_skipless.errors import UserError
from mlx_skipless.terminal import make_visible

DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def steers(character: str) -> bool:
    """Whether Unicode's own tables say that a character is a command and no text."""
    kind = unicodedata.category(character)
    return (kind in {"Cc", "Cs", "Zl", "Zp"} and character not in "\n\t") or (
        unicodedata.bidirectional(character) in DIRECTIONS
    )


@pytest.mark.parametrize(
    "step", [251, pytest.param(1, marks=pytest.mark.thorough)], ids=["sample", "all"]
)
def test_every_character_is_kept_or_replaced(step: int) -> None:
    everything = [chr(c) for c in (*range(0x3000), *range(0x3000, sys.maxunicode + 1, step))]
    shown = make_visible("".join(everything))
    assert list(shown) == ["\ufffd" if steers(c) else c for c in everything]


SEQUENCES = {
    "title": "\x1b]0;owned\x07",
    "title, ended by ST": "\x1b]0;owned\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "colour": "\x1b[31m",
    "clear": "\x1b[2J\x1bc",
    "8-bit CSI": "\x9b2J",
    "8-bit OSC": "\x9d0;owned\x9c",
    "device control": "\x1bP+q544e\x1b\\",
    "back over the line": "all is well\rrm -rf\b\b",
    "bidi": "\u202eevil\u202c \u2066hidden\u2069",
    "delete": "a\x7fb",
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_in_pieces(name: str) -> None:
    """Wherever it is cut, nothing of it that steers is left, and the pieces are the whole."""
    text = f"before {SEQUENCES[name]} after\n\t"
    whole = make_visible(text)
    assert not any(map(steers, whole)) and len(whole) == len(text) and whole != text
    for one, two in itertools.combinations(range(len(text) + 1), 2):
        pieces = (text[:one], text[one:two], text[two:])
        assert "".join(map(make_visible, pieces)) == whole


def test_a_sample_of_training_and_an_error_are_shown_so() -> None:
    text = "".join(SEQUENCES.values())
    for shown in (describe_event({"step": 1, "sample": text}), str(UserError(text))):
        assert not any(map(steers, shown)) and "owned" in shown


def test_what_people_write_is_kept() -> None:
    text = "né 👩\u200d👩\u200d👧 日本 \u0645\u06cc\u200c\u062e \u200e\u05e9\u05dc\u200f\n\tok"
    assert make_visible(text) == text
