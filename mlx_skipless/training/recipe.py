"""What to train or heal, how, and at what pace: data, from flags or a YAML file.

This module imports neither MLX nor transformers, so that ``train --help`` and ``heal --help`` are
quick.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from ..constants import LARGEST_REAL
from ..errors import BadArgument
from ..options import (
    check_above_zero,
    check_choice,
    check_choices,
    check_least,
    check_seed,
    check_types,
    flag_name,
    option,
)

# As network.model has them, which cannot be imported without MLX.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
PROJECTION_NORMS = ("q", "k", "v", "kv", "heads", "hidden")
_NO_V_AND_P: dict[str, Any] = {
    "norm": "pre",
    "without": "vp",
    "shaped_attention": True,
    "query_skip": None,
    "head_skip": None,
    "output_skip": None,
}
SIMPLIFIED = {
    "sas": {"block": "serial", "skip": "ffn", **_NO_V_AND_P},
    "sas-p": {"block": "parallel", "skip": "none", **_NO_V_AND_P},
}
HEALING_RATES = {"lora": 1e-3, "full": 5e-5}
MOST_LAYERS = 10_000
LARGEST = 1 << 31  # MLX's sizes along an axis and numbers of steps are 32-bit


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run but its text and its pace.

    ``block`` "sas" and "sas-p" are He & Hofmann's simplified blocks (2311.01906): shaped attention
    alpha I + beta A - gamma C, no V and P; "sas" serial with a skip around the FFN alone, "sas-p"
    parallel without skips, both with stream norms. They set ``skip``, ``norm``, ``without``,
    ``shaped_attention`` and ``kv_heads`` themselves.
    """

    hidden_size: int = option(256, "width of the stream")
    intermediate_size: int = option(512, "width of the FFN's hidden activations")
    layers: int = option(12, "number of blocks")
    heads: int = option(8, "query heads")
    kv_heads: int = option(2, "key-value heads; must divide the query heads")
    vocab_size: int = option(4096, "entries of the tokenizer that is made; a given one has its own")
    context: int = option(512, "tokens of a training window")
    hidden_act: str = option("silu", "the gate's activation", ACTIVATIONS)
    rope_theta: float = option(10000.0, "base of RoPE")
    tie: bool = option(True, "use the embedding as the head")

    block: str = option(
        "serial",
        "how a block is wired; sas and sas-p have skips, norms and matrices of their own",
        ("serial", "parallel", "sas", "sas-p"),
    )
    skip: str = option("none", "skip connections", ("none", "ffn", "both"))
    norm: str = option(
        "qkv", "RMS norms: on projections' outputs (qkv) or on the stream (pre)",
        ("none", "qkv", "pre"),
    )  # fmt: skip
    norms: str = option(
        "q,kv,heads",
        "which of q, k, v, kv (all queries; K and V read them then), heads (what P reads) and "
        "hidden (what down reads) --norm qkv acts on",
    )
    without: str = option(
        "", "matrices that the network never has", ("", "q", "p", "qp", "v", "vp", "k", "kp")
    )
    final_norm: bool | None = option(
        None, "norm before the head; default: unless --norm qkv without skips has fixed the scale"
    )
    gate_offset: float | None = option(
        1.0,
        "start of c in (act(gate) + c) * up, with a head skip in the last layer and 0 elsewhere, "
        "or none to leave it out",
    )
    query_skip: float | None = option(
        1.0, "start of alpha, a head's weight on the token's own query, or none to leave it out"
    )
    head_skip: float | None = option(
        1.0,
        "start of gamma, a query's weight on the heads' outputs of the layer before, or none to "
        "leave it out",
    )
    output_skip: float | None = option(
        1.0,
        "with a head skip: start of delta, the weight of the last layer's heads in what the "
        "network's head reads, or none to leave it out",
    )
    skip_width: str = option(
        "head", "whether alpha, gamma and delta are a number per head or per channel",
        ("head", "channel"),
    )  # fmt: skip
    learn_skips: bool | None = option(
        None, "train alpha, beta, gamma and delta too; default: unless K and V read the queries"
    )
    attention_gain: float | None = option(
        None,
        "start of beta, a head's weight on its attention; none: 2 with a head skip, "
        "1 / sqrt(layers) with a query skip alone; else, and where K and V read the queries and v "
        "has no norm, there is no beta",
    )
    value_skip: float | None = option(
        None, "start of a head's weight on the token's own value, or none to leave it out"
    )
    shaped_attention: bool = option(False, "alpha I + beta A - gamma C in place of A")
    temperature: float = option(1.0, "start of the gain of the queries' norm, with --norm qkv")
    own_token: bool = option(True, "start k as the mean of its group's q")
    near_identity: bool = option(
        True,
        "start an FFN on whose path alone the stream depends near the identity: down as up's "
        "transpose, small gates",
    )
    embedding_scale: float = option(
        50.0, "times the embedding, which starts at 0.02, where it enters the stream"
    )

    steps: int = option(6000, "optimizer steps")
    batch_size: int = option(8, "windows a step")
    learning_rate: float | None = option(
        None,
        "Muon's, for matrices, at its highest; none: 0.02, where K and V read the stream with a "
        "head skip 0.01 at 12 layers (0.02 without Q and P) and less the deeper, with a query skip "
        "alone 0.005",
    )
    adam_learning_rate: float = option(3e-3, "AdamW's, for all else, at its highest")
    warmup: int = option(20, "steps of rising rates")
    decay: float = option(0.75, "share of the steps, at the end, in which the rates fall to zero")
    orthogonal_q: float = option(
        0.05,
        "pull of a Q that its removal inverts towards its orthogonal factor at each step, at the "
        "highest rate",
    )
    clip: float = option(1.0, "largest norm of the whole gradient")
    seed: int = option(0, "of the starting weights and the order of the text")

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        _check_sizes(self)
        _check_ranges(self)
        _check_heads(self)
        _check_block(self)
        for norm in self.norms.split(","):
            check_choice("--norms", norm, PROJECTION_NORMS)
        check_seed(self.seed)

    @property
    def reads_queries(self) -> bool:
        """Whether K and V read a norm of the queries in place of the stream."""
        return self.norm == "qkv" and "kv" in self.norms.split(",")

    @property
    def weighs_by_values(self) -> bool:
        """Whether V, without a norm behind it, is the attention's weight."""
        return self.reads_queries and "v" not in self.norms.split(",")

    @property
    def peak(self) -> float:
        """The highest learning rate of the matrices.

        With a head skip it falls with depth as measured at 6, 12, 24 and 32 layers, and is twice as
        high without Q and P, measured at 12 (``docs/training.md``): of two matrices in a row both
        move. With skips on the stream, or K and V that read what the skips carry, one rate serves
        all.
        """
        return _choose_rate(self.resolve()) if self.learning_rate is None else self.learning_rate

    def resolve(self) -> "Recipe":
        """Return the recipe with what other settings imply written out.

        These are ``block`` "sas" or "sas-p", and the lack of a head skip.
        """
        if self.block in SIMPLIFIED:
            return dataclasses.replace(self, kv_heads=self.heads, **SIMPLIFIED[self.block])
        return self if self.head_skip is not None else dataclasses.replace(self, output_skip=None)


