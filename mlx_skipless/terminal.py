"""What a model says, made safe to show: its text never steers the terminal."""

# Line ends and tabs pass. U+2028 and U+2029 are line ends that terminals treat as they like; what
# changes the direction of the text around it, and halves of surrogate pairs, are no text either.
_STEERING = (
    *(c for c in range(0x20) if chr(c) not in "\n\t"),
    *range(0x7F, 0xA0),
    *range(0x2028, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
)
_VISIBLE = dict.fromkeys(_STEERING, "\N{REPLACEMENT CHARACTER}")


def make_visible(text: str) -> str:
    """Put U+FFFD where a text holds a character that steers a terminal.

    Each character is judged alone, so a text may come in pieces, wherever it is cut. Without its
    first character an escape sequence is harmless text.
    """
    return text.translate(_VISIBLE)
