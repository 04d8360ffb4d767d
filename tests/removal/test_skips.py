"""Query skips and head skips: every removal leaves them be, and the function stays the same."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
from exact import check_same_function, exact_tensors
from factory import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, make_checkpoint, stored
from grids import only, pairs, thin

import mlx_skipless
from mlx_skipless.conversion.convert import convert
from mlx_skipless.errors import UserError
from mlx_skipless.network.model import PROJECTION_NORMS

SKIPS = ("query", "head", "output")
SHAPES = {"per head": False, "per channel": True, "mixed": None}
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
SMALL = {"hidden_size": 32, "intermediate_size": 48}
PACKED = {"hidden_size": 128, "intermediate_size": 192}
PATHS = ("query_skip", "head_skip", "output_skip")
NORMED = {
    "four norms": None,
    "normed heads": ["q", "k", "v", "heads", "hidden"],
    "normed queries": [*PROJECTION_NORMS],
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "table": {"precompute_first_layer": "force"},
    "folded": {"fold_norms": True},
}
NORMS = {
    "input_layernorm": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "post_attention_layernorm": ("gate_proj.weight", "up_proj.weight"),
}
REMOVALS = {"serial": ("qp", "kp", "vp", "q", "k", "p"), "parallel": ("q", "k", "v", "p")}


def draw_network(seed: int) -> tuple[dict[str, Any], str]:
    """A source with skips, any norms and any ends, and what to remove from it."""
    rng = np.random.default_rng(seed)

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    heads, block = pick(*HEADS), pick("serial", "parallel")
    there = [norm for norm in PROJECTION_NORMS if rng.integers(2)]
    norm = pick("none", "qkv", "qkv")
    reads_queries = norm == "qkv" and "kv" in there
    whole = heads == "MHA" and not reads_queries
    free = [x for x in REMOVALS[block] if whole or not {"k", "v"} & {*x}]
    source = {
        "seed": seed,
        "block": block,
        "num_key_value_heads": HEADS[heads],
        "num_hidden_layers": pick(4, 5),
        "skips": pick(SKIPS, SKIPS, SKIPS[:2], SKIPS[1:], *((name,) for name in SKIPS)),
        "per_channel": pick(*SHAPES.values()),
        "norm": norm,
        "gains": pick(True, False),
        "linear_paths": pick(True, False),
        "bias": pick((), (*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS)),
        "final_norm": pick(True, False),
        "tie_word_embeddings": pick(True, False),
        **SMALL,
    }
    if source["norm"] == "qkv" and there:
        source["norms"] = there
    return source, pick(*free)


def can_go(block: str, heads: str, remove: str, normed: str) -> bool:
    """Whether a block gives up these matrices."""
    whole = heads == "MHA" and normed != "normed queries"
    return remove == "none" or (remove in REMOVALS[block] and (whole or not {"k", "v"} & {*remove}))


def store(folder: Path, weights: dict[str, np.ndarray]) -> None:
    arrays = {name: mx.array(w.astype(np.float32)) for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)


def keep(weights: dict[str, np.ndarray], *gone: str) -> dict[str, np.ndarray]:
    """The tensors without those whose names hold one of these parts."""
    return {name: w for name, w in weights.items() if not any(part in name for part in gone)}


@pytest.mark.parametrize("seed", only(range(16), range(250)))
def test_float64(seed: int, tmp_path: Path) -> None:
    """Without storage's rounding the function is the same; a thousand networks stay below 2e-14."""
    options, remove = draw_network(seed)
    config, weights = make_checkpoint(tmp_path, **options)
    result = exact_tensors(tmp_path, remove=remove)
    tokens = np.random.default_rng(seed).integers(0, 256, (2, 9))
    expected = reference.logits(config, weights, tokens)
    got = reference.logits(config, result, tokens)
    assert 0 < reference.worst_relative_error(expected, got) <= 1e-13


