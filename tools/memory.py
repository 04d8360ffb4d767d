"""Convert a model that is larger than the memory allowed, and tell the peak and the seconds.

    python tools/memory.py --gigabytes 3 --limit 1.5 --model-type olmo2

The model is random, in the shape of Qwen3 1.7B with a smaller vocabulary. It is written a layer at
a time. The conversion runs in a process of its own. What is measured is the most memory that the
process had resident, as the system counts it. So the limit holds for all that it held: weights,
streams, code. The exit code is 1 if it held more.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LAYER_BYTES = 101e6
LENGTH = 32
# A CPU would run hours on as many tokens as a conversion takes otherwise.
RUN = f"""
import sys
from mlx_skipless.cli.main import main
from mlx_skipless.text import samples
samples.CALIBRATION = samples.STREAMED_CALIBRATION = int(sys.argv[1]), {LENGTH}
sys.exit(main(sys.argv[2:]))
"""


def main() -> int:
    """Make the model, convert it, and tell what that took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3, help="of the model (default: 3)")
    parser.add_argument("--limit", type=float, default=1.5, help="gigabytes (default: 1.5)")
    parser.add_argument("--model-type", default="olmo2", help="of mlx-lm's (default: olmo2)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, help="of convert, in place of its own")
    parser.add_argument("--tokens", type=int, default=256, help="that decide (default: 256)")
    given = parser.parse_args()
    flags = given.flags or ["--drop-attention", "2", "-q", "--no-verify"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_model(folder / "source", given.model_type, given.gigabytes)
        command = [sys.executable, "-c", RUN, str(given.tokens // LENGTH), "convert", "--quiet"]
        command += ["--model", str(folder / "source"), "--mlx-path", str(folder / "result")]
        command += ["--json", str(folder / "report")]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        done = subprocess.run([*command, *flags], check=False)
        if done.returncode:
            print(f"convert ended with {done.returncode}", file=sys.stderr)
            return 1
        kept = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        assert kept > before, "another child was larger"
        peak = kept * (1 if sys.platform == "darwin" else 1024)
        report = json.loads((folder / "report").read_text())
    print(f"model {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {report['seconds']:.0f} s")
    print({name: round(seconds) for name, seconds in report["stages"].items()})
    return int(peak > given.limit * 1e9)


def make_model(folder: Path, model_type: str, gigabytes: float) -> int:
    """Write a random model, a file for each layer; return its bytes."""
    folder.mkdir()
    layers = max(4, round(gigabytes * 1e9 / LAYER_BYTES))
    config = {"model_type": model_type, "num_hidden_layers": layers, **SHAPE}
    (folder / "config.json").write_text(json.dumps(config))
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    files: dict[str, str] = {}
    size = 0
    for number, layer in enumerate(model.layers):
        size += _save(folder, files, f"model.layers.{number}.", layer)
        layer.clear()
    size += _save(folder, files, "", model)
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _save_tokenizer(folder)
    return size


@cache
def _draw(shape: tuple[int, ...]) -> mx.array:
    """Draw a matrix; layers share theirs, as drawing takes longer than writing."""
    matrix = mx.random.normal(shape, scale=shape[-1] ** -0.5).astype(mx.bfloat16)
    mx.eval(matrix)
    return matrix


def _save(folder: Path, files: dict[str, str], prefix: str, module: nn.Module) -> int:
    """Write a module's tensors into a file; the norms stay 1, matrices get small numbers."""
    tensors = {}
    for name, array in tree_flatten(module.parameters()):
        if array.ndim > 1:
            array = _draw(array.shape)
        tensors[prefix + name] = array.astype(mx.bfloat16)
    file = f"model-{len(set(files.values())):05}.safetensors"
    files |= dict.fromkeys(tensors, file)
    mx.save_safetensors(str(folder / file), tensors, metadata={"format": "mlx"})
    return sum(array.nbytes for array in tensors.values())


def _save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
