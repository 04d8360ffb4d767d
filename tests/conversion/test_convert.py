"""convert as a user sees it: the report, the files, the flags, the printed words."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from factory import make_checkpoint, make_llama
from gguf import GGMLQuantizationType as Type
from gguf_zoo import write_zoo_gguf
from grids import only
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from zoo import make_model

import mlx_skipless
from mlx_skipless import UserError, cli
from mlx_skipless.checkpoints import writer
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.cli import convert as convert_command
from mlx_skipless.conversion import card
from mlx_skipless.conversion import convert as conversion
from mlx_skipless.conversion.report import add_check

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "norm": "qkv"}


def convert(*arguments: str | Path) -> int:
    return cli.main(["convert", *map(str, arguments)])


def loaded_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model, _ = mlx_skipless.load(folder)
    return np.array(model(mx.array(tokens)).astype(mx.float32))


def test_json_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure of the report against the files and the reference."""
    source = make_checkpoint(tmp_path / "s", **SIZES)
    assert convert("--model", tmp_path / "s", "--remove", "qp", "--mlx-path", tmp_path / "out",
                   "--json", tmp_path / "report.json") == 0  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    weights = source[1]
    assert report["params_before"] == sum(w.size for w in weights.values())
    assert report["params_after"] == report["params_before"] - 6 * 128**2
    for figure in ("weights", "bytes"):
        rows = sum(row[f"{figure}_after"] for row in report["rows"])
        assert rows == report["bytes_after" if figure == "bytes" else "params_after"]
    assert report["bytes_before"] == 4 * report["params_before"]
    assert report["bytes_after"] == 4 * report["params_after"]
    on_disk = sum(a.nbytes for a in mx.load(str(tmp_path / "out/model.safetensors")).values())
    assert report["bytes_after"] == on_disk
    assert report["removed"] == {"q": [0, 1, 2], "p": [0, 1, 2]}
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 1e6
    stages = report["stages"]
    assert [*stages] == ["measuring", "sampling text", "converting", "checking", "other"]
    assert min(stages.values()) > 0
    assert sum(stages.values()) == pytest.approx(report["seconds"])
    check = report["verification"]
    assert check["max_rel_logit_error"] < 5e-4 and check["kl"] < 1e-6
    assert check["greedy_match"] == 1 and check["tokens"] == 128
    read = report["params_before"] - weights["model.embed_tokens.weight"].size + 128
    after = read - 6 * 128**2
    assert report["speedup_from_bytes"] == pytest.approx(read / after, rel=1e-6)
    printed = capsys.readouterr()
    assert f"{report['params_after']:,} after" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("long", [True, False])
def test_stages_are_told_where_they_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], long: bool
) -> None:
    make_checkpoint(tmp_path / "s", **SIZES)
    monkeypatch.setattr(convert_command, "LONG", 0 if long else 1e9)
    assert convert("--model", tmp_path / "s", "--mlx-path", tmp_path / "out", "--no-verify") == 0
    *_, last = capsys.readouterr().out.splitlines()
    stages = r" s \(measuring [\d.]+, converting [\d.]+, other [\d.]+\), peak"
    assert (re.search(stages, last) is not None) == long


