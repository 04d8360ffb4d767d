"""Every family: its own config, names and layout in, the same function out."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import factory
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
import transformers
from architectures import (
    ARCHITECTURES,
    STOCK,
    WRAPPERS,
    as_mlx_lm,
    logits,
    make,
    skipless,
    text,
    without,
)
from factory import stored
from grids import only, pairs, thin, thorough
from mlx_lm.utils import quantize_model
from reference import Config

import mlx_skipless
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.conversion.convert import convert
from mlx_skipless.evaluation.analysis import analyze
from mlx_skipless.network.model import Model
from mlx_skipless.text import samples
from mlx_skipless.training import healing
from mlx_skipless.training.recipe import Pace, Treatment

LAYER_NORMS = ["gpt_neox", "gpt_neox, serial", "gptj", "phi"]
FUSED = ["gpt_neox", "gpt_neox, serial"]
PARALLEL = ["gpt_neox", "gptj", "phi", "cohere"]
# What a Mistral is with another RoPE is tried by default where that matters.
USUAL = [name for name in ARCHITECTURES if name != "ministral3"]


def traits(name: str) -> set[str]:
    """What sets a family apart from others, for grids that try each trait with everything."""
    config = ARCHITECTURES[name].mapped(ARCHITECTURES[name].config)
    keys = ("norm_type", "block", "shared_norm", "num_local_experts", "embedding_scale")
    found = {f"{key} {config[key]}" for key in keys if config.get(key)}
    return found | {f"fused {name in FUSED}", f"biased {bool(ARCHITECTURES[name].biased)}"}


def each_trait(names: Iterable[str], *others: Iterable[Any]) -> list[Any]:
    """A grid of families by default thinned to each trait with each value of the other axes."""

    def features(case: tuple[Any, ...]) -> set[Any]:
        name, *rest = case
        with_traits = {(trait, i, str(x)) for trait in traits(name) for i, x in enumerate(rest)}
        return {name, *with_traits, *pairs(*rest)}

    return thin([*itertools.product(names, *others)], features)


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CALIBRATION", (16, 16))
    monkeypatch.setattr(samples, "LONG_CHECK", (4, 32))


def check_same_function(expected: np.ndarray, folder: Path, tokens: np.ndarray, limit: float):
    """As mlx-lm runs it, the prompt at once and token by token."""
    assert reference.worst_relative_error(expected, logits(folder, tokens)) <= limit
    model, _ = mlx_skipless.load(folder)
    cache: list[Any] = mlx_lm.models.cache.make_prompt_cache(model)
    steps = [model(mx.array(tokens[:, i : i + 1]), cache=cache) for i in range(tokens.shape[1])]
    assert reference.worst_relative_error(expected, np.array(mx.concatenate(steps, 1))) <= limit


@pytest.mark.parametrize("name", [*ARCHITECTURES, *WRAPPERS])
def test_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    """The tests' own reference is transformers' function."""
    torch = pytest.importorskip("torch")
    expected = reference.logits(*make(tmp_path / "s", name), text())
    kind = "ImageTextToText" if name in WRAPPERS else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        tmp_path / "s", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found = model(torch.tensor(text())).logits.numpy()
    assert reference.worst_relative_error(expected, found) < 1e-5
    # And what it saves, with today's keys in config.json, is read as the same function.
    model.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "s").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "o", precompute_first_layer="force", verify=False)
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", text())) < 1e-5


@pytest.mark.parametrize("name", [name for name in STOCK if name != "mixtral"])
def test_transformers_reads_what_is_folded(name: str, tmp_path: Path) -> None:
    """A result without model.py is transformers' too, but for experts, which mlx-lm stacks."""
    torch = pytest.importorskip("torch")
    expected = reference.logits(*make(tmp_path / "s", name), text())
    assert convert(tmp_path / "s", tmp_path / "o", fold_norms=True, verify=False).folded
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "o", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found = model(torch.tensor(text())).logits.numpy()
    assert reference.worst_relative_error(expected, found) < 1e-5


@pytest.mark.parametrize("name", STOCK)
def test_our_network_equals_mlx_lms(name: str, tmp_path: Path) -> None:
    make(tmp_path / "s", name, **as_mlx_lm(name))
    checkpoint = open_checkpoint(tmp_path / "s")
    model = Model(checkpoint.args)
    names = dict(mlx_lm.utils.tree_flatten(model.parameters()))
    model.load_weights([*checkpoint.read(names).items()])
    ours, theirs = np.array(model(mx.array(text()))), logits(tmp_path / "s", text())
    assert reference.worst_relative_error(theirs, ours) < 1e-5


