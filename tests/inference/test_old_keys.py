"""What mlx-lm's network does not read of a config.json, and transformers obeys, is told."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
import zoo

import mlx_skipless

WINDOW = {"sliding_window": 8, "num_hidden_layers": 1}
LOOKS_BACK, ROTATES = "looks back on all tokens instead of 8", "rotates whole heads"


def find_notes(folder: Path, kind: str, **changes: Any) -> list[str]:
    zoo.make_model(folder, kind, **changes)
    report = mlx_skipless.convert(folder, folder / "o", dry_run=True, quantize=True)
    return [note for note in report.notes if LOOKS_BACK in note or ROTATES in note]


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("phi3", {}, True),
        ("starcoder2", {}, True),
        ("gemma2", {}, True),
        ("qwen3_moe", {"use_sliding_window": True}, True),
        ("plamo3", {}, False),
        ("muse_glimmer", {}, False),
    ],
)
def test_a_window_that_is_not_there(
    kind: str, changes: dict[str, Any], told: bool, tmp_path: Path
) -> None:
    """The last token of twenty sees the first one in mlx-lm's network, or it does not."""
    notes = find_notes(tmp_path, kind, **(WINDOW | changes))
    model = mlx_lm.utils.load_model(tmp_path)[0]
    tokens = mx.arange(20)[None] + 5
    first, second = (model(mx.where(mx.arange(20) == 0, one, tokens))[0, -1] for one in (7, 9))
    assert mx.allclose(first, second, rtol=1e-6, atol=1e-6).item() is not told
    assert len(notes) == told


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("phi3", {"sliding_window": None}),
        ("phi3", {"max_position_embeddings": 8}),
        ("qwen3_moe", {"use_sliding_window": False}),
        ("qwen3_moe", {}),  # whose default that is
        ("gemma2", {"layer_types": ["full_attention"]}),
    ],
)
def test_a_window_that_nobody_has(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert not find_notes(tmp_path, kind, **(WINDOW | changes))


@pytest.mark.parametrize("share", [0.5, 1.0, None])
@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_a_share_of_the_heads(kind: str, share: float | None, tmp_path: Path) -> None:
    """GLM's network rotates whole heads, whatever its config says; GLM 4's does not."""
    changes: dict[str, Any] = {"partial_rotary_factor": share or 0.5}
    if share is None:
        rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
        changes = {"rope_parameters": rope} | (
            {"partial_rotary_factor": None} if kind == "glm" else {}
        )
    assert len(find_notes(tmp_path, kind, **changes)) == (kind == "glm" and share != 1)
