"""What mlx-lm's network does not read of a config.json, and transformers obeys, is told."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import pytest
import zoo

import mlx_skipless
from mlx_skipless.errors import UserError
from mlx_skipless.inference.loading import load

S, F = "sliding_attention", "full_attention"
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


PATTERNS = {"gemma3_text": (3, [S, S, F]), "cohere2": (2, [S, F]), "exaone4": ("LLG", [S, S, F])}


@pytest.mark.parametrize("also", [None, "agrees", "differs"])
@pytest.mark.parametrize("kind", PATTERNS)
def test_windows_that_only_layer_types_name(kind: str, also: str | None, tmp_path: Path) -> None:
    """As transformers reads them, whatever else stands there; mlx-lm reads a pattern alone."""
    pattern, kinds = PATTERNS[kind]
    layers = 2 * len(kinds)
    source, out = tmp_path / "s", tmp_path / "o"
    zoo.make_model(source, kind, sliding_window_pattern=pattern, num_hidden_layers=layers)
    tokens = mx.arange(40)[None] + 5
    expected = mlx_lm.utils.load_model(source)[0](tokens)
    config = json.loads((source / "config.json").read_text())
    del config["sliding_window_pattern"]
    config["layer_types"] = 2 * kinds
    if also is not None:
        config["sliding_window_pattern"] = pattern if also == "agrees" else "LG" * 2
        if also == "differs" and kind != "exaone4":
            config["sliding_window_pattern"] = 4
    (source / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(load(source)[0](tokens), expected).item()
    mlx_skipless.convert(source, out, verify=False)
    assert mx.array_equal(mlx_lm.utils.load_model(out)[0](tokens), expected).item()
    assert json.loads((out / "config.json").read_text())["layer_types"] == 2 * kinds


@pytest.mark.parametrize("kinds", [[S, F, F, S], [S, S, F, F], [F, S, S, S], [S] * 4], ids=str)
def test_windows_in_an_order_that_mlx_lm_does_not_know(kinds: list[str], tmp_path: Path) -> None:
    zoo.make_model(tmp_path / "s", "gemma3_text", layer_types=kinds, num_hidden_layers=4)
    for run in (load, lambda source: mlx_skipless.convert(source, tmp_path / "o")):
        with pytest.raises(UserError, match=r'"layer_types" in config\.json gives windows'):
            run(tmp_path / "s")
    assert not (tmp_path / "o").exists()
