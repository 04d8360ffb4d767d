"""Calibrated quantization: fits against least squares, conversions against references."""

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
from factory import make_checkpoint, make_llama, stored
from grids import only, thin, thorough

import mlx_skipless
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.network.driver import StreamedNetwork
from mlx_skipless.network.model import Model
from mlx_skipless.quantization import bits as budget
from mlx_skipless.quantization import fitting
from mlx_skipless.quantization.calibration import CalibratedParts
from mlx_skipless.quantization.formats import Format
from mlx_skipless.quantization.layout import Layout, Quantization
from mlx_skipless.removal.merger import Merger
from mlx_skipless.removal.moments import Moments
from mlx_skipless.removal.plan import make_plan
from mlx_skipless.text import samples

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
WORDS = [
    "the",
    "a",
    "king",
    "fox",
    "mill",
    "daughter",
    "said",
    "went",
    "saw",
    "gold",
    "straw",
    "and",
    "to",
    "of",
    "in",
    "wood",
]


def prose(words: int, seed: int) -> str:
    """Text with far fewer words than the network has tokens for: its activations are alike."""
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words))


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CALIBRATION", (32, 64))
    monkeypatch.setattr(samples, "LONG_CHECK", (8, 32))


FORM = Format(8, 32, "affine")


def fit(seen: Moments, judge: Moments, prior: np.ndarray, form: Format = FORM) -> np.ndarray:
    """The fitted weight, (in, out) as the prior is."""
    known = {"m": mx.array(np.ascontiguousarray(prior.T, dtype=np.float32))}
    return fitting.fit_weights(seen, judge, known, {"m": form})["m"].T


def moments(x: np.ndarray, y: np.ndarray) -> Moments:
    found = Moments()
    for a, b in zip(np.array_split(x, 3), np.array_split(y, 3), strict=True):
        found.add(mx.array(a[None].astype(np.float32)), {"m": mx.array(b[None].astype(np.float32))})
    return found


