"""Which files a model consists of: the same wherever it is read. What is no model is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from factory import make_checkpoint, make_llama

from mlx_skipless import UserError, convert
from mlx_skipless.checkpoints.checkpoint import open_checkpoint
from mlx_skipless.checkpoints.safetensors import INDEX, WHOLE
from mlx_skipless.evaluation.analysis import analyze
from mlx_skipless.inference.loading import load_network
from mlx_skipless.inference.stock import find_stock

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOKENS = mx.array([[1, 2, 3, 4]])
Tensors = dict[str, mx.array]


@pytest.fixture(params=[make_llama, make_checkpoint], ids=["stock", "skipless"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of mlx-lm's own code, or of this package's."""
    request.param(tmp_path / "model", **SMALL)
    return tmp_path / "model"


def read_file(file: Path) -> Tensors:
    found: Any = mx.load(str(file))
    mx.eval(found)
    return found


def take_apart(folder: Path, names: list[str], index: bool = True) -> Tensors:
    """Spread a model's tensors over files of these names; return them."""
    tensors = read_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    parts = [dict([*tensors.items()][i :: len(names)]) for i in range(len(names))]
    for name, part in zip(names, parts, strict=True):
        mx.save_safetensors(str(folder / name), part)
    if index:
        write_index(folder, {t: n for n, part in zip(names, parts, strict=True) for t in part})
    return tensors