@dataclass(frozen=True)
class Treatment:
    """All settings of a distillation but its models, its text and its pace."""

    fine_tune_type: str = option(
        "lora", "low-rank changes to the matrices, or all weights", ("lora", "full")
    )
    rank: int = option(16, "of the low-rank changes")
    steps: int = option(400, "optimizer steps")
    batch_size: int = option(4, "windows a step")
    context: int = option(256, "tokens of a window")
    learning_rate: float | None = option(
        None, "Adam's, at its highest; default: 1e-3 for lora, 5e-5 for full"
    )
    warmup: int = option(20, "steps of rising rate; then it falls to zero")
    clip: float = option(1.0, "largest norm of the whole gradient")
    sampled_tokens: int = option(65536, "text that the original speaks where no --data is given")
    seed: int = option(0, "of that text, its order and the low-rank changes")

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        _check_sizes(self)
        _check_counts(self, "rank", "steps", "batch_size", "context", "sampled_tokens")
        check_above_zero("--learning-rate", self.peak)
        check_above_zero("--clip", self.clip)
        check_seed(self.seed)
        check_least("--warmup", self.warmup, 0)

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        rate = self.learning_rate
        return HEALING_RATES[self.fine_tune_type] if rate is None else rate


Options = TypeVar("Options", Recipe, Treatment)


def fix_rate(options: Options) -> Options:
    """Write a default rate out: whatever version resumes the run, it goes on at the same rate."""
    return dataclasses.replace(options, learning_rate=options.peak)


def _check_counts(options: Recipe | Treatment, *names: str) -> None:
    for name in names:
        check_least(flag_name(name), getattr(options, name))


