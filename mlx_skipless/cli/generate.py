"""generate: chat with a model, measure tokens per second."""

import argparse
import select
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..constants import DRAFTS
from ..errors import BadArgument
from ..options import flag_name
from ..terminal import make_visible
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
SAMPLING = ("max_tokens", "temp", "top_p", "min_p", "top_k", "repetition_penalty", "seed")


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
    parser.add_argument(
        "--system-prompt", type=read_text, metavar="TEXT",
        help="what the system says first, of a model that takes turns",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=256, help="per answer (default: 256)")
    sampling = parser.add_argument_group(
        "sampling",
        "A chat takes what generation_config.json recommends where no flag is given.",
    )
    sampling.add_argument(
        "--temp", type=float, help="temperature (default: 0, greedy; of an unasked tale 0.8)"
    )
    sampling.add_argument("--top-p", type=float, help="nucleus sampling (default: off)")
    sampling.add_argument("--min-p", type=float, help="min-p sampling (default: off)")
    sampling.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the likeliest K (default: all)"
    )
    sampling.add_argument(
        "--repetition-penalty", type=float, metavar="FACTOR",
        help="make the last 20 tokens less likely (default: off)",
    )  # fmt: skip
    sampling.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument("--max-kv-size", type=int, help="tokens that the KV cache keeps at most")
    parser.add_argument("--kv-bits", type=int, help="quantize the KV cache to so many bits")
    parser.add_argument(
        "--adapter-path", metavar="DIR", help="LoRA adapters of --model, as mlx_lm.lora wrote them"
    )
    parser.add_argument(
        "--prompt-cache-file", metavar="FILE",
        help="go on from a prompt that mlx_lm.cache_prompt stored there",
    )  # fmt: skip
    parser.add_argument(
        "--draft-model", metavar="SMALL",
        help="a faster model of the same tokens, which proposes what --model then checks",
    )  # fmt: skip
    parser.add_argument(
        "--num-draft-tokens", type=int,
        help=f"tokens that it proposes at a time (default: {DRAFTS})",
    )  # fmt: skip
    parser.add_argument("--compare", metavar="OTHER", help="run this model too and print the ratio")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let a model of another kind run its code"
    )
    add_output_arguments(parser, "text and measurements")


def run(options: dict[str, Any]) -> None:
    _check_flags(options)
    from ..inference import chat, comparison, generation
    from ..inference.caches import load_cache
    from ..inference.context import describe_overflow
    from ..inference.loading import load
    from ..inference.prompts import encode_prompt, has_turns

    json_name, other = options["json"], options.pop("compare")
    name, prompt, system = (options.pop(key) for key in ("model", "prompt", "system_prompt"))
    trust, cache_file = options.pop("trust_remote_code"), options.pop("prompt_cache_file")
    draft, drafts = options.pop("draft_model"), options.pop("num_draft_tokens")
    adapters = options.pop("adapter_path")
    with open_output(options) as shown:
        if name == DEFAULT_MODEL and not Path(name).exists():
            _convert_bundled(name, shown)
        model, tokenizer = load(name, adapter_path=adapters, trust_remote_code=trust)
        if prompt == "-":
            prompt = read_input()
        elif prompt is None and not sys.stdin.isatty():
            prompt = _read_waiting(shown)
        talk = prompt is None and sys.stdin.isatty() and not json_name
        tale = prompt is None and not (talk and has_turns(tokenizer))
        options, remarks = _choose_sampling(options, name if talk else None, tale)
        if talk:
            generation.warm_up(model, tokenizer, **options)
            opening = generation.TALE if tale else None
            chat.chat(
                model, tokenizer, opening=opening, remarks=remarks, system_prompt=system, **options
            )
            return
        if tale:
            if system is not None:
                raise BadArgument("--system-prompt needs a --prompt here, or a terminal to chat in")
            prompt = encode_prompt(tokenizer, generation.TALE, chat=False)
            _speak(generation.TALE, shown)
        if other is not None:
            second = load(other, trust_remote_code=trust)
            result = comparison.compare([(model, tokenizer), second], prompt, **options)
            bound = options.get("max_kv_size")
            for which, (network, own) in ((name, (model, tokenizer)), (other, second)):
                asked = len(encode_prompt(own, prompt))
                if (told := describe_overflow(network, asked, max_kv_size=bound)) is not None:
                    shown.warn(f"{which}: {told}")
            _tabulate(result, name, other).show(shown.console)
            shown.write_json(result.as_dict())
            return
        if draft is not None:
            options["draft_model"] = generation.load_draft(
                draft, tokenizer, trust_remote_code=trust
            )
            options |= {} if drafts is None else {"num_draft_tokens": drafts}
        if cache_file is not None:
            options["prompt_cache"] = load_cache(cache_file, model, name, shown.warn)
        if not tale:
            prompt = encode_prompt(
                tokenizer, prompt, continued=cache_file is not None, system=system
            )
        answer = _answer(model, tokenizer, prompt, options, shown, same_line=tale)
        shown.write_json(answer.as_dict())


