"""Random checkpoint folders for the tests: source skipless (DESIGN §6) and Llama or Mistral.

Without norms a SwiGLU squares the stream's scale in each layer, so plain random weights overflow
or vanish. Here all embeddings share a mean vector, which attention passes on whatever the softmax
does. Each layer is scaled to what a few random tokens become on their way through, and its gates
meet their mean where the activation falls, so that the FFN grows as the root of the stream's
scale. (relu cannot: its streams spread over 1e-2 ... 10 in three layers, 1e-18 ... 1e4 in six.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import reference
from reference import Config, Weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS = 256, 257
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

_LLAMA: Config = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_SKIPLESS: Config = {
    "model_type": "skipless",
    "block": "serial",
    "skip": "none",
    "norm": "none",
    "final_norm": True,
}
# Where activation(s * gate) * s grows about as sqrt(s); relu has no such point.
_GATE_MEAN = {"silu": -1.75, "gelu": -1.0, "gelu_pytorch_tanh": -1.0, "relu": 1.0}
_GATE_SPREAD = 0.5
_MEAN_SHARE = 0.8
_SHARPNESS = 3.0


def make_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    gains: bool = False,
    linear_paths: bool = False,
    skips: tuple[str, ...] = (),
    per_channel: bool | None = False,
    bias: tuple[str, ...] = (),
    shards: int = 1,
    spread: float = 0.3,
    template: bool = True,
    **config: Any,
) -> tuple[Config, Weights]:
    """Write a random source skipless checkpoint; return its config and its weights as stored.

    `gains` adds every optional gain of norm "qkv", `linear_paths` the gate offsets, the value
    skips and the gains of shaped attention, `skips` the "query", "head" and "output" skips,
    `per_channel` or per head (None: in every other layer), `bias` biases on the named projections,
    `template` a chat template. Attention matrices are orthogonal plus `spread` times Gaussian.
    `config` overrides the config's defaults. The weights returned are float64 and equal the stored
    `dtype` values.
    """
    config = _complete(_LLAMA | _SKIPLESS | config, dtype)
    weights = _weights(config, seed, gains, linear_paths, bias, spread, skips, per_channel)
    return config, write(Path(folder), config, weights, dtype, shards, template)


def make_llama(
    folder: Path,
    *,
    model_type: str = "llama",
    seed: int = 0,
    dtype: str = "float32",
    **config: Any,
) -> tuple[Config, Weights]:
    """Write a random pretrained-style "llama" or "mistral" folder in Hugging Face's layout.

    Returns its config and its weights as stored, in float64. `attention_bias` and `mlp_bias` in
    `config` put biases on all projections of their sub-layer.
    """
    architecture = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[model_type]
    defaults = {"model_type": model_type, "architectures": [architecture]}
    config = _complete(_LLAMA | defaults | config, dtype)
    flags = {"attention_bias": ATTENTION_PROJECTIONS, "mlp_bias": MLP_PROJECTIONS}
    bias = tuple(name for flag, names in flags.items() if config.get(flag) for name in names)
    weights = _weights(reference.llama_config(config), seed, False, False, bias, spread=0.3)
    return config, write(Path(folder), config, weights, dtype, shards=1)


def make_gemma(
    folder: Path, *, seed: int = 0, dtype: str = "float32", **config: Any
) -> tuple[Config, Weights]:
    """Write a random "gemma" folder in Hugging Face's layout.

    Returns the skipless config and the weights of the same function, in float64: gains as they act,
    one more than they are stored.
    """
    defaults = {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu",
        "hidden_activation": None,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    config = _complete({**_LLAMA, **defaults, **config}, dtype)
    del config["tie_word_embeddings"]
    mapped = reference.gemma_config(config)
    weights = _weights(mapped, seed, False, False, (), spread=0.3)
    norms = [name for name in weights if "norm" in name]
    stored = weights | {name: weights[name] - 1 for name in norms}
    stored = write(Path(folder), config, stored, dtype, shards=1)
    return mapped, stored | {name: stored[name] + 1 for name in norms}


def _complete(config: Config, dtype: str) -> Config:
    return {"head_dim": reference.head_dim(config)} | config | {"torch_dtype": dtype}


def _weights(
    config: Config,
    seed: int,
    gains: bool,
    linear_paths: bool,
    bias: tuple[str, ...],
    spread: float,
    skips: tuple[str, ...] = (),
    per_channel: bool | None = False,
) -> Weights:
    """All tensors of a skipless config, (out, in), float64."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    head_dim = config["head_dim"]
    q_heads = config["num_attention_heads"]
    q_width, kv_width = q_heads * head_dim, config["num_key_value_heads"] * head_dim

    def gaussian(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) / np.sqrt(columns)

    def orthogonal(rows: int, columns: int) -> np.ndarray:
        basis = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))[0]
        basis = basis if rows >= columns else basis.T
        scale = np.sqrt(max(rows / columns, 1) / (1 + spread**2))
        return scale * (basis + spread * np.sqrt(min(columns / rows, 1)) * gaussian(rows, columns))

    def around_one(size: int) -> np.ndarray:
        return rng.uniform(0.6, 1.4, size)

    mean = rng.standard_normal(hidden)
    token = rng.standard_normal((vocab, hidden))
    embedding = np.sqrt(_MEAN_SHARE) * mean + np.sqrt(1 - _MEAN_SHARE) * token
    scale = 1 / np.sqrt(hidden) if config["tie_word_embeddings"] else 1.0
    weights = {"model.embed_tokens.weight": scale * embedding}
    x = weights["model.embed_tokens.weight"][rng.integers(0, vocab, (2, 24))]
    x, heads = x * config.get("embedding_scale", 1.0), None
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        new = {
            f"{attn}q_proj.weight": orthogonal(q_width, hidden),
            f"{attn}k_proj.weight": orthogonal(kv_width, hidden),
            f"{attn}v_proj.weight": orthogonal(kv_width, hidden),
            f"{attn}o_proj.weight": orthogonal(hidden, q_width),
            f"{mlp}gate_proj.weight": gaussian(inner, hidden),
            f"{mlp}up_proj.weight": gaussian(inner, hidden),
            f"{mlp}down_proj.weight": gaussian(hidden, inner),
        }
        for name in bias:
            key = f"{attn if name in ATTENTION_PROJECTIONS else mlp}{name}"
            new[f"{key}.bias"] = 0.1 * rng.standard_normal(len(new[f"{key}.weight"]))
        if config["norm"] == "pre":
            new[f"{prefix}input_layernorm.weight"] = around_one(hidden)
            new[f"{prefix}post_attention_layernorm.weight"] = around_one(hidden)
        if config["norm"] == "qkv" and gains:
            sizes = {
                "q": q_width,
                "k": kv_width,
                "v": kv_width,
                "kv": q_width,
                "heads": q_width,
                "hidden": inner,
            }
            for name in config.get("norms") or ("q", "k", "v", "hidden"):
                where = mlp if name == "hidden" else attn
                new[f"{where}{name}_norm.weight"] = around_one(sizes[name])
        if linear_paths:
            new[f"{attn}value_skip"] = around_one(q_heads)
            new[f"{mlp}gate_offset"] = around_one(inner)
            new[f"{attn}attention_gain"] = around_one(q_heads)
            new[f"{attn}uniform_gain"] = 0.5 * around_one(q_heads)
        wide = layer % 2 == 1 if per_channel is None else per_channel
        size = q_width if wide else q_heads
        last = layer == config["num_hidden_layers"] - 1
        absent = {"head" if layer == 0 else "", "" if last else "output"}
        for name in (skip for skip in skips if skip not in absent):
            new[f"{attn}{name}_skip"] = 0.7 * around_one(size) * rng.choice([-1, 1], size)
        weights |= new
        x, heads = _fit(config, weights, layer, x, heads)
    if config["final_norm"]:
        weights["model.norm.weight"] = around_one(hidden)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = 2 * gaussian(vocab, hidden)
    return weights


