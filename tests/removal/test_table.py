"""The first layer as a table: the same function, what it saves, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
from factory import make_checkpoint, make_llama, stored
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model
from reference import Config, Weights

import mlx_skipless
from mlx_skipless.architectures.config import read_model_args
from mlx_skipless.cli.main import main
from mlx_skipless.conversion.report import Report
from mlx_skipless.removal.table import measure_table
from mlx_skipless.text import samples

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
ALL_BIASES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CALIBRATION", (16, 16))
    monkeypatch.setattr(samples, "LONG_CHECK", (4, 32))


def made(folder: Path, **config: Any) -> tuple[Config, Weights]:
    """A random pretrained model, or with ``norm`` one of our own format."""
    if "norm" in config:
        return make_checkpoint(folder, **SIZES | config)
    llama, weights = make_llama(folder, **SIZES | config)
    return reference.llama_config(llama), weights


def forced(tmp_path: Path, **options: Any) -> Report:
    return mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", precompute_first_layer="force", **options
    )


def text(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 12))


def expected_row(config: Config) -> int:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    row = (heads + 2 * kv_heads) * config["head_dim"]
    passes = config["block"] == "parallel" or config["skip"] == "both"
    return row + (config["hidden_size"] if passes else 0)


PRETRAINED: list[Config] = [
    {},
    {"tie_word_embeddings": True, "num_key_value_heads": 1},
    {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    {"model_type": "mistral", "sliding_window": 5, "num_key_value_heads": 4},
]
OWN: list[Config] = [
    {"norm": "none"},
    {"norm": "none", "num_key_value_heads": 4, "tie_word_embeddings": True},
    {"norm": "qkv", "gains": True, "linear_paths": True, "tie_word_embeddings": True},
    {"norm": "qkv", "gains": True, "skip": "ffn", "bias": ALL_BIASES, "head_dim": 32},
    {"norm": "qkv", "gains": True, "norms": ["kv", "heads"], "bias": ALL_BIASES},
    {"norm": "pre", "skip": "both", "bias": ALL_BIASES},
    {"norm": "none", "block": "parallel", "bias": ALL_BIASES},
    {"norm": "none", "block": "parallel", "num_key_value_heads": 4},
    {"norm": "qkv", "block": "parallel", "skip": "ffn", "tie_word_embeddings": True},
    {"norm": "pre", "block": "parallel", "skip": "both", "gains": True, "final_norm": False},
]


@pytest.mark.parametrize("remove", ["qp", "p"])
def test_a_first_layer_without_any_matrix_is_checked(remove: str, tmp_path: Path) -> None:
    """Its attention has nothing but a table, and the check watches it all the same."""
    made(tmp_path / "s")
    report = forced(tmp_path, skipless=True, remove=remove)
    assert report.removed["p"] == [0, 1] and report.verification is not None
    assert report.verification.max_rel_logit_error < 1e-3


@pytest.mark.parametrize(
    ("config", "remove"),
    [
        *((config, "none") for config in PRETRAINED),
        *(pytest.param(config, "auto", marks=pytest.mark.thorough) for config in PRETRAINED),
        *((config, remove) for config in OWN for remove in ("auto", "none")),
    ],
    ids=str,
)
def test_the_same_function(config: Config, remove: str, tmp_path: Path) -> None:
    source = made(tmp_path / "s", **config)
    report = forced(tmp_path, remove=remove)
    weights = stored(tmp_path / "o")
    assert weights["model.embed_tokens.weight"].shape == (264, expected_row(source[0]))
    gone = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "input_layernorm"]
    gone += ["self_attn.kv_norm"]
    gone += ["mlp"] if source[0]["block"] == "parallel" else []
    assert not any(f"model.layers.0.{part}" in name for name in weights for part in gone)
    written = json.loads((tmp_path / "o/config.json").read_text())
    for name, layers in written["biases"].items():
        module = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        for layer in layers:
            assert f"model.layers.{layer}.{module}.{name}.bias" in weights
    assert sum(array.size for array in weights.values()) == report.params_after
    tokens = text()
    expected = reference.logits(*source, tokens)
    model, _ = mlx_skipless.load(tmp_path / "o")
    assert reference.worst_relative_error(expected, np.array(model(mx.array(tokens)))) < 1e-5
    assert report.verification is not None and report.verification.kl < 1e-10
    cache: list[Any] = make_prompt_cache(model)
    steps = [model(mx.array(tokens[:, i : i + 1]), cache=cache) for i in range(tokens.shape[1])]
    assert reference.worst_relative_error(expected, np.array(mx.concatenate(steps, axis=1))) < 1e-5


def test_mlx_lm_runs_it(tmp_path: Path) -> None:
    source = made(tmp_path / "s")
    assert not forced(tmp_path).stock
    model, tokenizer = mlx_lm.load(  # type: ignore[misc]
        str(tmp_path / "o"), tokenizer_config={"trust_remote_code": True}, trust_remote_code=True
    )
    tokens = text()
    expected = reference.logits(*source, tokens)
    assert reference.worst_relative_error(expected, np.array(model(mx.array(tokens)))) < 1e-5
    assert mlx_lm.generate(model, tokenizer, "once", max_tokens=3)
    with pytest.raises(ValueError, match="table by token"):
        model(mx.array(tokens), input_embeddings=mx.zeros((2, 12, 64)))


@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": True}, {"norm": "none"}, {"norm": "pre", "block": "parallel"},
     {"norm": "none", "tie_word_embeddings": True, "block": "parallel"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("calibrated", [False, True])
def test_quantized(config: Config, calibrated: bool, tmp_path: Path) -> None:
    """The table, and a head that it unties, are packed like all else."""
    skip = {"skip": "both"} if config.get("norm") == "pre" else {}
    source = made(tmp_path / "s", **config, **skip)
    (tmp_path / "t.txt").write_text("once upon a time there was a king " * 200)
    options: dict[str, Any] = {"calibration": tmp_path / "t.txt"} if calibrated else {}
    report = forced(tmp_path, quantize=True, q_bits=8, q_group_size=32, **options)
    weights = stored(tmp_path / "o")
    assert sum(array.nbytes for array in weights.values()) == report.bytes_after
    assert {"model.embed_tokens.scales", "lm_head.scales"} <= set(weights)
    model, _ = mlx_skipless.load(tmp_path / "o")
    tokens = text()
    expected = reference.logits(*source, tokens)
    if not calibrated:  # matrices that are fitted to a text answer for that text
        assert reference.softmax_kl(expected, np.array(model(mx.array(tokens)))) < 5e-3
    assert report.verification is not None and report.verification.kl < 5e-3


PACKED: list[tuple[Config, int, bool]] = [  # config, group size, whether the table is packed
    ({}, 32, True),
    ({"tie_word_embeddings": True}, 32, True),
    ({"tie_word_embeddings": True, "num_key_value_heads": 1}, 64, False),
    ({"norm": "pre", "skip": "both", "block": "parallel"}, 32, True),
]


@pytest.mark.parametrize(("config", "group_size", "packed"), PACKED, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_source_stays_packed(
    config: Config, group_size: int, packed: bool, bits: int, tmp_path: Path
) -> None:
    """Every tensor that stays is the source's, bit for bit; the table is packed like it."""
    made(tmp_path / "f", **config)
    if "norm" in config:  # a network of our own is quantized by us
        mlx_skipless.convert(
            tmp_path / "f", tmp_path / "s", remove="none", quantize=True, q_bits=bits,
            q_group_size=group_size,
        )  # fmt: skip
    else:
        model, tokenizer = mlx_lm.load(str(tmp_path / "f"))  # type: ignore[misc]
        settings = json.loads((tmp_path / "f/config.json").read_text())
        own = {"group_size": 32, "bits": 6, "mode": "affine"}
        model, settings = quantize_model(
            model, settings, group_size, bits,
            quant_predicate=lambda where, _: own if packed and "embed" in where else True,
        )  # fmt: skip
        mlx_lm.utils.save(tmp_path / "s", tmp_path / "f", model, tokenizer, settings)
    report = forced(tmp_path)
    assert report.kept_packed
    assert any("the table is packed" in note for note in report.notes) == packed
    source, result = stored(tmp_path / "s"), stored(tmp_path / "o")
    assert sum(array.nbytes for array in result.values()) == report.bytes_after
    table = {name for name in result if "embed_tokens" in name}
    assert ("model.embed_tokens.scales" in table) == packed
    untied = {name for name in result if "lm_head" in name and name not in source}
    assert bool(untied) == config.get("tie_word_embeddings", False)
    for name in set(result) - table:
        original = source[name.replace("lm_head", "model.embed_tokens") if name in untied else name]
        assert result[name].dtype == original.dtype
        assert mx.array_equal(result[name], original).item()
    if packed and "norm" not in config:  # the stream's part of the row
        for name in table:
            width = source[name].shape[1]
            assert mx.array_equal(result[name][:, :width], source[name]).item()
    tokens = mx.array(text())
    trust = {"trust_remote_code": True}
    before = mlx_lm.load(str(tmp_path / "s"), **trust)[0](tokens)  # type: ignore[arg-type]
    after = mlx_lm.load(str(tmp_path / "o"), **trust)[0](tokens)  # type: ignore[arg-type]
    limit = {4: 0.1, 8: 1e-3}[bits] if packed else 1e-10
    assert reference.softmax_kl(np.array(before), np.array(after)) < limit


