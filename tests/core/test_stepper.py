"""Steppers: steps land where they must, follow the error, and the recorded grid is the one that was walked."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revsolve import odeint
from revsolve.prepare.grid import fixed_grid

FINE = {"rtol": 1e-6, "atol": 1e-6}


def wave(t: Tensor, y: Tensor) -> Tensor:
    """Smooth, except that it is ten times as fast between t = 1 and t = 2."""
    return torch.cos(t) * torch.where((t > 1) & (t < 2), 10.0, 1.0) * torch.stack([y[1], -y[0]])


def times_of(t: list[float], **solve: Any) -> list[float]:
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return odeint(wave, y0, torch.tensor(t, dtype=torch.float64), full_output=True, **solve).times


@given(
    ends=st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=5, unique=True),
    step_size=st.floats(0.05, 30.0),
    backward=st.booleans(),
)
def test_fixed_steps_are_equal_and_land(ends: list[float], step_size: float, backward: bool) -> None:
    """Between two outputs: equal steps, none longer than asked for by more than the millionth that float32 times need."""
    times = sorted(ends, reverse=backward)
    grid = fixed_grid(times, step_size, "rk4")().grid
    assert [grid.times[n] for n in grid.outputs] == times
    for (a, b), (s, t) in zip(itertools.pairwise(grid.outputs), itertools.pairwise(times), strict=True):
        steps = torch.tensor(grid.times[a : b + 1], dtype=torch.float64).diff().abs()
        assert steps.max() <= step_size * (1 + 2e-6)
        assert b - a <= abs(t - s) / step_size + 1
        assert (steps - steps.mean()).abs().max() <= 1e-13 * 10


@pytest.mark.parametrize("method", ["dopri5", "rev_bosh3", "reversible_heun4"])
@pytest.mark.parametrize("t", [[0.0, 0.1, 1.7, 3.0], [3.0, 1.7, 0.1, 0.0]], ids=["forward", "backward"])
def test_adaptive_steps_land_on_every_output(method: str, t: list[float]) -> None:
    times = times_of(t, method=method, **FINE)
    assert set(t) <= set(times)
    assert times == sorted(times, reverse=t[0] > t[-1])
    assert len(set(times)) == len(times)


def test_they_land_on_the_times_of_jumps() -> None:
    times = times_of([0.0, 3.0], options={"jump_t": torch.tensor([1.0]), "step_t": torch.tensor([2.0])}, **FINE)
    assert {1.0, 2.0} <= set(times)


def test_they_are_shorter_where_the_field_is_fast() -> None:
    times = times_of([0.0, 1.0, 2.0, 3.0], method="dopri5", **FINE)
    fast = [b - a for a, b in itertools.pairwise(times) if 1.0 <= a < 2.0]
    slow = [b - a for a, b in itertools.pairwise(times) if a >= 2.0]
    assert sum(fast) / len(fast) < 0.6 * sum(slow) / len(slow)


def test_landing_does_not_shorten_what_follows() -> None:
    """Outputs cut steps, but the controller remembers how long they may be: a step per output and few more."""
    few = times_of([0.0, 0.9], method="dopri5", **FINE)
    many = times_of([0.9 * i / 40 for i in range(41)], method="dopri5", **FINE)
    assert len(many) <= 40 + len(few)


LIMITS = {"max_step": 0.05, "first_step": 0.01}


@pytest.mark.parametrize("method", ["dopri5", "rev_bosh3"])
def test_limits_are_kept(method: str) -> None:
    times = times_of([0.0, 0.9], method=method, options=LIMITS, **FINE)
    assert times[1] == pytest.approx(0.01)
    assert max(b - a for a, b in itertools.pairwise(times)) <= 0.05 * (1 + 1e-9)


def test_a_minimal_step_is_taken_whatever_the_error() -> None:
    times = times_of([0.0, 3.0], method="dopri5", options={"min_step": 0.2}, **FINE)
    inner = [b - a for a, b in itertools.pairwise(times[:-1])]
    assert min(inner) >= 0.2 * (1 - 1e-9)


@pytest.mark.parametrize("method", ["dopri5", "rev_dopri5", "rev_tsit5", "rev_bosh3", "alf4", "reversible_heun4"])
def test_tighter_tolerances_give_smaller_errors(method: str) -> None:
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    t = torch.tensor([0.0, 3.0], dtype=torch.float64)
    turn = lambda t, y: torch.stack([y[1], -y[0]])  # noqa: E731
    wanted = torch.tensor([math.cos(3), -math.sin(3)], dtype=torch.float64)
    loose, tight = (
        float((odeint(turn, y0, t, method=method, rtol=tol, atol=tol)[-1] - wanted).norm()) for tol in (1e-3, 1e-6)
    )
    assert tight < loose / 50
    assert tight < 1e-4


@pytest.mark.parametrize("norm", [lambda x: x.abs().max(), torch.linalg.vector_norm], ids=["maximum", "euclidean"])
def test_norms_of_the_user(norm: Any) -> None:
    plain = times_of([0.0, 0.9], method="dopri5", **FINE)
    strict = times_of([0.0, 0.9], method="dopri5", options={"norm": norm}, **FINE)
    assert len(strict) >= len(plain)


def test_tolerances_of_each_entry() -> None:
    """An entry with a loose tolerance does not shorten the steps."""
    tolerances = torch.tensor([1e-8, 1e-8], dtype=torch.float64), torch.tensor([1e-2, 1e-2], dtype=torch.float64)
    tight, loose = (times_of([0.0, 0.9], method="dopri5", rtol=1e-8, atol=atol) for atol in tolerances)
    assert len(loose) < len(tight)


@pytest.mark.parametrize("method", ["rev_dopri5", "alf4", "dopri5"])
def test_one_time_is_the_initial_state(method: str) -> None:
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    ys = odeint(wave, y0, torch.tensor([0.5], dtype=torch.float64), method=method, **FINE)
    torch.testing.assert_close(ys, y0[None], rtol=0, atol=0)
