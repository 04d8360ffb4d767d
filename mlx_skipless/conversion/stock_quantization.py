"""How the weights of a network of mlx-lm's own are quantized and written."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import get_total_parameters

from ..checkpoints.writer import Writer
from ..inference.loading import load_network
from ..inference.stock import StockSource
from ..network.driver import Driver
from ..network.parts import tensors_of
from ..network.stock import StockNetwork, WholeNetwork
from ..progress import Progress, Steps
from ..quantization import bits, sensitivity
from ..quantization.distillation import distill
from ..quantization.modules import CalibratedModules, read_formats
from ..removal.products import check_finite
from ..text.samples import Passages
from .decisions import find_limit, make_raises
from .stock import StockJob, write_config

ROUTER_BITS = 8  # at least: an error sends tokens to other experts
STATE_BITS = 4  # at least, where some layers keep a state: errors stay in it


def write(
    job: StockJob,
    network: StockNetwork,
    writer: Writer,
    passages: Passages | None,
    progress: Progress,
    *,
    unrounded: bool = False,
) -> None:
    """Write config.json and weights of a job's result, in the place of earlier ones.

    Args:
        job: all decided.
        network: the source's.
        writer: of the result's folder.
        passages: the text to quantize against and to distill with, if need be.
        progress: called with (stage, done, total).
        unrounded: fit the matrices of a result that is not quantized, too, so that they make up
            for sub-layers that are gone.
    """
    writer.discard_weights()
    model, config = job.build_result(network)
    write_config(writer, config)
    tokens = None if passages is None else passages.calibration
    weights, layers = get_total_parameters(model), [*model.layers]
    tell = partial(progress, "converting")
    fits = None
    unrounded = unrounded and network.is_chain and not job.source.is_packed
    if tokens is not None and (job.calibrated or unrounded):
        dense = open_dense(job, network)
        fits = _open_fits(job, network, dense, model, tokens, tell)
        fits.embedding()
        if not dense.is_chain:
            fits.layer(0)
    for done, layer in enumerate(layers):
        path = network.paths[done]
        if fits is None:
            tell(done, len(layers) + 1)
        elif dense.is_chain:
            fits.layer(done)
        written = {f"{path}.{name}": array for name, array in tensors_of(layer).items()}
        check_finite(written)
        writer.add(written)
        layer.clear()
    if fits is not None:
        fits.head()
    check_finite(rest := tensors_of(model))
    writer.add(rest)
    writer.finish_weights(weights)
    tell(len(layers) + 1, len(layers) + 1)
    if job.options.distill and tokens is not None:
        _distill(job, writer, tokens, progress)


def check_dense(job: StockJob, network: StockNetwork) -> None:
    """Check weights that are going to be rounded, if they are, which makes numbers of NaN.

    Raises:
        UserError: if one is NaN or infinite.
    """
    if job.options.quantization is None:
        return
    model, _ = job.build_dense(network)
    layers: list[nn.Module] = [*model.layers]
    for path, layer in zip(network.paths, layers, strict=False):  # sub-layers may be gone
        check_finite({f"{path}.{name}": array for name, array in tensors_of(layer).items()})
        layer.clear()
    check_finite(tensors_of(model))


def _open_fits(
    job: StockJob,
    network: StockNetwork,
    dense: Driver,
    model: nn.Module,
    tokens: mx.array,
    tell: Steps,
) -> CalibratedModules:
    """Open what fits a result's matrices to a text.

    Where sub-layers are gone, that is what the whole network makes of the text, unless fits and
    training have made up for them already.
    """
    whole: dict[str, Any] = {}
    if (job.dropped or job.stand_ins) and job.healed is None and dense.is_chain:
        whole = {"whole": network, "kept": job.layers.kept if job.layers is not None else ()}
    return CalibratedModules(dense, model, job.dtype, tokens, tell, **whole)


def measure_mixtures(
    job: StockJob, network: StockNetwork, tokens: mx.array, progress: Progress
) -> bits.Raises:
    """Measure on the text what rounding each matrix costs, which orders the mixtures of bits.

    Raises:
        UserError: as ``check_size`` does, before anything is measured.
    """
    model, config = job.build_result(network)
    check_size(job, network, model, config)
    forms = read_formats(model, job.dtype)
    costs = sensitivity.measure_rounding(
        open_dense(job, network),
        _list_free(forms, config),
        forms.get,
        tokens,
        partial(progress, "measuring matrices"),
    )
    return _order(job, network, model, config, costs)


def check_size(
    job: StockJob, network: StockNetwork, model: nn.Module, config: Mapping[str, Any]
) -> None:
    """Check that few enough bits reach the size that is asked for, if one is.

    Where it is not known yet which sub-layers go, nothing is checked.

    Args:
        job: whose result it is.
        network: the source's.
        model: the result as ``job.build_result`` gives it.
        config: of that.

    Raises:
        UserError: if it is out of reach.
    """
    options, chosen = job.options, job.dropped or job.stand_ins
    if options.allowed or ((options.drops or options.replacements) and not chosen):
        return
    if (size := find_limit(options, lambda: job.bytes_read)) is not None:
        free = _list_free(read_formats(model, job.dtype), config)
        raises = _order(job, network, model, config, dict.fromkeys(free, 0.0))
        raises.check_reach(size, options.target_speed)


def _list_free(forms: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The matrices whose bits can be chosen, of all that have a format."""
    return [path for path in forms if not isinstance(config["quantization"].get(path), dict)]