@pytest.mark.parametrize("chunks", [(12,), (5, 1, 2, 4), (1,) * 12], ids=len)
@pytest.mark.parametrize("window", [None, 3])
def test_ministral3_equals_mlx_lms(window: int | None, chunks: tuple[int, ...], tmp_path: Path):
    """Also beyond several steps of its queries' growth, with a cache, in windows too."""
    kinds = ["full_attention", *["sliding_attention"] * 2] if window else None
    make(tmp_path / "s", "ministral3", layer_types=kinds, sliding_window=window)
    checkpoint = open_checkpoint(tmp_path / "s")
    ours = Model(checkpoint.args)
    names = dict(mlx_lm.utils.tree_flatten(ours.parameters()))
    ours.load_weights([*checkpoint.read(names).items()])
    theirs, _ = mlx_lm.load(str(tmp_path / "s"))  # type: ignore[misc]
    ends = [*itertools.accumulate(chunks)]
    found = []
    for model in (theirs, ours):
        cache: list[Any] = mlx_lm.models.cache.make_prompt_cache(model)
        parts = (text()[:, end - size : end] for end, size in zip(ends, chunks, strict=True))
        found.append(np.array(mx.concatenate([model(mx.array(p), cache=cache) for p in parts], 1)))
    assert reference.worst_relative_error(*found) < 1e-5


PRETRAINED: list[dict[str, Any]] = [
    {"remove": "none"},
    {},
    {"precompute_first_layer": "force"},
    {"drop_attention": 1},
    {"drop_ffn": 1},
    {"drop_block": 1},
    {"drop_block": 2},
    {"drop_block": 1, "precompute_first_layer": "force"},
]
KEPT = [
    pytest.param(name, options | {"remove": "none"}, marks=thorough)
    for name in ARCHITECTURES
    for options in ({"precompute_first_layer": "force"}, {"drop_attention": 1})
]


