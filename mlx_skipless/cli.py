"""The commands: arguments in, printing out. All work is done elsewhere."""

import argparse
import contextlib
import json
import math
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import (
    __version__,
    analysis,
    analysis_view,
    budget,
    card,
    chat,
    conversion,
    curve,
    evaluation,
    generation,
    healing,
    tasks,
    training,
)
from .errors import UserError, first_line
from .loading import load
from .loop import read_log
from .options import read_options
from .plan import REMOVALS
from .recipe import Recipe, from_options
from .report import Report

DEFAULT_MODEL = "mlx_model"
SUMMARY = "Makes language models smaller and faster by removing weights, inside mlx-lm."


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-path", "--model", metavar="SRC", dest="model",
        help="Hub id, Hugging Face folder or .gguf file; with --dry-run a config.json will do "
        "(default: the bundled model)",
    )  # fmt: skip
    parser.add_argument(
        "--mlx-path", default=DEFAULT_MODEL, metavar="OUT",
        help="folder to write; must not exist (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--remove", default="auto", choices=REMOVALS,
        help="matrices to merge into their neighbours; auto: all that pays (default)",
    )  # fmt: skip
    parser.add_argument(
        "--skipless", action="store_true",
        help="first make the skipless network of a pretrained model; it needs training to speak",
    )  # fmt: skip
    parser.add_argument(
        "--fold-norms", action="store_true",
        help="put every norm's gain into the matrices behind it (exact)",
    )  # fmt: skip
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize the result")
    parser.add_argument("--q-bits", type=int, help="bits per weight (default: the mode's own)")
    parser.add_argument("--q-group-size", type=int, help="weights that share a scale")
    parser.add_argument(
        "--q-mode", default="affine", choices=["affine", "mxfp4", "nvfp4", "mxfp8"],
        help="quantization mode (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", metavar="TEXT",
        help="file, or data set of the Hub as OWNER/NAME[:SUBSET[:SPLIT]], to quantize against, "
        "its end for the check (default: sampled from the model)",
    )  # fmt: skip
    parser.add_argument(
        "--target-bytes", type=budget.size, metavar="SIZE",
        help="quantize to the best mixture of bits of this size, for instance 1.6MB or 4GB",
    )  # fmt: skip
    parser.add_argument(
        "--target-kl", type=float, metavar="NATS",
        help="quantize to the smallest mixture of bits that is so close to the source, in nats "
        "per token; tries several",
    )  # fmt: skip
    parser.add_argument(
        "--distill", type=int, default=0, metavar="STEPS",
        help="train the scales and biases of the quantized result towards the source, for instance "
        "200 steps; holds both in memory",
    )  # fmt: skip
    for kind, what in (("attention", "attention"), ("ffn", "FFN"), ("block", "attention and FFN")):
        parser.add_argument(
            f"--drop-{kind}", type=_count_or_auto, metavar="N",
            help=f"so many layers lose their {what}, the least important; auto: as many as "
            "--max-loss allows (approximate; needs skip connections)",
        )  # fmt: skip
    parser.add_argument(
        "--greedy", action="store_true", help="measure again after each drop: better, slower"
    )
    parser.add_argument(
        "--max-loss", type=_share, metavar="SHARE",
        help="by how much auto may raise the loss, nats per token (default: 1%%)",
    )  # fmt: skip
    parser.add_argument(
        "--precompute-first-layer", nargs="?", const="auto", choices=["auto", "force"],
        help="make the first layer's projections a table by token, where that pays or by force "
        "(exact; more memory, fewer bytes read)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"],
        help="type of the weights that are not quantized (default: the source's)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--upload-repo", metavar="REPO", help="Hub repository to upload the result to"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the source's tokenizer run its code"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled text (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan, write nothing")
    parser.add_argument("--no-verify", action="store_true", help="skip the check at the end")
    parser.add_argument("--json", metavar="FILE", help="write the report there")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="DIR_OR_REPO",
        help="model folder or Hub id (default: %(default)s, made from the bundled model if there "
        "is none)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt",
        help="text to answer; - reads it from stdin; none: chat in a terminal, else a tale",
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="per answer (default: 256)")
    parser.add_argument(
        "--temp", type=float, help="temperature (default: 0, greedy; of an unasked tale 0.8)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: off)")
    parser.add_argument("--min-p", type=float, default=0.0, help="min-p sampling (default: off)")
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument("--max-kv-size", type=int, help="tokens that the KV cache keeps at most")
    parser.add_argument("--kv-bits", type=int, help="quantize the KV cache to so many bits")
    parser.add_argument(
        "--prompt-cache-file", metavar="FILE",
        help="go on from a prompt that mlx_lm.cache_prompt stored there",
    )  # fmt: skip
    parser.add_argument("--compare", metavar="OTHER", help="run this model too and print the ratio")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model of another kind run its code"
    )
    parser.add_argument("--json", metavar="FILE", help="write the measurements there")


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def _run_convert(options: dict[str, Any]) -> None:
    json_file = options.pop("json")
    options["verify"] = not options.pop("no_verify")
    out = None if options["dry_run"] else options["mlx_path"]
    with _json_file(json_file, out) as write_json:
        with _progress() as progress:
            report = conversion.convert(**options, progress=progress)
        _print_report(report, Console(highlight=False, markup=False))
        write_json(report.as_dict())


