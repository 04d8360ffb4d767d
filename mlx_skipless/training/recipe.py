"""What to train and how: sizes, the ladder from vanilla to skipless, initialisation, optimizer.

A recipe is data, from flags or a YAML file. Knows nothing of text, files or the loop.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from ..architectures.config import read_model_args
from ..errors import UserError
from ..network.model import ACTIVATIONS, Model, ModelArgs
from ..network.names import NORMS, PROJECTIONS
from ..network.parts import tensors_of
from ..options import check_choices, flag_name, option, read_options

EMBEDDING_SCALE = 0.02


@dataclass(frozen=True)
class Recipe:
    """All that a training run is made of, its text aside.

    ``block`` "sas" and "sas-p" are He & Hofmann's simplified blocks (2311.01906): shaped attention
    alpha I + beta A - gamma C, no V and P; "sas" serial with a skip around the FFN alone, "sas-p"
    parallel without skips, both with stream norms. They set ``skip``, ``norm``, ``without``,
    ``shaped_attention`` and ``kv_heads`` themselves.
    """

    hidden_size: int = option(256, "width of the stream")
    intermediate_size: int = option(512, "width of the FFN's hidden activations")
    layers: int = option(4, "number of blocks")
    heads: int = option(4, "query heads")
    kv_heads: int = option(2, "key-value heads; must divide the query heads")
    vocab_size: int = option(4096, "entries of the tokenizer that is made")
    context: int = option(256, "tokens of a training window")
    hidden_act: str = option("silu", "the gate's activation", tuple(ACTIVATIONS))
    rope_theta: float = option(10000.0, "base of RoPE")
    tie: bool = option(True, "use the embedding as the head")

    block: str = option("serial", "how a block is wired", ("serial", "parallel", "sas", "sas-p"))
    skip: str = option("none", "skip connections", ("none", "ffn", "both"))
    norm: str = option(
        "qkv", "RMS norms: on projections' outputs (qkv) or on the stream (pre)",
        ("none", "qkv", "pre"),
    )  # fmt: skip
    without: str = option(
        "", "matrices that the network never has", ("", "q", "p", "qp", "v", "vp", "k", "kp")
    )
    final_norm: bool | None = option(
        None, "norm before the head; default: unless --norm qkv without skips has fixed the scale"
    )
    gate_offset: float | None = option(
        1.0, "start of c in (act(gate) + c) * up, or none to leave it out"
    )
    value_skip: float | None = option(
        1.0, "start of alpha, a head's weight on the token's own value, or none to leave it out"
    )
    shaped_attention: bool = option(False, "alpha I + beta A - gamma C in place of A")
    temperature: float = option(1.0, "start of the gain of the queries' norm, with --norm qkv")
    own_token: bool = option(True, "start k as the mean of its group's q")

    steps: int = option(6000, "optimizer steps")
    batch_size: int = option(8, "windows a step")
    learning_rate: float = option(0.02, "Muon's, for matrices, at its highest")
    adam_learning_rate: float = option(3e-3, "AdamW's, for all else, at its highest")
    warmup: int = option(20, "steps of rising rates")
    decay: float = option(0.75, "share of the steps, at the end, in which the rates fall to zero")
    orthogonal_q: float = option(
        0.05,
        "pull of a removable Q towards its orthogonal factor at each step, at the highest rate",
    )
    clip: float = option(1.0, "largest norm of the whole gradient")
    seed: int = option(0, "of the starting weights and the order of the text")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("learning_rate", "adam_learning_rate", "clip", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{flag_name(name)} {getattr(self, name)}: must be above 0")
        for name in ("steps", "batch_size", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must be at least 0")
        if self.warmup < 0 or not 0 <= self.decay <= 1 or not 0 <= self.orthogonal_q <= 1:
            raise UserError("--warmup must be at least 0, --decay and --orthogonal-q from 0 to 1")

    def resolved(self) -> "Recipe":
        """The recipe with what its block implies written out."""
        if self.block not in ("sas", "sas-p"):
            return self
        serial = self.block == "sas"
        return dataclasses.replace(
            self,
            block="serial" if serial else "parallel",
            skip="ffn" if serial else "none",
            norm="pre",
            without="vp",
            shaped_attention=True,
            kv_heads=self.heads,
        )

    def model_args(self) -> ModelArgs:
        """The network.

        Raises:
            UserError: for sizes that fit no network.
        """
        own = self.resolved()
        everywhere = list(range(own.layers))
        final_norm = own.final_norm
        if final_norm is None:
            final_norm = own.norm != "qkv" or own.skip != "none"
        shaped = own.shaped_attention
        config = {
            "model_type": "skipless",
            "hidden_size": own.hidden_size,
            "intermediate_size": own.intermediate_size,
            "num_hidden_layers": own.layers,
            "num_attention_heads": own.heads,
            "num_key_value_heads": own.kv_heads,
            "vocab_size": own.vocab_size,
            "max_position_embeddings": own.context,
            "hidden_act": own.hidden_act,
            "rope_theta": own.rope_theta,
            "block": own.block,
            "skip": own.skip,
            "norm": own.norm,
            "final_norm": final_norm,
            "tie_word_embeddings": own.tie,
            "gains": [*NORMS[own.norm], *(["final"] if final_norm else [])],
            "gate_offset": own.gate_offset is not None,
            "value_skip": own.value_skip is not None or shaped,
            "attention_gain": shaped,
            "uniform_gain": shaped,
            "removed": dict.fromkeys(own.without, everywhere),
        }
        try:
            return read_model_args(config)
        except UserError as error:
            raise UserError(f"these sizes make no network: {error}") from error

    def initialise(self, model: Model) -> None:
        """Fill a network with starting weights, a pure function of ``seed``.

        Matrices are orthogonal and keep the root mean square of what they multiply, so that a
        stream without skips neither grows nor shrinks; with skips, what is added to the stream is
        scaled by 1 / sqrt(number of additions).
        """
        own, args = self.resolved(), model.args
        additions = {"none": 0, "ffn": 1, "both": 2}[own.skip] * own.layers
        branch = additions**-0.5 if additions else 1.0
        keys = iter(mx.random.split(mx.random.key(own.seed), 8 * own.layers + 2))
        new: dict[str, mx.array] = {}
        for name, old in tensors_of(model).items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                new[name] = EMBEDDING_SCALE * mx.random.normal(old.shape, key=next(keys))
            elif old.ndim == 2:
                new[name] = make_orthogonal(*old.shape, key=next(keys))
        for layer in range(own.layers):
            attention, mlp = (f"model.layers.{layer}.{part}" for part in ("self_attn", "mlp"))
            if own.skip == "both":
                last = "v_proj" if "p" in own.without else "o_proj"
                if f"{attention}.{last}.weight" in new:
                    new[f"{attention}.{last}.weight"] *= branch
            if own.skip != "none":
                new[f"{mlp}.down_proj.weight"] *= branch
            if own.shaped_attention and own.norm != "qkv" and f"{attention}.q_proj.weight" in new:
                # beta A = gamma C at the start (He & Hofmann, section 4.1).
                new[f"{attention}.q_proj.weight"] *= 0
            elif own.own_token and own.skip != "both":
                k = make_own_token_keys(new.get(f"{attention}.q_proj.weight"), args)
                if k is not None and f"{attention}.k_proj.weight" in new:
                    new[f"{attention}.k_proj.weight"] = k
            if own.norm == "qkv":
                width = args.num_attention_heads * args.head_dim
                new[f"{attention}.q_norm.weight"] = mx.full((width,), own.temperature)
            if own.gate_offset is not None:
                new[f"{mlp}.gate_offset"] = mx.full((own.intermediate_size,), own.gate_offset)
            if args.value_skip:
                alpha = 1.0 if own.value_skip is None else own.value_skip
                new[f"{attention}.value_skip"] = mx.full((own.heads,), alpha)
            if own.shaped_attention:
                new[f"{attention}.uniform_gain"] = mx.ones((own.heads,))
        model.update(tree_unflatten(list(new.items())))

    def condition(self, model: Model, step: mx.array) -> None:
        """Pull each Q that a merge would invert towards its orthogonal factor.

        Such a Q is redundant: what it loses its neighbours take over. Left alone, its smallest
        singular values wander through zero.

        Args:
            model: after the optimizer's step.
            step: how many steps came before it.
        """
        own = self.resolved()
        if not own.orthogonal_q or own.skip == "both" or own.norm == "pre":
            return
        rate = self.schedule(own.orthogonal_q)(step)
        for layer in model.layers:
            q = layer.self_attn.q_proj
            if q is not None and q.weight.shape[0] == q.weight.shape[1]:
                q.weight = q.weight + rate * (orthogonal_factor(q.weight) - q.weight)

    def schedule(self, peak: float) -> Callable[[mx.array], mx.array]:
        """The learning rate at a step: linear warm-up, ``peak``, linear decay to zero."""
        decay_steps = max(1.0, self.decay * self.steps)

        def rate(step: mx.array) -> mx.array:
            up = (step + 1) / max(1, self.warmup)
            down = (self.steps - step) / decay_steps
            return peak * mx.clip(mx.minimum(up, down), 0.0, 1.0)

        return rate

    def rate(self, step: int) -> float:
        """Muon's learning rate at a step."""
        return self.schedule(self.learning_rate)(mx.array(step)).item()  # type: ignore[return-value]

    def optimizer(self) -> optim.Optimizer:
        """Muon for the matrices, AdamW for embeddings, gains and linear paths."""
        muon = optim.Muon(self.schedule(self.learning_rate), weight_decay=0.0)
        adam = optim.AdamW(
            self.schedule(self.adam_learning_rate), betas=[0.9, 0.95], weight_decay=0.0
        )
        return optim.MultiOptimizer([muon, adam], [_is_matrix])


