"""The one exception for what a user can mend."""

LONGEST = 2000  # characters of a message: a checkpoint's names and values are quoted in it


class UserError(Exception):
    """Something the user can mend: the message says what, where and what to do, in one line.

    What it quotes comes from files of anyone: line ends and what a terminal obeys are escaped.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        super().__init__(line)


def first_line(error: BaseException) -> str:
    """What any other error says, in one line, to be quoted in a ``UserError``."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
