"""Conversions of networks that mlx-lm knows and this package does not: all that is not exact.

What such a network computes only mlx-lm's own code says, which ``network/stock.py`` runs a layer at
a time. So whatever mlx-lm loads can lose sub-layers and be quantized. The result is written as
``mlx_lm.convert`` writes it, under the names of mlx-lm's modules.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import _encode_tagged_floats, get_total_parameters

from ..architectures.families import FAMILIES
from ..architectures.wrappers import drop_other_parts
from ..checkpoints.guarded import GuardedTokenizer
from ..checkpoints.tokenizer import carry_tokenizer, load_tokenizer, tell_transformers
from ..checkpoints.writer import SHARD_BYTES, Writer
from ..constants import BUNDLED
from ..errors import BadArgument, UserError, first_line
from ..inference.loading import QUANTIZATION_KEYS, load_network
from ..inference.old_keys import find_classes
from ..inference.stock import StockSource, find_stock, forget_quantization
from ..memory import machine_memory_bytes
from ..network import reduced
from ..network.stock import StandIns, StockNetwork
from ..network.trial import KINDS
from ..progress import Progress
from ..quantization.coverage import check_packable, find_widths
from ..quantization.distillation import LOGITS_BYTES
from ..quantization.fitting import estimate_moments
from ..quantization.layout import quantize_nearest
from ..quantization.sensitivity import REPLACE
from ..quantization.together import Found
from ..removal.renumbering import (
    Layers,
    delete_layers,
    passes_stream,
    rename_layer,
    shorten_network,
)
from ..removal.standins import choose_stand_ins, fit_together
from ..removal.sublayers import Drops, Step, check_sums, choose_drops
from ..text import samples
from ..text.corpus import Document
from ..text.samples import Passages
from .check import Verification, compare_networks
from .healing import Healing
from .options import Options
from .planning import list_wishes, size_text
from .writing import MODEL_FILE

NO_RENUMBERING = (
    "no config of this architecture was found to leave out just blocks {}: the result carries a "
    "network without them"
)


def find_source(options: Options) -> StockSource | None:
    """Find a conversion's source, if it is of an architecture that only mlx-lm knows.

    Raises:
        UserError: if it cannot be read, or has no weights and more than a plan is asked for.
    """
    wanted = bool(options.replacements or options.allow)
    # A reduced network is healed before it is rounded, which only mlx-lm's own can be.
    better = options.heal > 0 and bool(options.drops) and options.quantization is not None
    if options.model is None and not wanted:
        return None
    model = BUNDLED if options.model is None else options.model
    source = find_stock(
        model,
        revision=options.revision,
        config_only=options.dry_run,
        trust_remote_code=options.trust_remote_code,
        any_family=wanted or better,
    )
    if source is None:
        if wanted:
            raise UserError(
                f"{list_flags(options)}: that is for models that mlx-lm's own code runs, and "
                f"{model} is none"
            )
        return None
    if source.store is None and source.gguf is None and not options.dry_run:
        raise UserError(f"{source.name} has no weights: add --dry-run, or give the model")
    if reduced.DROPPED in source.config and (options.drops or wanted):
        raise UserError(
            f"{source.name} has lost sub-layers already: drop all that shall go from the model "
            "that it was made from"
        )
    return source


def _check_free(config: Mapping[str, Any]) -> None:
    """Raise a UserError if a config's network runs in a packing of its own alone."""
    classes: Any = find_classes(config)
    try:
        classes[1].from_dict(config)
    except ValueError as error:
        raise UserError(
            f"mlx-lm's network of a {config['model_type']} runs in the packing of this source "
            f"alone ({first_line(error)}): it cannot be quantized otherwise"
        ) from error