def test_without_arguments_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It loses all that pays, is the same function, and is never written over."""
    source = make_checkpoint(tmp_path / "tales", linear_paths=True, template=False, **SIZES)
    monkeypatch.setattr(conversion, "BUNDLED", tmp_path / "tales")
    monkeypatch.chdir(tmp_path)
    assert convert() == 0
    printed = capsys.readouterr().out
    assert "wrote mlx_model" in printed and "the same greedy token at 100.0%" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlx_model", "tales"]
    assert "from `tales`" in (tmp_path / "mlx_model/README.md").read_text()
    tokens = np.random.default_rng(0).integers(0, 256, (1, 8))
    got = loaded_logits(tmp_path / "mlx_model", tokens)
    assert reference.worst_relative_error(reference.logits(*source, tokens), got) <= 5e-4

    before = {p: p.read_bytes() for p in (tmp_path / "mlx_model").iterdir()}
    assert convert() == 1
    assert "mlx_model exists already" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "mlx_model").iterdir()} == before
    report = mlx_skipless.convert(mlx_path=tmp_path / "again", verify=False)
    assert report.removed == {"q": [0, 1, 2], "p": [0, 1, 2]}


def test_dry_run_writes_only_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "s", **SIZES)
    assert convert("--model", tmp_path / "s", "--dry-run", "--mlx-path", tmp_path / "out",
                   "--json", tmp_path / "plan.json") == 0  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "s"]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["removed"] == {"q": [0, 1, 2], "p": [0, 1, 2]} and plan["verification"] is None
    printed = capsys.readouterr().out
    assert (
        re.search("layers.0.2 . 3", printed) and "Q P" in printed and "nothing written" in printed
    )


def test_dry_run_measures_condition_numbers(tmp_path: Path) -> None:
    _, weights = make_checkpoint(tmp_path / "s", spread=1.0, **SIZES)
    report = mlx_skipless.convert(tmp_path / "s", dry_run=True, remove="qp")
    for row, layer in zip(report.rows[1:4], range(3), strict=True):
        q = weights[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert row.condition == pytest.approx(np.linalg.cond(q), rel=0.02)


MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("where", ["folder", "file"])
def test_mistral_7b_from_its_config_alone(where: str, tmp_path: Path) -> None:
    """The paper's table 3: 7.2B weights, 6.2B without Q and P, 15 % fewer, 1.17 times faster."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))
    source = tmp_path if where == "folder" else tmp_path / "config.json"
    report = mlx_skipless.convert(source, dry_run=True, skipless=True, remove="qp")
    assert round(report.params_before / 1e9, 1) == 7.2
    assert round(report.params_after / 1e9, 1) == 6.2
    assert round(1 - report.params_after / report.params_before, 2) == 0.15
    # The paper divides all weights; decoding does not read an untied embedding's other rows.
    assert report.params_before / report.params_after == pytest.approx(1.17, abs=0.005)
    assert report.speedup_from_bytes == pytest.approx(1.178, abs=0.001)


