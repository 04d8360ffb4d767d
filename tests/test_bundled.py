"""The bundled model: what ships, what its conversion removes, and that its tales stay the same."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from grids import only

import mlx_skipless
from mlx_skipless.constants import BUNDLED
from mlx_skipless.inference import generation, prompts
from mlx_skipless.text import samples

ROOT = Path(__file__).resolve().parent.parent
TALES = os.environ.get("MLX_SKIPLESS_TALES")  # the folder of books that it was trained on


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """`python convert.py` in an empty folder, and its report."""
    folder = tmp_path_factory.mktemp("bundled")
    command = [sys.executable, str(ROOT / "convert.py"), "--json", "report.json"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    return folder, json.loads((folder / "report.json").read_text())


def test_it_is_small_and_whole() -> None:
    """At most 16 MB, 3 to 8 million weights, nothing removed yet, and a card."""
    assert sum(file.stat().st_size for file in BUNDLED.rglob("*")) <= 16e6
    weights = mx.load(str(BUNDLED / "model.safetensors"))
    assert 3e6 <= sum(w.size for w in weights.values()) <= 8e6
    assert all(bool(mx.isfinite(w).all()) for w in weights.values())
    config = json.loads((BUNDLED / "config.json").read_text())
    assert config["skip"] == "none" and config["norm"] != "pre" and not config["final_norm"]
    assert config["num_hidden_layers"] >= 12 and config["max_position_embeddings"] >= 512
    assert config["num_attention_heads"] == 4 * config["num_key_value_heads"]
    assert not any(config["removed"].values())
    for layer in range(config["num_hidden_layers"]):
        for matrix in ("q_proj", "o_proj"):
            assert f"model.layers.{layer}.self_attn.{matrix}.weight" in weights
    card = (BUNDLED / "README.md").read_text()
    assert card.count(".txt") == 164 and "license" in card


def test_every_q_is_well_conditioned() -> None:
    weights = mx.load(str(BUNDLED / "model.safetensors"))
    for name, w in weights.items():
        if name.endswith("q_proj.weight"):
            assert np.linalg.cond(np.array(w, dtype=np.float64)) < 10, name


def test_conversion_removes_q_and_p(converted: tuple[Path, dict]) -> None:
    """All but the first Q, whose basis a tied embedding and the output skip share with the head."""
    _, report = converted
    layers = list(range(json.loads((BUNDLED / "config.json").read_text())["num_hidden_layers"]))
    assert report["removed"] == {"q": layers[1:], "p": layers}
    assert report["params_after"] <= 0.81 * report["params_before"]
    assert report["bytes_after"] <= 0.81 * report["bytes_before"]
    assert report["verification"]["max_rel_logit_error"] < 5e-3  # float16
    assert report["verification"]["kl"] < 1e-4


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The model in float32, with its Q and P and without them."""
    folder = tmp_path_factory.mktemp("exact")
    folders = [folder / "whole", folder / "reduced"]
    for out, remove in zip(folders, ("none", "auto"), strict=True):
        report = mlx_skipless.convert(None, out, remove=remove, dtype="float32")
        assert report.verification is not None
        assert report.verification.max_rel_logit_error < 1e-4
        assert report.verification.greedy_match == 1.0
    return folders


TEXTS = [("Once upon a time", 80)]  # and how many tokens
LONG_TEXTS = [(start, 200) for start in ("Once upon a time", "The old king", "Alice")]


@pytest.mark.parametrize("prompt", only(TEXTS, TEXTS + LONG_TEXTS))
def test_greedy_text_stays_the_same(exact: list[Path], prompt: tuple[str, int]) -> None:
    start, length = prompt
    texts = [generation.generate(model, None, start, max_tokens=length).text for model in exact]
    assert texts[0] == texts[1]
    assert len(texts[0].split()) > 0.4 * length


def test_mlx_lm_chats_with_it(converted: tuple[Path, dict]) -> None:
    """Its template, which the conversion carries, joins what was said; a prompt stays as it is."""
    folder, _ = converted
    result = mlx_lm.load(str(folder / "mlx_model"), trust_remote_code=True)
    for _, tokenizer in (mlx_skipless.load(BUNDLED), result):
        assert tokenizer.has_chat_template and not prompts.has_turns(tokenizer)
        said = [{"role": "user", "content": "Once upon a time"}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)
        assert ids == tokenizer.encode("Once upon a time")
        said += [{"role": "assistant", "content": "a king"}, {"role": "user", "content": "But"}]
        shown = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        assert shown == "Once upon a time a king\nBut"


@pytest.mark.thorough
def test_it_survives_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized without Q and P it is nearer to itself than quantized alone, to nearest."""
    monkeypatch.setattr(samples, "CALIBRATION", (32, 128))
    monkeypatch.setattr(samples, "LONG_CHECK", (4, 128))
    report = mlx_skipless.convert(None, tmp_path / "q", quantize=True)
    layers = list(range(12))
    assert report.removed == {"q": layers[1:], "p": layers}
    check = report.verification
    assert check is not None and check.quantized_only is not None and check.kl_ratio is not None
    assert check.kl_ratio < 0.45
    assert check.perplexity < check.quantized_only.perplexity


def test_it_knows_english() -> None:
    """A sentence is much likelier than the same tokens in another order."""
    model, tokenizer = mlx_skipless.load(BUNDLED)
    text = "Once upon a time there was a king who had three sons, and the youngest was called Hans."
    tokens = tokenizer.encode(text)
    shuffled = np.random.default_rng(0).permutation(tokens).tolist()

    def loss(ids: list[int]) -> float:
        row = mx.array([ids])
        return nn.losses.cross_entropy(model(row[:, :-1]), row[:, 1:], reduction="mean").item()

    assert loss(tokens) < loss(shuffled) - 2


def test_without_arguments_it_tells_a_tale(tmp_path: Path) -> None:
    """`python generate.py` where there is no mlx_model converts the bundled one first."""
    command = [sys.executable, str(ROOT / "generate.py"), "--max-tokens", "40"]
    done = subprocess.run(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"Once upon a time[ ,]", done.stdout) and len(done.stdout.split()) > 15
    assert (tmp_path / "mlx_model" / "model.py").is_file()


@pytest.mark.skipif(TALES is None, reason="MLX_SKIPLESS_TALES names no folder of the tales")
def test_bits_per_character(converted: tuple[Path, dict]) -> None:
    folder, _ = converted
    files = sorted(Path(str(TALES)).glob("*.txt"))
    before, after = (
        mlx_skipless.measure_perplexity(model, files).bits_per_character
        for model in (BUNDLED, folder / "mlx_model")
    )
    card = (BUNDLED / "README.md").read_text()
    assert f"{before:.2f}" in card
    assert abs(after - before) < 1e-3
