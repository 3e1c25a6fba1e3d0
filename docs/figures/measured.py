"""The figures drawn from dated results of `docs/benchmarks`, whose tables hold the numbers."""

from pathlib import Path

from matplotlib import pyplot as plt
from style import BLUE, GREEN, INK, ORANGE, RED, VIOLET, label, panels, save

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def rows(name: str) -> list[list[str]]:
    """The cells of all tables of a result, without its rules."""
    lines = (RESULTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|" and line[1] != "-"
    ]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def row(name: str, first: str) -> list[str]:
    """The last row of a result that begins so, without what it begins with."""
    return [cells[1:] for cells in rows(name) if cells[0] == first][-1]


def curve(axes: plt.Axes, x: list[float], y: list[float], text: str, colour: str, dy: float = 0.0) -> None:
    axes.loglog(x, y, "o-", color=colour, markersize=3.5, linewidth=1.6)
    label(axes, text, colour, dy)


def horizon() -> None:
    """Memory and error of four gradients of a trained neural ODE, over longer and longer solves."""
    found = [(number(steps), mode, float(error), number(held)) for steps, mode, error, held in rows("horizon")[1:]]
    figure, (above, below) = panels(2, 5.2, sharex=True)
    for mode, colour in (
        *(("direct", ORANGE), ("checkpoint", GREEN)),
        *(("reversible", BLUE), ("continuous adjoint", RED)),
    ):
        steps, errors, held = zip(*((n, e, h) for n, m, e, h in found if m == mode), strict=True)
        curve(above, steps, held, mode.replace(" ", "\n"), colour, 4 if mode == "reversible" else 0)
        if mode in ("reversible", "continuous adjoint"):
            curve(below, steps, errors, mode.replace(" ", "\n"), colour)
            assert errors[-1] > 0.05 if mode == "continuous adjoint" else max(errors) < 1e-13
    above.set(title="values stored for one gradient", ylim=(1e3, 3e7))
    below.set(title="relative error of the gradient", xlabel="steps", ylim=(1e-17, 1e2))
    below.set_yticks([1e-15, 1e-10, 1e-5, 1])
    save(figure, "horizon")


def work_precision() -> None:
    """Milliseconds against the error of the gradient, for six of the contenders."""
    figure, (axes,) = panels(1, 4.0)
    for name, text, colour, dy in (
        ("torchdiffeq rk4, adjoint", "torchdiffeq adjoint", RED, 3),
        ("torchdiffeq rk4, backprop", "torchdiffeq backprop", VIOLET, -5),
        ("tsit5, direct", "tsit5, direct", ORANGE, -6),
        ("tsit5, checkpoint", "tsit5, checkpoint", GREEN, -1),
        ("rev_rk4, reversible", "rev_rk4", INK, 9),
        ("reversible_heun4, reversible", "reversible_heun4", BLUE, -9),
    ):
        points = [cell.partition(": ")[2].split(", ") for cell in row("work_precision", name)]
        curve(axes, [float(error) for _, error, _ in points], [float(ms) for *_, ms in points], text, colour, dy)
    axes.invert_xaxis()
    axes.set(xlabel="relative error of the gradient", title="milliseconds of one gradient")
    axes.set_yticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    axes.minorticks_off()
    save(figure, "work_precision")


def width() -> None:
    """Milliseconds against the width of the network, for six of the contenders."""
    figure, (axes,) = panels(1, 4.0)
    widths = [16, 64, 128, 256, 512]
    for name, text, colour, dy in (
        ("revsolve rev_rk4, reversible", "rev_rk4", INK, 10),
        ("revsolve alf4, reversible", "alf4", BLUE, -6),
        ("revsolve rk4, direct", "rk4, direct", ORANGE, -16),
        ("torchdiffeq rk4, adjoint", "torchdiffeq adjoint", RED, 3),
        ("diffrax rk4, checkpointed", "diffrax rk4", GREEN, -17),
        ("diffrax reversible pair of RK4", "diffrax pair", VIOLET, -2),
    ):
        curve(axes, widths, [float(ms) for ms in row("peers", name)], text, colour, dy)
    axes.minorticks_off()
    axes.set_xticks(widths, [str(w) for w in widths])
    axes.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])
    axes.set(xlabel="width of the network", title="milliseconds of one gradient, 30 steps")
    save(figure, "width")


def memory() -> None:
    """Numbers kept for the backward pass against steps."""
    figure, (axes,) = panels(1, 3.4)
    steps = [number(text) for text in row("memory", "an MLP, rk4 steps")]
    for name, text, colour, dy in (
        ("rk4, direct", "direct", ORANGE, 0),
        ("rk4, checkpoint", "checkpoint", GREEN, -4),
        ("rev_rk4, reversible", "reversible", BLUE, 4),
    ):
        kept = [number(text) for text in row("memory", name) if text]
        curve(axes, steps[: len(kept)], kept, text, colour, dy)
    axes.set(xlabel="steps", title="values stored from the forward to the backward pass")
    save(figure, "memory")
