"""Trains small networks of mlx-lm's own and quantizes them: a table of quantization.md.

    python tools/stock_table.py TRAINING_TEXT TEST_TEXT

Both are folders of plain text files. Each network is trained on bytes for a limited time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mlx_skipless
from mlx_skipless.conversion.check import compare_networks
from mlx_skipless.inference.loading import load_network
from mlx_skipless.network.parts import tensors_of
from mlx_skipless.network.stock import StockNetwork

LENGTH, ROWS, STEPS, RATE = 64, 16, 1500, 3e-3
TEST = (64, 64)  # sequences, tokens
GROUP = {"q_group_size": 32}
ALL: dict[str, Any] = {
    "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 264, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3_text": ALL
    | {"intermediate_size": 256, "query_pre_attn_scalar": 32, "sliding_window": 32,
       "sliding_window_pattern": 2, "rope_local_base_freq": 10000.0},
    "qwen3_moe": ALL
    | {"intermediate_size": 256, "moe_intermediate_size": 96, "num_experts": 8,
       "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
       "norm_topk_prob": True},
    "qwen3_5_text": ALL
    | {"intermediate_size": 256, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
       "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
       "full_attention_interval": 4},
}  # fmt: skip
CONFIGS["qwen3_5"] = {"text_config": CONFIGS.pop("qwen3_5_text") | {"model_type": "qwen3_5_text"}}


def read_bytes(folder: str) -> np.ndarray:
    """Read all text files of a folder, one after another."""
    files = sorted(Path(folder).glob("*.txt"))
    return np.frombuffer(b"\n\n".join(file.read_bytes() for file in files), dtype=np.uint8)


def save_tokenizer(folder: Path) -> np.ndarray:
    """Save a tokenizer whose tokens are the bytes; return each byte's token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    ids = [tokenizer.encode(chr(byte)).ids[-1] for byte in range(128)]
    return np.array([*ids, *[ids[ord("?")]] * 128])


def draw_batches(data: np.ndarray) -> Iterator[mx.array]:
    """Draw sequences from all over a text, for ever."""
    random = np.random.default_rng(0)
    while True:
        starts = random.integers(0, len(data) - LENGTH - 1, ROWS)
        yield mx.array(np.stack([data[at : at + LENGTH + 1] for at in starts]).astype(np.int32))


def train(model: nn.Module, data: np.ndarray, seconds: float) -> float:
    """Train a network for some time; return the loss of its last steps, nats per byte."""
    start, share, losses = time.monotonic(), 0.0, []
    adam = optim.AdamW(learning_rate=RATE, weight_decay=0.01)

    def measure(model: Any, batch: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:]).mean()

    differentiate = nn.value_and_grad(model, measure)
    model.train()
    for step, batch in enumerate(draw_batches(data)):
        share = max((time.monotonic() - start) / seconds, step / STEPS)
        if share >= 1:
            break
        adam.learning_rate = RATE * min(1, (step + 1) / 20) * (1 - share)
        loss, gradient = differentiate(model, batch)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        adam.update(model, gradient)
        mx.eval(model.parameters(), adam.state, loss)
        losses.append(loss.item())
    return float(np.mean(losses[-50:]))


def make_model(folder: Path, kind: str, text: np.ndarray, seconds: float) -> float:
    """Train a model and save it; return its loss."""
    mx.random.seed(0)
    config = {"model_type": kind, **CONFIGS[kind], "torch_dtype": "float32"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model_class, args_class = _get_classes(json.loads(json.dumps(config)))
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    loss = train(model, save_tokenizer(folder)[text], seconds)
    weights = tensors_of(model)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return loss


def print_row(folder: Path, kind: str, text: Path, arguments: argparse.Namespace) -> None:
    """Train one network, quantize it in several ways, and print what became of it."""
    source = folder / kind
    loss = make_model(source, kind, read_bytes(arguments.training), arguments.seconds)
    count, length = TEST
    test = save_tokenizer(source)[read_bytes(arguments.test)]
    starts = np.linspace(0, len(test) - length, count).astype(int)
    tokens = mx.array(np.stack([test[at : at + length] for at in starts]).astype(np.int32))

    def load(path: Path) -> nn.Module:
        return load_network(path, lazy=True)[0]

    def measure(name: str, **options: Any) -> tuple[int, float]:
        out = folder / f"{kind}-{name}"
        report = mlx_skipless.convert(source, out, verify=False, **GROUP, **options)
        networks = [StockNetwork(partial(load, one), mx.float32) for one in (source, out)]
        return report.bytes_after, compare_networks(networks[0], networks[1:], tokens, "")[0].kl

    size, nearest = measure("nearest", quantize=True)
    ways: dict[str, dict[str, Any]] = {
        "text": {"quantize": True},
        "bytes": {"target_bytes": size},
        "distilled": {"quantize": True, "distill": 100},
    }
    if "num_experts" in CONFIGS[kind]:
        del ways["distilled"]
    found = {name: measure(name, calibration=text, **way)[1] for name, way in ways.items()}
    ratios = [
        f"{found[name] / nearest:.2f}" if name in found else ""
        for name in ("text", "bytes", "distilled")
    ]
    print(f"| {kind} | {loss:.2f} | {nearest:.4f} | " + " | ".join(ratios) + " |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training")
    parser.add_argument("test")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--only", choices=CONFIGS)
    arguments = parser.parse_args()
    print("| | loss | to nearest | against text | --target-bytes | --distill 100 |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_bytes(read_bytes(arguments.training).tobytes())
        for kind in [arguments.only] if arguments.only else CONFIGS:
            print_row(Path(folder), kind, text, arguments)


if __name__ == "__main__":
    main()
