"""Paths: a ~ is a home in every one that a user gives, and none is in what gets published."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from factory import make_checkpoint, make_llama

import mlx_skipless
from mlx_skipless import cli
from mlx_skipless.conversion.card import LOCAL, name_source, render_card

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY = (
    "--hidden-size 16 --intermediate-size 32 --layers 2 --heads 2 --kv-heads 1 --vocab-size 270 "
    "--context 16 --batch-size 4 --steps 2 --warmup 1 --dtype float32 --sample-every 0 --quiet"
)
thorough = pytest.mark.thorough


@pytest.fixture(scope="module")
def alice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with models that name it, and a text."""
    home = tmp_path_factory.mktemp("alice")
    make_checkpoint(home / "m", norm="qkv", **SMALL)
    make_llama(home / "llama", **SMALL)
    (home / "t.txt").write_text("hello, this is a text\n" * 300)
    (home / "run/training").mkdir(parents=True)
    (home / "run/training/log.jsonl").write_text('{"step": 1, "tokens": 64, "loss": 2.5}\n')
    (home / "c.yaml").write_text("steps: 2\n")
    names = {"_name_or_path": str(home / "m"), "tokenizer_file": f"{home}/gone/tokenizer.json"}
    for file in (*home.glob("*/config.json"), *home.glob("*/tokenizer_config.json")):
        file.write_text(json.dumps(json.loads(file.read_text()) | names))
    return home


@pytest.fixture
def at_home(alice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for each test, of links to the one above; the working folder is elsewhere."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    for made in alice.iterdir():
        (home / made.name).symlink_to(made)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("signal.signal", lambda *ignored: None)
    monkeypatch.chdir(here)
    return home


@pytest.mark.parametrize(
    ("line", "made"),
    [
        ("convert --model=~/m --mlx-path=~/o --calibration=~/t.txt --json=~/r.json", "o r.json"),
        ("convert --hf-path=~/m/config.json --dry-run --json=~/r.json", "r.json"),
        ("generate --model=~/m --prompt=hi --max-tokens=2 --compare=~/m --json=~/r.json", "r.json"),
        ("generate --model=~/m --prompt=hi --max-tokens=2 --draft-model=~/m", ""),
        ("analyze ~/m/config.json --json=~/r.json", "r.json"),
        pytest.param(
            "analyze ~/m --calibration=~/t.txt --plot=~/a.svg --json=~/r.json", "a.svg r.json",
            marks=thorough,
        ),
        ("perplexity --model=~/m --validation ~/t.txt --context=16 --json=~/r.json", "r.json"),
        ("perplexity --model=~/m --data ~/t.txt --context=16", ""),
        ("curves ~/run --output=~/l.svg", "l.svg"),
        pytest.param(
            "bench ~/m --prompt-lengths --contexts=8 --batch-sizes=1 --repeats=1 --decode-tokens=2 "
            "--plot=~/b.svg --markdown=~/b.md --json=~/r.json", "b.md b.svg r.json", marks=thorough,
        ),
        ("bench --synthetic=~/m --prompt-lengths --save=~/s", "s"),
        pytest.param(
            f"train --data ~/t.txt --tokenizer=~/m -c ~/c.yaml --mlx-path=~/o {TINY}",
            "o", marks=thorough,
        ),
        pytest.param(
            "heal --model=~/m --teacher=~/m --data ~/t.txt --steps=1 --context=16 "
                "--mlx-path=~/o", "o",
            marks=thorough,
        ),
    ],
)  # fmt: skip
def test_a_tilde_is_a_home(line: str, made: str, at_home: Path) -> None:
    """Also where no shell expands it, after a flag's = or in another program."""
    before = {*os.listdir(at_home)}
    assert cli.main(line.split()) == 0
    new = {name for name in os.listdir(at_home) if not name.startswith(".")} - before
    assert new == {*made.split()} and os.listdir() == []


def test_functions_know_a_home_too(at_home: Path) -> None:
    for make in (str, Path):
        out = make(f"~/{make.__name__}")
        mlx_skipless.convert(make("~/m"), out, verify=False)
        assert (at_home / make.__name__ / "config.json").is_file()
        mlx_skipless.load(out)
        mlx_skipless.measure_perplexity(out, validation=[make("~/t.txt")], context=16)
        assert mlx_skipless.analyze(make("~/m"), config_only=True).weights
    assert os.listdir() == []


SOURCES = ["~/{}", "{home}/{}", "../home/{}", "{home}/x/../{}"]
FLAGS = ["--remove qp", "-q --q-group-size 32", "--skipless", "--drop-attention 1"]
NAMED = [("~/{}", "llama", ""), ("{home}/{}", "m", ""), ("../home/{}", "llama", "--skipless")]


@pytest.mark.parametrize(
    ("source", "model", "flags"),
    [
        *NAMED,
        *(
            pytest.param(source, "m" if "qp" in flags else "llama", flags, marks=thorough)
            for source in SOURCES
            for flags in FLAGS
        ),
    ],
)
def test_a_result_names_no_path_and_no_user(
    source: str, model: str, flags: str, at_home: Path
) -> None:
    (at_home / "x").mkdir()
    where, text = (source.format(name, home=at_home) for name in (model, "t.txt"))
    given = ["--model", where, "--calibration", text, *flags.split()]
    out = at_home.parent / "here/o"
    assert cli.main(["convert", *given, "--mlx-path", str(out)]) == 0
    for file in out.iterdir():
        content = file.read_bytes()
        assert b"alice" not in content and bytes(at_home) not in content, file
        assert file.suffix not in (".md", ".json") or not re.search(rb"\.\./|~/", content), file
    card = (out / "README.md").read_text()
    assert f"from `{model}`" in card and "t.txt" in card


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("owner/name", "owner/name"), ("~", LOCAL), ("/", LOCAL), ("~/m", "m"),
        ("~/a/b.gguf", "b.gguf"),
        (".", "here"), ("./", "here"), ("..", None), ("/a/b/", "b"), ("a/b/c", "c"),
    ],
)  # fmt: skip
def test_what_a_card_calls_a_source(source: str, name: str | None, at_home: Path) -> None:
    assert name_source(source) == (name or at_home.parent.name)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("see /home/alice/m.", "see m."),
        ("--model /home/alice/m --skipless", "--model m --skipless"),
        ("(/home/alice/m), `~/alice/x`", "(m), `x`"),
        ("https://example.org/a/b and </s>, 3 MB/token, and/or, 1 / 2", None),
        ("owner/name", None),
    ],
)
def test_a_card_keeps_no_path_that_slips_in(said: str, shown: str | None) -> None:
    assert (shown or said) in render_card("name", [said], {})