@pytest.mark.parametrize(
    ("name", "options"), [*each_trait(ARCHITECTURES, PRETRAINED), *KEPT], ids=str
)
def test_what_a_pretrained_model_can_do_without(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The result runs in mlx-lm: its own network where nothing else is needed, else ours."""
    config, weights = make(tmp_path / "s", name, seed=len(str(options)), **as_mlx_lm(name))
    report = convert(tmp_path / "s", tmp_path / "o", **options)
    expected = reference.logits(config, without(weights, report.removed), text())
    check_same_function(expected, tmp_path / "o", text(), 1e-5)
    dropping = any("drop" in option for option in options)
    assert report.stock == (name in STOCK and {*options} <= {"remove", "drop_block"})
    check = report.verification
    assert check is not None and (dropping or check.kl < 1e-9)
    assert sum(array.size for array in stored(tmp_path / "o").values()) == report.params_after


@pytest.mark.parametrize("name", only(USUAL, STOCK))
def test_a_stock_result_keeps_its_tensors(name: str, tmp_path: Path) -> None:
    """The same names, shapes and types; folded gains are ones (Gemma's zeros), biases zeros."""
    make(tmp_path / "s", name)
    report = convert(tmp_path / "s", tmp_path / "o", fold_norms=True)
    source, result = stored(tmp_path / "s"), stored(tmp_path / "o")
    if "mixtral" not in name:  # whose experts mlx-lm stacks
        assert {k: (a.shape, a.dtype) for k, a in source.items()} == {
            k: (a.shape, a.dtype) for k, a in result.items()
        }
    whole = 1 - ARCHITECTURES[name].gain_offset
    for key, array in result.items():
        module, part = key.split(".")[-2:]
        if module in ("input_layernorm", "post_attention_layernorm"):
            assert mx.all(array == (whole if part == "weight" else 0)).item(), key
    kept = {"gptj": {"attention"}, "gpt_neox": {"final"}}.get(name.split(",")[0], set())
    assert not kept & {*report.folded}
    assert len([n for n in report.notes if n.startswith("norm gains stay")]) == len(kept)
    assert not convert(tmp_path / "s", tmp_path / "n").folded  # unasked, it stays as it is
    again = stored(tmp_path / "n")
    for key, array in source.items():
        if key in again:
            assert mx.allclose(again[key], array, atol=1e-7, rtol=0).item(), key


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norms_become_rms_norms(name: str, tmp_path: Path) -> None:
    """Gains, biases and the mean go into the matrices; a parallel block needs one norm then."""
    config, _ = make(tmp_path / "s", name)
    convert(tmp_path / "s", tmp_path / "o", precompute_first_layer="force")
    written = json.loads((tmp_path / "o/config.json").read_text())
    assert written["norm_type"] == "rms" and not written["gains"] and not written["shifts"]
    assert written["shared_norm"] == (config["block"] == "parallel")
    assert not any("norm" in key for key in stored(tmp_path / "o"))
    assert written["head_bias"]
    for key, array in stored(tmp_path / "o").items():
        if "o_proj" in key or "down_proj" in key:
            mean = array.mean(axis=0)
            assert mx.abs(mean).max().item() < 1e-6, key


def test_a_tied_head_keeps_layer_norms(tmp_path: Path) -> None:
    """It would see the mean that is taken out of the embedding."""
    make(tmp_path / "s", "cohere")
    convert(tmp_path / "s", tmp_path / "o", drop_attention=1)
    written = json.loads((tmp_path / "o/config.json").read_text())
    assert written["norm_type"] == "layer" and written["gains"] == ["final"]


REMOVALS = ("none", "auto", "qp", "q", "p", "kp", "v")


@pytest.mark.parametrize(
    ("name", "kv_heads", "remove"), each_trait(ARCHITECTURES, (None, 4), REMOVALS), ids=str
)
def test_the_skipless_network(name: str, kv_heads: int | None, remove: str, tmp_path: Path) -> None:
    """Every removal that the shapes and the block allow."""
    changes = {"num_key_value_heads": kv_heads} if kv_heads else {}
    config, weights = make(tmp_path / "s", name, seed=REMOVALS.index(remove), **changes)
    options: dict[str, Any] = {"skipless": True, "remove": remove, "verify": False}
    letters = set() if remove in ("auto", "none") else {*remove}
    head_dim = config.get("head_dim", 16)
    kv_width = (kv_heads or config.get("num_key_value_heads", 4)) * head_dim
    no_inverse = {"q": head_dim != 16, "k": kv_width != 64, "v": kv_width != 64}
    both = config["block"] == "parallel" and len(letters) == 2
    if both or any(no_inverse.get(letter) for letter in letters):
        with pytest.raises(mlx_skipless.UserError, match=f"--remove {remove}"):
            convert(tmp_path / "s", tmp_path / "o", **options)
        return
    report = convert(tmp_path / "s", tmp_path / "o", **options)
    expected = reference.logits(*skipless(config, weights), text())
    check_same_function(expected, tmp_path / "o", text(), 5e-4)
    if remove not in ("none", "auto"):  # and in two steps
        convert(tmp_path / "s", tmp_path / "n", **options | {"remove": "none"})
        convert(tmp_path / "n", tmp_path / "p", remove=remove, verify=False)
        check_same_function(expected, tmp_path / "p", text(), 5e-4)
    assert {*report.removed} == letters or remove == "auto"
    assert bool(report.removed) == (remove != "none")
    for layers in report.removed.values():
        assert len(layers) >= config["num_hidden_layers"] - 1
    assert sum(array.size for array in stored(tmp_path / "o").values()) == report.params_after


def packed(source: Path, out: Path, bits: int = 8) -> None:
    """A checkpoint as `mlx_lm.convert -q` makes them."""
    model, tokenizer = mlx_lm.load(str(source))  # type: ignore[misc]
    config = json.loads((source / "config.json").read_text())
    model, config = quantize_model(model, config, 32, bits)
    mlx_lm.utils.save(out, source, model, tokenizer, config)


@pytest.mark.parametrize("name", only(USUAL, STOCK))
def test_a_packed_source_keeps_its_tensors(name: str, tmp_path: Path) -> None:
    """Bit for bit, cut out of fused matrices and stacked as they are."""
    make(tmp_path / "f", name, **as_mlx_lm(name))
    packed(tmp_path / "f", tmp_path / "s")
    report = convert(tmp_path / "s", tmp_path / "o", drop_attention=1)
    assert report.kept_packed
    (layer,) = report.removed["attention"]
    model, _ = mlx_lm.load(str(tmp_path / "s"))  # type: ignore[misc]
    block = model.layers[layer]
    attention = getattr(block, "self_attn", None) or getattr(block, "attention", None) or block.attn
    out = next(attention[name] for name in ("o_proj", "dense", "out_proj") if name in attention)
    for part in ("scales", "biases", "bias"):
        if part in out:
            out[part] = mx.zeros_like(out[part])
    expected = np.array(model(mx.array(text())))
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", text())) < 1e-5


@pytest.mark.parametrize("name", STOCK)
def test_a_packed_source_is_read(name: str, tmp_path: Path) -> None:
    """Dequantized, as mlx-lm multiplies it."""
    make(tmp_path / "f", name, **as_mlx_lm(name))
    packed(tmp_path / "f", tmp_path / "s", bits=4)
    convert(tmp_path / "s", tmp_path / "o", dtype="float32", verify=False)
    expected = logits(tmp_path / "s", text())
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", text())) < 1e-4


QUANTIZED: list[dict[str, Any]] = [
    {"q_bits": 8},
    {"q_bits": 4, "calibration": "t.txt"},
    {"q_bits": 8, "drop_attention": 1},
    {"q_bits": 8, "skipless": True, "remove": "q"},
    {"target_bytes": "4.5 bits"},
    {"q_bits": 4, "distill": 2},
]


def shown_by(case: tuple[str, dict[str, Any]]) -> set[Any]:
    """Bits are chosen and scales trained of matrices, whatever norms and blocks stand around."""
    name, options = case
    shown = traits(name)
    if {"target_bytes", "distill"} & {*options}:
        shown = {trait for trait in shown if trait.startswith(("num_local", "fused"))}
    return {name, *((trait, str(options)) for trait in shown)}


@pytest.mark.parametrize(
    ("name", "options"), thin([*itertools.product(ARCHITECTURES, QUANTIZED)], shown_by), ids=str
)
def test_quantized(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every way that there is; at 8 bits next to nothing is lost."""
    monkeypatch.chdir(tmp_path)
    letters = np.random.default_rng(0).integers(97, 123, 4000)
    Path("t.txt").write_bytes(bytes(letters.tolist()))
    config, weights = make(tmp_path / "s", name, **as_mlx_lm(name))
    options = {"quantize": True, "q_group_size": 32} | options
    if "Nemo" in name and options.get("remove") == "q":
        options["remove"] = "p"
    if "target_bytes" in options:
        count = sum(w.size for w in weights.values())
        options["target_bytes"] = int(count * (4.5 + 2 * 32 / 32) / 8) + 20_000
    if config.get("num_local_experts") and "distill" in options:
        with pytest.raises(mlx_skipless.UserError, match="--distill"):
            convert(tmp_path / "s", tmp_path / "o", **options)
        return
    report = convert(tmp_path / "s", tmp_path / "o", **options)
    plain = skipless(config, weights) if "skipless" in options else (config, weights)
    plain = plain[0], without(plain[1], report.removed if "drop_attention" in options else {})
    expected = reference.logits(*plain, text())
    picks = config.get("num_local_experts") and "skipless" in options  # others, at a breath
    if options.get("q_bits") == 8 and not picks:
        most = 0.3 if "skipless" in options else 0.05  # random weights without skips amplify more
        assert reference.softmax_kl(expected, logits(tmp_path / "o", text())) < most
    assert sum(array.nbytes for array in stored(tmp_path / "o").values()) == report.bytes_after
    check = report.verification
    assert check is not None and check.kl_ratio is not None
    if "drop_attention" not in options:
        rounding = check.kl < 1e-9  # the network is sure of every token, whatever its weights are
        assert rounding or check.kl_ratio < (1.3 if "calibration" in options else 3)


@pytest.mark.parametrize("name", only(USUAL, ARCHITECTURES))
def test_what_is_analysed(name: str, tmp_path: Path) -> None:
    """Losses without each sub-layer, and the importance of each, against the reference."""
    config, weights = make(tmp_path / "s", name)
    letters = np.random.default_rng(0).integers(97, 123, 160)
    (tmp_path / "t.txt").write_bytes(bytes(letters.tolist()))
    found = analyze(tmp_path / "s", calibration=tmp_path / "t.txt")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "s")
    ids = tokenizer.encode((tmp_path / "t.txt").read_text())
    rows = np.array(ids[: 8 * (len(ids) // 8)]).reshape(8, -1)

    def loss(dropped: dict[str, list[int]]) -> float:
        out = reference.logits(config, without(weights, dropped), rows[::2])[:, :-1]
        log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
        return float(-np.take_along_axis(log_p, rows[::2, 1:, None], axis=-1).mean())

    whole = loss({})
    for layer in found.layers:
        assert layer.drop_cost is not None and layer.condition is not None
        for part in ("attention", "ffn"):
            expected = loss({part: [layer.layer]}) - whole
            assert layer.drop_cost[part] == pytest.approx(expected, abs=2e-4)
        q = weights[f"model.layers.{layer.layer}.self_attn.q_proj.weight"]
        assert layer.condition["q"] == pytest.approx(np.linalg.cond(q), rel=0.02)
    x = weights["model.embed_tokens.weight"][rows] * config.get("embedding_scale", 1.0)
    a = x + reference.attention(config, weights, 0, x)
    cosine = (x * a).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(a, axis=-1)
    assert found.layers[0].importance is not None
    assert found.layers[0].importance["attention"] == pytest.approx(1 - cosine.mean(), rel=2e-3)


@pytest.mark.parametrize(
    "name", only(["mixtral", "gpt_neox"], ["mixtral", "gpt_neox", "phi", "cohere"])
)
def test_healing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reduced model of another family learns from its original, and runs as before."""
    monkeypatch.setattr(healing, "SPOKEN", 64)
    make(tmp_path / "s", name, **as_mlx_lm(name))
    convert(tmp_path / "s", tmp_path / "r", drop_attention=1)
    treatment = Treatment(steps=8, batch_size=2, context=24, sampled_tokens=1024, warmup=2, rank=4)
    healing.heal(
        model=tmp_path / "r", teacher=tmp_path / "s", mlx_path=tmp_path / "h",
        treatment=treatment, pace=Pace(eval_tokens=96),
    )  # fmt: skip
    before, after = (logits(tmp_path / folder, text()) for folder in "rh")
    assert stored(tmp_path / "r").keys() == stored(tmp_path / "h").keys()
    assert reference.softmax_kl(before, after) > 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precompute_first_layer": "force"},
        {"drop_attention": 1},
        {"skipless": True, "remove": "p"},
        {"skipless": True, "remove": "q", "quantize": True, "q_group_size": 32, "q_bits": 8},
    ],
    ids=str,
)
def test_experts_of_half_precision(options: dict[str, Any], tmp_path: Path) -> None:
    """Checked on a CPU too, where MLX multiplies them in float32 only."""
    make(tmp_path / "s", "mixtral", dtype="bfloat16")
    report = convert(tmp_path / "s", tmp_path / "o", **options)
    assert report.dtype == "bfloat16" and report.verification is not None
    types = {str(array.dtype) for array in stored(tmp_path / "o").values()}
    assert types <= {"mlx.core.bfloat16", "mlx.core.uint32"}


def retensored(folder: Path, change: Callable[[dict[str, mx.array]], Any]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = stored(folder)
    mx.eval(tensors)
    change(tensors)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})


def test_a_missing_expert(tmp_path: Path) -> None:
    """None takes the place of another."""
    for gone, became in ((3, "7"), (1, None)):
        make(tmp_path / f"s{gone}", "mixtral")

        def change(tensors: dict[str, mx.array], gone: int = gone, became: Any = became) -> None:
            for name in [name for name in tensors if f"experts.{gone}." in name]:
                array = tensors.pop(name)
                if became:
                    tensors[name.replace(f"experts.{gone}.", f"experts.{became}.")] = array

        retensored(tmp_path / f"s{gone}", change)
        with pytest.raises(mlx_skipless.UserError, match=r"no tensor model\.layers\.0\.mlp"):
            convert(tmp_path / f"s{gone}", tmp_path / "o")


def test_experts_of_several_shapes(tmp_path: Path) -> None:
    """The first being the odd one."""
    make(tmp_path / "s", "mixtral")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    retensored(tmp_path / "s", lambda tensors: tensors.update({name: tensors[name][1:]}))
    with pytest.raises(mlx_skipless.UserError, match=r"experts\.1\.w1\.weight has shape"):
        convert(tmp_path / "s", tmp_path / "o")


def test_a_linear_path_in_a_pretrained_model(tmp_path: Path) -> None:
    """mlx-lm's own network has none, so the result brings its code."""
    make(tmp_path / "s", "llama")
    name = "model.layers.0.self_attn.value_skip"
    retensored(tmp_path / "s", lambda tensors: tensors.update({name: mx.ones((4,))}))
    report = convert(tmp_path / "s", tmp_path / "o")
    assert not report.stock and report.verification is not None
    assert report.verification.kl < 1e-9
    logits(tmp_path / "o", text())


ALIASES = {
    "gpt_neox": ("embed_out.weight", "model.embed_out.weight"),
    "mixtral": (
        "model.layers.1.block_sparse_moe.experts.0.w2.weight",
        "model.layers.1.block_sparse_moe.switch_mlp.down_proj.weight",
    ),
}


@pytest.mark.parametrize("name", ALIASES)
def test_a_tensor_under_two_names(name: str, tmp_path: Path) -> None:
    """Neither is taken for the other."""
    one, other = ALIASES[name]
    make(tmp_path / "s", name)
    retensored(tmp_path / "s", lambda tensors: tensors.update({other: tensors[one]}))
    with pytest.raises(mlx_skipless.UserError, match="one and the same tensor"):
        convert(tmp_path / "s", tmp_path / "o")


@pytest.mark.parametrize("expert", ["9" * 5000, "00", "1.0", "\u0661"])
def test_an_expert_of_an_absurd_number(expert: str, tmp_path: Path) -> None:
    make(tmp_path / "s", "mixtral")
    name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
    retensored(tmp_path / "s", lambda tensors: tensors.update({name: mx.ones((96, 64))}))
    with pytest.raises(mlx_skipless.UserError, match="does not use"):
        convert(tmp_path / "s", tmp_path / "o")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2", {"text_config": True}),
        ("qwen3", {"rope_traditional": True}),
        ("cohere", {"layer_norm_bias": True}),
        ("qwen3", {"max_position_embeddings": None}),
    ],
)
def test_keys_that_mlx_lm_alone_would_read(name: str, changes: Config, tmp_path: Path) -> None:
    """Nothing that a config says to no one else changes what its result is."""
    config, weights = make(tmp_path / "s", name, **as_mlx_lm(name), **changes)
    report = convert(tmp_path / "s", tmp_path / "o")
    assert report.stock
    expected = reference.logits({**config, "rope_traditional": name == "cohere"}, weights, text())
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", text())) < 1e-5


