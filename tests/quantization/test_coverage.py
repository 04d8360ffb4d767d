"""What is said about bits, against what lies in the files."""

import json
from pathlib import Path
from typing import Any

import architectures
import mlx.core as mx
import pytest
from factory import make_checkpoint, make_llama
from grids import only

import mlx_skipless
from mlx_skipless.network.model import FUSED, Model, ModelArgs
from mlx_skipless.quantization.coverage import find_widths

GROUPS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
OPTIONS: list[dict[str, Any]] = [
    {"quantize": True},
    {"quantize": True, "q_group_size": 32},
    {"quantize": True, "q_group_size": 128},
    {"quantize": True, "q_mode": "nvfp4"},
    {"target_bytes": 10**7},
    {"quantize": True, "distill": 1},
    {"quantize": True, "q_mode": "mxfp4"},
    {"quantize": True, "q_mode": "mxfp8"},
    {"target_kl": 0.5},
]
SIZES = [(96, 160, 6), (64, 80, 4), (72, 144, 6), (40, 72, 2)]  # hidden, ffn, heads


def is_divided(options: dict[str, Any], widths: tuple[int, ...]) -> bool:
    size = options.get("q_group_size") or GROUPS.get(options.get("q_mode", ""), 64)
    return any(width % size == 0 for width in widths)


REFUSED = [
    (sizes, options) for options in OPTIONS for sizes in SIZES if not is_divided(options, sizes[:2])
]


@pytest.mark.parametrize("case", only(REFUSED[::3], REFUSED), ids=str)
def test_what_no_group_divides_is_refused(
    case: tuple[tuple[int, int, int], dict[str, Any]], tmp_path: Path
) -> None:
    """It names every width, and what it advises works."""
    (hidden, inner, heads), options = case
    make_llama(
        tmp_path / "s", hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=heads, num_hidden_layers=1,
    )  # fmt: skip
    with pytest.raises(mlx_skipless.UserError) as refused:
        mlx_skipless.convert(tmp_path / "s", tmp_path / "o", **options)
    said = str(refused.value)
    assert f"{hidden} or {inner} inputs" in said and "\n" not in said
    assert not (tmp_path / "o").exists()
    words = said.split()
    if "--q-group-size" in said:
        advised = {"q_group_size": int(words[words.index("--q-group-size") + 1])}
    elif "--q-mode" in said:
        advised = {"q_mode": words[words.index("--q-mode") + 1]}  # type: ignore[dict-item]
    else:
        assert hidden % 16 and inner % 16 and "dense" in said
        return
    plan = mlx_skipless.convert(tmp_path / "s", dry_run=True, quantize=True, **advised)  # type: ignore[arg-type]
    assert plan.packings


CASES: list[dict[str, Any]] = [
    {"hidden_size": 64, "intermediate_size": 80},
    {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6},
    {"hidden_size": 64, "intermediate_size": 80, "skipless": "mixtral"},
    {"hidden_size": 64, "intermediate_size": 80, "tie_word_embeddings": True},
]


WRITTEN = [
    (case, options)
    for case in CASES
    for options in OPTIONS
    if is_divided(options, (case["hidden_size"], case["intermediate_size"]))
    and not (options.get("distill") and "skipless" in case)
]
FEW = [
    (CASES[0], OPTIONS[0]),
    (CASES[1], OPTIONS[2]),
    (CASES[2], OPTIONS[0]),
    (CASES[3], OPTIONS[4]),
]


@pytest.mark.parametrize("case", only(FEW, WRITTEN), ids=str)
def test_what_is_said_is_in_the_files(
    case: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    """Formats and their counts, the mean of bits, which matrices stay, and the config."""
    network, options = case
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2} | network
    if family := sizes.pop("skipless", None):
        architectures.make(tmp_path / "s", family, **sizes)
        options = options | {"skipless": True}
    else:
        make_checkpoint(tmp_path / "s", norm="qkv", **sizes)
    if "target_bytes" in options:
        plain = {key: options[key] for key in options if key == "skipless"}
        plan = mlx_skipless.convert(
            tmp_path / "s", dry_run=True, quantize=True, remove="p", **plain
        )
        options = options | {"target_bytes": plan.bytes_after}
    out = tmp_path / "o"
    report = mlx_skipless.convert(tmp_path / "s", out, remove="p", **options)
    stored: Any = mx.load(str(out / "model.safetensors"))
    config = json.loads((out / "config.json").read_text())
    formats: dict[tuple[str, int, int], int] = {}
    dense = []
    for path in find_widths(Model(ModelArgs.from_dict(config))):
        if f"{path}.scales" in stored:
            own = config["quantization"].get(path, config["quantization"])
            key = own["mode"], own["bits"], own["group_size"]
            parts = FUSED.get(path.rpartition(".")[2], (path,))
            formats[key] = formats.get(key, 0) + len(parts)
            groups = stored[f"{path}.scales"].shape[-1]
            assert stored[f"{path}.weight"].shape[-1] * 32 == own["bits"] * groups * key[2]
        else:
            name = path.rpartition(".")[2]
            dense += FUSED.get(name, (name,))
    assert {(p.mode, p.bits, p.group_size): p.matrices for p in report.packings} == formats
    bits = 8 * sum(array.nbytes for array in stored.values()) / report.params_after
    assert report.bits_per_weight == pytest.approx(bits)
    card = (out / "README.md").read_text()
    assert f"{bits:.2f} bits per weight" in card
    for (mode, width, size), count in formats.items():
        assert f"{count} matri" in card and f"to {width} bits ({mode}, groups of {size})" in card
    notes = [note for note in report.notes if "stay in float32" in note]
    assert bool(notes) == bool(dense)
    assert all(name in notes[0] for name in dense)


def test_a_config_names_no_bits_where_a_drop_leaves_nothing_packed(tmp_path: Path) -> None:
    """Only the FFNs' last matrices could be packed, and they go."""
    make_llama(tmp_path / "s", hidden_size=72, intermediate_size=144, num_attention_heads=6)
    report = mlx_skipless.convert(
        tmp_path / "s", tmp_path / "o", quantize=True, q_mode="nvfp4", drop_ffn=3, verify=False
    )
    assert report.quantization is None and not report.packings
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert not [key for key in config if key.startswith("quantiz")]
    assert "bits per weight" not in (tmp_path / "o/README.md").read_text()
