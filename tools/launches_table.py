"""Counts the kernels of a decoded token on Metal, layer by layer: the table of performance.md.

    python tools/launches_table.py

The networks and the counting are those of the tests.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
from launches import NETWORKS, count_layer, make_network

CASES = {"float": (None, 1), "4 bits": (4, 1), "float, batch 4": (None, 4)}


def list_removals(name: str) -> tuple[str, ...]:
    """What can be removed from a network; where its stream has skips, nothing."""
    if "Llama" in name:
        return ("none",)
    return ("none", "q", "p") if "parallel" in name else ("none", "qp")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| kernels of a layer |", " | ".join(CASES), "|")
    print("|---" + "|---:" * len(CASES) + "|")
    for name in NETWORKS:
        for remove in list_removals(name):
            counts = []
            for bits, batch in CASES.values():
                make = partial(make_network, name, remove, bits=bits)
                counts.append(str(count_layer(make, batch).total()))
            what = name if remove == "none" else f"{name}, without {remove.upper()}"
            print(f"| {what} |", " | ".join(counts), "|", flush=True)


if __name__ == "__main__":
    main()