@pytest.mark.parametrize("name", ["gemma", "llama", "mistral", "mixtral", "qwen2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fold_norms": True},
        {"drop_attention": 1},
        {"drop_block": 1},
        {"precompute_first_layer": "force"},
        {"skipless": True, "remove": "p"},
    ],
    ids=str,
)
def test_pairs_that_mlx_lm_rotates(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A key that only mlx-lm reads: whoever wrote it wrote it for mlx-lm, as it runs the source."""
    changes = as_mlx_lm(name) | ({"sliding_window": None} if name == "mistral" else {})
    config, weights = make(tmp_path / "s", name, **changes, rope_traditional=True)
    report = convert(tmp_path / "s", tmp_path / "o", **options)
    expected = reference.logits(config, weights, text())
    own = mlx_lm.load(str(tmp_path / "s"))[0](mx.array(text()))  # type: ignore[misc]
    assert reference.worst_relative_error(expected, np.array(own)) < 1e-5
    if not options or "fold_norms" in options:
        assert report.stock
    assert report.verification is not None
    got = mlx_skipless.load(tmp_path / "o")[0](mx.array(text()))  # type: ignore[operator]
    there = mlx_lm.load(str(tmp_path / "o"), trust_remote_code=True)[0]  # type: ignore[call-arg]
    assert mx.allclose(got, there(mx.array(text())), atol=1e-4)
    halves = reference.logits({**config, "rope_traditional": False}, weights, text())
    assert reference.worst_relative_error(expected, halves) > 1e-2
    if not {"skipless", "drop_attention", "drop_block"} & options.keys():
        assert reference.worst_relative_error(expected, np.array(got)) < 1e-5
    elif "skipless" not in options:
        made = json.loads((tmp_path / "o/config.json").read_text())
        assert made["rope_traditional"] and made["model_type"] != "nemotron-nas"


def test_a_flag_of_the_pairs_that_is_none(tmp_path: Path) -> None:
    make(tmp_path / "s", "llama", rope_traditional="1")
    with pytest.raises(mlx_skipless.UserError, match="rope_traditional"):
        convert(tmp_path / "s", tmp_path / "o")


def test_activations_are_not_quantized(tmp_path: Path) -> None:
    make(tmp_path / "s", "llama", quantize_activations=True)
    for options in ({}, {"quantize": True, "q_group_size": 32}):
        convert(tmp_path / "s", tmp_path / f"o{len(options)}", **options)
        logits(tmp_path / f"o{len(options)}", text())


BUFFERS = {
    "gpt_neox": ("gpt_neox.layers.{}.attention", "bias masked_bias rotary_emb.inv_freq"),
    "gptj": ("transformer.h.{}.attn", "bias masked_bias"),
    "phi": ("model.layers.{}.self_attn", "rotary_emb.inv_freq"),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_of_old_exporters_are_ignored(name: str, tmp_path: Path) -> None:
    """Whatever their type."""
    config, weights = make(tmp_path / "s", name, **as_mlx_lm(name))
    module, parts = BUFFERS[name]

    def add(tensors: dict[str, mx.array]) -> None:
        for layer in range(3):
            for part in parts.split():
                tensors[f"{module.format(layer)}.{part}"] = mx.ones((1, 1, 8, 8), mx.uint8)

    retensored(tmp_path / "s", add)
    convert(tmp_path / "s", tmp_path / "o")
    expected = reference.logits(config, weights, text())
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", text())) < 1e-5


@pytest.mark.parametrize("name", ["cohere", "gemma", "qwen2", "gpt_neox"])
def test_a_tied_head_on_disk_is_not_read(name: str, tmp_path: Path) -> None:
    tied = {} if name == "gemma" else {"tie_word_embeddings": True}
    config, weights = make(tmp_path / "s", name, **as_mlx_lm(name), **tied)
    head = "embed_out" if name == "gpt_neox" else "lm_head"
    for folder in ("with", "without"):
        shutil.copytree(tmp_path / "s", tmp_path / folder)
    noise = mx.random.normal((config["vocab_size"], config["hidden_size"]))
    retensored(tmp_path / "with", lambda tensors: tensors.update({f"{head}.weight": noise}))
    expected = reference.logits(config, weights, text())
    for folder in ("with", "without"):
        convert(tmp_path / folder, tmp_path / f"{folder}-o")
        found = logits(tmp_path / f"{folder}-o", text())
        assert reference.worst_relative_error(expected, found) < 1e-5


def test_packed_experts_one_by_one(tmp_path: Path) -> None:
    """As older conversions have them."""
    make(tmp_path / "f", "mixtral")
    packed(tmp_path / "f", tmp_path / "s")
    expected = logits(tmp_path / "s", text())
    letters = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def unstack(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if ".switch_mlp." in name]:
            prefix, _, rest = name.partition(".switch_mlp.")
            matrix, part = rest.split(".")
            for i, one in enumerate(tensors.pop(name)):
                tensors[f"{prefix}.experts.{i}.{letters[matrix]}.{part}"] = one

    retensored(tmp_path / "s", unstack)
    convert(tmp_path / "s", tmp_path / "o", dtype="float32", verify=False)
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", text())) < 1e-4
    assert convert(tmp_path / "s", tmp_path / "p", drop_attention=1).kept_packed


@pytest.mark.parametrize("remove", ["qp", "none"])
def test_skipless_experts_one_by_one(remove: str, tmp_path: Path) -> None:
    """A skipless checkpoint may have its experts as Mixtral has them; it loads and converts."""
    config, weights = skipless(*make(tmp_path / "m", "mixtral"))
    config = config | {"model_type": "skipless", "skip": "none", "torch_dtype": "float32"}
    theirs = ARCHITECTURES["mixtral"].theirs(config, weights)
    factory.write(tmp_path / "s", config, theirs, "float32", shards=1)
    expected = reference.logits(config, weights, text())
    model, _ = mlx_skipless.load(tmp_path / "s")
    found = np.array(model(mx.array(text())))
    assert reference.worst_relative_error(expected, found) < 1e-5
    convert(tmp_path / "s", tmp_path / "o", remove=remove)
    check_same_function(expected, tmp_path / "o", text(), 1e-4)
