"""One of several processes: converted folders through mlx-lm, spread and whole, side by side.

``python parallel_worker.py OUT FOLDER…`` writes OUT/RANK.json. Our package is not importable here.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.utils import sharded_load

sys.modules["mlx_skipless"] = None  # type: ignore[assignment]
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9))
PROMPTS = [TOKENS[0].tolist(), TOKENS[1, :4].tolist()]


def logits(model: nn.Module) -> list[np.ndarray]:
    """Of the whole text at once, and with a cache in chunks and token by token."""
    cache = model.make_cache()
    chunks = np.split(TOKENS, [3, 4, 5, 6], axis=1)
    steps = [np.array(model(mx.array(chunk), cache)) for chunk in chunks]
    return [np.array(model(mx.array(TOKENS))), np.concatenate(steps, axis=1)]


def generated(model: nn.Module, tokenizer: Any) -> list[Any]:
    """From a prompt in chunks, of which only the caches are evaluated, and from two in a batch."""
    prompt = mx.array(TOKENS[0])
    steps = generate_step(prompt, model, max_tokens=4, prefill_step_size=3)
    one = [int(token) for token, _ in steps]
    return [one, *batch_generate(model, tokenizer, PROMPTS, max_tokens=4).texts]


def main(out: str, *folders: str) -> None:
    group = mx.distributed.init(strict=True)
    kinds = {"pipeline": {"pipeline_group": group}, "tensor": {"tensor_group": group}}
    if group.size() > 2:
        del kinds["tensor"]  # the heads are of a power of two
    found = []
    for folder in folders:
        whole, tokenizer = load(folder, trust_remote_code=True)
        expected, said = logits(whole)[0], generated(whole, tokenizer)
        for kind, groups in kinds.items():
            model, _ = sharded_load(folder, trust_remote_code=True, **groups)
            off = [np.abs(got - expected).max() / np.abs(expected).max() for got in logits(model)]
            found.append(
                {
                    "model": Path(folder).name,
                    "kind": kind,
                    "error": float(max(off)),
                    "same": kind == "tensor" or generated(model, tokenizer) == said,
                    "layers": len(model.layers),
                    "embedding": model.model.embed_tokens is not None,
                }
            )
    Path(out, f"{group.rank()}.json").write_text(json.dumps(found))
    # Whoever leaves first takes the ring along, and what is still on its way to the others.
    while len(list(Path(out).iterdir())) < group.size():
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])
