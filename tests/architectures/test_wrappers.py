"""Models of several parts: their language model comes out, by any layout of names and keys."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import reference
import zoo
from architectures import WRAPPERS, logits, make, skipless, text, without
from factory import stored
from grids import only, thorough
from mlx_lm.utils import quantize_model

import mlx_skipless
from mlx_skipless.architectures.config import read_model_args
from mlx_skipless.architectures.wrappers import take_text_model
from mlx_skipless.checkpoints.checkpoint import open_checkpoint, read_dtype
from mlx_skipless.cli.main import main
from mlx_skipless.conversion.convert import convert
from mlx_skipless.text import samples

STOCK = {"fold_norms", "drop_block", "quantize", "q_bits", "q_group_size"}
LEFT_OUT = "what this mistral3 sees pictures with is left out"
TYPES = {"mistral3": "ministral3", "mistral3, Small": "mistral"}


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture(autouse=True)
def less_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "CALIBRATION", (16, 16))


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_language_model_alone_comes_out(name: str, tmp_path: Path) -> None:
    """In mlx-lm's own network of it, and what sees pictures is left out, which is said once."""
    expected = reference.logits(*make(tmp_path / "s", name), text())
    report = convert(tmp_path / "s", tmp_path / "o", verify=False)
    assert report.stock and [LEFT_OUT in note for note in report.notes].count(True) == 1
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", text())) <= 1e-5
    written = json.loads((tmp_path / "o/config.json").read_text())
    assert written["model_type"] == TYPES[name]
    assert written["architectures"] == [f"{TYPES[name].capitalize()}ForCausalLM"]
    assert (
        written["eos_token_id"]
        == json.loads((tmp_path / "s/config.json").read_text())["eos_token_id"]
    )
    seen = ("vision", "image", "projector", "spatial", "text_config")
    assert not [key for key in written if key.startswith(seen)]
    names = stored(tmp_path / "o").keys()
    assert {name.split(".")[0] for name in names} == {"model", "lm_head"}
    assert not [name for name in names if "vision" in name or "projector" in name]
    again = convert(tmp_path / "o", dry_run=True)  # a language model, as any other
    assert not [note for note in again.notes if "left out" in note]


WAYS: list[tuple[dict[str, Any], float]] = [
    ({"fold_norms": True}, 1e-5),
    ({"precompute_first_layer": "force"}, 1e-5),
    pytest.param({"drop_attention": 1}, 1e-5, marks=thorough),
    pytest.param({"drop_block": 1}, 1e-5, marks=thorough),
    ({"skipless": True, "remove": "p"}, 5e-4),
    ({"quantize": True, "q_bits": 8, "q_group_size": 32}, 0.1),
]


@pytest.mark.parametrize(("options", "limit"), WAYS, ids=str)
def test_everything_that_can_be_done_to_it(
    options: dict[str, Any], limit: float, tmp_path: Path
) -> None:
    config, weights = make(tmp_path / "s", "mistral3")
    report = convert(tmp_path / "s", tmp_path / "o", verify=False, **options)
    assert report.stock == (
        {*options} <= {"fold_norms", "drop_block", "quantize", "q_bits", "q_group_size"}
    )
    source = skipless(config, weights) if "skipless" in options else (config, weights)
    dropped = report.removed if any("drop" in option for option in options) else {}
    expected = reference.logits(source[0], without(source[1], dropped), text())
    found = logits(tmp_path / "o", text())
    assert reference.worst_relative_error(expected, found) <= limit