def _answer(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    options: dict[str, Any],
    shown: Output,
    *,
    same_line: bool,
) -> Any:
    """Show an answer as it comes, and what it took."""
    from ..inference import generation
    from ..inference.context import describe_overflow

    stream = generation.stream(model, tokenizer, prompt, **options)
    bound = options.get("max_kv_size")
    if overflow := describe_overflow(model, len(prompt), max_kv_size=bound):
        shown.warn(overflow)
    generation.warm_up(model, tokenizer, len(prompt), **options)
    for piece in generation.restore_first_space(stream, tokenizer) if same_line else stream:
        _speak(piece, shown)
    _speak("\n", shown)
    answer = stream.answer
    _aside(generation.summarize(answer, cut=stream.cut), shown)
    tokens, what = len(prompt) + answer.generation_tokens, "prompt and answer have"
    if not overflow and (told := describe_overflow(model, tokens, max_kv_size=bound, what=what)):
        _aside(told, shown)
    return answer


def _check_flags(options: Mapping[str, Any]) -> None:
    """Refuse flags that do not go together and values that cannot be, before any work."""
    given = {name for name, value in options.items() if value is not None}
    for name in ("prompt", "system_prompt"):
        if name in given and not options[name].strip():
            raise BadArgument(f"{flag_name(name)} is empty: give some text")
    other, cache_file = "compare" in given, "prompt_cache_file" in given
    draft, system = "draft_model" in given, "system_prompt" in given
    if "prompt" not in given and (other or cache_file or draft):
        raise BadArgument("--compare, --prompt-cache-file and --draft-model need a --prompt")
    if other and cache_file:
        raise BadArgument("--compare runs two models and --prompt-cache-file is one's: drop one")
    if draft and (other or cache_file):
        raise BadArgument("--draft-model goes with neither --compare nor --prompt-cache-file")
    if system and (other or cache_file):
        raise BadArgument("--system-prompt goes with neither --compare nor --prompt-cache-file")
    if cache_file and given & {"max_kv_size", "kv_bits"}:
        raise BadArgument("--prompt-cache-file is as it was made: drop --max-kv-size and --kv-bits")
    if "num_draft_tokens" in given and not draft:
        raise BadArgument("--num-draft-tokens is for --draft-model: add that, or drop it")

    from ..inference.caches import check_shape
    from ..inference.generation import check_drafting
    from ..inference.sampling import check_options

    check_shape(options["max_kv_size"], options["kv_bits"])
    check_options(**{name: options[name] for name in SAMPLING if name in given})
    if draft:
        named = ("num_draft_tokens", "max_kv_size", "repetition_penalty")
        check_drafting(**{name: options[name] for name in named})


def _choose_sampling(
    options: dict[str, Any], source: str | None, tale: bool
) -> tuple[dict[str, Any], list[str]]:
    """Fill in options that were not given, of a chat with what ``source`` recommends.

    Returns:
        The options, and lines that say what was taken.
    """
    from ..checkpoints import hub
    from ..inference.generation import TALE_TEMP
    from ..inference.sampling import read_defaults

    given = {key: value for key, value in options.items() if value is not None}
    found = read_defaults(hub.resolve(source, config_only=True)) if source is not None else {}
    if given.get("temp") == 0:  # the likeliest token, whatever narrows the choice
        found = {key: found[key] for key in found.keys() & {"repetition_penalty"}}
    taken = {key: value for key, value in found.items() if key not in given}
    lines = [f"{flag_name(key)} {value:g}" for key, value in taken.items()]
    remarks = [f"As generation_config.json recommends: {' '.join(lines)}"] if lines else []
    return {"temp": TALE_TEMP if tale else 0.0} | taken | given, remarks


def _speak(text: str, shown: Output) -> None:
    """Show a part of the answer, the result, which no --quiet hides."""
    if not shown.to_stdout:
        print(make_visible(text), end="", flush=True)


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


def _read_waiting(shown: Output) -> str | None:
    """Read what waits in a pipe or file; a pipe that nobody has written to may never end."""
    if select.select([sys.stdin], [], [], 0)[0]:  # it holds something, or has ended
        return read_input() or None
    shown.warn("nothing has come through the pipe: --prompt - waits for a prompt")
    return None


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
