"""The chat: what a turn processes and remembers, and the program in a real terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from commands import ROOT, script
from factory import EOS, make_checkpoint, make_llama
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_skipless.errors import UserError
from mlx_skipless.inference import generation, keyboard, prompts
from mlx_skipless.inference.chat import Conversation, _describe_totals, chat
from mlx_skipless.inference.loading import load
from mlx_skipless.terminal import make_visible

Loaded = tuple[nn.Module, TokenizerWrapper]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder, head_dim=32)
    return folder


@pytest.fixture
def llama(folder: Path) -> Loaded:
    return load(folder)


@pytest.fixture
def bare(folder: Path) -> Loaded:
    """The same model without a chat template."""
    model, tokenizer = load(folder)
    tokenizer._tokenizer.chat_template = None
    return model, TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[EOS])


def say(talk: Conversation, text: str, pieces: int | None = None) -> str:
    """The answer, or its first pieces."""
    answer = talk.ask(text)
    if pieces is None:
        return "".join(answer)
    said = "".join(next(answer) for _ in range(pieces))
    answer.close()
    return said


def assert_cache_is_fresh(talk: Conversation, model: nn.Module) -> None:
    """The cache holds what a single run over the same ids would put there."""
    fresh = model.make_cache()
    model(mx.array([talk.cached]), cache=fresh)
    for kept, new in zip(talk.cache, fresh, strict=True):
        assert kept.offset == new.offset == len(talk.cached)
        for a, b in zip(kept.keys_and_values(), new.keys_and_values(), strict=True):
            assert mx.allclose(a, b, rtol=1e-4, atol=1e-4).item()


def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the tokens of each call of the model."""
    seen: list[int] = []
    call = type(model).__call__

    def count(self: nn.Module, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        seen.append(inputs.shape[1])
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", count)
    return seen


@pytest.mark.parametrize("kind", ["llama", "bare"])
def test_a_kept_cache_equals_a_fresh_one(kind: str, request: pytest.FixtureRequest):
    model, tokenizer = request.getfixturevalue(kind)
    talk = Conversation(model, tokenizer, max_tokens=12)
    for turn, pieces in (("Hello there", None), ("More", 5), ("And then?", None)):
        say(talk, turn, pieces)
        assert_cache_is_fresh(talk, model)
    assert talk.turns == 3


def test_a_turn_goes_on_from_the_whole_history(llama: Loaded):
    model, tokenizer = llama
    talk = Conversation(model, tokenizer, max_tokens=12)
    first, second = say(talk, "Hello"), say(talk, "More")
    assert talk.messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": second},
    ]
    whole = tokenizer.encode(
        f"<s>user: Hello\n<s>assistant: {first}\n<s>user: More\n<s>assistant: ",
        add_special_tokens=False,
    )
    assert generation.generate(model, tokenizer, whole, max_tokens=12).text == second


def test_without_a_template_both_write_one_text(bare: Loaded):
    model, tokenizer = bare
    hello = tokenizer.encode("Hello")
    talk = Conversation(model, tokenizer, max_tokens=6)
    say(talk, "Hello")
    first = talk.cached
    assert first[:-6] == hello
    say(talk, "More")
    assert talk.cached[:-6] == first + tokenizer.encode("\nMore")


def test_without_a_template_the_text_goes_on_before_an_end_token(bare: Loaded):
    model, tokenizer = bare
    hello = tokenizer.encode("Hello")
    start = generation.stream(model, tokenizer, hello, max_tokens=6)
    list(start)
    tokenizer.add_eos_token(str(start.tokens[-1]))
    talk = Conversation(model, tokenizer, max_tokens=6)
    say(talk, "Hello")
    held = [*hello, *start.tokens][: len(talk.cached) - 1]
    assert talk.last.finish_reason == "stop"
    say(talk, "More")
    assert talk.reused == len(held)
    assert talk.cached[: len(held) + 5] == held + tokenizer.encode("\nMore")
    assert_cache_is_fresh(talk, model)


