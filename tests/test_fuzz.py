"""Broken checkpoints by the thousand: converted rightly, or refused in one line, and nothing else.

`pytest tests/test_fuzz.py --thorough` tries 3 times as many, and
`--hypothesis-profile=endless` 2,500 times.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz_readers
import mlx.core as mx
import numpy as np
import pytest
import reference
import safetensors.numpy
from architectures import ARCHITECTURES, make
from factory import make_checkpoint
from fuzz_readers import TARGETS, attempt, mutant, mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_skipless import UserError, convert
from mlx_skipless.architectures.config import LIMITS
from mlx_skipless.conversion.report import Report
from mlx_skipless.inference.loading import load_network

MORE = {"thorough": 3, "endless": 2500}.get(settings.get_current_profile_name(), 1)
RANDOM = st.randoms(use_true_random=False)
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT = np.random.default_rng(0).integers(0, 256, (1, 8))


def cases(count: int) -> Callable[[Any], Any]:
    """So many examples, thoroughly many times as many: the same ones each time, unless endless."""
    tried = settings(
        max_examples=count * MORE,
        derandomize=settings.get_current_profile_name() != "endless",
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )
    return lambda test: pytest.mark.examples(tried(test))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No word on stderr, from whatever language, and no warning."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        os.dup2(file.fileno(), 2)
        try:
            with os.fdopen(os.dup(2), "w") as python, contextlib.redirect_stderr(python):
                yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        said = file.read()
        assert said == b"", said


def converted(folder: Path, **options: Any) -> tuple[Report, Path] | None:
    """What becomes of a model; None if it is refused, which leaves nothing."""
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    before = sorted(os.listdir(folder.parent))
    try:
        with silence():
            report = convert(folder, out, **options)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert sorted(os.listdir(folder.parent)) == before
        return None
    return report, out


@pytest.mark.parametrize(
    "seed",
    sorted(fuzz_readers.SEEDS.glob("*/*")),
    ids=lambda seed: f"{seed.parent.name} {seed.name}",
)
def test_seeds(seed: Path) -> None:
    """What was found before, and what comes into all corners."""
    with silence():
        attempt(seed.parent.name, seed.read_bytes())


@cases(400)
@given(st.sampled_from([*TARGETS]), RANDOM)
def test_mutants_of_every_file(target: str, rng: random.Random) -> None:
    data = rng.choice(fuzz_readers.starts(target))
    for _ in range(rng.choice([1, 1, 2, 4])):
        data = mutant(target, data, rng)
    with silence():
        attempt(target, data)


class Source:
    """A model in a folder of its own, and what `reference` makes of it."""

    def __init__(self, name: str):
        self.folder = fuzz_readers.place() / name.replace(" ", "-") / "model"
        if name in ARCHITECTURES:
            kind = ARCHITECTURES[name]
            layers = "n_layer" if "n_layer" in kind.config else "num_hidden_layers"
            self.mapped, self.weights = make(self.folder, name, **{layers: 2})
        else:
            self.mapped, self.weights = make_checkpoint(self.folder, **SKIPLESS[name])
        for file in self.folder.iterdir():  # a tokenizer would only take time
            if file.name not in ("config.json", "model.safetensors"):
                file.unlink()
        self.name = name
        self.config = json.loads((self.folder / "config.json").read_text())
        self.bytes = (self.folder / "model.safetensors").read_bytes()
        self.tensors = dict(sorted(safetensors.numpy.load(self.bytes).items()))

    def write(self, config: Any = None, tensors: dict[str, np.ndarray] | None = None) -> None:
        """The model, with another config or other tensors."""
        (self.folder / "config.json").write_text(json.dumps(config or self.config))
        data = self.bytes if tensors is None else safetensors.numpy.save(tensors)
        (self.folder / "model.safetensors").write_bytes(data)

    def stored(self, weights: reference.Weights) -> dict[str, np.ndarray]:
        """Canonical weights, gains as they act, as the source's files have them."""
        kind = ARCHITECTURES.get(self.name)
        if kind is not None:
            norms = [n for n in weights if n.endswith("norm.weight")]
            weights = weights | {n: weights[n] - kind.gain_offset for n in norms}
            weights = kind.theirs(self.mapped, weights)
        with np.errstate(over="ignore"):
            return {name: values.astype(np.float32) for name, values in weights.items()}