def test_auto_leaves_a_pretrained_model_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_llama(tmp_path / "s")
    assert convert("--model", tmp_path / "s", "--mlx-path", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "no exact removal" in printed and "--skipless --remove qp" in printed
    assert not (tmp_path / "out/model.py").exists()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("options", "advised"),
    [
        ({}, True),
        ({"remove": "none"}, True),
        ({"fold_norms": True}, True),
        ({"quantize": True, "q_group_size": 32}, False),
        ({"drop_attention": 1}, False),
        ({"skipless": True, "remove": "qp"}, False),
    ],
    ids=str,
)
def test_what_makes_a_pretrained_model_smaller_is_told(
    options: dict[str, Any],
    advised: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What helps comes first, and no path: nothing is told where it was asked for already."""
    make_llama(tmp_path / "s")
    report = mlx_skipless.convert(tmp_path / "s", dry_run=True, **options)
    advice = " ".join(report.advice)
    assert bool(report.advice) == advised and str(tmp_path) not in advice
    if advised:
        assert advice.index("-q quantizes") < advice.index("--drop-attention auto")
        assert advice.index("heal") < advice.index("--skipless --remove qp")
        assert "no language model until it is trained" in advice
    assert str(tmp_path) not in " ".join((*report.notes, *report.warnings))


def test_advice_stays_out_of_the_card(tmp_path: Path) -> None:
    make_llama(tmp_path / "s")
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", verify=False)
    card = (tmp_path / "o/README.md").read_text()
    assert report.advice and not any(line in card for line in report.advice)
    assert "--skipless" not in card and str(tmp_path) not in card


def test_a_skipless_model_needs_no_advice(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", **SIZES)
    assert not mlx_skipless.convert(tmp_path / "s", dry_run=True).advice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [None, 4096])
def test_a_pretrained_model_stays_as_it_is(
    window: int | None, tied: bool, dtype: str, tmp_path: Path
) -> None:
    """Bit for bit and stock, Mistral-7B-v0.1 too, whose window only texts beyond it meet."""
    make_llama(
        tmp_path / "s", model_type="mistral", sliding_window=window, tie_word_embeddings=tied,
        dtype=dtype,
    )  # fmt: skip
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", verify=window is None)
    assert report.stock and not report.folded and report.params_after == report.params_before
    if (check := report.verification) is not None:
        assert check.max_rel_logit_error == check.kl == 0
    assert any("look back 4,096 tokens" in note for note in report.notes) == (window is not None)
    before, after = (mx.load(str(tmp_path / x / "model.safetensors")) for x in "so")
    assert before.keys() == after.keys()
    assert all(mx.array_equal(array, after[name]) for name, array in before.items())
    written = json.loads((tmp_path / "o/config.json").read_text())
    assert written["model_type"] == "mistral" and written["sliding_window"] == window
    assert not (tmp_path / "o/model.py").exists()
    load_model(tmp_path / "o")


@pytest.mark.parametrize(
    ("window", "options"),
    [(16, {}), (4096, {"fold_norms": True}), (4096, {"precompute_first_layer": "force"})],
    ids=str,
)
def test_a_network_with_the_window(window: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Where texts are longer than it, or where it is asked for."""
    make_llama(tmp_path / "s", model_type="mistral", sliding_window=window)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "o", verify=False, **options)
    assert not report.stock
    assert json.loads((tmp_path / "o/config.json").read_text())["sliding_window"] == window


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", b, 64) for b in (2, 3, 4, 5, 6, 8)]
    + [("affine", 4, 32), ("mxfp4", None, None), ("nvfp4", None, None), ("mxfp8", None, None)],
)
@pytest.mark.parametrize("remove", ["p", "none"])
def test_quantizing(
    remove: str, mode: str, bits: int | None, group_size: int | None, tmp_path: Path
) -> None:
    """As mlx-lm quantizes the dense result: the same tensors, bit for bit, and the same config."""
    make_checkpoint(tmp_path / "s", **SIZES)
    options: dict[str, Any] = {"remove": remove, "verify": False}
    mlx_skipless.convert(tmp_path / "s", tmp_path / "dense", **options)
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "ours", quantize=True, q_mode=mode, q_bits=bits,
        q_group_size=group_size, **options,
    )  # fmt: skip
    from mlx_lm.convert import convert as mlx_lm_convert

    mlx_lm_convert(
        str(tmp_path / "dense"), str(tmp_path / "theirs"), quantize=True, q_mode=mode,
        q_bits=bits, q_group_size=group_size, trust_remote_code=True,
    )  # fmt: skip
    ours = mx.load(str(tmp_path / "ours/model.safetensors"))
    theirs = mx.load(str(tmp_path / "theirs/model.safetensors"))
    assert set(ours) == set(theirs)
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    configs = [
        json.loads((tmp_path / x / "config.json").read_text())["quantization"]
        for x in ("ours", "theirs")
    ]
    assert configs[0] == configs[1] == report.quantization
    assert report.bytes_after == sum(array.nbytes for array in ours.values())


def test_a_noisy_q_goes_when_quantized(tmp_path: Path) -> None:
    """Calibration makes up for its inverse, so nothing needs more bits."""
    make_checkpoint(tmp_path / "s", spread=2.0, **SIZES)
    report = mlx_skipless.convert(tmp_path / "s", dry_run=True, quantize=True)
    assert report.removed == {"q": [0, 1, 2], "p": [0, 1, 2]}
    assert report.quantization is not None
    assert not any(isinstance(v, dict) for v in report.quantization.values())
    assert not report.warnings


def test_a_noisy_q_beside_a_tied_embedding_stays_when_quantized(tmp_path: Path) -> None:
    """auto weighs the extra bits of the embedding against Q, and says why it stays."""
    sizes = SIZES | {"tie_word_embeddings": True, "final_norm": False}
    make_checkpoint(tmp_path / "s", spread=2.0, **sizes)
    auto = mlx_skipless.convert(tmp_path / "s", dry_run=True, quantize=True)
    assert auto.removed == {"q": [1, 2], "p": [0, 1, 2]}
    assert any("Q of layer 0 stays: the tied embedding" in note for note in auto.notes)
    insisted = mlx_skipless.convert(tmp_path / "s", dry_run=True, quantize=True, remove="qp")
    assert insisted.removed == {"q": [0, 1, 2], "p": [0, 1, 2]}
    assert insisted.bytes_after > auto.bytes_after
    assert any("magnified" in warning for warning in insisted.warnings)


