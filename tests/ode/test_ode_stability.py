"""Stable where the base method is: classical problems at steps at which it works, in float32 and float64, default settings.

The published pair fails on several of them; restarts are what helps, and a test switches them off to see that.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import method_names, odeint
from revsolve.schemes.names import scheme
from revsolve.schemes.tableau import TABLEAUS
from tests.problems import CLASSICAL, Classical

REQUIRED = (
    "decay10",
    "van_der_pol2",
    "lorenz",
    "heat",
    "lotka_volterra",
    "kepler0",
    "kepler0.3",
    "kepler0.5",
    "kepler0.7",
)
HARD = (
    "decay10",
    "van_der_pol2",
    "kepler0.3",
    "forced_relaxation",
    "fitzhugh_nagumo",
    "brusselator",
    "roessler",
    "heat",
)
LONG = {"heat", "kepler0", "kepler0.3", "kepler0.5", "kepler0.7"}
# What each is when it is restarted at every step; alf4 and reversible_heun4 are held against RK4 at equal steps.
BASES = {
    "reversible_heun": "heun2",
    "alf": "midpoint",
    "leapfrog": "midpoint",
    "alf4": "rk4",
    "reversible_heun4": "rk4",
    **{f"rev_{name}": name for name in TABLEAUS},
}
# Every step of leapfrog but the first after a restart is one of the midpoint rule over twice its length, at half the price of
# that: its base. Only on Kepler orbits is it not within 3x of the midpoint rule at equal steps as well.
DOUBLED = {("leapfrog", f"kepler{eccentricity}") for eccentricity in (0.3, 0.5, 0.7)}
QUICK = {"reversible_heun", "alf", "leapfrog", "alf4", "rev_dopri5", "rev_euler"}
SLOW = {("alf4", "heat"), ("alf4", "brusselator"), ("rev_dopri5", "brusselator"), ("rev_dopri5", "roessler")}
OTHERS = [
    pytest.param(method, name, marks=[] if method in QUICK and (method, name) not in SLOW else [pytest.mark.slow])
    for method in method_names()
    if scheme(method).reversible and method != "rev_rk4"
    for name in HARD
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
CLOSE = {torch.float64: 1e-8, torch.float32: 1e-4}
REMOTE = math.inf  # the error of a solve that ends in an error message


def solved(problem: Classical, method: str, dtype: torch.dtype, stretch: int = 1, **solve: Any) -> Tensor:
    options = {"step_size": stretch * problem.step}
    return odeint(problem.field, problem.start(dtype), problem.times(), method=method, options=options, **solve)


def error(problem: Classical, method: str, dtype: torch.dtype, **solve: Any) -> float:
    """The largest error at any output, relative to the largest entry of the reference."""
    try:
        ys = solved(problem, method, dtype, **solve)
    except RuntimeError:
        return REMOTE
    return float((ys.double() - problem.reference()).abs().max() / problem.reference().abs().max())


def rounding(problem: Classical, dtype: torch.dtype) -> float:
    """What rounding may do: one per step, adding up as a random walk, carried along by a flow that stretches up to 30 times."""
    return 30 * torch.finfo(dtype).eps * math.sqrt(problem.num_steps)


@DTYPES
@pytest.mark.parametrize("name", REQUIRED)
def test_the_pair_is_as_accurate_as_its_method(name: str, dtype: torch.dtype) -> None:
    problem = CLASSICAL[name]
    allowed = 3 * max(error(problem, "rk4", dtype), rounding(problem, dtype))
    assert error(problem, "rev_rk4", dtype) <= allowed


def base_error(problem: Classical, method: str, dtype: torch.dtype) -> float:
    """That of the plain method; of a composition without one, that of itself restarted at every step."""
    if method not in BASES:
        return error(problem, method, dtype, restarts=1)
    return error(problem, BASES[method], dtype, stretch=2 if (method, problem.name) in DOUBLED else 1)


@DTYPES
@pytest.mark.parametrize(("method", "name"), OTHERS)
def test_so_are_the_others(method: str, name: str, dtype: torch.dtype) -> None:
    """Also on the heat equation at h * rate = 1.7, whose fast modes are at rest: only the field can tell that they are there."""
    problem = CLASSICAL[name]
    allowed = 3 * max(base_error(problem, method, dtype), rounding(problem, dtype))
    assert error(problem, method, dtype) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kepler0", "kepler0.5", "kepler0.7"])
def test_leapfrog_does_on_orbits_what_midpoint_does_with_doubled_steps(name: str) -> None:
    problem, dtype = CLASSICAL[name], torch.float64
    assert error(problem, "leapfrog", dtype) <= 3 * error(problem, "midpoint", dtype, stretch=2)


@DTYPES
@pytest.mark.parametrize("name", ["kepler0", "lotka_volterra"])
@pytest.mark.parametrize("method", ["rev_heun3", "rev_ralston3", "rev_bosh3"])
def test_pairs_of_order_3_restart_early(method: str, name: str, dtype: torch.dtype) -> None:
    """Heun's leading errors nearly cancel on a circular orbit. Over 32 steps, the pair has 36 times its error."""
    test_so_are_the_others(method, name, dtype)


