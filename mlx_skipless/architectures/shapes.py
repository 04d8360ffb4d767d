"""The shapes of published models, from their config.json on the Hugging Face Hub."""

from typing import Any

from .families import FAMILIES
from .family import Config

_COLUMNS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip
_MINISTRAL_LAYERS = ["full_attention", *3 * ["sliding_attention"]] * 9
# The columns, None where a config is silent, and other keys.
_ROWS: dict[str, tuple[Any, ...]] = {
    "Llama-2-7B": ("llama", 4096, 11008, 32, 32, None, 32000, {}),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128256, {}),
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 49152, {"tie_word_embeddings": True}),
    "Mistral-7B-v0.1": ("mistral", 4096, 14336, 32, 32, 8, 32000, {"sliding_window": 4096}),
    "Mistral-7B-v0.3": ("mistral", 4096, 14336, 32, 32, 8, 32768, {}),
    "Mistral-Nemo-12B": ("mistral", 5120, 14336, 40, 32, 8, 131072, {"head_dim": 128}),
    "Ministral-8B": (
        *("ministral", 4096, 12288, 36, 32, 8, 131072),
        {"head_dim": 128, "sliding_window": 32768, "layer_types": _MINISTRAL_LAYERS},
    ),
    "Mistral-Small-3.2-24B": ("mistral", 5120, 32768, 40, 32, 8, 131072, {"head_dim": 128}),
    "Ministral-3-3B": (
        *("ministral3", 3072, 9216, 26, 32, 8, 131072),
        {"tie_word_embeddings": True},
    ),
    "Ministral-3-8B": ("ministral3", 4096, 14336, 34, 32, 8, 131072, {}),
    "Ministral-3-14B": ("ministral3", 5120, 16384, 40, 32, 8, 131072, {}),
    "Devstral-Small-2-24B": ("ministral3", 5120, 32768, 40, 32, 8, 131072, {}),
    "Mixtral-8x7B": (
        *("mixtral", 4096, 14336, 32, 32, 8, 32000),
        {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "Gemma-2B": ("gemma", 2048, 16384, 18, 8, 1, 256000, {"head_dim": 256}),
    "Gemma-7B": ("gemma", 3072, 24576, 28, 16, 16, 256000, {"head_dim": 256}),
    "Pythia-6.9B": ("gpt_neox", 4096, 16384, 32, 32, None, 50432, {"rotary_pct": 0.25}),
    "GPT-J-6B": (
        *("gptj", 4096, None, 28, 16, None, 50400),
        {"n_positions": 2048, "rotary_dim": 64},
    ),
    "Command R (PaLM's block)": ("cohere", 8192, 22528, 40, 64, None, 256000, {}),
    "Phi-2": ("phi", 2560, 10240, 32, 32, None, 51200, {"partial_rotary_factor": 0.4}),
    "Qwen2-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, {}),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 151936, {"head_dim": 128}),
    "Qwen3-0.6B": (
        *("qwen3", 1024, 3072, 28, 16, 8, 151936),
        {"head_dim": 128, "tie_word_embeddings": True},
    ),
}


def _make_config(row: tuple[Any, ...]) -> Config:
    """Make a config in its architecture's own keys."""
    theirs = FAMILIES[row[0]].keys
    sizes = zip(_COLUMNS, row[:-1], strict=True)
    config: Config = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}  # no size needs them
    config |= {theirs.get(key, key): value for key, value in sizes if value is not None}
    return config | row[-1]


MODELS: dict[str, Config] = {name: _make_config(row) for name, row in _ROWS.items()}