def _order(
    job: StockJob,
    network: StockNetwork,
    model: nn.Module,
    config: Mapping[str, Any],
    costs: Mapping[str, float],
) -> bits.Raises:
    return make_raises(
        model,
        costs,
        config["quantization"]["bits"],
        by_speed=job.options.target_speed is not None,
        floors=find_floors(job, network, model),
    )


def open_dense(job: StockJob, network: StockNetwork) -> Driver:
    """Open the result as it is before it is quantized, in float32; ``network`` is the source's."""
    dense = StockNetwork(lambda: job.build_dense(network)[0], mx.float32)
    if dense.is_chain:
        return dense
    model, _ = job.build_dense(network)
    model.set_dtype(mx.float32)
    return WholeNetwork(model)


def find_floors(job: StockJob, network: StockNetwork, model: nn.Module) -> dict[str, int]:
    """Find the fewest bits of some matrices of a result, by module path.

    Routers are the matrices that have as many outputs as there are experts beside them. Attentions
    and state-space layers have a floor where some layers keep a state instead of keys and values.
    """
    floors: dict[str, int] = {}
    kept = range(len(network.paths)) if job.layers is None else job.layers.kept
    keeps_state = any(
        not hasattr(one, "keys")
        for cache in make_prompt_cache(model)
        for one in getattr(cache, "caches", (cache,))
    )
    for layer, path in zip(kept, network.paths, strict=False):
        inside = f"{path}."
        modules = {p: m for p, m in model.named_modules() if p.startswith(inside)}
        experts = {
            m.num_experts
            for m in modules.values()
            if isinstance(m, SwitchLinear | QuantizedSwitchLinear)
        }
        attentions = network.sublayers[layer].parts.get("attention", ())
        starts = tuple(f"{inside}{part}." for part in attentions)
        for where, module in modules.items():
            if "scales" not in module:
                continue
            if where.startswith(starts):
                floors |= {where: STATE_BITS} if keeps_state else {}
            elif isinstance(module, nn.QuantizedLinear) and module.weight.shape[0] in experts:
                floors[where] = ROUTER_BITS
    return floors


def _distill(
    job: StockJob,
    writer: Writer,
    tokens: mx.array,
    progress: Progress,
) -> None:
    """Write the weights again with scales and biases that are trained towards the source."""
    result, folder, config = load_network(writer.folder, lazy=True)
    written, weights = tensors_of(result), get_total_parameters(result)
    forms = read_formats(result, job.dtype)
    packed = {path: form for path, form in forms.items() if written[f"{path}.weight"].ndim == 2}
    mx.eval(written)
    teacher = job.source.build_dense()
    student = StockSource(job.source.name, folder, config).build_dense()
    teacher.set_dtype(mx.float32)
    student.set_dtype(mx.float32)
    student.train()  # mlx-lm's own kernels have no gradients
    changed = distill(
        teacher,
        student,
        written,
        packed,
        tokens,
        steps=job.options.distill,
        seed=job.options.seed,
        progress=partial(progress, "distilling"),
    )
    changed = {name: array.astype(written[name].dtype) for name, array in changed.items()}
    writer.discard_weights()
    writer.add(written | changed)
    writer.finish_weights(weights)