def test_moments_know_the_error() -> None:
    rng = np.random.default_rng(0)
    x, y, w = (rng.standard_normal(shape) for shape in ((50, 6), (50, 4), (6, 4)))
    expected = np.sum((x @ w - y) ** 2) / np.sum(y**2)
    assert moments(x, y).error("m", w) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_fit_finds_the_matrix(noise: float) -> None:
    """From clean inputs the true matrix whatever the prior; from noisy ones better than it."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((64, 32))
    x = rng.standard_normal((4000, 64)) * np.logspace(0, -2, 64)
    inputs = x + noise * 0.05 * rng.standard_normal(x.shape)
    half = len(x) // 2
    seen, judge = moments(inputs[:half], x[:half] @ w), moments(inputs[half:], x[half:] @ w)
    prior = 5 * rng.standard_normal(w.shape)
    got = fit(seen, judge, prior)
    # What the weakest pull leaves of a wrong prior, where no token goes.
    gram = inputs[:half].T @ inputs[:half]
    pull = fitting.RIDGES[0] * np.mean(np.diag(gram)) * np.eye(64)
    left = np.linalg.solve(gram + pull, inputs[:half].T @ x[:half] @ w + pull @ prior)
    if not noise:
        assert judge.error("m", got) < 1e-4
    assert judge.error("m", got) < max(judge.error("m", one) for one in (w, left)) + 1e-5
    # Ordinary least squares, by its normal equations: nothing linear does better on what it saw.
    best = np.linalg.lstsq(inputs[:half], x[:half] @ w, rcond=None)[0]
    assert judge.error("m", got) < 1.2 * judge.error("m", best) + 1e-4


@pytest.mark.parametrize("rows", [24, 48])
def test_fit_moves_the_prior_where_little_was_seen(rows: int) -> None:
    """Better than the prior and than any regression without one, if there are fewer tokens."""
    rng = np.random.default_rng(5)
    true = rng.standard_normal((64, 16))
    prior = true + 0.3 * rng.standard_normal(true.shape)
    x, held = rng.standard_normal((rows, 64)), rng.standard_normal((400, 64))
    seen, judge = moments(x, x @ true), moments(held, held @ true)
    got = judge.error("m", fit(seen, judge, prior))
    without = [
        judge.error("m", np.linalg.solve(x.T @ x + ridge * rows * np.eye(64), x.T @ x @ true))
        for ridge in np.logspace(-6, 0, 13)
    ]
    # As much of the prior's error is left as lies in directions that no token has.
    left = 1 - rows / 64
    assert got == pytest.approx(left * judge.error("m", prior), rel=0.25)
    assert got < 0.5 * min(without)


def test_fit_keeps_the_prior_where_nothing_was_seen() -> None:
    prior = np.random.default_rng(2).standard_normal((32, 8))
    nothing = np.zeros((10, 32))
    seen, judge = moments(nothing, np.zeros((10, 8))), moments(nothing, np.ones((10, 8)))
    assert np.array_equal(fit(seen, judge, prior, Format(4, 32, "affine")), np.float32(prior))


def test_fit_keeps_the_prior_where_the_judge_says_so() -> None:
    """What was seen misleads: random outputs; what is judged follows the prior."""
    rng = np.random.default_rng(3)
    prior = rng.standard_normal((32, 8))
    x = rng.standard_normal((40, 32))
    seen, judge = moments(x, 9 * rng.standard_normal((40, 8))), moments(x, x @ prior)
    assert np.array_equal(fit(seen, judge, prior), np.float32(prior))


@pytest.mark.parametrize("stacked", [0, 1 << 22])
def test_matrices_that_read_the_same_are_fitted_as_each_alone(
    stacked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of other sizes, two of which are rounded alike, one below the other or not."""
    monkeypatch.setattr(fitting, "STACKED", stacked)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((600, 64)) @ rng.standard_normal((64, 64))
    forms = {
        "q": Format(4, 32, "affine"),
        "k": Format(3, 32, "affine"),
        "v": Format(4, 32, "affine"),
    }
    known = {
        name: mx.array(rng.standard_normal((rows, 64)).astype(np.float32))
        for name, rows in (("q", 160), ("k", 24), ("v", 32))
    }
    noise = 0.1 * rng.standard_normal(x.shape)
    sums = Moments(), Moments()
    for found, part in zip(sums, (slice(0, 500), slice(500, None)), strict=True):
        targets = {name: mx.array(x[part].astype(np.float32)) @ w.T for name, w in known.items()}
        found.add(mx.array((x + noise)[part].astype(np.float32)), targets)
    together = fitting.fit_matrices(*copy.deepcopy(sums), known, forms)
    assert [*together] == [*known]
    for name, form in forms.items():
        alone = fitting.fit_matrices(*copy.deepcopy(sums), {name: known[name]}, forms)[name]
        assert together[name].keys() == alone.keys()
        got, expected = (np.array(form.dense(parts)) for parts in (together[name], alone))
        # Sums in another order can move a weight to its neighbour.
        assert np.mean(np.abs(got - expected) > 1e-4 * np.abs(expected).max()) < 0.01, name


def ill_conditioned(folder: Path, spread: float = 2.5, **config: Any):
    """A checkpoint whose Q (and K, V) have condition numbers of 10 ** spread."""
    config, weights = make_checkpoint(folder, **SIZES | config)
    rng = np.random.default_rng(0)
    for name, w in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            u, s, v = np.linalg.svd(w, full_matrices=False)
            s = np.sqrt(np.mean(s**2)) * rng.permutation(np.logspace(0, -spread, len(s)))
            weights[name] = 2 * (u * s) @ v
    arrays = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    return config, {name: np.array(a).astype(np.float64) for name, a in arrays.items()}


def tokens_of(text: str, folder: Path, length: int = 64) -> np.ndarray:
    ids = mlx_skipless.load(folder)[1].encode(text)
    count = len(ids) // length
    return np.array(ids[: count * length]).reshape(count, length)


def kl_of(out: Path, source: tuple[Any, Any], tokens: np.ndarray) -> float:
    model, _ = mlx_skipless.load(out)
    got = np.array(model(mx.array(tokens)).astype(mx.float32))
    return reference.softmax_kl(reference.logits(*source, tokens), got)


