"""Bench: what is counted, who takes turns, what is written. No speed is asserted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from architectures import ARCHITECTURES
from factory import make_checkpoint, make_llama, write
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import cache as caches
from mlx_lm.models.switch_layers import SwitchLinear
from zoo import make_model

import mlx_skipless
from mlx_skipless.checkpoints import writer
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.cli.bench_tables import format_spread
from mlx_skipless.cli.main import main
from mlx_skipless.evaluation import benchmark, synthetic, timing
from mlx_skipless.evaluation.synthetic import (
    Shape,
    find_shape,
    make_skipless_model,
    make_stock_model,
)
from mlx_skipless.evaluation.timing import Case, Spread, Timing
from mlx_skipless.inference import sizes
from mlx_skipless.inference.loading import load_network
from mlx_skipless.network.parts import tensors_of
from mlx_skipless.quantization.layout import Layout, Quantization

HIDDEN, INNER, LAYERS, HEADS, KV_WIDTH, VOCAB = 64, 96, 3, 4, 32, 264
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip
ATTENTION = 2 * HIDDEN**2 + 2 * HIDDEN * KV_WIDTH
FFN = 3 * HIDDEN * INNER
VANILLA = LAYERS * (ATTENTION + FFN + 2 * HIDDEN) + HIDDEN + 2 * VOCAB * HIDDEN
WITHOUT_QP = VANILLA - LAYERS * 2 * HIDDEN**2 - LAYERS * 2 * HIDDEN
UNREAD = (VOCAB - 1) * HIDDEN  # of the embedding, at batch 1
FEW: dict[str, Any] = {
    "prompt_lengths": (5,), "batch_sizes": (1,), "decode_tokens": 2, "repeats": 1
}  # fmt: skip
SIZES_ONLY: dict[str, Any] = {"prompt_lengths": ()}


@pytest.fixture(autouse=True)
def little_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(timing, "BANDWIDTH_REPEATS", 1)


def config_file(folder: Path, **config: Any) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(LLAMA | config))
    return str(file)


def architecture(name: str) -> Shape:
    return Shape(name, ARCHITECTURES[name].config | {"model_type": name.split(",")[0]})


def params(model: nn.Module) -> dict[str, mx.array]:
    return tensors_of(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_by_hand(dtype: str, tmp_path: Path) -> None:
    found = mlx_skipless.benchmark(
        synthetic=config_file(tmp_path), dtype=dtype, remove="qp", **SIZES_ONLY
    )
    size = 4 if dtype == "float32" else 2
    ours, theirs = WITHOUT_QP, VANILLA
    for one, weights in zip(found.subjects, (theirs, ours), strict=True):
        assert one.weight_bytes == size * weights
        assert one.bytes_per_token == size * (weights - UNREAD)
        assert one.cache_bytes_per_token == size * 2 * LAYERS * KV_WIDTH
    assert [one.label for one in found.subjects] == ["mlx-lm llama", "skipless without QP"]


def test_bytes_of_a_tied_and_a_quantized_model() -> None:
    tied = Shape("", LLAMA | {"tie_word_embeddings": True})
    weights = VANILLA - VOCAB * HIDDEN
    assert sizes.count_bytes_read(make_stock_model(tied, mx.float32)) == 4 * weights
    model = make_stock_model(Shape("", LLAMA), mx.bfloat16, Quantization(4, 32))
    norms = (2 * LAYERS + 1) * HIDDEN
    packed = (VANILLA - norms - UNREAD) * (4 + 2 * 16 / 32) / 8  # a scale and a bias in 32
    assert sizes.count_bytes_read(model) == packed + 2 * norms


def test_bytes_of_experts_and_batches() -> None:
    shape = architecture("mixtral")
    model = make_stock_model(shape, mx.float32)
    experts = 4 * LAYERS * 4 * FFN
    whole = benchmark.weight_bytes(model) - 4 * VOCAB * HIDDEN
    for batch, missed in ((1, 1 / 2), (3, 1 / 8)):  # two of four are picked
        expected = whole + 4 * batch * HIDDEN - experts * missed
        assert sizes.count_bytes_read(model, batch) == round(expected)


@pytest.mark.parametrize("name", [name for name, kind in ARCHITECTURES.items() if kind.stock])
def test_bytes_of_loaded_models_are_those_of_their_layouts(name: str) -> None:
    """In mlx-lm's own network and in ours, of every family."""
    shape = architecture(name)
    plan = synthetic.make_skipless_plan(shape.args, "auto", mx.float16, False)
    for model, args in (
        (make_stock_model(shape, mx.float16), shape.args),
        (make_skipless_model(plan.after, mx.float16), plan.after),
    ):
        layout = Layout(args, mx.float16)
        assert benchmark.weight_bytes(model) == layout.nbytes()
        assert sizes.count_bytes_read(model) == layout.bytes_per_token
        assert sizes.count_cache_bytes(model, 1) == layout.cache_bytes_per_token