def _print_report(report: Report, console: Console) -> None:
    if report.packing:
        again = "" if report.quantization else ", and not quantized again: -q does that"
        done = "and stays as it is" if report.kept_packed else f"dequantized first{again}"
        console.print(f"the source is quantized ({report.packing}): {done}")
    table = Table("part", "goes", box=None, pad_edge=False)
    measured = any(row.cost for row in report.rows)
    costs = ("KL without", "KL with") if measured else ()
    for title in ("weights", "after", "MB", "after", "condition", *costs):
        table.add_column(title, justify="right")
    for row in report.rows:
        condition = "" if row.condition is None else f"{row.condition:.1e}"
        table.add_row(
            row.name, row.goes, f"{row.weights_before:,}", f"{row.weights_after:,}",
            f"{row.bytes_before / 1e6:.2f}", f"{row.bytes_after / 1e6:.2f}", condition,
            *((f"{row.cost.removed:.1e}", f"{row.cost.rounded:.1e}") if row.cost else ()),
        )  # fmt: skip
    console.print(table)
    lines = [f"note: {note}" for note in report.notes]
    if report.stock:
        done = "norm gains folded, exactly" if report.folded else "matrices as they were"
        lines += [
            f"note: {done}; the result runs in plain mlx-lm",
            "note: for the speed and size of its skipless network (no language model until it is "
            f"trained): --model {report.source} --skipless --remove qp",
        ]
    lines += card.effect(report)
    for line in lines:
        console.print(line, soft_wrap=True)
    for warning in report.warnings:
        console.print(f"WARNING: {warning}", style="bold red", soft_wrap=True)
    where = f"wrote {report.output}" if report.output else "dry run: nothing written"
    memory = generation.size(report.peak_memory_bytes)
    console.print(f"{where}; {report.seconds:.1f} s, peak memory {memory}", soft_wrap=True)


