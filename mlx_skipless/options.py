"""Options: dataclasses whose fields are flags and keys of a YAML file, and checks of values."""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from .errors import UserError

Kind = TypeVar("Kind")


def option(default: Any, help_text: str, choices: Sequence[str] = ()) -> Any:
    """Make a dataclass field whose help text the command line shows.

    Args:
        default: the field's default.
        help_text: what ``--help`` says of its flag.
        choices: the values that it can have; empty: any.
    """
    metadata = {"help": help_text, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(name: str) -> str:
    """Turn a field's name into its flag: ``batch_size`` into ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def check_choices(options: Any) -> None:
    """Check each field of an options dataclass that has choices.

    Raises:
        UserError: for a value that is none of its field's choices.
    """
    for one in dataclasses.fields(options):
        if choices := one.metadata["choices"]:
            check_choice(flag_name(one.name), getattr(options, one.name), choices)


def check_choice(flag: str, value: Any, choices: Sequence[str]) -> None:
    """Check that the value of a flag is one of its choices; an empty choice goes unmentioned.

    Raises:
        UserError: if it is not.
    """
    if value not in choices:
        raise UserError(f"{flag} {value!r}: choose one of {', '.join(filter(None, choices))}")


def check_at_least(flag: str, value: float | None, least: float) -> None:
    """Check the lower bound of a flag's value; None, a flag not given, passes.

    Raises:
        UserError: if the value is below ``least`` or not a number.
    """
    if value is not None and not value >= least:
        raise UserError(f"{flag} {value}: must be at least {least}")


def check_above_zero(flag: str, value: float | None) -> None:
    """Check that a flag's value is above zero and finite; None, a flag not given, passes.

    Raises:
        UserError: if it is not.
    """
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"{flag} {value}: must be above 0")


def check_seed(seed: int | None) -> None:
    """Check that ``--seed`` fits MLX's 64 bits; None, a flag not given, passes.

    Raises:
        UserError: if it does not.
    """
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: must be at least 0 and fit 64 bits")


def read_options(kind: type[Kind], what: str, given: Mapping[str, Any]) -> Kind:
    """Make an options dataclass from a mapping, such as parsed flags or a YAML file.

    Args:
        kind: the dataclass.
        what: what messages call it, such as "recipe".
        given: values by field name; absent fields keep their defaults.

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