@dataclass(frozen=True)
class StockJob:
    """One conversion of a network of mlx-lm's own, as far as it is decided.

    Attributes:
        options: what the user asked for.
        source: the model.
        text: the user's, to quantize against and to check with; None: the source's own.
        dropped: the layers that lose their "attention" or "ffn".
        path: the steps of the search for these, if there was one.
        layers: those that stay, where some are left out as a whole.
        config: of the network of these.
        notes: why it is so, a sentence each.
        bits: of the matrices for which they were chosen, by module path.
        stand_ins: for sub-layers that matrices stand in for.
        bytes_read: of weights, that decoding a token reads of the source as it is stored.
        healed: the folder of the result as it was fitted and trained, not quantized, if it was.
        healing: what training did.
        found: what a search for bits and sub-layers together found.
    """

    options: Options
    source: StockSource
    text: Sequence[Document] | None = None
    dropped: Mapping[str, list[int]] = field(default_factory=dict)
    path: tuple[Step, ...] = ()
    layers: Layers | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bits: Mapping[str, int] = field(default_factory=dict)
    stand_ins: StandIns = field(default_factory=dict)
    bytes_read: int = 0
    healed: Path | None = None
    healing: Healing | None = None
    found: Found | None = None

    def learn(self, **found: Any) -> "StockJob":
        """Add to what was decided; ``found`` are fields."""
        return replace(self, **found)

    @property
    def calibrated(self) -> bool:
        """Whether the result is quantized against text."""
        options = self.options
        asked = options.calibration is not None or options.mixes_bits or options.distill > 0
        return options.quantization is not None and asked

    @property
    def requantized(self) -> bool:
        """Whether packed matrices do not stay as they are."""
        return self.options.quantization is not None or self.options.dtype is not None

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the result's weights that are not quantized."""
        name = self.options.dtype
        return getattr(mx, name) if name else self.source.dtype

    def build_result(self, network: StockNetwork) -> tuple[nn.Module, dict[str, Any]]:
        """Build the result with lazy weights; return it and its config.json.

        ``network`` is the source's.
        """
        model, config = self.build_dense(network)
        if (q := self.options.quantization) is not None:
            check_packable(model, q)
            try:
                model, entry = quantize_nearest(model, replace(q, own=self.bits))
            except TypeError as error:  # some networks of mlx-lm have matrices of their own kinds
                kind = self.source.config["model_type"]
                raise UserError(f"-q: mlx-lm cannot quantize a {kind}: {error}") from error
            config["quantization"] = config["quantization_config"] = entry
        return model, dict(sorted(config.items()))

    def build_dense(self, network: StockNetwork) -> tuple[nn.Module, dict[str, Any]]:
        """Build the result as it is before it is quantized, with its config.json.

        A packed source of which no matrix changes stays packed.
        """
        source, options = self.source, self.options
        unpack = source.is_packed and self.requantized
        if unpack:
            _check_free(forget_quantization(source.config))
        model = source.build_dense() if unpack else source.build()
        config = dict(self.config or self.source.config)
        if self.layers is not None:
            model, config = shorten_network(model, network.paths, config, self.layers)
        config = drop_other_parts(config)
        if not options.trust_remote_code:  # the code that it names is not carried
            config.pop("auto_map", None)
        config |= tell_transformers(config)
        if not any("scales" in module for module in model.modules()):
            config = forget_quantization(config)
        elif config.get("quantization") is None:  # published as mlx-lm runs it
            config |= dict.fromkeys(QUANTIZATION_KEYS, self.source.quantization)
        if options.dtype is not None:
            model.set_dtype(self.dtype)
        dropped = self._name_parts(self.dropped, network.sublayers)
        replaced = self._name_parts(self.replaced, network.sublayers)
        if parts := {*dropped, *replaced}:
            handed = [one.handed.items() for one in network.sublayers]
            outputs = {path: more for one in handed for path, more in one if path in parts}
            reduced.drop(model, dropped, outputs)
            self._put_stand_ins(model, network)
            config |= {reduced.DROPPED: dropped, "model_file": MODEL_FILE}
            config |= {reduced.OUTPUTS: outputs} if outputs else {}
        if replaced:
            _, width = next(iter(self.stand_ins.values())).weight.shape
            config |= {reduced.REPLACED: replaced, reduced.WIDTH: width}
        if self.healed is not None:
            for file in self.healed.glob("*.safetensors"):
                weights: Any = mx.load(str(file))
                model.load_weights([*weights.items()], strict=False)
        return model, config

    def _put_stand_ins(self, model: Any, network: StockNetwork) -> None:
        """Put the matrices that stand in for sub-layers into a model, in place."""
        kept = range(len(network.paths)) if self.layers is None else self.layers.kept
        for (kind, layer), linear in self.stand_ins.items():
            own = network.sublayers[layer]
            (path,) = own.parts[kind]
            there = copy.deepcopy(linear)
            there.set_dtype(self.dtype)
            block = model.layers[kept.index(layer)]
            reduced.drop_part(block, path, own.handed.get(path, ()), there)

    @property
    def replaced(self) -> dict[str, list[int]]:
        """The layers for whose "attention" or "ffn" a matrix stands in."""
        found: dict[str, list[int]] = {}
        for kind, layer in sorted(self.stand_ins):
            found.setdefault(kind, []).append(layer)
        return found

    def _name_parts(
        self, which: Mapping[str, list[int]], sublayers: list[Any]
    ) -> dict[str, list[int]]:
        """The layers of some sub-layers, by what the network's blocks call these."""
        found: dict[str, set[int]] = {}
        there = self.layers or Layers(tuple(range(len(sublayers))), len(sublayers))
        for kind, layers in which.items():
            for new, layer in enumerate(there.kept):
                for part in sublayers[layer].parts[kind] if layer in layers else ():
                    found.setdefault(part, set()).add(new)
        return {part: sorted(layers) for part, layers in sorted(found.items())}