def test_dtype(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "s", **SIZES)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "half", dtype="float16", remove="p")
    stored = mx.load(str(tmp_path / "half/model.safetensors"))
    assert {array.dtype for array in stored.values()} == {mx.float16}
    tokens = np.random.default_rng(0).integers(0, 256, (1, 8))
    got = loaded_logits(tmp_path / "half", tokens)
    assert reference.worst_relative_error(reference.logits(*source, tokens), got) < 2e-2


def test_sharded_source_and_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are named and indexed as mlx-lm's are, and load there."""
    source = make_checkpoint(tmp_path / "s", shards=3, **SIZES)
    monkeypatch.setattr(writer, "SHARD_BYTES", 400_000)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "out", remove="qp", verify=False)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"] == {
        "total_size": report.bytes_after,
        "total_parameters": report.params_after,
    }
    model, _ = load_model(tmp_path / "out", trust_remote_code=True)
    assert {name for name, _ in tree_flatten(model.parameters())} == set(index["weight_map"])
    tokens = np.random.default_rng(0).integers(0, 256, (1, 8))
    got = np.array(model(mx.array(tokens)))
    assert reference.worst_relative_error(reference.logits(*source, tokens), got) <= 5e-4


def test_tokenizer_template_and_generation_config_come_along(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", **SIZES)
    (tmp_path / "s/generation_config.json").write_text('{"eos_token_id": [257, 7]}')
    mlx_skipless.convert(tmp_path / "s", tmp_path / "out", remove="qp", verify=False)
    from mlx_lm.utils import load_tokenizer

    before, after = (load_tokenizer(tmp_path / name) for name in ("s", "out"))
    text = "Once, \u00e9t\u00e9 \U0001f98a  two  spaces"
    assert before.encode(text) == after.encode(text)
    message = [{"role": "user", "content": text}]
    templates = [
        t.apply_chat_template(message, add_generation_prompt=True) for t in (before, after)
    ]
    assert templates[0] == templates[1]
    assert (tmp_path / "out/generation_config.json").read_text() == '{"eos_token_id": [257, 7]}'
    _, tokenizer = mlx_skipless.load(tmp_path / "out")
    assert {257, 7} <= set(tokenizer.eos_token_ids)


def test_model_card(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", **SIZES)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "out", remove="qp")
    text = (tmp_path / "out/README.md").read_text()
    assert text.startswith("---\n") and "library_name: mlx" in text
    assert report.verification is not None
    assert f"KL {report.verification.kl:.2e}" in text and f"{report.params_after:,} after" in text
    assert "Q removed from layers 0, 1, 2." in text
    share = 1 - report.params_after / report.params_before
    assert share > 0 and f"({share:.1%} fewer)" in text
    assert 'load("out", trust_remote_code=True)' in text
    make_llama(tmp_path / "llama")
    assert mlx_skipless.convert(tmp_path / "llama", tmp_path / "stock", verify=False).stock
    text = (tmp_path / "stock/README.md").read_text()
    assert 'load("stock")' in text and "trust" not in text


def test_the_checkpoints_own_code_is_not_run(tmp_path: Path) -> None:
    """Ours loads from the package; a converted folder's model.py may say what it likes."""
    source = make_checkpoint(tmp_path / "s", **SIZES)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "out", remove="qp", verify=False)
    (tmp_path / "out/model.py").write_text("raise SystemExit('executed')")
    tokens = np.random.default_rng(0).integers(0, 256, (1, 8))
    got = loaded_logits(tmp_path / "out", tokens)
    assert reference.worst_relative_error(reference.logits(*source, tokens), got) <= 5e-4


def test_foreign_code_needs_trust(tmp_path: Path) -> None:
    make_llama(tmp_path / "s")
    config = json.loads((tmp_path / "s/config.json").read_text())
    (tmp_path / "s/config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    (tmp_path / "s/evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(mlx_skipless.UserError, match="--trust-remote-code"):
        mlx_skipless.load(tmp_path / "s")
    with pytest.raises(mlx_skipless.UserError, match="never run here"):
        open_checkpoint(tmp_path / "s")


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_quantized_is_folded_only_if_asked(tmp_path: Path, asked: bool) -> None:
    """Gains of many sizes in one matrix round worse."""
    make_llama(tmp_path / "s", **SIZES)
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "out", quantize=True, q_group_size=32, fold_norms=asked
    )
    assert bool(report.folded) == asked and report.stock
    make_llama(tmp_path / "own", hidden_act="relu", **SIZES)  # mlx-lm has no such network
    for quantize in (False, True):
        report = mlx_skipless.convert(
            tmp_path / "own", dry_run=True, quantize=quantize, fold_norms=asked
        )
        assert bool(report.folded) == (asked or not quantize) and not report.stock


@pytest.mark.parametrize(("kl", "warned"), [(0.01, False), (0.05, False), (0.5, True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_16_bits_cost_is_no_alarm(tmp_path: Path, dtype: str, kl: float, warned: bool) -> None:
    make_llama(tmp_path / "s", **SIZES)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "out", dtype=dtype)
    assert report.verification is not None
    before = replace(report, notes=(), warnings=(), verification=None)
    told = add_check(before, replace(report.verification, kl=kl))
    assert any("more than rounding explains" in w for w in told.warnings) == (
        warned or (dtype == "float32" and kl > 0.02)
    )
    assert any("bfloat16 costs" in n for n in told.notes) == (dtype == "bfloat16" and kl == 0.05)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A llama in 4 bits."""
    make_llama(tmp_path / "s", **SIZES)
    options = {"quantize": True, "q_group_size": 32, "verify": False}
    mlx_skipless.convert(tmp_path / "s", tmp_path / "packed", **options)
    return tmp_path / "packed"


def test_a_packed_table_is_no_alarm(packed: Path, tmp_path: Path) -> None:
    """It is off by what 4 bits cost, and nothing else is."""
    report = mlx_skipless.convert(packed, tmp_path / "out", precompute_first_layer="force")
    assert report.kept_packed and report.first_layer is not None and report.verification is not None
    assert any("the table is packed" in note for note in report.notes)
    for kl in (0.01, 0.05, 0.5):
        before = replace(report, notes=(), warnings=(), verification=None)
        told = add_check(before, replace(report.verification, kl=kl))
        assert told.warnings == told.notes == ()


def test_what_a_packed_source_holds_is_told_as_dense(packed: Path, tmp_path: Path, capsys: Any):
    assert (
        convert("--model", packed, "--mlx-path", tmp_path / "out", "--precompute-first-layer") == 0
    )
    said = capsys.readouterr().out
    assert (
        "bytes before are those of dense weights" in said and " MB as dense weights before" in said
    )
    assert "-q quantizes" not in said


@pytest.mark.parametrize("kind", only((Type.F32,), [Type.F32, Type.Q8_0]))
@pytest.mark.parametrize(
    "options",
    [
        {"replace_attention": 1, "replace_ffn": 1},
        {"target_bytes": "200kB", "allow": "drop", "q_group_size": 32},
        {"drop_attention": 1, "heal": 1, "quantize": True, "q_group_size": 32},
    ],
    ids=str,
)
def test_biases_of_a_gguf_come_along(options: Any, kind: Any, tmp_path: Path) -> None:
    """By every way through mlx-lm's own network; of the metadata nothing tells of them."""
    biases = {"attention_bias": True, "mlp_bias": True}
    make_model(tmp_path / "s", "llama", num_hidden_layers=3, rope_scaling=None, **biases)
    write_zoo_gguf(tmp_path / "m.gguf", tmp_path / "s", lambda name: kind)
    (tmp_path / "t.txt").write_text("the fox met seven hens under a tree\n" * 90)
    options = options | {"calibration": tmp_path / "t.txt"}
    mlx_skipless.convert(tmp_path / "m.gguf", tmp_path / "out", **options)
    weights: Any = mx.load(str(tmp_path / "s/model.safetensors"))
    found: Any = mx.load(str(tmp_path / "out/model.safetensors"))
    names = [name for name in found if name.endswith("proj.bias")]
    assert len(names) >= 12
    if kind == Type.F32 and "replace_attention" in options:  # nothing is fitted again
        assert all(mx.array_equal(found[name], weights[name]) for name in names)


def test_chosen_bits_are_no_alarm(tmp_path: Path) -> None:
    """They cost what was asked for, more than as many as usual; those of -q are what it costs."""
    make_llama(tmp_path / "s", **SIZES)
    for options, usual in (({"quantize": True}, True), ({"target_bytes": 280_000}, False)):
        report = mlx_skipless.convert(
            tmp_path / "s", tmp_path / f"out{usual}", q_group_size=32, **options
        )
        check = report.verification
        assert check is not None and check.quantized_only is not None
        before = replace(report, notes=(), warnings=(), verification=None)
        told = add_check(before, replace(check, kl=0.5, kl_ratio=3.0))
        assert [("quantization alone" in w, "--remove p" in w) for w in told.warnings] == (
            [(True, False)] if usual else []
        )
        said = " ".join(card.describe_effect(report))
        assert "quantized alone, to nearest, in 4 bits: KL" in said


def test_a_table_that_reads_more_is_told_as_such(tmp_path: Path) -> None:
    make_llama(tmp_path / "s", **SIZES)
    report = mlx_skipless.convert(tmp_path / "s", dry_run=True, precompute_first_layer="force")
    table = report.first_layer
    assert table is not None and table.reads_after(256) > table.reads_before(256)
    more = table.reads_after(256) / table.reads_before(256)
    assert f"{more:,.1f} times more at 256)" in " ".join(card.describe_effect(report))
    for ratio, said in (
        (1.25, "1.25 times fewer bytes of weights than without"),
        (1.002, "0.20% fewer bytes of weights than without"),
        (1.00001, "as many bytes of weights as without"),
        (0.8, "25.00% more bytes of weights than without"),
    ):
        told = " ".join(card.describe_effect(replace(report, speedup_from_bytes=ratio)))
        assert f"Decoding a token reads {said} the removals" in told
        assert ("speed-up" in told) == ("fewer bytes" in said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "note: matrices as they were; the result runs in plain mlx-lm"),
        (("-q",), "note: the result runs in plain mlx-lm"),
        (("--target-bytes", "280kB"), "note: the result runs in plain mlx-lm"),
    ],
)
def test_what_became_of_the_matrices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    make_llama(tmp_path / "s", **SIZES)
    if flags:
        flags = (*flags, "--q-group-size", "32")
    arguments = ["--model", str(tmp_path / "s"), "--mlx-path", str(tmp_path / "out"), *flags]
    assert convert(*arguments, "--dry-run") == 0
    assert said in capsys.readouterr().out.splitlines()


def test_exact_flags_of_what_has_lost_sublayers(tmp_path: Path) -> None:
    make_llama(tmp_path / "s", **SIZES)
    mlx_skipless.convert(tmp_path / "s", tmp_path / "r", replace_attention=1, verify=False)
    with pytest.raises(UserError, match=r"--fold-norms: .* has lost sub-layers: ask it"):
        mlx_skipless.convert(tmp_path / "r", tmp_path / "o", fold_norms=True)
    notes = mlx_skipless.analyze(tmp_path / "r").notes
    assert any("it has lost sub-layers" in note for note in notes)
    assert not mlx_skipless.convert(tmp_path / "r", dry_run=True).advice


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_calibration_text(ending: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", **SIZES)
    file = tmp_path / f"text.{ending}"
    text = "The miller's daughter span straw into gold. " * 20
    file.write_text(text if ending == "txt" else json.dumps({"text": text}) + "\n")
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "out", calibration=file)
    assert report.verification is not None
    assert report.verification.text == str(file) and report.verification.tokens == 128


def test_the_check_sees_a_wrong_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that forgets one matrix is caught by the figures that convert prints."""
    from mlx_skipless.removal import changer
    from mlx_skipless.removal.algebra import Linear

    make_checkpoint(tmp_path / "s", **SIZES)
    right = changer.change_basis

    def wrong(linear: Linear, **bases: Any) -> Linear:
        return right(linear, **bases) if bases.get("writes") else linear

    monkeypatch.setattr(changer, "change_basis", wrong)
    report = mlx_skipless.convert(tmp_path / "s", tmp_path / "out", remove="q", force=True)
    assert report.verification is not None
    assert report.verification.max_rel_logit_error > 0.1 and report.verification.kl > 1e-3
