"""A converted folder in mlx-lm's own commands, with nothing of this package importable.

``MLX_LM_PYTHONS`` names the interpreters to use, separated by colons: CI gives one with the oldest
mlx-lm that the package allows and one with the newest. Default: this one, our package hidden.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import reference
from converted import made
from factory import make_checkpoint, make_llama
from serving import serving

import mlx_skipless
from mlx_skipless.conversion.convert import convert

PYTHONS = os.environ.get("MLX_LM_PYTHONS", sys.executable).split(":")
TEXTS = ["the king rode out", "a fox met a crow", "once there was a mill", "she ran to the well"]


@pytest.fixture(params=PYTHONS, ids=range(len(PYTHONS)))
def python(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("source")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    return folder, *make_checkpoint(
        folder, norm="qkv", gains=True, linear_paths=True, skips=("query", "head", "output"),
        per_channel=None, bias=("down_proj",), **sizes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "qp"
    convert(source[0], out, remove="qp", verify=False)
    return out


SESSION = """
import json, runpy, sys, traceback
sys.modules["mlx_skipless"] = None
for command in json.loads(sys.argv[1]):
    sys.argv = command
    sys.stderr.flush()
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    print("END OF COMMAND", flush=True)
"""


def run(python: str, folder: Path, *commands: tuple[str | Path, ...]) -> list[str]:
    """``python -m`` each of these in ``folder`` without this package; what each prints.

    They share a process, for all that takes time is to start one.
    """
    asked = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run(
        [python, "-c", SESSION, asked],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout
    assert "using a model of type" not in done.stdout  # transformers' warning
    *printed, _ = done.stdout.split("END OF COMMAND\n")
    assert len(printed) == len(commands)
    return printed


def mlx_lm(command: str, model: Path | str, *arguments: str | Path) -> tuple[str | Path, ...]:
    return "mlx_lm", command, "--model", model, "--trust-remote-code", *arguments


LOGITS = """
import json, sys
import mlx.core as mx
from mlx_lm import load
model, tokenizer = load(sys.argv[1], trust_remote_code=True)
tokens = json.loads(sys.argv[2])
print("LOGITS", json.dumps(model(mx.array(tokens)).astype(mx.float32).tolist()))
"""


def test_load_gives_the_sources_logits(python: str, source, folder: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, (1, 8))
    (tmp_path / "logits.py").write_text(LOGITS)
    (printed,) = run(python, tmp_path, ("logits", folder, json.dumps(tokens.tolist())))
    line = next(x for x in printed.splitlines() if x.startswith("LOGITS"))
    got = np.array(json.loads(line.removeprefix("LOGITS")))
    expected = reference.logits(source[1], source[2], tokens)
    assert reference.worst_relative_error(expected, got) <= 1e-5


def test_load_refuses_without_trust(python: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "refused.py").write_text(
        "import sys\nfrom mlx_lm import load\n"
        "try: load(sys.argv[1])\nexcept ValueError as error: print('REFUSED', error)\n"
    )
    (printed,) = run(python, tmp_path, ("refused", folder))
    assert "REFUSED" in printed


def test_generate(python: str, folder: Path, tmp_path: Path) -> None:
    """With a cache of 8 bits too; and whatever a stock model drafts, the answer is the same."""
    make_llama(tmp_path / "draft")
    ask = mlx_lm("generate", folder, "--prompt", "the king", "--max-tokens", "12")
    plain, quantized, drafted = run(
        python, tmp_path,
        ask,
        (*ask, "--kv-bits", "8", "--kv-group-size", "32"),
        (*ask, "--num-draft-tokens", "3", "--draft-model", tmp_path / "draft"),
    )  # fmt: skip
    assert all("Generation: 12 tokens" in printed for printed in (plain, quantized, drafted))
    assert plain.split("=" * 10)[1] == drafted.split("=" * 10)[1]


def test_lora_then_fuse_then_quantize(python: str, source, folder: Path, tmp_path: Path) -> None:
    """Adapters train, fuse into a model that still loads, and that one quantizes."""
    for part in ("train", "valid", "test"):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    training = ("--train", "--data", tmp_path, "--iters", "4", "--batch-size", "2")
    training = (*training, "--grad-checkpoint")
    more = ("--num-layers", "3", "--adapter-path", "adapters", "--learning-rate", "1e-2")
    *_, printed = run(
        python, tmp_path,
        mlx_lm("lora", folder, *training, *more),
        mlx_lm("fuse", folder, "--adapter-path", "adapters", "--save-path", "fused"),
        mlx_lm("convert", "fused", "-q", "--q-bits", "8", "--mlx-path", "fused-q"),
        mlx_lm("generate", "fused-q", "--prompt", "a", "--max-tokens", "3"),
    )  # fmt: skip
    assert (tmp_path / "adapters/adapters.safetensors").exists()
    before = mx.load(str(folder / "model.safetensors"))
    after = mx.load(str(tmp_path / "fused/model.safetensors"))
    assert set(before) == set(after)
    assert any(mx.abs(before[name] - after[name]).max().item() > 0 for name in before)
    assert "Generation: 3 tokens" in printed


def test_perplexity(python: str, folder: Path, tmp_path: Path) -> None:
    """On a local data set; a random network of 264 tokens cannot be far from 264."""
    pytest.importorskip("datasets")
    for part in ("train", "valid", "test"):
        lines = [json.dumps({"text": " ".join(TEXTS * 4)}) + "\n" for _ in range(4)]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    sampling = ("--num-samples", "4", "--sequence-length", "32", "--batch-size", "2")
    (printed,) = run(
        python, tmp_path, mlx_lm("perplexity", folder, "--data-path", tmp_path, *sampling)
    )
    line = next(x for x in printed.splitlines() if x.startswith("Perplexity:"))
    assert 20 < float(line.split()[1]) < 5000


def test_quantizing_protects_what_an_inverse_magnifies(
    python: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """mlx-lm's own quantization asks the model: matrices around a removed Q keep more bits."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    make_checkpoint(tmp_path / "s", norm="qkv", spread=2.0, **sizes)
    convert(tmp_path / "s", tmp_path / "qp", remove="qp", verify=False)
    run(python, tmp_path, mlx_lm("convert", tmp_path / "qp", "-q", "--mlx-path", "q4"))
    settings = json.loads((tmp_path / "q4/config.json").read_text())["quantization"]
    stored = mx.load(str(tmp_path / "q4/model.safetensors"))
    path = "model.layers.1.self_attn.kv_proj"
    assert path in settings or f"{path}.scales" not in stored
    assert not isinstance(settings.get(path), dict) or settings[path]["bits"] > 4
    assert "model.layers.1.mlp.gate_up_proj" not in settings
    assert "model.layers.1.mlp.gate_up_proj.scales" in stored