SKIPLESS: dict[str, dict[str, Any]] = {
    "skipless": SIZES | {"norm": "qkv", "gains": True, "linear_paths": True, "bias": ("q_proj",)},
    "skips": SIZES
    | {
        "norm": "qkv",
        "norms": ["q", "v", "kv"],
        "gains": True,
        "skips": ("query", "head", "output"),
    },
    "parallel": SIZES
    | {"block": "parallel", "norm": "qkv", "skips": ("head",), "per_channel": True},
    "bare": SIZES | {"num_key_value_heads": 4},
    "tied": SIZES | {"skip": "ffn", "norm": "qkv", "tie_word_embeddings": True},
}
source = functools.cache(Source)
SOURCES = st.sampled_from([*SKIPLESS, *ARCHITECTURES])
OPTIONS = st.sampled_from(
    [
        {},
        {},
        {"remove": "none"},
        {"remove": "qp"},
        {"remove": "p"},
        {"remove": "kp"},
        {"skipless": True},
        {"skipless": True, "remove": "qp"},
        {"fold_norms": True},
        {"dtype": "bfloat16"},
        {"dtype": "float16", "remove": "p"},
        {"quantize": True},
        {"quantize": True, "q_group_size": 32, "remove": "p"},
        {"precompute_first_layer": "force"},
        {"drop_attention": 1},
        {"drop_block": 1},
    ]
)
APPROXIMATE = ("dtype", "quantize", "drop_attention", "drop_block")


def check(report: Report, out: Path, options: dict[str, Any], most: float = 1e-3) -> np.ndarray:
    """A result that was written is no further from its source than that; its logits of TEXT."""
    found = report.verification
    assert found is not None and np.isfinite([found.max_rel_logit_error, found.kl]).all()
    if not set(options) & {*APPROXIMATE} and not report.warnings:
        assert found.max_rel_logit_error < most
    with silence():
        model = load_network(out)[0]
        model.set_dtype(mx.float32)  # MLX knows experts in no other type, on a CPU
        return np.array(model(mx.array(TEXT)).astype(mx.float32))


@cases(60)
@given(SOURCES, OPTIONS, RANDOM)
def test_mutated_configs(name: str, options: dict[str, Any], rng: random.Random) -> None:
    config = source(name).config
    for _ in range(rng.choice([1, 1, 2, 4])):
        config = mutated(config, rng)
    source(name).write(config)
    with mock.patch.dict(LIMITS, num_hidden_layers=fuzz_readers.LAYERS):
        outcome = converted(source(name).folder, **options)
    if outcome is not None:
        check(*outcome, options)


@cases(60)
@given(SOURCES, RANDOM)
def test_mutated_configs_are_loaded_or_refused(name: str, rng: random.Random) -> None:
    """What loads also runs."""
    config = source(name).config
    for _ in range(rng.choice([1, 1, 2, 4])):
        config = mutated(config, rng)
    source(name).write(config)
    with (
        contextlib.suppress(UserError),
        silence(),
        mock.patch.dict(LIMITS, num_hidden_layers=fuzz_readers.LAYERS),
    ):
        mx.eval(load_network(source(name).folder)[0](mx.array(TEXT)))


def disturbed(tensors: dict[str, np.ndarray], rng: random.Random) -> dict[str, np.ndarray]:
    """A set of tensors with one of them gone, or called, shaped or stored otherwise."""
    name, other = rng.choice([*tensors]), rng.choice([*tensors])
    rest, array = dict(tensors), tensors[name]
    how = rng.randrange(5)
    if how == 0:
        del rest[name]
    elif how == 1:
        rest[renamed(name, rng)] = rest.pop(name)
    elif how == 2:
        rest[renamed(name, rng)] = array
    elif how == 3:
        rest[name], rest[other] = rest[other], rest[name]
    else:
        rest[name] = reshaped(array, rng)
    return rest


