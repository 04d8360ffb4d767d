"""Products side by side, on a thread each: they share the work better than the threads of BLAS do.

BLAS gives each of its threads an equal part of one product and waits for the slowest. Whatever
else runs meanwhile slows one down: a thread that reads or writes, or another program. Many small
products on threads of their own wait for nobody.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import chain, islice
from typing import TypeVar

import mlx.core as mx
from threadpoolctl import ThreadpoolController

Made = TypeVar("Made")
Stored = TypeVar("Stored")


@cache
def _find_blas() -> ThreadpoolController:
    """Find the BLAS libraries that are loaded; they stay the same."""
    return ThreadpoolController().select(user_api="blas")


def count_threads() -> int:
    """Count the threads of a BLAS that can be told how many to take; 1 where there is none."""
    if mx.default_device().type != mx.cpu:
        return 1
    return max((library["num_threads"] for library in _find_blas().info()), default=1)


def run_side_by_side(
    jobs: Iterable[Callable[[], Made]], store: Callable[[Made], Stored]
) -> list[Stored]:
    """Run jobs on as many threads as BLAS has, which takes one for each product meanwhile.

    Args:
        jobs: the jobs, which use NumPy alone. They are asked for one by one, by the thread that
            calls; few are in memory at a time.
        store: takes what a job made, in the order of the jobs, on the thread that calls.

    Returns:
        What ``store`` returned, in the same order.
    """
    jobs, threads = iter(jobs), count_threads()
    first = [*islice(jobs, 2)]
    jobs = chain(first, jobs)
    if threads == 1 or len(first) == 1:
        return [store(job()) for job in jobs]
    stored: list[Stored] = []
    running: deque[Future[Made]] = deque()
    with _find_blas().limit(limits=1), ThreadPoolExecutor(threads) as pool:
        for job in jobs:
            running.append(pool.submit(job))
            if len(running) > threads:  # one waits, so that no thread does
                stored.append(store(running.popleft().result()))
        stored.extend(store(done.result()) for done in running)
    return stored