def test_a_turn_processes_only_what_is_new(bare: Loaded, monkeypatch: pytest.MonkeyPatch):
    talk = Conversation(*bare, max_tokens=12)
    say(talk, "A first turn that is rather long")
    held = len(talk.cached)
    calls = counted(bare[0], monkeypatch)
    say(talk, "More")
    assert talk.reused == held
    assert talk.last.prompt_tokens == len("\nMore")
    assert sum(calls) == len("\nMore") + 12


def test_the_same_turn_again_still_feeds_a_token(bare: Loaded):
    talk = Conversation(*bare, max_tokens=4)
    first = say(talk, "Hello")
    talk._transcript = []  # as if it were new, with all of it in the cache
    assert say(talk, "Hello") == first
    assert talk.reused == len("Hello") - 1


def test_a_full_bounded_cache_is_built_anew(llama: Loaded):
    model, tokenizer = llama
    talk = Conversation(model, tokenizer, max_tokens=12, max_kv_size=16)
    first = say(talk, "Hello there, long enough to fill it")
    ids = tokenizer.apply_chat_template(
        [*talk.messages, {"role": "user", "content": "More"}], add_generation_prompt=True
    )
    second = say(talk, "More")
    assert first and talk.reused == 0
    fresh = generation.generate(model, tokenizer, list(ids), max_tokens=12, max_kv_size=16)
    assert second == fresh.text
    assert all(c.keys.shape[2] <= 16 for c in talk.cache)


def test_a_quantized_cache_is_kept_too(llama: Loaded):
    talk = Conversation(*llama, max_tokens=8, kv_bits=8)
    say(talk, "Hello")
    say(talk, "More")
    assert talk.reused > 0
    assert {c.bits for c in talk.cache} == {8}
    assert {c.offset for c in talk.cache} == {len(talk.cached)}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_interrupt_within_a_step_leaves_nothing_half_written(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, steps: int
):
    model, tokenizer = llama
    talk = Conversation(model, tokenizer, max_tokens=10)
    say(talk, "Hello")
    history = list(talk.messages)
    mlp, calls = model.layers[1].mlp, []

    def interrupt(self: nn.Module, x: mx.array) -> mx.array:
        calls.append(x)
        if self is mlp and x.shape[1] == 1 and sum(c.shape[1] == 1 for c in calls) > 3 * steps:
            raise KeyboardInterrupt
        return call(self, x)

    call = type(mlp).__call__
    monkeypatch.setattr(type(mlp), "__call__", interrupt)
    said = ""
    with pytest.raises(KeyboardInterrupt):
        for piece in talk.ask("More"):
            said += piece
    monkeypatch.undo()
    if steps < 2:  # mlx-lm is a step ahead of what it yields
        assert talk.messages == history
    else:
        assert talk.messages[-1] == {"role": "assistant", "content": said}
    say(talk, "Again")
    assert_cache_is_fresh(talk, model)


def test_reset_forgets(llama: Loaded):
    talk = Conversation(*llama, max_tokens=8)
    first = say(talk, "Hello")
    say(talk, "More")
    talk.reset()
    assert (talk.turns, talk.messages, talk.cached, talk.last) == (0, [], [], None)
    assert say(talk, "Hello") == first
    assert talk.reused == 0


@pytest.mark.parametrize("options", [{"temp": -1}, {"kv_bits": 5}, {"max_kv_size": 1}])
def test_bad_options_are_refused_before_the_first_turn(llama: Loaded, options: dict[str, Any]):
    with pytest.raises(UserError):
        chat(*llama, **options)


