"""mlx-lm's own benchmark, prompt cache and server, with a removed model and a plain one in turn.

    python tools/serving_table.py [--shape docs/shape.json:4] [--rounds 5]

Both models have random float32 weights of the shape and the bundled model's tokenizer. The plain
one is mlx-lm's own; the removed one is what ``convert --skipless --remove qp`` makes of it. Each
command runs in a process of its own, in which this package cannot be imported. The table, in
Markdown, has the medians of the rounds, and of the ratios of each round their lowest and highest.
"""

import argparse
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import mlx.core as mx

import mlx_skipless
from mlx_skipless.constants import BUNDLED
from mlx_skipless.evaluation.synthetic import find_shape, write_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
from serving import WITHOUT_US, serving

PLAIN, REMOVED = "plain", "removed"
TALE = "a king had three sons and the youngest went into the wood to seek the golden bird"
PROMPT, ANSWER, CLIENTS = 256, 24, 4  # tokens, tokens, and requests at once

Figures = dict[str, float]  # by row of the table; seconds, or tokens a second


def make_models(shape: str, folder: Path) -> dict[str, Path]:
    """Write the plain model and the removed one."""
    models = {name: folder / name for name in (PLAIN, REMOVED)}
    write_checkpoint(find_shape(shape), mx.float32, models[PLAIN])
    for file in BUNDLED.glob("*token*"):
        shutil.copy(file, models[PLAIN])
    mlx_skipless.convert(
        models[PLAIN], models[REMOVED], skipless=True, remove="qp", verify=False, dtype="float32"
    )
    return models


def run(folder: Path, command: str, model: Path, *options: str) -> str:
    """Run one of mlx-lm's commands; return what it printed."""
    words = [sys.executable, "-c", WITHOUT_US, "mlx_lm", command, "--model", str(model)]
    words += ["--trust-remote-code", *options]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{command} failed: {done.stderr[-2000:]}")
    return done.stdout


def read_figure(pattern: str, text: str) -> float:
    """Read the last number that a command printed after some words."""
    return float(re.findall(pattern + r"\s*([\d.]+)", text)[-1])


def time_benchmark(folder: Path, batch: int, model: Path, turn: int) -> Figures:
    """Run ``mlx_lm.benchmark``; every turn is alike."""
    sizes = ["-p", str(PROMPT), "-g", str(ANSWER), "-b", str(batch), "-n", "1"]
    text = run(folder, "benchmark", model, *sizes)
    where = f"`mlx_lm.benchmark`, batch {batch}"
    return {
        f"{where}: prompt, tokens/s": read_figure("Averages:.*prompt_tps=", text),
        f"{where}: decoding, tokens/s": read_figure("Averages:.*generation_tps=", text),
        f"{where}: peak memory, GB": read_figure("Averages:.*peak_memory=", text),
    }


def time_prompt_cache(folder: Path, model: Path, turn: int) -> Figures:
    """Write a prompt cache with ``mlx_lm.cache_prompt`` and go on from it."""
    file = folder / "cache.safetensors"
    text = write_words(random.Random(turn), 4 * PROMPT)
    made = run(folder, "cache_prompt", model, "--prompt", text, "--prompt-cache-file", str(file))
    more = ["--prompt-cache-file", str(file), "--prompt", "and then", "--temp", "0"]
    text = run(folder, "generate", model, *more, "--max-tokens", str(ANSWER))
    size = file.stat().st_size / 1e6
    file.unlink()
    return {
        "`mlx_lm.cache_prompt`: tokens/s": read_figure(r"tokens \(", made),
        "`mlx_lm.cache_prompt`: file, MB": size,
        "`mlx_lm.generate` behind it: decoding, tokens/s": read_figure(
            "Generation: .* tokens,", text
        ),
    }


def write_words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choices(TALE.split(), k=count))


class Clients:
    """Several clients of a server at once."""

    def __init__(self, url: str):
        import openai  # takes a second, and nothing else needs it

        self._client = openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)

    def time(self, turn: int) -> Figures:
        """Ask for answers to new prompts all at once, and then to the same with some words more."""
        chance = random.Random(turn)
        prompts = [write_words(chance, PROMPT) for _ in range(CLIENTS)]
        longer = [f"{prompt} {write_words(chance, 8)}" for prompt in prompts]
        where = f"`mlx_lm.server`, {CLIENTS} requests at once"
        return {
            f"{where}: answers, tokens/s": self._ask_all(prompts),
            f"{where}, prompts in its cache: answers, tokens/s": self._ask_all(longer),
        }

    def _ask_all(self, prompts: list[str]) -> float:
        """Ask all at once; return tokens a second."""
        started = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            tokens = sum(pool.map(self._ask, prompts))
        return tokens / (time.perf_counter() - started)

    def _ask(self, prompt: str) -> int:
        answer = self._client.completions.create(
            model="default_model", prompt=prompt, max_tokens=ANSWER, temperature=0
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens


def measure_in_turn(
    ways: Mapping[str, Callable[[int], Figures]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Measure both models one after the other, over and over; return figures by row and model."""
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds):
        for name, measure in ways.items():
            for row, figure in measure(turn).items():
                found.setdefault(row, {}).setdefault(name, []).append(figure)
    return found


def tabulate(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Make the table; a ratio is how many times as fast, or as small, the removed model is."""
    lines = ["| | plain mlx-lm | without Q and P | ratio |", "|---|---:|---:|---:|"]
    for row, by in found.items():
        ratios = [b / a for a, b in zip(by[PLAIN], by[REMOVED], strict=True)]
        if not row.endswith("/s"):
            ratios = [1 / ratio for ratio in ratios]
        medians = [statistics.median(by[name]) for name in (PLAIN, REMOVED)]
        cells = [f"{figure:,.{0 if figure >= 100 else 2}f}" for figure in medians]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        lines.append(f"| {' | '.join([row, *cells, spread])} |")
    return "\n".join(lines)


def measure(models: Mapping[str, Path], folder: Path, rounds: int) -> str:
    """Measure all commands in turn; return the table."""
    found: dict[str, dict[str, list[float]]] = {}
    ways: dict[str, Callable[[int], Figures]]
    for time_command in (
        partial(time_benchmark, folder, 1),
        partial(time_benchmark, folder, CLIENTS),
        partial(time_prompt_cache, folder),
    ):
        ways = {name: partial(time_command, model) for name, model in models.items()}
        found |= measure_in_turn(ways, rounds)
    with ExitStack() as stack:
        for name, model in models.items():
            url, _ = stack.enter_context(serving(model, folder / f"{name}.log"))
            ways[name] = Clients(url).time
            ways[name](-1)  # warms up
        found |= measure_in_turn(ways, rounds)
    return tabulate(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="docs/shape.json:4", help="as bench --synthetic takes")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(measure(make_models(given.shape, Path(place)), Path(place), given.rounds))