def restore_all(job: StockJob, network: StockNetwork) -> StockJob:
    """Return a job with all sub-layers, whose matrices have about as many bits as others.

    ``network`` is the source's.
    """
    bits, q = job.bits, job.options.quantization
    if bits and q is not None:
        others = replace(q, own=bits).typical_bits
        names: dict[str, str | None] = {p: p for p, _ in job.source.model.named_modules()}
        if (layers := job.layers) is not None:
            names = {path: rename_layer(path, layers, network.paths) for path in names}
        bits = {path: bits.get(name or "", others) for path, name in names.items()}
    return replace(job, bits=bits, dropped={}, stand_ins={}, layers=None, config={}, healed=None)


def check_job(job: StockJob, network: StockNetwork) -> None:
    """Check that what is asked for can be done.

    Raises:
        UserError: if it cannot.
    """
    options = job.options
    exact = {
        f"--remove {options.remove}": options.remove not in ("auto", "none"),
        "--skipless": options.skipless,
        "--fold-norms": options.fold_norms,
        "--precompute-first-layer": options.precompute_first_layer is not None,
    }
    for flag, asked in exact.items():
        if asked and (options.replacements or options.allow):
            raise BadArgument(
                f"{flag} and {list_flags(options)}: matrices are put in the place of sub-layers of "
                "mlx-lm's own network alone; drop one"
            )
        if asked and reduced.DROPPED in job.source.config:
            raise UserError(
                f"{flag}: {job.source.name} has lost sub-layers: ask it of the model that it was "
                "made from"
            )
        if asked and job.source.kind in FAMILIES:
            raise BadArgument(
                f"{flag} and --heal: a model that loses sub-layers and is quantized is healed in "
                "mlx-lm's own network; drop one"
            )
        if asked:
            raise UserError(
                f"{flag}: that is not known of a {job.source.kind}, only of "
                f"{', '.join(sorted(FAMILIES))}; sub-layers can go of whatever mlx-lm runs, and "
                "-q quantizes it"
            )
    if options.distill and any(isinstance(m, SwitchLinear) for m in job.source.model.modules()):
        raise UserError("--distill is not for models with experts: drop it")
    _check_wishes(options, network)


def _check_wishes(options: Options, network: StockNetwork) -> None:
    """Check that as many sub-layers as are asked for can go, or be replaced."""
    spared, layers = find_spared(network), len(network.paths)
    wishes = [*list_wishes(options.drops), *list_wishes(options.replacements, "replace")]
    for wish in wishes:
        kinds = KINDS if wish.kind == "block" else (wish.kind,)
        stay = {layer for kind in kinds for layer in spared[kind]}
        most = min(layers - 1, layers - len(stay))
        if most < 1 and not stay:
            raise UserError(f"{wish}: this model has one layer, which has to keep its own")
        if most < 1:
            obstacles = network.sublayers[min(stay)].obstacles
            raise UserError(f"{wish}: {next(obstacles[k] for k in kinds if k in obstacles)}")
        if wish.count is not None and not 1 <= wish.count <= most:
            raise UserError(f"{wish}: of this model's {layers} layers 1 to {most} can lose theirs")
        parts = max(len(network.sublayers[n].parts.get(wish.kind, ())) for n in range(layers))
        if wish.verb == "replace" and parts > 1:
            raise UserError(f"{wish}: this model's blocks have {parts} of them, side by side")
    free = {kind: layers - len(spared[kind]) for kind in KINDS}
    check_sums(list_wishes(options.drops), {kind: min(n, layers - 1) for kind, n in free.items()})
    check_sums(wishes, free)


