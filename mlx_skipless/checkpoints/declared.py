"""What quantization_config says of matrices beside scales, as each tool writes it.

The tensors tell how a matrix is packed; the config tells how large its blocks and numbers are,
where shapes leave that open, and what else a network does when it runs, which is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import UserError
from .scaled import BITS, Block, ScaledScheme, Settings

Declared = Mapping[str, Any]
USUAL = (Settings(8, (128, 128)), Settings())  # of 8-bit floats where no config says it
MODELOPT = ("FP8", "NVFP4", "MXFP8", "MXFP4", "W4A16_NVFP4", "FP8_PB_WO", "MIXED_PRECISION")
FORMATS = (
    "dense", "float-quantized", "naive-quantized", "int-quantized", "pack-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip
NUMBERS = ({("float", bits) for bits in (4, 8)}) | {("int", bits) for bits in BITS}


def read_fp8(declared: Declared, dtype: mx.Dtype) -> ScaledScheme:
    """Read a config of 8-bit floats: transformers' "fp8", vLLM's, and "fbgemm_fp8".

    Raises:
        UserError: if it is broken.
    """
    kind = declared.get("fmt") or "e4m3"
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise UserError(f"8-bit floats of the kind {kind!r} cannot be read; known: e4m3")
    block = _read_block(declared.get("weight_block_size"), "weight_block_size")
    return ScaledScheme("FP8", dtype, lambda _: [Settings(8, block)])


def read_undeclared(dtype: mx.Dtype) -> ScaledScheme:
    """Take 8-bit floats for what they are, though no config says so."""
    return ScaledScheme("FP8", dtype, lambda _: [*USUAL])


def read_modelopt(declared: Declared, dtype: mx.Dtype) -> ScaledScheme:
    """Read a config of NVIDIA's ModelOpt.

    Raises:
        UserError: for a way of quantizing that cannot be read.
    """
    settings = declared.get("quantization") or declared
    method = settings.get("quant_algo") if isinstance(settings, Mapping) else None
    if method not in MODELOPT:
        raise UserError(
            f"ModelOpt's {method!r} cannot be read; known: {', '.join(MODELOPT)}. Use another "
            "export"
        )
    return ScaledScheme(f"ModelOpt {method}", dtype, lambda _: [*USUAL])


def read_compressed(declared: Declared, dtype: mx.Dtype) -> ScaledScheme:
    """Read a config of compressed-tensors, as llm-compressor writes it.

    Raises:
        UserError: if it is broken, or for a way of packing that cannot be read.
    """
    groups = declared.get("config_groups")
    found = [*groups.values()] if isinstance(groups, Mapping) else []
    if not found or not all(isinstance(group, Mapping) for group in found):
        raise UserError(
            'compressed-tensors without "config_groups" cannot be read: download config.json again'
        )
    style = declared.get("format")
    for one in (style, *(group.get("format") for group in found)):
        if one is not None and one not in FORMATS:
            raise UserError(
                f"compressed-tensors in the format {one!r} cannot be read; known: "
                f"{', '.join(FORMATS)}. Use another export"
            )
    sparse = declared.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        raise UserError(
            f"compressed-tensors with sparse matrices ({sparse['format']!r}) cannot be read: use "
            "another export"
        )
    rotated = declared.get("transform_config")
    if isinstance(rotated, Mapping) and rotated.get("config_groups"):
        raise UserError(
            'compressed-tensors with a "transform_config" cannot be read: its network rotates '
            "what runs through it. Use another export"
        )
    settings = [
        (_read_targets(group), _read_weights(group["weights"]))
        for group in found
        if isinstance(group.get("weights"), Mapping)
    ]
    name = f"compressed-tensors {style}" if style else "compressed-tensors"
    return ScaledScheme(name, dtype, lambda path: _choose(settings, path.rpartition(".")[0]))


@dataclass(frozen=True)
class _Targets:
    """The modules that a group is of: by names, by patterns of names, or all of some class."""

    names: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]

    @property
    def has_class(self) -> bool:
        """Whether a class is among them, such as "Linear"; which modules are of it is not known."""
        return any(name[:1].isupper() and "." not in name for name in self.names)

    def match(self, module: str) -> bool:
        """Whether a module is named."""
        return module in self.names or any(p.match(module) for p in self.patterns)


def _read_targets(group: Declared) -> _Targets:
    targets = group.get("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f'"targets" in config.json is {targets!r}; it must be a list of names')
    names = tuple(target for target in targets if not target.startswith("re:"))
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    try:
        return _Targets(names, tuple(map(re.compile, patterns)))
    except (re.error, RecursionError) as error:
        raise UserError(f"{targets} in config.json has no pattern ({error}): correct it") from error


def _read_weights(weights: Declared) -> Settings:
    """Read of a group how its matrices are quantized."""
    kind, bits = str(weights.get("type", "int")).lower(), weights.get("num_bits", 8)
    if type(bits) is not int or (kind, bits) not in NUMBERS:
        known = ", ".join(f"{name} {n}" for name, n in sorted(NUMBERS))
        raise UserError(
            f"compressed-tensors with numbers of {bits!r} bits of the kind {kind!r} cannot be "
            f"read; known: {known}. Use another export"
        )
    block = _read_block(weights.get("block_structure"), "block_structure")
    size = weights.get("group_size")
    if size is not None and type(size) is not int:
        raise UserError(f'"group_size" in config.json is {size!r}; it must be a number')
    if size is not None and size > 0:
        block = (1, size)
    return Settings(bits, block)


def _read_block(value: Any, key: str) -> Block | None:
    """Read the rows and columns that have one scale; None if a config names none."""
    if isinstance(value, str):
        value = [int(one) if one.isdecimal() else 0 for one in value.split("x")]
    if value is None:
        return None
    whole = isinstance(value, list) and all(type(one) is int and one > 0 for one in value)
    if not whole or len(value) != 2:
        raise UserError(f'"{key}" in config.json is {value!r}; it must be two numbers')
    return value[0], value[1]


def _choose(settings: list[tuple[_Targets, Settings]], module: str) -> list[Settings]:
    """What is said of a module: by groups that name it, else by those that name a class."""
    named = [own for targets, own in settings if targets.match(module)]
    of_class = [own for targets, own in settings if targets.has_class]
    return named or of_class or [own for _, own in settings] or [Settings()]
