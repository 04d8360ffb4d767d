"""Runs whose files anyone may have written: a line says what is wrong, whatever they hold."""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_skipless import UserError, cli
from mlx_skipless.training import pretraining
from mlx_skipless.training.recipe import Recipe, TrainingPace

SMALL = Recipe(
    hidden_size=16, intermediate_size=32, layers=2, heads=2, kv_heads=1, vocab_size=270,
    context=16, batch_size=4, steps=2, warmup=1,
)  # fmt: skip
ABSENT = ...  # prints the same in every process
ENDLESS = 10**400
DEEP = "[" * 100_000
WRONG = [
    "x",
    [],
    {},
    [{}],
    None,
    -1,
    10**12,
    ENDLESS,
    -ENDLESS,
    math.nan,
    math.inf,
    True,
    1.5,
    ABSENT,
]


def lists(data: Any) -> list[tuple[str, ...]]:
    """The paths of all values of nested mappings."""
    found: list[tuple[str, ...]] = []
    for key, value in data.items():
        found.append((key,))
        if isinstance(value, dict):
            found += [(key, *path) for path in lists(value)]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").write_text("the quick red fox saw the lazy dogs on a mat\n" * 60)
    out = folder / "run"
    pace = TrainingPace(1, 1, 1, 64, 0)
    options: dict[str, Any] = {"pace": pace, "dtype": "float32", "validation_share": 0.3}
    pretraining.train([folder / "text"], out, SMALL, **options)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refuse(run: Path, says: str | None = None) -> None:
    """Resume a run, which is refused in one line and leaves the checkpoint as it was."""
    state = run / "training/state.safetensors"
    before = state.read_bytes() if state.is_file() else None
    with pytest.raises(UserError, match=says) as refusal:
        pretraining.train(None, run, resume=True)
    assert type(refusal.value) is UserError  # the arguments are right
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 2100
    assert before is None or state.read_bytes() == before


def change(settings: Any, path: tuple[str, ...], value: Any) -> str:
    """Settings with another value somewhere, as JSON."""
    new = inside = copy.deepcopy(settings)
    for key in path[:-1]:
        inside = inside[key]
    if value is ABSENT:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return json.dumps(new)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe", []), ("recipe.layers", 10**12), ("recipe.rope_theta", ABSENT),
        ("recipe.hidden_size", 1 << 20), ("recipe.batch_size", 10**9), ("recipe.context", -1),
        ("recipe.steps", math.nan), ("recipe.rope_theta", ENDLESS), ("recipe.clip", math.inf),
        ("recipe.tie", 1), ("pace", None), ("pace.seven", 1),
        ("pace.log_every", ABSENT), ("pace.log_every", "x"), ("pace.log_every", ENDLESS),
        ("pace.eval_every", True),
        ("text.data", "x"), ("text.data", [1]), ("text.data", ["\0"]), ("text.data", ["/dev/zero"]),
        ("text.validation_share", math.nan), ("text.validation_share", 5), ("recipe.kv_heads", 3),
        ("recipe.hidden_size", 18), ("recipe.query_skip", -ENDLESS),
        ("dtype", {}), ("fingerprint", ""), ("more", 1),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_none(run: Path, path: str, value: Any) -> None:
    file = run / "training/run.json"
    settings = json.loads(file.read_text())
    if path == "more":
        path = "text.more"
    file.write_text(change(settings, tuple(path.split(".")), value))
    too_large = path == "recipe.batch_size"  # for this machine: the file is in order
    named = path.startswith(("recipe.", "text.validation")) and not too_large
    refuse(run, r"training/run\.json" if named else None)


