"""Counts: how often the field is called, forward and backward, by a field that counts, not by the solver's word."""

from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import method_names, odeint
from revsolve.prepare.times import Clock
from revsolve.schemes.names import scheme
from revsolve.schemes.tableau import TABLEAUS

NUM_STEPS = 20
TIMES = (0.0, 0.35, 1.0)
EVERY = 5  # steps between restarts
FIXED: dict[str, Any] = {"options": {"step_size": 0.05}}
REVERSIBLE = [name for name in method_names() if scheme(name).reversible]
PAIRS = [f"rev_{name}" for name in TABLEAUS]


class Counting:
    """A smooth field that counts its calls."""

    def __init__(self) -> None:
        self.weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        self.num_calls = 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.num_calls += 1
        return torch.tanh(y @ self.weight) * torch.cos(t) - y


class Counted:
    """The numbers of calls in the forward and in the backward pass of one solve, and its statistics."""

    def __init__(self, method: str, **solve: Any) -> None:
        field = Counting()
        y0 = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
        t = torch.tensor(TIMES, dtype=torch.float64)
        solution = odeint(field, y0, t, method=method, full_output=True, **solve)
        self.forward = field.num_calls
        solution.ys.sum().backward()
        self.backward, self.stats = field.num_calls - self.forward, solution.stats


@pytest.mark.parametrize("method", REVERSIBLE)
def test_backward_calls_once_per_forward_call(method: str) -> None:
    """Restarts at given steps: no segment is tried twice, so forward calls are those of the accepted steps and the traced one.

    A call that two steps share is made for each of them where a restart lies between.
    """
    counted = Counted(method, restarts=5, **FIXED)
    assert counted.forward - 1 <= counted.backward <= counted.forward + counted.stats.num_restarts


@pytest.mark.parametrize("method", PAIRS)
def test_a_pair_makes_twice_the_calls_of_its_method(method: str) -> None:
    num_stages = TABLEAUS[method.removeprefix("rev_")].advancing_stages
    counted = Counted(method, restarts=5, **FIXED)
    assert counted.backward == 2 * num_stages * NUM_STEPS


@pytest.mark.parametrize(("method", "to_begin"), [("reversible_heun", 1), ("alf", 1), ("leapfrog", 2)])
@pytest.mark.parametrize("restarts", [None, 5], ids=["no restarts", "3 restarts"])
def test_one_call_a_step(method: str, to_begin: int, restarts: int | None) -> None:
    """Besides, one call to begin and at every restart; leapfrog takes half a step back then, of order 2."""
    counted = Counted(method, restarts=restarts, **FIXED)
    begun = counted.stats.num_restarts + 1
    assert NUM_STEPS <= counted.backward <= NUM_STEPS + to_begin * begun
    assert NUM_STEPS <= counted.forward <= NUM_STEPS + to_begin * begun + 1


@pytest.mark.parametrize(
    ("method", "calls"), [("reversible_heun4", 10), ("alf4", 10), ("alf4_yoshida", 6), ("alf6", 18)]
)
def test_compositions_make_one_call_a_substep(method: str, calls: int) -> None:
    counted = Counted(method, restarts=None, **FIXED)
    assert NUM_STEPS * calls <= counted.backward <= NUM_STEPS * calls + 1


@pytest.mark.parametrize("method", ["rk4", "dopri5", "dopri8"])
def test_plain_methods_are_recomputed_once(method: str) -> None:
    counted = Counted(method, **FIXED)
    assert counted.backward == TABLEAUS[method].advancing_stages * NUM_STEPS


CALLS = {"rev_bosh3": 6, "rev_dopri5": 12, "reversible_heun": 1, "alf4": 10}


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize(("method", "calls"), CALLS.items(), ids=CALLS)
def test_rejected_steps_cost_nothing_backward(method: str, calls: int, gradient: str) -> None:
    """A first step far too long is rejected several times; backward goes through accepted steps only."""
    counted = Counted(method, gradient=gradient, rtol=1e-6, atol=1e-6, options={"first_step": 0.9}, restarts=4)
    stats = counted.stats
    assert stats.num_rejected > 0
    assert calls * stats.num_steps <= counted.backward <= calls * stats.num_steps + stats.num_restarts + 1


@pytest.mark.parametrize("method", ["rk4", "rev_rk4", "rev_dopri5", "reversible_heun", "alf4", "leapfrog"])
def test_statistics_say_what_was_counted(method: str) -> None:
    """The one call more is the traced one, which finds what the field depends on; its value serves the first step."""
    counted = Counted(method, **FIXED)
    assert counted.stats.num_backward_evaluations == counted.backward
    assert counted.stats.num_evaluations <= counted.forward <= counted.stats.num_evaluations + 1
    assert counted.stats.num_steps == NUM_STEPS


SOLVES: dict[str, dict[str, Any]] = {"fixed": FIXED, "adaptive": {"rtol": 1e-6, "atol": 1e-6}}
SOLVES["compiled"] = {**FIXED, "compile": {"backend": "eager"}}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
def test_step_sizes_add_up(solve: dict[str, Any]) -> None:
    stats = Counted("rev_dopri5", **solve).stats
    assert len(stats.step_sizes) == stats.num_steps
    assert sum(stats.step_sizes) == pytest.approx(1.0, abs=1e-12)
    assert min(stats.step_sizes) > 0


def test_without_gradients_nothing_is_stored() -> None:
    field = Counting()
    with torch.no_grad():
        solution = odeint(
            field, torch.ones(2, 3, dtype=torch.float64), torch.tensor(TIMES), method="rk4", full_output=True, **FIXED
        )
    assert not solution.ys.requires_grad
    assert solution.stats.num_stored_states == 0
    assert field.num_calls <= 4 * NUM_STEPS + 1  # float32 times make no further steps


def test_adaptive_fsal_methods_reuse_the_last_stage() -> None:
    """dopri5 with error estimate: 6 calls a step, for the seventh is the first of the next."""
    counted = Counted("dopri5", rtol=1e-6, atol=1e-6)
    num_tried = counted.stats.num_steps + counted.stats.num_rejected
    assert 6 * num_tried <= counted.forward <= 6 * num_tried + 4


@pytest.mark.parametrize("method", method_names())
def test_a_field_gets_the_times_of_its_clock(method: str) -> None:
    seen: list[Tensor] = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        seen.append(t)
        return torch.cos(t) - y

    odeint(field, torch.ones(2), torch.tensor(TIMES), method=method, restarts=restarts_of(method), **FIXED)
    assert {(t.shape, t.dtype) for t in seen} == {((), torch.float32)}
    made = sorted({float(t) for t in seen})
    alone = Clock(torch.float32, torch.device("cpu"))
    assert all(float(alone(t)) == t for t in made)


def restarts_of(method: str) -> Any:
    return EVERY if scheme(method).reversible else "auto"
