"""The tool that measures mlx-lm's commands on a plain and a removed model: its turns, its table."""

import random

import pytest
import serving_table
from serving_table import PLAIN, REMOVED, measure_in_turn, read_figure, tabulate


def test_the_models_take_turns() -> None:
    order: list[str] = []

    def measure(name: str, turn: int) -> dict[str, float]:
        order.append(f"{name}{turn}")
        return {"speed, tokens/s": float(len(order)), "size, MB": 1.0}

    ways = {name: (lambda turn, name=name: measure(name, turn)) for name in "ab"}
    assert measure_in_turn(ways, 2) == {
        "speed, tokens/s": {"a": [1, 3], "b": [2, 4]},
        "size, MB": {"a": [1, 1], "b": [1, 1]},
    }
    assert order == ["a0", "b0", "a1", "b1"]


def test_ratios_are_of_a_round_and_above_one_where_something_is_gained() -> None:
    found = {
        "speed, tokens/s": {PLAIN: [100.0, 200.0, 400.0], REMOVED: [150.0, 220.0, 480.0]},
        "size, MB": {PLAIN: [3.0, 3.0, 3.0], REMOVED: [2.0, 2.0, 1.5]},
    }
    *_, speed, size = tabulate(found).splitlines()
    assert speed == "| speed, tokens/s | 200 | 220 | 1.20 (1.10..1.50) |"
    assert size == "| size, MB | 3.00 | 2.00 | 1.50 (1.50..2.00) |"


BENCHMARK = """Trial 1:  prompt_tps=1.0, generation_tps=9.0
Averages: prompt_tps=10.500, generation_tps=7.250, peak_memory=0.5
"""
CACHE = "\rProcessed    512 tokens (99.00 tok/s)\rProcessed   1024 tokens ( 88.5 tok/s)\n"
GENERATE = "Prompt: 3 tokens, 1.000 tokens-per-sec\nGeneration: 24 tokens, 21.125 tokens-per-sec\n"


@pytest.mark.parametrize(
    ("pattern", "text", "figure"),
    [
        ("Averages:.*generation_tps=", BENCHMARK, 7.25),
        (r"tokens \(", CACHE, 88.5),
        ("Generation: .* tokens,", GENERATE, 21.125),
    ],
)
def test_figures_are_read_from_what_mlx_lm_prints(pattern: str, text: str, figure: float) -> None:
    assert read_figure(pattern, text) == figure


def test_prompts_are_new_in_each_turn() -> None:
    words = [serving_table.write_words(random.Random(turn), 50) for turn in (0, 1, 0)]
    assert words[0] == words[2] != words[1] and len(words[0].split()) == 50
