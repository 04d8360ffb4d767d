"""Float64 NumPy forward pass of source skipless checkpoints (DESIGN §6), the tests' authority.

It shares no code with mlx_skipless and knows nothing of removals. Weights have Hugging Face's
names and shapes (out, in).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Config = dict[str, Any]
Weights = dict[str, np.ndarray]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def logits(config: Config, weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """Logits (batch, length, vocab), float64, of tokens (batch, length), int."""
    weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    x, heads = embedding[tokens] * config.get("embedding_scale", 1.0), None
    for layer in range(config["num_hidden_layers"]):
        x, heads = block_and_heads(config, weights, layer, x, heads)
    if config["final_norm"]:
        x = _stream_norm(config, weights, "model.norm", x)
    head = embedding if config["tie_word_embeddings"] else weights["lm_head.weight"]
    return (x @ head.T + weights.get("lm_head.bias", 0.0)) * config.get("logit_scale", 1.0)


def block(config: Config, weights: Weights, layer: int, x: np.ndarray) -> np.ndarray:
    """One decoder block on the stream, (batch, length, hidden) to the same shape."""
    return block_and_heads(config, weights, layer, x, None)[0]


def block_and_heads(
    config: Config, weights: Weights, layer: int, x: np.ndarray, before: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """One decoder block on the stream and what `attend` gave in the layer before, if it has one.

    Returns the same of this block.
    """
    x, heads = _sub_layers(config, weights, layer, x, before)
    delta = weights.get(f"model.layers.{layer}.self_attn.output_skip")
    if delta is not None:
        channels = np.repeat(delta, heads.shape[-1] // len(delta))
        x = x + channels * heads
    return x, heads


def _sub_layers(
    config: Config, weights: Weights, layer: int, x: np.ndarray, before: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """`block_and_heads` without the output skip."""
    kind, skip = config["block"], config.get("skip", "none")
    if kind not in ("serial", "parallel") or skip not in ("none", "ffn", "both"):
        raise ValueError(f"block {kind!r} with skip {skip!r}")
    has_attention = any(f"model.layers.{layer}.self_attn." in name for name in weights)
    has_ffn = any(f"model.layers.{layer}.mlp." in name for name in weights)
    heads = attended = None
    if has_attention:
        heads = attend(config, weights, layer, x, before)
        attended = _project_heads(config, weights, layer, heads)
    if kind == "parallel":
        out = feed_forward(config, weights, layer, x) if has_ffn else np.zeros_like(x)
        out = out if attended is None else out + attended
        return (out if skip == "none" else x + out), heads
    if attended is not None:
        x = x + attended if skip == "both" else attended
    if not has_ffn:
        return x, heads
    out = feed_forward(config, weights, layer, x)
    return (out if skip == "none" else x + out), heads


def attention(
    config: Config, weights: Weights, layer: int, x: np.ndarray, before: np.ndarray | None = None
) -> np.ndarray:
    """The attention sub-layer with its stream norm, without skip; (batch, length, hidden).

    Arguments are those of `attend`.
    """
    heads = attend(config, weights, layer, x, before)
    return _project_heads(config, weights, layer, heads)


def attend(
    config: Config, weights: Weights, layer: int, x: np.ndarray, before: np.ndarray | None
) -> np.ndarray:
    """The heads' outputs side by side, before their norm, (batch, length, heads * head_dim).

    `x` is what the attention sub-layer reads, (batch, length, hidden), and `before` what this gave
    in the layer before, None where that has no attention.
    """
    prefix = f"model.layers.{layer}.self_attn."
    norm, eps = _norm(config), config["rms_norm_eps"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if norm == "pre":
        x = _stream_norm(config, weights, f"model.layers.{layer}.input_layernorm", x)

    def split(y: np.ndarray, count: int) -> np.ndarray:
        """Heads (batch, length, count, head_dim) of what lies side by side."""
        return y.reshape(*y.shape[:2], count, head_dim(config))

    def normed(y: np.ndarray, name: str) -> np.ndarray:
        """Heads (batch, count, length, head_dim) behind their norm, if they have one."""
        if _has_norm(config, name) or (config.get("qk_norm") and name != "v"):
            gain = weights.get(f"{prefix}{name}_norm.weight")
            # A gain is of all heads, or of one and the same for each.
            y = rms_norm(y, None if gain is None else gain.reshape(-1, head_dim(config)), eps)
        return y.transpose(0, 2, 1, 3)

    def vector(name: str, absent: float) -> np.ndarray:
        """A number for each head or one for each of its channels, (heads, 1 or head_dim)."""
        return np.reshape(weights.get(f"{prefix}{name}", np.full(heads, absent)), (heads, -1))

    query = split(_linear(weights, f"{prefix}q_proj", x), heads)
    if before is not None:
        query = query + vector("head_skip", 0.0) * split(before, heads)
    if _has_norm(config, "kv"):
        together = query.reshape(*x.shape[:2], -1)
        x = rms_norm(together, weights.get(f"{prefix}kv_norm.weight"), eps)
    key, value = (split(_linear(weights, f"{prefix}{name}_proj", x), kv_heads) for name in "kv")
    frequencies = rope_frequencies(config)
    traditional = config.get("rope_traditional", False)
    q, k = (
        rotate(normed(part, name), frequencies, traditional, rope_amplitude(config))
        for part, name in ((query, "q"), (key, "k"))
    )
    if config.get("query_growth"):
        steps = np.arange(x.shape[1]) // config["query_step"]
        q = q * (1 + config["query_growth"] * np.log(1 + steps))[:, None]
    k = np.repeat(k, heads // kv_heads, axis=1)
    v = np.repeat(normed(value, "v"), heads // kv_heads, axis=1)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(head_dim(config))
    seen = _mask(config, layer, x.shape[1])
    alpha, beta, gamma = (
        vector(name, absent)[:, None]
        for name, absent in (("value_skip", 0.0), ("attention_gain", 1.0), ("uniform_gain", 0.0))
    )
    out = beta * (np.exp(_log_softmax(np.where(seen, scores, -np.inf))) @ v)
    out = out - gamma * (seen / seen.sum(axis=-1, keepdims=True) @ v) + alpha * v
    out = out.transpose(0, 2, 1, 3) + vector("query_skip", 0.0) * query
    return out.reshape(*x.shape[:2], -1)


def _project_heads(config: Config, weights: Weights, layer: int, heads: np.ndarray) -> np.ndarray:
    """The heads' outputs side by side, behind their norm if there is one, through P."""
    prefix = f"model.layers.{layer}.self_attn."
    if _has_norm(config, "heads"):
        gain = weights.get(f"{prefix}heads_norm.weight")
        heads = rms_norm(heads, gain, config["rms_norm_eps"])
    return _linear(weights, f"{prefix}o_proj", heads)


