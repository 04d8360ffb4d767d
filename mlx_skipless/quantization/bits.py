"""Bits for each matrix: as many as a size allows, where they do most good.

Rounding a matrix to b bits adds noise in proportion to 1 / (2^b - 1)^2, and small noises add up at
the logits. So from what each matrix costs at one width, the cost of any mixture is known well
enough to choose among mixtures; what the chosen one costs is measured afterwards.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UserError
from .settings import list_bits

BITS = list_bits("affine")
# Of a measured KL, when looking for the smallest result that keeps a limit.
CLOSE = 0.9  # near enough below the limit
SAME_SIZE = 0.005  # share of bytes that is not worth another try
TRIES = 8
# What error feedback and fits leave of the cost of rounding to nearest, before any is measured.
FIRST_GUESS = 0.3


@dataclass(frozen=True)
class Mixture:
    """Bits by module path, the bytes that all of the network's tensors take, and its cost.

    ``cost`` is in nats per token, were every matrix rounded to nearest.
    """

    bits: Mapping[str, int]
    nbytes: int
    cost: float


class Raises:
    """The ways from the smallest mixture to the largest, a matrix's next width at a time.

    Those that save most cost for their bytes come first, so that of the mixtures of some bytes the
    one that takes them in this order costs least, but for what one matrix more or less makes.

    Args:
        weights: of each matrix whose bits are free, by module path.
        costs: of rounding each to ``measured_bits``, in nats per token.
        measured_bits: see there.
        scale_bytes: of each matrix's scales and biases.
        rest: bytes of all other tensors.
        floors: the fewest bits of some matrices, by module path.

    Attributes, beside the arguments:
        steps: a matrix, its next width, what that saves and the bytes that it takes, in order.
        least: bytes and cost of each matrix at its fewest bits, by module path.
    """

    def __init__(
        self,
        weights: Mapping[str, int],
        costs: Mapping[str, float],
        measured_bits: int,
        scale_bytes: Mapping[str, int],
        rest: int,
        floors: Mapping[str, int] | None = None,
    ):
        self.weights, self.costs, self.measured_bits = weights, costs, measured_bits
        self.scale_bytes, self.rest, self.floors = scale_bytes, rest, floors or {}
        widths = {where: [b for b in BITS if b >= self.floors.get(where, 0)] for where in weights}

        def cost(where: str, bits: int) -> float:
            return costs[where] * ((2**measured_bits - 1) / (2**bits - 1)) ** 2

        raises = []
        for where, count in weights.items():
            for low, high in itertools.pairwise(widths[where]):
                gain = cost(where, low) - cost(where, high)
                more = count * (high - low) // 8
                raises.append((-gain / more, low, where, high, gain, more))
        # Gains fall from each width to the next, so sorting keeps a matrix's own in order.
        self.steps = [tuple_[2:] for tuple_ in sorted(raises)]
        least = {where: found[0] for where, found in widths.items()}
        self._fewest = f"{BITS[0]} bits" + (" (some keep more)" if floors else "")
        self.least = {
            where: (weights[where] * bits // 8 + scale_bytes[where], cost(where, bits))
            for where, bits in least.items()
        }
        self._least = Mixture(
            least,
            rest + sum(nbytes for nbytes, _ in self.least.values()),
            sum(found for _, found in self.least.values()),
        )

    def check_reach(self, limit: float, speed: float | None = None) -> None:
        """Check that there is a mixture within a limit; what rounding costs does not matter.

        Args:
            limit: bytes, of all weights or of those that a token reads.
            speed: the ratio as which a user asked for the latter.

        Raises:
            UserError: if there is none.
        """
        if self._least.nbytes > limit:
            asked = f"--target-bytes {limit:,}" if speed is None else f"--target-speed {speed:g}x"
            takes = "the result takes" if speed is None else "decoding a token reads"
            most = "" if speed is None else f", more than {limit:,}"
            raise UserError(
                f"{asked} is out of reach: at {self._fewest} in every matrix "
                f"that can be quantized {takes} {self._least.nbytes:,} bytes{most}"
            )

    def mixtures(self, limit: float = math.inf, speed: float | None = None) -> list[Mixture]:
        """The mixtures within a limit on the way, from the smallest to the largest.

        A raise that does not fit stops its matrix there, and others go on.

        Args:
            limit: bytes, of all weights or of those that a token reads.
            speed: the ratio as which a user asked for the latter.

        Raises:
            UserError: if there is none.
        """
        self.check_reach(limit, speed)
        found, stopped = [self._least], set()
        for where, high, gain, more in self.steps:
            last = found[-1]
            if last.nbytes + more > limit:
                stopped.add(where)
            if where not in stopped:
                bits = {**last.bits, where: high}
                found.append(Mixture(bits, last.nbytes + more, last.cost - gain))
        return found


def find_smallest(
    found: Sequence[Mixture],
    limit: float,
    measure: Callable[[Mixture], float],
    always: float = 0.0,
) -> tuple[Mixture, bool]:
    """The smallest mixture whose measured KL is at most ``limit``, within ``SAME_SIZE``.

    ``always`` is the part of the KL that no bits make up for. Returns the mixture, and whether it
    is the one that was measured last.

    Raises:
        UserError: if even the largest costs more.
    """
    largest = len(found) - 1
    low, high = -1, largest + 1  # the largest that costs too much, the smallest that does not
    share, kl, last = FIRST_GUESS, 0.0, -1
    for attempt in range(TRIES):
        # Costs fall along the list.
        left = max(limit - always, 0.0) / share
        guess = bisect.bisect_left(found, -left, key=lambda mixture: -mixture.cost)
        last = min(max(guess, low + 1), high - 1)
        if attempt == TRIES - 1 and high > largest:
            last = largest
        kl = measure(found[last])
        low, high = (low, last) if kl <= limit else (last, high)
        if low == largest:
            raise UserError(
                f"--target-kl {limit:g} is out of reach: at {BITS[-1]} bits in every matrix that "
                f"can be quantized the result is {kl:.2g} nats per token from its source"
            )
        share = max(kl - always, (1 - CLOSE) * kl) / max(found[last].cost, 1e-30)
        between = found[min(high, largest)].nbytes - (found[low].nbytes if low >= 0 else 0)
        close = high == last and kl >= CLOSE * limit
        if (
            high - low == 1
            or (high <= largest and between < SAME_SIZE * found[high].nbytes)
            or close
        ):
            break
    return found[high], high == last
