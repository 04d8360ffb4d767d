"""Fixtures that several files of tests share."""

import os
from pathlib import Path

import mlx.core as mx
import pytest
from factory import make_checkpoint
from hypothesis import settings
from reference import Config, Weights

from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.network import driver
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.plan import make_plan

# One test a core: a BLAS that takes them all would only stand in the others' way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
settings.register_profile("busy", deadline=None)  # a loaded machine is no failure
settings.register_profile("thorough", deadline=None)  # test_fuzz.py: a hundred times as many
settings.load_profile("busy")


@pytest.fixture(params=[True, False], ids=["resident", "streamed"])
def network(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[tuple[Config, Weights], driver.StreamedNetwork]:
    """A random source, and the same in layers that stay in memory or are read again."""
    source = make_checkpoint(
        tmp_path, norm="qkv", gains=True, linear_paths=True, sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    checkpoint = open_checkpoint(tmp_path)
    plan = make_plan(checkpoint.args, remove="none")
    parts = Merger(checkpoint, plan, mx.float32)
    return source, driver.StreamedNetwork(checkpoint.args, parts, resident=request.param)