@pytest.mark.parametrize("seed", only(range(4), range(100)))
def test_both_skips_matter(seed: int, tmp_path: Path) -> None:
    """Or no test here would show anything."""
    options, _ = draw_network(seed)
    config, weights = make_checkpoint(tmp_path, **options | {"skips": SKIPS})
    tokens = np.random.default_rng(seed).integers(0, 256, (2, 9))
    expected = reference.logits(config, weights, tokens)
    for gone in ("self_attn.query_skip", "layers.1.self_attn.head_skip", "output_skip"):
        got = reference.logits(config, keep(weights, gone), tokens)
        assert reference.worst_relative_error(expected, got) > 1e-2


@pytest.mark.parametrize(
    ("block", "heads", "shape", "remove", "way", "normed"),
    thin(
        [
            case
            for case in itertools.product(
                REMOVALS, HEADS, SHAPES, ("qp", "kp", "q", "k", "p", "none"), WAYS, NORMED
            )
            if can_go(case[0], case[1], case[3], case[5])
        ],
        lambda case: pairs(*case),
    ),
)
def test_conversion(
    block: str, heads: str, shape: str, remove: str, way: str, normed: str, tmp_path: Path
) -> None:
    """Every vector is copied; ours and mlx-lm's loader run the same function, cached and not."""
    source = make_checkpoint(
        tmp_path / "s", block=block, num_key_value_heads=HEADS[heads], num_hidden_layers=4,
        skips=SKIPS, per_channel=SHAPES[shape], norm="qkv", norms=NORMED[normed], gains=True,
        **SMALL,
    )  # fmt: skip
    out = tmp_path / "o"
    report = convert(tmp_path / "s", out, remove=remove, verify=False, **WAYS[way])
    assert set(report.removed) == {*remove} - {*"none"} and "v" not in report.folded
    check_same_function(source, out, 0)
    tokens = mx.array([[1, 2, 3]])
    plain, _ = mlx_lm.load(str(out), trust_remote_code=True)
    assert mx.array_equal(plain(tokens), mlx_skipless.load(out)[0](tokens))
    written = json.loads((out / "config.json").read_text())
    per_channel = shape != "per head"
    assert written["query_skip"] and written["head_skip"] and written["output_skip"]
    assert written["channel_skips"] == per_channel
    found = {name: np.array(a) for name, a in stored(out).items() if name.endswith(PATHS)}
    wanted = {name: w for name, w in source[1].items() if name.endswith(PATHS)}
    assert found.keys() == wanted.keys() and len(found) == 8
    for name, vector in wanted.items():
        times = 8 if per_channel and len(vector) == 4 else 1
        assert np.array_equal(found[name], np.repeat(vector, times)), name


@pytest.mark.parametrize("seed", only(range(6), range(150)))
def test_network(seed: int, tmp_path: Path) -> None:
    """Any norms, one skip or both, and any ends: source and result run as the reference does."""
    options, remove = draw_network(seed)
    source = make_checkpoint(tmp_path / "s", **options)
    convert(tmp_path / "s", tmp_path / "o", remove=remove, verify=False)
    for folder in (tmp_path / "s", tmp_path / "o"):
        check_same_function(source, folder, seed)
    written = json.loads((tmp_path / "o" / "config.json").read_text())
    everything = ["q", "k", "v", "hidden"] if options["norm"] == "qkv" else []
    assert written["norms"] == options.get("norms", everything)


@pytest.mark.parametrize("steps", [("q", "p"), ("p", "q"), ("none", "qp"), ("k", "auto")])
@pytest.mark.parametrize("shape", SHAPES)
def test_converting_twice(steps: tuple[str, str], shape: str, tmp_path: Path) -> None:
    """A converted network is a source, and its skips are found again."""
    source = make_checkpoint(
        tmp_path / "s", skips=SKIPS, per_channel=SHAPES[shape], num_key_value_heads=4, norm="qkv",
        gains=True, **SMALL,
    )  # fmt: skip
    convert(tmp_path / "s", tmp_path / "first", remove=steps[0], verify=False)
    report = convert(tmp_path / "first", tmp_path / "second", remove=steps[1], verify=False)
    assert report.removed
    check_same_function(source, tmp_path / "second", 0)


@pytest.mark.parametrize("remove", ["qp", "none"])
def test_behind_a_layer_without_attention(remove: str, tmp_path: Path) -> None:
    """No heads come out of it, so the next layer has no head skip; the one behind that has."""
    config, weights = make_checkpoint(
        tmp_path / "s", skips=SKIPS, per_channel=None, num_hidden_layers=5, **SMALL
    )
    gone = ("layers.1.self_attn", "layers.2.self_attn.head_skip")
    weights = keep(weights, *gone)
    store(tmp_path / "s", weights)
    config |= {"removed": {"attention": [1]}}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "s", tmp_path / "o", remove=remove, verify=False)
    for folder in (tmp_path / "s", tmp_path / "o"):
        check_same_function((config, weights), folder, 0)
    names = {f"model.layers.{i}.self_attn.head_skip" for i in (3, 4)}
    assert {name for name in stored(tmp_path / "o") if name.endswith("head_skip")} == names


@pytest.mark.parametrize(
    "kept",
    [
        f"layers.{x}"
        for x in ("1.self_attn.query_skip", "2.self_attn.head_skip", "2.self_attn.output_skip")
    ],
)
def test_one_skip_of_one_layer(kept: str, tmp_path: Path) -> None:
    """The other layers have zeros."""
    config, weights = make_checkpoint(tmp_path / "s", skips=SKIPS, per_channel=True, **SMALL)
    weights = {n: w for n, w in weights.items() if kept in n or not n.endswith(PATHS)}
    store(tmp_path / "s", weights)
    convert(tmp_path / "s", tmp_path / "o", remove="qp", verify=False)
    for folder in (tmp_path / "s", tmp_path / "o"):
        check_same_function((config, weights), folder, 0)
    written = json.loads((tmp_path / "o" / "config.json").read_text())
    assert [written[path] for path in PATHS] == [path in kept for path in PATHS]


def test_skipless_of_a_network_with_all_skips(tmp_path: Path) -> None:
    """Its skips on the stream go; those in the removals' bases stay."""
    config, weights = make_checkpoint(
        tmp_path / "s", skip="both", norm="pre", skips=SKIPS, per_channel=True, **SMALL
    )
    convert(tmp_path / "s", tmp_path / "o", skipless=True, remove="qp", verify=False)
    stripped = keep(weights, "layernorm")
    for name in stripped:
        for norm, readers in NORMS.items():
            if name.endswith(readers):
                layer = ".".join(name.split(".")[:3])
                stripped[name] = weights[name] * weights[f"{layer}.{norm}.weight"]
    mapped = config | {"skip": "none", "norm": "qkv"}
    check_same_function((mapped, stripped), tmp_path / "o", 0)


@pytest.mark.parametrize(
    ("block", "remove"), [("serial", "qp"), ("serial", "p"), ("parallel", "p")]
)
def test_normed_heads_without_skips(block: str, remove: str, tmp_path: Path) -> None:
    """Without P an FFN or a parallel block's sum reads them; their gain is copied."""
    source = make_checkpoint(
        tmp_path / "s", block=block, norm="qkv", norms=["heads", "hidden"], gains=True, **SMALL
    )
    convert(tmp_path / "s", tmp_path / "o", remove=remove, fold_norms=True, verify=False)
    check_same_function(source, tmp_path / "o", 0)
    name = "model.layers.1.self_attn.heads_norm.weight"
    assert np.array_equal(np.array(stored(tmp_path / "o")[name]), source[1][name])


def test_normed_heads_without_a_gain_in_one_layer(tmp_path: Path) -> None:
    """It gets ones, as many as its heads are wide, whatever the stream is."""
    config, weights = make_checkpoint(
        tmp_path / "s", norm="qkv", norms=["heads"], gains=True, head_dim=12, **SMALL
    )
    weights = keep(weights, "layers.1.self_attn.heads_norm")
    store(tmp_path / "s", weights)
    convert(tmp_path / "s", tmp_path / "o", remove="p", verify=False)
    check_same_function((config, weights), tmp_path / "o", 0)


