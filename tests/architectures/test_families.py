"""What configs of other architectures mean: as published, in today's keys, and spoilt."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from architectures import ARCHITECTURES
from factory import make_llama
from transformers import LlamaConfig

from mlx_skipless import UserError
from mlx_skipless.architectures.config import read_model_args
from mlx_skipless.architectures.families import find_family
from mlx_skipless.cli.main import main
from mlx_skipless.conversion.convert import convert
from mlx_skipless.network.names import ATTENTION, EXPERTS
from mlx_skipless.quantization.layout import Layout

LLAMA3: dict[str, Any] = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
# As on the Hugging Face Hub, but for keys that say nothing of the network; Hugging Face's counts of
# parameters, and what else must come out. The catalogue has other models, by their shapes alone.
PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "Llama-3.2-1B": (
        {
            "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
            "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "vocab_size": 128256,
        },
        1_235_814_400,
        {"rope": LLAMA3, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
    ),
    "Mixtral-8x22B-Instruct-v0.1": (
        {
            "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 6144,
            "intermediate_size": 16384, "max_position_embeddings": 65536, "model_type": "mixtral",
            "num_attention_heads": 48, "num_experts_per_tok": 2, "num_hidden_layers": 56,
            "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0, "sliding_window": None, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "vocab_size": 32768,
        },
        140_630_071_296,
        {"rope_theta": 1e6, "num_local_experts": 8},
    ),
    "GPT-NeoX-20B": (
        {
            "attention_probs_dropout_prob": 0, "hidden_act": "gelu_fast", "hidden_size": 6144,
            "intermediate_size": 24576, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
            "model_type": "gpt_neox", "num_attention_heads": 64, "num_hidden_layers": 44,
            "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
            "torch_dtype": "float16", "vocab_size": 50432,
        },
        20_554_567_680,
        {"rotary_dim": 24, "block": "parallel", "rms_norm_eps": 1e-5},
    ),
    "pythia-70m": (
        {
            "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048,
            "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
            "num_attention_heads": 8, "num_hidden_layers": 6, "rotary_emb_base": 10000,
            "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
            "use_parallel_residual": True, "vocab_size": 50304,
        },
        70_426_624,
        {"rotary_dim": 16, "hidden_act": "gelu"},
    ),
    "gpt-j-6b": (
        {
            "activation_function": "gelu_new", "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-05,
            "model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28,
            "n_positions": 2048, "rotary": True, "rotary_dim": 64, "scale_attn_weights": True,
            "summary_activation": None, "tie_word_embeddings": False, "vocab_size": 50400,
        },
        6_050_882_784,
        {"rotary_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "phi-1_5": (
        {
            "hidden_act": "gelu_new", "hidden_size": 2048, "intermediate_size": 8192,
            "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "phi",
            "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": None,
            "partial_rotary_factor": 0.5, "qk_layernorm": False, "rope_scaling": None,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float16",
            "vocab_size": 51200,
        },
        1_418_270_720,
        {"rotary_dim": 32, "num_key_value_heads": 32},
    ),
    "aya-23-8B": (
        {
            "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
            "max_position_embeddings": 8192, "model_type": "cohere", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 10000,
            "torch_dtype": "float16", "use_qk_norm": False, "vocab_size": 256000,
        },
        8_028_033_024,
        {"logit_scale": 0.0625, "tie_word_embeddings": True},
    ),
    "gemma-2b": (
        {
            "attention_bias": False, "head_dim": 256, "hidden_act": "gelu",
            "hidden_activation": None, "hidden_size": 2048, "intermediate_size": 16384,
            "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8,
            "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
            "vocab_size": 256000,
        },
        2_506_172_416,
        {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    ),
    "Qwen2.5-0.5B": (
        {
            "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
            "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
            "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_mrope": False,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        494_032_768,
        {"sliding_window": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config(name: str) -> None:
    config, weights, facts = PUBLISHED[name]
    args = read_model_args(config)
    assert Layout(args, mx.bfloat16).count() == weights
    assert {key: getattr(args, key) for key in facts} == facts
    assert read_model_args(todays(config)) == args


def todays(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as today's transformers writes it: all that RoPE needs in one place."""
    if config["model_type"] == "gptj":
        return config
    moved = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    new = {moved.get(key, key): value for key, value in config.items()}
    rope = new.pop("rope_scaling", None) or {"rope_type": "default"}
    keys = ("rope_theta", "partial_rotary_factor")
    rope = rope | {key: new.pop(key) for key in keys if key in new}
    return new | {"rope_parameters": rope, "dtype": new.pop("torch_dtype")}


