"""Tables that commands print and write into documents. Knows nothing of what is in them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

GAP = 2  # spaces between two columns
FOLDED = 12  # columns of words stay at least so wide when a terminal is too narrow for them
LAYER = re.compile(r"(.*\.)(\d+)")


@dataclass(frozen=True)
class Grid:
    """A table whose first columns are words and whose other columns are figures.

    Attributes:
        titles: of the columns; a newline breaks a title.
        rows: cells, as many in each row as there are titles.
        words: how many columns are words, aligned left and folded where the terminal is narrow;
            figures are aligned right and never cut short.
        dense: put one space between columns instead of two, however much room there is.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    dense: bool = False

    def rich(self) -> Table:
        """Make the table for a terminal."""
        table = Table(box=None, pad_edge=False, collapse_padding=self.dense)
        for i, title in enumerate(self.titles):
            if i < self.words:
                table.add_column(title, overflow="fold")
            else:
                table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def show(self, console: Console) -> None:
        """Print the table, densely where it does not fit else.

        A terminal too narrow for its figures wraps the lines.
        """
        widths = [
            max(cell_len(line) for cell in column for line in cell.split("\n"))
            for column in zip(self.titles, *self.rows, strict=True)
        ]
        folded = [min(width, FOLDED) for width in widths[: self.words]]
        figures, gaps = sum(folded) + sum(widths[self.words :]), len(widths) - 1
        dense = self.dense or figures + GAP * gaps > console.width
        console.width = max(console.width, figures + (1 if dense else GAP) * gaps)
        console.print(replace(self, dense=dense).rich())

    def markdown(self) -> str:
        """Write the table as Markdown."""
        rule = ["---" if i < self.words else "---:" for i in range(len(self.titles))]
        titles = [title.replace("\n", " ") for title in self.titles]
        lines = ["| " + " | ".join(row) + " |" for row in (titles, *self.rows)]
        return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def join_layers(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Join rows of like layers that follow each other into one, which names first and last.

    Args:
        rows: cells, the first of which is the name.
    """
    runs: list[list[Sequence[str]]] = []
    for row in rows:
        name, last = LAYER.fullmatch(row[0]), LAYER.fullmatch(runs[-1][-1][0]) if runs else None
        follows = name and last and name[1] == last[1] and int(name[2]) == int(last[2]) + 1
        if follows and [*row[1:]] == [*runs[-1][-1][1:]]:
            runs[-1].append(row)
        else:
            runs.append([row])
    return [[_name_run(run), *run[0][1:]] for run in runs]


def _name_run(run: Sequence[Sequence[str]]) -> str:
    first, last = run[0][0], run[-1][0].rpartition(".")[2]
    return (
        first if len(run) == 1 else f"{first}\N{EN DASH}{last} \N{MULTIPLICATION SIGN} {len(run)}"
    )


def format_count(number: int) -> str:
    """A number of weights for reading, with three digits: "7.24 B"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            count = number / size
            return f"{count:,.{0 if count >= 99.95 else 1 if count >= 9.995 else 2}f} {unit}"
    return str(number)
