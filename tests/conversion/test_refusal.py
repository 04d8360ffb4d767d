"""An exact float32 result is its source's function, but for rounding, or it is refused."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from architectures import ARCHITECTURES, make
from exact import check_same_function
from factory import make_checkpoint
from grids import only, thin, thorough
from networks import MATRICES, draw_network, make_config, make_weights, without, write_network

import mlx_skipless
from mlx_skipless import cli
from mlx_skipless.conversion.convert import convert
from mlx_skipless.removal import algebra, bases, changer, merger, plan, table

Patch = pytest.MonkeyPatch
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


def change(patch: Patch, place: Any, name: str, make_wrong: Callable[[Any], Any]) -> None:
    patch.setattr(place, name, make_wrong(getattr(place, name)))


def forget_the_scale(patch: Patch) -> None:
    """The embedding adds the shift as if it was the stream."""
    change(patch, bases.Bases, "find_shift_share", lambda right: lambda *a: float(right(*a) != 0))


def keep_the_means(patch: Patch) -> None:
    """LayerNorms become RMS norms all the same."""
    patch.setattr(bases.Bases, "takes_mean_out", lambda *a: False)


def centre_without_p(patch: Patch) -> None:
    patch.setattr(plan, "can_centre", lambda *a: True)


def turn_the_shift(patch: Patch) -> None:
    def wrong(right: Any) -> Any:
        def basis(q: Any) -> Any:
            found = right(q)
            return algebra.Basis(found.matrix, found.inverse, -found.shift)

        return basis

    change(patch, bases, "basis_without_reader", wrong)


def forget_a_reader(patch: Patch) -> None:
    """What reads the stream stays as it was."""
    change(
        patch,
        changer,
        "change_basis",
        lambda right: lambda linear, **b: right(linear, **b) if b["writes"] else linear,
    )


def lose_a_bias(patch: Patch) -> None:
    change(
        patch,
        changer,
        "change_basis",
        lambda right: lambda linear, **b: right(algebra.Linear(linear.weight), **b),
    )


def invert_in_half_precision(patch: Patch) -> None:
    """Off by no more than a thousandth, but not by rounding."""
    change(
        patch,
        merger,
        "to_stored",
        lambda right: lambda name, x, dtype: right(name, x.astype(np.float16), dtype),
    )


def scale_the_table(patch: Patch) -> None:
    def wrong(right: Any) -> Any:
        return lambda args, block, x: right(args, block, x / args.embedding_scale)

    change(patch, table, "_make_rows", wrong)


def reverse_the_experts(patch: Patch) -> None:
    def wrong(right: Any) -> Any:
        def merge(self: merger.Merger, path: str) -> Any:
            turned = path.endswith("down_proj") and self._plan.eliminated  # not in the source
            return {n: a[::-1] if turned else a for n, a in right(self, path).items()}

        return merge

    change(patch, merger.Merger, "_merge", wrong)


BIASED: dict[str, Any] = {"embedding_scale": 2.0, "norm": "qkv"}
LAYER_NORMS: dict[str, Any] = {"skip": "both", "norm": "pre", "norm_type": "layer"}
# What is done wrong, to which network, and how that is converted.
FAULTS: dict[Callable[[Patch], None], tuple[dict[str, Any], dict[str, Any]]] = {
    forget_the_scale: (BIASED, {"remove": "qp"}),
    keep_the_means: (LAYER_NORMS, {}),
    centre_without_p: (LAYER_NORMS | {"removed": {"p": [0, 1, 2]}}, {}),
    turn_the_shift: (BIASED, {"remove": "q"}),
    forget_a_reader: (BIASED, {"remove": "q"}),
    lose_a_bias: (BIASED, {"remove": "p"}),
    invert_in_half_precision: ({}, {"remove": "qp"}),
    scale_the_table: (BIASED, {"remove": "none", "precompute_first_layer": "force"}),
    reverse_the_experts: (EXPERTS, {"remove": "p"}),
}


def make_source(folder: Path, **changes: Any) -> None:
    config = make_config(**changes)
    weights = make_weights(config, MATRICES, 0)
    gone = [f"layers.{i}.self_attn.o_proj" for i in config["removed"].get("p", ())]
    write_network(folder, config, without(weights, *gone))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_merge_is_refused(
    fault: Callable[[Patch], None], tmp_path: Path, monkeypatch: Patch
) -> None:
    """In one line, and nothing is left."""
    changes, options = FAULTS[fault]
    make_source(tmp_path / "s", **changes)
    fault(monkeypatch)
    with pytest.raises(mlx_skipless.UserError, match=r"not the same function.*--force") as refused:
        convert(tmp_path / "s", tmp_path / "o", **options)
    assert "\n" not in str(refused.value) and [*tmp_path.iterdir()] == [tmp_path / "s"]


@thorough
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_right_merge_is_not(fault: Callable[[Patch], None], tmp_path: Path) -> None:
    changes, options = FAULTS[fault]
    make_source(tmp_path / "s", **changes)
    assert not convert(tmp_path / "s", tmp_path / "o", **options).warnings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_force_keeps_it(dtype: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """And the warning says so, wherever the weights come from."""
    make_source(tmp_path / "s", **BIASED)
    weights = mx.load(str(tmp_path / "s" / "model.safetensors"))
    cast = {name: array.astype(getattr(mx, dtype)) for name, array in weights.items()}
    mx.eval(cast)
    mx.save_safetensors(str(tmp_path / "s" / "model.safetensors"), cast)
    forget_the_scale(monkeypatch)
    options = {"remove": "q", "dtype": "float32"}
    with pytest.raises(mlx_skipless.UserError, match="not the same function"):
        convert(tmp_path / "s", tmp_path / "o", **options)
    report = convert(tmp_path / "s", tmp_path / "o", force=True, **options)
    (warning,) = report.warnings
    assert "not the same function" in warning and warning in (tmp_path / "o/README.md").read_text()
    assert report.verification is not None and report.verification.rounding_ratio is not None
    assert report.verification.rounding_ratio > 1


def test_the_command(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_source(tmp_path / "s", **BIASED)
    forget_the_scale(monkeypatch)
    given = ["convert", "--model", str(tmp_path / "s"), "--remove", "q", "--mlx-path"]
    assert cli.main([*given, str(tmp_path / "o")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "report this model" in error
    assert cli.main([*given, str(tmp_path / "o"), "--force"]) == 0
    assert "WARNING: the result is not the same function" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        pytest.param({"quantize": True, "q_group_size": 32}, marks=thorough),
        {"verify": False},
    ],
    ids=str,
)
def test_what_is_not_exact_is_not_refused(
    options: dict[str, Any], tmp_path: Path, monkeypatch: Patch
) -> None:
    """Rounding to fewer bits has a price of its own, which the KL tells."""
    make_checkpoint(tmp_path / "s", norm="qkv", hidden_size=64, intermediate_size=96)
    forget_a_reader(monkeypatch)
    report = convert(tmp_path / "s", tmp_path / "o", remove="q", **options)
    assert (tmp_path / "o").exists()
    assert report.verification is None or report.verification.rounding_ratio is None
    assert report.verification is None or report.quantization or report.warnings


HONEST = [*itertools.product((1e1, 1e3, 1e5, 1e7, 1e9), ("q", "qp", "k", "v"), ("none", "qkv"))]


@pytest.mark.parametrize(("condition", "remove", "norm"), thin(HONEST, lambda case: case))
def test_an_ill_conditioned_matrix_is_no_fault(
    condition: float, remove: str, norm: str, tmp_path: Path
) -> None:
    """What its inverse makes of rounding is explained, however much that is."""
    config = make_config(norm=norm, num_hidden_layers=2)
    weights = make_weights(config, (), 0)
    name = f"model.layers.1.self_attn.{remove[0]}_proj.weight"
    left, _, right = np.linalg.svd(weights[name])
    weights[name] = left * np.geomspace(1, 1 / condition, len(left)) @ right
    write_network(tmp_path / "s", config, weights)
    report = convert(tmp_path / "s", tmp_path / "o", remove=remove)
    assert not any("not the same function" in warning for warning in report.warnings)
    assert report.verification is not None
    assert condition < 1e7 or report.verification.max_rel_logit_error > 1e-3


@pytest.mark.parametrize("seed", only(range(3), range(200)))
def test_honest_networks_pass(seed: int, tmp_path: Path) -> None:
    """Of every mix, even where one magnifies rounding by itself."""
    config, weights, options = draw_network(seed)
    write_network(tmp_path / "s", config, weights)
    try:
        convert(tmp_path / "s", tmp_path / "o", **options)
    except mlx_skipless.UserError as error:
        assert "function" not in str(error)


@pytest.mark.parametrize("spread", only([5.0], [0.3, 2.0, 5.0, 20.0]))
@pytest.mark.parametrize("layers", only([6], [2, 6, 12]))
def test_deep_networks_pass(layers: int, spread: float, tmp_path: Path) -> None:
    source = make_checkpoint(
        tmp_path / "s", num_hidden_layers=layers, spread=spread, hidden_size=32,
        intermediate_size=48, norm="qkv", gains=True,
    )  # fmt: skip
    convert(tmp_path / "s", tmp_path / "o", remove="qp")
    if spread < 1:
        check_same_function(source, tmp_path / "o", 0)


WAYS: list[dict[str, Any]] = [
    {},
    {"remove": "none", "fold_norms": True},
    {"skipless": True, "remove": "p"},
    {"precompute_first_layer": "force"},
]
CASES = [*itertools.product(ARCHITECTURES, range(len(WAYS)), ("float32", "bfloat16"))]
FEW = [("gpt_neox", 0, "float32"), ("gemma", 1, "bfloat16")]


@pytest.mark.parametrize(
    ("name", "way", "dtype"), thin(CASES, lambda case: [case] if case in FEW else [])
)
def test_every_family_passes(name: str, way: int, dtype: str, tmp_path: Path) -> None:
    """Those, too, of which mlx-lm's own network has another form of GELU."""
    make(tmp_path / "s", name, dtype=dtype)
    report = convert(tmp_path / "s", tmp_path / "o", dtype="float32", **WAYS[way])
    assert report.verification is not None
    assert report.verification.rounding_ratio is None or report.verification.rounding_ratio < 0.5
