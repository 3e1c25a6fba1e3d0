"""How the plots of the benchmarks look: as those of `docs/figures` do."""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "figures"))

from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from style import INK

__all__ = ["INK", "colours", "save", "subplots"]


def subplots(columns: int, width: float = 8.4, height: float = 4.2) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    return figure, axes[0]


def colours(count: int) -> list[Any]:
    return [colormaps["tab20"](i) for i in range(count)]


def save(figure: Figure, path: Path) -> None:
    """The same numbers give the same file, whatever the day."""
    figure.savefig(path, metadata={"Date": None})
