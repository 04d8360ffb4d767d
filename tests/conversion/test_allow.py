"""A target that may drop and replace sub-layers: what it chooses, what is written, and healing."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
import reference
import zoo
from factory import make_checkpoint, make_llama
from grids import only, thorough
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import mlx_skipless
from mlx_skipless import UserError, cli
from mlx_skipless.evaluation import plots
from mlx_skipless.inference.sizes import count_bytes_read
from mlx_skipless.inference.stock import find_stock, open_network
from mlx_skipless.network.stock import StandIns
from mlx_skipless.quantization.sensitivity import DROP, REPLACE, measure_distances
from mlx_skipless.removal.standins import fit_alone
from mlx_skipless.text import samples
from mlx_skipless.training import recipe

BOTH = "bits and sub-layers"
USELESS, LINEAR = 1, 2  # layers: an attention that does next to nothing, an FFN nearly a matrix


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CALIBRATION", (16, 32))
    monkeypatch.setattr(samples, "LONG_CHECK", (4, 16))


def make_source(folder: Path, kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """A model with an attention that does next to nothing and, a llama, an FFN that is linear."""
    zoo.make_model(folder / "s", kind, **({"num_hidden_layers": 3} | changes))
    file = folder / "s/model.safetensors"
    loaded: Any = mx.load(str(file))
    weights = dict(loaded)
    for name in weights:
        if re.search(rf"layers\.{USELESS}\.self_attn\.o_proj\.", name):
            weights[name] *= 0.01
        if f"layers.{LINEAR}.mlp.gate_proj.weight" in name:
            weights[name] *= 0.01
        if f"layers.{LINEAR}.mlp.gate_proj.bias" in name:
            weights[name] = mx.full(weights[name].shape, 3.0)
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    (folder / "text.txt").write_text(zoo.draw_text(1, 8000))
    return {"calibration": folder / "text.txt", "q_group_size": 32}


def run(folder: Path, tokens: mx.array) -> np.ndarray:
    model: Any = load_model(folder, trust_remote_code=True)[0]
    logits = model(tokens, cache=make_prompt_cache(model)).astype(mx.float32)
    return np.array(logits).astype(np.float64)


def draw_tokens(folder: Path) -> mx.array:
    ids = mlx_lm.utils.load_tokenizer(folder).encode(zoo.draw_text(2, 256))
    return mx.array(ids[:256]).reshape(8, 32)


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.safetensors")
    loaded: Any = mx.load(str(file))
    return {name: np.array(array) for name, array in loaded.items()}


@pytest.mark.parametrize("goal", only({"speed"}, ["speed", "bytes"]))
def test_a_target_is_better_without_what_hardly_matters(goal: str, tmp_path: Path) -> None:
    """The result is what explicit flags make, as small or fast, and closer than bits alone are."""
    how = make_source(tmp_path)
    source = tmp_path / "s"
    dense = sum(array.nbytes for array in read_weights(source).values())
    how["calibration"] = None  # the model's own words, of which it knows most as it is
    target = {"target_bytes": dense // 6} if goal == "bytes" else {"target_speed": 6.5}
    report = mlx_skipless.convert(source, tmp_path / "b", allow="drop,replace", **target, **how)
    assert report.removed == {"attention": [USELESS]} and report.replaced == {"ffn": [LINEAR]}
    assert sum(a.nbytes for a in read_weights(tmp_path / "b").values()) == report.bytes_after
    mlx_skipless.convert(source, tmp_path / "bits", verify=False, **target, **how)
    if goal == "bytes":
        flags = {"drop_attention": 1, "replace_ffn": 1, "verify": False}
        mlx_skipless.convert(source, tmp_path / "flags", **flags, **target, **how)
        for name in ("model.safetensors", "config.json", "model.py"):
            ours, theirs = (tmp_path / folder / name for folder in ("b", "flags"))
            assert ours.read_bytes() == theirs.read_bytes()
    for name in ("b", "bits"):
        loaded = [load_model(tmp_path / one, trust_remote_code=True)[0] for one in ("s", name)]
        before, after = map(count_bytes_read, loaded)
        if goal == "speed":
            assert 6.5 <= before / after < 1.02 * 6.5
        else:
            taken = sum(array.nbytes for array in read_weights(tmp_path / name).values())
            assert taken <= dense // 6 < 1.05 * taken
    tokens = draw_tokens(source)
    wanted = run(source, tokens)
    kls = [reference.softmax_kl(wanted, run(tmp_path / name, tokens)) for name in ("b", "bits")]
    assert kls[0] < 0.7 * kls[1]
    tried = report.bytes_after if goal == "bytes" else after_of(tmp_path / "b")
    check_choices(report, 3, tried)


def after_of(folder: Path) -> int:
    return count_bytes_read(load_model(folder, trust_remote_code=True)[0])


def check_choices(report: Any, layers: int, size: int) -> None:
    """Each sub-layer is told of; those go that cost less than their bytes save."""
    rows = {row.name: row for row in report.choices}
    assert [*rows] == [f"layers.{n} {kind}" for n in range(layers) for kind in ("attention", "ffn")]
    for name, row in rows.items():
        layer, kind = int(name.split()[0].rpartition(".")[2]), name.split()[1]
        dropped = layer in report.removed.get(kind, ())
        replaced = layer in report.replaced.get(kind, ())
        assert row.choice == ("dropped" if dropped else "replaced" if replaced else "stays")
        assert (row.bits is None) == dropped
        if dropped:
            assert row.drop_costs < row.drop_saves
        elif replaced:
            assert row.replacing_costs < row.replacing_saves
        else:
            assert row.drop_costs > row.drop_saves or row.replacing_costs > row.replacing_saves
    (tried,) = report.curves["tried"]
    assert tried == (size, report.verification.kl)
    alone, both = (
        report.curves["bits alone, expected"],
        report.curves["bits and sub-layers, expected"],
    )
    assert both[0][0] < alone[0][0] and min(kl for _, kl in both) <= min(kl for _, kl in alone)


SPEEDS = [
    ("llama", {"allow": "drop"}, 6.0),
    ("qwen3_moe", {"allow": "replace,drop"}, 7.0),
    ("qwen3_5", {"allow": "drop,replace"}, 5.0),
    ("gpt_oss", {"allow": "drop,replace"}, 5.0),
]


@thorough
@pytest.mark.parametrize("case", SPEEDS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_speed_is_kept(case: tuple[str, dict[str, Any], float], tmp_path: Path) -> None:
    """By the bytes that a token reads, of the models as mlx-lm loads them."""
    kind, allowed, speed = case
    how = make_source(tmp_path, kind, num_hidden_layers=4)
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", target_speed=speed, verify=False, **allowed, **how
    )
    models = [load_model(tmp_path / name, trust_remote_code=True)[0] for name in "so"]
    before, after = map(count_bytes_read, models)
    assert speed <= before / after < 1.02 * speed
    assert USELESS in report.removed["attention"]


@thorough
@pytest.mark.parametrize("kind", ["llama", "qwen3_5", "gpt_oss"])
def test_a_distance_is_kept(kind: str, tmp_path: Path) -> None:
    how = make_source(tmp_path, kind, num_hidden_layers=6 if kind == "gemma3n" else 4)
    asked: dict[str, Any] = {"target_kl": 0.1, **how}
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", allow="drop,replace", **asked)
    assert report.verification is not None and report.verification.kl <= 0.1
    alone = mlx_skipless.convert(tmp_path / "s", tmp_path / "a", **asked)
    assert report.bytes_after <= 1.01 * alone.bytes_after
    assert sum(a.nbytes for a in read_weights(tmp_path / "o").values()) == report.bytes_after
    if kind in ("llama", "qwen3_5", "gpt_oss"):
        assert report.bytes_after < 0.97 * alone.bytes_after


@pytest.mark.parametrize("kind", only({"olmo2"}, ["olmo2", "qwen3", "gemma3n", "gemma4_text"]))
def test_distances_are_those_of_the_network_without(kind: str, tmp_path: Path) -> None:
    """By mlx-lm's own network, in which sub-layers give zeros, or what a matrix makes of theirs."""
    zoo.make_model(tmp_path, kind)
    source = find_stock(tmp_path, any_family=True)
    assert source is not None
    network, tokens = open_network(source), draw_tokens(tmp_path)
    stand_ins: StandIns = {}
    if network.is_chain:
        fits = fit_alone(network, tokens, {"attention": [1], "ffn": [2]})
        stand_ins = {which: fit.linear for which, fit in fits.items()}
    ways = {(k, n): DROP for k in ("attention", "ffn") for n in (1, 2) if network.can_drop(n, k)}
    choices = [{which: way} for which, way in ways.items()]
    choices += [ways] + [{which: REPLACE} for which in stand_ins]
    choices += [{**ways, **dict.fromkeys(stand_ins, REPLACE)}] * bool(stand_ins)
    got = measure_distances(network, tokens, choices, stand_ins)
    wanted = run(tmp_path, tokens)
    for choice, distance in zip(choices, got, strict=True):
        lacking: Any = load_model(tmp_path)[0]
        for (kind_, layer), way in choice.items():
            linear = stand_ins[kind_, layer] if way == REPLACE else None
            change(lacking, network, layer, kind_, linear)
        logits = lacking(tokens, cache=make_prompt_cache(lacking)).astype(mx.float32)
        expected = reference.softmax_kl(wanted, np.array(logits).astype(np.float64))
        assert distance == pytest.approx(expected, rel=0.01), choice


