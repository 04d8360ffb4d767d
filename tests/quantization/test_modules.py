"""Networks of mlx-lm's own, quantized against text: each fit, what is written, what it is worth."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
import reference
import zoo
from grids import only, thorough
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache

import mlx_skipless
from mlx_skipless.conversion.options import Options
from mlx_skipless.conversion.report import ALARMING_KL
from mlx_skipless.conversion.stock import StockJob, find_source
from mlx_skipless.conversion.stock_quantization import find_floors
from mlx_skipless.inference.stock import open_network
from mlx_skipless.network.driver import Recorder, is_held_out, split_batches
from mlx_skipless.network.parts import replace_at
from mlx_skipless.network.stock import StockNetwork, WholeNetwork
from mlx_skipless.quantization import distillation, fitting, passage, sensitivity
from mlx_skipless.quantization.formats import Format, solve_feedback
from mlx_skipless.quantization.layout import quantize_nearest
from mlx_skipless.quantization.modules import CalibratedModules, read_formats
from mlx_skipless.quantization.settings import Quantization
from mlx_skipless.text import samples

DENSE, MOE, HYBRID = "gemma3_text", "qwen3_moe", "qwen3_5"
KINDS = (DENSE, MOE, HYBRID, "gpt_oss", "deepseek_v3", "mamba2", "gemma3n", "gemma4_text")


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CALIBRATION", (32, 48))
    monkeypatch.setattr(samples, "LONG_CHECK", (4, 32))


def draw_tokens(folder: Path, seed: int, rows: int, length: int = 32) -> mx.array:
    ids = mlx_lm.utils.load_tokenizer(folder).encode(zoo.draw_text(seed, rows * length))
    return mx.array(ids[: rows * length]).reshape(rows, length)


def open_model(folder: Path) -> nn.Module:
    return mlx_lm.utils.load_model(folder)[0]


def run(model: nn.Module, tokens: mx.array) -> np.ndarray:
    logits = model(tokens, cache=make_prompt_cache(model)).astype(mx.float32)
    return np.array(logits).astype(np.float64)


def make_text(folder: Path, letters: int = 8000) -> Path:
    file = folder / "text.txt"
    file.write_text(zoo.draw_text(1, letters))
    return file


@pytest.mark.parametrize("drops", [{}, {"drop_ffn": 1}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_to_nearest_is_no_fault(dtype: str, drops: dict[str, Any], tmp_path: Path) -> None:
    """Of the type of the numbers, or of this package; its price stands beside the result's."""
    zoo.make_model(tmp_path / "s", "olmo2", dtype=dtype)
    options = {"quantize": True, "q_group_size": 32, **drops}
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **options)
    check = report.verification
    assert check is not None and check.kl > ALARMING_KL and check.quantized_only is not None
    tokens = draw_tokens(tmp_path / "s", 2, 8)
    nearest, _ = mlx_lm.utils.quantize_model(open_model(tmp_path / "s"), {}, 32, 4)
    alone = reference.softmax_kl(run(open_model(tmp_path / "s"), tokens), run(nearest, tokens))
    assert alone / 2 < check.quantized_only.kl < 2 * alone  # of other text
    assert (check.kl_ratio == 1) is not bool(drops)
    assert not report.warnings and not any("nats per token" in note for note in report.notes)


@pytest.mark.parametrize("kind", only((DENSE, MOE, HYBRID), KINDS))
def test_text_makes_quantization_better(kind: str, tmp_path: Path) -> None:
    """Against mlx-lm's own quantization, on other text; what is written is what is reported."""
    zoo.make_model(tmp_path / "s", kind)
    report = mlx_skipless.convert(
        tmp_path / "s",
        tmp_path / "o",
        quantize=True,
        q_group_size=32,
        calibration=make_text(tmp_path),
    )
    tokens, result = draw_tokens(tmp_path / "s", 2, 8), open_model(tmp_path / "o")
    wanted, got = run(open_model(tmp_path / "s"), tokens), run(result, tokens)
    nearest, config = mlx_lm.utils.quantize_model(open_model(tmp_path / "s"), {}, 32, 4)
    alone = reference.softmax_kl(wanted, run(nearest, tokens))
    assert reference.softmax_kl(wanted, got) < (0.5 if kind in KINDS[:3] else 0.8) * alone
    assert report.verification is not None and report.verification.quantized_only is not None
    assert report.verification.kl < 0.8 * report.verification.quantized_only.kl
    # mlx-lm alone reads the same network as this package.
    ours = StockNetwork(lambda: open_model(tmp_path / "o"))
    assert reference.worst_relative_error(got, np.array(ours.logits(ours.hidden(tokens)))) < 1e-4
    stored = mx.load(str(tmp_path / "o/model.safetensors"))
    assert report.bytes_after == sum(array.nbytes for array in stored.values())  # type: ignore[union-attr]
    written = json.loads((tmp_path / "o/config.json").read_text())
    assert report.quantization == written["quantization"] == config["quantization"]
    packed = {name for name, module in nearest.named_modules() if "scales" in module}
    assert packed == {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}


