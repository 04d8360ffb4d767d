"""Trains a table of networks, each at several learning rates, and draws loss against depth.

    python tools/ladder.py recipes/depth.yaml --data tales/*.txt --output runs --jobs 2

The table is a YAML file with ``base`` (keys of a recipe), ``depths`` (what a number of layers
changes), ``networks`` (what each network changes), ``rates`` (the likeliest first), ``seeds`` and
``pace``. A network may have its own depths, rates and seeds. A value that is a mapping is one by
depth. ``weights: NAME`` gives the network's FFN the width at which it has another's weights. Seeds
after the first run at the best rate only.

The text is made into tokens once. A run that is finished is not run again, and one that
``--seconds`` stopped goes on where it stood.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import yaml
from mlx.utils import tree_flatten

from mlx_skipless.checkpoints.tokenizer import fetch_tokenizer
from mlx_skipless.cli.figures import add_figure_arguments, check_suffix
from mlx_skipless.errors import UserError
from mlx_skipless.evaluation.plots import Look, plot_curves
from mlx_skipless.network.model import Model
from mlx_skipless.options import flag_name, read_options
from mlx_skipless.training.folder import RunFolder
from mlx_skipless.training.initialization import make_model_args
from mlx_skipless.training.pretraining import Run, Settings, TrainingText, make_tokens
from mlx_skipless.training.recipe import Recipe, TrainingPace
from mlx_skipless.training.tokens import Tokens, list_paths

OWN = ("depths", "rates", "seeds", "weights")  # keys of a network that are none of a recipe
QUIET = {"eval_every": 0, "save_every": 0, "sample_every": 0}
ATTEMPTS = 2  # of a run whose process dies
# What all runs of a process share.
SETTINGS: Settings
TOKENS: Tokens


class Job(NamedTuple):
    """A run; ``file`` is its result's, and its folder has the same name without the suffix."""

    network: str
    recipe: Recipe
    file: Path

    @property
    def row(self) -> tuple[str, int]:
        return self.network, self.recipe.layers

    @property
    def result(self) -> dict[str, Any]:
        return json.loads(self.file.read_text()) if self.file.is_file() else {}

    @property
    def loss(self) -> float:
        return self.result.get("validation_loss") or math.inf


def list_jobs(table: dict[str, Any], output: Path) -> list[Job]:
    """List a table's runs: all at their likeliest rate first, and the deepest first of these."""
    jobs = []
    for name, own in table["networks"].items():
        for depth in own.get("depths", table["depths"]):
            recipe = make_recipe(table, name, depth)
            rates = at_depth(own.get("rates", table["rates"]), depth)
            for seed in own.get("seeds", table.get("seeds", [0])):
                for i, rate in enumerate(rates):
                    one = dataclasses.replace(recipe, seed=seed, learning_rate=rate)
                    run = f"{name}-{depth}-{rate}-{seed}.json".replace(" ", "_")
                    jobs.append(((seed, i, -depth), Job(name, one, output / run)))
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def make_recipe(table: dict[str, Any], name: str, depth: int) -> Recipe:
    """Make the recipe of a network at a depth."""
    own = {key: at_depth(value, depth) for key, value in table["networks"][name].items()}
    keys = {**table["base"], **table["depths"][depth], "layers": depth}
    keys |= {key: value for key, value in own.items() if key not in OWN}
    recipe = read_options(Recipe, "recipe", keys)
    if "weights" in own:
        missing = count_weights(make_recipe(table, own["weights"], depth)) - count_weights(recipe)
        wider = dataclasses.replace(recipe, intermediate_size=recipe.intermediate_size + 4)
        steps = round(missing / (count_weights(wider) - count_weights(recipe)))
        width = recipe.intermediate_size + 4 * steps
        recipe = dataclasses.replace(recipe, intermediate_size=width)
    return recipe


def at_depth(value: Any, depth: int) -> Any:
    return value[depth] if isinstance(value, dict) else value


def count_weights(recipe: Recipe) -> int:
    weights: Any = tree_flatten(Model(make_model_args(recipe)).parameters())
    return sum(array.size for _, array in weights)


