"""Dataclasses whose fields are flags of the command line and keys of a YAML file."""

import contextlib
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from .errors import UserError

Kind = TypeVar("Kind")


def option(default: Any, help_text: str, choices: Sequence[str] = ()) -> Any:
    """A field that is a flag too; the command line takes its help from here."""
    metadata = {"help": help_text, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(name: str) -> str:
    """ "--batch-size" for ``batch_size``."""
    return f"--{name.replace('_', '-')}"


def check_choices(options: Any) -> None:
    """Raises UserError if a field is none of its choices."""
    for one in dataclasses.fields(options):
        choices, value = one.metadata["choices"], getattr(options, one.name)
        if choices and value not in choices:
            raise UserError(
                f"{flag_name(one.name)} {value!r}: choose one of {', '.join(filter(None, choices))}"
            )


def read_options(kind: type[Kind], what: str, given: Mapping[str, Any]) -> Kind:
    """An instance of a dataclass from a mapping, of flags or from YAML; ``what`` names it.

    Raises:
        UserError: for an unknown key or a value of the wrong type.
    """
    known = {one.name: one.type for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = dict(given)
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{name!r} is no part of a {what}; known: {', '.join(known)}")
        accepted = typing.get_args(known[name]) or (known[name],)
        if float in accepted:
            accepted = (*accepted, int)
            with contextlib.suppress(TypeError, ValueError):  # YAML takes 1e-3 for text
                values[name] = value = float(value) if isinstance(value, str) else value
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            expected = accepted[0].__name__
            raise UserError(f"{name} in the {what} is {value!r}; it must be of type {expected}")
    return kind(**values)
