"""Changes the bases around one matrix, a part of it at a time, so that processors share the work.

A part is some rows of the matrix as files hold it, (out, in): some of its outputs.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ..network.parts import Arrays
from .algebra import Basis, Linear, centre, change_basis
from .bases import Bases
from .products import Inverse, ignore_overflow
from .side_by_side import run_side_by_side
from .source import SourceReader

ROWS = 512  # that a thread computes at a time

Stored = TypeVar("Stored")


class Changer:
    """Expresses a source's matrices in the bases of a result.

    Args:
        source: reads the matrices.
        bases: which basis holds where.
        kind: the type to compute in.
    """

    def __init__(self, source: SourceReader, bases: Bases, kind: type[np.floating]):
        self._source, self._bases, self._kind = source, bases, kind

    def change(self, path: str, arrays: Arrays, store: Callable[[Linear], Stored]) -> list[Stored]:
        """Change the matrix at a path, or one expert of it.

        Args:
            path: a module path.
            arrays: its tensors.
            store: takes each part, in the order of the rows.

        Returns:
            What ``store`` returned for each.
        """
        self._factor_inverses(path)
        return run_side_by_side(self._list_changes(path, arrays), store)

    def change_each(
        self, path: str, linears: Iterable[Linear], store: Callable[[Linear], Stored]
    ) -> list[Stored]:
        """Change parts of the matrix at a path that differ in their inputs, as ``change`` does."""
        self._factor_inverses(path)
        return run_side_by_side((partial(self._change, path, linear) for linear in linears), store)

    def _factor_inverses(self, path: str) -> None:
        """Factor what the matrix at a path is solved with, before threads share it."""
        reads, writes = self._bases.find_input(path), self._bases.find_output(path)
        for matrix in (reads and reads.inverse, writes and writes.matrix):
            if isinstance(matrix, Inverse):
                matrix.factor()

    def _list_changes(self, path: str, arrays: Arrays) -> Iterator[Callable[[], Linear]]:
        """List what makes each part of the matrix at a path."""
        writes = self._bases.find_output(path)
        if self._bases.takes_mean_out(path):  # it is that of all outputs
            yield partial(self._change, path, self._source.fold(path, arrays, self._kind))
        elif writes is None:
            for part in cut_rows(arrays, count_rows()):
                yield partial(self._change, path, self._source.fold(path, part, self._kind))
        else:
            linear = self._source.fold(path, arrays, self._kind)
            for basis in writes.split(count_rows()):
                yield partial(self._change, path, linear, basis)

    @ignore_overflow
    def _change(self, path: str, linear: Linear, writes: Basis | None = None) -> Linear:
        """Change a matrix; ``writes`` is the part of its new outputs' basis that is wanted."""
        new = change_basis(
            linear,
            reads=self._bases.find_input(path),
            writes=writes or self._bases.find_output(path),
            shift_share=self._bases.find_shift_share(path),
        )
        return centre(new) if self._bases.takes_mean_out(path) else new


def count_rows() -> int:
    """Count the rows of a part; on a GPU there are more, because each part sends it a basis."""
    return ROWS if mx.default_device().type == mx.cpu else 16 * ROWS


def cut_rows(arrays: Arrays, rows: int) -> Iterator[dict[str, mx.array]]:
    """Cut tensors of equally many rows into parts of so many at most."""
    length = next(iter(arrays.values())).shape[0]
    for start in range(0, length, rows):
        yield {name: array[start : start + rows] for name, array in arrays.items()}