CASES: list[dict[str, Any]] = [
    {"remove": "qp"},
    {"remove": "q", "q_bits": 8},
    {"remove": "qp", "q_mode": "mxfp4"},
    {"remove": "qp", "q_mode": "nvfp4", "dtype": "bfloat16"},
    {"remove": "kp", "num_key_value_heads": 4},
    {"remove": "vp", "num_key_value_heads": 4, "norm": "none"},
    {"remove": "q", "block": "parallel"},
    {"remove": "q", "skip": "ffn"},
    {"remove": "qp", "bias": ("q_proj", "k_proj", "o_proj", "down_proj")},
    {"remove": "qp", "linear_paths": True, "gains": True},
    {"remove": "qp", "final_norm": False, "sliding_window": 9},
    {"remove": "qp", "skips": ("query", "head", "output")},
    {"remove": "q", "block": "parallel", "skips": ("query", "head", "output"), "per_channel": True},
    {"remove": "qp", "skips": ("query", "head", "output"), "norms": ["q", "kv", "heads"]},
]
OPTIONS = ("remove", "q_bits", "q_mode", "dtype")


@pytest.mark.parametrize(
    "case",
    only([CASES[i] for i in (0, 12)], CASES),
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_removal_survives_quantization(case: dict[str, Any], tmp_path: Path) -> None:
    """Against text, an ill-conditioned matrix goes at a fraction of the naive merge's price."""
    options = {key: value for key, value in case.items() if key in OPTIONS}
    config = {"norm": "qkv"} | {k: v for k, v in case.items() if k not in OPTIONS}
    source = ill_conditioned(tmp_path / "s", **config)
    (tmp_path / "text.txt").write_text(prose(2500, seed=1))
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "ours", quantize=True, calibration=tmp_path / "text.txt",
        **options,
    )  # fmt: skip
    assert set(report.removed) == set(case["remove"])
    tokens = tokens_of(prose(300, seed=2), tmp_path / "s")
    ours = kl_of(tmp_path / "ours", source, tokens)

    dense = {key: value for key, value in options.items() if key in ("remove", "dtype")}
    mlx_skipless.convert(tmp_path / "s", tmp_path / "dense", verify=False, **dense)
    model, _ = mlx_skipless.load(tmp_path / "dense")
    layout = Layout(
        model.args,
        getattr(mx, case.get("dtype", "float32")),
        Quantization(case.get("q_bits"), None, case.get("q_mode", "affine")),
    )
    naive = rounded_kl(tmp_path / "dense", layout, source, tokens)
    assert ours < 0.5 * naive
    check = report.verification
    assert check is not None and check.quantized_only is not None
    assert check.kl_ratio == pytest.approx(check.kl / check.quantized_only.kl)
    assert check.kl < 4 * check.quantized_only.kl


