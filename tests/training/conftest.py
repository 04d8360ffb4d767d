"""Runs of these tests draw no curves, which would take longer than they do, but where asked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_skipless.evaluation import plots

DRAW = plots.plot_losses


@pytest.fixture(scope="module", autouse=True)
def no_curves() -> Iterator[None]:
    """A curve is a file that says so."""

    def plot_losses(runs: Any, file: Path, *look: Any) -> None:
        file.write_text("no curve")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot_losses", plot_losses)
        yield


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are drawn."""
    monkeypatch.setattr(plots, "plot_losses", DRAW)
