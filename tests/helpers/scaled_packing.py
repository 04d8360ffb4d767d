"""Matrices beside scales, as FP8, compressed-tensors and ModelOpt store them.

A packer rounds a matrix and returns its parts as the tool stores them, by the suffix of its name,
and the float32 values that the format's definition gives for these, decoded here in NumPy.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import packing
from packing import E2M1, E4M3, nearest
from reference import Config


class Stored(NamedTuple):
    """A tensor of a safetensors file: its number type there, its shape and its bytes."""

    kind: str
    array: np.ndarray


Parts = dict[str, Stored]
Packer = Callable[[np.ndarray], tuple[Parts, np.ndarray]]


def save(file: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a safetensors file, also with number types that NumPy and MLX do not have."""
    header, at = {}, 0
    for name, (kind, array) in tensors.items():
        header[name] = {
            "dtype": kind, "shape": array.shape, "data_offsets": (at, at + array.nbytes),
        }  # fmt: skip
        at += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read(file: Path) -> dict[str, Stored]:
    """Read what `save` wrote, as bytes in the tensors' shapes."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        start, end = (8 + size + at for at in entry["data_offsets"])
        count = math.prod(entry["shape"])
        width = f"V{(end - start) // count}" if count else "V1"
        array = np.frombuffer(data[start:end], width).reshape(entry["shape"])
        found[name] = Stored(entry["dtype"], array)
    return found


def bfloat16(values: np.ndarray) -> Stored:
    """Round to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return Stored("BF16", ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def from_bfloat16(stored: np.ndarray) -> np.ndarray:
    return (stored.astype(np.uint32) << 16).view(np.float32)


def float32(values: Any) -> Stored:
    return Stored("F32", np.asarray(values, np.float32))


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """One sign, four bits of exponent with a bias of 7, three of fraction; no infinity."""
    sign, exponent, fraction = codes >> 7, codes >> 3 & 15, codes & 7
    small = fraction / 8 * 2.0**-6
    values = np.where(exponent == 0, small, (1 + fraction / 8) * 2.0 ** (exponent.astype(int) - 7))
    values = np.where((codes & 127) == 127, np.nan, values)
    return np.where(sign, -values, values)


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """The nearest codes; the largest value is 448."""
    edges = (E4M3[:-1] + E4M3[1:]) / 2
    return (np.searchsorted(edges, np.abs(values)) + 128 * (values < 0)).astype(np.uint8)


def by_blocks(numbers: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """Look up for every place of a matrix the number of its block."""
    rows, columns = np.arange(shape[-2]) // block[0], np.arange(shape[-1]) // block[1]
    return numbers[..., rows[:, None], columns[None]]


def largest(values: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The largest magnitude in each block, (..., blocks down, blocks across)."""
    *lead, rows, columns = values.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    found = np.zeros((*lead, down, across))
    for i in range(down):
        for j in range(across):
            part = values[..., i * block[0] :, j * block[1] :][..., : block[0], : block[1]]
            found[..., i, j] = np.abs(part).max(axis=(-2, -1))
    return found


Rounder = Callable[[np.ndarray], Stored]


def fp8(
    block: tuple[int, int] | str = "tensor",
    *,
    suffix: str = "_scale_inv",
    scales: Rounder | str = float32,
    flat: bool = False,
) -> Packer:
    """8-bit floats with one scale for a "tensor", for a "channel", or for blocks.

    `scales` is their number type, or "powers" of two; `flat` leaves out axes of one.
    """

    def pack(values: np.ndarray) -> tuple[Parts, np.ndarray]:
        *lead, rows, columns = values.shape
        own = {"tensor": (rows, columns), "channel": (1, columns)}.get(str(block), block)
        exact = np.maximum(largest(values, own), 1e-9) / 448
        if scales == "powers":
            code = (np.ceil(np.log2(exact)) + 127).astype(np.uint8)
            stored, scale = Stored("F8_E8M0", code), 2.0 ** (code.astype(int) - 127.0)
        else:
            stored = scales(exact)
            plain = stored.array
            scale = from_bfloat16(plain) if stored.kind == "BF16" else plain
        if flat:
            shape = tuple(size for size in scale.shape if size > 1 or len(lead) > 1)
            stored = Stored(stored.kind, stored.array.reshape(shape))
        spread = by_blocks(scale.astype(np.float64), values.shape, own)
        codes = encode_e4m3(values / spread)
        meant = (decode_e4m3(codes) * spread).astype(np.float32)
        return {"": Stored("F8_E4M3", codes), suffix: stored}, meant

    return pack


def int8(block: tuple[int, int] | str = "channel", *, zeros: bool = False) -> Packer:
    """compressed-tensors' "int-quantized": a whole number a byte, with a zero point or none."""

    def pack(values: np.ndarray) -> tuple[Parts, np.ndarray]:
        *_, rows, columns = values.shape
        own = {"tensor": (rows, columns), "channel": (1, columns)}.get(str(block), block)
        stored = bfloat16(np.maximum(largest(values, own), 1e-9) / 100)
        scale = by_blocks(from_bfloat16(stored.array).astype(np.float64), values.shape, own)
        zero = (np.arange(stored.array.size).reshape(stored.array.shape) % 51 - 25) * zeros
        spread = by_blocks(zero, values.shape, own)
        whole = np.clip(np.round(values / scale) + spread, -128, 127)
        parts = {"": Stored("I8", whole.astype(np.int8)), "_scale": stored}
        if zeros:
            parts["_zero_point"] = Stored("I8", zero.astype(np.int8))
        return parts, ((whole - spread) * scale).astype(np.float32)

    return pack


def words(whole: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers from 0 on in 32-bit words along the last axis, the first in the low bits."""
    fit = 32 // bits
    padded = np.pad(whole, [(0, 0)] * (whole.ndim - 1) + [(0, -whole.shape[-1] % fit)])
    columns = padded.astype(np.uint32).reshape(*padded.shape[:-1], -1, fit)
    shifted = columns << (bits * np.arange(fit, dtype=np.uint32))
    return np.bitwise_or.reduce(shifted, axis=-1).view(np.int32)


def packed_int(
    bits: int, group_size: int | None = None, *, zeros: bool = False, order: bool = False
) -> Packer:
    """compressed-tensors' "pack-quantized"; no `group_size`: a scale for each row.

    `zeros` adds zero points, `order` puts the inputs of a group anywhere (`g_idx`).
    """

    def pack(values: np.ndarray) -> tuple[Parts, np.ndarray]:
        columns = values.shape[-1]
        size = group_size or columns
        group = np.arange(columns) // size
        group = np.random.default_rng(columns).permutation(group) if order else group
        middle = 2 ** (bits - 1)
        groups = columns // size
        high = np.stack([np.abs(values[..., group == g]).max(-1) for g in range(groups)], -1)
        stored = bfloat16(np.maximum(high, 1e-9) / (0.9 * middle))
        scale = from_bfloat16(stored.array).astype(np.float64)[..., group]
        zero = (np.arange(high.size).reshape(high.shape) % (2 * middle)) if zeros else None
        own = middle if zero is None else zero[..., group]
        whole = np.clip(np.round(values / scale) + own, 0, 2 * middle - 1).astype(int)
        parts = {
            "_packed": Stored("I32", words(whole, bits)),
            "_scale": stored,
            "_shape": Stored("I64", np.array(values.shape)),
        }
        if zero is not None:
            along_rows = words(zero.swapaxes(-1, -2), bits).swapaxes(-1, -2)
            parts["_zero_point"] = Stored("I32", np.ascontiguousarray(along_rows))
        if order:
            parts["_g_idx"] = Stored("I32", group.astype(np.int32))
        return parts, ((whole - own) * scale).astype(np.float32)

    return pack


def fp4(mode: str, *, tool: str = "compressed", common: bool = True) -> Packer:
    """Floats of four bits: "nvfp4" in groups of 16, "mxfp4" in groups of 32.

    `tool` is "compressed", which divides by a common scale, or "modelopt", which multiplies.
    """
    size = {"nvfp4": 16, "mxfp4": 32}[mode]

    def pack(values: np.ndarray) -> tuple[Parts, np.ndarray]:
        wanted = largest(values, (1, size)) / 6
        factor = np.float32(1.0)
        if mode == "nvfp4":
            factor = np.float32(wanted.max() / 448) if common else factor
            factor = np.float32(1 / np.float32(1 / factor)) if tool == "compressed" else factor
            codes = np.maximum(encode_e4m3(wanted / factor), 1)
            scale, kind = decode_e4m3(codes), "F8_E4M3"
        else:
            codes = (np.ceil(np.log2(np.maximum(wanted, 1e-9))) + 127).astype(np.uint8)
            scale, kind = 2.0 ** (codes.astype(int) - 127.0), "U8"
        spread = by_blocks(scale, values.shape, (1, size))
        nibbles, numbers = nearest(values / spread / factor, E2M1)
        pairs = nibbles.reshape(*values.shape[:-1], -1, 2).astype(np.uint8)
        weight = "_packed" if tool == "compressed" else ""
        parts = {
            weight: Stored("U8", pairs[..., 0] | pairs[..., 1] << 4),
            "_scale": Stored(kind, codes.astype(np.uint8)),
        }
        meant = numbers * spread
        if mode == "nvfp4" and common:
            if tool == "compressed":
                divisor = np.float32(1 / factor)
                parts["_global_scale"] = float32([divisor])
                meant = meant / divisor.astype(np.float64)
            else:
                parts["_scale_2"] = float32(factor)
                meant = meant * factor.astype(np.float64)
        return parts, meant.astype(np.float32)

    return pack


def declare(method: str, **settings: Any) -> Config:
    """The part of a config.json that names a way of quantizing."""
    return {"quantization_config": {"quant_method": method, **settings}}


def declare_compressed(style: str, *groups: Config, **settings: Any) -> Config:
    """The same of compressed-tensors; a group is its weights' settings, or all of its own."""
    whole = [
        group if "weights" in group else {"targets": ["Linear"], "weights": group}
        for group in groups
    ]
    named = {f"group_{i}": group for i, group in enumerate(whole)}
    return declare("compressed-tensors", format=style, config_groups=named, **settings)


def as_stored(pack: packing.Packer) -> Packer:
    """A packer of whole numbers in words, GPTQ's or AWQ's, of which a path has no "weight"."""
    kinds = {mx.int32: "I32", mx.float16: "F16"}

    def repack(values: np.ndarray) -> tuple[Parts, np.ndarray]:
        parts, meant = pack("", values)
        stored = {f".{p}": Stored(kinds[a.dtype], np.array(a)) for p, a in parts.items()}
        return stored, meant.astype(np.float32)

    return repack


def pack_folder(
    source: Path, folder: Path, settings: Config, pack: Packer, ends: tuple[str, ...]
) -> Path:
    """Copy a model, its matrices of these names' ends packed; return a folder of what they mean.

    Experts that mlx-lm stacks are stored one by one, as they are published. Everything else keeps
    its float32.
    """
    plain = folder.with_name(f"{folder.name}-plain")
    packed: dict[str, Stored] = {}
    meant: dict[str, Stored] = {}
    for name, array in _list_single(source).items():
        if name.endswith(ends):
            parts, values = pack(array)
            path = name.removesuffix(".weight")
            packed |= {(path if p[:1] == "." else name) + p: one for p, one in parts.items()}
            meant[name] = float32(values)
        else:
            packed[name] = meant[name] = float32(array)
    for copy, tensors, more in ((folder, packed, settings), (plain, meant, {})):
        shutil.copytree(source, copy)
        save(copy / "model.safetensors", tensors)
        config = json.loads((copy / "config.json").read_text()) | more
        (copy / "config.json").write_text(json.dumps(config))
    return plain


def _list_single(source: Path) -> dict[str, np.ndarray]:
    found = {}
    for name, array in mx.load(str(source / "model.safetensors")).items():
        values = np.array(array.astype(mx.float32)).astype(np.float64)
        if ".switch_mlp." in name:
            single = {name.replace("switch_mlp", f"experts.{i}"): v for i, v in enumerate(values)}
            found |= single
        else:
            found[name] = values
    return found


def publish_gpt_oss(source: Path, folder: Path) -> None:
    """Copy a gpt-oss of mlx-lm's names in the layout of the published one, experts in MXFP4."""
    stored: dict[str, Stored] = {}
    arrays = _list_single(source)
    for name, array in arrays.items():
        stem, _, leaf = name.rpartition(".")
        if ".experts." not in name:
            stored[name] = float32(array)
        elif not stem.endswith("up_proj"):
            if stem.endswith("gate_proj"):  # the rows of both take turns
                stem = stem.replace("gate_proj", "gate_up_proj")
                both = array, arrays[name.replace("gate_proj", "up_proj")]
                array = np.stack(both, axis=2).reshape(len(array), -1, *array.shape[2:])
            if leaf == "bias":
                stored[f"{stem}_bias"] = float32(array)
            else:
                parts, _ = fp4("mxfp4")(array)
                blocks = parts["_packed"].array.reshape(*array.shape[:-1], -1, 16)
                stored[f"{stem}_blocks"] = Stored("U8", blocks)
                stored[f"{stem}_scales"] = parts["_scale"]
    shutil.copytree(source, folder)
    save(folder / "model.safetensors", stored)
    config = json.loads((folder / "config.json").read_text())
    config |= declare("mxfp4", modules_to_not_convert=["lm_head", "model.embed_tokens"])
    (folder / "config.json").write_text(json.dumps(config))
