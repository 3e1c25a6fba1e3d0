"""How many states the default restarts store, and at what accuracy, on every classical problem of the tests."""

import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from style import BLUE, GREEN, INK, ORANGE, save
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
    """Left the share of steps before which a pair is stored, right the error over that of the base method."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 5.4), sharey=True)
    for method, base, colour, marker in SCHEMES:
        stored, ratios = [], []
        for problem in CLASSICAL.values():
            own = solved(problem, method)
            stored.append((own.stats.num_restarts + 1) / own.stats.num_steps)
            ratios.append(error(problem, own.ys) / error(problem, solved(problem, base).ys))
        assert max(ratios) < 3
        assert sorted(stored)[len(stored) // 2] < 0.15
        left.semilogx(stored, list(CLASSICAL), marker, color=colour, label=method, markersize=5, alpha=0.8)
        right.semilogx(ratios, list(CLASSICAL), marker, color=colour, markersize=5, alpha=0.8, label=f"over {base}")
    left.set(xlabel="pairs stored per step", xlim=(0.02, 1.2))
    left.axvline(1, color=INK, linewidth=0.8)
    right.set(xlabel="error over that of the base method", xlim=(0.05, 5))
    right.axvline(1, color=INK, linewidth=0.8)
    for axes in (left, right):
        axes.grid(axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="x-small")
    left.invert_yaxis()
    save(figure, "states_stored")
