"""The figures that show measurements; each asserts what its caption says."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from style import BLUE, GREEN, INK, ORANGE, RED, VIOLET, key, label, panels, save
from torch import Tensor

from revsolve import ReconstructionWarning, Solution, odeint
from revsolve.schemes.tableau import TABLEAUS

COUPLINGS = ((0.8, BLUE), (0.9, GREEN), (0.99, ORANGE), (0.999, RED))
DECAY, STEP = 10.0, 0.01  # y' = -10 y; the step is a tenth of its time


def amplification(tableau: str, z: np.ndarray, coupling: float) -> np.ndarray:
    """Spectral radius of one step of the pair on y' = z y (h = 1)."""
    increment = np.polynomial.Polynomial(TABLEAUS[tableau].stability_polynomial()) - 1
    r, back, one = increment(z), increment(-z), np.ones_like(z)
    matrix = [[coupling * one, 1 - coupling + r], [-coupling * back, 1 - (1 - coupling) * back - back * r]]
    return np.abs(np.linalg.eigvals(np.moveaxis(np.array(matrix), (0, 1), (-2, -1)))).max(-1)


def stability_regions() -> None:
    """Where the pair over RK4 is stable, for four couplings; above all of it, below the strip at the negative real axis."""
    figure, (above, below) = panels(2, 7.0, height_ratios=[3, 2])
    for axes, (x0, x1, y0, y1) in ((above, (-3.2, 1.6, -3.2, 3.2)), (below, (-0.3, 0.02, -0.5, 0.5))):
        x, y = np.meshgrid(np.linspace(x0, x1, 301), np.linspace(y0, y1, 301))
        z = x + 1j * y
        base = np.abs(np.polynomial.Polynomial(TABLEAUS["rk4"].stability_polynomial())(z))
        axes.contourf(x, y, base, [0, 1], colors=[INK], alpha=0.18)
        for coupling, colour in COUPLINGS:
            axes.contour(x, y, amplification("rk4", z, coupling), [1 + 1e-9], colors=[colour], linewidths=1.4)
        axes.axhline(0, color=INK, linewidth=0.5)
        axes.axvline(0, color=INK, linewidth=0.5)
        axes.set(ylabel="Im(h a)")
    above.set_title("RK4 (grey) and its reversible pair, no restarts")
    below.set(title="the same, near the origin", xlabel="Re(h a)")
    key(above, {f"coupling {coupling}": colour for coupling, colour in COUPLINGS}, 0.74, 0.98, 0.08)
    for coupling, _ in COUPLINGS:
        edge = math.log(coupling)  # where e^z = coupling
        stable, unstable = (amplification("rk4", np.array([share * edge + 0j]), coupling) for share in (0.97, 1.03))
        assert stable <= 1 < unstable
    save(figure, "stability_regions")


def decay(steps: int, restarts: object, **options: float) -> Solution:
    """The reversible pair over RK4 on y' = -10 y from 1, with an output at every step."""
    t = STEP * torch.arange(steps + 1, dtype=torch.float64)
    method = "rev_rk4" if options else "rk4"
    y0 = torch.ones(1, dtype=torch.float64)
    restarts = {} if method == "rk4" else {"restarts": restarts}
    return odeint(
        lambda t, y: -DECAY * y,
        y0,
        t,
        method=method,
        options={"step_size": STEP, **options},
        full_output=True,
        **restarts,
    )


def parasitic_growth(steps: int = 300) -> None:
    """Error of the solution of y' = -10 y after every step."""
    figure, (axes,) = panels(1, 4.2)
    exact = np.exp(-DECAY * STEP * np.arange(steps + 1))
    runs = [(f"coupling {c}", colour, decay(steps, None, coupling=c)) for c, colour in COUPLINGS[1::2]]
    runs += [("coupling 1", VIOLET, decay(steps, None, coupling=1.0))]
    runs += [("RK4 itself", INK, decay(steps, None))]
    runs += [("restarts", BLUE, decay(steps, "auto", coupling=1.0))]
    for (name, colour, solution), dy in zip(runs, (0, -5, 6, 6, -7), strict=True):
        error = np.abs(solution.ys[:, 0].numpy() - exact)
        axes.semilogy(error[1:], "--" if name == "RK4 itself" else "-", color=colour, linewidth=1.6)
        label(axes, name, colour, dy)
    assert abs(runs[1][2].ys[-1] - exact[-1]) > 1e3 * exact[-1]
    assert abs(runs[-1][2].ys[-1] - exact[-1]) < 2 * abs(runs[-2][2].ys[-1] - exact[-1])
    axes.set(xlabel="step", title="error of the solution of y' = -10 y, h = 0.01")
    save(figure, "parasitic_growth")


def reconstruction_error(field: Callable[[Tensor, Tensor], Tensor], steps: int, **options: Any) -> float:
    """How far undoing the steps missed the stored states, relative; float32."""
    y0 = torch.tensor([2.0, 0.0], requires_grad=True)
    t = torch.tensor([0.0, 0.05 * steps])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReconstructionWarning)
        solution = odeint(field, y0, t, method="rev_rk4", full_output=True, **options)
        solution.ys[-1].sum().backward()
    return solution.stats.reconstruction_error


def draw_reconstruction(axes: plt.Axes, rate: float, counts: list[int]) -> None:
    """A rotation about the point (1, 1), approaching it as e^(-rate t)."""
    centre, turn = torch.ones(2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    field = lambda t, y: turn @ (y - centre) - rate * (y - centre)  # noqa: E731
    for coupling, colour in (*COUPLINGS[1:], (1.0, VIOLET)):
        options = {"step_size": 0.05, "coupling": coupling}
        within = [n for n in counts if coupling**n > 1e-20]  # beyond, undoing overflows, and that raises
        errors = [reconstruction_error(field, n, options=options, restarts=None) for n in within]
        axes.loglog(within, errors, color=colour)
    errors = [reconstruction_error(field, n, options={"step_size": 0.05}) for n in counts]
    assert max(errors) < 1e-5
    axes.loglog(counts, errors, "o-", markersize=3, color=BLUE)
    label(axes, "restarts", BLUE)
    axes.set(ylim=(1e-8, 1e4))


def reconstruction() -> None:
    """Above a flow that keeps everything, so that only the coupling loses digits; below one that forgets."""
    figure, (above, below) = panels(2, 6.4)
    draw_reconstruction(above, 0.0, [10, 30, 100, 300, 1000, 2000])
    above.set(title="error of undoing a rotation about a point, float32")
    key(above, {f"coupling {c:g}": colour for c, colour in (*COUPLINGS[1:], (1.0, VIOLET))}, 0.02, 0.98)
    counts = [10, 20, 40, 80, 160, 240, 320, 400]
    draw_reconstruction(below, 1.0, counts)
    below.loglog(counts, 6e-8 * np.exp(0.05 * np.array(counts)), ":", color=INK)
    key(below, {"dotted: rounding x e^(time)": INK}, 0.02, 0.98)
    below.set(title="the same, approaching the point as e^(-time)", xlabel="steps undone")
    save(figure, "reconstruction")
