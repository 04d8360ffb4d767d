"""What a network looks like after a change that moves weights: shapes and settings, no weights."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from ..errors import UserError
from ..network.model import ModelArgs
from ..network.names import ATTENTION, EMBEDDING, MLP, NORMS, find_readers
from ..network.wiring import LETTERS, parse_layer, parse_letter
from .candidates import find_mixed
from .choices import Request
from .renumbering import Layers, rename_layer

PARTS = (*LETTERS, "attention", "ffn")  # that a layer can lack


def strip_skips(args: ModelArgs) -> ModelArgs:
    """Make the skipless version of a pre-norm network.

    It has no skips, and norms without weights on the projections' outputs.

    Raises:
        UserError: if it is not a pre-norm network.
    """
    if args.precomputed:
        raise UserError("--skipless: the first layer is a table; convert the model that it is of")
    if args.norm != "pre":
        raise UserError(
            "--skipless is for models with skips and norms; this one is skipless: drop it"
        )
    bare = absorb_norms(args, NORMS["pre"])
    return replace(bare, skip="none", norm="qkv", shared_norm=False)


def absorb_norms(args: ModelArgs, folded: Collection[str]) -> ModelArgs:
    """Make the network whose matrices hold the weights and biases of the norms before them."""
    biases = {name: {*layers} for name, layers in args.biases.items()}
    for norm in folded:
        for name in find_readers(args, norm) if norm in args.shifts else ():
            part = "attention" if name in ATTENTION else "ffn"
            if name in ATTENTION[:3] or name in args.ffn_readers:
                there = [i for i in range(args.num_hidden_layers) if not args.lacks(part, i)]
                biases[name] = biases.get(name, set()) | {*there}
    return replace(
        args,
        biases=_sort_biases(biases),
        gains=[norm for norm in args.gains if norm not in folded],
        shifts=[norm for norm in args.shifts if norm not in folded],
        head_bias=args.head_bias or ("final" in folded and "final" in args.shifts),
    )


def choose_folded(
    source: ModelArgs, before: ModelArgs, wanted: bool, stock: bool
) -> tuple[str, ...]:
    """Choose the norms whose weights and biases go into the matrices that read them.

    Only those that must go, or all if wanted: a norm's weight in a matrix widens the range of the
    weights that share a scale once the matrix is quantized, and costs next to nothing outside.

    Args:
        source: the network as it is.
        before: the network that the removals start from, skipless perhaps.
        wanted: whether to fold all that can be folded.
        stock: whether the result must be a network of mlx-lm's own, which takes no new biases.
    """
    norms = [*NORMS["pre"]] if before is not source else []
    if wanted and before is source:  # where Q, K or V is gone, no matrix is there to take it
        norms += [] if any(source.removed.get(part) for part in "qkv") else ["attention"]
        norms += ["ffn"]
    if wanted:
        norms += ["hidden"]
        norms += [] if source.removed.get("k") or source.removed.get("v") else ["kv"]
        # P absorbs it, unless something else is added to the values or reads or norms the heads.
        skips = source.query_skip or source.head_skip or source.output_skip
        other = skips or "heads" in source.norms
        norms += [] if source.removed.get("p") or other else ["v"]
        norms += [] if source.tie_word_embeddings else ["final"]
    there = [norm for norm in norms if norm in (*source.gains, *source.shifts)]
    return tuple(norm for norm in there if not (stock and _adds_biases(source, norm)))


def _adds_biases(args: ModelArgs, norm: str) -> bool:
    after = absorb_norms(args, [norm])
    return after.biases != args.biases or after.head_bias != args.head_bias


def can_centre(source: ModelArgs, before: ModelArgs, folded: Collection[str]) -> bool:
    """Tell whether every LayerNorm can become an RMS norm.

    The mean that a LayerNorm takes out can be taken out of whatever writes the stream (Ashkboos et
    al., *SliceGPT*, arXiv 2401.15024, section 3.2). A tied head would see the difference, and where
    P is gone or an output skip adds the heads, no matrix is there to take their mean out of.

    Args:
        source: the network as it is.
        before: the network that the removals start from, skipless perhaps.
        folded: norms whose weights and biases go into the matrices that read them.
    """
    return (
        before is source
        and source.norm == "pre"
        and source.norm_type == "layer"
        and source.skip != "none"
        and source.final_norm
        and not source.tie_word_embeddings
        and not source.precomputed
        and not source.removed.get("p")
        and not source.output_skip
        and {*source.gains, *source.shifts} <= {*folded, *NORMS["qkv"]}
    )


def simplify_norms(args: ModelArgs, centred: bool) -> ModelArgs:
    """Make the network without what its norms no longer need.

    Args:
        args: the network.
        centred: whether what writes its stream has no mean, so that LayerNorms are RMS norms.
    """
    args = replace(args, norm_type="rms") if centred else args
    weightless = not {*args.gains, *args.shifts} & NORMS["pre"].keys()
    once = args.block == "parallel" and args.norm == "pre" and weightless
    return replace(args, shared_norm=args.shared_norm or once)


def remove_matrices(
    request: Request, eliminated: Mapping[int, str], folded: Collection[str]
) -> ModelArgs:
    """Make the network without some of its matrices and norms.

    Args:
        request: holds the network with them.
        eliminated: by point, the path of the matrix that becomes the identity.
        folded: norms whose weights and biases go into the matrices that read them.
    """
    args, points = absorb_norms(request.args, folded), request.points
    biases = {name: set(layers) for name, layers in args.biases.items()}
    extra_bits = dict(args.extra_bits)
    for index, path in eliminated.items():
        name, layer = path.rpartition(".")[2], parse_layer(path)
        if layer in biases.get(name, ()):
            # The bias moves with the stream: into what writes it first, out of what reads it.
            biases[name].discard(layer)
            for moved in [points[index].producers[0], *points[index].consumers]:
                if moved not in (path, EMBEDDING):
                    biases.setdefault(moved.rpartition(".")[2], set()).add(parse_layer(moved))
        if more := request.count_extra_bits(index, path):
            for matrix in find_mixed(args, points, index, path):
                extra_bits[matrix] = max(extra_bits.get(matrix, 0), more)
    removed = unite_layers(args.removed, group_by_letter(eliminated))
    return replace(args, removed=removed, biases=_sort_biases(biases), extra_bits=extra_bits)


def group_by_letter(eliminated: Mapping[int, str]) -> dict[str, list[int]]:
    """Group matrices that become the identity: their layers by the paper's letter."""
    layers = {
        letter: sorted(parse_layer(p) for p in eliminated.values() if parse_letter(p) == letter)
        for letter in LETTERS
    }
    return {letter: found for letter, found in layers.items() if found}