def solve(
    x: np.ndarray, y: np.ndarray, held: np.ndarray, prior: np.ndarray, form: Format
) -> np.ndarray:
    """The best ridge regressions, each as ordinary least squares of a longer problem.

    Those within 2 % of the least error: float32 tells them no further apart.
    """

    def error(weight: np.ndarray) -> float:
        parts = form.nearest(mx.array(np.ascontiguousarray(weight.T, dtype=np.float32)))
        return float(np.sum((x[held] @ np.array(form.dense(parts)).T - y[held]) ** 2))

    found = [prior]
    for ridge in fitting.RIDGES:
        root = np.sqrt(ridge * np.mean(np.sum(x[~held] ** 2, 0))) * np.eye(x.shape[1])
        longer = np.vstack([x[~held], root]), np.vstack([y[~held], root @ prior])
        found.append(np.linalg.lstsq(*longer, rcond=None)[0])
    errors = [error(weight) for weight in found]
    return np.stack([w for w, e in zip(found, errors, strict=True) if e <= 1.02 * min(errors)])


def find_distance(got: np.ndarray, best: np.ndarray) -> float:
    """How far a weight is from the nearest of some."""
    return float(np.abs(best - got).max((-2, -1)).min())


def remember_fits(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """What is fitted from now on, (in, out) each, by path in the layer."""
    fitted: dict[str, list[np.ndarray]] = {}
    fit = fitting.fit_weights

    def remember(*args: Any) -> dict[str, np.ndarray]:
        found = fit(*args)
        for path, weight in found.items():
            fitted.setdefault(path, []).append(weight.T)
        return found

    monkeypatch.setattr(fitting, "fit_weights", remember)
    return fitted


@pytest.mark.parametrize("bias", [False, True])
def test_each_fit_is_the_least_squares(
    bias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's queries and its experts' gates, computed again from the definition."""
    kind = "gpt_oss" if bias else MOE
    zoo.make_model(tmp_path, kind, **({} if bias else {"mlp_only_layers": []}))
    tokens, source = draw_tokens(tmp_path, 3, 48), open_model(tmp_path)
    fitted = remember_fits(monkeypatch)
    packed, _ = quantize_nearest(open_model(tmp_path), Quantization(4, 32))
    network = StockNetwork(lambda: open_model(tmp_path), mx.float32)
    fits = CalibratedModules(network, packed, mx.float32, tokens)
    fits.embedding()
    fits.layer(0)
    rows = [
        is_held_out(i) for i, batch in enumerate(split_batches(tokens)) for _ in range(batch.size)
    ]
    held, form = np.array(rows), Format(4, 32, "affine")
    block = source.layers[0]
    wanted, begun = (m.model.embed_tokens(tokens) for m in (source, packed))
    y, x = block.self_attn.q_proj(block.input_layernorm(wanted)), block.input_layernorm(begun)
    y = y - block.self_attn.q_proj.bias if bias else y
    flat = [np.array(a.reshape(-1, a.shape[-1])).astype(np.float64) for a in (x, y)]
    prior = np.array(block.self_attn.q_proj.weight).astype(np.float64).T
    (got,) = fitted["self_attn.q_proj"]
    assert find_distance(got, solve(*flat, held, prior, form)) < 2e-3
    if bias:
        return
    # The same for an expert, from what the source's router gives it.
    seen = []
    for model, h in ((source, wanted), (packed, begun)):
        own = model.layers[0]
        h = h + own.self_attn(own.input_layernorm(h), "causal")
        seen.append(np.array(own.post_attention_layernorm(h)).reshape(-1, h.shape[-1]))
    gates = np.array(block.mlp.gate(mx.array(seen[0])))
    mine = (np.argsort(-gates, axis=-1)[:, : block.mlp.top_k] == 2).any(-1)
    weight = np.array(block.mlp.switch_mlp.gate_proj.weight[2]).astype(np.float64)
    s, x = (one[mine].astype(np.float64) for one in seen)
    best = solve(x, s @ weight.T, held[mine], weight.T, form)
    gates = fitted["mlp.switch_mlp.gate_proj"]
    assert min(find_distance(weight, best) for weight in gates) < 2e-3


def test_experts_that_see_little_are_rounded_to_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passage, "SPARSE", 1e-3)  # as if each expert needed a thousand widths
    zoo.make_model(tmp_path, MOE)
    results = [quantize_nearest(open_model(tmp_path), Quantization(4, 32))[0] for _ in range(2)]
    network = StockNetwork(lambda: open_model(tmp_path), mx.float32)
    fits = CalibratedModules(network, results[1], mx.float32, draw_tokens(tmp_path, 3, 16))
    fits.embedding()
    fits.layer(0)
    fits.layer(1)
    matrices = [path for path, m in results[0].layers[1].named_modules() if "scales" in m]
    assert len(matrices) == 8
    for path in matrices:
        first, second = (dict(model.layers[1].named_modules())[path] for model in results)
        same = mx.array_equal(first["weight"], second["weight"]).item()
        assert same == ("switch_mlp" in path), path


def test_floors(tmp_path: Path) -> None:
    """Routers keep 8 bits whatever mlx-lm says of them, what keeps a state 4."""
    floors = {}
    for kind in ("qwen3_5_moe", "olmoe", DENSE):
        zoo.make_model(tmp_path / kind, kind)
        options = Options(tmp_path / kind, quantize=True, q_group_size=32, dry_run=True)
        source = find_source(options)
        assert source is not None
        job = StockJob(options, source)
        network = open_network(source)
        floors[kind] = find_floors(job, network, job.build_result(network)[0])
    names = {path.rpartition(".")[2]: bits for path, bits in floors["qwen3_5_moe"].items()}
    assert names == {
        "gate": 8, "in_proj_a": 4, "in_proj_b": 4, "in_proj_qkv": 4, "in_proj_z": 4, "out_proj": 4,
        "q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4,
    }  # fmt: skip
    assert {path.rpartition(".")[2]: bits for path, bits in floors["olmoe"].items()} == {"gate": 8}
    assert not floors[DENSE]


@pytest.mark.parametrize("kind", only(("qwen3", "granite"), ("qwen3", "granite", "smollm3")))
def test_what_writes_the_stream_makes_up_for_its_errors(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's o_proj and down_proj, from the streams of mlx-lm's own blocks."""
    monkeypatch.setattr(fitting, "RIDGES", (0.1,))  # of more, some are equally good
    zoo.make_model(tmp_path, kind)
    tokens, source = draw_tokens(tmp_path, 3, 48), open_model(tmp_path)
    packed, _ = quantize_nearest(open_model(tmp_path), Quantization(4, 32))
    network = StockNetwork(lambda: open_model(tmp_path), mx.float32)
    fits = CalibratedModules(network, packed, mx.float32, tokens)
    fits.embedding()
    fitted = remember_fits(monkeypatch)
    fits.layer(0)
    scale, mask = (0.5 if kind == "granite" else 1.0), create_attention_mask(tokens, None)
    streams = []
    for model in (source, packed):
        block, h = model.layers[0], model.model.embed_tokens(tokens)
        h = h * getattr(model.model, "embedding_multiplier", 1.0)
        attended = Recorder(block.self_attn.o_proj)
        attention = replace_at(block.self_attn, "o_proj", attended)
        middle = h + scale * attention(block.input_layernorm(h), mask)
        written = Recorder(block.mlp.down_proj)
        ffn = replace_at(block.mlp, "down_proj", written)
        out = middle + scale * ffn(block.post_attention_layernorm(middle))
        assert mx.allclose(out, block(h, mask), atol=1e-4)
        streams.append((h, attended.x, middle, written.x, out))
    rows = [
        is_held_out(i) for i, batch in enumerate(split_batches(tokens)) for _ in range(batch.size)
    ]
    (_, _, middle, _, out), (h, attended_x, mine, written_x, _) = streams
    block, form = source.layers[0], Format(4, 32, "affine")
    wanted = {
        "self_attn.o_proj": (attended_x, middle - h, middle),
        "mlp.down_proj": (written_x, out - mine, out),
    }
    for path, (x, y, stream) in wanted.items():
        # Tokens weigh as the norms do that will read the stream.
        weights = 1 / np.linalg.norm(np.array(stream).reshape(-1, 64), axis=-1, keepdims=True)
        flat = [
            np.array(a.reshape(-1, a.shape[-1])).astype(np.float64) * weights
            for a in (x, y / scale)
        ]
        linear = dict(block.named_modules())[path]
        prior = np.array(linear.weight).astype(np.float64).T
        (got,) = fitted[path]
        assert find_distance(got, solve(*flat, np.array(rows), prior, form)) < 1e-3


@pytest.mark.parametrize("kind", only((MOE,), (MOE, HYBRID, "gemma4_text")))
def test_rounding_costs(kind: str, tmp_path: Path) -> None:
    """Each matrix alone, in a model that mlx-lm runs by itself."""
    zoo.make_model(tmp_path, kind)
    tokens, source = draw_tokens(tmp_path, 0, 2), open_model(tmp_path)
    packed, _ = quantize_nearest(open_model(tmp_path), Quantization(3, 32))
    forms, modules = read_formats(packed, mx.float32), dict(source.named_modules())
    chain = StockNetwork(lambda: open_model(tmp_path), mx.float32)
    network = chain if chain.is_chain else WholeNetwork(open_model(tmp_path))
    got = sensitivity.measure_rounding(network, forms, forms.get, tokens)
    exact = run(source, tokens)
    unseen = {path for path, m in modules.items() if hasattr(m, "to_quantized")} - got.keys()
    assert all("per_layer" in path and ".layers." not in path for path in unseen)
    for path, cost in got.items():
        weight = modules[path].weight
        how = forms[path].group_size, forms[path].bits
        modules[path].weight = mx.dequantize(*mx.quantize(weight, *how), *how)
        expected = reference.softmax_kl(exact, run(source, tokens))
        modules[path].weight = weight
        if kind == "gemma4_text" and path.endswith("embed_tokens"):  # tied: see test_ends.py
            assert 0 < cost < expected
        else:
            assert cost == pytest.approx(expected, rel=0.02, abs=1e-7), path


@pytest.mark.parametrize("kind", only(("llama",), ("llama", MOE, HYBRID)))
def test_rounding_is_weighed_by_other_text(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of layers are rounded with feedback, by what they read behind the measured rows."""
    zoo.make_model(tmp_path, kind)
    monkeypatch.setattr(sensitivity, "CHOOSING_TOKENS", 64)
    tokens, source = draw_tokens(tmp_path, 0, 14), open_model(tmp_path)
    packed, _ = quantize_nearest(open_model(tmp_path), Quantization(3, 32))
    forms, modules = read_formats(packed, mx.float32), dict(source.named_modules())
    network = StockNetwork(lambda: open_model(tmp_path), mx.float32)
    got = sensitivity.measure_rounding(network, forms, forms.get, tokens)
    read: dict[int, np.ndarray] = {}
    multiply = nn.Linear.__call__

    def watch(linear: nn.Linear, x: mx.array) -> mx.array:
        read[id(linear)] = np.array(x.reshape(-1, x.shape[-1])).astype(np.float64)
        return multiply(linear, x)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "__call__", watch)
        run(source, tokens[2:])
    exact, weighed = run(source, tokens[:2]), 0
    for path, cost in got.items():
        module, form = modules[path], forms[path]
        weight, x = module.weight, read.get(id(module))
        feedback = x is not None and ".layers." in path
        if feedback:
            module.weight = form.dense(
                form.with_feedback(np.array(weight), solve_feedback(x.T @ x))
            )
        else:
            module.weight = form.dense(form.nearest(weight))
        expected = reference.softmax_kl(exact, run(source, tokens[:2]))
        module.weight = weight
        assert cost == pytest.approx(expected, rel=0.05, abs=1e-7), path
        weighed += feedback
    assert weighed > 4


@pytest.mark.parametrize("kind", only(("qwen3",), ("qwen3", MOE, HYBRID)))
def test_a_size_is_kept(kind: str, tmp_path: Path) -> None:
    zoo.make_model(tmp_path / "s", kind, num_hidden_layers=2)
    if kind == "qwen3":
        exaggerate(tmp_path / "s", "layers.0.mlp.down_proj")
    text = {"calibration": make_text(tmp_path), "q_group_size": 32, "verify": False}
    plain = mlx_skipless.convert(tmp_path / "s", tmp_path / "p", quantize=True, **text)
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", target_bytes=plain.bytes_after, **text
    )
    assert 0.97 * plain.bytes_after <= report.bytes_after <= plain.bytes_after
    tokens, result = draw_tokens(tmp_path / "s", 2, 8), open_model(tmp_path / "o")
    modules = dict(result.named_modules())
    entry = {k: v for k, v in report.quantization.items() if isinstance(v, dict)}  # type: ignore[union-attr]
    assert len({one["bits"] for one in entry.values()}) > 2
    assert all(modules[path].bits == one["bits"] for path, one in entry.items())
    if kind == HYBRID:
        assert all(m.bits >= 4 for p, m in modules.items() if "attn" in p and "scales" in m)
    wanted = run(open_model(tmp_path / "s"), tokens)
    kls = [reference.softmax_kl(wanted, run(open_model(tmp_path / n), tokens)) for n in "po"]
    # Floors cost bytes: with them a random network is no better for its mixture.
    assert kls[1] < (0.8 if kind == "qwen3" else 1.5) * kls[0]


def exaggerate(folder: Path, path: str) -> None:
    """Make a matrix write ten times as much, so that it minds being rounded more than others."""
    file = str(folder / "model.safetensors")
    arrays = mx.load(file)
    assert isinstance(arrays, dict)
    (name,) = (name for name in arrays if f"{path}.weight" in name)
    mx.save_safetensors(file, arrays | {name: 10 * arrays[name]}, metadata={"format": "mlx"})


LOST = [
    ("olmo2", {"drop_block": 1}),
    ("olmo2", {"drop_attention": 2}),
    ("olmo2", {"drop_ffn": 1, "replace_attention": 1}),
    (MOE, {"drop_attention": 2}),
    (HYBRID, {"drop_attention": 1}),
]


@pytest.mark.parametrize("case", only(LOST[:1], LOST), ids=str)
def test_what_is_left_makes_up_for_what_is_gone(
    case: tuple[str, dict[str, int]], tmp_path: Path
) -> None:
    """Fitted to the source's text, it is closer than what was not even rounded."""
    kind, lost = case
    zoo.make_model(tmp_path / "s", kind, num_hidden_layers=3 if kind == "olmo2" else 4)
    text = {"calibration": make_text(tmp_path), "verify": False}
    dense = mlx_skipless.convert(tmp_path / "s", tmp_path / "d", **lost, **text)
    q: dict[str, Any] = {"quantize": True, "q_bits": 6, "q_group_size": 32}
    packed = mlx_skipless.convert(tmp_path / "s", tmp_path / "q", **lost, **q, **text)
    assert (dense.removed, dense.replaced) == (packed.removed, packed.replaced)
    tokens = draw_tokens(tmp_path / "s", 2, 8)
    wanted = run(open_model(tmp_path / "s"), tokens)
    kls = [
        reference.softmax_kl(wanted, run(mlx_skipless.load(tmp_path / name)[0], tokens))
        for name in "dq"
    ]
    assert kls[1] < (1.0 if kind == HYBRID else 0.8) * kls[0]


@thorough
def test_a_distance_is_kept(tmp_path: Path) -> None:
    zoo.make_model(tmp_path / "s", DENSE)
    text = {"calibration": make_text(tmp_path), "q_group_size": 32}
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", target_kl=0.002, **text)
    assert report.verification is not None and report.verification.kl <= 0.002
    larger = mlx_skipless.convert(tmp_path / "s", tmp_path / "q", target_kl=0.0005, **text)
    assert larger.bytes_after > report.bytes_after


@pytest.mark.parametrize("kind", only(("olmo2",), ("olmo2", HYBRID)))
def test_distilling_brings_it_closer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "LEARNING_RATE", 1e-3)  # there is little text
    zoo.make_model(tmp_path / "s", kind, num_hidden_layers=2)
    tokens = draw_tokens(tmp_path / "s", 2, 8)
    wanted, kls = run(open_model(tmp_path / "s"), tokens), []
    for steps in (0, 20):
        out = tmp_path / f"o{steps}"
        mlx_skipless.convert(
            tmp_path / "s", out, quantize=True, q_bits=3, q_group_size=32, distill=steps,
            calibration=make_text(tmp_path), verify=False,
        )  # fmt: skip
        kls.append(reference.softmax_kl(wanted, run(open_model(out), tokens)))
    assert kls[1] < kls[0]


def test_experts_are_not_distilled(tmp_path: Path) -> None:
    zoo.make_model(tmp_path / "s", MOE)
    with pytest.raises(mlx_skipless.UserError, match="--distill is not for models with experts"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", quantize=True, distill=9)
    assert not (tmp_path / "o").exists()


def test_a_router_is_packed_in_groups_that_divide_its_inputs(tmp_path: Path) -> None:
    """mlx-lm asks for groups of 64 in routers; this one has 96 inputs."""
    zoo.make_model(tmp_path / "s", MOE, hidden_size=96)
    mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", quantize=True, q_group_size=32, verify=False
    )
    gate = open_model(tmp_path / "o").layers[1].mlp.gate
    assert (gate.bits, gate.group_size) == (8, 32)