def change(model: Any, network: Any, layer: int, kind: str, linear: Any) -> None:
    """Have a sub-layer run, and use nothing of its output but its form."""
    for path in network.sublayers[layer].parts[kind]:
        *outer, name = path.split(".")
        block = model.layers[layer]
        for one in outer:
            block = getattr(block, one)
        inner = block[name]

        class Changed(type(inner)):  # type: ignore[misc]
            def __call__(self, x: mx.array, *args: Any, **options: Any) -> Any:
                out = super().__call__(x, *args, **options)
                given = mx.zeros_like(x) if linear is None else linear(x)
                return (given, *out[1:]) if isinstance(out, tuple) else given

        inner.__class__ = Changed


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Healing sees little text and draws no curve."""

    def treat(**own: Any) -> recipe.Treatment:
        short = {"context": 16, "batch_size": 4, "warmup": 2, "learning_rate": RATES.get("now")}
        return recipe.Treatment(**{**own, **short})

    monkeypatch.setattr("mlx_skipless.training.converting.Treatment", treat)
    monkeypatch.setattr("mlx_skipless.training.healing.MEASURED_TOKENS", 256)
    monkeypatch.setattr(plots, "plot_losses", lambda runs, file, *look: file.write_text("none"))


RATES: dict[str, float] = {}
HEALED = [  # with a learning rate, and the share of the KL that is left at most
    ("llama", {"drop_ffn": 1}, 3e-3, 0.9),
    ("olmo2", {"drop_ffn": 1}, 3e-4, 0.7),
    ("olmo2", {"drop_ffn": 1, "quantize": True, "q_group_size": 32}, 3e-4, 1.1),
    ("qwen3", {"replace_ffn": 1, "drop_attention": 1, "dtype": "bfloat16"}, 3e-4, 1.1),
    ("qwen3_moe", {"drop_attention": 1}, 3e-4, 1.0),
    ("olmo2", {"target_bytes": 60_000, "allow": "drop", "q_group_size": 32}, 3e-4, 1.1),
]


@thorough
@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("case", HEALED, ids=lambda case: str(case[:2]))
def test_what_is_left_is_healed(
    case: tuple[str, dict[str, Any], float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is closer to its source, and no further away once it is rounded."""
    kind, asked, rate, most = case
    monkeypatch.setitem(RATES, "now", rate)
    make_source(tmp_path, kind, num_hidden_layers=3 if "target_bytes" in asked else 2)
    asked = {"calibration": tmp_path / "text.txt", "verify": False, **asked}
    plain = mlx_skipless.convert(tmp_path / "s", tmp_path / "p", **asked)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", heal=6, **asked)
    assert report.healed is not None and report.healed.steps == 6 and not report.healed.rounded
    assert (report.healed.kl_after < report.healed.kl_before) == report.healed.kept
    assert (report.removed, report.replaced) == (plain.removed, plain.replaced)
    tokens = draw_tokens(tmp_path / "s")
    wanted = run(tmp_path / "s", tokens)
    kls = [reference.softmax_kl(wanted, run(tmp_path / name, tokens)) for name in "po"]
    assert kls[1] < most * kls[0]
    assert {*tmp_path.iterdir()} == {tmp_path / name for name in ("s", "p", "o", "text.txt")}
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert ("quantization" in config) == (report.quantization is not None)
    dtype = getattr(mx, asked.get("dtype", "float32"))
    loaded: Any = mx.load(str(tmp_path / "o/model.safetensors"))
    assert {array.dtype for array in loaded.values()} - {mx.uint32} == {dtype}