def _is_matrix(name: str, weight: mx.array) -> bool:
    return any(f"{p}.weight" in name for p in PROJECTIONS.values())


def make_orthogonal(n_out: int, n_in: int, *, key: mx.array) -> mx.array:
    """A random (n_out, n_in) matrix with orthogonal rows or columns that keeps the mean square."""
    tall = mx.random.normal((max(n_out, n_in), min(n_out, n_in)), key=key)
    q, r = mx.linalg.qr(tall, stream=mx.cpu)
    q = q * mx.sign(mx.diag(r))
    q = q if n_out >= n_in else q.T
    return q * math.sqrt(max(n_out, n_in) / n_in)


def orthogonal_factor(x: mx.array) -> mx.array:
    """The orthogonal factor of a square matrix's polar decomposition, to about 0.3.

    Newton and Schulz's iteration with Muon's coefficients (K. Jordan, 2024): singular values end
    between 0.7 and 1.2, the smallest ones too.
    """
    x = x / (mx.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def make_own_token_keys(queries: mx.array | None, args: ModelArgs) -> mx.array | None:
    """K as the mean of its group's Q, so that each token attends to itself first.

    Args:
        queries: (heads * head_dim, hidden), or None where Q is left out: the identity.

    Returns:
        (kv_heads * head_dim, hidden); its rows have the length that Q's have.
    """
    if queries is None:
        queries = mx.eye(args.hidden_size)
    groups = queries.reshape(args.num_key_value_heads, -1, args.head_dim, args.hidden_size)
    mean = groups.mean(axis=1).reshape(-1, args.hidden_size)
    return mean * math.sqrt(groups.shape[1])


def read_recipe(options: Mapping[str, Any]) -> Recipe:
    """A recipe from a mapping, of flags or from YAML.

    Raises:
        UserError: for an unknown key or a value of the wrong type.
    """
    return read_options(Recipe, "recipe", options)
