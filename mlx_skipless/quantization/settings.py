"""What can be asked of a quantization; knows no weights and does not import MLX."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..constants import MODES
from ..errors import BadArgument
from ..options import check_choice

LEAST_BITS = 2  # MLX packs 1 bit too, which no model survives


@dataclass(frozen=True)
class Quantization:
    """mlx-lm's quantization settings.

    Attributes:
        bits: of a weight; None: the mode's own default.
        group_size: weights that share a scale; None: the mode's own default.
        mode: one of ``MODES``.
        own: matrices, by module path, with bits of their own.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    own: Mapping[str, int] = field(default_factory=dict)

    @property
    def usual_bits(self) -> int:
        """Bits of a matrix that has none of its own."""
        return self.bits or MODES[self.mode][1][0]

    @property
    def typical_bits(self) -> int:
        """What a matrix that has none of its own would have beside those that have."""
        if not self.own:
            return self.usual_bits
        mean = sum(self.own.values()) / len(self.own)
        return min(list_bits(self.mode), key=lambda bits: abs(bits - mean))

    @property
    def usual_group_size(self) -> int:
        """Weights that share a scale."""
        return self.group_size or MODES[self.mode][0][0]


def list_bits(mode: str) -> tuple[int, ...]:
    """The widths that a weight can be quantized to, ascending."""
    return tuple(sorted(bits for bits in MODES[mode][1] if bits >= LEAST_BITS))


def make_quantization(
    quantize: bool, bits: int | None, group_size: int | None, mode: str
) -> Quantization | None:
    """Make the settings that ``-q``, ``--q-bits``, ``--q-group-size`` and ``--q-mode`` ask for.

    Returns:
        None if the result is not to be quantized.

    Raises:
        UserError: for settings that MLX does not have.
    """
    if not quantize:
        if bits is not None or group_size is not None or mode != "affine":
            raise BadArgument("--q-bits, --q-group-size and --q-mode need -q")
        return None
    check_choice("--q-mode", mode, [*MODES])
    known_bits, known_sizes = list_bits(mode), sorted(MODES[mode][0])
    if bits not in (None, *known_bits) or group_size not in (None, *known_sizes):
        raise BadArgument(
            f"--q-mode {mode} has --q-bits {', '.join(map(str, known_bits))} and --q-group-size "
            f"{', '.join(map(str, known_sizes))}"
        )
    return Quantization(bits, group_size, mode)