@pytest.mark.parametrize("name", only(["mistral3"], WRAPPERS))
def test_a_packed_one_stays_packed(name: str, tmp_path: Path) -> None:
    """As mlx-lm quantizes it, with bits of its own for some matrices, named as they are there."""
    make(tmp_path / "f", name)
    model, tokenizer = mlx_lm.load(str(tmp_path / "f"))  # type: ignore[misc]

    def bits(path: str, module: Any) -> Any:
        return {"group_size": 32, "bits": 8 if "down_proj" in path else 4}

    config = json.loads((tmp_path / "f/config.json").read_text())
    model, config = quantize_model(model, config, 32, 4, quant_predicate=bits)
    mlx_lm.utils.save(tmp_path / "s", tmp_path / "f", model, tokenizer, config)
    report = convert(tmp_path / "s", tmp_path / "o", drop_block=1, verify=False)
    assert report.kept_packed and report.stock
    (gone,) = report.removed["attention"]
    whole, _ = mlx_lm.load(str(tmp_path / "s"))  # type: ignore[misc]
    del whole.language_model.model.layers[gone]
    expected = np.array(whole(mx.array(text())))
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", text())) < 1e-5


@pytest.mark.parametrize(
    ("whole", "inner", "head", "tied"),
    [
        (None, None, True, False),
        (None, None, False, True),
        (None, True, False, True),
        (None, False, True, False),
        (True, None, True, False),  # transformers' default, beside a head of its own
        (True, False, True, False),
        (True, False, False, True),
        (False, True, True, False),
        (True, True, False, True),
    ],
)
def test_which_head_counts(
    whole: bool | None, inner: bool | None, head: bool, tied: bool, tmp_path: Path
) -> None:
    """Both configs' if they agree, else the one that is there."""
    config, weights = make(tmp_path / "s", "mistral3", tie_word_embeddings=not head)
    inside = json.loads((tmp_path / "s/config.json").read_text())["text_config"]
    del inside["tie_word_embeddings"]
    outer, inner_key = ({} if v is None else {"tie_word_embeddings": v} for v in (whole, inner))
    edit(tmp_path / "s", text_config=inside | inner_key, **outer)
    assert open_checkpoint(tmp_path / "s").args.tie_word_embeddings == tied
    convert(tmp_path / "s", tmp_path / "o", verify=False)
    assert ("lm_head.weight" in stored(tmp_path / "o")) == (not tied)
    expected = reference.logits(config, weights, text())
    for folder in ("s", "o"):
        model, _ = mlx_skipless.load(tmp_path / folder)
        found = np.array(model(mx.array(text())))
        assert reference.worst_relative_error(expected, found) <= 1e-5


def test_what_stands_outside_counts_for_the_whole() -> None:
    inner = {
        "eos_token_id": 5,
        "bos_token_id": 1,
        "torch_dtype": "float16",
        "quantization_config": {},
    }
    outer = {"eos_token_id": 7, "dtype": "bfloat16", "quantization_config": {"bits": 4}}
    config, _ = take_text_model(
        {"model_type": "mistral3", **outer, "text_config": inner}, weights=False
    )
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, 1)
    assert config["quantization_config"] == {"bits": 4}
    assert read_dtype(config) == mx.bfloat16


