"""Options: dataclasses whose fields are flags and keys of YAML files; checks of their values.

Imports no library, so that a command's help does not wait for MLX.
"""

import contextlib
import dataclasses
import math
import numbers
import os
import re
import reprlib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import BadArgument, UserError

Kind = TypeVar("Kind")
WORDS: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    bool: "true or false",
}
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def option(
    default: Any,
    help_text: str,
    choices: Sequence[str] = (),
    *,
    group: str = "",
    flags: Sequence[str] = (),
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    const: Any = None,
) -> Any:
    """Make a dataclass field that is a flag of the command line too.

    Args:
        default: the field's value where none is given.
        help_text: what ``--help`` and the Python reference say of it.
        choices: the values that it can have; any, if there are none.
        group: the heading that ``--help`` shows it under.
        flags: what the flag is called; ``flag_name`` of the field, if none is given.
        metavar: what ``--help`` calls the flag's value.
        parse: makes the value of the flag's text; default: by the field's type.
        const: the value that the flag alone stands for. A bool field with one has no ``--no-`` flag
            beside its own.
    """
    metadata = {
        "help": help_text,
        "choices": tuple(choices),
        "group": group,
        "flags": tuple(flags),
        "metavar": metavar,
        "parse": parse,
        "const": const,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(name: str) -> str:
    """Turn a field's name into its flag: ``batch_size`` into ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def expand_path(path: str | Path) -> Path:
    """The path that a user means by ``~/model``, which a shell does not always expand.

    Raises:
        BadArgument: for a path with a null byte, which no system has.
    """
    if "\0" in str(path):
        raise BadArgument(f"{str(path)!r}: a path has no null byte")
    return Path(os.path.expanduser(path))


def name_folder(path: str | Path) -> str:
    """The name of a folder, also where its path is "." or ends in ".."."""
    return os.path.basename(os.path.abspath(expand_path(path)))


def list_files(files: str | Path | Sequence[str | Path]) -> list[str | Path]:
    """Return files as a list, for which one file may stand."""
    return [files] if isinstance(files, str | Path) else [*files]


def parse_texts(options: Any) -> None:
    """Parse, in place, text that a frozen options dataclass holds for numbers, such as "1.6MB".

    Fields that may be text keep it.

    Raises:
        UserError: for text that stands for no value of its field.
    """
    for one in dataclasses.fields(options):
        parse, value = one.metadata["parse"], getattr(options, one.name)
        number = parse is not None and str not in typing.get_args(one.type)
        if number and isinstance(value, str):
            try:
                object.__setattr__(options, one.name, parse(value))
            except UserError as error:
                raise BadArgument(f"{flag_name(one.name)}: {error}") from None
            except ValueError:
                raise BadArgument(f"{flag_name(one.name)} {value!r}: must be a number") from None


def check_types(options: Any) -> None:
    """Check that the fields of an options dataclass hold what their types say.

    Other libraries' numbers become Python's, in place.

    Raises:
        UserError: if one does not, or holds a number that is none.
    """
    for one in dataclasses.fields(options):
        value, accepted = getattr(options, one.name), typing.get_args(one.type) or (one.type,)
        if not is_of(value, *accepted):
            names = " or ".join(WORDS[kind] for kind in accepted if kind in WORDS)
            raise BadArgument(f"{flag_name(one.name)} {reprlib.repr(value)}: must be {names}")
        if isinstance(value, numbers.Real) and not isinstance(value, int | float):
            own = int(value) if isinstance(value, numbers.Integral) else float(value)
            object.__setattr__(options, one.name, own)


def is_of(value: Any, *accepted: type) -> bool:
    """Tell whether a value is of one of the types; true and false are no numbers, NaN neither."""
    if isinstance(value, bool):
        return bool in accepted
    if isinstance(value, numbers.Integral):
        return int in accepted or float in accepted
    if isinstance(value, numbers.Real):
        return float in accepted and not math.isnan(value)
    return isinstance(value, accepted)


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
        raise BadArgument(f"{flag} {value!r}: choose one of {', '.join(filter(None, choices))}")


def check_above_zero(flag: str, value: float | None) -> None:
    """Check that a flag's value is above zero and finite; None, a flag not given, passes.

    Raises:
        UserError: if it is not.
    """
    if value is not None and not 0 < value < math.inf:
        raise BadArgument(f"{flag} {value}: must be above 0")


def check_kinds(**given: tuple[Any, type]) -> None:
    """Check that each argument, given with its dataclass, is of that; None passes.

    Raises:
        UserError: if one is not.
    """
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise BadArgument(f"{name} {reprlib.repr(value)}: must be a {kind.__name__}")


def check_whole(flag: str, value: Any) -> None:
    """Check that a flag's value is a whole number; None, a flag not given, passes.

    Raises:
        UserError: if it is not.
    """
    if value is not None and not is_of(value, int):
        raise BadArgument(f"{flag} {reprlib.repr(value)}: must be {WORDS[int]}")


def check_least(flag: str, value: int | None, least: int = 1) -> None:
    """Check that a flag's value is whole and not too small; None, a flag not given, passes.

    Raises:
        UserError: if it is not.
    """
    check_whole(flag, value)
    if value is not None and value < least:
        raise BadArgument(f"{flag} {value}: must be at least {least}")


def check_seed(seed: int | None) -> None:
    """Check that ``--seed`` fits MLX's 64 bits; None, a flag not given, passes.

    Raises:
        UserError: if it does not.
    """
    if seed is not None and not 0 <= seed < 2**64:
        raise BadArgument(f"--seed {seed}: must be at least 0 and fit 64 bits")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "900000", "1.6MB" or "4 GB" (decimal units).

    Raises:
        UserError: if it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?b)?", text.strip().lower())
    value = round(float(found[1]) * UNITS[found[2] if found[2] in UNITS else ""]) if found else 0
    if value < 1:
        raise BadArgument(f"{text!r} is no size: give bytes, or so many kB, MB or GB, as 1.6MB")
    return value


def parse_share(text: str) -> float:
    """The share that "1%" or "0.01" stands for.

    Raises:
        UserError: if the text is none.
    """
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise BadArgument(f"{text!r} is no share: give for instance 1% or 0.01") from None


def parse_ratio(text: str) -> float:
    """The ratio that "1.3x" or "1.3" stands for.

    Raises:
        UserError: if the text is none.
    """
    try:
        return float(text.lower().removesuffix("x"))
    except ValueError:
        raise BadArgument(f"{text!r} is no ratio: give for instance 1.3x") from None


def parse_count(text: str) -> int | str:
    """The number that a text stands for, or "auto".

    Raises:
        UserError: if the text is neither.
    """
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise BadArgument(f"{text!r} is neither a whole number nor auto") from None


def read_options(kind: type[Kind], what: str, given: Mapping[str, Any]) -> Kind:
    """Make an options dataclass from a mapping, such as parsed flags or a YAML file.

    Args:
        kind: the dataclass.
        what: what messages call it, such as "recipe".
        given: values by field name; absent fields keep their defaults.

    Raises:
        UserError: for an unknown key, or as the dataclass raises it for a value.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"the {what} is {reprlib.repr(given)}; it must map keys to values")
    known = {one.name: one.type for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = dict(given)
    for name, value in given.items():
        if name not in known:
            shown = reprlib.repr(name)
            raise UserError(f"{shown} is no part of a {what}; known: {', '.join(known)}")
        kinds = typing.get_args(known[name]) or (known[name],)
        if value == "none" and type(None) in kinds:  # as the flag has it
            values[name] = None
        elif float in kinds and isinstance(value, str):
            with contextlib.suppress(ValueError):  # YAML takes 1e-3 for text
                values[name] = float(value)
    return kind(**values)
