"""What a conversion removes and what it risks: decisions, no weights.

At each point of the stream (``points.py``) one matrix can be chosen to become the identity, which
is every exact removal (Graef, arXiv 2404.12362, section 2). A plan is these choices.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ..errors import UserError
from ..network.model import ModelArgs
from ..network.names import ATTENTION, EMBEDDING, GAINS, HEAD, MLP, find_readers
from ..network.parts import dtype_name
from ..network.wiring import LETTERS, Point, find_points, parse_layer, parse_letter

PARTS = (*LETTERS, "attention", "ffn")  # that a layer can lack
# Largest noise, relative to a projection's output, that `auto` accepts from rounding the stream in
# its new basis: about what 6-bit weights add.
NOISE_LIMIT = 0.02
# Nats per token that no one notices: a hundredth of a per cent of the perplexity.
NEGLIGIBLE_KL = 1e-4
# Beyond this condition number float64 itself keeps fewer than four digits.
HOPELESS = 1e12
UNIT_ROUNDOFF = {mx.float32: 2.0**-24, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}


@dataclass(frozen=True)
class Conditioning:
    """How much a change of basis by one matrix magnifies noise.

    ``condition`` is the 2-norm condition number; ``amplification`` is |X|_F |X^-1|_F / n, the
    factor by which white noise on the stream in the new basis grows relative to white signal on its
    way back (1 for an orthogonal matrix).
    """

    condition: float
    amplification: float

    @property
    def extra_bits(self) -> int:
        """Bits that matrices around this basis need on top, for the same noise when quantized."""
        return max(0, round(math.log2(min(self.amplification, 2.0**32))))


@dataclass(frozen=True)
class RemovalCost:
    """Of removing a matrix from a network that is quantized, in nats per token.

    Attributes:
        removed: KL of the source without it, the matrices around it quantized against text.
        rounded: KL of the source with it, it and those around it quantized to nearest.
    """

    removed: float
    rounded: float

    @property
    def pays(self) -> bool:
        """Whether it costs no more than quantization alone does at this place, or nothing."""
        return self.removed <= max(self.rounded, NEGLIGIBLE_KL)


@dataclass(frozen=True)
class Plan:
    """One conversion.

    Attributes:
        before: the network that the removals start from.
        merged: the network behind them, all but the table.
        eliminated: for each point that gets a new basis, the matrix that becomes the identity.
        folded: norms whose gains go into the matrices behind them.
        gone: the removed matrices' layers by the paper's letter.
        dropped: the layers whose whole "attention" or "ffn" goes.
        notes: what the user should know, one line each.
        table: whether layer 0's projections become a table by token.
        centred: whether all that writes the stream has its mean taken out, so that LayerNorms
            become RMS norms.
    """

    before: ModelArgs
    merged: ModelArgs
    eliminated: dict[int, str]
    folded: tuple[str, ...]
    gone: dict[str, list[int]]
    notes: tuple[str, ...]
    dropped: Mapping[str, list[int]] = field(default_factory=dict)
    table: bool = False
    centred: bool = False

    @property
    def after(self) -> ModelArgs:
        """The network that comes out."""
        return with_table(self.merged) if self.table else self.merged


def strip_skips(args: ModelArgs) -> ModelArgs:
    """The skipless version of a pre-norm network: no skips, weightless norms on the projections.

    Raises:
        UserError: if it is not a pre-norm network.
    """
    if args.precomputed:
        raise UserError("--skipless: the first layer is a table; convert the model that it is of")
    if args.norm != "pre":
        raise UserError(
            "--skipless is for models with skips and norms; this one is skipless: drop it"
        )
    bare = _without_norms(args, GAINS["pre"])
    return replace(bare, skip="none", norm="qkv", shared_norm=False)


def _without_norms(args: ModelArgs, folded: Collection[str]) -> ModelArgs:
    """The network with these norms' gains and biases in the matrices behind them."""
    biases = {name: {*layers} for name, layers in args.biases.items()}
    for norm in folded:
        for name in find_readers(args, norm) if norm in args.shifts else ():
            part = "attention" if name in ATTENTION else "ffn"
            if name in ATTENTION[:3] or name in args.ffn_readers:
                there = [i for i in range(args.num_hidden_layers) if not args.lacks(part, i)]
                biases[name] = biases.get(name, set()) | {*there}
    return replace(
        args,
        biases={name: sorted(layers) for name, layers in sorted(biases.items()) if layers},
        gains=[gain for gain in args.gains if gain not in folded],
        shifts=[shift for shift in args.shifts if shift not in folded],
        head_bias=args.head_bias or ("final" in folded and "final" in args.shifts),
    )


