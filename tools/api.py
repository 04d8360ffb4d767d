"""Writes the reference of the package's Python interface from its signatures and docstrings.

python tools/api.py > docs/api.md
"""

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import mlx_skipless

OPENING = """\
# From Python

What `import mlx_skipless` offers. The commands are these functions, with flags for keywords: the
[README](../README.md) and the pages that it names say what they do, and this one what they take
and give."""
CLASSES = """\
## What they take and give

Classes of the package's modules. Where one has `as_dict()`, that is what `--json` writes."""
PUBLIC = [getattr(mlx_skipless, name) for name in mlx_skipless.__all__]
SECTIONS = "Args|Attributes|Returns|Raises"
WIDTH = 100


def document() -> str:
    """The whole page."""
    parts = [OPENING]
    for title, kind in (("Functions", inspect.isfunction), ("Classes", inspect.isclass)):
        parts.append(f"## {title}")
        for thing in filter(kind, PUBLIC):
            parts += described(thing, thing.__name__)
    parts.append(CLASSES)
    for thing in reached():
        parts += described(thing, qualified(thing))
    return "\n\n".join(parts) + "\n"


def described(thing: Any, name: str) -> Iterator[str]:
    """A function or class under its name: the call, the docstring, what fields say themselves."""
    yield f"### {name}"
    if is_called(thing):
        yield f"```python\n{call(thing, f'mlx_skipless.{name}')}\n```"
    yield from filter(None, prose(inspect.getdoc(thing) or ""))
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    if helps := [field for field in fields if "help" in field.metadata]:
        yield "\n".join(f"- `{field.name}`: {help_of(field)}." for field in helps)


def is_called(thing: Any) -> bool:
    return inspect.isfunction(thing) or dataclasses.is_dataclass(thing)


def help_of(field: "dataclasses.Field[Any]") -> str:
    choices = ", ".join(map(value, field.metadata["choices"]))
    return field.metadata["help"] + (f"; one of {choices}" if choices else "")


def qualified(thing: Any) -> str:
    """ "report.Report": where in the package it is."""
    return f"{thing.__module__.partition('.')[2]}.{thing.__name__}"


def call(thing: Any, name: str) -> str:
    """How it is called, a parameter a line."""
    names = {kind.__name__: qualified(kind) for kind in classes(thing) if kind not in PUBLIC}
    types = {
        one: re.sub(r"\w+", lambda word: names.get(word[0], word[0]), written)
        for one, written in annotations(thing).items()
    }
    lines = []
    for one in inspect.signature(thing).parameters.values():
        if one.kind == one.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        stars = "**" if one.kind == one.VAR_KEYWORD else ""
        default = "" if one.default is one.empty else f" = {value(one.default)}"
        lines.append(f"    {stars}{one.name}: {types[one.name]}{default},")
    result = f" -> {types['return']}" if "return" in types else ""
    return "\n".join([f"{name}(", *lines, f"){result}"])


def value(default: Any) -> str:
    if callable(default):
        return "..."
    return json.dumps(default) if isinstance(default, str) else repr(default)


def annotations(thing: Any) -> dict[str, str]:
    """As the code has them: of parameters and "return", or of a dataclass's fields."""
    written: dict[str, Any] = {}
    if inspect.isclass(thing):
        for base in reversed(thing.__mro__[:-1]):
            fields = [node for node in source(base).body if isinstance(node, ast.AnnAssign)]
            written |= {ast.unparse(node.target): node.annotation for node in fields}
    else:
        taken = source(thing).args
        parameters = [*taken.args, *taken.kwonlyargs, *filter(None, [taken.kwarg])]
        written = {one.arg: one.annotation for one in parameters}
        written["return"] = source(thing).returns
    quoted = {one: isinstance(node, ast.Constant) for one, node in written.items()}
    return {one: node.value if quoted[one] else ast.unparse(node) for one, node in written.items()}


def source(thing: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def classes(thing: Any) -> list[Any]:
    """The dataclasses that its annotations name."""
    known = vars(sys.modules[thing.__module__])
    words = re.findall(r"\w+", " ".join(annotations(thing).values()))
    found = (known.get(word) for word in words)
    return [kind for kind in found if inspect.isclass(kind) and dataclasses.is_dataclass(kind)]


def reached() -> list[Any]:
    """The dataclasses that what is public names, and those that these name."""
    found = [thing for thing in PUBLIC if is_called(thing)]
    for thing in found:  # it grows on the way
        found += [kind for kind in dict.fromkeys(classes(thing)) if kind not in found]
    return [thing for thing in found if thing not in PUBLIC]


def prose(docstring: str) -> Iterator[str]:
    """A docstring as Markdown: paragraphs, and lists of what its sections name."""
    first, *rest = re.split(rf"^({SECTIONS}):\n", docstring.replace("``", "`"), flags=re.MULTILINE)
    yield first.strip()
    for heading, text in zip(rest[::2], rest[1::2], strict=True):
        indented = re.match(r"(?: +.*\n?|\n)*", text)
        assert indented is not None
        yield section(heading, textwrap.dedent(indented[0]).strip())
        yield text[indented.end() :].strip()


def section(heading: str, text: str) -> str:
    if heading == "Returns":
        return f"Returns: {text}"
    mark = "Raises " if heading == "Raises" else "- "
    items = []
    for item in re.split(r"\n(?=\S)", text):
        names, _, meaning = item.partition(": ")
        quoted = ", ".join(f"`{name}`" for name in names.split(", "))
        line = " ".join(f"{mark}{quoted}: {meaning}".split())
        items.append(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(items)


if __name__ == "__main__":
    print(document(), end="")