PROGRAM = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from mlx_skipless.inference.chat import chat
from mlx_skipless.inference.loading import load
from mlx_skipless.terminal import make_visible
model, tokenizer = load(sys.argv[1])
tokenizer.eos_token_ids = set()
chat(model, tokenizer, **eval(sys.argv[2]))
print("LEFT")
"""


class Terminal:
    """A program in a pseudo-terminal of its own."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path | None = None):
        self.fd, side = pty.openpty()
        keep = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "INPUTRC")}
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            env=keep | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "COLUMNS": "500"} | env,
        )
        os.close(side)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, *texts: str, seconds: float = 60) -> str:
        """What comes until each of `texts` has come, in this order; "" is anything."""
        seen, end, at = "", time.monotonic() + seconds, 0
        for text in texts:
            while (found := seen.find(text, at)) < 0 or not seen:
                ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
                assert ready, f"{text!r} did not come; what came: {seen!r}"
                try:
                    data = os.read(self.fd, 1 << 16)
                except OSError:  # Linux's end of file
                    data = b""
                assert data, f"the program ended before {text!r}; what came: {seen!r}"
                seen += data.decode(errors="replace")
            at = found + len(text)
        return seen

    def insist(self, keys: str, *texts: str) -> str:
        """Send `keys` until `texts` come: Python misses a Ctrl-C just after a prompt appears."""
        for _ in range(20):
            self.send(keys)
            with contextlib.suppress(AssertionError):
                return self.expect(*texts, seconds=2)
        raise AssertionError(f"{keys!r} did not bring {texts}")

    def ask(self, text: str) -> str:
        """Send a line; what comes until the next prompt."""
        self.send(text + "\n")
        return self.expect("peak memory ", "> ")


@pytest.fixture
def terminal(folder: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(
        env: dict[str, str] | None = None,
        command: list[str] | None = None,
        cwd: Path | None = None,
        **options: Any,
    ) -> Terminal:
        """A chat with `options` that has come to its prompt, or another command."""
        own = [sys.executable, "-c", PROGRAM, str(folder), repr(options)]
        opened.append(Terminal(command or own, env or {}, cwd))
        if command is None:
            opened[-1].expect("> ")
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.fd)