def write_tokens(settings: Settings, output: Path) -> None:
    """Make the text into tokens."""
    _, tokens = make_tokens(settings, None)
    tokens.tokenizer.save_pretrained(str(output / "tokenizer"))
    np.savez(output / "tokens.npz", train=tokens.train, held_out=tokens.held_out)


def read_tokens(output: Path) -> Tokens:
    with np.load(output / "tokens.npz") as rows:
        train, held_out = (rows[name].astype(np.int32) for name in ("train", "held_out"))
    return Tokens(fetch_tokenizer(str(output / "tokenizer")), train, held_out)


def carry_out_all(jobs: list[Job], settings: Settings, count: int, deadline: float) -> None:
    """Do all runs, so many at a time, until the deadline; one whose process dies is tried again."""
    tries: Counter[Path] = Counter()
    context, start = multiprocessing.get_context("spawn"), (settings, jobs[0].file.parent)
    while any(is_open(job, jobs, tries) for job in jobs) and time.time() < deadline:
        with ProcessPoolExecutor(count, context, start_worker, start) as pool:
            running: dict[Future[None], Job] = {}
            while time.time() < deadline:
                taken = {job.file for job in running.values()}
                waiting = [j for j in jobs if j.file not in taken and is_open(j, jobs, tries)]
                for job in waiting[: count - len(running)]:
                    tries[job.file] += 1
                    running[pool.submit(carry_out, job, deadline)] = job
                if not running or not collect(running):
                    break


def start_worker(settings: Settings, output: Path) -> None:
    """Read the tokens, and make a folder for compiled kernels: two processes may share none."""
    global SETTINGS, TOKENS
    os.environ["TMPDIR"] = own = tempfile.mkdtemp()
    multiprocessing.util.Finalize(None, shutil.rmtree, (own, True), exitpriority=0)
    if compiled := os.environ.get("MLX_PTX_CACHE_DIR"):
        os.environ["MLX_PTX_CACHE_DIR"] = shutil.copytree(compiled, f"{own}/ptx")
    TOKENS = read_tokens(output)
    SETTINGS = dataclasses.replace(settings, fingerprint=TOKENS.fingerprint())


def carry_out(job: Job, deadline: float) -> None:
    """Do a run, or go on with it, and write its result unless the deadline stops it."""
    folder = RunFolder(job.file.with_suffix(""))
    resume = folder.state.is_file()
    try:
        if not resume:
            shutil.rmtree(folder.path, ignore_errors=True)
        with folder.hold(resume):
            run = Run(folder, dataclasses.replace(SETTINGS, recipe=job.recipe), TOKENS)
            run.load() if resume else run.begin()

            def check_time(done: int, steps: int) -> None:
                if time.time() > deadline:
                    run.signals.came.append(signal.SIGTERM)  # which ends it after this step

            run.progress = check_time
            found = run.go(lambda event: None).as_dict()
    except UserError as error:
        if time.time() > deadline:
            return
        found = {"error": str(error)}
    found |= {"network": job.network, "recipe": dataclasses.asdict(job.recipe)}
    job.file.write_text(json.dumps(found, indent=1))
    mx.clear_cache()


def collect(running: dict[Future[None], Job]) -> bool:
    """Wait for a run and say how it ended; False: its process died, and the pool with it."""
    alive = True
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        job, error = running.pop(future), future.exception()
        print(job.file.stem, job.loss, job.result.get("error", error or ""), flush=True)
        alive &= not isinstance(error, BrokenProcessPool)
    return alive


def is_open(job: Job, jobs: list[Job], tries: Counter[Path]) -> bool:
    """Whether a run is to be done, now: a later seed waits for the first one's rates."""
    if job.file.is_file() or tries[job.file] >= ATTEMPTS:
        return False
    row = [one for one in jobs if one.row == job.row]
    first = [one for one in row if one.recipe.seed == row[0].recipe.seed]
    settled = all(one.file.is_file() or tries[one.file] >= ATTEMPTS for one in first)
    best = min(first, key=lambda one: one.loss).recipe.learning_rate
    return job in first or (settled and job.recipe.learning_rate == best)