def at_rest(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([-y[0], -170 * y[1]])


@pytest.mark.parametrize(
    "method", ["reversible_heun", "alf", "leapfrog", "alf4", "reversible_heun4_s5", "rev_rk4", "rev_dopri5"]
)
def test_a_mode_exactly_at_rest_does_not_spoil_the_gradient(method: str) -> None:
    """Neither y nor z ever shows it; its share of the gradient is what the method leaves of it, next to nothing."""
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 3.0], dtype=torch.float64)
    ys = odeint(at_rest, y0, times, method=method, options={"step_size": 0.01})
    grad = torch.autograd.grad(ys[-1].sum(), y0)[0]
    assert abs(float(grad[1])) < 1e-6
    assert math.isclose(float(grad[0]), math.exp(-3.0), rel_tol=1e-4)


@DTYPES
@pytest.mark.parametrize("name", ["decay10", "van_der_pol2", "lorenz", "fitzhugh_nagumo"])
@pytest.mark.parametrize("coupling", [1.0, 0.999])
def test_without_restarts_they_fail(name: str, dtype: torch.dtype, coupling: float) -> None:
    """The safety net is real: whatever the coupling, 0.999 being the published one, the error is a hundred times that of RK4."""
    problem = CLASSICAL[name]
    options = {"step_size": problem.step, "coupling": coupling}
    base = max(error(problem, "rk4", dtype), rounding(problem, dtype))
    assert unprotected(problem, dtype, options) > 100 * base


def unprotected(problem: Classical, dtype: torch.dtype, options: dict[str, float]) -> float:
    try:
        ys = odeint(
            problem.field, problem.start(dtype), problem.times(), method="rev_rk4", options=options, restarts=None
        )
    except RuntimeError:
        return REMOTE
    return float((ys.double() - problem.reference()).abs().max() / problem.reference().abs().max())


@DTYPES
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in REQUIRED]
)
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun"])
def test_gradients_are_those_of_direct(method: str, name: str, dtype: torch.dtype) -> None:
    """Or nearer to them than a tenth of what rounding makes of theirs: 2e-3 on Kepler orbits in float32."""
    problem = CLASSICAL[name]
    got, wanted = (gradient(problem, method, dtype, mode) for mode in ("reversible", "direct"))
    exact = gradient(problem, method, torch.float64, "direct")
    assert distance(got, wanted) <= max(CLOSE[dtype], distance(wanted, exact) / 10)


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def gradient(problem: Classical, method: str, dtype: torch.dtype, mode: str) -> Tensor:
    y0 = problem.start(dtype).requires_grad_()
    options = {"step_size": problem.step}
    ys = odeint(problem.field, y0, problem.times(), method=method, options=options, gradient=mode)
    return torch.autograd.grad(ys[1:].square().mean(), y0)[0]


@pytest.mark.parametrize("name", ["oscillator", "lorenz", "decay10"])
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf4"])
def test_few_states_are_stored(method: str, name: str) -> None:
    """Fewer than half as many restarts as steps, even where a solution decays by a tenth in every step."""
    problem = CLASSICAL[name]
    y0 = problem.start(torch.float64).requires_grad_()
    options = {"step_size": problem.step}
    solution = odeint(problem.field, y0, problem.times(), method=method, options=options, full_output=True)
    assert solution.stats.num_restarts < problem.num_steps / 2


def test_smooth_problems_need_hardly_any() -> None:
    problem = CLASSICAL["oscillator"]
    options = {"step_size": problem.step}
    y0 = problem.start(torch.float64).requires_grad_()
    solution = odeint(problem.field, y0, problem.times(), method="rev_rk4", options=options, full_output=True)
    assert solution.stats.num_restarts <= problem.num_steps / 20


@pytest.mark.parametrize("name", ["decay1", "pendulum", "forced_relaxation"])
@pytest.mark.parametrize("method", ["rev_dopri5", "rev_bosh3", "reversible_heun4"])
def test_adaptive_steps_meet_their_tolerance(method: str, name: str) -> None:
    """Errors of steps add up, and on stable problems hardly so: a hundred times the tolerance is a generous bound."""
    problem, tolerance = CLASSICAL[name], 1e-6
    ys = odeint(
        problem.field, problem.start(torch.float64), problem.times(), method=method, rtol=tolerance, atol=tolerance
    )
    assert float((ys - problem.reference()).abs().max()) <= 100 * tolerance