def _run_generate(options: dict[str, Any]) -> None:
    json_file, other = options.pop("json"), options.pop("compare")
    name, prompt = options.pop("model"), options.pop("prompt")
    trust, cache_file = options.pop("trust_remote_code"), options.pop("prompt_cache_file")
    if prompt is None and (other or cache_file):
        raise UserError("--compare and --prompt-cache-file need a --prompt")
    if other is not None and cache_file is not None:
        raise UserError("--compare runs two models and --prompt-cache-file is one's: drop one")
    with _json_file(json_file) as write_json:
        if name == DEFAULT_MODEL and not Path(name).exists():
            _convert_bundled(name)
        model, tokenizer = load(name, trust_remote_code=trust)
        if prompt == "-":
            prompt = sys.stdin.read()
        elif prompt is None and _piped():
            prompt = sys.stdin.read() or None
        talk = prompt is None and sys.stdin.isatty() and not json_file
        tale = prompt is None and not (talk and tokenizer.has_chat_template)
        if options["temp"] is None:
            options["temp"] = generation.TALE_TEMP if tale else 0.0
        if talk:
            chat.chat(model, tokenizer, opening=generation.TALE if tale else None, **options)
            return
        if tale:
            prompt = generation.prompt_tokens(tokenizer, generation.TALE, chat=False)
            print(generation.TALE, end="", flush=True)
        if other is not None:
            second = load(other, trust_remote_code=trust)
            result = generation.compare([(model, tokenizer), second], prompt, **options)
            _print_comparison(result, name, other)
            write_json(result.as_dict())
            return
        if cache_file is not None:
            options["prompt_cache"] = generation.load_cache(cache_file, model)
            prompt = generation.prompt_tokens(tokenizer, prompt, continued=True)
        stream = generation.stream(model, tokenizer, prompt, **options)
        for piece in generation.spaced(stream, tokenizer) if tale else stream:
            print(piece, end="", flush=True)
        print()
        print(generation.summary(stream.answer), file=sys.stderr)
        write_json(stream.answer.as_dict())


def _convert_bundled(out: str) -> None:
    print(f"no {out} here: converting the bundled model first", file=sys.stderr)
    with _progress() as progress:
        report = conversion.convert(None, out, progress=progress)
    for line in card.effect(report):
        print(line, file=sys.stderr)


def _piped() -> bool:
    """Whether standard input is no terminal and holds something, or has ended."""
    if sys.stdin.isatty():
        return False
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _print_comparison(result: Any, name: str, other: str) -> None:
    table = Table("", name, other, "ratio", box=None, pad_edge=False)
    for label, key in (
        ("prompt tokens/s", "prompt_tps"),
        ("generation tokens/s", "generation_tps"),
    ):
        a, b = getattr(result.first, key), getattr(result.second, key)
        ratio = getattr(result, f"{key}_ratio")
        table.add_row(label, f"{a:.1f}", f"{b:.1f}", "" if ratio is None else f"{ratio:.2f}")
    Console(highlight=False, markup=False).print(table)


def _analyze_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="SRC",
        help="Hub id, Hugging Face folder, .gguf file, or a config.json alone",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", metavar="TEXT",
        help="file or data set to measure on, as for convert (default: sampled from the model)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the source's tokenizer run its code"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled text (default: 0)")
    parser.add_argument("--plot", metavar="PNG", help="draw what was measured there")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")


def _run_analyze(options: dict[str, Any]) -> None:
    figure = options.pop("plot")
    if figure is not None and options["model"].endswith(".json"):
        raise UserError("--plot: a config has no weights to measure; give the model")
    with _json_file(options.pop("json")) as write_json, _output_file("--plot", figure) as draw:
        with _progress() as progress:
            found = analysis.analyze(**options, progress=progress)
        console = Console(highlight=False, markup=False)
        for part in analysis_view.tables(found):
            console.print(part, soft_wrap=isinstance(part, str))
        for note in found.notes:
            console.print(f"note: {note}", soft_wrap=True)
        draw(lambda file: analysis_view.plot(found, file))
        write_json(found.as_dict())


def _held_out_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", nargs="+", metavar="FILE",
        help='text: .jsonl with "text", "prompt" and "completion" or "messages", else plain',
    )  # fmt: skip
    parser.add_argument(
        "--validation", nargs="+", default=[], metavar="FILE",
        help="held-out text (default: the end of each file of --data)",
    )  # fmt: skip
    parser.add_argument(
        "--validation-share", type=float, default=0.03,
        help="share of each file's lines that is held out (default: %(default)s)",
    )  # fmt: skip


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _held_out_arguments(parser)
    parser.add_argument(
        "--tokenizer", metavar="DIR_OR_REPO",
        help="use this Hugging Face tokenizer (default: make a byte-level BPE from the text)",
    )  # fmt: skip
    parser.add_argument(
        "--mlx-path", default="trained_model", metavar="OUT",
        help="folder of the run; must not exist (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with the run in OUT, bit for bit; only --steps may change",
    )  # fmt: skip
    parser.add_argument(
        "-c", "--config", metavar="YAML", help="file with the recipe below; flags come first"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="of the arithmetic (default: bfloat16 on a GPU, float32 on a CPU)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the outcome there")
    _field_groups(parser, ("pace (0: never)", training.Pace), ("recipe", Recipe))


