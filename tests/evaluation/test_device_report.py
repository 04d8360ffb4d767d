"""bench --report: what it asks of a device, what it finds, and what it writes. No speed counts."""

import json
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from grids import only

import mlx_skipless
from mlx_skipless.cli.main import main
from mlx_skipless.cli.report_tables import write_report
from mlx_skipless.errors import UserError
from mlx_skipless.evaluation import device_report, effort, exactness, timing
from mlx_skipless.evaluation.device_report import DeviceReport, report_device
from mlx_skipless.evaluation.effort import CONTEXTS, Pace, describe_cuts, list_efforts
from mlx_skipless.evaluation.exactness import Exactness, compute_logits, measure_exactness
from mlx_skipless.evaluation.synthetic import Shape, write_checkpoint
from mlx_skipless.evaluation.timing import Case, Timing
from mlx_skipless.evaluation.variants import (
    PLAIN,
    SharedWeights,
    count_dropped,
    make_plain,
    make_variants,
)
from mlx_skipless.inference.sizes import count_bytes_read, count_cache_bytes
from mlx_skipless.memory import weight_bytes
from mlx_skipless.network.parts import tensors_of
from mlx_skipless.quantization.layout import Layout
from mlx_skipless.quantization.settings import Quantization

HIDDEN, INNER, VOCAB, KV_WIDTH = 128, 192, 264, 64
CONFIG: dict[str, Any] = {
    "model_type": "mistral", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip


def shape(layers: int) -> Shape:
    return Shape("", CONFIG | {"num_hidden_layers": layers})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small shape's config, little to measure, and a folder for what is temporary."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 2}))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(timing, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(timing, "BANDWIDTH_REPEATS", 1)
    monkeypatch.setattr(device_report, "WIDTHS", (1,))
    monkeypatch.setattr(device_report, "PROBE_TOKENS", 2)
    monkeypatch.setattr(effort, "CONTEXTS", (3, 5))
    monkeypatch.setattr(effort, "CHOICES", ((1, 1, 2, 2, 1, 6),))
    monkeypatch.setattr(device_report, "FORMATS", {"4 bits": Quantization(4, 64)})
    monkeypatch.setitem(report_device.__kwdefaults__, "shape", str(config))  # type: ignore[arg-type]
    monkeypatch.setitem(report_device.__kwdefaults__, "seconds", 1e6)  # type: ignore[arg-type]
    return tmp_path


@pytest.mark.parametrize("seed", only([0], range(4)))
def test_float64_is_the_references(seed: int) -> None:
    """The package's own float64 network and the tests' one, which know nothing of each other."""
    weights = exactness.make_weights(np.random.default_rng(seed))
    doubles = {name: array.astype(np.float64) for name, array in weights.items()}
    tokens = np.random.default_rng(seed).integers(0, exactness.VOCABULARY, (2, 12))
    expected = reference.logits(exactness.CONFIG, doubles, tokens)
    assert reference.worst_relative_error(expected, compute_logits(doubles, tokens)) < 1e-12


def spoil(name: str, factor: float) -> Any:
    """A conversion that gets one tensor wrong after it has checked its result."""

    def convert(source: Path, result: Path, **options: Any) -> Any:
        report = mlx_skipless.convert(source, result, **options)
        file = str(result / "model.safetensors")
        arrays = mx.load(file)
        assert isinstance(arrays, dict)
        mx.save_safetensors(file, arrays | {name: arrays[name] * factor})
        return report

    return convert


def test_a_wrong_result_is_not_exact(tmp_path: Path) -> None:
    found = measure_exactness(spoil("model.layers.1.self_attn.head_skip", 1.001), tmp_path)
    assert found.removed == {"q": [0, 1, 2, 3], "p": [0, 1, 2, 3]}
    assert 1e-8 < found.source_error < 1e-4 and found.check_error < 1e-4
    assert not found.exact


@pytest.mark.parametrize("field", ["result_error", "stepwise_error", "check_error"])
def test_each_error_counts(field: str) -> None:
    good = Exactness({}, 1e-6, 2e-6, 3e-6, 4e-6, True)
    assert good.exact
    for error in (2e-5, math.nan, math.inf):
        assert not replace(good, **{field: error}).exact
    coarse = replace(good, source_error=1e-3)
    assert coarse.exact and not replace(coarse, source_error=0.02).exact


@pytest.mark.parametrize("most", [1, 2, 3, 7, 32])
def test_efforts_are_listed_from_the_best_on(most: int) -> None:
    efforts = [*list_efforts(most)]
    assert efforts[0].layers == most and efforts[0].contexts == CONTEXTS
    assert efforts[-1].layers == 1 and efforts[-1].repeats == 1
    for one in efforts:
        assert 1 <= one.layers <= most and one.repeats >= 1 and one.decode_tokens >= 1
        assert one.contexts == CONTEXTS[: len(one.contexts)] and one.contexts
        assert one.prompts == one.contexts[: len(one.prompts)]
        assert one.layers > 1 or not one.prompts
        assert [case.length for case in one.list_cases()] == [*one.contexts]
        assert sum(not case.decode_only for case in one.list_cases()) == len(one.prompts)
    paces = [Pace(0.02 * one.layers, 1e-3 * one.layers, 0) for one in efforts]
    costs = [one.estimate(pace) for one, pace in zip(efforts, paces, strict=True)]
    assert costs[-1] == min(costs) and costs[0] == max(costs)


def test_cuts_are_told() -> None:
    best = next(list_efforts(32))
    assert describe_cuts(best, 32) == ""
    assert describe_cuts(replace(best, layers=12), 32) == "12 of 32 layers"
    poorest = [*list_efforts(32)][-1]
    assert describe_cuts(poorest, 32) == (
        "1 of 32 layers, contexts up to 128, no prompts, 2 of 6 networks, fewer rounds, "
        "fewer tokens"
    )


@pytest.mark.parametrize("packed", [None, Quantization(4, 64)], ids=["dense", "packed"])
@pytest.mark.parametrize("layers", only([4], [1, 2, 4, 8]))
def test_variants_lack_what_their_labels_say(layers: int, packed: Quantization | None) -> None:
    made = make_variants(shape(layers), mx.bfloat16, packed)
    gone = count_dropped(layers)
    assert next(iter(made)) == PLAIN and gone == max(1, layers // 4)
    nbytes = 2 if packed is None else (4 + 2 * 16 / 64) / 8
    square = nbytes * HIDDEN**2
    norms = 2 * HIDDEN * 2  # of a Llama's layer; the skipless networks' have no weights
    skips = 2 * 4  # a number a head
    attention = 2 * square + 2 * nbytes * HIDDEN * KV_WIDTH
    plain = count_bytes_read(made[PLAIN])
    read = [plain - count_bytes_read(model) for model in made.values()]
    without = 2 * layers * square + layers * norms
    table = attention - square  # Q, K and V of a layer
    row = nbytes * (HIDDEN + 2 * KV_WIDTH)  # q, k and v beside the stream
    assert read == [
        0,
        without,
        without - skips * (2 * layers - 1),  # no layer before has heads for the first
        table + norms / 2 - row,
        gone * attention,
        gone * (attention - square - 2 * HIDDEN),
    ]
    cached = [count_cache_bytes(model, 1) for model in made.values()]
    assert cached[:4] == [layers * 2 * KV_WIDTH * 2] * 4 and max(cached[4:]) < cached[0]
    tokens = mx.array([[1, 2, 3]])
    for label, model in made.items():
        logits = model(tokens).astype(mx.float32)
        assert logits.shape == (1, 3, VOCAB) and 0.05 < mx.abs(logits).max().item() < 100, label


def test_a_prompt_needs_the_last_attention() -> None:
    """Without it MLX would leave out the layers behind the last one that has a cache."""
    for layers in (2, 6):
        dropped = [*make_variants(shape(layers), mx.bfloat16).values()][-2]
        whole = [type(layer.self_attn).__name__ == "Attention" for layer in dropped.layers]
        assert whole.count(False) == max(1, layers // 3) and whole[-1]


@pytest.mark.parametrize("packed", [None, Quantization(8, 64)], ids=["dense", "packed"])
def test_networks_share_weights(packed: Quantization | None) -> None:
    made, shared = make_variants(shape(3), mx.bfloat16, packed), SharedWeights()
    sizes = {label: weight_bytes(model) for label, model in made.items()}
    for model in made.values():
        shared.share(model)
    assert {label: weight_bytes(model) for label, model in made.items()} == sizes
    assert shared.nbytes < 2.2 * sizes[PLAIN] < sum(sizes.values()) / 2
    held = {id(array) for array in shared.values()}
    for model in made.values():
        own = [id(array) for array in tensors_of(model).values()]
        assert len({*own}) == len(own) and {*own} <= held  # none is read twice
    plain = make_plain(shape(3), mx.bfloat16, packed)
    for name, array in tensors_of(plain).items():
        assert mx.array_equal(array, tensors_of(made[PLAIN])[name]), name


def cells(document: str) -> Iterator[list[str]]:
    for line in document.splitlines():
        if line.startswith("| "):
            yield line.strip("| ").split(" | ")


def test_the_command(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure of the file is one that was measured, and nothing else is left."""
    file, numbers = quick / "r.md", quick / "r.json"
    assert main(["bench", "--report", str(file), "--json", str(numbers)]) == 0
    assert f"wrote {file}: paste it into a new issue" in capsys.readouterr().out
    assert {one.name for one in quick.iterdir()} == {"config.json", "r.md", "r.json", "scratch"}
    assert [*(quick / "scratch").iterdir()] == []
    document, told = file.read_text(), json.loads(numbers.read_text(), parse_constant=pytest.fail)
    assert [*told] == [*DeviceReport.__dataclass_fields__]
    assert mx.device_info()["device_name"] in document and "- exact here: yes" in document
    rows = [*cells(document)]
    for one in told["formats"]:
        assert one["effort"]["layers"] == told["layers"] == 2 and one["cuts"] == "prompts up to 3"
        assert f"### {one['name']}" in document
        assert len(one["results"]) == 2 * len(one["networks"]) == 12
        for network in one["networks"]:
            assert network["bytes_per_token"] == network["whole_bytes_per_token"]
            speeds = [r for r in one["results"] if r["label"] == network["label"]]
            (row,) = (row for row in rows if row[0] == network["label"] and len(row) == 5)
            for cell, found in zip(row[3:], speeds, strict=True):
                speed, *ratio = (float(x.strip("()").replace(",", "")) for x in cell.split())
                assert speed == pytest.approx(found["decode_tps"]["median"], rel=0.01)
                plain = network["label"] == PLAIN
                wanted = [] if plain else [found["decode_ratio"]["median"]]
                assert ratio == pytest.approx(wanted, abs=0.006)
            assert [r["prompt_tps"] is None for r in speeds] == [False, True]
    conversion = told["conversion"]
    assert conversion["whole_seconds"] == pytest.approx(
        conversion["seconds"] * count(2) / count(conversion["layers"])
    )


def count_operations(width: int) -> int:
    """Of a conversion of two layers: each weight times a row of a matrix as wide as the stream."""
    narrow = device_report._narrow(shape(5), HIDDEN // width)
    return 2 * width * Layout(narrow.args, mx.bfloat16).count()


SECONDS = 1e6
# At which the products of the widest of these conversions take longer than that, with SAFETY.
WIDE_SPEED = 1.5 * count_operations(128) / SECONDS


@pytest.mark.parametrize(
    ("speed", "refused", "expected"),
    [
        (1e30, (), 128), (WIDE_SPEED, (), 64), (1e30, (128,), 64), (1e-30, (), 32),
        (1e30, (64, 128), 32),
    ],
)  # fmt: skip
def test_the_widest_conversion_that_there_is_time_and_room_for(
    speed: float, refused: tuple[int, ...], expected: int, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    def write(shape: Shape, dtype: mx.Dtype, folder: Path) -> None:
        assert (shape.args.num_hidden_layers, shape.args.vocab_size) == (2, VOCAB // 4)
        if shape.args.hidden_size in refused:
            raise UserError("no room")
        write_checkpoint(shape, dtype, folder)

    monkeypatch.setattr(device_report, "_time_products", lambda width: speed)
    monkeypatch.setattr(device_report, "write_checkpoint", write)
    convert = mlx_skipless.convert
    found = device_report._time_conversions(convert, shape(5), tmp_path, SECONDS, lambda *_: None)
    assert found.hidden_size == expected
    assert found.whole_seconds > found.seconds
    # All of the shape's weights, each multiplied by a matrix as wide as its stream.
    whole = 2 * HIDDEN * Layout(shape(5).args, mx.bfloat16).count()
    share = whole / count_operations(expected)
    assert found.whole_seconds / found.seconds == pytest.approx(share)


def test_the_narrowest_conversion_must_be_possible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def write(*given: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(device_report, "write_checkpoint", write)
    with pytest.raises(UserError, match="no room"):
        device_report._time_conversions(
            mlx_skipless.convert, shape(5), tmp_path, SECONDS, lambda *_: None
        )


def count(layers: int) -> int:
    return sum(array.size for array in tensors_of(make_plain(shape(layers), mx.bfloat16)).values())


def test_what_is_too_slow_or_too_large_is_left_out(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Exactness({"q": [0]}, 1e-6, 1e-6, 1e-6, 1e-6, True)
    converted = device_report.ConversionReport(2, 128, 1000, 1.0, 1000, 2.0)
    monkeypatch.setattr(device_report, "measure_exactness", lambda *given, **options: exact)
    monkeypatch.setattr(device_report, "_time_conversions", lambda *given: converted)
    monkeypatch.setattr(effort, "CHOICES", ((1, 1, 1, 1, 1, 6),))

    def report(seconds: float, memory: int) -> DeviceReport:
        monkeypatch.setattr(device_report, "device_memory_bytes", lambda: memory)
        return report_device(mlx_skipless.convert, seconds=seconds)

    for found, reason in (
        (report(0, 10**9), "a token takes too long"),
        (report(1e6, 100_000), "not even one layer fits"),
    ):
        (one,) = found.formats
        assert one.effort is None and not one.results
        assert reason in write_report(found) and "- exact here: yes" in write_report(found)
    shared = SharedWeights()
    for model in make_variants(shape(1), mx.bfloat16, Quantization(4, 64)).values():
        shared.share(model)
    monkeypatch.setattr(effort, "CHOICES", ((1, 1, 1, 1, 0, 6), (1, 1, 1, 1, 0, 2)))
    estimate = effort.Effort.estimate
    monkeypatch.setattr(
        effort.Effort, "estimate",
        lambda self, pace: estimate(self, pace) * (1 if self.networks == 2 else math.inf),
    )  # fmt: skip
    (one,) = report(1e6, 10**9).formats
    assert [network.label for network in one.networks] == [*make_variants(shape(2), mx.float32)][:2]
    assert "2 of 6 networks" in one.cuts and len(one.results) == 2
    (one,) = report(1e6, int(1.02 * shared.nbytes / device_report.MEMORY_SHARE)).formats
    assert one.effort is not None and one.effort.layers == 1 and one.effort.networks == 2
    assert one.cuts.startswith("1 of 2 layers, ")
    wrong = replace(found, exactness=replace(exact, result_error=1.0, same_tokens=False))
    assert "- exact here: **no**" in write_report(wrong) and "not all the same" in write_report(
        wrong
    )


@pytest.mark.parametrize(
    ("seconds", "lengths", "token"), [(1000.0, [2, 2, 16, 128, 1024], 0.01), (20.0, [2], 5.0)]
)
def test_a_first_run_that_compiles_does_not_count(
    seconds: float, lengths: list[int], token: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts where there is no time for a second one."""
    read: list[int] = []

    def run(model: Any, case: Case, decode_tokens: int) -> Timing:
        read.append(case.length)
        first = 5.0 if len(read) == 1 else 0.0
        once = 0.01 + first
        return Timing(once + 1e-4 * (case.length - 1), once, 0)

    monkeypatch.setattr(device_report, "time_model", run)
    monkeypatch.setattr(device_report, "find_shape", lambda name: shape(2))
    clock, tell = device_report._Clock(seconds), lambda done, total: None
    measuring = device_report._Measuring("", shape(4), None, 1.0, clock, tell)
    pace, nbytes = measuring._probe(2)
    assert read == lengths and pace.token == pytest.approx(token, abs=0.011)
    assert pace.prompt == pytest.approx(1e-4) and pace.load > 0
    assert nbytes == count_bytes_read(make_plain(shape(2), mx.bfloat16))


def test_an_interruption_leaves_nothing(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(convert: Any, folder: Path, **options: Any) -> None:
        assert folder.parent == quick / "scratch"
        (folder / "source").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(device_report, "measure_exactness", interrupt)
    assert main(["bench", "--report", str(quick / "r.md")]) == 1
    assert capsys.readouterr().err == "error: interrupted\n"
    assert {one.name for one in quick.iterdir()} == {"config.json", "scratch"}
    assert [*(quick / "scratch").iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m"], "give it alone"),
        (["--repeats", "2"], "give it alone"),
        (["--synthetic", "mistral-7b"], "give it alone"),
        (["-q"], "give it alone"),
        (["--json", "@/no/r.json"], "--json"),
    ],
)
def test_a_report_is_asked_for_alone(
    arguments: list[str], said: str, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [one.replace("@", str(quick)) for one in arguments]
    assert main(["bench", *given, "--report", str(quick / "r.md")]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and re.fullmatch(r"error: .*\n", error)
    assert not (quick / "r.md").exists()
