"""generate: chat with a model, measure tokens per second."""

import argparse
import select
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from .parser import read_text
from .shared import DEFAULT_MODEL, Output, add_output_arguments, open_output
from .streams import read_input
from .tables import Grid

EXAMPLES = (
    ("", "chat with mlx_model; where it has no turns, go on telling"),
    ('--model OUT --prompt "Once upon a time" --temp 0.8', "one answer, and tokens per second"),
    (
        '--model OUT --prompt "Once upon a time" --compare SRC',
        "two models in turn, and their ratio",
    ),
    ("--model OUT --prompt - --quiet < question.txt", "a pipe: the answer and nothing else"),
    ('--model OUT --prompt "Hello" --draft-model SMALL', "let a smaller model propose tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="DIR_OR_REPO",
        help="model folder or Hub id (default: %(default)s, made from the bundled model if there "
        "is none)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt",
        type=read_text,
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
    parser.add_argument(
        "--draft-model", metavar="SMALL",
        help="a faster model of the same tokens, which proposes what --model then checks",
    )  # fmt: skip
    parser.add_argument(
        "--num-draft-tokens", type=int, default=3,
        help="tokens that it proposes at a time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--compare", metavar="OTHER", help="run this model too and print the ratio")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model of another kind run its code"
    )
    add_output_arguments(parser, "text and measurements")


def run(options: dict[str, Any]) -> None:
    from ..inference import chat, comparison, generation
    from ..inference.caches import load_cache
    from ..inference.loading import load
    from ..inference.prompts import encode_prompt

    json_name, other = options["json"], options.pop("compare")
    name, prompt = options.pop("model"), options.pop("prompt")
    trust, cache_file = options.pop("trust_remote_code"), options.pop("prompt_cache_file")
    draft, drafts = options.pop("draft_model"), options.pop("num_draft_tokens")
    if prompt is None and (other or cache_file or draft):
        raise UserError("--compare, --prompt-cache-file and --draft-model need a --prompt")
    if other is not None and cache_file is not None:
        raise UserError("--compare runs two models and --prompt-cache-file is one's: drop one")
    if draft is not None and (other or cache_file):
        raise UserError("--draft-model goes with neither --compare nor --prompt-cache-file")
    with open_output(options) as shown:
        if name == DEFAULT_MODEL and not Path(name).exists():
            _convert_bundled(name, shown)
        model, tokenizer = load(name, trust_remote_code=trust)
        if prompt == "-":
            prompt = read_input()
        elif prompt is None and _piped():
            prompt = read_input() or None
        talk = prompt is None and sys.stdin.isatty() and not json_name
        tale = prompt is None and not (talk and tokenizer.has_chat_template)
        if options["temp"] is None:
            options["temp"] = generation.TALE_TEMP if tale else 0.0
        if talk:
            chat.chat(model, tokenizer, opening=generation.TALE if tale else None, **options)
            return
        if tale:
            prompt = encode_prompt(tokenizer, generation.TALE, chat=False)
            _speak(generation.TALE, shown)
        if other is not None:
            second = load(other, trust_remote_code=trust)
            result = comparison.compare([(model, tokenizer), second], prompt, **options)
            _tabulate(result, name, other).show(shown.console)
            shown.write_json(result.as_dict())
            return
        if draft is not None:
            options["draft_model"] = generation.load_draft(
                draft, tokenizer, trust_remote_code=trust
            )
            options["num_draft_tokens"] = drafts
        if cache_file is not None:
            options["prompt_cache"] = load_cache(cache_file, model)
            prompt = encode_prompt(tokenizer, prompt, continued=True)
        stream = generation.stream(model, tokenizer, prompt, **options)
        for piece in generation.restore_first_space(stream, tokenizer) if tale else stream:
            _speak(piece, shown)
        _speak("\n", shown)
        _aside(generation.summarize(stream.answer), shown)
        shown.write_json(stream.answer.as_dict())


def _speak(text: str, shown: Output) -> None:
    """The answer is the result, which no --quiet hides."""
    if not shown.to_stdout:
        print(text, end="", flush=True)


def _aside(line: str, shown: Output) -> None:
    if not shown.quiet:
        print(line, file=sys.stderr)


def _convert_bundled(out: str, shown: Output) -> None:
    from ..conversion import card, convert

    _aside(f"no {out} here: converting the bundled model first", shown)
    with shown.progress() as progress:
        report = convert.convert(None, out, progress=progress)
    for line in card.describe_effect(report):
        _aside(line, shown)


def _piped() -> bool:
    """Whether standard input is no terminal and holds something, or has ended."""
    if sys.stdin.isatty():
        return False
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _tabulate(result: Any, name: str, other: str) -> Grid:
    rows = []
    for label, key in (
        ("prompt tokens/s", "prompt_tps"),
        ("generation tokens/s", "generation_tps"),
    ):
        a, b = getattr(result.first, key), getattr(result.second, key)
        ratio = getattr(result, f"{key}_ratio")
        rows.append((label, f"{a:.1f}", f"{b:.1f}", "" if ratio is None else f"{ratio:.2f}"))
    return Grid(("", name, other, "ratio"), rows)
