"""Default restarts beside very large and very small components, and the memory that they take on the classical problems."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import Restarts, Solution, odeint
from tests.problems import CLASSICAL

BASES = {"rev_rk4": "rk4", "reversible_heun": "heun2", "alf": "midpoint"}
TOGETHER = ("van_der_pol2", "lotka_volterra", "damped_oscillator", "oscillator", "decay1")  # of two components each
ROUNDING = 3e-13
QUICK = ("heat", "decay20", "epidemic")  # restarts come after almost every step of the first two


@pytest.mark.parametrize("scales", [(1.0, 1e10), (1e-10, 1.0)], ids=["1 to 1e10", "1e-10 to 1"])
@pytest.mark.parametrize("method", BASES)
def test_every_component_of_mixed_scales_is_as_accurate_as_with_the_base_method(
    method: str, scales: tuple[float, float]
) -> None:
    """Five problems as one state, scaled evenly in logarithms, and the other way about."""
    problems = [CLASSICAL[name] for name in TOGETHER]
    exponents = torch.linspace(*(math.log10(scale) for scale in scales), 2 * len(problems), dtype=torch.float64)
    t, exact = problems[0].times(), torch.cat([problem.reference() for problem in problems], -1)
    for scale in (10**exponents, 10 ** exponents.flip(0)):

        def field(t: Tensor, y: Tensor, scale: Tensor = scale) -> Tensor:
            parts = (y / scale).split(2)
            return scale * torch.cat([problem.field(t, part) for problem, part in zip(problems, parts, strict=True)])

        y0 = scale * torch.cat([problem.start(torch.float64) for problem in problems])
        own, base = (
            (odeint(field, y0, t, method=name, options={"step_size": 0.05}) / scale - exact).abs().amax(0)
            for name in (method, BASES[method])
        )
        assert (own <= 3 * (base + ROUNDING * exact.abs().amax(0))).all(), (own / base).tolist()


def solved(name: str, method: str, restarts: Any) -> Solution:
    problem = CLASSICAL[name]
    y0, options = problem.start(torch.float64).requires_grad_(), {"step_size": problem.step}
    out = odeint(
        problem.field, y0, problem.times(), method=method, options=options, restarts=restarts, full_output=True
    )
    out.ys.sum().backward()
    return out


@pytest.mark.parametrize("method", BASES)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CLASSICAL]
)
def test_memory_grows_no_faster_than_the_square_root_of_the_steps(name: str, method: str) -> None:
    """And what is repeated, as it was not stored, makes a gradient half as dear again at most."""
    few, all_pairs = (solved(name, method, restarts).stats for restarts in ("auto", Restarts(budget=10**6)))
    assert few.num_stored_states <= 4 * math.sqrt(few.num_steps) + 16
    assert few.num_evaluations == all_pairs.num_evaluations
    assert few.num_backward_evaluations <= 2.0 * few.num_evaluations
    if all_pairs.num_stored_states <= 2 * math.isqrt(few.num_steps):
        assert few.num_backward_evaluations == all_pairs.num_backward_evaluations
