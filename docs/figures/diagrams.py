"""The figures that are drawn, not measured: the layers of the package, and how to choose a method."""

import itertools
from dataclasses import dataclass

from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from style import BLUE, GREEN, INK, ORANGE, VIOLET, save


@dataclass(frozen=True)
class Box:
    """A box with its text; x, y is its centre."""

    x: float
    y: float
    text: str
    colour: str = INK
    width: float = 2.6
    height: float = 0.8

    def draw(self, axes: plt.Axes, size: float = 10.5) -> None:
        corner = (self.x - self.width / 2, self.y - self.height / 2)
        frame = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 1.5, "facecolor": "none"}
        axes.add_patch(FancyBboxPatch(corner, self.width, self.height, edgecolor=self.colour, **frame))
        axes.text(self.x, self.y, self.text, ha="center", va="center", fontsize=size, linespacing=1.35)


def arrow(
    axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", dx: float = 0.1
) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2})
    if label:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x + dx, y, label, fontsize=9.5, va="center", ha="left" if dx > 0 else "right", style="italic")


def canvas(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(width * 0.8, height * 0.8))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def layers() -> None:
    """Layers, top to bottom; imports point down only. At the right, what travels between them."""
    figure, axes = canvas(12.6, 8.4)
    rows = [
        (7.5, BLUE, "front doors", ["odeint", "cdeint", "sdeint", "fixed_point\nRevDEQ"]),
        (
            5.7,
            GREEN,
            "preparation",
            ["prepare:\noptions, times", "prepare:\nstate, grid", "field:\na pure function", "extras:\nevents, dense"],
        ),
        (
            3.9,
            ORANGE,
            "what is\nintegrated",
            ["schemes:\ntableaus", "schemes:\nreversible", "paths:\ncontrols", "brownian:\nmotion"],
        ),
        (2.1, VIOLET, "core", ["gradient", "integrate", "stepper", "restart"]),
    ]
    for y, colour, name, boxes in rows:
        axes.text(0.1, y, name, va="center", fontsize=10, color=colour, weight="bold")
        for i, text in enumerate(boxes):
            Box(2.75 + 2.25 * i, y, text, colour, 2.05, 1.0).draw(axes)
    Box(6.125, 0.75, "coupling: advance, undo, pull_back", VIOLET, 8.8, 0.8).draw(axes)
    for upper, lower, label in (
        (6.95, 6.25, "state, times, field"),
        (5.15, 4.45, "term, scheme, stepper"),
        (3.35, 2.65, "Problem"),
        (1.55, 1.2, "updates"),
    ):
        arrow(axes, (11.0, upper), (11.0, lower), label)
    save(figure, "layers")


def choice() -> None:
    """Four questions, each with the method and gradient mode that answer it."""
    figure, axes = canvas(11.0, 8.0)
    left, right = 2.7, 8.4
    questions = [
        (7.4, "Does backpropagation through\nall steps fit in memory?"),
        (5.8, "Do about 2 sqrt(N) states fit, and the\ntape of sqrt(N) steps?"),
        (4.2, "Noise, or a rough path, or is\norder 2 enough?"),
        (2.6, "Adaptive steps?"),
    ]
    answers = [
        (7.4, "yes", 'method="dopri5" or "rk4"\ngradient="direct"', ORANGE),
        (5.8, "yes", 'the same methods\ngradient="checkpoint" (their default)', GREEN),
        (4.2, "yes", '"reversible_heun"\none evaluation a step', BLUE),
        (2.6, "yes", '"rev_dopri5" or "rev_tsit5", with\nrtol and atol', BLUE),
    ]
    for y, text in questions:
        Box(left, y, text, INK, 5.1, 1.05).draw(axes)
    for y, label, text, colour in answers:
        Box(right, y, text, colour, 4.9, 1.05).draw(axes)
        arrow(axes, (left + 2.55, y), (right - 2.45, y))
        axes.text((left + right + 0.15) / 2, y + 0.12, label, fontsize=9.5, ha="center", style="italic")
    for (y0, _), (y1, _) in itertools.pairwise(questions):
        arrow(axes, (left, y0 - 0.5), (left, y1 + 0.5), "no")
    arrow(axes, (left, 2.1), (left, 1.15), "no")
    Box(left, 0.6, '"rev_rk4"; or "alf4", where long\nsteps are accurate enough', BLUE, 5.1, 1.05).draw(axes)
    Box(right, 0.6, 'blue: gradient="reversible" (their default)\nrestarts stay on', BLUE, 4.9, 1.05).draw(axes)
    save(figure, "choice")
