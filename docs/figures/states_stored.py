"""How many states the default restarts store, and at what accuracy, on every classical problem of the tests."""

import sys
from pathlib import Path

import torch
from style import BLUE, GREEN, INK, ORANGE, key, panels, save
from torch import Tensor

from revsolve import Solution, odeint

sys.path.append(str(Path(__file__).parents[2]))
from tests.problems import CLASSICAL, Classical

SCHEMES = (("rev_rk4", "rk4", BLUE, "o"), ("reversible_heun", "heun2", ORANGE, "s"), ("alf", "midpoint", GREEN, "^"))


def solved(problem: Classical, method: str) -> Solution:
    options, y0 = {"step_size": problem.step}, problem.start(torch.float64)
    return odeint(problem.field, y0, problem.times(), method=method, options=options, full_output=True)


def error(problem: Classical, ys: Tensor) -> float:
    rounding = 30 * torch.finfo(torch.float64).eps * problem.num_steps**0.5  # as the tests allow for
    wrong = (ys - problem.reference()).abs().max() / problem.reference().abs().max()
    return max(float(wrong), rounding)


def states_stored() -> None:
    """Above the error over that of the base method, below the share of steps before which a pair is stored."""
    figure, (above, below) = panels(2, 12.0)
    for method, base, colour, marker in SCHEMES:
        stored, ratios = [], []
        for problem in CLASSICAL.values():
            own = solved(problem, method)
            stored.append((own.stats.num_restarts + 1) / own.stats.num_steps)
            ratios.append(error(problem, own.ys) / error(problem, solved(problem, base).ys))
        assert max(ratios) < 3
        assert sorted(stored)[len(stored) // 2] < 0.15
        above.semilogx(ratios, list(CLASSICAL), marker, color=colour, markersize=5, alpha=0.8)
        below.semilogx(stored, list(CLASSICAL), marker, color=colour, markersize=5, alpha=0.8)
    above.set(title="error, over that of the base method", xlim=(0.05, 5))
    below.set(title="pairs stored per step", xlim=(0.02, 1.2))
    for axes in (above, below):
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.grid(axis="y")
        axes.invert_yaxis()
    key(above, {f"{method} over {base}": colour for method, base, colour, _ in SCHEMES}, 0.02, 0.98, 0.045)
    save(figure, "states_stored")
