"""Converted models over several processes, as mlx-lm loads them: by tensors and in a pipeline.

The processes are real and speak over the loopback ring.
"""

import json
from pathlib import Path

import pytest
from converted import MODELS, made
from launch import launch

WORKER = Path(__file__).parents[1] / "helpers/parallel_worker.py"
TIED = ("tied", "cohere")
MORE = (
    "table",
    "no attention 0",
    "gpt_neox",
    "qwen3",
    "growing queries",
)  # of parts that others have too
OF_THREE = ("qp", "tied", "no attention 1", "no attention 1, 2")


@pytest.mark.examples
def test_several_processes_compute_what_one_does(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    thorough = pytestconfig.getoption("--thorough")
    of_two = [name for name in MODELS if thorough or name not in MORE]
    of_three = OF_THREE if thorough else OF_THREE[-1:]
    folders = {name: made(tmp_path, name) for name in of_two}
    for processes, names in ((2, of_two), (3, of_three)):
        out = tmp_path / f"of {processes}"
        out.mkdir()
        launch(processes, WORKER, out, *(folders[name] for name in names))
        for rank in range(processes):
            found = json.loads((out / f"{rank}.json").read_text())
            assert len(found) == len(names) * (2 if processes == 2 else 1)
            for got in found:
                assert got["error"] <= 1e-5 and got["same"], (rank, got)
                first = got["kind"] == "tensor" or rank == processes - 1
                layers = 3 if got["kind"] == "tensor" else [[2, 1], [1, 1, 1]][processes - 2][rank]
                assert got["layers"] == layers, (rank, got)
                assert got["embedding"] == (first or got["model"] in TIED), (rank, got)