def _heal_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR_OR_REPO", help="the reduced model: what convert wrote"
    )
    parser.add_argument("--teacher", metavar="DIR_OR_REPO", help="the model that it was made from")
    _held_out_arguments(parser)
    parser.add_argument(
        "--mlx-path", default="healed_model", metavar="OUT",
        help="folder of the run and of the healed model; must not exist (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with the run in OUT, bit for bit; only --steps may change",
    )  # fmt: skip
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model of another kind run its code"
    )
    parser.add_argument("--json", metavar="FILE", help="write the outcome there")
    _field_groups(parser, ("pace (0: never)", healing.Pace), ("treatment", healing.Treatment))


def _field_groups(parser: argparse.ArgumentParser, *groups: tuple[str, type]) -> None:
    for title, kind in groups:
        group = parser.add_argument_group(title)
        for option in fields(kind):
            _field_argument(group, option)


def _field_argument(group: Any, option: Field[Any]) -> None:
    """A flag for a field of a dataclass; absent from the options where it is not given."""
    kinds = get_args(option.type) or (option.type,)
    default = "" if option.default in (None, "") else f" (default: {option.default})"
    how: dict[str, Any]
    if bool in kinds:
        how = {"action": argparse.BooleanOptionalAction}
    elif choices := option.metadata.get("choices"):
        how = {"choices": [choice for choice in choices if choice]}
    elif type(None) in kinds:
        how = {"type": lambda text: None if text == "none" else float(text), "metavar": "NUMBER"}
    else:
        how = {"type": kinds[0], "metavar": "N"}
    group.add_argument(
        f"--{option.name.replace('_', '-')}", default=argparse.SUPPRESS,
        help=f"{option.metadata['help']}{default}", **how,
    )  # fmt: skip


def _taken(options: dict[str, Any], kind: type) -> dict[str, Any]:
    """Those options that are fields of a dataclass, which go from the others."""
    return {one.name: options.pop(one.name) for one in fields(kind) if one.name in options}


def _run_heal(options: dict[str, Any]) -> None:
    json_file = options.pop("json")
    pace, treatment = _taken(options, healing.Pace), _taken(options, healing.Treatment)
    resume = options["resume"]
    steps = treatment.get("steps") if resume else None
    other = [options[name] for name in ("model", "teacher", "data", "validation")]
    if resume and (pace or set(treatment) - {"steps"} or any(other)):
        raise UserError("--resume goes on with the run's own treatment: only --steps may change")
    if options["validation"] and not options["data"]:
        raise UserError("--validation is for --data: the original's own text is held out in part")
    with _json_file(json_file, None if resume else options["mlx_path"]) as write_json:
        result = healing.heal(
            treatment=read_options(healing.Treatment, "treatment", treatment),
            pace=healing.Pace(**pace),
            steps=steps,
            report=_print_event,
            **options,
        )
        for line in card.healing(result):
            print(line)
        print(
            f"wrote {result.output}: {result.trained_parameters:,} weights trained, "
            f"{result.seconds:,.0f} s, peak memory {generation.size(result.peak_memory_bytes)}"
        )
        write_json(result.as_dict())


def _run_train(options: dict[str, Any]) -> None:
    json_file, config = options.pop("json"), options.pop("config")
    pace, recipe = _taken(options, training.Pace), _taken(options, Recipe)
    steps = recipe.get("steps") if options["resume"] else None
    if options["resume"] and (config or pace or set(recipe) - {"steps"}):
        raise UserError("--resume goes on with the run's own recipe: only --steps may change")
    with _json_file(json_file, None if options["resume"] else options["mlx_path"]) as write_json:
        result = training.train(
            recipe=from_options({**_read_yaml(config), **recipe}),
            pace=training.Pace(**pace),
            steps=steps,
            report=_print_event,
            **options,
        )
        print(
            f"wrote {result.output}: {result.parameters:,} weights, {result.tokens:,} tokens, "
            f"{result.seconds:,.0f} s, peak memory {generation.size(result.peak_memory_bytes)}"
        )
        write_json(result.as_dict())