def _fit(
    config: Config, weights: Weights, layer: int, x: np.ndarray, before: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale a layer in place to what `reference.block_and_heads` takes; return what it gives."""
    prefix = f"model.layers.{layer}."
    attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."

    def seen(y: np.ndarray, norm: str) -> np.ndarray:
        if config["norm"] != "pre":
            return y
        return reference.rms_norm(y, weights[f"{prefix}{norm}.weight"], config["rms_norm_eps"])

    size = _rms(seen(x, "input_layernorm"))
    weights[f"{attn}q_proj.weight"] *= _SHARPNESS / size
    weights[f"{attn}k_proj.weight"] /= size
    attended = reference.attention(config, weights, layer, x, before)
    weights[f"{attn}o_proj.weight"] /= _rms(attended)
    y = x
    if config["block"] == "serial":
        y = reference.attention(config, weights, layer, x, before)
        y = x + y if config["skip"] == "both" else y

    gate = weights[f"{mlp}gate_proj.weight"]
    mean = seen(y, "post_attention_layernorm").mean(axis=(0, 1))
    gate *= _GATE_SPREAD / _rms(mean)
    gate += np.outer(_GATE_MEAN[config["hidden_act"]] - gate @ mean, mean / (mean @ mean))
    weights[f"{mlp}down_proj.weight"] /= _rms(reference.feed_forward(config, weights, layer, y))
    return reference.block_and_heads(config, weights, layer, x, before)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def write(
    folder: Path,
    config: Config,
    weights: Weights,
    dtype: str,
    shards: int,
    template: bool = True,
) -> Weights:
    """Write config, tokenizer and weights; return the weights rounded to dtype, in float64."""
    tokenizer = make_tokenizer(config.get("max_position_embeddings", 512))
    tokenizer.chat_template = CHAT_TEMPLATE if template else None
    if config["vocab_size"] < len(tokenizer):
        raise ValueError(f"vocab_size must be at least {len(tokenizer)}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    with mx.stream(mx.cpu):
        arrays = _stored(weights, dtype)
        if shards == 1:
            files = {"model.safetensors": list(arrays)}
        else:
            files = {
                f"model-{i + 1:05d}-of-{shards:05d}.safetensors": [str(name) for name in names]
                for i, names in enumerate(np.array_split(list(arrays), shards))
            }
        for file, names in files.items():
            part = {name: arrays[name] for name in names}
            mx.save_safetensors(str(folder / file), part, metadata={"format": "pt"})
    if shards > 1:
        index = {
            "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return rounded(weights, dtype)


def rounded(weights: Weights, dtype: str) -> Weights:
    """The weights as a number type holds them, in float64."""
    with mx.stream(mx.cpu):
        return {
            name: np.array(array.astype(mx.float32)).astype(np.float64)
            for name, array in _stored(weights, dtype).items()
        }


def stored(folder: Path) -> dict[str, mx.array]:
    """The tensors of a converted folder, those that lie in one matrix cut out of it."""
    out: dict[str, mx.array] = {}
    config = json.loads((folder / "config.json").read_text())
    for file in sorted(folder.glob("model*.safetensors")):
        for name, array in mx.load(str(file)).items():  # type: ignore[union-attr]
            module, _, part = name.rpartition(".")
            prefix, _, whole = module.rpartition(".")
            if whole not in (config.get("fused") or {}):
                out[name] = array
                continue
            assert int(name.split(".")[2]) in config["fused"][whole]
            letters = ["gate", "up"] if whole == "gate_up_proj" else [*whole.split("_")[0]]
            heads = {"q": config["num_attention_heads"]}
            heads |= dict.fromkeys("kv", config["num_key_value_heads"])
            start = 0
            for x in letters:
                width = config["intermediate_size"] if x in ("gate", "up") else None
                rows = width or heads[x] * config["head_dim"]
                out[f"{prefix}.{x}_proj.{part}"] = array[start : start + rows]
                start += rows
            assert start == array.shape[0]
    return out


def _stored(weights: Weights, dtype: str) -> dict[str, mx.array]:
    kind = getattr(mx, dtype)
    return {name: mx.array(w.astype(np.float32)).astype(kind) for name, w in weights.items()}


def make_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: 256 bytes, <s>, </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )
