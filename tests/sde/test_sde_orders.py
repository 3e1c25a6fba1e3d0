"""Strong orders of convergence over 2000 paths, against exact solutions or references with much finer steps."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from revsolve import BrownianPath, sdeint
from tests.sde_problems import PROBLEMS

NUM_PATHS = 2000
COUNTS = (8, 16, 32, 64)
FINEST = 512
WITHIN = 0.15  # the slope of four errors, each known to about 1/sqrt(2 * 2000) = 1.6 %
PAIRS = ("reversible_heun", "rev_heun2", "rev_midpoint")

CASES = [
    *(("geometric", method, 1.0) for method in PAIRS),
    *(("commutative", method, 1.0) for method in (*PAIRS, "rev_rk4")),
    *(("non-commutative", method, 0.5) for method in (*PAIRS, "rev_rk4", "rev_slowrk")),
    *(("additive", method, 1.0) for method in (*PAIRS, "rev_rk4", "rev_euler")),
    *(("additive", method, 1.5) for method in ("rev_shark", "rev_sra1", "rev_slowrk", "shark")),
    *((problem, "rev_slowrk", 1.5) for problem in ("geometric", "hyperbolic", "commutative")),
]


@cache
def reference(problem: str) -> tuple[BrownianPath, Tensor, Tensor]:
    """The path, the initial states and the solution at time 1."""
    torch.manual_seed(0)
    solved = PROBLEMS[problem]
    knots = [n / FINEST for n in range(FINEST + 1)]
    size = (NUM_PATHS, solved.channels)
    bm = BrownianPath(0.0, 1.0, size, dtype=torch.float64, grid=knots, levy_area="space-time")
    y0 = torch.full((NUM_PATHS, solved.dim), 0.5, dtype=torch.float64)
    if solved.solution is not None:
        return bm, y0, solved.solution(y0, bm(0.0, 1.0))
    method = "heun2" if problem == "non-commutative" else "slowrk"
    return bm, y0, sdeint(solved.sde, y0, [0.0, 1.0], bm=bm, method=method, dt=1 / FINEST)[-1]


def slope(errors: list[float]) -> float:
    """Least-squares slope of -log(error) over log(number of steps)."""
    x, y = (torch.tensor([math.log(v) for v in values]) for values in (COUNTS, errors))
    x = x - x.mean()
    return -float((x * y).sum() / x.square().sum())


@pytest.mark.parametrize(("problem", "method", "order"), CASES)
def test_strong_order(problem: str, method: str, order: float) -> None:
    bm, y0, exact = reference(problem)
    sde = PROBLEMS[problem].sde
    found = [sdeint(sde, y0, [0.0, 1.0], bm=bm, method=method, dt=1 / n)[-1] for n in COUNTS]
    errors = [float((y - exact).square().sum(-1).mean().sqrt()) for y in found]
    assert slope(errors) == pytest.approx(order, abs=WITHIN)


@pytest.mark.parametrize("method", ["reversible_heun", "rev_heun_euler", "rev_slowrk"])
@pytest.mark.parametrize("problem", ["geometric", "additive"])
def test_adaptive_error_follows_the_tolerance(problem: str, method: str) -> None:
    bm, y0, exact = reference(problem)
    few, settings = 200, {"adaptive": True, "dt": 0.05, "dt_min": 1e-4, "method": method}
    part = BrownianPath(0.0, 1.0, (few, bm.shape[1]), seed=1, dtype=torch.float64, levy_area="space-time", dt=0.01)
    sde = PROBLEMS[problem].sde
    exact = sdeint(sde, y0[:few], [0.0, 1.0], bm=part, method="slowrk", dt=1e-3)[-1]

    def error(tolerance: float) -> float:
        y = sdeint(sde, y0[:few], [0.0, 1.0], bm=part, rtol=tolerance, atol=tolerance, **settings)[-1]
        return float((y - exact).square().mean().sqrt())

    loose, tight = error(1e-1), error(1e-2)
    assert tight < loose / 2
    assert tight < 5e-2