def feed_forward(config: Config, weights: Weights, layer: int, x: np.ndarray) -> np.ndarray:
    """The FFN with its stream norm, without skip; (batch, length, hidden).

    Of experts the router's best few answer, weighed by the softmax of their own scores.
    """
    prefix = f"model.layers.{layer}.mlp."
    norm, eps = _norm(config), config["rms_norm_eps"]
    act = config.get("hidden_act", "silu")
    if norm == "pre":
        name = "input_layernorm" if config.get("shared_norm") else "post_attention_layernorm"
        x = _stream_norm(config, weights, f"model.layers.{layer}.{name}", x)

    def expert(number: int | None) -> np.ndarray:
        hidden = _linear(weights, f"{prefix}up_proj", x, number)
        if config.get("gated", True):
            gate = activation(act, _linear(weights, f"{prefix}gate_proj", x, number))
            hidden = (gate + weights.get(f"{prefix}gate_offset", 0.0)) * hidden
        else:
            hidden = activation(act, hidden)
        if _has_norm(config, "hidden"):
            hidden = rms_norm(hidden, weights.get(f"{prefix}hidden_norm.weight"), eps)
        return _linear(weights, f"{prefix}down_proj", hidden, number)

    experts = config.get("num_local_experts", 0)
    if not experts:
        return expert(None)
    scores = _linear(weights, f"{prefix}router", x)
    least = np.sort(scores, axis=-1)[..., -config["num_experts_per_tok"], None]
    share = np.exp(_log_softmax(np.where(scores >= least, scores, -np.inf)))
    return sum(share[..., i, None] * expert(i) for i in range(experts))


def head_dim(config: Config) -> int:
    """A head's width; hidden_size / num_attention_heads if the config has none."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rms_norm(x: np.ndarray, gain: np.ndarray | None, eps: float) -> np.ndarray:
    """x over the root mean square of its last axis, times gain (its last axes; None: ones)."""
    y = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return y if gain is None else y * gain


def layer_norm(
    x: np.ndarray, gain: np.ndarray | None, bias: np.ndarray | None, eps: float
) -> np.ndarray:
    """x less its last axis' mean, over its standard deviation, times gain, plus bias."""
    centred = x - x.mean(axis=-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return (y if gain is None else y * gain) + (0 if bias is None else bias)


def activation(name: str, x: np.ndarray) -> np.ndarray:
    """Hugging Face's `hidden_act` functions."""
    if name == "silu":
        return x * np.exp(-np.logaddexp(0, -x))
    if name == "gelu":
        return x * 0.5 * (1 + _erf(x / math.sqrt(2)))
    if name in ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"):
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "relu":
        return np.maximum(x, 0)
    raise ValueError(f"hidden_act {name!r}")


def rope_frequencies(config: Config) -> np.ndarray:
    """Radians per position (rotary_dim / 2,); scaling as in transformers' modeling_rope_utils."""
    width = config.get("rotary_dim") or head_dim(config)
    inverse = config.get("rope_theta", 10000.0) ** (-np.arange(0, width, 2) / width)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return inverse
    factor = scaling["factor"]
    if kind == "linear":
        return inverse / factor
    if kind == "yarn":
        return _yarn_frequencies(scaling, inverse, config.get("rope_theta", 10000.0))
    if kind != "llama3":
        raise ValueError(f"rope_scaling {kind!r}")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return inverse * (share + (1 - share) / factor)


def _yarn_frequencies(scaling: Config, inverse: np.ndarray, theta: float) -> np.ndarray:
    """Slow frequencies divided by the factor, fast ones not, and those between a bit (YaRN)."""
    width = 2 * len(inverse)

    def pair_with(turns: float) -> float:
        """The number of the pair that turns so many times in the original context."""
        length = scaling["original_max_position_embeddings"]
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_with(scaling.get("beta_slow") or 1)), width - 1)
    share = np.clip((np.arange(len(inverse)) - low) / (high - low or 0.001), 0, 1)
    return inverse * (1 - share + share / scaling["factor"])