@thorough
@pytest.mark.usefixtures("short_runs")
def test_healing_reads_no_further_than_the_model_was_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network with a table of 64 positions, trained on 80 tokens in a row, gives no numbers."""
    treat = partial(recipe.Treatment, context=80, batch_size=4, warmup=2)
    monkeypatch.setattr("mlx_skipless.training.converting.Treatment", treat)
    make_source(tmp_path, "gpt2", n_layer=2, n_positions=64, n_ctx=64)
    asked: dict[str, Any] = {"calibration": tmp_path / "text.txt", "drop_attention": 1}
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", heal=2, **asked)
    assert report.healed is not None and math.isfinite(report.healed.kl_after)


@pytest.mark.parametrize(
    "exact", [{"fold_norms": True}, {"precompute_first_layer": "force"}], ids=str
)
def test_what_is_exact_does_not_go_with_healing_before_rounding(
    exact: dict[str, Any], tmp_path: Path
) -> None:
    make_llama(tmp_path / "s")
    asked: dict[str, Any] = {"drop_ffn": 1, "heal": 2, "quantize": True, "q_group_size": 32}
    flag = "--" + next(iter(exact)).replace("_", "-")
    with pytest.raises(mlx_skipless.UserError, match=f"{flag} and --heal: .* drop one"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **asked, **exact)


def test_an_option_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^convert\(\) got an unexpected keyword argument 'quiet'"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", quiet=True)


@thorough
@pytest.mark.usefixtures("short_runs")
def test_what_training_does_not_help_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is packed already is rounded again; a warning says that this was no good."""
    make_source(tmp_path, num_hidden_layers=2)
    asked: dict[str, Any] = {
        "quantize": True, "q_group_size": 32, "calibration": tmp_path / "text.txt",
    }  # fmt: skip
    mlx_skipless.convert(tmp_path / "s", tmp_path / "p", **asked)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", heal=1, **asked)
    assert report.healed is not None and report.healed.rounded
    same = all(
        (a == b).all()
        for a, b in zip(
            read_weights(tmp_path / "p").values(),
            read_weights(tmp_path / "o").values(),
            strict=True,
        )
    )
    assert same == (not report.healed.kept)
    assert any("untrained weights stay" in text for text in report.warnings) == same


