"""Quantized caches of networks of mlx-lm's own, whose heads configs describe in many ways."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache
from zoo import make_model

from mlx_skipless.errors import UserError
from mlx_skipless.inference.caches import make_cache
from mlx_skipless.inference.loading import load_network


def test_narrow_heads_are_found_where_the_config_is_nested(tmp_path: Path) -> None:
    """Its heads have 32 values: MLX's usual groups of 64 do not fit."""
    make_model(tmp_path, "qwen3_5")
    model = load_network(tmp_path)[0]
    tokens = mx.arange(12)[None]
    wanted, cache = model(tokens, cache=make_cache(model)), make_cache(model, kv_bits=8)
    assert {c.group_size for c in cache if isinstance(c, QuantizedKVCache)} == {32}
    parts = [model(tokens[:, :7], cache=cache), model(tokens[:, 7:], cache=cache)]
    got = np.array(mx.concatenate(parts, axis=1))
    assert 0 < np.abs(got - np.array(wanted)).max() < 0.05 * np.abs(np.array(wanted)).max()


def test_what_cannot_read_a_quantized_cache_is_refused_at_once(tmp_path: Path) -> None:
    make_model(tmp_path, "deepseek_v3")
    model = load_network(tmp_path)[0]
    with pytest.raises(UserError, match=r"--kv-bits: .* cannot read a quantized cache .*drop"):
        make_cache(model, kv_bits=8)
