"""Networks of mlx-lm's own without sub-layers: exactly those whose sub-layers give zeros."""

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import pytest
from drops import TOKENS, WAYS, Case, differ, open_case
from grids import only
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from zoo import CONFIGS

from mlx_skipless.network.stock import StockNetwork

KINDS = ("attention", "ffn")
DEFAULT = {
    ("gpt_oss", "tokens"), ("gpt_oss", "batch"), ("gpt_oss", "saved cache"),
    ("qwen3_5", "chunks"), ("qwen3_5", "batch"), ("qwen3_5", "saved"), ("qwen3_5", "4 bits"),
    ("gemma4_text", "chunks"), ("gemma4_text", "saved"),
    ("longcat_flash", "saved"),
    ("falcon_h1", "batch"), ("falcon_h1", "saved"), ("rwkv7", "chunks"), ("rwkv7", "saved"),
    ("qwen3", "kv-bits"), ("qwen3", "trimmed"),
}  # fmt: skip
# tools/drops_table.py tries every way with every architecture.
TRIED = [
    (name, way)
    for i, name in enumerate(CONFIGS)
    for j, way in enumerate(WAYS)
    if way in ("chunks", "saved") or (i + j) % 4 == 0 or (name, way) in DEFAULT
]
CASES = only(DEFAULT, TRIED)


@pytest.fixture(scope="session")
def open_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return lru_cache(lambda name: open_case(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_what_is_dropped_gives_zeros(
    case: tuple[str, str], open_once: Callable[[str], Case]
) -> None:
    name, way = case
    network = open_once(name)
    if (reason := network.find_obstacle(way)) is not None:
        pytest.skip(f"{name} itself cannot: {reason}")
    for kind in KINDS:
        for layer in network.droppable(kind):
            assert network.compare(way, layer, kind) == 0, (kind, layer)
            assert network.change(way, layer, kind) > 0, (kind, layer)


# No chains of layers: layers that run twice, read another's keys, or mix what all before them gave.
WHOLE = {
    "afm7", "deepseek_v41", "gemma3n", "iquestloopcoder", "kimi_k3", "nanbeige", "talkie",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", only({"gemma4_text", "rwkv7", "qwen3_5", "nanbeige", "talkie"}, CONFIGS)
)
def test_it_runs_layer_by_layer_or_as_a_whole(name: str, open_once: Callable[[str], Case]) -> None:
    case = open_once(name)
    network = StockNetwork(lambda: load_model(case.folder, lazy=True)[0])
    assert network.is_chain == (name not in WHOLE)
    tokens = mx.array(TOKENS[None].repeat(2, axis=0))
    whole = case.model(tokens, cache=make_prompt_cache(case.model))
    assert differ(network.logits(network.hidden(tokens)), whole) < 1e-5
    for kind in KINDS:
        for layer in case.droppable(kind)[-1:]:
            with case.lacking(case.model, layer, kind):
                expected = case.model(tokens, cache=make_prompt_cache(case.model))
            reduced = network.drop({kind: [layer]})
            assert differ(reduced.logits(reduced.hidden(tokens)), expected) < 1e-5
            if network.is_chain:
                h = network.embed(tokens)
                for at, block in network.walk():
                    run = network.without(at, block, {kind}) if at == layer else block
                    h = network.run(at, h, tokens, run)
                assert differ(network.logits(h), expected) < 1e-5


# Layers whose sub-layers cannot go: because there are none, or later layers use what they keep.
STAY = {
    "afm7": {"attention": [2]},
    "deepseek_v41": {"attention": [0, 1, 2, 3, 4, 5]},
    "gemma3n": {"attention": [2, 3, 4, 5]},
    "gemma4_text": {"attention": [2, 3]},
    "hunyuan": {"attention": [0, 2]},
    "iquestloopcoder": {"attention": [0, 1, 2, 3], "ffn": [0, 1, 2, 3]},
    "mamba": {"ffn": [0, 1, 2, 3]},
    "mamba2": {"ffn": [0, 1, 2, 3]},
    "nemotron-nas": {"attention": [1], "ffn": [2]},
    "nemotron_h": {"attention": [1, 3, 6, 7], "ffn": [0, 2, 4, 5]},
    "rwkv7": {"attention": [0]},
}
PARTS = {
    "dbrx": {"attention": {"norm_attn_norm.attn"}, "ffn": {"ffn"}},
    "exaone": {"attention": {"attn.attention"}, "ffn": {"mlp"}},
    "falcon_h1": {"attention": {"mamba", "self_attn"}, "ffn": {"feed_forward"}},
    "gemma4": {"attention": {"self_attn"}, "ffn": {"mlp", "experts"}},
    "granitemoehybrid": {
        "attention": {"mamba", "self_attn"}, "ffn": {"shared_mlp", "block_sparse_moe"},
    },
    "longcat_flash": {
        "attention": {"self_attn.0", "self_attn.1"}, "ffn": {"mlp", "mlps.0", "mlps.1"},
    },
    "nemotron_h": {"attention": {"mixer"}, "ffn": {"mixer"}},
    "qwen3_5_moe": {"attention": {"linear_attn", "self_attn"}, "ffn": {"mlp"}},
    "rwkv7": {"attention": {"attn"}, "ffn": {"ffn"}},
}  # fmt: skip


@pytest.mark.parametrize("name", only({"afm7", "dbrx", "hunyuan", "nemotron_h"}, CONFIGS))
def test_what_blocks_call_their_sublayers(name: str, open_once: Callable[[str], Case]) -> None:
    own = open_once(name).sublayers
    stay = {kind: [i for i, one in enumerate(own) if kind in one.obstacles] for kind in KINDS}
    assert {kind: layers for kind, layers in stay.items() if layers} == STAY.get(name, {})
    if name in PARTS:
        parts = {kind: {p for one in own for p in one.parts.get(kind, ())} for kind in KINDS}
        assert parts == PARTS[name]
