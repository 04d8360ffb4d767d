"""Jobs that run at once: their order, their errors, and the threads that they and BLAS take."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from architectures import make as make_architecture
from factory import make_checkpoint

from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.removal import changer, side_by_side
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan
from mlx_skipless.removal.side_by_side import count_threads, run_side_by_side


class Blas:
    """A library of so many threads, as threadpoolctl shows those that are loaded."""

    def __init__(self, threads: int):
        self.threads = threads

    def info(self) -> list[dict[str, int]]:
        return [{"num_threads": self.threads}]

    def limit(self, limits: int) -> "Blas":
        self.before, self.threads = self.threads, limits
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.threads = self.before


@pytest.fixture(params=[1, 2, 3])
def blas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Blas:
    found = Blas(request.param)
    monkeypatch.setattr(side_by_side, "_find_blas", lambda: found)
    return found


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_results_are_stored_in_order_by_the_caller(blas: Blas, count: int) -> None:
    """However long each takes; a lone job has all threads of BLAS."""
    stored: list[tuple[int, int]] = []
    threads, late = blas.threads, threading.Event()

    def work(i: int) -> tuple[int, int]:
        if i == 0 and count > 1 and threads > 1:
            assert late.wait(10)  # others run meanwhile
        late.set()
        return i, blas.threads

    def store(made: tuple[int, int]) -> int:
        assert threading.current_thread() is threading.main_thread()
        stored.append(made)
        return -made[0]

    jobs = [partial(work, i) for i in range(count)]
    assert run_side_by_side(jobs, store) == [-i for i in range(count)]
    assert stored == [(i, 1 if count > 1 else threads) for i in range(count)]
    assert blas.threads == threads


def test_few_jobs_are_in_memory(blas: Blas) -> None:
    """Those that run, one that waits, and one that is stored."""
    asked, most = 0, 0

    def list_jobs() -> Iterator[Callable[[], int]]:
        nonlocal asked
        for i in range(20):
            asked += 1
            yield partial(int, i)

    def store(i: int) -> None:
        nonlocal most
        most = max(most, asked - i)

    run_side_by_side(list_jobs(), store)
    assert most <= blas.threads + 2


@pytest.mark.parametrize("where", ["jobs", "work", "store"])
def test_an_error_ends_it(blas: Blas, where: str) -> None:
    """Wherever it comes from, no thread is left, and BLAS has what it had."""
    threads, running = blas.threads, threading.active_count()

    def fail(at: str, i: int = 0) -> int:
        if at == where and i == 4:
            raise KeyboardInterrupt if at == "store" else ValueError
        return i

    def list_jobs() -> Iterator[Callable[[], int]]:
        for i in range(9):
            fail("jobs", i)
            yield partial(fail, "work", i)

    with pytest.raises((ValueError, KeyboardInterrupt)):
        run_side_by_side(list_jobs(), partial(fail, "store"))
    assert (blas.threads, threading.active_count()) == (threads, running)


def test_a_gpu_takes_one_product_at_a_time(blas: Blas, monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_threads() == blas.threads
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    assert count_threads() == 1


def test_threads_of_the_real_library() -> None:
    """Where one is found, its threads are limited while jobs run, and given back."""
    before = count_threads()
    with side_by_side._find_blas().limit(limits=3):
        inside = count_threads()
        seen = run_side_by_side([count_threads] * 4, int)
        assert count_threads() == inside
    assert inside in (1, 3) and seen == [1] * 4 and count_threads() == before


SOURCES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "biased": (
        lambda folder: make_checkpoint(
            folder, norm="qkv", gains=True, num_key_value_heads=4,
            bias=("q_proj", "k_proj", "o_proj", "down_proj"),
        ),
        {"remove": "qp"},
    ),
    "parallel": (
        lambda folder: make_checkpoint(folder, norm="qkv", block="parallel", bias=("o_proj",)),
        {"remove": "p"},
    ),
    "means": (
        lambda folder: make_architecture(folder, "phi"),
        {"remove": "none", "fold_norms": True},
    ),
    "experts": (
        lambda folder: make_architecture(folder, "mixtral"),
        {"skipless": True, "remove": "qp"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_merge_is_the_same_however_it_is_cut(
    source: str, dtype: mx.Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor to rounding: whole on one thread, and in parts of seven rows on three."""
    make, options = SOURCES[source]
    make(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    plan = make_plan(checkpoint.args, **options)

    def merge(threads: int, rows: int) -> dict[str, mx.array]:
        monkeypatch.setattr(side_by_side, "_find_blas", lambda: Blas(threads))
        monkeypatch.setattr(changer, "ROWS", rows)
        merger = Merger(checkpoint, plan, dtype)
        layers = [merger.layer(i) for i in range(checkpoint.args.num_hidden_layers)]
        parts = [merger.embedding(), *layers, merger.head()]
        return {name: array for part in parts for name, array in part.items()}

    whole, cut = merge(1, 1 << 20), merge(3, 7)
    assert whole.keys() == cut.keys()
    tolerance = 1e-6 if dtype == mx.float32 else 2.0**-7
    for name, array in whole.items():
        wanted, got = (np.array(one.astype(mx.float32)) for one in (array, cut[name]))
        np.testing.assert_allclose(
            got, wanted, rtol=tolerance, atol=tolerance * 1e-3 * np.abs(wanted).max(), err_msg=name
        )