def find_spared(network: StockNetwork) -> dict[str, list[int]]:
    """The layers whose "attention" or "ffn" cannot go."""
    return {
        kind: [layer for layer, one in enumerate(network.sublayers) if kind in one.obstacles]
        for kind in KINDS
    }


def check_ways(job: StockJob, network: StockNetwork) -> None:
    """Refuse a target that is allowed what cannot be done to any sub-layer.

    Raises:
        UserError: if it is.
    """
    if job.options.allow and not find_ways(job.options, network):
        raise UserError(
            f"--allow {job.options.allow}: nothing of that can be done to a sub-layer of this "
            "model; drop it to choose bits alone"
        )


def find_ways(options: Options, network: StockNetwork) -> dict[tuple[str, int], tuple[str, ...]]:
    """Find what a target may do to each "attention" and "ffn" that need not stay.

    A plan runs nothing, and takes a network for a chain of layers.
    """
    replaceable = REPLACE in options.allowed and (options.dry_run or network.is_chain)
    found = {}
    for layer, own in enumerate(network.sublayers if len(network.paths) > 1 else ()):
        for kind in KINDS:
            one = replaceable and len(own.parts.get(kind, ())) == 1
            ways = tuple(way for way in options.allowed if one or way != REPLACE)
            if network.can_drop(layer, kind) and ways:
                found[kind, layer] = ways
    return found


def check_memory(job: StockJob, network: StockNetwork) -> None:
    """Refuse what cannot fit: two shards, a few layers, what stands before and behind them.

    All runs in float32. What is no chain of layers is in memory as a whole.
    """
    model, options = job.source.model, job.options
    layers = [4 * get_total_parameters(one) for one in model.layers]
    whole = 4 * get_total_parameters(model)
    needed = 2 * SHARD_BYTES + 2 * max(layers) + 3 * (whole - sum(layers))
    if not network.is_chain:
        needed += 2 * whole
    if job.calibrated:
        needed += estimate_moments(max(find_widths(model).values()), _find_hidden(job))
    if options.distill:  # the source, the result's codes, its dense matrices, their gradients
        needed += 5 * 4 * get_total_parameters(model) + 8 * LOGITS_BYTES
    if needed > machine_memory_bytes():
        raise UserError(
            f"converting this model takes about {needed / 1e9:.0f} GB of memory and this machine "
            f"has {machine_memory_bytes() / 1e9:.0f} GB: use a larger one"
        )


def _find_hidden(job: StockJob) -> int:
    """The width of the stream: that of most matrices' inputs."""
    return Counter(find_widths(job.source.model).values()).most_common(1)[0][0]


def take_text(
    job: StockJob, network: StockNetwork, tokenizer: GuardedTokenizer | None, progress: Progress
) -> Passages | None:
    """Take the tokens that deciding and checking need; None if nothing does."""
    options, model = job.options, job.source.model
    widest = max(find_widths(model).values(), default=0)
    sizes = size_text(options, job.calibrated, get_total_parameters(model), widest)
    if sizes is None:
        return None
    return samples.take_passages(
        lambda: network,
        tokenizer,
        job.text,
        str(options.calibration),
        seed=options.seed,
        longest=network.context,
        progress=partial(progress, "sampling text"),
        **sizes,
    )