def test_a_window_bounds_the_cache_that_is_read() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = LLAMA | {"sliding_window": 6, "layer_types": kinds}
    for model in (
        make_stock_model(Shape("", config), mx.float32),
        make_skipless_model(Shape("", config).args, mx.float32),
    ):
        assert sizes.count_cache_bytes(model, 4) == 4 * 2 * KV_WIDTH * 3 * 4
        assert sizes.count_cache_bytes(model, 20) == 4 * 2 * KV_WIDTH * (6 + 20 + 6)
        held = [one.keys.shape for one in timing.fill_cache(model, 2, 20)]
        assert [shape[2] for shape in held] == [6, 256, 6] and {shape[0] for shape in held} == {2}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_random_caches_and_weights_are_sane(dtype: mx.Dtype) -> None:
    """Behind them the next token is as finite as behind a prompt, in each network."""
    shape = Shape("", LLAMA)
    plan = synthetic.make_skipless_plan(shape.args, "qp", dtype, False)
    for model in (make_stock_model(shape, dtype), make_skipless_model(plan.after, dtype)):
        cache = timing.fill_cache(model, 2, 300)
        assert [one.offset for one in cache] == [300] * LAYERS
        keys = cache[0].keys[..., :300, :].astype(mx.float32)
        assert 0.3 < mx.sqrt(keys.square().mean()).item() < 1
        assert cache[0].keys.dtype == dtype
        for logits in (model(mx.zeros((2, 1), mx.int32), cache=cache), model(mx.arange(8)[None])):
            assert 0.1 < mx.abs(logits.astype(mx.float32)).max().item() < 100
            assert logits.dtype == dtype


def test_a_state_stays_and_a_strange_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_stock_model(Shape("", LLAMA), mx.float32)
    state = caches.ArraysCache(2)
    state[0] = mx.ones((1, 3))
    for module in (timing, sizes):
        monkeypatch.setattr(module, "begin_cache", lambda model, batch_size: [state])
    monkeypatch.setattr(timing, "make_prompt_cache", lambda model: [caches.ArraysCache(2)])
    assert timing.fill_cache(model, 1, 9) == [state] and sizes.count_cache_bytes(model, 9) == 0
    chunked = caches.ChunkedKVCache(8)
    monkeypatch.setattr(timing, "begin_cache", lambda model, batch_size: [chunked])
    with pytest.raises(mlx_skipless.UserError, match="ChunkedKVCache"):
        timing.fill_cache(model, 1, 9)