def with_table(args: ModelArgs) -> ModelArgs:
    """The network with a table in the place of its first layer's projections."""
    gone = {*ATTENTION[:3], *(MLP if args.block == "parallel" else ())}
    biases = {
        name: [layer for layer in layers if layer or name not in gone]
        for name, layers in args.biases.items()
    }
    return replace(
        args,
        precomputed=True,
        tie_word_embeddings=False,
        embedding_scale=1.0,
        biases={name: layers for name, layers in biases.items() if layers},
    )


def _shape_refusal(args: ModelArgs, letter: str) -> str | None:
    """Why the shape of Q, K, V or P forbids its removal; None if it does not."""
    why = _misshapen(args, letter)
    return why and f"{why}: {_instead(args)}"


def _misshapen(args: ModelArgs, letter: str) -> str | None:
    name, d = letter.upper(), args.hidden_size
    width = args.num_attention_heads * args.head_dim
    kv_width = args.num_key_value_heads * args.head_dim
    if letter in "kv" and kv_width != d:
        return (
            f"{name} maps {d} to {kv_width} and has no inverse ({args.num_key_value_heads} "
            f"key-value heads, {args.num_attention_heads} query heads)"
        )
    if letter == "q" and width < d:
        return f"Q narrows the stream from {d} to {width} and K and V need what it drops"
    if letter == "q" and width > d:
        return (
            f"Q widens the stream from {d} to {width}, so the matrices that feed it would grow by "
            "more than Q weighs"
        )
    if letter == "p" and width != d and (args.block == "parallel" or args.skip == "ffn"):
        return f"P maps {width} to {d} and has no inverse, which this block needs"
    return None


def _instead(args: ModelArgs) -> str:
    """What can go from a network of which something else cannot."""
    free = [letter for letter in "qkvp" if _misshapen(args, letter) is None]
    readers = ["q"] if "q" in free else [letter for letter in free if letter != "p"]
    writers = ["p"] if "p" in free and (not readers or _p_saves(args) > 0) else []
    together = bool(readers and writers) and args.block == "serial" and args.skip != "ffn"
    ways = [f"{reader}p" for reader in readers] if together else [*readers, *writers]
    if not ways:
        return "nothing can go"
    what = " or ".join(way[0].upper() for way in ways) + (" and P" if together else "")
    first = "--skipless " if args.skip == "both" and args.norm == "pre" else ""
    return f"only {what} can go, {first}--remove {' or --remove '.join(ways)}"


def _p_saves(args: ModelArgs) -> int:
    """Weights that removing one layer's P saves (negative: what it costs)."""
    width = args.num_attention_heads * args.head_dim
    inner = max(args.num_local_experts, 1) * args.intermediate_size * (2 if args.gated else 1)
    return width * args.hidden_size - (width - args.hidden_size) * (inner + args.num_local_experts)


def make_plan(
    args: ModelArgs,
    *,
    remove: str = "auto",
    skipless: bool = False,
    fold_norms: bool = False,
    conditioning: Mapping[str, Conditioning] | None = None,
    dtype: mx.Dtype = mx.float32,
    quantized: bool = False,
    costs: Mapping[str, RemovalCost] | None = None,
    dropped: Mapping[str, list[int]] | None = None,
    precompute: bool = False,
    stock: bool = False,
) -> Plan:
    """Decide what goes.

    Args:
        args: the source network.
        remove: "auto", "none" or the letters to remove; letters are obeyed or refused.
        skipless: strip skips and stream norms first.
        fold_norms: put every norm's gain into the matrices behind it.
        conditioning: measured, by module path; None where no weights are at hand.
        dtype: of the result; decides with ``conditioning`` what `auto` dares.
        quantized: whether the result gets quantized, against text.
        costs: measured, of removals by module path; `auto` leaves in place what does not pay.
        dropped: layers whose whole "attention" or "ffn" goes.
        precompute: make the first layer's projections a table.
        stock: stay a network of mlx-lm's own, which wants every gain and bias that it has and no
            more: folded ones are written as ones and zeros.

    Raises:
        UserError: if an explicit removal is impossible.
    """
    before = strip_skips(args) if skipless else args
    found = find_points(before)
    notes: list[str] = []
    eliminated: dict[int, str] = {}
    if remove == "auto":
        eliminated = _choose(
            before, found, notes, conditioning, dtype, quantized, costs or {}, precompute
        )
    elif remove != "none":
        eliminated = _obey(before, found, notes, remove, conditioning or {})
    gone: dict[str, list[int]] = {}
    for where in eliminated.values():
        gone.setdefault(parse_letter(where), []).append(parse_layer(where))
    gone = {letter: sorted(gone[letter]) for letter in LETTERS if letter in gone}
    folded = _folded(args, before, fold_norms, stock)
    centred = not stock and _centred(args, before, folded)
    if stock:
        merged = before
        foldable = _folded(args, before, fold_norms, stock=False)
        if kept := [norm for norm in foldable if norm not in folded]:
            notes.append(
                f"norm gains stay before the {' and the '.join(kept).replace('final', 'head')}: "
                "mlx-lm's own network has no bias there to take the norm's"
            )
    else:
        merged = _merged(before, found, eliminated, gone, folded, conditioning or {}, quantized)
        merged = _simplified(merged, centred)
    dropped = {part: layers for part, layers in (dropped or {}).items() if layers}
    merged = replace(merged, removed=_united(merged.removed, dropped))
    return Plan(
        before, merged, eliminated, folded, gone, tuple(notes), dropped, precompute, centred
    )