def _choose_rate(own: "Recipe") -> float:
    if own.reads_queries or (own.query_skip is None and own.head_skip is None):
        return 0.02
    with_head_skip = 0.02 if {*"qp"} <= {*own.without} else 0.01
    at_12_layers = 0.005 if own.head_skip is None else with_head_skip
    return at_12_layers * (12 / own.layers) ** 0.6


def _check_ranges(recipe: "Recipe") -> None:
    sizes = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "vocab_size")
    _check_counts(recipe, *sizes, "steps", "batch_size", "context")
    if recipe.layers > MOST_LAYERS:
        raise BadArgument(f"--layers {recipe.layers}: must be at most {MOST_LAYERS:,}")
    for name in ("adam_learning_rate", "clip", "temperature", "embedding_scale", "rope_theta"):
        check_above_zero(flag_name(name), getattr(recipe, name))
    check_above_zero("--learning-rate", recipe.learning_rate)
    if recipe.rope_theta >= LARGEST_REAL:
        raise BadArgument(f"--rope-theta {recipe.rope_theta}: must be below {LARGEST_REAL:g}")
    if recipe.warmup < 0 or not 0 <= recipe.decay <= 1 or not 0 <= recipe.orthogonal_q <= 1:
        raise BadArgument("--warmup must be at least 0, --decay and --orthogonal-q from 0 to 1")


def _check_heads(recipe: "Recipe") -> None:
    heads, hidden = recipe.heads, recipe.hidden_size
    if hidden % heads:
        raise BadArgument(f"--heads {heads}: must divide --hidden-size {hidden}")
    if (width := hidden // heads) % 2:
        raise BadArgument(
            f"--heads {heads}: of --hidden-size {hidden} each gets {width}, an odd number, and "
            "RoPE needs pairs: give another number"
        )
    if heads % recipe.kv_heads:
        raise BadArgument(f"--kv-heads {recipe.kv_heads}: must divide --heads {heads}")
    own = recipe.block not in SIMPLIFIED
    if own and {*"kv"} & {*recipe.without} and recipe.kv_heads < heads:
        raise BadArgument(
            f"--without {recipe.without}: the stream cannot take the place of fewer key-value "
            f"heads than heads: give --kv-heads {heads}"
        )


def _check_block(recipe: "Recipe") -> None:
    """Refuse what a simplified block would override: anything but the default and its own."""
    usual = {one.name: one.default for one in dataclasses.fields(recipe)}
    for name, own in SIMPLIFIED.get(recipe.block, {}).items():
        given = getattr(recipe, name)
        if name != "block" and given not in (usual[name], own):
            raise BadArgument(
                f"{flag_name(name)} {given}: --block {recipe.block} has {flag_name(name)} "
                f"{'none' if own is None else own} of its own"
            )


def _check_sizes(options: "Recipe | Treatment | Pace") -> None:
    """Check that MLX can take each whole number but the seed, and that other numbers are finite."""
    for one in dataclasses.fields(options):
        value = getattr(options, one.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise BadArgument(f"{flag_name(one.name)} {value}: must be a finite number")
        if isinstance(value, int) and abs(value) >= LARGEST and one.name != "seed":
            raise BadArgument(f"{flag_name(one.name)} {value}: must be below {LARGEST:,}")


@dataclass(frozen=True)
class Pace:
    """How often, in steps, a run logs, evaluates and saves; 0: at the end.

    The defaults are those of ``heal``.
    """

    log_every: int = option(10, "steps from one line of the log to the next")
    eval_every: int = option(100, "steps from one evaluation to the next")
    save_every: int = option(100, "steps from one checkpoint to the next")
    eval_tokens: int = option(4096, "held-out tokens of an evaluation on the way")

    def __post_init__(self) -> None:
        check_types(self)
        _check_sizes(self)
        for one in dataclasses.fields(self):
            if getattr(self, one.name) < 0:
                raise BadArgument(f"{flag_name(one.name)}: must be at least 0")


@dataclass(frozen=True)
class TrainingPace(Pace):
    """How often, in steps, ``train`` logs, evaluates, saves and writes a sample; 0: at the end."""

    log_every: int = option(20, "steps from one line of the log to the next")
    eval_every: int = option(200, "steps from one evaluation to the next")
    save_every: int = option(200, "steps from one checkpoint to the next")
    eval_tokens: int = option(65536, "held-out tokens of an evaluation; the last takes all")
    sample_every: int = option(500, "steps from one sample to the next")
