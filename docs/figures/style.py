"""How figures look: no background and middle tones, so that one file is readable on light and on dark pages.

They are 5.2 inches wide with text of 11 points, which is 10 pixels on a telephone 400 pixels wide. Curves are labelled where they
end, in their own colour.
"""

import math
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation

HERE = Path(__file__).parent
WIDTH = 5.2

INK = "#7d8590"
BLUE, ORANGE, GREEN, RED, VIOLET = "#3b82c4", "#d9822b", "#3a9d6a", "#d04a4a", "#9467bd"

matplotlib.use("agg")
matplotlib.rcParams.update(
    {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "grid.color": INK,
        "grid.alpha": 0.25,
        "savefig.transparent": True,
        "svg.hashsalt": "revsolve",
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


def panels(rows: int, height: float, **settings: object) -> tuple[Figure, list[plt.Axes]]:
    """Panels one below the other, as they fit on a telephone."""
    figure, axes = plt.subplots(rows, 1, figsize=(WIDTH, height), squeeze=False, **settings)
    return figure, list(axes[:, 0])


def label(axes: plt.Axes, text: str, colour: str, dy: float = 0.0) -> None:
    """Write a label at the end of the curve that was drawn last, dy points higher."""
    x, y = axes.lines[-1].get_xydata()[-1]
    axes.annotate(
        text,
        (x, y),
        (6, dy),
        textcoords="offset points",
        color=colour,
        va="center",
        linespacing=0.95,
        annotation_clip=False,
    )


def key(axes: plt.Axes, names: dict[str, str], x: float, y: float, step: float = 0.1) -> None:
    """Names in their colours, one below the other from (x, y) of the panel, where curves have no free end."""
    for i, (name, colour) in enumerate(names.items()):
        axes.text(x, y - i * step, name, color=colour, transform=axes.transAxes, va="top")


def decade(x: float, position: int | None = None) -> str:
    """A power of ten without an exponent above the line, which is too small to read on a telephone."""
    return f"{x:g}" if 1e-2 < x < 1e4 else f"1e{round(math.log10(x))}"


def save(figure: Figure, name: str) -> None:
    """Write docs/figures/<name>.svg; the same numbers give the same file, whatever the day."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatterSciNotation):
            axis.set_major_formatter(FuncFormatter(decade))
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
