"""The one exception for what a user can mend."""


class UserError(Exception):
    """Something the user can mend: the message says what, where and what to do, in one line."""


def first_line(error: BaseException) -> str:
    """What any other error says, in one line, to be quoted in a ``UserError``."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
