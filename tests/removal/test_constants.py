"""Biases, means, scales and whatever they pass on their way: the function stays the same.

Networks of every mix are drawn; those that were wrong once are named.
"""

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from architectures import skipless
from exact import exact_tensors
from grids import only, pairs, thin
from mlx_lm.utils import load_model
from networks import (
    MATRICES,
    VOCABULARY,
    draw_network,
    make_config,
    make_weights,
    without,
    write_network,
)

import mlx_skipless
from mlx_skipless.architectures.config import read_model_args
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.conversion.convert import convert
from mlx_skipless.removal.candidates import find_measurable
from mlx_skipless.removal.plan import make_plan
from mlx_skipless.removal.source import SourceReader
from mlx_skipless.text import samples

Network = tuple[dict[str, Any], dict[str, np.ndarray]]
TEXT = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
BLOCKS = ("serial", "parallel")
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def check_folder(source: Network, folder: Path, limit: float = 2e-3) -> None:
    """What mlx-lm computes with a folder, with few tokens and with those that experts sort."""
    model, _ = load_model(folder, trust_remote_code=True)
    for tokens in (TEXT, np.tile(TEXT, (3, 2))):
        got = np.array(model(mx.array(tokens)))
        assert reference.worst_relative_error(reference.logits(*source, tokens), got) <= limit


