"""The catalogue against what others have published."""

import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from zoo import CANNOT, CONFIGS

from mlx_skipless.architectures.families import FAMILIES
from mlx_skipless.architectures.shapes import MODELS
from mlx_skipless.architectures.wrappers import WRAPPERS
from mlx_skipless.cli.main import main
from mlx_skipless.evaluation import catalogue
from mlx_skipless.evaluation.analysis import BATCHES, analyze, measure_removal
from mlx_skipless.removal import table as first_layer

# Hugging Face's counts of each repository's parameters; Pythia's and GPT-J's are on their cards.
PUBLISHED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "SmolLM2-135M": 134_515_008,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-12B": 12_247_782_400,
    "Ministral-8B": 8_019_808_256,
    "Mistral-Small-3.2-24B": 23_572_403_200,
    # The cards count the language models apart: 3.4, 8.4, 13.5 and 24 billion.
    "Ministral-3-3B": 3_429_006_336,
    "Ministral-3-8B": 8_489_553_920,
    "Ministral-3-14B": 13_506_073_600,
    "Devstral-Small-2-24B": 23_572_403_200,
    "Mixtral-8x7B": 46_702_792_704,
    "Gemma-2B": 2_506_172_416,
    "Gemma-7B": 8_537_680_896,
    "Pythia-6.9B": 6_857_302_016,
    "GPT-J-6B": 6_050_882_784,
    "Command R (PaLM's block)": 34_980_831_232,
    "Phi-2": 2_779_683_840,
    "Qwen2-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-0.6B": 596_049_920,
}
DOCUMENT = Path(__file__).parents[2] / "docs/architectures.md"


def test_every_family_is_there() -> None:
    """Every one but this package's own format."""
    there = {config["model_type"] for config in MODELS.values()}
    assert there == FAMILIES.keys() - {"skipless"}


@pytest.mark.parametrize(
    ("name", "total", "gone", "share", "speedup"),
    [("Mistral-7B-v0.1", 7.2, 6.2, 15, 1.17), ("Pythia-6.9B", 6.9, 5.8, 16, 1.19)],
)
def test_the_table_of_kv_weights_are_all_you_need(
    name: str, total: float, gone: float, share: float, speedup: float, tmp_path: Path
) -> None:
    """arXiv 2404.12362, section 3: Pythia as it would be trained without Q and P."""
    args = catalogue.read_catalogue_args(name)
    found = measure_removal(args, mx.bfloat16, "qp")
    if args.block == "serial":
        assert found.weights is not None and found.share is not None and found.speedup is not None
        assert round((PUBLISHED[name] - found.weights) / 1e9, 1) == gone
        assert round(100 * found.share) == share and round(found.speedup, 2) == speedup
    else:  # the paper's figures, and what exact merges leave of them
        assert found.obstacle is not None
        (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
        (note,) = [n for n in analyze(tmp_path / "config.json").notes if "trained without" in n]
        left, fewer, times = re.findall(r"([\d,.]+)(?: weights|% fewer| times)", note)
        assert round(int(left.replace(",", "")) / 1e9, 1) == gone
        assert round(float(fewer)) == share and float(times) == speedup
        one = measure_removal(args, mx.bfloat16, "q")
        assert one.weights == 32 * (4096 * 4096 + 4096)
    assert round(PUBLISHED[name] / 1e9, 1) == total


@pytest.mark.parametrize(
    ("name", "vocabulary", "matrices", "row", "times", "growth"),
    [
        ("Pythia-6.9B", 50_400, 184_549_376, 16_384, (11_264, 704, 44, 11), 434_765_824),
        ("Mistral-7B-v0.1", 32_000, 25_165_824, 10_240, (2_458, 154, 10, 3), 171_442_176),
    ],
)
def test_the_table_of_precomputing_the_first_layer(
    name: str, vocabulary: int, matrices: int, row: int, times: tuple[int, ...], growth: int
) -> None:
    """arXiv 2402.13388, section 3, which counts matrices alone, and 32 tokens less for Pythia."""
    table = first_layer.measure_table(
        replace(catalogue.read_catalogue_args(name), vocab_size=vocabulary)
    )
    assert (table.matrices, table.row) == (matrices, row)
    assert tuple(round(table.reads_before(n) / table.reads_after(n)) for n in BATCHES) == times
    assert table.growth + table.vectors == growth


@pytest.mark.thorough
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The document has the table that it prints, and its JSON says the same."""
    assert main(["architectures", "--json", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out.strip()
    table, paragraph = printed.rsplit("\n\n", 1)
    assert table.startswith("| model |") and table in DOCUMENT.read_text()
    others = (CONFIGS.keys() | CANNOT.keys()) - FAMILIES.keys() - WRAPPERS.keys()
    assert {*catalogue.list_other_types()} == others
    assert max(map(len, paragraph.splitlines())) < 80
    assert f"mlx-lm has {len(others)} more model types" in paragraph
    assert {*re.split(r"[\s,.:]+", paragraph)} > others
    models = json.loads((tmp_path / "a.json").read_text())["models"]
    assert {one["name"]: one["weights"] for one in models} == PUBLISHED
    by_name = {one["name"]: one for one in models}
    assert by_name["Mistral-Nemo-12B"]["removal"]["letters"] == "p"
    assert by_name["Gemma-7B"]["removal"] is None
    assert by_name["GPT-J-6B"]["kept"] == ["attention"]


@pytest.mark.parametrize(
    ("name", "suggested", "stock_drops"),
    [
        ("Llama-2-7B", "qp", True),
        ("Mistral-Nemo-12B", "p", False),
        ("Mixtral-8x7B", "qp", False),
        ("Gemma-7B", None, False),
        ("Pythia-6.9B", "q", False),
        ("Qwen3-0.6B", "k", False),
    ],
)
def test_what_a_dry_run_says_of_it(
    name: str,
    suggested: str | None,
    stock_drops: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every figure is whole, and the command that it suggests is not refused."""
    source = tmp_path / "config.json"
    source.write_text(json.dumps(MODELS[name]))
    assert main(["convert", "--model", str(source), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and f"{PUBLISHED[name]:,} weights before" in printed
    assert "the result runs in plain mlx-lm" in printed
    hint = re.search(r"--skipless --remove (\w+) shows", printed)
    assert (hint and hint[1]) == suggested
    if hint:
        flags = ["--skipless", "--remove", hint[1]]
        assert main(["convert", "--model", str(source), *flags, "--dry-run"]) == 0
    assert main(["convert", "--model", str(source), "--dry-run", "--drop-attention", "1"]) == 0
    reason = "no network of this architecture without some attentions" in capsys.readouterr().out
    assert reason is not stock_drops