def of(name: str, **changes: Any) -> dict[str, Any]:
    config = ARCHITECTURES[name].config | changes | {"model_type": name.split(",")[0]}
    return {key: value for key, value in config.items() if value is not ...}


@pytest.mark.parametrize(
    ("name", "changes", "facts"),
    [
        (
            "llama",
            {"logit_scale": 3.0, "num_local_experts": 4, "rotary_dim": 8, "removed": {"q": [0]}},
            {"logit_scale": 1.0, "num_local_experts": 0, "rotary_dim": 16, "removed": {}},
        ),
        ("mixtral", {"rms_norm_eps": ..., "rope_theta": ...}, {"rope_theta": 1e6}),
        ("gpt_neox", {"rotary_pct": 1.0}, {"rotary_dim": 16}),
        ("gpt_neox", {"rotary_pct": ...}, {"rotary_dim": 4}),
        ("gpt_neox", {"num_key_value_heads": 2, "head_dim": 7}, {"num_key_value_heads": 4}),
        ("gptj", {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope": None}),
        ("gptj", {"n_inner": ...}, {"intermediate_size": 256}),
        ("llama", {"rope_scaling": {"rope_type": None}}, {"rope": None}),
        ("qwen2", {"use_sliding_window": True, "num_hidden_layers": 30}, {"sliding_window": None}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        ),
    ],
)
def test_what_is_silent(name: str, changes: dict[str, Any], facts: dict[str, Any]) -> None:
    """As in transformers, which reads no other architecture's keys."""
    args = read_model_args(of(name, **changes))
    assert {key: getattr(args, key) for key in facts} == facts


LACKING: list[tuple[str, dict[str, Any]]] = [
    (name, change)
    for name, kind in ARCHITECTURES.items()
    if kind.stock
    for change in (
        {"hidden_act": "relu"},
        {"head_bias": name not in ("gptj", "phi")},
        {"biases": {"q_proj": [0]}},
        {"biases": {"q_proj": [0, 1, 2]}},
        {"biases": {"router": [0, 1, 2]}},
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4},
        {"value_skip": True},
        {"query_skip": True},
        {"head_skip": True},
        {"output_skip": True},
    )
] + [
    *((name, {"rope": {"rope_type": "linear", "factor": 2.0}})
      for name in ("mixtral", "gemma", "gpt_neox", "gptj", "phi", "cohere")),
    *((name, {"tie_word_embeddings": True}) for name in ("gpt_neox", "gptj", "phi")),
    *((name, {"tie_word_embeddings": False}) for name in ("gemma", "cohere")),
    *((name, {"head_dim": 8})
      for name in ("mixtral", "gpt_neox", "gptj", "phi", "cohere", "qwen2")),
    *((name, {"intermediate_size": 96}) for name in ("gpt_neox", "gptj")),
    *((name, {"layer_types": ["full_attention", *["sliding_attention"] * 2], "sliding_window": 4})
      for name in ("mixtral", "qwen2", "qwen3")),
    ("llama", {"biases": {part: [0] for part in ATTENTION}}),
    ("qwen2", {"biases": {part: [0, 2] for part in ATTENTION[:3]}}),
    *((name, {"biases": {}}) for name in ("qwen2", "gpt_neox", "gptj", "phi")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), LACKING)
def test_what_mlx_lms_own_network_lacks(name: str, change: dict[str, Any]) -> None:
    """A network is mlx-lm's own only as long as nothing is in it that mlx-lm's has not."""
    family, args = find_family(of(name)), read_model_args(of(name))
    assert family.expresses(args)
    assert not family.expresses(replace(args, **change))


def biased(names: tuple[str, ...]) -> dict[str, list[int]]:
    return {name: [0, 1, 2] for name in names}


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("llama", {"biases": biased(ATTENTION)}, {"attention_bias": True}),
        ("llama", {"biases": biased(EXPERTS)}, {"mlp_bias": True}),
        ("llama", {"rope": {"rope_type": "linear", "factor": 2.0}}, {"rope_scaling": ...}),
        ("llama", {"head_dim": 8}, {"head_dim": 8}),
        ("cohere", {"biases": biased(ATTENTION)}, {"attention_bias": True}),
        ("gpt_neox", {"block": "serial"}, {"use_parallel_residual": False}),
        ("gpt_neox", {"rms_norm_eps": 0.5}, {"layer_norm_eps": 0.5}),
        ("gptj", {"rotary_dim": 4, "max_position_embeddings": 7}, {"n_positions": 7}),
        ("phi", {"rotary_dim": 4}, {"partial_rotary_factor": 0.25}),
    ],
)
def test_what_mlx_lms_own_network_is_told(
    name: str, change: dict[str, Any], told: dict[str, Any]
) -> None:
    family, args = find_family(of(name)), replace(read_model_args(of(name)), **change)
    assert family.expresses(args)
    settings = family.make_stock_settings(args)
    for key, value in told.items():
        assert settings[key] == (change["rope"] if value is ... else value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt_neox", {"rotary_pct": 0}, '"rotary_pct" in config.json is 0'),
        ("gpt_neox", {"rotary_pct": 1.5}, '"rotary_pct" in config.json is 1.5'),
        ("gpt_neox", {"rotary_pct": float("inf")}, '"rotary_pct" in config.json is inf'),
        ("gpt_neox", {"rotary_pct": float("nan")}, '"rotary_pct" in config.json is nan'),
        ("gpt_neox", {"rotary_pct": True}, '"rotary_pct" in config.json is True'),
        ("gpt_neox", {"rotary_pct": 0.2}, "is 3; RoPE needs pairs"),
        ("gpt_neox", {"num_attention_heads": 5}, "no multiple of 5 heads"),
        ("gpt_neox", {"layer_norm_eps": -1e-5}, '"layer_norm_eps" in config.json is -1e-05'),
        ("gpt_neox", {"use_parallel_residual": "false"}, '"use_parallel_residual"'),
        ("phi", {"partial_rotary_factor": "0.5"}, '"partial_rotary_factor" in config.json'),
        ("phi", {"qk_layernorm": True}, '"qk_layernorm"'),
        ("gptj", {"n_head": 5}, '"n_embd" 64 is no multiple of 5 heads'),
        ("gptj", {"n_layer": None}, '"n_layer" in config.json is None'),
        ("gptj", {"n_inner": "256"}, '"n_inner" in config.json'),
        ("gptj", {"activation_function": "tanh"}, "\"activation_function\": 'tanh'"),
        ("mixtral", {"num_local_experts": 0}, '"num_local_experts" in config.json is 0'),
        ("mixtral", {"num_local_experts": ""}, "\"num_local_experts\" in config.json is ''"),
        ("mixtral", {"num_local_experts": 10**9}, '"num_local_experts" in config.json'),
        ("mixtral", {"num_experts_per_tok": 5}, "of 4 experts a token can have 1 to all"),
        ("qwen2", {"use_sliding_window": "false"}, '"use_sliding_window"'),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "2"},
            "\"max_window_layers\" in config.json is '2'",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 10**9},
            '"num_hidden_layers" in config.json is 1000000000',
        ),
        ("llama", {"rope_scaling": {"factor": 2.0}}, '"rope_type"'),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, '"rope_type"'),
        ("mixtral", {"rope_scaling": {**YARN, "attention_factor": 2.0}}, "attention_factor"),
        ("mistral", {"sliding_window": [None, 8, 8]}, '"sliding_window"'),
    ],
)
def test_a_spoilt_config(
    name: str,
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused in a line, by the config's own key; neither guessed nor a traceback."""
    with pytest.raises(UserError):
        read_model_args(of(name, **changes))
    (tmp_path / "config.json").write_text(json.dumps(of(name, **changes)))
    assert main(["analyze", str(tmp_path / "config.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


@pytest.mark.parametrize(
    "rope",
    [
        YARN | {"attention_factor": 1.138629436},  # 0.1 ln 4 + 1
        YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0},
        LONGROPE | {"attention_factor": 1.18321596},  # the root of 1 + ln 4 / ln 32
        YARN | {"truncate": True, "partial_rotary_factor": 1.0},
    ],
)
def test_what_follows_from_the_rest_of_rope(rope: dict[str, Any]) -> None:
    """As OLMo 3 writes its attention_factor down, which mlx-lm computes."""
    assert read_model_args(of("llama", rope_scaling=rope)).rope == rope


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (YARN | {"attention_factor": 2.0}, 'takes 1.138629436111989 for its "attention_factor"'),
        (YARN | {"mscale": 0.5}, '"attention_factor", not 1.138629436111989'),
        (LONGROPE | {"attention_factor": 1.5}, '"attention_factor", not 1.5'),
        (LONGROPE | {"short_factor": [1.0] * 8}, "short texts"),
        (YARN | {"truncate": False}, '"truncate"'),
        (YARN | {"partial_rotary_factor": 0.5}, "rotates 16 numbers of a head, not 8"),
    ],
)
def test_what_mlx_lm_does_otherwise_with_rope(
    rope: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Only the network that mlx-lm makes of it is known, and that is told."""
    (tmp_path / "config.json").write_text(json.dumps(of("llama", rope_parameters=rope)))
    report = convert(tmp_path, dry_run=True, drop_attention=1)
    assert any(said in note for note in report.notes)
    assert any('llama with "rope_scaling" only mlx-lm' in note for note in report.notes)
    with pytest.raises(UserError, match='not known of a llama with "rope_scaling"'):
        convert(tmp_path, dry_run=True, fold_norms=True)


def test_what_a_config_does_not_say() -> None:
    """It means what transformers means by it, and what the tensors show."""
    silent = ARCHITECTURES["cohere"].config | {"model_type": "cohere", "logit_scale": None}
    assert read_model_args(silent).logit_scale == 0.0625
    silent = ARCHITECTURES["llama"].config | {"model_type": "llama", "tie_word_embeddings": None}
    assert read_model_args(silent, {"model.embed_tokens.weight": (8, 8)}).tie_word_embeddings
    assert not read_model_args(silent, {"lm_head.weight": (8, 8)}).tie_word_embeddings


def test_more_numbers_to_rotate_than_a_head_has() -> None:
    config = ARCHITECTURES["gptj"].config | {"model_type": "gptj", "rotary_dim": 18}
    with pytest.raises(UserError, match="more than a head has, 16"):
        read_model_args(config)


SILENT = [{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
          {"type": "yarn", "factor": 4.0}]  # fmt: skip


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling", [*SILENT, {"rope_type": "linear", "factor": 2.0}, YARN])
@pytest.mark.parametrize("inner", [{}, {"rope_theta": 5e5}])
@pytest.mark.parametrize("outer", [{}, {"rope_theta": 3e4, "max_position_embeddings": 512}])
def test_rope_is_read_as_transformers_reads_it(
    key: str, scaling: dict[str, Any], inner: dict[str, Any], outer: dict[str, Any]
) -> None:
    config = {**outer, key: {**scaling, **inner}}
    args = read_model_args(of("llama", rope_theta=None, max_position_embeddings=None) | config)
    wanted = LlamaConfig(**json.loads(json.dumps(config))).rope_parameters
    assert args.rope_theta == wanted.pop("rope_theta")
    wanted.pop("type", None)
    assert args.rope == wanted


def test_a_base_that_is_null_inside_is_the_outer_one() -> None:
    config = of(
        "llama", rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": None}
    )
    assert read_model_args(config).rope_theta == 5e5


@pytest.mark.parametrize("denied", ["attention_bias", "mlp_bias", None])
def test_biases_that_the_config_denies_are_told(denied: str | None, tmp_path: Path) -> None:
    make_llama(tmp_path / "s", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    file = tmp_path / "s/config.json"
    config = json.loads(file.read_text())
    if denied is not None:
        file.write_text(json.dumps(config | {denied: False}))
    report = convert(tmp_path / "s", tmp_path / "o", dry_run=True)
    told = [note for note in report.notes if "have biases, which are kept" in note]
    assert len(told) == (denied is not None) and all(f'"{denied}"' in note for note in told)
