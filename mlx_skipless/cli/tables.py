"""Tables that commands print and write into documents. Knows nothing of what is in them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

GAP = 2  # spaces between two columns
FOLDED = 12  # columns of words stay at least so wide when a terminal is too narrow for them


@dataclass(frozen=True)
class Grid:
    """A table whose first columns are words and whose other columns are figures.

    Attributes:
        titles: of the columns; a newline breaks a title.
        rows: cells, as many in each row as there are titles.
        words: how many columns are words, aligned left and folded where the terminal is narrow;
            figures are aligned right and never cut short.
        dense: put one space between columns instead of two.
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
        """Print the table; a terminal too narrow for its figures wraps the lines."""
        widths = [
            max(cell_len(line) for cell in column for line in cell.split("\n"))
            for column in zip(self.titles, *self.rows, strict=True)
        ]
        folded = [min(width, FOLDED) for width in widths[: self.words]]
        needed = sum(folded) + sum(widths[self.words :]) + GAP * (len(widths) - 1)
        console.width = max(console.width, needed)
        console.print(self.rich())

    def markdown(self) -> str:
        """Write the table as Markdown."""
        rule = ["---" if i < self.words else "---:" for i in range(len(self.titles))]
        titles = [title.replace("\n", " ") for title in self.titles]
        lines = ["| " + " | ".join(row) + " |" for row in (titles, *self.rows)]
        return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])