@pytest.mark.thorough
def test_every_setting_with_every_value(run: Path) -> None:
    file = run / "training/run.json"
    settings, accepted = json.loads(file.read_text()), []
    for path in lists(settings):
        for value in WRONG:
            file.write_text(change(settings, path, value))
            try:
                pretraining.train(None, run, resume=True)
                accepted.append(value)
            except UserError as error:
                assert "\n" not in str(error)
    # Numbers, texts and choices that a setting may have; no list, mapping or endless number.
    assert not any(isinstance(value, list | dict) and value for value in accepted)
    assert ENDLESS not in accepted and ABSENT not in accepted and math.inf not in accepted


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"\xff\xfe", b"1" * 5000, DEEP.encode(), b'{"a":' * 99 + b"1"],
    ids=range(8),
)
def test_settings_that_are_no_json(run: Path, content: bytes) -> None:
    (run / "training/run.json").write_bytes(content)
    refuse(run, r"run\.json")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": NaN}', '{"step": 1e400}', '{"step": "x"}', '{"step": true}', '{"step": -1}', "[]",
        "null", "{no}", "", '{"step": 1, "loss": NaN}', '{"step": 1, "loss": [1]}', DEEP, "\xff",
        f'{{"step": {ENDLESS}}}', '{"step": 1, "before": 3}', '{"step": 1, "after": {"kl": "x"}}',
        '{"step": 1, "tokens": -1}', '{"step": 1, "validation_loss": null}',
    ],
    ids=range(18),
)  # fmt: skip
def test_a_log_of_what_is_no_event(
    run: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "training/log.jsonl"
    log.write_text(f"{line}\n{log.read_text()}", encoding="latin-1")
    refuse(run, r"log\.jsonl cannot be read")
    assert cli.main(["curves", str(run), "--output", str(run / "x.png")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def first(arrays: dict[str, mx.array], start: str) -> str:
    return next(name for name in arrays if name.startswith(start) and arrays[name].ndim == 2)


@pytest.mark.parametrize("start", ["weights.", "optimizer."])
@pytest.mark.parametrize(
    "make",
    [
        lambda a: a.astype(mx.float16), lambda a: a.astype(mx.int32), lambda a: a > 0,
        lambda a: a.astype(mx.complex64), lambda a: a * math.nan, lambda a: a[:-1],
    ],
    ids=["float16", "int32", "bool", "complex", "nan", "shape"],
)  # fmt: skip
def test_another_state(run: Path, start: str, make: Callable[[mx.array], mx.array]) -> None:
    file = run / "training/state.safetensors"
    loaded: Any = mx.load(str(file), return_metadata=True)
    arrays, metadata = loaded
    mx.eval(arrays)
    name = first(arrays, start)
    mx.save_safetensors(str(file), arrays | {name: make(arrays[name])}, metadata)
    refuse(run, r"state\.safetensors (holds another|is no number)")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "x"), ("step", "nan"), ("step", "-5"), ("step", "9" * 5000), ("step", None),
        ("seconds", "x"), ("seconds", "nan"), ("seconds", "-1"), ("seconds", "1e400"),
        ("losses", ""), ("losses", "{}"), ("losses", "[null]"), ("losses", "[NaN]"),
        ("losses", DEEP), ("losses", f"[{ENDLESS}]"), ("losses", None),
    ],
    ids=range(16),
)  # fmt: skip
def test_a_state_that_says_what_cannot_be(run: Path, key: str, value: str | None) -> None:
    file = run / "training/state.safetensors"
    loaded: Any = mx.load(str(file), return_metadata=True)
    arrays, metadata = loaded
    mx.eval(arrays)
    metadata = {k: v for k, v in metadata.items() if k != key}
    metadata |= {} if value is None else {key: value}
    mx.save_safetensors(str(file), arrays, metadata)
    refuse(run, r"state\.safetensors cannot be resumed from")


@pytest.mark.parametrize("name", ["run.json", "log.jsonl", "state.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to itself"])
def test_no_files(run: Path, name: str, kind: str) -> None:
    """A pipe would block for ever."""
    file = run / "training" / name
    file.unlink()
    {
        "folder": file.mkdir,
        "pipe": lambda: os.mkfifo(file),
        "link to nothing": lambda: file.symlink_to("nowhere"),
        "link to itself": lambda: file.symlink_to(file),
    }[kind]()
    refuse(run, name.replace(".", r"\."))


@pytest.mark.parametrize(
    "flags",
    [
        ["--hidden-size", "1000000", "--heads", "10"], ["--layers", "10000000"],
        ["--batch-size", "1000000000"], ["--gate-offset", "nan"], ["--rope-theta", "inf"],
        ["--steps", "9" * 30], ["--seed", "-1"],
    ],
    ids=str,
)  # fmt: skip
def test_what_no_machine_can_train(
    finished: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--vocab-size", "270", "--context", "16", "--validation-share", "0.3"]
    out = ["--mlx-path", str(tmp_path / "out")]
    assert cli.main(["train", "--data", str(finished.parent / "text"), *out, *small, *flags]) in (
        1,
        2,
    )
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not any(tmp_path.iterdir())
