"""Real configs of public models of 2024 to 2026, shrunk in size alone.

`published.json` has an entry for each: its ``config``, the ``source`` that it was taken from, and
as ``published`` what the shrunk keys were. Windows and contexts are shrunk too, by about 512, so
that a few dozen tokens are more than they hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
TYPES: dict[str, str] = {name: one["config"]["model_type"] for name, one in PUBLISHED.items()}


def read(name: str) -> Config:
    """A model's config, of dense weights whatever the published ones are."""
    config: Config = json.loads(json.dumps(PUBLISHED[name]["config"]))
    config.pop("quantization_config", None)
    return config


def write_today(config: Config) -> Config:
    """The same config as transformers 5 writes it: all of RoPE in ``rope_parameters``."""
    new = dict(config)
    if isinstance(new.get("text_config"), dict):
        new["text_config"] = write_today(new["text_config"])
    if "rope_theta" not in new:
        return new
    rope = new.pop("rope_scaling", None) or {"rope_type": "default"}
    rope = rope | {"rope_type": rope.get("rope_type") or rope.pop("type")}
    moved = ("rope_theta", "partial_rotary_factor")
    rope = rope | {key: new.pop(key) for key in moved if key in new}
    if "rope_local_base_freq" in new or new["model_type"] == "olmo3":
        local = new.pop("rope_local_base_freq", rope["rope_theta"])
        sliding = {"rope_type": "default", "rope_theta": local}
        rope = {"full_attention": rope, "sliding_attention": sliding}
    if new["model_type"] == "qwen3_moe":
        new["num_local_experts"] = new.pop("num_experts")
    return new | {"rope_parameters": rope}
