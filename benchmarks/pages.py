"""What documentation pages of figures consist of: plots, tables and notes.

The same figures give the same files, byte by byte, by the same matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Bar(NamedTuple):
    """One of a plot of shares."""

    label: str
    share: float  # of the limit, 0 to 1
    colour: str


@contextmanager
def plot(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """What to draw on, kept as an SVG file at the end.

    Args:
        path: Of the file.
        size: Width and height, inches.
    """
    import matplotlib  # which only pages need
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(size)
    FigureCanvasSVG(figure)  # so that the layout has the sizes of the file's letters
    yield figure
    figure.tight_layout()
    # Without these the file has random names and the time in it.
    with matplotlib.rc_context({"svg.hashsalt": "llama-te"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def plot_shares(path: Path, bars: Sequence[Bar]) -> None:
    """Bars of what is reached of limits, the first on top."""
    upwards, places = bars[::-1], range(len(bars))
    with plot(path, (8, 0.32 * len(bars) + 1)) as figure:
        axes = figure.add_subplot()
        axes.barh(places, [100 * bar.share for bar in upwards], color=[bar.colour for bar in upwards])
        axes.set_yticks(places, [bar.label for bar in upwards], fontsize=8)
        axes.set_xlabel("% of the limit")
        axes.set_xlim(0, 100)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def write(page: Path, lines: Sequence[str]) -> None:
    """Write a page, and at its end what `<its stem>-notes.md` beside it says, if that is there."""
    notes = page.with_name(f"{page.stem}-notes.md")
    ending = ["", notes.read_text().rstrip()] if notes.exists() else []
    page.write_text("\n".join([*lines, *ending]) + "\n")