def describe(table: dict[str, Any], jobs: list[Job]) -> str:
    """Make two Markdown tables: the best loss at each depth, and all rates and seeds."""
    depths = sorted(table["depths"])
    best = find_best(jobs)
    lines = [f"| network | flags |{''.join(f' {depth} layers |' for depth in depths)}"]
    lines.append("|---|---|" + "---|" * len(depths))
    for name, own in table["networks"].items():
        losses = [f"{best[name, d].loss:.3f}" if (name, d) in best else "" for d in depths]
        lines.append(f"| {' | '.join([name, f'`{write_flags(own)}`', *losses])} |")
    lines += ["", "| network | layers | weights | best rate | all rates (and seeds) |"]
    lines.append("|---|---|---|---|---|")
    for (name, depth), job in sorted(best.items()):
        tried = [
            f"{one.recipe.learning_rate:g} ({one.recipe.seed}): {one.loss:.3f}"
            for one in jobs
            if one.row == job.row and one.result
        ]
        rate, weights = f"{job.recipe.learning_rate:g}", f"{count_weights(job.recipe):,}"
        lines.append(f"| {' | '.join([name, str(depth), weights, rate, ', '.join(tried)])} |")
    return "\n".join(lines)


def find_best(jobs: list[Job]) -> dict[tuple[str, int], Job]:
    """Find the best run of each row, of the first seed, if one has ended."""
    best: dict[tuple[str, int], Job] = {}
    for job in jobs:  # those of the first seed come first
        rival = best.setdefault(job.row, job)
        if job.recipe.seed == rival.recipe.seed and job.loss < rival.loss:
            best[job.row] = job
    return {row: job for row, job in best.items() if job.result}


def write_flags(own: dict[str, Any]) -> str:
    """Write a network's keys as flags of ``train``."""
    words = []
    for key, value in own.items():
        if isinstance(value, bool):
            words.append(flag_name(key if value else f"no_{key}"))
        elif key not in OWN:
            words.append(f"{flag_name(key)} {'none' if value is None else value}")
    return " ".join(words)


def draw(jobs: list[Job], file: Path, look: Look) -> None:
    """Draw the best loss of each network that ran at several depths against its depth."""
    curves: dict[str, dict[float, float]] = {}
    for (name, depth), job in sorted(find_best(jobs).items()):
        curves.setdefault(name, {})[depth] = job.loss
    plot_curves(
        {name: curve for name, curve in curves.items() if len(curve) > 1}, file, look,
        xlabel="layers", ylabel="loss, nats per token of held-out text",
        xticks=sorted({job.recipe.layers for job in jobs}),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path, help="YAML file, as described above")
    parser.add_argument("--data", nargs="*", default=[], help="text files")
    parser.add_argument("--validation", nargs="*", default=[], help="held-out files")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: made from the text)")
    parser.add_argument("--output", type=Path, default=Path("ladder"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many")
    add_figure_arguments(parser, "--figure", "draw loss against depth")
    options = parser.parse_args()
    figure = options.figure or options.output / "depth.png"
    look = Look(check_suffix("--figure", str(figure)), options.figure_size, options.figure_style)
    deadline, output = time.time() + options.seconds, options.output
    table = yaml.safe_load(options.table.read_text(encoding="utf-8"))
    data, validation = list_paths(options.data), list_paths(options.validation)
    text = TrainingText(data, validation, 0.03, options.tokenizer)
    output.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        read_options(Recipe, "recipe", table["base"]), TrainingPace(), text, options.dtype
    )
    if not (output / "tokens.npz").is_file():
        write_tokens(settings, output)
    table["base"]["vocab_size"] = len(fetch_tokenizer(str(output / "tokenizer")))
    pace = TrainingPace(**{**QUIET, **table.get("pace", {})})
    jobs = list_jobs(table, output)
    settings = dataclasses.replace(settings, pace=pace)
    carry_out_all(jobs, settings, options.jobs, deadline)
    results = [job.result for job in jobs if job.result]
    (output / "results.json").write_text(json.dumps(results, indent=1))
    print(describe(table, jobs))
    draw(jobs, Path(figure), look)


if __name__ == "__main__":
    main()