def renamed(name: str, rng: random.Random) -> str:
    parts = name.split(".")
    at = rng.randrange(len(parts))
    parts[at] = rng.choice(
        ["0", "1", "2", "00", "9" * 30, "bias", "weight", "scales", "q_proj", "", "\n", "lm_head"]
    )
    return rng.choice([".".join(parts), ".".join(parts[:at]), f"model.{name}", f"{name} "])


def reshaped(array: np.ndarray, rng: random.Random) -> np.ndarray:
    ways: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda a: a.T,
        lambda a: a[None],
        lambda a: a.reshape(-1),
        lambda a: a[:-1],
        lambda a: a[..., 1:],
        lambda a: a[:0],
        lambda a: np.concatenate([a, a]),
        lambda a: np.array(1.0, np.float32),
        lambda a: a.astype(rng.choice([np.float16, np.float64, np.int32, np.uint8, np.bool_])),
    ]
    return np.ascontiguousarray(rng.choice(ways)(array))


@cases(60)
@given(SOURCES, OPTIONS, RANDOM)
def test_other_sets_of_tensors(name: str, options: dict[str, Any], rng: random.Random) -> None:
    tensors = source(name).tensors
    for _ in range(rng.choice([1, 1, 2])):
        tensors = disturbed(tensors, rng)
    source(name).write(None, tensors)
    outcome = converted(source(name).folder, **options)
    if outcome is not None:
        check(*outcome, options)


def spoiled(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """Values that no training leaves behind, or hardly any."""
    new = array.copy()
    how = rng.randrange(6)
    if how == 0:
        new.reshape(-1)[rng.randrange(new.size)] = rng.choice([np.nan, np.inf, -np.inf])
    elif how == 1:
        new.reshape(-1)[rng.randrange(new.size)] = rng.choice([1e5, -1e20, 3e38, 1e-40])
    elif how == 2:
        new *= rng.choice([0.0, 1e-30, 1e-10, 1e-3, -1.0, 1e3, 1e10, 1e30])
    elif how == 3:
        new[rng.randrange(len(new))] = new[rng.randrange(len(new))]
    elif how == 4:
        new[...] = rng.choice([0.0, 1.0, -2.5])
    else:
        new += 1e-6 * np.random.default_rng(rng.randrange(9)).standard_normal(new.shape)
    return new


def has_ties(weights: dict[str, np.ndarray]) -> bool:
    """Whether a router scores two experts alike, whatever it reads."""
    routers = [values for name, values in weights.items() if name.endswith("router.weight")]
    return any(len(np.unique(rows, axis=0)) < len(rows) for rows in routers)


@cases(60)
@given(SOURCES, OPTIONS, RANDOM)
def test_spoiled_values(name: str, options: dict[str, Any], rng: random.Random) -> None:
    weights = dict(source(name).weights)
    for tensor in rng.sample([*weights], rng.choice([1, 1, 2])):
        weights[tensor] = spoiled(weights[tensor], rng)
    weights = {n: v.astype(np.float32).astype(np.float64) for n, v in weights.items()}
    source(name).write(None, source(name).stored(weights))
    outcome = converted(source(name).folder, **options)
    if outcome is None:
        return
    assert all(np.isfinite(values).all() for values in weights.values())
    found = check(*outcome, options, most=0.1)  # of large numbers float32 keeps few digits
    if outcome[0].warnings or set(options) & {*APPROXIMATE, "skipless"}:
        return
    if has_ties(weights):
        return  # which of two experts goes first is nobody's to say
    if max(np.abs(values).max() for values in weights.values()) > 1e8:
        return  # norms square what products made of it, beyond float32
    with np.errstate(all="ignore"):
        expected = reference.logits(source(name).mapped, weights, TEXT)
    assert outcome[0].verification is not None
    allowed = max(1e-3, 10 * outcome[0].verification.max_rel_logit_error)
    largest = np.abs(expected).max(axis=-1)  # 0 where the head is
    # Where one token's logits cancel, the rounding of terms as large as other tokens' is left;
    # of numbers below float32's smallest nothing is.
    below = max(1e-5 * largest.max(), np.finfo(np.float32).tiny)
    assert (np.abs(expected - found).max(axis=-1) <= allowed * largest + below).all()
