"""What a checkpoint must not do to whoever opens it: run its code, or reach the network."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factory import make_checkpoint, make_llama
from grids import thin

from mlx_skipless import UserError, convert, load
from mlx_skipless.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MAKERS = [make_checkpoint, make_llama]


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that only a checkpoint's own code would make."""
    return tmp_path / "mark"


def write_code(folder: Path, mark: Path) -> None:
    """A tokenizer, a config and a network, and code that all of them ask for."""
    leave = f"open({str(mark)!r}, 'w')\n"
    for name in ("tokenization_own", "configuration_own", "modeling_own", "model"):
        (folder / f"{name}.py").write_text(leave)
    edit(folder / "config.json", auto_map={"AutoConfig": "configuration_own.Config"})
    tokenizer = {"AutoTokenizer": [None, "tokenization_own.Tokenizer"]}
    edit(folder / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Tokenizer")


@pytest.mark.parametrize("flags", ["", "--skipless --remove p"])
def test_a_tokenizer_of_own_code_is_refused_without_trust(
    tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str], flags: str
):
    make_llama(tmp_path / "model", **SMALL)
    write_code(tmp_path / "model", mark)
    arguments = ["--model", str(tmp_path / "model"), "--mlx-path", str(tmp_path / "out")]
    assert main(["convert", *arguments, *flags.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the tokenizer of ") and error.count("\n") == 1
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_tokenizer_of_own_code_is_run_with_trust(tmp_path: Path, mark: Path):
    """So it is the missing trust that keeps it from running."""
    make_llama(tmp_path / "model", **SMALL)
    write_code(tmp_path / "model", mark)
    with pytest.raises(UserError, match="tokenizer"):
        convert(tmp_path / "model", tmp_path / "out", trust_remote_code=True)
    assert mark.exists()


@pytest.mark.parametrize("maker", MAKERS)
def test_a_network_of_own_code_is_not_run_without_trust(
    tmp_path: Path, mark: Path, maker: Callable[..., Any]
):
    maker(tmp_path / "model", **SMALL)
    (tmp_path / "model" / "model.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit(tmp_path / "model" / "config.json", model_file="model.py")
    if maker is make_checkpoint:  # a network of ours, whatever its file says
        load(tmp_path / "model")
        convert(tmp_path / "model", tmp_path / "out")
    else:
        with pytest.raises(UserError, match=r"its own code \(model.py\)"):
            load(tmp_path / "model")
        with pytest.raises(UserError, match=r"its own code \(model.py\)"):
            convert(tmp_path / "model", tmp_path / "out")
    assert not mark.exists()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% set all = messages.__class__.__base__.__subclasses__() %}"
    "{% for one in all %}{% if one.__name__ == 'Popen' %}"
    "{{ one('touch MARK', shell=True).wait() }}{% endif %}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('no such role') }}",
    "{{ messages[7].content.text }}",
    "{% include 'MARK' %}",
    "{% for %}",
    "",
]


@pytest.mark.parametrize("template", ESCAPES)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_chat_template_that_reaches_for_python(
    tmp_path: Path,
    mark: Path,
    capsys: pytest.CaptureFixture[str],
    template: str,
    maker: Callable[..., Any],
):
    maker(tmp_path / "model", **SMALL)
    file = tmp_path / "model" / "chat_template.jinja"
    file.write_text(template.replace("MARK", str(mark)))
    convert(tmp_path / "model", tmp_path / "out", verify=False)
    assert main(["generate", "--model", str(tmp_path / "out"), "--prompt", "hello"]) == 1
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("error: the model's chat template ")
    assert error.count("\n") == 1 and not mark.exists()


UNPLUGGED = """
import json, socket, sys

attempts = []

def refuse(*arguments, **options):
    attempts.append(repr(arguments))
    raise OSError("this test has no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

from mlx_skipless import convert, generate, load

model, out, options = sys.argv[1:]
convert(model, out, **json.loads(options))
generate(*load(out), "hello", max_tokens=2)
print(json.dumps(attempts))
"""


@pytest.mark.parametrize(
    ("options", "model_type"),
    thin(
        [
            *itertools.product(
                [{}, {"skipless": True, "remove": "p"}, {"drop_attention": 1}],
                ["llama", "mistral"],
            )
        ],
        lambda case: ["skipless"] if case[1] == "llama" and "skipless" in case[0] else [],
    ),
    ids=str,
)
def test_a_folder_is_converted_and_run_without_the_network(
    tmp_path: Path, model_type: str, options: dict[str, Any]
):
    make_llama(tmp_path / "model", model_type=model_type, vocab_size=300, **SMALL)
    online = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            UNPLUGGED,
            *map(str, (tmp_path / "model", tmp_path / "out")),
            json.dumps(options),
        ],
        env=online | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == []
