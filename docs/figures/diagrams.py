"""The figure that is drawn, not measured: the layers of the package."""

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from style import BLUE, GREEN, INK, ORANGE, VIOLET, panels, save

LAYERS = (
    ("solvers", BLUE, ("odeint", "cdeint", "sdeint", "fixed_point"), "state, times, field"),
    ("preparation", GREEN, ("options", "times, grid", "field", "extras"), "term, scheme, stepper"),
    ("what is\nintegrated", ORANGE, ("tableaus", "reversible", "paths", "brownian"), "Problem"),
    ("core", VIOLET, ("gradient", "integrate", "stepper", "restart"), "updates"),
)


def box(axes: plt.Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
    frame = {"boxstyle": "round,pad=0,rounding_size=0.1", "linewidth": 1.5, "facecolor": "none"}
    axes.add_patch(FancyBboxPatch((x, y), width, 0.7, edgecolor=colour, **frame))
    axes.text(x + width / 2, y + 0.35, text, ha="center", va="center")


def layers() -> None:
    """Layers, top to bottom; imports point down only. Between two layers, what travels from one to the next."""
    figure, (axes,) = panels(1, 5.0)
    axes.set(xlim=(0, 9.2), ylim=(-0.1, 9.6))
    axes.axis("off")
    for i, (name, colour, boxes, down) in enumerate(LAYERS):
        y = 8.2 - 2.0 * i
        axes.text(0, y + 1.05, name.replace("\n", " "), va="center", color=colour, weight="bold")
        for j, text in enumerate(boxes):
            box(axes, 2.33 * j, y, 2.15, text, colour)
        axes.annotate("", (4.6, y - 0.85), (4.6, y - 0.1), arrowprops={"arrowstyle": "-|>", "color": INK})
        axes.text(4.8, y - 0.5, down, va="center", style="italic")
    box(axes, 0, 0.45, 9.14, "coupling: advance, undo, pull_back", VIOLET)
    save(figure, "layers")