def _read_yaml(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {name}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {name}: must map the recipe's keys to values")
    return content


def _print_event(event: dict[str, Any]) -> None:
    step = f"step {event['step']:>6,}"
    if "parameters" in event:
        line = (
            f"{event['parameters']:,} weights and {event['train_tokens']:,} tokens to train on, "
            f"{event['validation_tokens']:,} held out; {event['steps']:,} steps"
        )
    elif "sample" in event:
        line = f"{step}  sample: {event['sample']}"
    elif "before" in event or "after" in event:
        when, found = next((k, event[k]) for k in ("before", "after") if k in event)
        line = (
            f"{step}  {when}: KL {found['kl']:.4f}  loss {found['loss']:.4f}  the original's "
            f"{found['teacher_loss']:.4f}"
        )
    elif "perplexity" in event:
        line = (
            f"{step}  held-out KL {event['validation_loss']:.4f}  perplexity "
            f"{event['perplexity']:.2f}"
        )
    elif "validation_loss" in event:
        line = (
            f"{step}  held-out loss {event['validation_loss']:.4f}  "
            f"bits per character {event['bits_per_character']:.4f}"
        )
    else:
        line = (
            f"{step}  loss {event['loss']:.4f}  learning rate {event['learning_rate']:.1e}  "
            f"{event['tokens_per_second']:,.0f} tokens/s  "
            f"memory {generation.size(event['memory_bytes'])}"
        )
    print(line, flush=True)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="DIR_OR_REPO",
        help="model folder or Hub id (default: %(default)s)",
    )  # fmt: skip
    _held_out_arguments(parser)
    parser.add_argument(
        "--context", type=int, metavar="N",
        help="tokens of a window (default: what the model was made for, at most 512)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16, help="windows at once (default: 16)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model of another kind run its code"
    )
    parser.add_argument("--json", metavar="FILE", help="write the score there")


