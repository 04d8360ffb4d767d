"""Networks of mlx-lm's own without sub-layers: exactly those whose sub-layers give zeros."""

from collections.abc import Callable
from functools import lru_cache

import pytest
from drops import WAYS, Cannot, Case, open_case
from grids import only
from zoo import CONFIGS

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