@pytest.fixture
def server(python: str, folder: Path, tmp_path: Path) -> Iterator[str]:
    with serving(folder, tmp_path / "log", python) as (url, _):
        yield url


@pytest.mark.parametrize(
    "kind", ["folded, attention dropped", "quantized table", "no attention 1, 2"]
)
def test_server_says_what_we_say(kind: str, python: str, tmp_path: Path) -> None:
    """An architecture of mlx-lm's own, without trust, ours in 4 bits, and ours with few caches."""
    openai = pytest.importorskip("openai")
    trust = "folded" not in kind
    if not trust:
        make_llama(tmp_path / "s", intermediate_size=256)
        report = convert(
            tmp_path / "s", tmp_path / kind, drop_attention=1, fold_norms=True, verify=False
        )
        assert report.stock and report.folded
    else:
        made(tmp_path, kind)
    with serving(tmp_path / kind, tmp_path / "log", python, trust=trust) as (url, _):
        client = openai.OpenAI(base_url=url, api_key="none", timeout=120)
        for text in TEXTS[:2]:
            answer = client.chat.completions.create(
                model="default_model",
                messages=[{"role": "user", "content": text}],
                max_tokens=16,
                temperature=0,
            )
            own = mlx_skipless.generate(tmp_path / kind, None, text, max_tokens=16)
            assert answer.choices[0].message.content == own.text


def test_server_answers_the_openai_client(server: str) -> None:
    """One by one, and eight at once, half of them streamed: the same answers."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server, api_key="none", timeout=120)
    asked = {"model": "default_model", "max_tokens": 6, "temperature": 0}

    def ask(text: str) -> str:
        answer = client.chat.completions.create(
            messages=[{"role": "user", "content": text}], **asked
        )
        assert 1 <= answer.usage.completion_tokens <= 6
        return answer.choices[0].message.content

    def stream(text: str) -> str:
        pieces = client.chat.completions.create(
            messages=[{"role": "user", "content": text}], stream=True, **asked
        )
        return "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)

    alone = [ask(text) for text in TEXTS]
    with concurrent.futures.ThreadPoolExecutor(2 * len(TEXTS)) as pool:
        answers = [pool.submit(way, text) for way in (ask, stream) for text in TEXTS]
        assert [answer.result() for answer in answers] == 2 * alone