def _run_evaluate(options: dict[str, Any]) -> None:
    if not (options["data"] or options["validation"]):
        raise UserError("no text: give --data, whose end is held out, or --validation")
    with _json_file(options.pop("json")) as write_json:
        score = evaluation.evaluate(**options | {"data": options["data"] or ()})
        print(
            f"{score.loss:.4f} nats per token, {score.bits_per_character:.4f} bits per character "
            f"({score.tokens:,} tokens, {score.characters:,} characters)"
        )
        write_json(score.as_dict())


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="A", help="model folder or Hub id, before")
    parser.add_argument("result", metavar="B", help="model folder or Hub id, after")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK",
        help="lm-eval's names of tasks, or .yaml files; needs mlx-lm[evaluate]",
    )  # fmt: skip
    parser.add_argument("--include-path", metavar="FOLDER", help="folder with more tasks")
    parser.add_argument(
        "--num-shots", type=int, metavar="N",
        help="examples in the prompt (default: the task's own)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="items of a task (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at once (default: 8)")
    parser.add_argument(
        "--apply-chat-template", action=argparse.BooleanOptionalAction,
        help="ask in turns of a chat (default: if A has a chat template)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=tasks.SEED, help="of the examples (default: %(default)s)"
    )
    parser.add_argument(
        "--confirm-run-unsafe-code", action="store_true",
        help="let tasks run the code that a model writes",
    )  # fmt: skip
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model of another kind run its code"
    )
    parser.add_argument("--json", metavar="FILE", help="write the scores there")


def _run_verify(options: dict[str, Any]) -> None:
    with _json_file(options.pop("json")) as write_json:
        scores = tasks.compare_tasks(**options)
        table = Table(box=None, pad_edge=False)
        for title in ("task", "metric"):
            table.add_column(title, overflow="fold")
        for title in ("A", "B", "difference"):
            table.add_column(title, justify="right", no_wrap=True)
        for score in scores:
            table.add_row(
                score.task,
                score.metric,
                _with_error(f"{score.source:.4f}", score.source_stderr),
                _with_error(f"{score.result:.4f}", score.result_stderr),
                _with_error(f"{score.difference:+.4f}", score.difference_stderr),
            )
        Console(highlight=False, markup=False).print(table)
        write_json({"scores": [score.as_dict() for score in scores]})


def _with_error(figure: str, stderr: float | None) -> str:
    return figure if stderr is None else f"{figure} ± {stderr:.4f}"


def _curves_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that train wrote")
    parser.add_argument(
        "--output", default="loss.png", metavar="PNG", help="figure to write (default: %(default)s)"
    )


def _run_curves(options: dict[str, Any]) -> None:
    folders = [Path(run) for run in options["runs"]]
    names = [folder.name for folder in folders]
    curve.plot(
        {
            name if names.count(name) == 1 else str(folder): read_log(folder)
            for name, folder in zip(names, folders, strict=True)
        },
        Path(options["output"]),
    )
    print(f"wrote {options['output']}")


COMMANDS = {
    "convert": (_convert_arguments, _run_convert, "remove weights from a model"),
    "generate": (
        _generate_arguments,
        _run_generate,
        "chat with a model, measure tokens per second",
    ),
    "analyze": (_analyze_arguments, _run_analyze, "measure what a model could do without"),
    "train": (_train_arguments, _run_train, "train a model, skipless unless told otherwise"),
    "heal": (_heal_arguments, _run_heal, "distil a reduced model towards its original"),
    "evaluate": (_evaluate_arguments, _run_evaluate, "score a model on held-out text"),
    "verify": (_verify_arguments, _run_verify, "score two models on lm-eval's tasks"),
    "curves": (_curves_arguments, _run_curves, "draw the losses of training runs in one figure"),
}


@contextlib.contextmanager
def _output_file(flag: str, name: str | None, out: str | None = None) -> Iterator[Any]:
    """A function that has another write a file; an impossible path is refused before the work.

    ``out`` is a folder that the work itself makes.
    """
    if name is None:
        yield lambda write: None
        return
    path = Path(name)
    if out is not None and (made := Path(out).absolute()) in [(p := path.absolute()), *p.parents]:
        raise UserError(f"{flag} {name}: --mlx-path {made} is made there, give another file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        partial.touch()
        partial.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{flag} {name}: cannot be written ({reason}), give a file") from error

    def put(write: Callable[[Path], Any]) -> None:
        try:
            write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    yield put


@contextlib.contextmanager
def _json_file(name: str | None, out: str | None = None) -> Iterator[Any]:
    """A function that writes the JSON file; see ``_output_file``."""
    with _output_file("--json", name, out) as put:
        yield lambda content: put(
            lambda file: file.write_text(
                json.dumps(_plain(content), indent=2) + "\n", encoding="utf-8"
            )
        )


def _plain(content: Any) -> Any:
    """What JSON can hold: null for an infinity or what is no number."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextlib.contextmanager
def _progress() -> Iterator[conversion.Progress]:
    """A bar a stage on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def main(argv: Sequence[str] | None = None) -> int:
    """``mlx-skipless COMMAND``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mlx-skipless", description=SUMMARY)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (arguments, _, help_text) in COMMANDS.items():
        arguments(commands.add_parser(name, help=help_text, description=help_text))
    options = vars(parser.parse_args(argv))
    return _run(COMMANDS[options.pop("command")][1], options)


def command(name: str) -> int:
    """``python NAME.py``: one command with its own help; returns the exit code."""
    arguments, run, help_text = COMMANDS[name]
    parser = argparse.ArgumentParser(description=help_text)
    arguments(parser)
    return _run(run, vars(parser.parse_args()))


def _run(run: Any, options: dict[str, Any]) -> int:
    def terminate(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt  # unwinds, so that nothing is left behind

    signal.signal(signal.SIGTERM, terminate)
    if sys.stdin is None:  # closed: else the next file is descriptor 0, which MLX takes for none
        sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError, RuntimeError) as error:  # MLX is out of memory as a RuntimeError
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
