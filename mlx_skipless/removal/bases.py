"""Which basis holds at which point of the stream, as a plan chose it."""

from functools import lru_cache

import numpy as np

from ..network.names import EMBEDDING
from ..network.wiring import find_points, find_query_readers, parse_letter
from .algebra import Basis, basis_without_reader, basis_without_writer, transpose_basis
from .candidates import needs_no_inverse
from .plan import Plan
from .source import SourceReader


class Bases:
    """The new bases of a plan, made when asked for; the latest three stay in memory.

    Args:
        plan: chooses, for each point, the matrix that becomes the identity.
        source: reads that matrix.
        kind: the type to read it in.
    """

    def __init__(self, plan: Plan, source: SourceReader, kind: type[np.floating]):
        self._plan, self._source, self._kind = plan, source, kind
        self._points = find_points(plan.before)
        numbered = [*enumerate(self._points)]
        self._read = {path: i for i, point in numbered for path in point.consumers}
        self._written = {path: i for i, point in numbered for path in point.producers}
        self._aside = {*find_query_readers(plan.before)}
        self._find = lru_cache(maxsize=3)(self._make)

    def __contains__(self, path: str) -> bool:
        """Whether the network before the removals has a matrix at a path."""
        return path in self._read or path in self._written or path in self._aside

    def find_input(self, path: str) -> Basis | None:
        """Find the new basis of what the matrix at a path reads; None where it is the old one."""
        return self._find(self._read[path]) if path in self._read else None

    def find_output(self, path: str) -> Basis | None:
        """Find the new basis of what the matrix at a path writes; None where it is the old one."""
        return self._find(self._written[path]) if path in self._written else None

    def find_shift_share(self, path: str) -> float:
        """Find how often the matrix at a path adds the shift of the point that it writes.

        The first writer adds it, divided by what the network multiplies the writer's outputs by.
        """
        if path not in self._written or self._points[self._written[path]].producers[0] != path:
            return 0.0
        return 1 / self._plan.before.embedding_scale if path == EMBEDDING else 1.0

    def takes_mean_out(self, path: str) -> bool:
        """Tell whether the matrix at a path has the mean of its outputs taken out."""
        return self._plan.centred and path in self._written

    def keeps(self, path: str) -> bool:
        """Tell whether what the matrix at a path reads and writes stays as it is."""
        changed = self.find_input(path) or self.find_output(path) or self.takes_mean_out(path)
        return not changed

    def _make(self, index: int) -> Basis | None:
        path = self._plan.eliminated.get(index)
        if path is None:
            return self._make_from_tied_end(index)
        linear = self._source.read_linear(path, self._kind)
        if parse_letter(path) == "p":
            alone = needs_no_inverse(self._plan.before, self._points, index, path)
            return basis_without_writer(linear, alone=alone)
        return basis_without_reader(linear)

    def _make_from_tied_end(self, index: int) -> Basis | None:
        """Make the basis at one end of a tied embedding if a matrix goes at the other end."""
        last = len(self._points) - 1
        other = {0: last, last: 0}.get(index)
        if not self._plan.before.tie_word_embeddings or other not in self._plan.eliminated:
            return None
        basis = self._make(other)
        assert basis is not None
        return transpose_basis(basis)
