"""The package's own shape: stations whose imports go one way, and rooms of a size to be read."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from commands import ROOT

PACKAGE = ROOT / "mlx_skipless"
# A station imports from those of lower floors, which stand before it, and from itself.
FLOORS = (
    ("ground",),
    ("network",),
    ("architectures",),
    ("checkpoints",),
    ("removal", "text"),
    ("quantization", "inference"),
    ("evaluation", "conversion"),
    ("training",),
    ("cli",),
)
GROUND = {"constants", "errors", "memory", "options", "progress", "terminal"}
FLOOR = {station: floor for floor, stations in enumerate(FLOORS) for station in stations}
# They travel in checkpoints, whole, and are read there as one file.
TRAVELLING = {"network/model.py"}
LONGEST_FUNCTION, LONGEST_CLASS = 60, 150
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"mlx_lm", "transformers", "matplotlib", "huggingface_hub", "datasets", "lm_eval", "gguf"}


def name_of(file: Path) -> str:
    """ "network.model" for mlx_skipless/network/model.py."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def station_of(module: str) -> str:
    return module.partition(".")[0] if "." in module or module in FLOOR else "ground"


MODULES = {name_of(file): file for file in FILES}


def imports_of(file: Path) -> Iterator[str]:
    """The package's modules that a file imports, wherever in it the import stands."""
    here = file.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["mlx_skipless", *here[: len(here) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "mlx_skipless":
                # A module, or a name in one.
                yield next((m for m in (rest, rest.rpartition(".")[0]) if m in MODULES), rest)


@cache
def draw_graph() -> dict[str, set[str]]:
    """Each module's imports of the package; not at import, for each worker imports this file."""
    return {name: {*imports_of(file)} - {"", name} for name, file in MODULES.items()}


def test_every_module_stands_in_a_station() -> None:
    ground = {name for name in MODULES if station_of(name) == "ground"}
    assert ground == GROUND | {"__init__", "__main__"} & MODULES.keys()
    folders = {one.name for one in PACKAGE.iterdir() if (one / "__init__.py").exists()}
    assert folders == FLOOR.keys() - {"ground"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__", "__main__"}))
def test_imports_go_down(module: str) -> None:
    station = station_of(module)
    for other in draw_graph()[module] - {"__version__", "__init__"}:
        below = FLOOR[station_of(other)] < FLOOR[station]
        assert below or station_of(other) == station, f"{module} imports {other}"


def test_there_is_no_circle() -> None:
    stations = FLOOR.keys() - {"ground"}
    graph = {
        name: others - stations for name, others in draw_graph().items() if name not in stations
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_room_is_too_large(file: Path) -> None:
    travels = str(file.relative_to(PACKAGE)) in TRAVELLING
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            most = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
            assert lines <= most or (travels and isinstance(node, ast.ClassDef)), node.name


@pytest.mark.parametrize("station", sorted(FLOOR.keys() - {"ground"}))
def test_a_station_says_what_it_is_for(station: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / station / "__init__.py").read_text()))
    assert docstring is not None and "nothing" in docstring and len(docstring.splitlines()) <= 6


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["convert", "--help"], ["generate", "--help"], ["train", "--help"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from mlx_skipless.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        f"print(*({HEAVY} & {{*sys.modules}}), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and run.stdout and run.stderr == "\n"


def test_the_package_imports_nothing_heavy() -> None:
    program = f"import mlx_skipless, sys; print(*({HEAVY} & {{*sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "\n"
