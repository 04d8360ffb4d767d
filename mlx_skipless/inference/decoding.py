"""Networks of mlx-lm's own, made of tensors that another tool quantized.

mlx-lm's class is given what ``checkpoints/packed.py`` decodes, lazily: a matrix is dequantized when
it is used. So whatever is read there runs here, dense. mlx-lm itself reads little of it, and some
of that wrongly: the bytes of 8-bit floats as numbers, for instance.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..architectures.family import NO_WEIGHTS
from ..checkpoints.packed import UnpackedStore, find_scheme
from ..checkpoints.safetensors import SafetensorsStore
from ..checkpoints.schemes import MLXScheme
from ..constants import MODES
from ..network.parts import tensors_of

# What mlx-lm runs as it is published, without dequantizing it: by the method that a config names,
# and by the file of mlx-lm that reads it.
METHODS = ("mxfp4", "mxfp8", "bitnet")
RUN_PACKED = ("deepseek_v41", "kimi_k3", "minimax_m3_vl", "muse_spark")
RUN_INT4 = ("deepseek_v3", "kimi_k25", "kimi_vl", "mistral4")  # of compressed-tensors, symmetric

Classes = Callable[..., tuple[Any, Any]]


def open_decoded(
    config: Mapping[str, Any], store: SafetensorsStore, classes: Classes
) -> UnpackedStore | None:
    """Open a model's tensors as dense ones; None if mlx-lm reads them as they are.

    Args:
        config: its config.json.
        store: its tensors.
        classes: gives the classes of mlx-lm's network for a config.

    Raises:
        UserError: if they are quantized as neither mlx-lm nor this package reads.
    """
    declared = config.get("quantization_config")
    if config.get("quantization") is not None:
        return None
    if isinstance(declared, Mapping) and declared.get("quant_method") in METHODS:
        return None
    scheme = find_scheme(config, store)
    if scheme is None or isinstance(scheme, MLXScheme):
        return None
    inner = config.get("text_config")
    kind, _ = classes(config=dict(config))
    names = {kind.__module__.rpartition(".")[2]}
    names |= {inner.get("model_type")} if isinstance(inner, Mapping) else set()
    if names & {*RUN_PACKED} or (names & {*RUN_INT4} and _is_int4(declared, store)):
        return None
    return UnpackedStore(store, scheme)


def _is_int4(declared: Any, store: SafetensorsStore) -> bool:
    """Whether compressed-tensors holds whole numbers of 4 bits as MLX has them, without zeros."""
    if not isinstance(declared, Mapping) or declared.get("format") != "pack-quantized":
        return False
    weights = [group.get("weights") or {} for group in declared["config_groups"].values()]
    fit = all(w.get("num_bits") == 4 and w.get("group_size") in MODES["affine"][0] for w in weights)
    return fit and not any(n.endswith(("weight_zero_point", "weight_g_idx")) for n in store.shapes)


def build_decoded(
    config: dict[str, Any], weights: dict[str, mx.array], classes: Classes
) -> nn.Module:
    """Build the network of a config with lazy dense weights, as ``mlx_lm.load_model`` does.

    Raises:
        ValueError: if the tensors are not the network's.
    """
    kind, kind_args = classes(config=config)
    model: nn.Module = kind(kind_args.from_dict(config))
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    for name in weights.keys() - tensors_of(model).keys():
        # Exporters write biases of zeros that a network does not have.
        zeros = name.endswith(".bias") and not mx.any(weights[name] != 0).item()
        if zeros or name.endswith(NO_WEIGHTS):
            del weights[name]
    model.eval()
    model.load_weights([*weights.items()], strict=True)
    return model