def rope_amplitude(config: Config) -> float:
    """What RoPE multiplies a head by beside turning it, which only YaRN does."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        return 1.0

    def grow(by: float) -> float:
        return max(0.1 * by * math.log(scaling["factor"]) + 1, 1.0)

    whole, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grow(whole) / grow(all_dims) if whole and all_dims else grow(1)


def rotate(
    x: np.ndarray, frequencies: np.ndarray, traditional: bool = False, amplitude: float = 1.0
) -> np.ndarray:
    """RoPE from position 0 on x (batch, heads, length, head_dim).

    Two numbers per frequency turn, the rest of a head stays. Pairs are the halves as in Hugging
    Face's Llama, or neighbours as in the RoPE paper.
    """
    angle = np.arange(x.shape[2])[:, None] * frequencies
    turning, still = amplitude * x[..., : 2 * len(frequencies)], x[..., 2 * len(frequencies) :]
    if traditional:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = np.split(turning, 2, axis=-1)
    turned = [
        first * np.cos(angle) - second * np.sin(angle),
        second * np.cos(angle) + first * np.sin(angle),
    ]
    if traditional:
        pairs = np.stack(turned, axis=-1).reshape(turning.shape)
        return np.concatenate([pairs, still], axis=-1)
    return np.concatenate([*turned, still], axis=-1)


def llama_config(config: Config) -> Config:
    """The skipless config of a pretrained Llama or Mistral one, for `logits`.

    As in transformers, `sliding_window` alone makes all layers slide in Mistral, none in Llama.
    """
    mapped = config | {
        "model_type": "skipless",
        "block": "serial",
        "skip": "both",
        "norm": "pre",
        "final_norm": True,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }
    if config["model_type"] == "llama" and not config.get("layer_types"):
        mapped["sliding_window"] = None
    return mapped


def gemma_config(config: Config) -> Config:
    """Likewise of a Gemma one, whose gains must have had 1 added.

    As in transformers: the head is the embedding, which enters the stream times sqrt(hidden), and
    "hidden_act" is not what it says.
    """
    return config | {
        "model_type": "skipless",
        "block": "serial",
        "skip": "both",
        "norm": "pre",
        "final_norm": True,
        "tie_word_embeddings": True,
        "hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh",
        "embedding_scale": math.sqrt(config["hidden_size"]),
    }


def softmax_kl(a: np.ndarray, b: np.ndarray) -> float:
    """Mean KL(softmax a ‖ softmax b) in nats per token, of logits (..., vocab)."""
    log_a = _log_softmax(np.asarray(a, dtype=np.float64))
    log_b = _log_softmax(np.asarray(b, dtype=np.float64))
    return float(np.mean(np.sum(np.exp(log_a) * (log_a - log_b), axis=-1)))


def worst_relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """The worst token's max|a - b| / max|a|, of logits (..., vocab)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.max(np.abs(a - b).max(axis=-1) / np.abs(a).max(axis=-1)))


def _norm(config: Config) -> str:
    norm: str = config.get("norm", "none")
    if norm not in ("none", "qkv", "pre"):
        raise ValueError(f"norm {norm!r}")
    return norm


def _has_norm(config: Config, name: str) -> bool:
    """Whether a network has one of the norms of "qkv"; "heads" only where "norms" names it."""
    return _norm(config) == "qkv" and name in (config.get("norms") or ("q", "k", "v", "hidden"))


def _stream_norm(config: Config, weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """The norm of a name, RMS norm or LayerNorm."""
    gain, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
    if config.get("norm_type", "rms") == "layer":
        return layer_norm(x, gain, bias, config["rms_norm_eps"])
    return rms_norm(x, gain, config["rms_norm_eps"])


def _linear(weights: Weights, name: str, x: np.ndarray, expert: int | None = None) -> np.ndarray:
    """x (..., in) through `name`.weight (out, in), plus `name`.bias where there is one.

    A matrix that is not there is the identity, as in a network that had it removed. Those of
    experts lie behind one another (experts, out, in).
    """
    if f"{name}.weight" not in weights:
        return x
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias", np.zeros(1))
    if expert is not None:
        weight, bias = weight[expert], bias if len(bias) == 1 else bias[expert]
    return x @ weight.T + bias


def _mask(config: Config, layer: int, length: int) -> np.ndarray:
    """Whether token i (row) attends to token j (column), (length, length)."""
    i, j = np.arange(length)[:, None], np.arange(length)
    allowed = j <= i
    types = config.get("layer_types")
    window = config.get("sliding_window")
    if window and (not types or types[layer] == "sliding_attention"):
        allowed &= j > i - window
    return allowed


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
