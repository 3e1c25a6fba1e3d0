"""The figures that show measurements; each asserts what its caption says."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from meter import Meter
from style import BLUE, GREEN, INK, ORANGE, RED, VIOLET, save
from torch import Tensor, nn

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
    """Where the pair over RK4 is stable, for four couplings; left all of it, right the strip at the negative real axis."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.9), width_ratios=[3, 4])
    for axes, (x0, x1, y0, y1) in ((left, (-3.2, 0.6, -3.2, 3.2)), (right, (-0.3, 0.02, -0.5, 0.5))):
        x, y = np.meshgrid(np.linspace(x0, x1, 301), np.linspace(y0, y1, 301))
        z = x + 1j * y
        base = np.abs(np.polynomial.Polynomial(TABLEAUS["rk4"].stability_polynomial())(z))
        axes.contourf(x, y, base, [0, 1], colors=[INK], alpha=0.18)
        for coupling, colour in COUPLINGS:
            axes.contour(x, y, amplification("rk4", z, coupling), [1 + 1e-9], colors=[colour], linewidths=1.4)
        axes.axhline(0, color=INK, linewidth=0.5)
        axes.axvline(0, color=INK, linewidth=0.5)
        axes.set(xlabel="Re(h a)", ylabel="Im(h a)")
    left.set_title("RK4 (grey) and its reversible pair, no restarts")
    right.set_title("the same, near the origin")
    lines = [plt.Line2D([], [], color=colour) for _, colour in COUPLINGS]
    left.legend(lines, [f"coupling {coupling}" for coupling, _ in COUPLINGS], loc="lower left")
    for coupling, _ in COUPLINGS:
        edge = math.log(coupling)  # where e^z = coupling
        assert (
            amplification("rk4", np.array([0.97 * edge + 0j]), coupling)
            <= 1
            < amplification("rk4", np.array([1.03 * edge + 0j]), coupling)
        )
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


def draw_growth(axes: plt.Axes, steps: int = 300) -> None:
    """Error of the solution of y' = -10 y after every step."""
    exact = np.exp(-DECAY * STEP * np.arange(steps + 1))
    runs = [(f"coupling {c}, no restarts", colour, decay(steps, None, coupling=c)) for c, colour in COUPLINGS[1::2]]
    runs += [("coupling 1, no restarts", VIOLET, decay(steps, None, coupling=1.0))]
    runs += [("coupling 1, restarts (the default)", BLUE, decay(steps, "auto", coupling=1.0))]
    runs += [("RK4 itself", INK, decay(steps, None))]
    for label, colour, solution in runs:
        style = "--" if label == "RK4 itself" else ":" if label == "coupling 1, no restarts" else "-"
        error = np.abs(solution.ys[:, 0].numpy() - exact)
        axes.semilogy(error[1:], style, color=colour, label=label, linewidth=1.6)
    assert abs(runs[0][2].ys[-1] - exact[-1]) > 1e3 * exact[-1]
    assert abs(runs[-2][2].ys[-1] - exact[-1]) < 2 * abs(runs[-1][2].ys[-1] - exact[-1])
    axes.set(xlabel="step", ylabel="error of the solution", title="y' = -10 y, h = 0.01 (solution ends at 1e-13)")


def parasitic_growth() -> None:
    figure, axes = plt.subplots(figsize=(7, 3.8))
    draw_growth(axes)
    axes.legend(loc="upper left")
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
        axes.loglog(within, errors, color=colour, label=f"coupling {coupling:g}, no restarts")
    errors = [reconstruction_error(field, n, options={"step_size": 0.05}) for n in counts]
    assert max(errors) < 1e-5
    axes.loglog(counts, errors, "o-", markersize=3, color=BLUE, label="coupling 1, restarts (the default)")
    axes.set(xlabel="steps undone", ylim=(1e-8, 1e2))


def reconstruction() -> None:
    """Left a flow that keeps everything, so that only the coupling loses digits; right one that forgets."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.7), sharey=True)
    draw_reconstruction(left, 0.0, [10, 30, 100, 300, 1000, 2000])
    left.set(ylabel="reconstruction error (float32)", title="rotation about a point")
    left.legend(loc="upper left", fontsize="x-small")
    counts = [10, 20, 40, 80, 160, 240, 320, 400]
    draw_reconstruction(right, 1.0, counts)
    time = 0.05 * np.array(counts)
    right.loglog(counts, 6e-8 * np.exp(time), ":", color=INK, label="rounding x e^(time)")
    right.set_title("the same, approaching it as e^(-time)")
    right.legend(handles=right.lines[-1:], loc="upper left", fontsize="x-small")
    save(figure, "reconstruction")


def peak_numbers(steps: int, method: str, gradient: str) -> int:
    """The most numbers that autograd holds, forward or backward: a two-layer field of width 64, state 8, batch 32."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    y0 = torch.randn(32, 8, requires_grad=True)
    t = torch.tensor([0.0, 10.0])
    meter = Meter([*field.parameters(), y0])
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda packed: packed[0]):
        options = {"step_size": 10.0 / steps}
        y = odeint(lambda t, y: field(y), y0, t, method=method, options=options, gradient=gradient)
        y[-1].sum().backward()
    return meter.peak


def draw_memory(axes: plt.Axes) -> None:
    counts = [10, 30, 100, 300, 1000, 3000]
    modes = (("rk4", "direct", ORANGE), ("rk4", "checkpoint", GREEN), ("rev_rk4", "reversible", BLUE))
    found = {mode: [peak_numbers(n, method, mode) for n in counts] for method, mode, _ in modes}
    for method, mode, colour in modes:
        axes.loglog(counts, found[mode], "o-", markersize=3, color=colour, label=f'{method}, gradient="{mode}"')
    assert found["direct"][-1] > 200 * found["direct"][0]
    assert found["reversible"][-1] < found["checkpoint"][-1] / 10 < found["direct"][-1] / 100
    axes.set(xlabel="steps", ylabel="numbers held by autograd, at most", title="memory of a gradient")
    axes.legend(loc="upper left", fontsize="x-small")


def memory_and_stability() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.7))
    draw_memory(left)
    draw_growth(right)
    right.legend(loc="upper left", fontsize="x-small")
    save(figure, "memory_and_stability")
