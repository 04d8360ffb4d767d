"""Networks of mlx-lm's own without sub-layers: exactly those whose sub-layers give zeros."""

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx
import pytest
from drops import TOKENS, WAYS, Cannot, Case, differ, open_case
from grids import only
from mlx_lm.utils import load_model
from zoo import CONFIGS

from mlx_skipless.network.stock import StockNetwork

KINDS = ("attention", "ffn")
DEFAULT = {
    ("gpt_oss", "tokens"), ("gpt_oss", "batch"), ("gpt_oss", "saved cache"),
    ("qwen3_5", "chunks"), ("qwen3_5", "batch"), ("qwen3_5", "saved"), ("qwen3_5", "4 bits"),
    ("gemma4_text", "chunks"), ("gemma4_text", "saved"),
    ("longcat_flash", "tokens"), ("longcat_flash", "saved"),
    ("falcon_h1", "batch"), ("rwkv7", "chunks"), ("rwkv7", "saved"),
    ("qwen3", "kv-bits"), ("qwen3", "trimmed"),
}  # fmt: skip
CASES = only(DEFAULT, [(name, way) for name in CONFIGS for way in WAYS])


@pytest.fixture(scope="session")
def open_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return lru_cache(lambda name: open_case(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_what_is_dropped_gives_zeros(
    case: tuple[str, str], open_once: Callable[[str], Case]
) -> None:
    name, way = case
    network = open_once(name)
    try:
        network.run(way)
    except Cannot as error:
        pytest.skip(f"{name} itself cannot: {error}")
    for kind in KINDS:
        for layer in network.droppable(kind):
            assert network.compare(way, layer, kind) == 0, (kind, layer)
            assert network.change(way, layer, kind) > 0, (kind, layer)


ALONE = ("gemma4_text", "hunyuan", "rwkv7", "qwen3_5")


@pytest.mark.parametrize("name", only(ALONE, CONFIGS))
def test_layers_run_one_by_one(name: str, open_once: Callable[[str], Case]) -> None:
    case = open_once(name)
    network = StockNetwork(lambda: load_model(case.folder, lazy=True)[0])
    if all(set(KINDS) <= own.obstacles.keys() for own in network.sublayers):
        pytest.skip("nothing of it can go, so its layers need not run alone")
    tokens = mx.array(TOKENS[None].repeat(2, axis=0))
    whole = case.model(tokens)
    assert differ(network.logits(network.hidden(tokens)), whole) < 1e-5
    for layer, kind in {(None, ""), *(((case.droppable(k) or [None])[-1], k) for k in KINDS)}:
        h = network.embed(tokens)
        for at, block in network.walk():
            if at == layer:
                block = network.without(at, block, {kind})
            h = network.run(at, h, tokens, block)
        expected = whole
        if layer is not None:
            with case.lacking(case.model, layer, kind):
                expected = case.model(tokens)
        assert differ(network.logits(h), expected) < 1e-5, (layer, kind)