def write_index(folder: Path, names: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def read_both(folder: Path) -> tuple[mx.array, Tensors]:
    """What the loader's network says, and what the converter's reader reads."""
    checkpoint = open_checkpoint(folder)
    return load_network(folder)[0](TOKENS), checkpoint.read(checkpoint.store.shapes)


def assert_same(folder: Path, expected: tuple[mx.array, Tensors]) -> None:
    logits, tensors = read_both(folder)
    assert mx.array_equal(logits, expected[0]).item()
    assert tensors.keys() == expected[1].keys()
    assert all(mx.array_equal(tensors[n], a).item() for n, a in expected[1].items())


def assert_refused(folder: Path, said: str) -> None:
    for read in (load_network, open_checkpoint):
        with pytest.raises(UserError) as refusal:
            read(folder)
        assert said in str(refusal.value)


STRAYS = [
    "model-00001-of-00004.safetensors",
    "model-00003-of-00003.safetensors",
    "model_old.safetensors",
    "model-1.safetensors",
    "model.bf16.safetensors",
    "model.safetensors",
    "consolidated.safetensors",
]


def test_what_the_index_does_not_name_is_no_part_of_a_model(model: Path):
    expected = read_both(model)
    tensors = take_apart(model, ["model-1-of-2.safetensors", "model-2-of-2.safetensors"])
    for name in STRAYS:
        mx.save_safetensors(str(model / name), {n: -array for n, array in tensors.items()})
    os.mkfifo(model / "model-x.safetensors")
    (model / "model-y.safetensors").symlink_to("nowhere")
    (model / "model-z.safetensors").write_text("no safetensors")
    assert_same(model, expected)
    for there in (True, False):
        stock = find_stock(model, any_family=True)
        for read in (open_checkpoint(model), *([] if stock is None else [stock])):
            assert any("which is there too" in note for note in read.notes) is there
        (model / WHOLE).unlink(missing_ok=True)


def test_lazy_weights_come_from_the_same_files(model: Path):
    expected = load_network(model)[0](TOKENS)
    tensors = take_apart(model, ["part.safetensors"])
    mx.save_safetensors(str(model / WHOLE), {n: -array for n, array in tensors.items()})
    loaded = load_network(model, lazy=True)[0]
    assert mx.array_equal(loaded(TOKENS), expected).item()


@pytest.mark.parametrize("folder", ["model", "a[1]*?"])
def test_shards_may_have_any_name_and_the_folder_too(model: Path, folder: str):
    expected = read_both(model)
    take_apart(model, ["layers-0.safetensors", "b[1]*.safetensors", "é x.safetensors"])
    model = model.rename(model.with_name(folder))
    assert_same(model, expected)
    if folder != "model":
        convert(model, model.with_name("out[1]"), remove="none")


def test_an_index_none_of_whose_files_is_there_is_left_over(model: Path):
    expected = read_both(model)
    tensors = read_file(model / WHOLE)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write_index(model, {name: names[i % 2] for i, name in enumerate(tensors)})
    assert_same(model, expected)
    (model / WHOLE).rename(model / "model-00001-of-00001.safetensors")
    assert_refused(model, f"lacks {names[0]} and 1 more, which its index names: download it again")
    assert_refused(model, f"delete {INDEX} if it is left over")
    mx.save_safetensors(str(model / WHOLE), tensors)
    mx.save_safetensors(str(model / names[1]), tensors)
    assert_refused(model, f"lacks {names[0]}, which its index names: download it again")


def test_without_an_index_no_tensor_may_come_twice(model: Path):
    mx.save_safetensors(str(model / "model-x.safetensors"), read_file(model / WHOLE))
    assert_refused(model, "model.safetensors and in model-x.safetensors")


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_plan_needs_no_whole_download(model: Path, left: int):
    """What is planned is the same with all shards, one, one half, or none."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    take_apart(model, names)
    whole = convert(model, dry_run=True)
    if left < 2:
        (model / names[1]).unlink()
        os.truncate(model / names[0], 1000) if left == 0 else None
    partial = convert(model, dry_run=True)
    assert (partial.removed, partial.params_after) == (whole.removed, whole.params_after)
    said = [note for note in partial.notes if "planned from config.json alone" in note]
    assert len(said) == (left < 2)
    if left < 2:
        assert_refused(model, names[1])


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 493443\n"


@pytest.mark.parametrize(
    "name",
    [WHOLE, INDEX, "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"],
)
def test_a_pointer_of_git_lfs_is_called_by_its_name(model: Path, name: str):
    (model / name).write_text(POINTER)
    assert_refused(model, f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`")


def test_a_pointer_in_the_place_of_a_gguf_file(tmp_path: Path):
    (tmp_path / "model.gguf").write_text(POINTER)
    with pytest.raises(UserError, match=r"model\.gguf is a Git LFS pointer"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["tale.txt", "tales.jsonl"])
def test_a_pointer_in_the_place_of_a_text(model: Path, name: str):
    (model / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        convert(model, model.with_name("out"), calibration=str(model / name))


@pytest.mark.parametrize(
    ("names", "config", "said"),
    [
        (["adapters.safetensors"], {"model": "a/b"}, "mlx_lm.fuse --model a/b --adapter-path"),
        (["adapters.safetensors"], {}, "mlx_lm.fuse --model MODEL --adapter-path"),
        ([], {"model": [1]}, "mlx_lm.fuse --model MODEL"),
        (
            ["adapter_model.safetensors"],
            {"base_model_name_or_path": "a/b"},
            "merge them into a/b with PEFT's",
        ),
        (["adapter_model.bin"], {"base_model_name_or_path": 5}, "merge them into MODEL with"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_adapters_without_a_model_are_called_by_their_name(
    model: Path, names: list[str], config: dict[str, Any], said: str, beside: bool
):
    (model / WHOLE).unlink()
    if not beside:
        (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps(config))
    for name in names:
        (model / name).write_bytes(b"weights")
    assert_refused(model, f"{model} holds LoRA adapters and no model: ")
    assert_refused(model, said)


@pytest.mark.parametrize("beside", [False, True])
def test_a_model_in_its_authors_format(model: Path, beside: bool):
    """Mistral's and Meta's, of which repositories may hold nothing else."""
    (model / WHOLE).rename(model / "consolidated.safetensors")
    (model / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 2}))
    (model / "SYSTEM_PROMPT.txt").write_text("Be kind.")
    if not beside:
        (model / "config.json").unlink()
    assert_refused(model, "give the same model in Hugging Face's, with config.json and model*.saf")


LEFT_OVER: list[dict[str, Any]] = [
    {"quantization": {}},
    {"quantization_config": {}},
    {"quantization": {"group_size": 64, "bits": 4}},
    {"quantization": {"group_size": 32, "bits": 4, "model.layers.0.mlp.up_proj": {"bits": 8}}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    {"quantization_config": {"quant_method": "awq", "bits": 4}},
    {"quantization_config": {"quant_method": "fp8"}},
    {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    {"quantization_config": {"quant_method": "bitnet"}},
    {"quantization_config": {"bits": 4}},
]


@pytest.mark.parametrize("left_over", LEFT_OVER, ids=str)
def test_a_quantization_of_which_no_tensor_knows_is_passed_over(
    model: Path, left_over: dict[str, Any]
):
    expected = read_both(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | left_over))
    assert_same(model, expected)
    assert open_checkpoint(model).packing is None
    if left_over == LEFT_OVER[4]:  # nor has the result one
        convert(model, model.with_name("out"), remove="none", verify=False)
        assert "bitsandbytes" not in (model.with_name("out") / "config.json").read_text()


def test_an_analysis_is_of_one_model(tmp_path: Path):
    make_checkpoint(tmp_path, **SMALL)
    file = tmp_path / WHOLE

    def change(stage: str, done: int, total: int) -> None:
        if done == 1:
            file.write_bytes(file.read_bytes())

    with pytest.raises(UserError, match=f"{file} changed while it was read"):
        analyze(tmp_path, progress=change)