def test_an_output_skip_goes_with_its_attention(tmp_path: Path) -> None:
    """The last layer has no heads then."""
    config, weights = make_checkpoint(tmp_path / "s", skips=SKIPS, **SMALL)
    weights = keep(weights, "layers.2.self_attn")
    store(tmp_path / "s", weights)
    config |= {"removed": {"attention": [2]}}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "s", tmp_path / "o", remove="qp", verify=False)
    for folder in (tmp_path / "s", tmp_path / "o"):
        check_same_function((config, weights), folder, 0)
    assert not [name for name in stored(tmp_path / "o") if name.endswith("output_skip")]


def test_layer_norms_stay_where_an_output_skip_adds_heads(tmp_path: Path) -> None:
    """Their mean is in no matrix that could have it taken out."""
    source = make_checkpoint(
        tmp_path / "s", skip="both", norm="pre", norm_type="layer", skips=SKIPS[2:], **SMALL
    )
    convert(tmp_path / "s", tmp_path / "o", remove="none", fold_norms=True, verify=False)
    check_same_function(source, tmp_path / "o", 0)
    assert json.loads((tmp_path / "o" / "config.json").read_text())["norm_type"] == "layer"


def test_heads_of_another_width_cannot_be_added(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", head_dim=12, **SMALL)
    weights = mx.load(str(tmp_path / "s" / "model.safetensors"))
    weights |= {"model.layers.2.self_attn.output_skip": mx.ones(4)}
    mx.save_safetensors(str(tmp_path / "s" / "model.safetensors"), weights)
    with pytest.raises(UserError, match="heads that are 48 wide to a stream of 32"):
        convert(tmp_path / "s", tmp_path / "o", remove="none")


@pytest.mark.parametrize("skips", [(), *((name,) for name in SKIPS)], ids=str)
def test_a_value_gain_stays_beside_a_skip(skips: tuple[str, ...], tmp_path: Path) -> None:
    """It scales the values, but not the query that is added to them, nor what a head skip reads."""
    source = make_checkpoint(tmp_path / "s", norm="qkv", gains=True, skips=skips, **SMALL)
    report = convert(tmp_path / "s", tmp_path / "o", remove="q", fold_norms=True, verify=False)
    assert ("v" in report.folded) == (not skips) and "hidden" in report.folded
    check_same_function(source, tmp_path / "o", 0)


def test_a_value_gain_stays_before_a_norm_of_the_heads(tmp_path: Path) -> None:
    """The norm divides by what the gain made of the heads."""
    source = make_checkpoint(
        tmp_path / "s", norm="qkv", norms=[*PROJECTION_NORMS], gains=True, **SMALL
    )
    report = convert(tmp_path / "s", tmp_path / "o", remove="q", fold_norms=True, verify=False)
    assert "v" not in report.folded and "hidden" in report.folded
    check_same_function(source, tmp_path / "o", 0)


@pytest.mark.parametrize("how", ["absent", "per head", "as it is"])
def test_a_packed_source(how: str, tmp_path: Path) -> None:
    """What a layer lacks, or has per head alone, is no reason to fail: it is not kept packed."""
    make_checkpoint(
        tmp_path / "s", skips=SKIPS, per_channel=True, skip="both", norm="pre", **PACKED
    )
    convert(tmp_path / "s", tmp_path / "q", remove="none", quantize=True, verify=False)
    file = tmp_path / "q" / "model.safetensors"
    weights: Any = mx.load(str(file))
    name = "model.layers.2.self_attn.query_skip"
    if how == "absent":
        del weights[name]
        (tmp_path / "q" / "model.safetensors.index.json").unlink()
    elif how == "per head":
        weights[name] = weights[name][:4]
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    report = convert(tmp_path / "q", tmp_path / "o", drop_ffn=1)
    assert report.kept_packed == (how == "as it is")
    found = np.array(stored(tmp_path / "o")[name])
    expected = np.zeros(128) if how == "absent" else np.array(weights[name])
    assert np.array_equal(found, np.repeat(expected, 128 // len(expected)))


QUERIES: dict[str, Any] = {"norm": "qkv", "norms": ["q", "kv", "heads"], "gains": True}


def test_a_singular_q_goes_that_alone_reads_the_stream(tmp_path: Path) -> None:
    """K and V read a norm of the queries, so nothing has to be multiplied by its inverse."""
    config, weights = make_checkpoint(tmp_path / "s", skips=SKIPS, **QUERIES, **SMALL)
    for name in [name for name in weights if name.endswith("q_proj.weight")]:
        weights[name] = weights[name] * (np.arange(32) > 3)  # four directions are lost
    store(tmp_path / "s", weights)
    for remove in ("qp", "auto"):
        report = convert(tmp_path / "s", tmp_path / remove, remove=remove, dtype="float16")
        assert report.removed == {"q": [0, 1, 2], "p": [0, 1, 2]} and report.verification
        assert report.verification.max_rel_logit_error < 2e-2
    convert(tmp_path / "s", tmp_path / "o", remove="qp", verify=False)
    check_same_function((config, weights), tmp_path / "o", 0)


def test_a_biased_q_is_inverted_for_its_bias(tmp_path: Path) -> None:
    """It enters the stream before Q, so a singular Q stays."""
    options = {"bias": ("q_proj",), "skips": SKIPS} | QUERIES | SMALL
    config, weights = make_checkpoint(tmp_path / "s", **options)
    convert(tmp_path / "s", tmp_path / "o", remove="qp", verify=False)
    check_same_function((config, weights), tmp_path / "o", 0)
    name = "model.layers.1.self_attn.q_proj.weight"
    store(tmp_path / "s", weights | {name: np.zeros((32, 32))})
    with pytest.raises(UserError, match="Q of layer 1 is singular"):
        convert(tmp_path / "s", tmp_path / "none", remove="qp")
    assert convert(tmp_path / "s", tmp_path / "auto").removed["q"] == [0, 2]


def test_a_biased_q_is_tried_with_its_layer(tmp_path: Path) -> None:
    """Nothing but its bias is inverted, so that 8 bits cost as little without it as with it."""
    _, weights = make_checkpoint(
        tmp_path / "s", bias=("q_proj",), skips=SKIPS, spread=0.05, **QUERIES | PACKED
    )
    for gone in ((), ("layers.0.self_attn.q_proj.bias", "layers.2.self_attn.q_proj.bias")):
        store(tmp_path / "s", keep(weights, *gone))
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
        report = convert(tmp_path / "s", tmp_path / "o", quantize=True, q_bits=8)
        assert report.removed["q"] == [0, 1, 2] and report.verification
        assert report.verification.kl < 1e-3


@pytest.mark.parametrize("remove", ["kp", "v"])
def test_k_and_v_stay_that_read_the_queries(remove: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "s", num_key_value_heads=4, **QUERIES, **SMALL)
    wanted = f"{remove[0].upper()} reads a norm of the queries.*only Q and P can go, --remove qp"
    with pytest.raises(UserError, match=wanted):
        convert(tmp_path / "s", tmp_path / "o", remove=remove)


@pytest.mark.parametrize("remove", ["qp", "none"])
def test_the_gain_of_the_queries_folds_into_k_and_v(remove: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "s", skips=SKIPS, **QUERIES, **SMALL)
    report = convert(tmp_path / "s", tmp_path / "o", remove=remove, fold_norms=True, verify=False)
    assert "kv" in report.folded and not [n for n in stored(tmp_path / "o") if "kv_norm" in n]
    check_same_function(source, tmp_path / "o", 0)


@pytest.mark.parametrize("letter", ["k", "v"])
def test_queries_are_the_keys_or_values_where_these_matrices_never_were(
    letter: str, tmp_path: Path
) -> None:
    """Their norm cannot fold then."""
    config, weights = make_checkpoint(
        tmp_path / "s", num_key_value_heads=4, skips=SKIPS, **QUERIES, **SMALL
    )
    weights = keep(weights, f"{letter}_proj")
    store(tmp_path / "s", weights)
    config |= {"removed": {letter: [0, 1, 2]}}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "s", tmp_path / "o", remove="qp", fold_norms=True, verify=False)
    assert any("kv_norm" in name for name in stored(tmp_path / "o"))
    check_same_function((config, weights), tmp_path / "o", 0)
