"""Restarts: where they happen, what they cost, and that they see growth."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revsolve import Restarts, Solution, odeint
from revsolve.core.problem import Stats
from revsolve.core.tape import Memo
from revsolve.schemes.names import scheme
from revsolve.steppers.fixed import FixedGrid


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -10 * y


def turn(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]])


def start() -> Tensor:
    return torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)


def solution(
    field: Any,
    num_steps: int,
    restarts: Any,
    method: str = "rev_rk4",
    mode: str = "reversible",
    y0: Tensor | None = None,
) -> Solution:
    t, options = torch.tensor([0.0, 0.01 * num_steps], dtype=torch.float64), {"step_size": 0.01}
    settings: dict[str, Any] = {"method": method, "options": options, "restarts": restarts, "gradient": mode}
    return odeint(field, start() if y0 is None else y0, t, full_output=True, **settings)


def differentiated(*case: Any) -> tuple[Stats, Tensor]:
    y0 = start()
    solved = solution(*case, y0=y0)
    return solved.stats, torch.autograd.grad(solved.ys[-1].square().sum(), y0)[0]


@pytest.mark.parametrize("interval", [1, 2, 7, 30, 100])
def test_an_interval_is_kept(interval: int) -> None:
    stats = solution(turn, 60, interval).stats
    assert stats.num_restarts == math.ceil(60 / interval) - 1
    assert stats.num_rejected == 0


def test_none_means_none() -> None:
    assert solution(turn, 60, None).stats.num_restarts == 0


@pytest.mark.parametrize("budget", [1, 3, 10])
@pytest.mark.parametrize("field", [turn, decay])
@pytest.mark.parametrize("interval", [None, 3])
def test_a_budget_is_kept(interval: int | None, field: Any, budget: int) -> None:
    """Stored pairs, the one at the start included and without the last one; and the gradient is the same."""
    (stats, grad), (freely, wanted) = (
        differentiated(field, 60, Restarts(interval, budget=limit), "rev_rk4", "reversible") for limit in (budget, None)
    )
    assert stats.num_stored_states <= 2 * budget + 1
    assert stats.num_restarts == freely.num_restarts
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("longest", [1, 4, 16])
def test_segments_are_no_longer_than_allowed(longest: int) -> None:
    assert solution(turn, 60, Restarts(longest=longest)).stats.num_restarts >= math.ceil(60 / longest) - 1


@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun"])
def test_decay_asks_for_more_of_them_than_rotation(method: str) -> None:
    few, many = (solution(field, 200, "auto", method).stats.num_restarts for field in (turn, decay))
    assert few < many


@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf", "alf4"])
def test_undoing_leads_back(method: str) -> None:
    """Rounding is hardly amplified between restarts, and the certificate says so."""
    solved = solution(decay, 200, "auto", method)
    solved.ys.sum().backward()
    assert 0.0 <= solved.stats.reconstruction_error < 1e-11


@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf", "rev_midpoint"])
@pytest.mark.parametrize("num_steps", [30, 700])
def test_memory_is_bounded_where_a_restart_comes_after_every_step(method: str, num_steps: int) -> None:
    """What was not kept is solved once more, so that a gradient costs half as much again at most."""
    stats, _ = differentiated(lambda t, y: -90 * y + torch.sin(t), num_steps, "auto", method, "reversible")
    assert stats.num_restarts >= num_steps / 3
    assert stats.num_stored_states <= 4 * math.sqrt(num_steps) + 16
    assert stats.num_backward_evaluations <= 2.2 * stats.num_evaluations
    assert stats.reconstruction_error < 1e-12


@pytest.mark.parametrize("budget", [None, 1, 4])
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf"])
def test_thinned_gradients_are_those_of_direct(method: str, budget: int | None) -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y.flip(0)) - 70 * y

    (_, exact), (_, found) = (
        differentiated(field, 300, Restarts(budget=budget), method, mode) for mode in ("direct", "reversible")
    )
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=0.0)


def test_memory_is_bounded_on_adaptive_grids() -> None:
    def robertson(t: Tensor, y: Tensor) -> Tensor:
        a, b = 0.04 * y[0] - 100 * y[1] * y[2], 3e3 * y[1] ** 2
        return torch.stack([-a, a - b, b])

    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    solved = odeint(robertson, y0, [0.0, 10.0], method="rev_dopri5", rtol=1e-6, atol=1e-8, full_output=True)
    wanted = odeint(robertson, y0, [0.0, 10.0], method="rev_dopri5", rtol=1e-6, atol=1e-8, gradient="direct")
    assert solved.stats.num_stored_states <= 4 * math.sqrt(solved.stats.num_steps) + 16
    got, exact = (torch.autograd.grad(ys[-1].square().sum(), y0)[0] for ys in (solved.ys, wanted))
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)


POLICIES = st.builds(Restarts, longest=st.none() | st.integers(1, 40), growth=st.floats(0.1, 10))
METHODS = ["rev_rk4", "rev_euler", "alf", "reversible_heun4", "reversible_heun", "leapfrog"]


def lengths(policy: Restarts, method: str, num_steps: int, size: Any) -> list[int]:
    """Those of the segments of a solve, where the gap after n steps of a segment is size(n) and the field is not known."""
    stepper = FixedGrid([0.1 * n for n in range(num_steps + 1)], [num_steps])
    growth, found = policy.policy(scheme(method), Memo(Unknown())), []
    while not stepper.done:
        start = stepper.num_steps
        ask = growth.begin(stepper, torch.ones(2))
        while stepper.num_steps < ask < num_steps:
            stepper.num_steps = ask
            ask = growth.extend(stepper, lambda scale, n=ask - start: size(n))
        stepper.num_steps = min(ask, num_steps)
        found.append(stepper.num_steps - start)
    return found


class Unknown:
    """A field without a derivative."""

    is_rate = True

    def value(self, t: float, x: Tensor) -> Tensor:
        return torch.zeros(2)

    control = product = value


@given(policy=POLICIES, num_steps=st.integers(1, 300), rate=st.floats(0.5, 30.0), method=st.sampled_from(METHODS))
def test_segments_end_for_any_growth(policy: Restarts, num_steps: int, rate: float, method: str) -> None:
    found = lengths(policy, method, num_steps, lambda n: 1e-3 * min(rate**n, 1e250))
    assert sum(found) == num_steps
    assert max(found) <= (policy.longest or 32)


@pytest.mark.parametrize("size", [0.0, math.inf, math.nan, 1e-300, 1e300])
def test_segments_survive_extreme_gaps(size: float) -> None:
    assert sum(lengths(Restarts(), "alf", 100, lambda n: size)) == 100


@pytest.mark.parametrize("method", ["reversible_heun", "alf", "leapfrog", "alf4_s3", "reversible_heun4_s5"])
def test_segments_are_even_where_z_changes_its_sign_with_every_step(method: str) -> None:
    """But for a first one of a single step, in which nothing is known of the field."""
    first = [2] if scheme(method).has_velocity else [1, 2]
    assert lengths(Restarts(longest=15), method, 42 + sum(first), lambda n: 1e-3) == [*first, 4, 8, 14, 14, 2]
    assert lengths(Restarts(longest=15), "rev_rk4", 48, lambda n: 1e-3) == [4, 8, 15, 15, 6]


@pytest.mark.parametrize(("method", "fits"), [("rev_rk4", True), ("reversible_heun4", True), ("alf", False)])
def test_a_gap_to_which_steps_do_not_add_may_not_grow_with_their_number(method: str, fits: bool) -> None:
    assert (max(lengths(Restarts(), method, 200, lambda n: 1e-3 * n)) == 32) is fits


def test_a_segment_ends_before_the_gap_is_too_large() -> None:
    """It grows by half in every step: twice what the first step left is reached after the third."""
    assert max(lengths(Restarts(growth=1.0), "rev_rk4", 100, lambda n: 1e-3 * 1.5**n)) <= 6


@pytest.mark.parametrize("longest", [4, 32])
def test_longest_does_not_depend_on_what_follows(longest: int) -> None:
    """The same segments at the start of a short and of a long solve."""
    short, long = (lengths(Restarts(), "rev_rk4", n, lambda n: 1e-3) for n in (100, 5000))
    assert long[: len(short) - 1] == short[:-1]