def test_everything_in_one_command(tmp_path: Path) -> None:
    """Table, drops, folding and 4 bits; layer 0 keeps what the table stands for."""
    made(tmp_path / "s", num_hidden_layers=4, intermediate_size=256)
    report = forced(
        tmp_path, drop_attention=3, drop_ffn=4, fold_norms=True, quantize=True, q_group_size=32
    )
    assert report.removed == {"attention": [1, 2, 3], "ffn": [0, 1, 2, 3]}
    assert report.first_layer and report.folded and report.quantization and not report.stock
    rows = {row.name: row.goes for row in report.rows}
    assert rows["layers.0"] == "ffn into the table" and rows["layers.1"] == "attention ffn"
    model, _ = mlx_lm.load(str(tmp_path / "o"), trust_remote_code=True)  # type: ignore[misc]
    assert len(make_prompt_cache(model)) == 1
    own, _ = mlx_skipless.load(tmp_path / "o")
    tokens = mx.array(text())
    assert mx.allclose(own(tokens), model(tokens), atol=1e-4).item()


@pytest.mark.parametrize("block", ["serial", "parallel"])
@pytest.mark.parametrize("greedy", [False, True])
def test_drops_leave_the_table_its_layer(block: str, greedy: bool, tmp_path: Path) -> None:
    """Even where nothing matters less."""
    made(tmp_path / "s", norm="pre", skip="both", block=block, num_hidden_layers=3)
    weights: Any = mx.load(str(tmp_path / "s/model.safetensors"))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{name}.weight"] *= 1e-3
    mx.save_safetensors(str(tmp_path / "s/model.safetensors"), weights, {"format": "pt"})
    drops: dict[str, Any] = {"drop_attention": 1, "drop_ffn": 1, "greedy": greedy}
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "p", **drops)
    assert report.removed == {"attention": [0], "ffn": [0]}
    report = forced(tmp_path, **drops)
    assert 0 not in report.removed["attention"]
    assert (0 in report.removed["ffn"]) == (block == "serial")


