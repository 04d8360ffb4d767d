"""Drops sub-layers of tiny random models of all of mlx-lm's architectures: architectures.md.

    python tools/drops_table.py [MODEL_TYPE ...]

The models and the ways of running them are those of the tests.
"""

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
from drops import Cannot, Case, open_case
from zoo import CANNOT, CONFIGS

KINDS = ("attention", "ffn")
COLUMNS = {"alone": ("chunks", "tokens", "saved cache", "saved"), "batch": ("batch",)} | {
    way: (way,) for way in ("trimmed", "kv-bits", "4 bits")
}


def name_parts(case: Case, kind: str) -> str:
    """What the blocks call their sub-layers of a kind, and which of them stay."""
    names = {" + ".join(own.parts.get(kind, ())): None for own in case.sublayers}
    text = ", ".join(f"`{name}`" for name in names if name)
    stay: dict[str, list[int]] = {}
    for layer, own in enumerate(case.sublayers):
        if kind in own.obstacles and (kind in own.parts or not text):
            stay.setdefault(own.obstacles[kind], []).append(layer)
    every = range(len(case.sublayers))
    reasons = [
        why if [*every] == at else f"{str(at)[1:-1]} stay: {why}" for why, at in stay.items()
    ]
    return "; ".join([text, *reasons] if text else reasons)


def try_ways(case: Case, ways: tuple[str, ...]) -> str:
    """The largest difference from the sub-layers' output times zero; "-" where none runs."""
    found = []
    for way, kind in itertools.product(ways, KINDS):
        try:
            case.run(way)
        except Cannot:
            continue
        found += [case.compare(way, layer, kind) for layer in case.droppable(kind)]
    return f"{max(found):.1f}" if found else "-"


def main() -> None:
    rows: dict[tuple[str, ...], list[str]] = {}
    works = 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    chosen = parser.parse_args().types or [*CONFIGS]
    if unknown := {*chosen} - CONFIGS.keys():
        parser.error(f"no small model of {', '.join(sorted(unknown))}")
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            case = open_case(Path(folder) / "model", name)
            cells = [try_ways(case, ways) for ways in COLUMNS.values()]
            row = (*(name_parts(case, kind) for kind in KINDS), *cells)
        rows.setdefault(row, []).append(name)
        works += cells[0] == "0.0"
        print(name, *row, sep=" | ", file=sys.stderr, flush=True)
    print("| `model_type` | attention | FFN |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for row, names in sorted(rows.items(), key=lambda item: -len(item[1])):
        print("|", ", ".join(names), "|", " | ".join(row), "|")
    print(f"\n{works} of {len(chosen)} lose sub-layers exactly. Not tried:", end=" ")
    print("; ".join(f"{name} ({why})" for name, why in CANNOT.items()) or "none", end=".\n")


if __name__ == "__main__":
    main()