def _united(*maps: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Layers by part, of some such maps."""
    parts = {part: sorted({i for of in maps for i in of.get(part, ())}) for part in PARTS}
    return {part: layers for part, layers in parts.items() if layers}


def _candidates(point: Point) -> dict[str, str]:
    """What could become the identity at a point: module paths by the paper's letter."""
    found = [(x, w) for x in "qkv" for w in point.consumers if w.endswith(LETTERS[x])]
    found += [("p", w) for w in point.producers if w.endswith(LETTERS["p"])]
    return dict(found)


def _obstacle(args: ModelArgs, found: list[Point], index: int, where: str) -> str | None:
    """Why the matrix at ``where`` cannot become the identity at a point; None if it can."""
    point = found[index]
    if point.pinned:
        return point.pinned
    if parse_layer(where) in args.biases.get(where.rpartition(".")[2], ()):
        if point.head:
            return "its bias would need a bias on the head"
        if args.tie_word_embeddings and index == 0:
            return "its bias would reach the head through the tied embedding"
    return None


def _obey(
    args: ModelArgs,
    found: list[Point],
    notes: list[str],
    letters: str,
    conditioning: Mapping[str, Conditioning],
) -> dict[int, str]:
    """An explicit removal: all matrices of these letters but at a pinned end, or a refusal."""
    for letter in letters:
        if (why := _shape_refusal(args, letter)) is not None:
            raise UserError(f"--remove {letters}: {why}")
    eliminated: dict[int, str] = {}
    kept: dict[str, str] = {}
    for index, point in enumerate(found):
        wanted = {x: where for x, where in _candidates(point).items() if x in letters}
        kept |= {w: why for w in wanted.values() if (why := _obstacle(args, found, index, w))}
        free = {x: where for x, where in wanted.items() if where not in kept}
        if len(free) > 1:
            names = " and ".join(letter.upper() for letter in free)
            raise UserError(
                f"--remove {letters}: {names} meet at one point of this model, where only one "
                f"matrix can go (block {args.block}, skip {args.skip}): "
                f"--remove {' or --remove '.join(free)}"
            )
        if free:
            eliminated[index] = next(iter(free.values()))
    for letter in letters:
        if not any(parse_letter(where) == letter for where in eliminated.values()):
            why = next(
                (w for x, w in kept.items() if parse_letter(x) == letter), "it is gone already"
            )
            raise UserError(
                f"--remove {letters}: {letter.upper()} cannot go, {why}: {_way_out(args)}"
            )
    for where in eliminated.values():
        measured = conditioning.get(where)
        if measured is not None and not measured.condition < HOPELESS:
            raise UserError(
                f"--remove {letters}: {parse_letter(where).upper()} of layer {parse_layer(where)} "
                f"is singular (condition number {measured.condition:.1e}) and has no inverse: "
                "--remove auto takes what can go"
            )
    if args.tie_word_embeddings and {0, len(found) - 1} <= eliminated.keys():
        where = eliminated.pop(len(found) - 1)
        kept[where] = "the tied embedding gives the first and the last point one basis"
    for where, why in kept.items():
        notes.append(f"{parse_letter(where).upper()} of layer {parse_layer(where)} stays: {why}")
    if "p" in letters and _p_saves(args) < 0:
        notes.append(f"removing P costs {-_p_saves(args):,} weights a layer at these shapes")
    return eliminated


def _way_out(args: ModelArgs) -> str:
    if args.norm == "pre" and args.skip == "both":
        return (
            "--skipless makes the skipless network of it (no language model until it is trained); "
            "--fold-norms is exact as it stands"
        )
    return "--remove auto takes what can go"


def _choose(
    args: ModelArgs,
    found: list[Point],
    notes: list[str],
    conditioning: Mapping[str, Conditioning] | None,
    dtype: mx.Dtype,
    quantized: bool,
    costs: Mapping[str, RemovalCost],
    precompute: bool,
) -> dict[int, str]:
    """`auto`: at each point the matrix whose removal saves weights at the least noise."""
    eliminated: dict[int, str] = {}
    too_noisy: dict[str, list[str]] = {}
    for index, point in enumerate(found):
        linked = args.tie_word_embeddings and index == len(found) - 1 and 0 in eliminated
        if linked or point.pinned or (precompute and index == 0):  # a table saves what reads it
            continue
        free = {
            letter: where
            for letter, where in _candidates(point).items()
            if _shape_refusal(args, letter) is None and not _obstacle(args, found, index, where)
        }
        if point.producers == list(free.values()):  # P alone writes here: no inverse, no noise
            if _p_saves(args) > 0:
                eliminated[index] = free["p"]
            continue
        noise = {}
        for letter, where in free.items():
            measured = (conditioning or {}).get(where, Conditioning(1, 1))
            noise[letter] = measured.amplification * UNIT_ROUNDOFF[dtype]
            if quantized:  # what reads the point is fitted again, but nothing fits a tied embedding
                tied = _at_tied_embedding(args, found, index)
                noise[letter] = math.inf if tied and measured.extra_bits else 0
            if not measured.condition < HOPELESS:
                noise[letter] = math.inf
        if not noise:
            continue
        # In the order q, k, v, p, unless another is clearly better conditioned.
        best = next(letter for letter in noise if noise[letter] <= 4 * min(noise.values()))
        cost = costs.get(free[best])
        if cost is not None and not cost.pays:
            notes.append(
                f"{best.upper()} of layer {parse_layer(free[best])} stays: quantized without it "
                f"the model would be {cost.removed:.2g} nats per token from its source by this "
                f"alone, with it {cost.rounded:.2g} "
                f"(--remove {'qp' if best == 'q' else best} insists)"
            )
        elif noise[best] <= NOISE_LIMIT:
            eliminated[index] = free[best]
        else:
            too_noisy.setdefault(best, []).append(str(parse_layer(free[best])))
    for letter, layers in too_noisy.items():
        why = (
            "the tied embedding would need more bits than it saves"
            if quantized
            else f"their inverses magnify the rounding of {dtype_name(dtype)} too much"
        )
        notes.append(
            f"{letter.upper()} of layer{'s' if len(layers) > 1 else ''} {', '.join(layers)} stays: "
            f"{why} (--remove "
            f"{'qp' if letter == 'q' else letter} insists)"
        )
    if conditioning is None and eliminated:
        notes.append("chosen by arithmetic alone: no weights at hand to measure conditioning on")
    if not eliminated and args.norm == "pre":
        notes.append("no exact removal of Q or P exists for a model with skips and norms")
    elif not eliminated and not notes and (shape := _misshapen(args, "q")):
        wider = "; without P the FFN would read wider heads" if _p_saves(args) <= 0 else ""
        notes.append(f"nothing that saves weights can go: {shape}{wider}")
    return eliminated


def _folded(source: ModelArgs, before: ModelArgs, fold_norms: bool, stock: bool) -> tuple[str, ...]:
    """Norms whose gains and biases go into the matrices behind them.

    Only those that must, or all if asked: a gain in a matrix widens the range of the weights that
    share a scale once it is quantized, and weighs next to nothing outside.
    """
    wanted = []
    if before is not source:
        wanted += [*GAINS["pre"]]
    elif fold_norms:  # where Q, K or V is gone, no matrix is there to take its gain
        wanted += [] if any(source.removed.get(part) for part in "qkv") else ["attention"]
        wanted += ["ffn"]
    if fold_norms:
        wanted += ["hidden"]
        wanted += [] if source.removed.get("p") else ["v"]  # P absorbs it
    if fold_norms and not source.tie_word_embeddings:
        wanted += ["final"]
    there = [norm for norm in wanted if norm in (*source.gains, *source.shifts)]
    if not stock:
        return tuple(there)
    return tuple(
        n
        for n in there
        if _without_norms(source, [n]).biases == source.biases
        and _without_norms(source, [n]).head_bias == source.head_bias
    )


def _centred(source: ModelArgs, before: ModelArgs, folded: Collection[str]) -> bool:
    """Whether every LayerNorm can become an RMS norm.

    The mean that a LayerNorm takes out can be taken out of whatever writes the stream (Ashkboos et
    al., SliceGPT, arXiv 2401.15024, section 3.2). A tied head would see it.
    """
    return (
        before is source
        and source.norm == "pre"
        and source.norm_type == "layer"
        and source.skip != "none"
        and source.final_norm
        and not source.tie_word_embeddings
        and not source.precomputed
        and {*source.gains, *source.shifts} <= {*folded, *GAINS["qkv"]}
    )


def _simplified(args: ModelArgs, centred: bool) -> ModelArgs:
    """The network without what its norms no longer need."""
    args = replace(args, norm_type="rms") if centred else args
    weightless = not {*args.gains, *args.shifts} & GAINS["pre"].keys()
    once = args.block == "parallel" and args.norm == "pre" and weightless
    return replace(args, shared_norm=args.shared_norm or once)


def _merged(
    before: ModelArgs,
    found: list[Point],
    eliminated: dict[int, str],
    gone: dict[str, list[int]],
    folded: tuple[str, ...],
    conditioning: Mapping[str, Conditioning],
    quantized: bool,
) -> ModelArgs:
    bare = _without_norms(before, folded)
    biases = {name: set(layers) for name, layers in bare.biases.items()}
    extra_bits = dict(before.extra_bits)
    for index, where in eliminated.items():
        around = find_mixed(before, found, index, where)
        name, layer = where.rpartition(".")[2], parse_layer(where)
        if layer in biases.get(name, ()):
            # The bias moves with the stream: into what writes it first, out of what reads it.
            biases[name].discard(layer)
            owner = found[index].producers[0]
            for moved in [owner, *found[index].consumers]:
                if moved not in (where, EMBEDDING):
                    biases.setdefault(moved.rpartition(".")[2], set()).add(parse_layer(moved))
        # Calibration needs no more bits, but for an embedding that is read at both its ends.
        fitted = quantized and not _at_tied_embedding(before, found, index)
        if where in conditioning and conditioning[where].extra_bits and not fitted:
            for matrix in around:
                previous = extra_bits.get(matrix, 0)
                extra_bits[matrix] = max(previous, conditioning[where].extra_bits)
    return replace(
        bare,
        removed=_united(before.removed, gone),
        biases={name: sorted(layers) for name, layers in sorted(biases.items()) if layers},
        extra_bits=extra_bits,
    )


def isolate_removal(plan: Plan, index: int) -> Plan:
    """The plan of one removal of ``plan``, that at a point."""
    found, where = find_points(plan.before), plan.eliminated[index]
    eliminated, gone = {index: where}, {parse_letter(where): [parse_layer(where)]}
    merged = _merged(plan.before, found, eliminated, gone, plan.folded, {}, quantized=True)
    return replace(
        plan, eliminated=eliminated, gone=gone, merged=merged, table=False, centred=False
    )


def _at_tied_embedding(args: ModelArgs, found: list[Point], index: int) -> bool:
    return args.tie_word_embeddings and index in (0, len(found) - 1)


def find_mixed(args: ModelArgs, found: list[Point], index: int, where: str) -> list[str]:
    """Matrices whose values a change of basis mixes through an inverse (none: P leaving alone)."""
    touched = [found[index]]
    if _at_tied_embedding(args, found, index):
        touched = [found[0], found[-1]]
    if touched[0].producers == [where]:
        return []
    matrices = [m for point in touched for m in (*point.producers, *point.consumers) if m != where]
    return [m for m in matrices if m != HEAD or not args.tie_word_embeddings]


def find_measurable(args: ModelArgs, remove: str) -> list[str]:
    """Matrices whose inverse a removal may need, in the order of the stream."""
    letters = "" if remove == "none" else "qkvp" if remove == "auto" else remove
    wanted = []
    for point in find_points(args):
        for letter, where in _candidates(point).items():
            alone = point.producers == [where]
            possible = point.pinned is None and _shape_refusal(args, letter) is None
            if letter in letters and possible and not alone:
                wanted.append(where)
    return wanted