def test_removals_come_before_packed_tensors(tmp_path: Path) -> None:
    """A quantized source from which Q and P can go is dequantized for that."""
    source = made(tmp_path / "f", norm="none")
    quantized: dict[str, Any] = {"quantize": True, "q_bits": 8, "q_group_size": 32}
    mlx_skipless.convert(tmp_path / "f", tmp_path / "s", remove="none", **quantized)
    report = forced(tmp_path)
    assert report.removed == {"q": [1], "p": [0, 1]} and not report.kept_packed
    tokens = text()
    model, _ = mlx_skipless.load(tmp_path / "o")
    expected = reference.logits(*source, tokens)
    assert reference.softmax_kl(expected, np.array(model(mx.array(tokens)))) < 5e-3


MISTRAL: Config = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_the_papers_figures(tmp_path: Path) -> None:
    """Of Mistral-7B: arXiv 2402.13388, table 1 and the table of section 3."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    report = mlx_skipless.convert(
        tmp_path / "config.json", dry_run=True, precompute_first_layer="auto"
    )
    table = report.first_layer
    assert table is not None and table.row == 2 * (4096 + 1024)
    assert table.matrices == 25_165_824 and table.reads_before() == 25_169_920
    times = [table.reads_before(n) / table.reads_after(n) for n in (1, 16, 256, 1024)]
    assert [round(n) for n in times] == [2458, 154, 10, 3]
    assert table.growth == 196_608_000 - 25_165_824
    assert round(table.growth / report.params_before, 2) == 0.02
    assert "2,458 times fewer" in " ".join(mlx_skipless.conversion.card.describe_effect(report))


@pytest.mark.parametrize("block", ["serial", "parallel"])
@pytest.mark.parametrize("tied", [False, True])
def test_growth_is_what_the_network_grows_by(block: str, tied: bool) -> None:
    sizes = {"vocab_size": 300, "num_attention_heads": 4, "num_key_value_heads": 2, **SIZES}
    config = {"model_type": "skipless", "block": block, "tie_word_embeddings": tied, **sizes}
    hidden, ffn, row = 64, 128, 64 + 2 * 32 + (64 if block == "parallel" else 0)
    matrices = hidden * (64 + 2 * 32) + (3 * hidden * ffn if block == "parallel" else 0)
    figures = measure_table(read_model_args(config))
    assert (figures.matrices, figures.row) == (matrices, row)
    head = 300 * hidden if tied else 0
    assert figures.growth == 300 * (row - hidden) + head - matrices


def test_it_declines_where_it_does_not_pay(tmp_path: Path) -> None:
    """A small model's table is large beside it."""
    made(tmp_path / "s", vocab_size=4096)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", precompute_first_layer="auto")
    assert report.first_layer is None and report.stock
    (note,) = [note for note in report.notes if "stays computed" in note]
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", dry_run=True, precompute_first_layer="force"
    )
    growth = report.bytes_after / report.bytes_before - 1
    assert float(note.split("add ")[1].split("%")[0]) / 100 == pytest.approx(growth, abs=0.01)


