"""How figures look: no background and middle tones, so that one file is readable on light and on dark pages."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent

INK = "#7d8590"
BLUE, ORANGE, GREEN, RED, VIOLET = "#3b82c4", "#d9822b", "#3a9d6a", "#d04a4a", "#9467bd"

matplotlib.use("agg")
matplotlib.rcParams.update(
    {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlesize": "medium",
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "grid.color": INK,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "legend.fontsize": "small",
        "legend.labelcolor": INK,
        "savefig.transparent": True,
        "svg.hashsalt": "revsolve",
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


def save(figure: Figure, name: str) -> None:
    """Write docs/figures/<name>.svg; the same numbers give the same file, whatever the day."""
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