def plan_exactly(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a plan that `convert` would make for a network in float32."""
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint.args, **options)
    reader = SourceReader(checkpoint, plan.folded)
    found = find_measurable(plan.before, options["remove"])
    return options | {"conditioning": {path: reader.measure_conditioning(path) for path in found}}


@pytest.mark.parametrize("seed", only(range(6), range(200)))
def test_drawn_networks(seed: int, tmp_path: Path) -> None:
    """In float64, and in float32 as mlx-lm runs it, a table of the first layer included."""
    config, weights, options = draw_network(seed)
    write_network(tmp_path / "s", config, weights)
    try:
        report = convert(tmp_path / "s", tmp_path / "o", verify=False, **options)
    except mlx_skipless.UserError as error:
        assert "--" in str(error)
        return
    source = skipless(config, weights) if options["skipless"] else (config, weights)
    expected = reference.logits(*source, TEXT)
    condition = max(row.condition or 1 for row in report.rows)
    exact = {key: options[key] for key in ("remove", "skipless", "fold_norms")}
    plan = plan_exactly(tmp_path / "s", exact)
    made = make_plan(open_checkpoint(tmp_path / "s").args, **plan).merged
    kind = {"norm_type": made.norm_type, "shared_norm": made.shared_norm}
    got = reference.logits(source[0] | kind, exact_tensors(tmp_path / "s", **plan), TEXT)
    assert reference.worst_relative_error(expected, got) <= 1e-11 * condition
    none = {"remove": "none", "skipless": options["skipless"]}
    convert(tmp_path / "s", tmp_path / "n", verify=False, **none)
    errors = []
    for folder in ("n", "o"):
        model, _ = load_model(tmp_path / folder, trust_remote_code=True)
        errors.append(reference.worst_relative_error(expected, np.array(model(mx.array(TEXT)))))
    assert errors[1] <= 10 * condition * max(errors[0], 1e-6)


@pytest.mark.parametrize(
    ("scale", "letter", "block", "table", "gated"),
    thin(
        [*itertools.product((2.0, 0.25), "qkv", BLOCKS, (False, True), (True, False))],
        lambda case: pairs(*case),
    ),
)
def test_a_bias_behind_a_scaled_embedding(
    scale: float, letter: str, block: str, table: bool, gated: bool, tmp_path: Path
) -> None:
    """The embedding adds the bias that moves to it, divided by what it is multiplied by."""
    config = make_config(embedding_scale=scale, block=block, gated=gated)
    source = config, make_weights(config, MATRICES, 0)
    write_network(tmp_path / "s", *source)
    options = {"precompute_first_layer": "force"} if table else {}
    report = convert(tmp_path / "s", tmp_path / "o", remove=letter, verify=False, **options)
    assert 0 in report.removed[letter]
    check_folder(source, tmp_path / "o")


@pytest.mark.parametrize("gone", [[0, 1, 2], [1]])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("skip", "biased"), [("both", True), ("ffn", False)])
def test_layer_norms_where_p_is_gone(
    skip: str, biased: bool, block: str, gone: list[int], tmp_path: Path
) -> None:
    """No matrix is there to take the mean of the heads' outputs out of."""
    config = make_config(block=block, skip=skip, norm="pre", norm_type="layer", removed={"p": gone})
    weights = make_weights(config, ("q_proj", "o_proj", "down_proj") if biased else (), 0)
    weights = without(weights, *(f"layers.{layer}.self_attn.o_proj" for layer in gone))
    write_network(tmp_path / "s", config, weights)
    convert(tmp_path / "s", tmp_path / "o", verify=False)
    check_folder((config, weights), tmp_path / "o")


@pytest.mark.parametrize(
    ("gated", "biased", "block", "remove", "norm"),
    thin(
        [
            case
            for case in itertools.product(
                (True, False), (True, False), BLOCKS, ("q", "p", "qp", "none"),
                ("none", "qkv"),
            )
            if case[2:4] != ("parallel", "qp")
        ],
        lambda case: pairs(*case),
    ),
)  # fmt: skip
def test_experts_of_any_kind(
    gated: bool, biased: bool, block: str, remove: str, norm: str, tmp_path: Path
) -> None:
    """With a bias for each or without a gate; the source itself loads, too."""
    config = make_config(gated=gated, block=block, norm=norm, embedding_scale=2.0, **EXPERTS)
    source = config, make_weights(config, MATRICES if biased else (), 1)
    write_network(tmp_path / "s", *source)
    report = convert(tmp_path / "s", tmp_path / "o", remove=remove)
    check = report.verification
    assert check is not None
    assert check.max_rel_logit_error < 2e-3 or (check.rounding_ratio or 1) < 0.2
    check_folder(source, tmp_path / "o")


@pytest.mark.parametrize(
    ("gated", "block"),
    thin(
        [*itertools.product((True, False), BLOCKS)],
        lambda case: [case] if case == (False, "parallel") else [],
    ),
)
def test_experts_are_quantized_against_text(
    gated: bool, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a parallel block read what the embedding gives."""
    monkeypatch.setattr(samples, "CALIBRATION", (8, 16))
    config = make_config(
        hidden_size=32, head_dim=8, intermediate_size=64, gated=gated, block=block, norm="qkv",
        **EXPERTS,
    )  # fmt: skip
    write_network(tmp_path / "s", config, make_weights(config, MATRICES, 0))
    options = {"quantize": True, "q_bits": 8, "q_group_size": 32}
    report = convert(tmp_path / "s", tmp_path / "o", remove="q", **options)
    assert report.verification is not None and report.verification.kl < 0.2
    load_model(tmp_path / "o", trust_remote_code=True)


@pytest.mark.parametrize(
    ("block", "removed", "remove"),
    [
        ("parallel", {"p": [0, 1], "ffn": [1]}, "q"),
        ("parallel", {"p": [1], "ffn": [1]}, "q"),
        ("parallel", {"ffn": [2]}, "p"),
        ("serial", {"ffn": [2]}, "p"),
        ("serial", {"ffn": [1]}, "p"),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_heads_that_write_the_stream(
    tied: bool, block: str, removed: dict[str, list[int]], remove: str, tmp_path: Path
) -> None:
    """Nothing passes them without P and FFN; P alone at a tied end needs its inverse."""
    config = make_config(
        block=block, removed=removed, tie_word_embeddings=tied, final_norm=False, norm="qkv"
    )
    modules = {"p": "self_attn.o_proj", "ffn": "mlp"}
    gone = [f"layers.{i}.{modules[part]}" for part, layers in removed.items() for i in layers]
    weights = without(make_weights(config, (), 0), *gone)
    write_network(tmp_path / "s", config, weights)
    convert(tmp_path / "s", tmp_path / "o", remove=remove, verify=False)
    check_folder((config, weights), tmp_path / "o")


@pytest.mark.parametrize("layer", [1, 2])
def test_wide_heads_before_no_ffn(layer: int, tmp_path: Path) -> None:
    """Only an FFN can read them, so P stays in that layer."""
    config = make_config(head_dim=6, removed={"ffn": [layer]}, final_norm=False)
    weights = without(make_weights(config, (), 0), f"layers.{layer}.mlp")
    write_network(tmp_path / "s", config, weights)
    report = convert(tmp_path / "s", tmp_path / "o", remove="p", verify=False)
    assert report.removed == {"p": [i for i in range(3) if i != layer]}
    assert any("only an FFN can read heads" in note for note in report.notes)
    check_folder((config, weights), tmp_path / "o")


@pytest.mark.parametrize(
    ("changes", "removed"),
    [
        ({"skip": "ffn"}, {"p": [0]}),
        ({"skip": "both"}, {"p": [0]}),
        ({"block": "parallel"}, {"p": [0]}),
        ({"norm": "pre"}, {"p": [0]}),
        ({}, {"p": [0], "ffn": [0]}),
    ],
)
def test_heads_that_nothing_can_read(
    changes: dict[str, Any], removed: dict[str, list[int]]
) -> None:
    """Wider than the stream, without P."""
    assert read_model_args(make_config(head_dim=6, removed={"p": [0]}))
    with pytest.raises(mlx_skipless.UserError, match="p, which is 24 wide"):
        read_model_args(make_config(head_dim=6, removed=removed, **changes))