@pytest.mark.parametrize("config", [{"norm": "none"}, {}], ids=str)
def test_a_table_can_be_converted_on(config: Config, tmp_path: Path) -> None:
    source = made(tmp_path / "s", num_hidden_layers=3, **config)
    forced(tmp_path, remove="none")
    tokens = text()
    expected = reference.logits(*source, tokens)
    for name, options in (("q", {"quantize": True, "q_bits": 8, "q_group_size": 32}), ("r", {})):
        report = mlx_skipless.convert(tmp_path / "o", tmp_path / name, **options)  # type: ignore[arg-type]
        assert report.removed == ({"q": [1, 2], "p": [0, 1, 2]} if config else {})
        model, _ = mlx_skipless.load(tmp_path / name)
        got = np.array(model(mx.array(tokens)))
        assert reference.softmax_kl(expected, got) < (5e-3 if options else 1e-10)


def test_a_parallel_table_can_be_converted_on(tmp_path: Path) -> None:
    """The table writes the point behind layer 0, whose basis is its own then."""
    source = made(tmp_path / "s", norm="none", block="parallel", num_hidden_layers=4)
    forced(tmp_path, remove="none")
    report = mlx_skipless.convert(tmp_path / "o", tmp_path / "r")
    assert report.removed == {"q": [2, 3]}
    model, _ = mlx_skipless.load(tmp_path / "r")
    tokens = text()
    expected = reference.logits(*source, tokens)
    assert reference.worst_relative_error(expected, np.array(model(mx.array(tokens)))) < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precompute_first_layer": "force"}, "a table already"),
        ({"drop_attention": 1}, "the first layer is a table"),
        ({"skipless": True}, "the first layer is a table"),
    ],
)
def test_a_table_refuses(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    made(tmp_path / "s")
    forced(tmp_path)
    with pytest.raises(mlx_skipless.UserError, match=said):
        mlx_skipless.convert(tmp_path / "o", tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_a_layer_without_attention_has_no_table(tmp_path: Path) -> None:
    made(tmp_path / "f", norm="pre", skip="both")
    mlx_skipless.convert(tmp_path / "f", tmp_path / "s", drop_attention=1)
    config = json.loads((tmp_path / "s/config.json").read_text())
    if config["removed"]["attention"] == [0]:
        with pytest.raises(mlx_skipless.UserError, match="layer 0 has no attention"):
            forced(tmp_path)
    else:
        forced(tmp_path)
    config |= {"removed": {"attention": [0]}, "precomputed": True}
    (tmp_path / "s/config.json").write_text(json.dumps(config))
    with pytest.raises(mlx_skipless.UserError, match="needs an attention in layer 0"):
        mlx_skipless.load(tmp_path / "s")


def test_too_narrow_a_type(tmp_path: Path) -> None:
    """A table can overflow where neither embedding nor matrices do."""
    made(tmp_path / "s", norm="none")
    weights: Any = mx.load(str(tmp_path / "s/model.safetensors"))
    for name in ("model.embed_tokens", "model.layers.0.self_attn.v_proj"):
        weights[f"{name}.weight"] *= 1000
    mx.save_safetensors(str(tmp_path / "s/model.safetensors"), weights, {"format": "pt"})
    with pytest.raises(mlx_skipless.UserError, match="does not fit float16"):
        forced(tmp_path, dtype="float16", remove="none")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "s", vocab_size=4096)
    shared = ["convert", "--model", str(tmp_path / "s"), "--mlx-path", str(tmp_path / "o")]
    main([*shared, "--dry-run", "--precompute-first-layer"])
    assert "the first layer stays computed" in capsys.readouterr().out
    main([*shared, "--precompute-first-layer", "force", "--json", str(tmp_path / "j")])
    assert "read from a table by token" in capsys.readouterr().out
    report = json.loads((tmp_path / "j").read_text())
    assert report["first_layer"]["row"] == 64 + 64 + 2 * 32
    assert "read from a table by token" in (tmp_path / "o/README.md").read_text()
    assert main([*shared, "--precompute-first-layer", "sometimes"]) == 2
    with pytest.raises(mlx_skipless.UserError, match="give nothing or force"):
        mlx_skipless.convert(tmp_path / "s", tmp_path / "r", precompute_first_layer="no")


def test_a_table_of_queries_that_k_and_v_read_is_copied(tmp_path: Path) -> None:
    """Its rows hold k and v, so layer 0 has no norm before them the second time either."""
    made(tmp_path / "s", norm="qkv", norms=["q", "kv"], gains=True)
    forced(tmp_path, remove="none")
    mlx_skipless.convert(tmp_path / "o", tmp_path / "p", remove="none", verify=False)
    once, twice = stored(tmp_path / "o"), stored(tmp_path / "p")
    assert once.keys() == twice.keys()
    assert all(mx.array_equal(twice[name], array).item() for name, array in once.items())
    assert [name for name in once if "kv_norm" in name] == [
        "model.layers.1.self_attn.kv_norm.weight"
    ]