def unite_layers(*maps: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Unite maps from the parts that layers lack to those layers."""
    parts = {part: sorted({i for layers in maps for i in layers.get(part, ())}) for part in PARTS}
    return {part: layers for part, layers in parts.items() if layers}


def keep_layers(args: ModelArgs, layers: Layers) -> ModelArgs:
    """Make the network of some of another's layers, with their numbers in a row."""

    def renumber(lists: Mapping[str, list[int]]) -> dict[str, list[int]]:
        found = {part: layers.renumber(numbers) for part, numbers in lists.items()}
        return {part: numbers for part, numbers in found.items() if numbers}

    extra = {rename_layer(path, layers): bits for path, bits in args.extra_bits.items()}
    return replace(
        args,
        num_hidden_layers=len(layers.kept),
        layer_types=layers.pick(args.layer_types),
        removed=renumber(args.removed),
        biases=renumber(args.biases),
        fused=renumber(args.fused),
        extra_bits={path: bits for path, bits in extra.items() if path is not None},
    )


def add_table(args: ModelArgs) -> ModelArgs:
    """Make the network with a table in the place of its first layer's projections."""
    gone = {*ATTENTION[:3], *(MLP if args.block == "parallel" else ())}
    biases = {
        name: {layer for layer in layers if layer or name not in gone}
        for name, layers in args.biases.items()
    }
    return replace(
        args,
        precomputed=True,
        tie_word_embeddings=False,
        embedding_scale=1.0,
        biases=_sort_biases(biases),
    )


def _sort_biases(biases: Mapping[str, Collection[int]]) -> dict[str, list[int]]:
    return {name: sorted(layers) for name, layers in sorted(biases.items()) if layers}
