"""What can go from the architectures that are known: arithmetic on published shapes."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..architectures.config import read_model_args
from ..architectures.families import FAMILIES, Config
from ..constants import REMOVALS
from ..network.model import ModelArgs
from ..quantization.layout import Layout, compare_sizes
from ..removal import table as first_layer
from ..removal.plan import make_plan
from .analysis import Removal, measure_removal

# Shapes from the models' config.json on the Hugging Face Hub.
MODELS: dict[str, Config] = {
    "Llama-2-7B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "sliding_window": 4096,
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768,
    },
    "Mistral-Nemo-12B": {
        "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 14336,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 131072,
    },
    "Ministral-8B": {
        "model_type": "ministral", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 131072, "sliding_window": 32768,
        "layer_types": [
            "full_attention" if i % 4 == 0 else "sliding_attention" for i in range(36)
        ],
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "Gemma-2B": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
        "head_dim": 256, "vocab_size": 256000,
    },
    "Gemma-7B": {
        "model_type": "gemma", "hidden_size": 3072, "intermediate_size": 24576,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "head_dim": 256, "vocab_size": 256000,
    },
    "Pythia-6.9B": {
        "model_type": "gpt_neox", "hidden_size": 4096, "intermediate_size": 16384,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50432,
        "rotary_pct": 0.25,
    },
    "GPT-J-6B": {
        "model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048,
        "rotary_dim": 64, "vocab_size": 50400,
    },
    "Command R (PaLM's block)": {
        "model_type": "cohere", "hidden_size": 8192, "intermediate_size": 22528,
        "num_hidden_layers": 40, "num_attention_heads": 64, "vocab_size": 256000,
    },
    "Phi-2": {
        "model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 51200,
        "partial_rotary_factor": 0.4,
    },
    "Qwen2-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip
SHARED = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}  # no size depends on them


@dataclass(frozen=True)
class Entry:
    """What can go from one model.

    Attributes:
        name: of the model.
        family: its ``model_type``.
        weights: of all.
        folded: norms whose gains (and biases) fold in mlx-lm's own network: "attention", "ffn",
            "final"; in ours if mlx-lm has none.
        kept: norms that keep theirs there.
        removal: the exact removal that saves most once the skips are gone, None if none saves.
        refused: why other letters cannot go, by the letters.
        table_reads: how many times fewer numbers the first layer reads from a table at batch 1.
        table_growth: what the table adds to the weights, a share of them.
        table_pays: whether ``--precompute-first-layer`` makes it unforced.
        drops_stock: whether the model without some attentions runs in mlx-lm's own code.
    """

    name: str
    family: str
    weights: int
    folded: tuple[str, ...]
    kept: tuple[str, ...]
    removal: Removal | None
    refused: dict[str, str]
    table_reads: float
    table_growth: float
    table_pays: bool
    drops_stock: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_catalogue_args(name: str) -> ModelArgs:
    """The network of a model in the catalogue."""
    return read_model_args({**SHARED, **MODELS[name]})


def list_entries() -> list[Entry]:
    """One for each model in the catalogue."""
    return [_entry(name) for name in MODELS]


def _entry(name: str) -> Entry:
    args = read_catalogue_args(name)
    family = MODELS[name]["model_type"]
    stock = FAMILIES[family].stock
    expressed = stock is not None and stock.expresses(args)
    folded = make_plan(args, remove="none", fold_norms=True, stock=expressed).folded
    norms = ("attention", *(() if args.shared_norm else ("ffn",)), "final")
    removals = [measure_removal(args, mx.bfloat16, letters) for letters in REMOVALS[1:-1]]
    saving = [one for one in removals if one.weights is not None and one.weights > 0]
    table = first_layer.measure_table(args)
    before = Layout(args, mx.bfloat16)
    after = Layout(make_plan(args, remove="none", precompute=True).after, mx.bfloat16)
    return Entry(
        name,
        family,
        before.count(),
        folded,
        tuple(norm for norm in norms if norm not in folded),
        max(saving, key=lambda one: one.weights or 0, default=None),
        {one.letters: one.obstacle for one in removals if one.obstacle is not None},
        table.reads_before() / table.reads_after(),
        table.growth / before.count(),
        first_layer.explain_price(*compare_sizes(before, after)) is None,
        stock is not None and stock.drops(args),
    )


def markdown(found: Iterable[Entry]) -> str:
    """Entries as a table."""
    lines = [
        "| model | `model_type` | weights | norms that fold | first layer as a table: numbers "
        "read, memory | without skips: goes, weights, of these before / after, bytes read for a "
        "token before / after | why no more | attention dropped: runs in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        folded = ", ".join(one.folded)
        kept = f"; not {', '.join(one.kept)}" if one.kept else ""
        table = f"1 / {one.table_reads:,.0f}, {one.table_growth:+.1%}"
        table += "" if one.table_pays else " (only if forced)"
        gone = "nothing saves"
        if one.removal is not None:
            gone = (
                f"{one.removal.letters.upper()}, -{one.removal.share:.1%}, "
                f"{one.removal.speedup:.2f}, {one.removal.reads:.2f}"
            )
        lines.append(
            f"| {one.name} | {one.family} | {one.weights:,} | {folded}{kept} | {table} | {gone} "
            f"| {_why(one)} | {'mlx-lm' if one.drops_stock else '`model.py`'} |"
        )
    return "\n".join(lines)


def _why(one: Entry) -> str:
    """Why Q and P do not both go, in a word."""
    letters = "" if one.removal is None else one.removal.letters
    if letters == "qp":
        return ""
    if "meet at one point" in (why := one.refused["qp"]):
        return "parallel block: Q or P, one of them"
    why = re.sub(r"(, so| and K and V|:).*", "", why)
    return why if "p" in letters else f"{why}; without P the FFN would read wider heads"