@pytest.mark.usefixtures("short_runs")
def test_a_signal_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_source(tmp_path, num_hidden_layers=2)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_skipless.training.healing.Run._compile_step", stop)
    asked: dict[str, Any] = {"drop_ffn": 1, "heal": 3, "calibration": tmp_path / "text.txt"}
    with pytest.raises(KeyboardInterrupt):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **asked)
    assert {*tmp_path.iterdir()} == {tmp_path / "s", tmp_path / "text.txt"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--allow drop", "--allow is for a target"),
        ("--allow fly --target-bytes 1MB", "give drop, replace or drop,replace"),
        ("--allow drop,drop --target-bytes 1MB", "give drop, replace or drop,replace"),
        ("--allow drop --target-bytes 1MB --drop-ffn 1", "drop --drop-ffn"),
        ("--allow drop --target-speed 2x --replace-ffn 1", "drop --replace-ffn"),
        ("--allow drop --target-kl 0.1 --skipless", "--skipless"),
        ("--allow drop --target-kl 0.1 --remove p", "--remove p and --allow"),
        ("--allow drop --target-kl 0.1 --fold-norms", "--fold-norms and --allow"),
        ("--allow drop --target-bytes 1MB --plot x.txt", "ends in .png"),
        ("--target-bytes 1MB --plot x.png", "--plot draws what --allow"),
        ("--target-speed fast", "is no ratio"),
        ("--heal 3", "nothing that is asked for loses anything"),
        ("--heal -1", "0 or more"),
        ("--heal 3 --skipless", "--heal is no training"),
    ],
)
def test_what_cannot_be(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "s"
    if "remove" in flags or "fold" in flags:  # what only a look at the model refuses
        zoo.make_model(source, "llama", num_hidden_layers=2)
    where = ["--model", str(source), "--mlx-path", str(tmp_path / "o")]
    code = cli.main(["convert", *where, *flags.split()])
    shown = capsys.readouterr()
    assert code in (1, 2) and said in shown.err and "Traceback" not in shown.err
    assert {*tmp_path.iterdir()} <= {source}


@pytest.mark.parametrize(
    ("kind", "allow", "said"),
    [
        (None, "drop", "for models that mlx-lm's own code runs"),
        pytest.param("gemma3n", "replace", "nothing of that can be done", marks=thorough),
    ],
)
def test_models_of_which_nothing_can_go(
    kind: str | None, allow: str, said: str, tmp_path: Path
) -> None:
    if kind is not None:
        zoo.make_model(tmp_path / "s", kind)
    source = tmp_path / "s" if kind is not None else None
    with pytest.raises(UserError, match=said):
        mlx_skipless.convert(source, tmp_path / "o", allow=allow, target_bytes=10**6)
    assert not (tmp_path / "o").exists()


def test_one_layer_stays_in_a_plan_too(tmp_path: Path) -> None:
    zoo.make_model(tmp_path / "s", "olmo2", num_hidden_layers=1)
    for dry_run in (True, False):
        with pytest.raises(UserError, match="nothing of that can be done to a sub-layer"):
            mlx_skipless.convert(
                tmp_path / "s", tmp_path / "o", allow="drop", target_bytes=10**5, dry_run=dry_run
            )
    assert not (tmp_path / "o").exists()


def test_a_plan_says_what_is_measured_later(tmp_path: Path) -> None:
    zoo.make_model(tmp_path / "s", "llama")
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", allow="drop", target_speed=4, q_group_size=32, dry_run=True
    )
    assert any("which of 8 sub-layers go" in note for note in report.notes)
    assert not (tmp_path / "o").exists()


