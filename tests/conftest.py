"""Options and fixtures that several files of tests share."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# MLX's CPU backend would make each fused kernel with the C++ compiler, for most of a second; what
# is compiled is tested where it matters: see `compiled`.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
# What a test types is nobody's history.
os.environ["XDG_STATE_HOME"] = os.devnull
# One test a core: a BLAS that takes them all would only stand in the others' way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A fault of the code fails its test with a traceback; to users it is one more line of error.
os.environ.setdefault("MLX_SKIPLESS_TRACEBACK", "1")

import mlx.core as mx
import pytest
from compiling import compiling
from factory import make_checkpoint
from hypothesis import settings
from reference import Config, Weights

from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.network import driver
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan
from mlx_skipless.text import samples

settings.register_profile("busy", deadline=None)  # a loaded machine is no failure
for name in ("thorough", "endless"):  # test_fuzz.py: many times as many
    settings.register_profile(name, deadline=None)

SHARE = 6  # of a test's usual cases, of which the default run takes the first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="run the exhaustive grids too, and tests of random examples with many times as many",
    )
    parser.addoption(
        "--every", type=int, default=1, metavar="N",
        help="of each exhaustive grid every Nth case, and of usual ones every third",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile that the options ask for, unless one is named."""
    config.addinivalue_line("markers", "thorough: one of many like it, run with --thorough alone")
    config.addinivalue_line("markers", "examples: tries many times as many with --thorough")
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("thorough" if config.getoption("--thorough") else "busy")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with tests of the whole product, the longest; leave out what is thorough.

    Of each test's usual cases one in ``SHARE`` is not, and all are not where the command line names
    files or tests. With ``--every`` two of three are left out of what is thorough, too.
    """
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
    thorough, every = config.getoption("--thorough"), max(1, config.getoption("--every"))
    named = {*map(os.path.abspath, config.args)} != {str(Path(__file__).parent)}
    named = named or config.getoption("keyword")
    kept, left, seen, usual = [], [], Counter[str](), Counter[str]()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if item.get_closest_marker("thorough"):
            (kept if thorough and seen[test] % every == 0 else left).append(item)
            seen[test] += 1
            continue
        if usual[test] % SHARE == 0 or named:
            kept.append(item)
        else:
            item.add_marker("thorough")
            spared = every > 1 and usual[test] % 3 != 0
            (kept if thorough and not spared else left).append(item)
        usual[test] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks have not much to say; a test that needs more (or less) says so."""
    monkeypatch.setattr(samples, "CALIBRATION", (32, 32))
    monkeypatch.setattr(samples, "LONG_CHECK", (8, 32))


@pytest.fixture
def compiled() -> Iterator[None]:
    """MLX fuses operations into kernels that it compiles, as it does for users."""
    with compiling():
        yield


@pytest.fixture(params=[True, False], ids=["resident", "streamed"])
def network(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[tuple[Config, Weights], driver.StreamedNetwork]:
    """A random source, and the same in layers that stay in memory or are read again."""
    source = make_checkpoint(
        tmp_path, norm="qkv", gains=True, linear_paths=True, sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    checkpoint = open_checkpoint(tmp_path)
    plan = make_plan(checkpoint.args, remove="none")
    parts = Merger(checkpoint, plan, mx.float32)
    return source, driver.StreamedNetwork(checkpoint.args, parts, resident=request.param)