def decide(
    job: StockJob, network: StockNetwork, passages: Passages | None, progress: Progress
) -> StockJob:
    """Choose on text what goes, and what matrices stand in for."""
    options = job.options
    if passages is None or passages.calibration is None:
        return job
    tokens = passages.calibration
    limits: dict[str, Any] = {"greedy": options.greedy, "max_loss": options.allowed_loss}
    dropped: Drops = {}
    replaced: Drops = {}
    path: list[Step] = []
    if options.drops:
        dropped, path = choose_drops(
            network,
            tokens,
            list_wishes(options.drops),
            spared=find_spared(network),
            progress=partial(progress, "dropping"),
            **limits,
        )
    if options.replacements:
        if not network.is_chain:
            raise UserError(
                f"{list_flags(options)}: more than the stream passes between this model's layers"
            )
        left = network.drop(dropped) if dropped else network
        replaced, more = choose_stand_ins(
            left,
            tokens,
            list_wishes(options.replacements, "replace"),
            spared=find_spared(left),
            progress=partial(progress, "choosing what to replace"),
            **limits,
        )
        path = [*path, *more[1 if path else 0 :]]
    return settle(replace(job, path=tuple(path)), network, tokens, dropped, replaced, progress)


def settle(
    job: StockJob,
    network: StockNetwork,
    tokens: mx.array,
    dropped: Drops,
    replaced: Drops,
    progress: Progress,
) -> StockJob:
    """Take out chosen sub-layers, and fit matrices in the place of others on a text.

    Args:
        job: with all of them.
        network: the source's.
        tokens: (sequences, length) of text.
        dropped: the layers that lose their "attention" or "ffn".
        replaced: those for whose "attention" or "ffn" a matrix stands in.
        progress: called with (stage, done, total).
    """
    job = replace(job, dropped={kind: sorted(layers) for kind, layers in dropped.items()})
    if replaced:
        left = network.drop(dropped) if dropped else network
        tell = partial(progress, "fitting")
        job = replace(job, stand_ins=fit_together(network, left, tokens, replaced, tell))
    return leave_out_blocks(job, network)


def list_flags(options: Options) -> str:
    """The flags that ask for matrices in the place of sub-layers, or allow them."""
    flags = [f"--replace-{kind}" for kind in options.replacements]
    return " and ".join([*flags, *(["--allow"] if options.allow else [])])


def leave_out_blocks(job: StockJob, network: StockNetwork) -> StockJob:
    """Leave out layers that lose all, and renumber the others, where mlx-lm runs what is left."""
    total = len(network.paths)
    gone = [n for n in range(total) if all(n in job.dropped.get(kind, ()) for kind in KINDS)]
    if not gone:
        return job
    layers = Layers(tuple(n for n in range(total) if n not in gone), total)
    config = delete_layers(job.source.config, layers)
    if config is None or not all(passes_stream(network, layer) for layer in gone):
        note = NO_RENUMBERING.format(", ".join(map(str, gone)))
        return replace(job, notes=(*job.notes, note))
    return replace(job, layers=layers, config=config)


def write_beside(
    job: StockJob, writer: Writer, config: Mapping[str, Any]
) -> GuardedTokenizer | None:
    """Write what a result has beside its weights; return its tokenizer."""
    write_config(writer, config)
    trust = {"trust_remote_code": job.options.trust_remote_code}
    if not carry_tokenizer(job.source, writer.folder, stock=True, **trust):
        return None
    return load_tokenizer(writer.folder, config, name=job.source.name, **trust)


def write_config(writer: Writer, config: Mapping[str, Any]) -> None:
    """Write a result's config.json, and the code that the config names."""
    writer.write_json("config.json", _encode_tagged_floats(dict(config)))
    if reduced.DROPPED in config:
        code = Path(str(reduced.__file__)).read_text(encoding="utf-8")
        writer.write_text(MODEL_FILE, code)


def check(
    job: StockJob,
    network: StockNetwork,
    folder: Path,
    passages: Passages | None,
    progress: Progress,
) -> Verification | None:
    """Compare a written result with its source on text; None if that is not wanted.

    A quantized result is compared with the source quantized alone, to nearest, too.
    """
    if not job.options.verify or passages is None:
        return None
    results = [StockNetwork(lambda: load_network(folder, lazy=True)[0])]
    quantized = job.options.quantization is not None
    if quantized and (job.calibrated or job.dropped or job.stand_ins or job.healed):
        alone = StockJob(job.options, job.source)
        results.append(StockNetwork(lambda: alone.build_result(network)[0]))
    tell = partial(progress, "checking")
    found, *others = compare_networks(network, results, passages.check, passages.origin, tell)
    return found.beside(*(others or [found])) if quantized else found
