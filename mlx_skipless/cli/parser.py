"""Arguments, and what is said of wrong ones: one line, with what may have been meant."""

import argparse
import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ..errors import BadArgument


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are each a ``BadArgument``."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.register("type", int, read_integer)
        self.register("type", float, read_number)

    def error(self, message: str) -> NoReturn:
        raise BadArgument(f"{message} ({self.prog} --help explains)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does, but a flag that is not there is spoken of before what else is wrong."""
        if args is not None:
            self._check_flags(args)
        return super().parse_known_args(args, namespace)

    def _check_flags(self, arguments: Sequence[str]) -> None:
        """Refuse the first flag that there is not; what argparse takes for a value passes."""
        known = [name for action in self._actions for name in action.option_strings]
        for argument in arguments:
            if argument == "--" or argument in self._list_commands():
                return
            name = argument.partition("=")[0]
            short = not name.startswith("--") and name[:2] in known and f"-{name}" not in known
            value = not name.startswith("-") or " " in argument or _is_number(argument)
            if value or short or name == "-" or any(flag.startswith(name) for flag in known):
                continue
            meant = suggest(name.lstrip("-"), [flag.lstrip("-") for flag in known])
            self.error(f"no flag {name}" + (f": did you mean --{meant}?" if meant else ""))

    def _list_commands(self) -> Iterable[str]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices
        return ()


def suggest(given: str, known: Sequence[str]) -> str | None:
    """The name that was probably meant, None if none is like it."""
    return next(iter(difflib.get_close_matches(given.lower(), known, 1)), None)


def read_integer(text: str) -> int:
    """The type of flags whose value is a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def read_number(text: str) -> float:
    """The type of flags whose value is a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def read_text(text: str) -> str:
    """The type of flags whose value is text, which a locale without UTF-8 makes bytes of."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise argparse.ArgumentTypeError(f"{text!r} is no UTF-8 text") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