def recorded(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[mx.array]:
    """The tokens that a model is given with a cache, call by call, from now on."""
    calls: list[mx.array] = []
    call: Any = type(model).__call__

    def recording(self: nn.Module, tokens: mx.array, cache: Any = None, *rest: Any) -> mx.array:
        if cache is not None:
            calls.append(tokens)
        return call(self, tokens, cache, *rest)

    monkeypatch.setattr(type(model), "__call__", recording)
    return calls


@pytest.mark.parametrize("length", [1, 4, 5, 9, 10])
def test_timing_decodes_as_mlx_lm_does(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls with the same tokens, chunk by chunk."""
    monkeypatch.setattr(timing, "PROMPT_CHUNK", 4)
    model = make_stock_model(Shape("", LLAMA), mx.float32)
    calls = recorded(model, monkeypatch)
    taken = timing.time_model(model, Case(length, 1), 3)
    own = [call.tolist() for call in calls]
    prompt = mx.array([token for (row,) in own[:-3] for token in row])
    assert prompt.size == length and taken.first_token > 0 and taken.decode > 0
    calls.clear()
    for _ in generate_step(prompt, model, max_tokens=3, prefill_step_size=4):
        pass
    assert own == [call.tolist() for call in calls]


def test_timing_behind_a_cache_reads_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_stock_model(Shape("", LLAMA), mx.float32)
    calls = recorded(model, monkeypatch)
    taken = timing.time_model(model, Case(500, 3, decode_only=True), 4)
    shapes = [call.shape for call in calls]
    assert shapes == [(3, 1)] * 6  # to see a cache's shapes, to make it grow, and four
    assert taken.peak_memory_bytes > benchmark.weight_bytes(model)


def test_the_models_take_turns() -> None:
    a, b, order = nn.Linear(1, 1), nn.Linear(1, 1), []

    def measure(model: nn.Module) -> int:
        order.append("a" if model is a else "b")
        return len(order)

    assert timing.measure_in_turn({"a": a, "b": b}, measure, 3) == {
        "a": [3, 5, 7],
        "b": [4, 6, 8],
    }
    assert "".join(order) == "ab" + "ababab"


@pytest.mark.parametrize(("answers", "rounds"), [([True], 1), ([False, True], 2), ([False] * 3, 4)])
def test_rounds_stop_when_there_is_no_time(answers: list[bool], rounds: int) -> None:
    """Never before the first, and only between two."""
    left = iter(answers)
    found = timing.measure_in_turn(
        {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}, lambda model: 0, 4, lambda: next(left)
    )
    assert found == {"a": [0] * rounds, "b": [0] * rounds} and not [*left]


def test_ratios_are_of_the_same_round() -> None:
    models = {
        "theirs": make_stock_model(Shape("", LLAMA), mx.float32),
        "ours": make_skipless_model(
            synthetic.make_skipless_plan(Shape("", LLAMA).args, "qp", mx.float32, False).after,
            mx.float32,
        ),
    }
    timings = {
        "theirs": [Timing(1.0, 2.0, 10**7), Timing(2.0, 4.0, 10**7), Timing(4.0, 2.0, 10**7)],
        "ours": [Timing(0.5, 1.0, 10**7), Timing(1.0, 1.0, 2 * 10**7), Timing(1.0, 2.0, 10**7)],
    }
    theirs, ours = timing.compare_timings(models, Case(100, 2), 8, timings, bandwidth=1e6)
    assert theirs.prompt_ratio is None and theirs.decode_ratio is None
    assert ours.prompt_ratio == Spread(2, 2, 4) and ours.decode_ratio == Spread(2, 1, 4)
    assert theirs.prompt_tps == Spread(100, 50, 200) and theirs.decode_tps == Spread(8, 4, 8)
    assert ours.first_token_seconds == Spread(1, 0.5, 1) and ours.decode_tps == Spread(16, 8, 16)
    assert theirs.peak_memory_bytes == 10**7 - 4 * WITHOUT_QP
    assert ours.peak_memory_bytes == 2 * 10**7 - 4 * VANILLA
    # The keys and values of 100 tokens and half of those that are decoded, of two sequences.
    cache = 2 * 4 * 2 * LAYERS * KV_WIDTH * (100 + 4.5)
    read = 4 * (WITHOUT_QP - UNREAD + HIDDEN) + cache
    assert ours.limit_share == pytest.approx(read * 8 / 1e6)
    given = (models, Case(100, 2), 8, timings, 1e6)
    first, second = timing.compare_timings(*given, loaded_bytes=4 * VANILLA)
    assert first.peak_memory_bytes == 10**7
    assert second.peak_memory_bytes == 2 * 10**7 - 4 * (VANILLA - WITHOUT_QP)
    only = timing.compare_timings(models, Case(100, 2, decode_only=True), 8, timings, bandwidth=1e6)
    assert only[1].prompt_tps is None and only[1].first_token_seconds is None
    assert only[1].prompt_ratio is None and only[1].decode_ratio == Spread(2, 1, 4)


def test_a_skipless_model_is_measured_against_a_llama_of_its_sizes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", norm="qkv")
    mlx_skipless.convert(tmp_path / "s", tmp_path / "float", remove="qp", verify=False)
    mlx_skipless.convert(
        tmp_path / "s", tmp_path / "packed", remove="p", verify=False, quantize=True, q_bits=8,
        q_group_size=32, dtype="bfloat16",
    )  # fmt: skip
    found = mlx_skipless.benchmark([tmp_path / "float"], **FEW)
    assert found.baseline == "mlx-lm llama" and "the sizes of float" in found.notes[0]
    theirs, ours = found.subjects
    assert (theirs.label, ours.label) == ("mlx-lm llama", "float")
    assert ours.network == "skipless without QP" and theirs.weight_bytes == 4 * VANILLA
    assert ours.weight_bytes == 4 * WITHOUT_QP
    found = mlx_skipless.benchmark([tmp_path / "packed"], **SIZES_ONLY)
    theirs, ours = found.subjects
    norms = (2 * LAYERS + 1) * HIDDEN
    assert theirs.weight_bytes == (VANILLA - norms) * (8 + 1) / 8 + 2 * norms
    assert ours.network == "skipless without P"
    assert theirs.cache_bytes_per_token == ours.cache_bytes_per_token


def test_a_skipless_mixture_of_experts_is_measured_against_mixtral() -> None:
    shape = architecture("mixtral")
    plan = synthetic.make_skipless_plan(shape.args, "qp", mx.float32, False)
    model = benchmark._make_vanilla(make_skipless_model(plan.after, mx.float32))
    theirs = make_stock_model(shape, mx.float32)
    assert benchmark.describe_network(model) == "mlx-lm mixtral"
    assert {n: a.shape for n, a in params(model).items()} == {
        n: a.shape for n, a in params(theirs).items()
    }


def test_a_model_in_mlx_lms_own_code_is_the_baseline(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "x/m", norm="qkv")
    make_llama(tmp_path / "y/m")
    given = [tmp_path / "x/m", tmp_path / "y/m"]
    found = mlx_skipless.benchmark(given, synthetic=config_file(tmp_path), **SIZES_ONLY)
    assert found.baseline == str(given[1])  # two of one name have their whole names
    labels = [str(given[1]), str(given[0]), "mlx-lm llama", "skipless without QP"]
    assert [one.label for one in found.subjects] == labels


def test_a_network_with_skips_and_drops_says_so(tmp_path: Path) -> None:
    args = replace(Shape("", LLAMA).args, removed={"attention": [1]})
    assert benchmark.describe_network(make_skipless_model(args, mx.float32)) == (
        "mlx-skipless with skips without attention"
    )


@pytest.mark.parametrize("model_type", ["olmo2", "plamo2"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_reduced_network_is_measured_against_the_whole_one(
    model_type: str, packed: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"quantize": True, "q_group_size": 32} if packed else {}
    make_model(tmp_path / "s", model_type)
    (tmp_path / "t.txt").write_text("a fox and a crow ate cheese under the tree. " * 80)
    options |= {"calibration": tmp_path / "t.txt", "verify": False}
    ways: dict[str, Any] = {"drop_attention": 1}
    if model_type == "olmo2":
        ways["replace_ffn"] = 2
    mlx_skipless.convert(tmp_path / "s", tmp_path / "whole", **options)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "r", **ways, **options)

    found = mlx_skipless.benchmark([tmp_path / "r"], **SIZES_ONLY)
    theirs, ours = found.subjects
    assert found.baseline == theirs.label == theirs.network == f"mlx-lm {model_type}"
    assert "the sizes of r" in found.notes[0]
    gone = "1 dropped" + ", 2 replaced" * (model_type == "olmo2")
    assert ours.network == f"mlx-lm {model_type} (sub-layers: {gone})"
    given = mlx_skipless.benchmark([tmp_path / "r", tmp_path / "whole"], **SIZES_ONLY)
    assert given.baseline == "whole"
    whole = next(one for one in given.subjects if one.label == "whole")
    assert theirs.weight_bytes == whole.weight_bytes > ours.weight_bytes
    assert theirs.cache_bytes_per_token == whole.cache_bytes_per_token


def test_sizes_alone_take_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no time: a 7B model's."""
    monkeypatch.setattr(mx, "eval", pytest.fail)
    found = mlx_skipless.benchmark(synthetic="mistral-7b", quantize=True, **SIZES_ONLY)
    assert found.bandwidth is None and not found.results
    assert found.notes == ("random weights of Mistral-7B-v0.3, bfloat16, affine 4-bit",)
    assert [round(one.weight_bytes / 1e9, 1) for one in found.subjects] == [4.1, 3.5]


@pytest.mark.parametrize(
    "name", ["llama", "mixtral", "gemma", "gpt_neox", "gptj", "phi", "cohere", "qwen2", "qwen3"]
)
def test_a_saved_shape_is_the_model_in_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 100_000)
    shape = architecture(name)
    synthetic.write_checkpoint(shape, mx.bfloat16, tmp_path / "s")
    assert len([*(tmp_path / "s").glob("*.safetensors")]) > 1
    loaded, config = mlx_lm.utils.load_model(tmp_path / "s")
    expected = params(make_stock_model(shape, mx.bfloat16))
    found = params(loaded)
    assert found.keys() == expected.keys() and config["torch_dtype"] == "bfloat16"
    for tensor, array in found.items():
        assert array.dtype == mx.bfloat16 and mx.array_equal(array, expected[tensor]), tensor
    names = json.loads((tmp_path / "s/model.safetensors.index.json").read_text())["weight_map"]
    theirs = {
        "mixtral": "model.layers.2.block_sparse_moe.experts.3.w2.weight",
        "gpt_neox": "gpt_neox.layers.1.attention.query_key_value.bias",
        "gptj": "transformer.h.0.mlp.fc_in.bias",
    }
    assert theirs.get(name, "model.embed_tokens.weight") in names
    ours = open_checkpoint(tmp_path / "s").read(Layout(shape.args, mx.bfloat16).tensors)
    for tensor, array in synthetic.make_random_weights(Layout(shape.args, mx.bfloat16)).items():
        assert mx.array_equal(ours[tensor], array), tensor  # gains as they act


def test_random_weights_have_the_scale_that_is_said() -> None:
    layout = Layout(Shape("", LLAMA).args, mx.float32)
    weights = synthetic.make_random_weights(layout)
    assert weights.keys() == layout.tensors.keys()
    for name, array in weights.items():
        if array.ndim > 1:
            assert float(mx.std(array)) == pytest.approx(array.shape[1] ** -0.5, rel=0.05), name
        else:
            assert mx.all(array == 1)
    seen = [np.array(weights[f"model.layers.{i}.self_attn.q_proj.weight"]) for i in (0, 1)]
    assert abs(np.corrcoef(seen[0].ravel(), seen[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_repeated_weights_have_that_scale_too(
    dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "REPEATED", 1000)
    layout = Layout(Shape("", LLAMA).args, dtype)
    weights = synthetic.repeat_weights(layout)
    assert weights.keys() == layout.tensors.keys()
    for name, array in weights.items():
        assert array.shape == layout.tensors[name].shape and array.dtype == dtype
        if array.ndim > 1:
            flat = np.array(array.astype(mx.float32)).ravel()
            assert flat.std() == pytest.approx(array.shape[1] ** -0.5, rel=0.1), name
            assert (flat[1000:] == flat[:-1000]).all()
        else:
            assert mx.all(array == 1)


def test_the_way_from_a_shape_to_a_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved, converted without a tokenizer, and measured beside its source."""
    saved, out = str(tmp_path / "saved"), str(tmp_path / "out")
    shape = ["--synthetic", config_file(tmp_path) + ":2", "--save", saved]
    assert main(["bench", *shape, "--prompt-lengths"]) == 0
    assert f"wrote {saved}" in capsys.readouterr().out
    assert json.loads((tmp_path / "saved/config.json").read_text())["num_hidden_layers"] == 2
    removal = ["--skipless", "--remove", "qp"]
    assert main(["convert", "--model", saved, "--mlx-path", out, *removal]) == 0
    found = mlx_skipless.benchmark([out, saved], **FEW)
    assert found.baseline == "saved" and [one.label for one in found.subjects] == ["saved", "out"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: str(tmp_path / f"b.{name}") for name in ("json", "md", "png")}
    arguments = ["--synthetic", config_file(tmp_path), "--dtype", "float32", "--repeats", "2"]
    arguments += ["--prompt-lengths", "3", "7", "--contexts", "300", "--batch-sizes", "1", "2"]
    arguments += ["--decode-tokens", "2", "--json", files["json"], "--markdown", files["md"]]
    assert main(["bench", *arguments, "--plot", files["png"]]) == 0
    printed = capsys.readouterr().out
    told = json.loads(Path(files["json"]).read_text(), parse_constant=pytest.fail)
    assert [*told] == [*benchmark.Benchmark.__dataclass_fields__]
    assert len(told["results"]) == 2 * (2 + 1) * 2 and told["bandwidth"] > 0
    assert mx.device_info()["device_name"] in told["device"] and told["device"] in printed
    document = Path(files["md"]).read_text()
    for one in told["results"]:
        assert [*one] == [*timing.Result.__dataclass_fields__]
        case, speed = one["case"], one["decode_tps"]
        assert speed["low"] <= speed["median"] <= speed["high"]
        assert (one["prompt_tps"] is None) == case["decode_only"] == (case["length"] == 300)
        where = f"{'cache' if case['decode_only'] else 'prompt'} {case['length']} x"
        (row,) = (
            line
            for line in document.splitlines()
            if line.startswith(f"| {where} {case['batch_size']} | {one['label']} |")
        )
        assert f"{one['limit_share']:.0%}" in row
        assert format_spread(Spread(**speed)) in row and row.split(" | ")[2] in printed
        assert (one["decode_ratio"] is None) == (one["label"] == told["baseline"])
    picture = matplotlib.image.imread(files["png"])
    assert picture.shape[1] > 1.5 * picture.shape[0]  # two panels side by side
    assert picture[:8, :8, :3].min() == 1.0  # white behind


def test_speeds_are_shown_to_three_digits() -> None:
    shown = [Spread(1234.4, 1, 2000), Spread(43.21, 9, 50), Spread(1.234, 1, 2)]
    assert [format_spread(one) for one in shown] == [
        "1,234 (1..2,000)", "43.2 (9.0..50.0)", "1.23 (1.00..2.00)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found", "layers"),
    [
        ("mistral-7b", "Mistral-7B-v0.3", 32),
        ("Mistral 7B v0.1", "Mistral-7B-v0.1", 32),
        ("mixtral", "Mixtral-8x7B", 32),
        ("GPT-J:5", "GPT-J-6B, 5 layers", 5),
        ("ministral-8b:6", "Ministral-8B, 6 layers", 6),
    ],
)
def test_shapes_are_found_by_parts_of_their_names(name: str, found: str, layers: int) -> None:
    shape = find_shape(name)
    assert shape.name == found and shape.args.num_hidden_layers == layers
    assert len(shape.args.layer_types) == layers


def test_a_window_that_mlx_lm_does_not_have_is_told() -> None:
    found = mlx_skipless.benchmark(synthetic="mistral-7b-v0.1:1", **SIZES_ONLY)
    assert found.notes[1] == benchmark.NOT_THE_SAME
    assert len(mlx_skipless.benchmark(synthetic="ministral-8b:4", **SIZES_ONLY).notes) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give models, or --synthetic"),
        (["@/none"], "no such file or folder"),
        (["@/l", "@/l"], "given twice"),
        (["@/l", "--remove", "qp"], "are for --synthetic"),
        (["@/l", "--dtype", "float16"], "are for --synthetic"),
        (["@/l", "-q"], "are for --synthetic"),
        (["@/l", "--save", "@/new"], "are for --synthetic"),
        (["@/l", "--prompt-lengths", "0"], "--prompt-lengths 0: must be at least 1"),
        (["@/l", "--contexts", "8", "-3"], "--contexts -3: must be at least 1"),
        (["@/l", "--batch-sizes", "0"], "--batch-sizes 0"),
        (["@/l", "--decode-tokens", "0"], "--decode-tokens 0"),
        (["@/l", "--repeats", "0"], "--repeats 0"),
        (["@/l", "--contexts", "99999999999"], "of memory with all models loaded"),
        (["--synthetic", "mistral-7b", "--batch-sizes", "999999"], "give fewer or smaller"),
        (["--synthetic", "foo"], "no file and none of Llama-2-7B, Llama-3.1-8B"),
        (["--synthetic", "qwen3"], "could be each of Qwen3-8B, Qwen3-0.6B"),
        (["--synthetic", "?!"], "no file and none of"),
        (["--synthetic", "mixtral:0"], "at least 1 layer"),
        (["--synthetic", "@/none.json"], "no none.json"),
        (["--synthetic", "@/odd.json"], "model_type 'odd'"),
        (["--synthetic", "nemo", "--remove", "qp"], "--remove qp"),
        (["--synthetic", "@/config.json", "--q-bits", "4"], "need -q"),
        (["--synthetic", "@/config.json", "-q", "--q-bits", "7"], "--q-bits 2, 3"),
        (["--synthetic", "@/config.json", "--save", "@/l"], "give another --save"),
        (["--synthetic", "@/config.json", "--save", "@/no/l"], "create it first"),
        (["--synthetic", "@/config.json", "--save", "@/n", "--json", "@/n"], "is made there"),
        (["--synthetic", "@/config.json", "--save", "@/n", "--markdown", "@/n/a.md"], "made there"),
        (
            [
                "--synthetic",
                "@/config.json",
                "--save",
                "@/n",
                "--contexts",
                "8",
                "--plot",
                "@/n/a.png",
            ],
            "is made there",
        ),
        (["@/l", "--plot", "@/a.jpg"], "ends in .png"),
        (["@/l", "--plot", "@/a.png", "--json", "@/./a.png"], "both name"),
        (["@/l", "--plot", "@/a.png", "--prompt-lengths"], "--plot draws speeds"),
        (["@/l", "--markdown", "@/no/a.md"], "--markdown"),
        (["@/l", "@/nan"], "the logits of nan are no numbers"),
    ],
)
def test_what_cannot_be_measured(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_llama(tmp_path / "l")
    config_file(tmp_path)
    (tmp_path / "odd.json").write_text('{"model_type": "odd"}')
    if "@/nan" in arguments:
        config, weights = make_llama(tmp_path / "nan")
        weights["model.norm.weight"][0] = np.nan
        write(tmp_path / "nan", config, weights, "float32", shards=1)
    before = sorted(tmp_path.rglob("*"))
    assert main(["bench", *(a.replace("@", str(tmp_path)) for a in arguments)]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("kind", "picked"), [("qwen3_5_moe", 2), ("llama4", 1), ("dbrx", 2)])
def test_picked_experts_are_found_where_the_config_is_nested(
    kind: str, picked: int, tmp_path: Path
) -> None:
    make_model(tmp_path, kind)
    model = load_network(tmp_path)[0]
    nbytes = {name: array.nbytes for name, array in tree_flatten(model.parameters())}
    switched = {
        path: module.weight.shape[0]
        for path, module in model.named_modules()
        if isinstance(module, SwitchLinear)
    }
    experts = sum(
        size * (1 - picked / switched[path])
        for name, size in nbytes.items()
        if (path := name.rpartition(".")[0]) in switched
    )
    embedding = next(size for name, size in nbytes.items() if "embed" in name or "wte" in name)
    expected = sum(nbytes.values()) - experts - embedding * 263 / 264
    assert sizes.count_bytes_read(model) == round(expected)


LOOKED_UP: dict[str, list[str]] = {  # embeddings of which a token reads a row
    "gemma3n": ["model.language_model.embed_tokens_per_layer"],
    "gemma4_text": ["model.embed_tokens_per_layer"],
    "gpt_bigcode": ["transformer.wpe"],
    "gpt2": ["model.wpe"],
    "olmo2": ["model.embed_tokens"],
    "cohere2": [],  # tied
}


@pytest.mark.parametrize("tables", [1024, 1088])
@pytest.mark.parametrize("kind", LOOKED_UP)
def test_a_row_of_each_embedding_is_read(kind: str, tables: int, tmp_path: Path) -> None:
    """Whether or not other matrices have as many rows; of a head that is one too all is read."""
    changes: dict[str, Any] = {}
    if kind.startswith("gemma"):
        changes = {"vocab_size": 1088, "vocab_size_per_layer_input": tables}
    elif tables == 1088:
        changes = {"vocab_size": tables}
    make_model(tmp_path, kind, **changes)
    model = mlx_lm.utils.load_model(tmp_path)[0]
    shares = sizes.find_shares_read(model, 2)
    modules: dict[str, Any] = dict(model.named_modules())
    looked = {path for path, m in modules.items() if isinstance(m, nn.Embedding)} & shares.keys()
    assert sorted(looked) == LOOKED_UP[kind]
    for path in looked:
        assert shares[path] == 2 / len(modules[path].weight)
    assert {type(m) for m in modules.values() if isinstance(m, nn.Embedding)} == {nn.Embedding}