@pytest.mark.parametrize(
    ("text_config", "facts"),
    [
        (
            {},
            {
                "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
                "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096,
                "tie_word_embeddings": False, "rope_theta": 1e4, "query_growth": 0.0,
            },
        ),
        (
            {"model_type": "ministral3"},
            {
                "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34,
                "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
                "rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "sliding_window": None,
                "tie_word_embeddings": False, "rope_theta": 1e6, "query_growth": 0.1,
                "query_step": 16384,
            },
        ),
        (
            {"model_type": "ministral3", "head_dim": None, "num_key_value_heads": None,
             "hidden_size": 2048},
            {"head_dim": 64, "num_key_value_heads": 32},
        ),
        (
            {"model_type": "ministral3", "sliding_window": 8, "num_hidden_layers": 2},
            {"layer_types": ["sliding_attention"] * 2},
        ),
        (
            {"model_type": "ministral3",
             "rope_parameters": {"rope_theta": 5.0, "original_max_position_embeddings": 16}},
            {"rope": None, "rope_theta": 5.0, "query_growth": 0.0},
        ),
        (
            {"model_type": "ministral3",
             "rope_parameters": {"rope_theta": 5.0, "llama_4_scaling_beta": 0.3,
                                 "original_max_position_embeddings": 16}},
            {"rope": None, "query_growth": 0.3, "query_step": 16},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_silent_one_means(text_config: dict[str, Any], facts: dict[str, Any]) -> None:
    """What transformers means by the keys that are absent."""
    config, _ = take_text_model(
        {"model_type": "mistral3", "text_config": text_config}, weights=False
    )
    args = read_model_args(config)
    assert {key: getattr(args, key) for key in facts} == facts


@pytest.mark.parametrize("name", WRAPPERS)
def test_mlx_lm_is_told_what_is_silent(name: str, tmp_path: Path) -> None:
    """Also a wrapper that nothing was converted of is loaded as transformers reads it."""
    expected = reference.logits(*make(tmp_path / "s", name, rms_norm_eps=1e-6), text())
    inner = json.loads((tmp_path / "s/config.json").read_text())["text_config"]
    if name == "mistral3":
        inner["rms_norm_eps"] = 1e-5
        expected = reference.logits(*make(tmp_path / "s", name), text())
    del inner["rms_norm_eps"]
    edit(tmp_path / "s", text_config=inner)
    model, _ = mlx_skipless.load(tmp_path / "s")
    found = np.array(model(mx.array(text())))
    assert reference.worst_relative_error(expected, found) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config": None}, "mlx-lm makes no network of the config.json"),
        ({"text_config": {"model_type": ["mistral"]}}, "mlx-lm makes no network"),
        ({"text_config": {"hidden_size": "wide"}}, '"hidden_size" in config.json is \'wide\''),
        (
            {"text_config": {"model_type": "ministral3", "rope_parameters": 3}},
            "the RoPE scaling in config.json is 3",
        ),
        (
            {"text_config": {"model_type": "ministral3",
                             "rope_parameters": {"llama_4_scaling_beta": "much"}}},
            '"llama_4_scaling_beta" in config.json is \'much\'',
        ),
        (
            {"text_config": {"model_type": "ministral3",
                             "rope_parameters": {"llama_4_scaling_beta": 0.1}}},
            '"original_max_position_embeddings"',
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_spoilt_one(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3"} | changes))
    assert main(["convert", "--dry-run", "--model", str(tmp_path / "config.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


@pytest.fixture
def mistral4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mistral 3 around a Mistral 4, of which only mlx-lm knows what it computes."""
    inner = zoo.CONFIGS["mistral4"] | {"model_type": "mistral4"}
    sees = {"vision_config": {"model_type": "pixtral"}, "image_token_index": 10}
    monkeypatch.setitem(zoo.CONFIGS, "mistral3", sees | {"text_config": inner})
    zoo.make_model(tmp_path / "s", "mistral3")
    return tmp_path / "s"


def test_one_that_only_mlx_lm_knows(mistral4: Path) -> None:
    report = convert(mistral4, dry_run=True, quantize=True, q_group_size=32)
    assert report.stock and [LEFT_OUT in note for note in report.notes].count(True) == 1
    with pytest.raises(mlx_skipless.UserError, match="not known of a mistral3 with a mistral4"):
        convert(mistral4, dry_run=True, skipless=True)


@thorough
def test_what_is_not_exact_of_one_that_only_mlx_lm_knows(mistral4: Path, tmp_path: Path) -> None:
    report = convert(mistral4, tmp_path / "o", drop_attention=1, drop_ffn=1)
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert {*config} >= {"text_config"} and not {*config} & {"vision_config", "image_token_index"}
    whole, _ = mlx_lm.load(str(mistral4))  # type: ignore[misc]
    for part, name in (("attention", "self_attn.o_proj"), ("ffn", "mlp")):
        for path, module in whole.layers[report.removed[part][0]].named_modules():
            writes = path.startswith(name) and path.endswith(("o_proj", "down_proj"))
            if writes and "weight" in module:
                module.weight = mx.zeros_like(module.weight)
    expected = np.array(whole(mx.array(text())))
    assert reference.worst_relative_error(expected, logits(tmp_path / "o", text())) < 1e-5
