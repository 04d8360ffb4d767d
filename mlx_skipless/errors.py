"""The exceptions for what a user can mend."""

LONGEST = 2000  # characters of a message, which may quote a checkpoint's names and values
MOST_SAID = 300  # characters of a library's error


class UserError(Exception):
    """An error that the user can mend: one line that says what is wrong, where, and what to do.

    Messages quote files of unknown origin, so characters that are not printable, such as line ends
    and a terminal's control codes, are escaped, and the middle of a long message is left out.
    """

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        super().__init__(line)


class BadArgument(UserError):
    """An argument that is wrong whatever the files hold, or several that exclude each other.

    Commands exit with 2 then.
    """


def explain_nan(whose: str, where: str = "") -> UserError:
    """Make the error for logits that are no numbers.

    Args:
        whose: what the user calls the model.
        where: on what text or after what, with a space before it.
    """
    return UserError(
        f"the logits of {whose} are no numbers{where}: its checkpoint is broken, or its "
        "activations overflow their number type; `convert --dtype float32` names the layer"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of another error's message, for a ``UserError`` to quote."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quote_error(error: BaseException) -> str:
    """Return what a library says is wrong, with the error's type unless it is a ``ValueError``."""
    said = " ".join(str(error).split())
    if len(said) > MOST_SAID:
        kept = said[:MOST_SAID]
        said = f"{kept.rpartition(' ')[0] or kept} …"
    if isinstance(error, ValueError) and said:
        return said
    return f"{type(error).__name__} {said}".strip()
