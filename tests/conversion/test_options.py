"""What can be asked of a conversion: the same in Python and on the command line."""

import dataclasses
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from factory import make_checkpoint

import mlx_skipless
from mlx_skipless import UserError, cli
from mlx_skipless.cli.main import main
from mlx_skipless.conversion.options import Options

GROUPS = ["options", "source and result", "exact", "approximate", "quantize", "check and report"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def test_options_do_not_wait_for_mlx() -> None:
    """So neither does a command's help."""
    code = "import sys, mlx_skipless.conversion.options; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "mlx_skipless" in loaded
    assert not loaded & {"mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub"}


def test_the_help_shows_every_field_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert re.findall(r"^([a-z ]+):(?! \S)", shown, re.MULTILINE) == [*GROUPS, "examples"]
    for field in dataclasses.fields(Options):
        flags = field.metadata["flags"] or [f"--{field.name.replace('_', '-')}"]
        start = shown.index(f"\n{field.metadata['group']}:")
        assert all(flag in shown[start:] for flag in flags), field.name


def test_what_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of flag arrives as the value that Python would give."""
    taken: list[Options] = []

    def convert(model: object, path: object, *, options: Options, **others: object) -> None:
        taken.append(options)
        raise UserError("enough")

    monkeypatch.setattr("mlx_skipless.conversion.convert.convert", convert)
    for flags, fields in (
        ("", {}),
        ("--model a/b --mlx-path c", {"model": "a/b", "mlx_path": "c"}),
        ("--hf-path a/b", {"model": "a/b"}),
        ("--no-verify --seed 3 --dry-run", {"verify": False, "seed": 3, "dry_run": True}),
        ("--precompute-first-layer", {"precompute_first_layer": "auto"}),
        ("--precompute-first-layer force", {"precompute_first_layer": "force"}),
        ("--drop-ffn 2 --greedy", {"drop_ffn": 2, "greedy": True}),
        ("--drop-block auto --max-loss 2%", {"drop_block": "auto", "max_loss": 0.02}),
        ("--drop-block auto --max-loss 0.02", {"drop_block": "auto", "max_loss": 0.02}),
        ("--target-bytes 1.5MB", {"target_bytes": 1_500_000}),
        ("--target-kl 0.1", {"target_kl": 0.1}),
        ("-q --q-bits 3 --q-group-size 32", {"quantize": True, "q_bits": 3, "q_group_size": 32}),
        ("--quantize --distill 20", {"quantize": True, "distill": 20}),
    ):
        assert cli.main(["convert", *flags.split()]) == 1
        assert taken.pop() == Options(**fields)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("target_bytes", "1.5MB", 1_500_000), ("target_speed", "3x", 3.0),
        ("max_loss", "2%", 0.02), ("target_bytes", "900", 900),
    ],
)  # fmt: skip
def test_python_may_say_what_flags_say(field: str, text: str, value: object) -> None:
    others = {"drop_ffn": "auto"} if field == "max_loss" else {}
    assert getattr(Options(**others, **{field: text}), field) == value  # type: ignore[arg-type]
    flag = f"--{field.replace('_', '-')}"
    with pytest.raises(UserError, match=f"{flag}: 'much' is n"):
        Options(**others, **{field: "much"})  # type: ignore[arg-type]


def test_options_as_one(tmp_path: Path) -> None:
    """Keywords go before the fields of the options that are given."""
    make_checkpoint(tmp_path / "s", norm="qkv", **SIZES)
    options = Options(tmp_path / "s", tmp_path / "out", remove="q", dry_run=True)
    assert [*mlx_skipless.convert(options=options).removed] == ["q"]
    assert [*mlx_skipless.convert(options=options, remove="p").removed] == ["p"]
    assert mlx_skipless.convert(options=options, dry_run=False, verify=False).output == str(
        tmp_path / "out"
    )
    with pytest.raises(UserError, match="exists already"):
        mlx_skipless.convert(options=options, dry_run=False)
    with pytest.raises(TypeError, match="removes"):
        mlx_skipless.convert(tmp_path / "s", removes="p")


def test_the_source_is_fetched_last(tmp_path: Path) -> None:
    """A user need not wait for gigabytes to learn that a path is wrong."""
    (tmp_path / "taken").mkdir()
    for fields, said in (
        ({"mlx_path": tmp_path / "taken"}, "exists already"),
        ({"mlx_path": tmp_path / "out", "calibration": tmp_path / "tale.txt"}, "--calibration"),
        ({"mlx_path": tmp_path / "out"}, "no-such-model"),
    ):
        with pytest.raises(UserError, match=said):
            mlx_skipless.convert(tmp_path / "no-such-model", **fields)


def test_the_card_tells_no_folder(tmp_path: Path) -> None:
    """Neither that of the model nor that of the text, which notes and figures name."""
    make_checkpoint(tmp_path / "s", norm="qkv", **SIZES)
    (tmp_path / "tale.txt").write_text("Once upon a time there was a miller. " * 900)
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "out", remove="p", quantize=True, q_group_size=32,
        calibration=tmp_path / "tale.txt",
    )  # fmt: skip
    assert any(str(tmp_path) in note for note in report.notes)
    card = (tmp_path / "out/README.md").read_text()
    assert "tokens (tale.txt)" in card and "from `s`" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("distill", "5", "a whole number"), ("heal", 1.5, "a whole number"),
        ("seed", None, "a whole number"), ("seed", "1", "a whole number"),
        ("q_bits", 4.0, "a whole number"), ("allow", ["drop"], "text"),
        ("dtype", mx.float16, "text"), ("target_bytes", math.nan, "a whole number"),
        ("target_kl", math.nan, "a number"), ("drop_attention", True, "a whole number or text"),
        ("quantize", 1, "true or false"), ("model", 3, "text or a path"),
    ],
)  # fmt: skip
def test_python_may_say_nothing_else(field: str, value: Any, wanted: str) -> None:
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} .*: must be {wanted}$"):
        Options(**{field: value})


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_is_more_than_nothing(size: int) -> None:
    with pytest.raises(UserError, match=f"--target-bytes {size}: must be at least 1"):
        Options(target_bytes=size)


def test_numbers_of_numpy_are_numbers() -> None:
    options = Options(q_bits=np.int64(4), quantize=True, max_loss=np.float32(0.5), drop_ffn="auto")  # type: ignore[arg-type]
    assert (options.q_bits, options.max_loss) == (4, 0.5)


def test_one_file_is_not_written_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{tmp_path}/a.png"
    flags = f"--target-bytes 1MB --allow drop --plot {name} --json {tmp_path}/./a.png"
    assert main(["convert", "--mlx-path", str(tmp_path / "out"), *flags.split()]) == 2
    assert "--plot and --json both name" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "target", [{"target_bytes": "40KB"}, {"target_kl": 0.1}, {"target_speed": 3}]
)
def test_a_plan_says_that_bits_are_not_chosen_yet(tmp_path: Path, target: dict[str, Any]) -> None:
    make_checkpoint(tmp_path / "s", norm="qkv", **SIZES)
    plan = partial(mlx_skipless.convert, tmp_path / "s", dry_run=True, q_group_size=32)
    flag = f"--{next(iter(target)).replace('_', '-')}"
    said = f"the bits of each matrix are measured when converting: .* not what {flag} makes"
    assert [note for note in plan(**target).notes if re.match(said, note)]
    assert not [note for note in plan(quantize=True).notes if "measured when" in note]
