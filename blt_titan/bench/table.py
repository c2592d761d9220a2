"""Tables of figures, as text for a terminal and as Markdown for a page."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Figures to read; the first column says what a row is of."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return the table with its columns aligned, the first to the left.

        >>> print(Table("speed", ["work", "bytes/s"], [["1 x 4,096", "98"]]).text())
        speed
        work       bytes/s
        1 x 4,096       98
        """
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]

        def aligned(line: Sequence[str]) -> str:
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            return "  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip()

        return "\n".join([self.title, *map(aligned, lines)])

    def markdown(self) -> str:
        """Return the table without its title.

        >>> print(Table("speed", ["work", "bytes/s"], [["1 x 4,096", "98"]]).markdown())
        | work | bytes/s |
        |---|---:|
        | 1 x 4,096 | 98 |
        """
        head = ["| " + " | ".join(self.header) + " |", "|---|" + "---:|" * (len(self.header) - 1)]
        return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in self.rows)])


def seconds(value: float) -> str:
    """Show a time.

    >>> seconds(24.71), seconds(0.0213)
    ('24.7 s', '21.3 ms')
    """
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def megabytes(value: float) -> str:
    """Show a size in millions of bytes.

    >>> megabytes(3_649_000_000)
    '3,649 MB'
    """
    return f"{value / 1e6:,.0f} MB"


def times(value: float) -> str:
    """Show a ratio.

    >>> times(2.7449)
    '2.74x'
    """
    return f"{value:.2f}x"
