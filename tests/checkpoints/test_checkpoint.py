"""What opening a model gives: a blueprint where there are no weights, else a checkpoint."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from factory import make_llama
from zoo import make_model

from mlx_skipless.checkpoints.checkpoint import Blueprint, Checkpoint, open_checkpoint
from mlx_skipless.conversion.convert import convert
from mlx_skipless.errors import UserError


def test_a_config_alone_is_a_blueprint_of_the_same_network(tmp_path: Path) -> None:
    make_llama(tmp_path, dtype="float16")
    whole = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for source in (tmp_path, tmp_path / "config.json"):
        alone = open_checkpoint(source, config_only=True)
        assert type(alone) is Blueprint and type(whole) is Checkpoint
        assert (alone.args, alone.dtype, alone.packing) == (whole.args, mx.float16, None)
        assert alone == Blueprint(str(source), whole.config, whole.family, whole.args)


def test_without_leave_a_config_alone_is_refused(tmp_path: Path) -> None:
    make_llama(tmp_path)
    with pytest.raises(UserError, match="a config without weights"):
        open_checkpoint(tmp_path / "config.json")


def test_weights_that_are_there_are_opened_with_the_config(tmp_path: Path) -> None:
    make_llama(tmp_path)
    assert isinstance(open_checkpoint(tmp_path, config_only=True), Checkpoint)


def test_a_tied_head_of_its_own_is_not_left_out_in_silence(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    config = json.loads((file := tmp_path / "model/config.json").read_text())
    file.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded: Any = mx.load(str(path := tmp_path / "model/model.safetensors"))
    weights: dict[str, mx.array] = dict(loaded)
    embedding = weights["model.embed_tokens.weight"]
    for head, other in (
        (embedding.at[3, 5].add(0.5), True),
        (embedding[:-1], True),
        (embedding, False),
    ):
        mx.save_safetensors(str(path), weights | {"lm_head.weight": head})
        report = convert(tmp_path / "model", dry_run=True)
        assert any("lm_head.weight, which is another" in note for note in report.notes) == other
