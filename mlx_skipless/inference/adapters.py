"""LoRA, DoRA and full adapters, as ``mlx_lm.lora`` trains them, on a model."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils

from ..checkpoints import files
from ..checkpoints.files import ADAPTER_CONFIG, ADAPTERS, PEFT_ADAPTERS
from ..checkpoints.safetensors import is_float, read_header
from ..errors import UserError, quote_error
from ..network.parts import tensors_of
from .caches import try_forward

FINE_TUNE_TYPES, LEAVES = ("lora", "dora", "full"), ("lora_a", "lora_b", "m")  # mlx-lm's


def apply_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """Put the adapters in a folder on a model, in place where they can be; return the model.

    Raises:
        UserError: if there are none, or they are broken, cut or of another model.
    """
    for name in (ADAPTER_CONFIG, ADAPTERS):
        if not files.is_there(folder / name):
            theirs = any((folder / other).exists() for other in PEFT_ADAPTERS)
            why = " (PEFT's are not read)" if theirs else ""
            raise UserError(
                f"--adapter-path {folder}: no {name} in it{why}; give a folder that mlx_lm.lora "
                "wrote"
            )
    kind = files.read_json(folder / ADAPTER_CONFIG).get("fine_tune_type", "lora")
    if kind not in FINE_TUNE_TYPES:
        raise UserError(
            f"--adapter-path {folder}: {kind!r} is none of {', '.join(FINE_TUNE_TYPES)}"
        )
    there = read_header(folder / ADAPTERS)
    for name, tensor in there.items():
        if not is_float(tensor.dtype):
            raise UserError(f"--adapter-path {folder}: {name} has a number type that is not read")
    try:
        model = mlx_lm.utils.load_adapters(model, str(folder))
        model.eval()
        try_forward(model)
    except Exception as error:
        raise UserError(
            f"--adapter-path {folder} does not fit the model ({quote_error(error)}): give adapters "
            "that were trained on it"
        ) from error
    tensors = tensors_of(model)
    for name in there.keys() & tensors.keys():
        if not mx.isfinite(tensors[name]).all().item():
            raise UserError(
                f"--adapter-path {folder}: {name} has numbers that are not finite: train it again"
            )
    added = (name for name in tensors if name.rpartition(".")[2] in LEAVES)
    if kind != "full" and (missing := [name for name in added if name not in there]):
        raise UserError(
            f"--adapter-path {folder}: {ADAPTERS} lacks {missing[0]}"
            f"{f' and {len(missing) - 1} more' * (len(missing) > 1)}, which {ADAPTER_CONFIG} asks "
            "for: copy both again"
        )
    return model