@thorough
def test_the_command_shows_why_and_draws_the_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_source(tmp_path)
    arguments = (
        f"convert --model {tmp_path}/s --mlx-path {tmp_path}/o --target-speed 6x --allow "
        f"drop,replace --q-group-size 32 --calibration {tmp_path}/text.txt --plot "
        f"{tmp_path}/curve.svg --json {tmp_path}/report.json"
    )
    assert cli.main(arguments.split()) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"layers\.{USELESS} attention +dropped", shown)
    assert "bits alone, expected" in (tmp_path / "curve.svg").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["choice"] for row in report["choices"]} == {"stays", "dropped", "replaced"}
    assert len(report["curves"]) == 3


@pytest.mark.parametrize(("kind", "bits"), [("olmo2", 2), ("llama", 2), ("skipless", 8)])
def test_the_speed_is_told_as_for_the_same_bits_by_hand(
    kind: str, bits: int, tmp_path: Path
) -> None:
    """Without removals the network would have such bits everywhere, chosen or not."""
    if kind != "skipless":
        make_source(tmp_path, kind)
        gone: dict[str, Any] = {"drop_block": 1}
    else:
        make_checkpoint(tmp_path / "s", num_hidden_layers=3)
        gone = {"remove": "qp"}
    how = gone | {"q_group_size": 32, "verify": False}
    by_hand = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "a", quantize=True, q_bits=bits, **how
    )
    size = by_hand.bytes_after
    chosen = mlx_skipless.convert(tmp_path / "s", tmp_path / "b", target_bytes=size, **how)
    assert chosen.bytes_after == size
    assert chosen.speedup_from_bytes == by_hand.speedup_from_bytes


def test_the_speed_is_told_as_of_a_whole_network_of_such_bits(tmp_path: Path) -> None:
    """What stays has its bits, under the layers' old numbers; what went has about as many."""
    how = make_source(tmp_path, "olmo2") | {"drop_block": 1, "verify": False}
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", target_bytes=70_000, **how)
    result, config = load_model(tmp_path / "o")
    own = {p: q["bits"] for p, q in config["quantization"].items() if isinstance(q, dict)}
    assert len({*own.values()}) > 2
    usual = config["quantization"]["bits"]
    packed = {path for path, module in result.named_modules() if "scales" in module}
    own = {path: own.get(path, usual) for path in packed}
    mean = np.mean([*own.values()])
    others = min((2, 3, 4, 5, 6, 8), key=lambda bits: abs(bits - mean))
    (gone,) = report.removed["attention"]
    kept = [layer for layer in range(3) if layer != gone]
    named = {re.sub(r"layers\.(\d+)", lambda m: f"layers.{kept[int(m[1])]}", p): b
             for p, b in own.items()}  # fmt: skip

    def choose(path: str, module: Any) -> Any:
        return hasattr(module, "to_quantized") and {
            "group_size": 32, "bits": named.get(path, others)
        }  # fmt: skip

    whole: Any = load_model(tmp_path / "s")[0]
    nn.quantize(whole, class_predicate=choose)
    ratio = count_bytes_read(whole) / count_bytes_read(result)
    assert report.speedup_from_bytes == pytest.approx(ratio, rel=1e-9)
