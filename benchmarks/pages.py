"""Parts of the result pages that benchmarks write: plots and tables.

The same figures give the same files, byte for byte, with the same version of matplotlib.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
PATH = re.compile(r' d="[^"]*"')


class Bar(NamedTuple):
    """One bar of a plot of shares."""

    label: str
    share: float  # of the limit, 0 to 1
    colour: str


@contextmanager
def plot(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure to draw on, and save it as a small SVG file at the end.

    Args:
        path: The file to write.
        size: Width and height in inches.
    """
    import matplotlib  # only pages need it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(size)
    FigureCanvasSVG(figure)  # so that the layout knows the sizes of the file's letters
    yield figure
    figure.tight_layout()
    text = io.StringIO()
    # The salt and the missing date make the file the same each time. Text stays text, instead of a path per letter.
    with matplotlib.rc_context({"svg.hashsalt": "llama-te", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    path.write_text(compact(text.getvalue()))


def compact(svg: str) -> str:
    """Round coordinates to hundredths of a point and write each path on one line."""
    rounded = LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", svg)
    one_line = PATH.sub(lambda path: path[0].replace("\n", ""), rounded)
    return "\n".join(line.rstrip() for line in one_line.splitlines()) + "\n"


def plot_shares(path: Path, bars: Sequence[Bar]) -> None:
    """Draw how much of its limit each bar reaches, the first bar on top."""
    upwards, places = bars[::-1], range(len(bars))
    with plot(path, (8, 0.32 * len(bars) + 1)) as figure:
        axes = figure.add_subplot()
        axes.barh(places, [100 * bar.share for bar in upwards], color=[bar.colour for bar in upwards])
        axes.set_yticks(places, [bar.label for bar in upwards], fontsize=8)
        axes.set_xlabel("% of the limit")
        axes.set_xlim(0, 100)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def write(page: Path, lines: Sequence[str]) -> None:
    """Write a page."""
    page.write_text("\n".join(lines) + "\n")