def test_a_session_in_a_terminal(terminal: Callable[..., Terminal], llama: Loaded, tmp_path: Path):
    llama[1].eos_token_ids = set()
    talk = Conversation(*llama, max_tokens=6)
    (tmp_path / "mlx-skipless").mkdir()
    (history := tmp_path / "mlx-skipless" / "history").write_text("Of another day\n")
    history.chmod(0o644)
    screen = terminal({"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}, max_tokens=6)
    for text in ("Hello", "More"):
        say(talk, text)
        costs = screen.ask(text)
        assert f"prompt {talk.last.prompt_tokens} tokens at " in costs
        assert "answer 6 tokens at " in costs and "cut off by --max-tokens" in costs
        assert (f"({talk.reused} more were in the cache)" in costs) == (text == "More")

    screen.send("  \n")
    screen.expect("> ")
    screen.send("/stats\n")
    stats = screen.expect("turns: ", "> ")
    assert f"2 turns: {talk.prompt_tokens} prompt tokens processed, 12 generated" in stats
    assert f"{len(talk.cached)} tokens in the cache" in stats
    screen.send("/help\n")
    assert re.search("/reset.*/stats.*/help.*/quit", screen.expect("Ctrl-C", "> "), re.DOTALL)
    screen.send("/nonsense at all\n")
    screen.expect("/nonsense is no command", "> ")
    screen.send("/reset\n")
    screen.expect("forgotten", "> ")
    assert "in the cache" not in screen.ask("Hello")

    def length(text: str) -> int:
        whole = prompts.encode_prompt(llama[1], text)
        screen.send("/reset\n")
        screen.expect("forgotten", "> ")
        return len(whole)

    tokens = length("one\ntwo\n  three")
    screen.send('"""one\n')
    screen.expect("... ")
    screen.send("two\n")
    screen.expect("... ")
    assert f"prompt {tokens} tokens" in screen.ask('  three"""')
    tokens = length("one\ntwo")
    assert f"prompt {tokens} tokens" in screen.ask("\x1b[200~one\rtwo\x1b[201~")
    screen.send("\x10" * 30 + "\n")  # up to the first line that there is
    assert "Of another day" in screen.expect("peak memory ", "> ")
    screen.send("exit\n")
    screen.expect("LEFT")
    assert screen.process.wait(timeout=60) == 0
    lines = history.read_text().splitlines()
    assert lines[:3] == ["Of another day", "Hello", "More"] and "one two" in lines
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Callable[..., Terminal]):
    screen = terminal(max_tokens=10**9)
    screen.send("Hello\n")
    screen.expect("Hello\r\n")
    screen.expect("")
    screen.send("\x03")
    costs = screen.expect("peak memory ", "> ")
    said = int(re.search(r"answer ([\d,]+) tokens", costs)[1].replace(",", ""))
    assert said > 1 and "cut off" not in costs

    screen.send("/stats\n")
    held = re.search(r"1 turn: .* ([\d,]+) tokens in the cache", screen.expect("cache (", "> "))
    assert int(held[1].replace(",", "")) > said

    screen.insist("half a line\x03", "Ctrl-D or /quit leaves", "> ")
    screen.insist("\x03", "Ctrl-D or /quit leaves", "> ")
    screen.send("More\n")
    screen.expect("More\r\n")
    screen.expect("")
    screen.send("\x03")
    assert "more were in the cache" in screen.expect("peak memory ", "> ")
    screen.send("\x04")
    screen.expect("LEFT")
    assert screen.process.wait(timeout=60) == 0


@pytest.mark.parametrize("template", [False, True])
def test_the_command_without_arguments_in_a_terminal(
    terminal: Callable[..., Terminal], tmp_path: Path, template: bool
):
    """The bundled model is converted, tells a tale where it knows no chat, and then listens."""
    make_checkpoint(tmp_path / "tales", norm="qkv", hidden_size=32, template=template)
    command = script(tmp_path / "tales", "generate.py", "--max-tokens", "6")
    screen = terminal(command=command, cwd=tmp_path)
    begun = screen.expect("converting the bundled model", "Write to the model", "> ")
    assert ("\nOnce upon a time" in begun) == ("; answer " in begun) == (not template)
    assert ("more were in the cache" in screen.ask("Hello")) == (not template)
    screen.send("/stats\n")
    said = "1 turn: " if template else "2 turns: "
    assert said in screen.expect(said, "> ")
    screen.send("/quit\n")
    assert screen.process.wait(timeout=60) == 0
    assert (tmp_path / "mlx_model").is_dir()


class Screen(io.StringIO):
    """What says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("err", [Screen, io.StringIO])
def test_colour_is_for_terminals_that_want_it(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, err: type[io.StringIO], wanted: bool
):
    monkeypatch.setenv("NO_COLOR", "" if wanted else "1")
    type_lines(monkeypatch, "Hello")
    chat(*llama, max_tokens=3, out=Screen(), err=(shown := err()))
    assert ("\x1b[2mprompt " in shown.getvalue()) == (wanted and err is Screen)
    assert ("\x1b" in shown.getvalue()) == (wanted and err is Screen)


def test_a_seed_makes_a_session_repeatable_but_not_its_turns(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch
):
    def session() -> str:
        type_lines(monkeypatch, "Hello", "/reset", "Hello")
        chat(*llama, max_tokens=30, temp=1.0, seed=5, out=(said := io.StringIO()))
        return said.getvalue()

    said = session()
    assert session() == said
    assert said != said[: len(said) // 2] * 2


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | Exception) -> None:
    """Let input() give these lines, raise where one is an exception, and end."""
    left = iter(lines)

    def typed(_: str) -> str:
        if isinstance(line := next(left, EOFError()), BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)


def press_ctrl_c(model: nn.Module, monkeypatch: pytest.MonkeyPatch, call: int, times: int) -> None:
    """Interrupt this process within a call of the model."""
    original = type(model).__call__
    calls = []

    def interrupted(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        calls.append(args)
        if len(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", interrupted)


def test_ctrl_c_while_the_prompt_is_read_forgets_it(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    type_lines(monkeypatch, "A long story that is not to be read", "Hi", "/stats")
    press_ctrl_c(llama[0], monkeypatch, call=1, times=1)
    before = signal.getsignal(signal.SIGINT)
    chat(*llama, max_tokens=3)
    assert signal.getsignal(signal.SIGINT) is before
    err = capsys.readouterr().err
    length = len(prompts.encode_prompt(llama[1], "Hi"))
    assert "Stopped; the message is forgotten." in err
    assert f"prompt {length} tokens at" in err
    assert f"1 turn: {length} prompt tokens processed, 3 generated" in err


def test_an_opening_is_gone_on_from(
    bare: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It is the first turn: shown, answered, and the beginning of the text that follows."""
    talk = Conversation(*bare, max_tokens=6)
    first, second = say(talk, "Once upon a time"), say(talk, "Hello")
    type_lines(monkeypatch, "Hello")
    chat(*bare, max_tokens=6, opening="Once upon a time")
    out, err = capsys.readouterr()
    visible = [make_visible(text) for text in (first, second)]
    assert out == f"Once upon a time{visible[0]}\n{visible[1]}\n"
    assert err.count("peak memory") == 2 and f"({talk.reused} more were in the cache)" in err


def test_ctrl_c_before_the_openings_first_token(
    bare: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    type_lines(monkeypatch, "Hello", "/stats")
    press_ctrl_c(bare[0], monkeypatch, call=1, times=1)
    chat(*bare, max_tokens=6, opening="Once upon a time")
    out, err = capsys.readouterr()
    assert out.startswith("Once upon a time\n") and "Stopped" not in err
    assert "1 turn: 5 prompt tokens processed, 6 generated" in err


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_keeps_the_cache_and_twice_does_not_wait(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], times: int
):
    type_lines(monkeypatch, "Hello", "More", "/stats")
    press_ctrl_c(llama[0], monkeypatch, call=8, times=times)
    chat(*llama, max_tokens=50)
    err = capsys.readouterr().err
    assert ("more were in the cache" in err) == (times == 1)
    assert "answer 6 tokens" in err if times == 1 else "answer 5 tokens" in err
    processed = [int(n) for n in re.findall(r"prompt (\d+) tokens", err)]
    assert len(processed) == 2
    assert f"2 turns: {sum(processed)} prompt tokens processed" in err


def test_what_is_not_unicode_does_not_end_the_chat(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    type_lines(monkeypatch, "caf\udce9", broken, "Hello")
    chat(*llama, max_tokens=3)
    err = capsys.readouterr().err
    assert err.count("peak memory") == 2
    assert "error: this terminal does not send utf-8" in err


@pytest.mark.parametrize("word", ["/quit", "/exit", "quit", "exit", "  exit "])
def test_words_that_leave(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
):
    type_lines(monkeypatch, word, "Hello")
    chat(*llama, max_tokens=3, remarks=["Of note."])
    out, err = capsys.readouterr()
    assert (out == "" and err.splitlines()[1:] == ["Of note.", "> "]) or err.endswith(
        "Of note.\n> "
    )


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (['"""one', "", 'two"""'], "one\n\ntwo"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
        (['  """one', 'two"""  '], "one\ntwo"),
        (['"""/quit', 'exit"""'], "/quit\nexit"),
        (['one """ two'], 'one """ two'),
        (['"""one', KeyboardInterrupt(), "two"], "two"),
    ],
)
def test_messages_of_several_lines(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    typed: list[str | BaseException], said: str,
):  # fmt: skip
    asked: list[str] = []
    original = Conversation.ask

    def ask(self: Conversation, text: str, **options: Any) -> Any:
        asked.append(text)
        return original(self, text, **options)

    type_lines(monkeypatch, *typed)
    monkeypatch.setattr(Conversation, "ask", ask)
    chat(*llama, max_tokens=2)
    assert asked == [said]


@pytest.mark.parametrize("opening", [None, "Once upon a time"])
@pytest.mark.parametrize("error", [IndexError("no such token"), UserError("no numbers")])
def test_a_broken_answer_does_not_end_the_chat(
    bare: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: Exception, opening: str | None,
):  # fmt: skip
    kind, calls = type(bare[1].detokenizer), []
    original = kind.add_token

    def add(self: Any, token: int) -> None:
        calls.append(token)
        if len(calls) == 3:
            raise error
        original(self, token)

    monkeypatch.setattr(kind, "add_token", add)
    type_lines(monkeypatch, *([] if opening else ["Hello"]), "More", "/stats")
    chat(*bare, max_tokens=5, opening=opening)
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert str(error) in line and "Traceback" not in err
    assert err.count("peak memory") == 1 and "2 turns: " in err  # of one, two tokens are kept


def test_an_impossible_turn_does_not_end_the_chat(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    llama[
        1
    ]._tokenizer.chat_template = (
        "{% if messages[-1]['content'] == 'Bad' %}{{ raise_exception('no') }}{% endif %}x"
    )
    type_lines(monkeypatch, "Bad", "Good")
    chat(*llama, max_tokens=3)
    err = capsys.readouterr().err
    assert "error: the model's chat template fails (no)" in err and err.count("peak memory") == 1


# The model's context


def test_the_beginning_is_forgotten_where_it_has_turns(llama: Loaded):
    """Whole turns of it, so that all that is said stands within the context; never the system's."""
    model, tokenizer = llama
    talk = Conversation(model, tokenizer, max_tokens=8, system_prompt="Hush.")
    talk.context = 160
    for turn in range(12):
        text = f"Turn {turn}{'.' * (turn * 7 % 30)}"
        say(talk, text)
        assert talk.messages[-2]["content"] == text
        assert len(talk.messages) % 2 == 0 and talk.messages[0]["role"] == "user"
        assert talk.cached[: len(opening := tokenizer.encode("<s>system: Hush.\n"))] == opening
        assert len(talk.cached) <= 160 + 8
        assert_cache_is_fresh(talk, model)
    assert talk.turns == 12 and 2 <= len(talk.messages) < 8
    # A message too long for all is answered, alone; its answer goes with it.
    say(talk, "x" * 200)
    assert len(talk.messages) == 2
    say(talk, "More")
    assert [one["role"] for one in talk.messages] == ["user", "assistant"]


def test_the_beginning_is_forgotten_where_it_is_one_text(bare: Loaded):
    model, tokenizer = bare
    talk = Conversation(model, tokenizer, max_tokens=8)
    talk.context = 64
    text = ""
    for turn in range(9):
        said = f"{turn} and more"
        held = list(talk._transcript)
        say(talk, said)
        ids = tokenizer.encode(f"{chr(10) if turn else ''}{said}", add_special_tokens=False)
        assert talk.cached[:-8] == [*held, *ids][talk.forgotten :]
        assert (talk.forgotten > 0) == (len(held) + len(ids) > 48)
        assert len(talk.cached) <= 64
        text += said
    assert len(text) > 64


def test_the_cache_of_a_chat_is_bounded(llama: Loaded):
    def sizes(**options: Any) -> set[int | None]:
        cache = Conversation(*llama, **options).cache
        return {getattr(one, "max_size", None) for one in cache}

    assert sizes() == {512} and sizes(max_kv_size=16) == {16} and sizes(kv_bits=8) == {None}


@pytest.mark.parametrize(("options", "held"), [({"max_kv_size": 16}, 16), ({}, None)], ids=str)
def test_stats_count_what_the_cache_holds(options: Any, held: int | None, llama: Loaded):
    talk = Conversation(*llama, max_tokens=8, **options)
    say(talk, "A message of more than sixteen tokens")
    assert f"; {held or len(talk.cached)} tokens in the cache (" in _describe_totals(talk)


def test_a_refused_turn_forgets_nothing(llama: Loaded):
    talk = Conversation(*llama, max_tokens=8, kv_bits=8)
    talk.context = llama[0].context = 100
    say(talk, "Hello")
    history = list(talk.messages)
    with pytest.raises(UserError, match="the model's context 100"):
        say(talk, "x" * 200)
    assert talk.messages == history
    say(talk, "More")
    assert len(talk.messages) == 4


def test_a_chat_says_when_its_context_fills(
    bare: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bare[0].context = 64
    bare[1].eos_token_ids = set()
    lines = ["Hello", "x" * 30, "More", "x" * 70, "/reset", "Hello"]
    type_lines(monkeypatch, *lines)
    chat(*bare, max_tokens=8)
    answers = capsys.readouterr().err.split("> ")[1:]
    said = [re.findall("about to|its beginning is forgotten|saw only the end", a) for a in answers]
    # 13 tokens; 13 + 31 + 8; (52 + 5, so 32) + 8; (71) + 8.
    assert said[:6] == [
        [], ["about to"], ["its beginning is forgotten"],
        ["its beginning is forgotten", "saw only the end"], [], [],
    ]  # fmt: skip


def test_an_answer_that_outgrows_the_context_is_no_long_turn(
    bare: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bare[0].context = 64
    bare[1].eos_token_ids = set()
    type_lines(monkeypatch, "Hello")
    chat(*bare, max_tokens=80)
    said = capsys.readouterr().err
    assert "The answer outgrew the model's context of 64 tokens" in said
    assert "This turn" not in said


# What is typed, on another day


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: folder.write_text("a file"),
        lambda folder: (folder / "history").mkdir(parents=True),
        lambda folder: (folder.mkdir(), os.mkfifo(folder / "history")),
        lambda folder: (folder.mkdir(), (folder / "history").symlink_to("/dev/null")),
        lambda folder: (folder.mkdir(), (folder / "history").symlink_to(folder / "other")),
        lambda folder: (folder.mkdir(), (folder / "history").write_bytes(b"\xff\x00\n" * 9)),
    ],
    ids=["file", "folder", "pipe", "device", "link", "bytes"],
)
def test_a_history_that_cannot_be_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Any]
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    spoil(tmp_path / "mlx-skipless")
    with keyboard.edit_lines():
        pass
    assert not (tmp_path / "mlx-skipless" / "other").exists()


def test_a_spoilt_line_of_history_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (history := tmp_path / "mlx-skipless" / "history").parent.mkdir()
    history.write_bytes(b"fine\na\x00b\n\x1b[2J\nlater\n")
    with keyboard.edit_lines():
        pass
    assert history.read_text().splitlines()[-2:] == ["fine", "later"]


def test_a_prompt_is_no_part_of_what_a_file_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert keyboard.read_message() == "Hello"
    assert capsys.readouterr() == ("", "> ")


def test_where_history_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for state, folder in (("/state", "/state"), ("", "/home/someone/.local/state"),
                          ("here", "/home/someone/.local/state")):  # fmt: skip
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert keyboard.find_history() == Path(folder, "mlx-skipless", "history")


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    type_lines(monkeypatch, "Hello")
    pieces = (piece for piece in ("a\x1b[2J\x07\tb\n",))
    monkeypatch.setattr(Conversation, "ask", lambda *_, **__: pieces)
    monkeypatch.setattr("mlx_skipless.inference.chat._describe_costs", lambda _: "costs")
    chat(*llama)
    out, err = capsys.readouterr()
    assert out == "a\ufffd[2J\ufffd\tb\n\n"
    assert "costs" in err