@pytest.mark.parametrize(
    "case",
    only([CASES[i] for i in (0, 5, 7, 8, 11, 13)], CASES),
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_without_rounding_the_function_stays(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a format that loses nothing, fitting finds what the exact merge finds."""
    monkeypatch.setattr(Format, "nearest", lambda form, w: {"weight": w.astype(mx.float32)})
    monkeypatch.setattr(Format, "dense", lambda form, packed: packed["weight"])
    monkeypatch.setattr(
        Format, "with_feedback", lambda form, w, *_: {"weight": mx.array(w.astype(np.float32))}
    )
    config = {"norm": "qkv"} | {k: v for k, v in case.items() if k not in OPTIONS}
    source = ill_conditioned(tmp_path / "s", spread=1.5, **config)
    checkpoint = open_checkpoint(tmp_path / "s")
    plan = make_plan(checkpoint.args, remove=case["remove"], quantized=True)
    none = make_plan(checkpoint.args, remove="none")
    parts = CalibratedParts(
        StreamedNetwork(plan.before, Merger(checkpoint, none, mx.float32)),
        Merger(checkpoint, plan, mx.float32),
        Layout(plan.after, mx.float32, Quantization()),
        mx.array(tokens_of(prose(2500, seed=1), tmp_path / "s")[:64]),
    )
    tensors = dict(parts.embedding())
    for layer in range(plan.before.num_hidden_layers):
        tensors |= parts.layer(layer)
    tensors |= parts.head()
    model = Model(plan.after)
    model.load_weights(list(tensors.items()))
    tokens = tokens_of(prose(300, seed=2), tmp_path / "s")
    got = np.array(model(mx.array(tokens)))
    assert reference.worst_relative_error(reference.logits(*source, tokens), got) < 1e-2


def test_overflow_is_named(tmp_path: Path) -> None:
    """A stream without norms that grows beyond float32 calibrates nothing, and says so."""
    _, weights = make_checkpoint(tmp_path / "s", norm="none", **SIZES)
    for name, w in weights.items():
        if name.endswith(("up_proj.weight", "down_proj.weight")):
            weights[name] = 1e15 * w
    arrays = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    mx.save_safetensors(str(tmp_path / "s/model.safetensors"), arrays, metadata={"format": "pt"})
    with pytest.raises(mlx_skipless.UserError, match="overflow float32 at"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", remove="qp", quantize=True)
    assert not (tmp_path / "o").exists()


def check_text_helps(folder: Path, source: Any, **options: Any) -> tuple[Path, Path]:
    """A text makes quantization of ``folder / "s"`` better; return the results without and with."""
    (folder / "text.txt").write_text(prose(2500, seed=1))
    tokens = tokens_of(prose(300, seed=2), folder / "s")
    outs, options = (folder / "nearest", folder / "fitted"), {"quantize": True} | options
    mlx_skipless.convert(folder / "s", outs[0], **options)
    mlx_skipless.convert(folder / "s", outs[1], calibration=folder / "text.txt", **options)
    nearest, fitted = (kl_of(out, source, tokens) for out in outs)
    assert fitted < 0.8 * nearest
    return outs


@pytest.mark.parametrize(
    ("family", "mode"),
    thin([*itertools.product(["llama", "mistral"], ["affine", "mxfp4"])], lambda case: case),
)
def test_a_pretrained_model_is_calibrated_too(family: str, mode: str, tmp_path: Path) -> None:
    """With nothing removed, a text makes quantization better; the result stays plain mlx-lm."""
    config, weights = make_llama(tmp_path / "s", model_type=family, **SIZES)
    source = reference.llama_config(config), weights
    for out in check_text_helps(tmp_path, source, q_mode=mode):
        assert not (out / "model.py").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_is_calibrated_too(tied: bool, tmp_path: Path) -> None:
    """It stands in the embedding's place, and a tied head becomes one of its own."""
    config, weights = make_llama(tmp_path / "s", tie_word_embeddings=tied, **SIZES)
    source = reference.llama_config(config), weights
    check_text_helps(tmp_path, source, precompute_first_layer="force")


def rounded_kl(folder: Path, layout: Layout, source: Any, tokens: np.ndarray) -> float:
    """KL of a dense folder whose matrices are rounded to nearest, all in the same format."""
    model, _ = mlx_skipless.load(folder)
    for _, module in model.named_modules():
        if hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0:
            form = layout.quantization
            assert form is not None
            size = {"affine": 64, "nvfp4": 16}.get(form.mode, 32)
            bits = form.bits or 4
            plain = Format(bits, size, form.mode, layout.dtype)
            module.weight = plain.dense(plain.nearest(module.weight)).astype(layout.dtype)
    got = np.array(model(mx.array(tokens)).astype(mx.float32))
    return reference.softmax_kl(reference.logits(*source, tokens), got)


@pytest.mark.thorough
def test_auto_keeps_a_matrix_whose_removal_costs_more(tmp_path: Path) -> None:
    """Where Q keeps little of the stream K and V would lose the rest; and a table says why."""
    _, weights = make_checkpoint(tmp_path / "s", norm="qkv", **SIZES)
    name = "model.layers.1.self_attn.q_proj.weight"
    u, s, v = np.linalg.svd(weights[name])
    weights[name] = np.mean(s) * (u * np.where(np.arange(len(s)) < 6, 1, 1e-5)) @ v
    arrays = {key: mx.array(w.astype(np.float32)) for key, w in weights.items()}
    mx.save_safetensors(str(tmp_path / "s/model.safetensors"), arrays, metadata={"format": "pt"})
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", quantize=True)
    assert report.removed == {"q": [0, 2], "p": [0, 1, 2]}
    assert any(note.startswith("Q of layer 1 stays") for note in report.notes)
    costs = {row.name: row.cost for row in report.rows}
    for name, pays in (("layers.0", True), ("layers.1", False), ("layers.2", True)):
        cost = costs[name]
        assert cost is not None and (cost.removed < cost.rounded) == pays
    present = [
        f"model.layers.{i}.self_attn.q_proj.weight" in stored(tmp_path / "o") for i in range(3)
    ]
    assert present == [False, True, False]
    insists = mlx_skipless.convert(tmp_path / "s", tmp_path / "i", quantize=True, remove="qp")
    assert insists.removed["q"] == [0, 1, 2]


@pytest.mark.parametrize(
    "config",
    [{"norm": "qkv", "tie_word_embeddings": True}, pytest.param({"norm": "qkv"}, marks=thorough)],
)
def test_a_target_size(config: dict[str, Any], tmp_path: Path) -> None:
    """Mixed bits keep the size asked for, and are better than the same bits everywhere."""
    source = make_checkpoint(tmp_path / "s", num_hidden_layers=2, **SIZES | config)
    (tmp_path / "text.txt").write_text(prose(2500, seed=1))
    options: dict[str, Any] = {"calibration": tmp_path / "text.txt", "remove": "p"}
    plain = mlx_skipless.convert(tmp_path / "s", tmp_path / "plain", quantize=True, **options)
    mixed = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "mixed", target_bytes=plain.bytes_after, **options
    )
    assert 0.95 * plain.bytes_after < mixed.bytes_after <= plain.bytes_after
    assert mixed.removed == plain.removed
    (note,) = [note for note in mixed.notes if note.startswith("bits chosen")]
    card = (tmp_path / "mixed/README.md").read_text()
    assert " in 1 matri" in note or " matrices" in note
    assert " to " in card[card.index("Quantized:") :].splitlines()[0]
    written = sum(a.nbytes for a in mx.load(str(tmp_path / "mixed/model.safetensors")).values())  # type: ignore[union-attr]
    assert written == mixed.bytes_after
    tokens = tokens_of(prose(300, seed=2), tmp_path / "s")
    assert kl_of(tmp_path / "mixed", source, tokens) < kl_of(tmp_path / "plain", source, tokens)
    stock, _ = mlx_lm.load(str(tmp_path / "mixed"), trust_remote_code=True)  # type: ignore[misc]
    own, _ = mlx_skipless.load(tmp_path / "mixed")
    x = mx.array(tokens[:1])
    assert mx.array_equal(stock(x), own(x)).item()
    widths = {m.bits for _, m in own.named_modules() if hasattr(m, "bits")}
    assert len(widths) > 1 and widths <= {2, 3, 4, 5, 6, 8}


def test_a_target_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result keeps the limit, and does not by being much larger than it must."""
    monkeypatch.setattr(samples, "CALIBRATION", (16, 32))
    monkeypatch.setattr(samples, "LONG_CHECK", (4, 64))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    make_checkpoint(
        tmp_path / "s",
        norm="qkv",
        num_hidden_layers=2,
        seed=int(__import__("os").environ.get("SEED", "0")),
        **sizes,
    )
    sizes = []
    for limit in (0.02, 0.002):
        report = mlx_skipless.convert(tmp_path / "s", tmp_path / str(limit), target_kl=limit)
        check = report.verification
        print("RATIO", check.kl / limit, report.bytes_after)
        assert check is not None and 0.3 * limit < check.kl <= limit
        sizes.append(report.bytes_after)
    assert sizes[0] < 0.9 * sizes[1]
    with pytest.raises(mlx_skipless.UserError, match=r"--target-kl 1e-09 is out of reach"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "none", target_kl=1e-9)
    assert not (tmp_path / "none").exists()


@pytest.mark.thorough
def test_what_a_target_kl_chose_is_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if another mixture was tried after it."""

    def smallest(found: Any, limit: float, measure: Any, always: float) -> Any:
        kls = [measure(found[i]) for i in (3, 5)]
        assert kls[0] > kls[1] > 0
        return found[3], False

    monkeypatch.setattr(budget, "find_smallest", smallest)
    monkeypatch.setattr(samples, "CALIBRATION", (16, 32))
    make_checkpoint(tmp_path / "s", norm="qkv", num_hidden_layers=2, **SIZES)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", target_kl=0.1)
    (file,) = (tmp_path / "o").glob("*.safetensors")
    written: Any = mx.load(str(file))
    assert sum(array.nbytes for array in written.values()) == report.bytes_after
    model, _ = mlx_skipless.load(tmp_path / "o")  # config and weights are of one mixture
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()


@pytest.mark.thorough
def test_a_pretrained_model_keeps_its_architecture_under_a_target(tmp_path: Path) -> None:
    make_llama(tmp_path / "s", num_hidden_layers=2, **SIZES)
    plain = mlx_skipless.convert(tmp_path / "s", tmp_path / "plain", quantize=True)
    target = int(0.9 * plain.bytes_after)
    mixed = mlx_skipless.convert(tmp_path / "s", tmp_path / "mixed", target_bytes=target)
    assert mixed.stock and mixed.bytes_after <= target
    assert not (tmp_path / "mixed" / "model.py").exists()
    model, _ = mlx_lm.load(str(tmp_path / "mixed"))  # type: ignore[misc]
    assert len({m.bits for _, m in model.named_modules() if hasattr(m, "bits")}) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_bytes": 10**6, "target_kl": 0.1}, "drop all but one"),
        ({"target_speed": 2.0, "target_kl": 0.1}, "--target-kl and --target-speed are ends"),
        ({"target_speed": 0.9}, "above 1"),
        ({"target_speed": 90.0}, "--target-speed 90x is out of reach: at 2 bits"),
        ({"target_bytes": 10**6, "q_bits": 4}, "drop --q-bits"),
        ({"target_kl": 0.1, "q_mode": "mxfp4"}, "drop --q-bits"),
        ({"target_kl": 0.1, "verify": False}, "drop --no-verify"),
        ({"target_kl": -1.0}, "positive"),
        ({"target_kl": float("nan")}, "must be a number"),
        ({"target_bytes": 5}, "out of reach: at 2 bits"),
    ],
)
def test_targets_that_cannot_be(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", norm="qkv", num_hidden_layers=2, **SIZES)
    with pytest.raises(mlx_skipless.UserError, match=said):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("make", [make_checkpoint, make_llama], ids=["own", "stock"])
def test_a_size_out_of_reach_is_told_before_anything_is_measured(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a plan too; what is named as the smallest size can be had."""
    make(tmp_path / "s", num_hidden_layers=2, **SIZES)
    where = tmp_path / "s", tmp_path / "o"

    def refuse(target: dict[str, Any]) -> int:
        said = set()
        for dry_run in (False, True):
            with monkeypatch.context() as patch, pytest.raises(mlx_skipless.UserError) as refusal:
                patch.setattr(samples, "take_passages", pytest.fail)
                mlx_skipless.convert(*where, dry_run=dry_run, **target)
            said.add(str(refusal.value))
        (only_one,) = said
        assert "is out of reach: at 2 bits" in only_one
        found = re.search(r"(?:takes|reads) ([\d,]+) bytes", only_one)
        assert found is not None
        return int(found[1].replace(",", ""))

    read = refuse({"target_speed": 1000})
    least = refuse({"target_bytes": 1000})
    assert 1000 < read <= least
    assert refuse({"target_bytes": least - 1}) == least
    mlx_skipless.convert(*where, dry_run=True, target_bytes=least)
    assert mlx_skipless.convert(*where, target_bytes=least).bytes_after == least
