"""Events: which crossings end a solve, when and where; called as in torchdiffeq."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revsolve import odeint, odeint_event
from revsolve.extras.events import find_root

FIXED: dict[str, Any] = {"method": "rev_rk4", "options": {"step_size": 0.05}}


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_that_hide_numbers_are_refused(transform: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match=r"differentiate with torch\.autograd"):
        transform(lambda y: odeint(cosine, y, torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y[0], **FIXED)[0])(
            start()[None][0]
        )


def cosine(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]])


def start() -> Tensor:
    return torch.tensor([1.0, 0.0], dtype=torch.float64)


EVENTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Any, float, float]] = {
    "a number": (lambda t, y: y[0], 0, 1.0, math.pi / 2),
    "first of several": (lambda t, y: torch.stack([y[0] + 0.5, y[0] - 0.5, y[0]]), 0, 1.0, math.pi / 3),
    "a matrix of them": (lambda t, y: torch.stack([y[0] + 0.5, y[0] - 0.5]).view(2, 1), 0, 1.0, math.pi / 3),
    "upwards only": (lambda t, y: y[0], 1, 1.0, 3 * math.pi / 2),
    "downwards only": (lambda t, y: y[0], -1, 1.0, math.pi / 2),
    "one direction each": (lambda t, y: torch.stack([y[0], y[0] + 0.5]), [1, -1], 1.0, 2 * math.pi / 3),
    "zero at the start": (lambda t, y: y[1], 0, 1.0, math.pi),
    "time alone": (lambda t, y: t - 1.7, 0, 1.0, 1.7),
    "backwards": (lambda t, y: y[0] - 0.5, 0, -1.0, -math.pi / 3),
    "backwards, upwards": (lambda t, y: y[0] - 0.5, 1, -1.0, -5 * math.pi / 3),
    "at the end of a step": (lambda t, y: t - 0.3, 0, 1.0, 0.3),
    "in the middle of a step": (lambda t, y: t - 0.325, 0, 1.0, 0.325),
}


@pytest.mark.parametrize("way", [FIXED, {"rtol": 1e-10, "atol": 1e-10}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_which_crossing_counts(
    event: tuple[Callable[[Tensor, Tensor], Tensor], Any, float, float], way: dict[str, Any]
) -> None:
    event_fn, direction, forward, wanted = event
    options = {**way.get("options", {}), "event_direction": direction}
    t = torch.tensor([0.0, forward], dtype=torch.float64)
    event_t, ys = odeint(cosine, start(), t, event_fn=event_fn, **{**way, "options": options})
    # RK4 with steps of 0.05 errs by 1e-7 over one period.
    assert abs(float(event_t) - wanted) < 1e-6
    assert torch.allclose(ys, torch.stack([start(), torch.stack([event_t.cos(), -event_t.sin()])]), atol=1e-6)


def test_an_event_that_goes_on_does_not_fire_again() -> None:
    t, y = torch.tensor(0.0, dtype=torch.float64), start()
    times = []
    for _ in range(4):
        t, ys = odeint_event(cosine, y, t, event_fn=lambda t, y: y[0], method="rev_rk4", options={"step_size": 0.01})
        y = ys[1]
        times.append(float(t))
    assert times == pytest.approx([(0.5 + i) * math.pi for i in range(4)], abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_event_keeps_dtype_and_structure(dtype: torch.dtype) -> None:
    y0 = {"a": torch.ones(2, 3, dtype=dtype), "b": torch.ones(2, dtype=torch.complex64)}
    event_t, ys = odeint_event(
        lambda t, y: {"a": -y["a"], "b": 1j * y["b"]},
        y0,
        torch.tensor(0.0, dtype=dtype),
        event_fn=lambda t, y: y["a"].sum() - 3.0,
        **FIXED,
    )
    assert event_t.dtype == dtype and ys["a"].dtype == dtype and ys["b"].dtype == torch.complex64
    assert ys["a"].shape == (2, 2, 3) and ys["b"].shape == (2, 2)
    assert float(event_t) == pytest.approx(math.log(2), abs=2e-6 if dtype == torch.float32 else 1e-7)


def test_on_every_device(device: torch.device) -> None:
    rate = torch.tensor(1.5, device=device, requires_grad=True)
    event_t, ys = odeint_event(
        lambda t, y: -rate * y,
        torch.ones(3, device=device),
        torch.zeros((), device=device, requires_grad=True),
        event_fn=lambda t, y: y - 0.5,
        **FIXED,
    )
    assert event_t.device.type == ys.device.type == device.type
    (slope,) = torch.autograd.grad(event_t, rate)
    assert float(slope) == pytest.approx(-math.log(2) / 1.5**2, rel=1e-5)


def growth(solver: Callable[..., Any], interface: Callable[..., Any], reverse_time: bool) -> Tensor:
    """When the sum of growing or shrinking states reaches a level, the states then, and how the time depends on the rate."""
    rate = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    event_t, ys = solver(
        lambda t, y: rate * y,
        torch.ones(2, dtype=torch.float64),
        torch.tensor(0.2, dtype=torch.float64),
        event_fn=lambda t, y: y.sum() - (1.0 if reverse_time else 4.0),
        reverse_time=reverse_time,
        odeint_interface=interface,
        method="dopri5",
        rtol=1e-9,
        atol=1e-9,
    )
    return torch.stack([event_t, *ys.flatten(), *torch.autograd.grad(event_t, rate)])


@pytest.mark.parametrize("reverse_time", [False, True])
def test_called_like_torchdiffeq(reverse_time: bool) -> None:
    ours = growth(odeint_event, odeint, reverse_time)
    theirs = growth(torchdiffeq.odeint_event, torchdiffeq.odeint, reverse_time)
    # Two solves with a tolerance of 1e-9; torchdiffeq finds the time to its atol.
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_full_output() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y0 = start().requires_grad_()
    event_t, solution = odeint(cosine, y0, t, event_fn=lambda t, y: y[0], full_output=True, **FIXED)
    assert torch.equal(solution.ts, torch.stack([t[0], event_t]))
    # The solve goes half into the 32nd step, which crosses and is rejected, and one more step leads to the event.
    assert solution.times[-1] == event_t.item()
    assert solution.times[-2] == pytest.approx(31.5 * 0.05)
    assert (solution.stats.num_steps, solution.stats.num_rejected) == (32, 1)


RAISES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "never": ({"event_fn": lambda t, y: y[0] + 2}, RuntimeError, r"no event by t = 2\.0.* after 40 steps"),
    "wrong direction": (
        {"event_fn": lambda t, y: t - 0.5, "options": {"event_direction": -1, "step_size": 0.05, "max_num_steps": 40}},
        RuntimeError,
        r"event_fn is \[1\.5",
    ),
    "NaN": ({"event_fn": lambda t, y: torch.sqrt(0.81 - t)}, RuntimeError, r"event_fn returned NaN at t = 0\.85"),
    "flat": ({"event_fn": lambda t, y: torch.sign(y[0] - HALF)}, RuntimeError, "has no derivative"),
    "not a tensor": ({"event_fn": lambda t, y: 1.0}, TypeError, "must return a real floating point tensor"),
    "whole numbers": ({"event_fn": lambda t, y: torch.ones(2).long()}, TypeError, "returned torch.int64"),
    "three times": ({"t": torch.tensor([0.0, 1.0, 2.0])}, ValueError, "holds 3 times"),
    "no step size": ({"options": {}}, ValueError, "step_size must be a positive number"),
    "direction": ({"options": {"event_direction": 2}}, ValueError, "event_direction must be -1, 0 or 1"),
    "directions": ({"options": {"event_direction": [1, 1]}}, ValueError, "each of the 1 components"),
    "steps": ({"options": {"step_size": 0.1, "max_num_steps": 0}}, ValueError, "max_num_steps must be a whole number"),
    "dense": ({"options": {"dense": True}}, ValueError, "unknown option 'dense'"),
    "jump": (
        {"t": torch.tensor([0.0, 1.0], requires_grad=True), "method": "bosh3", "options": {"jump_t": [0.5]}},
        ValueError,
        "leave out jump_t",
    ),
}
HALF = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", RAISES)
def test_messages(case: str) -> None:
    changed, kind, message = RAISES[case]
    arguments = {"t": torch.tensor([0.0, 1.0]), "event_fn": lambda t, y: y[0], "method": "rev_rk4"}
    options = {"step_size": 0.05, "max_num_steps": 40}
    arguments = {**arguments, "options": options, **changed}
    with pytest.raises(kind, match=message):
        odeint(cosine, start(), **arguments)


@given(root=st.floats(-3, 3), power=st.sampled_from([1, 3, 5]), width=st.floats(0.1, 5), off=st.floats(0.01, 0.99))
def test_find_root(root: float, power: int, width: float, off: float) -> None:
    def f(x: float) -> float:
        return math.copysign(abs(x - root) ** power, x - root) * (1 + math.exp(x))

    a, b = root - off * width, root + (1 - off) * width
    calls: list[float] = []
    found, _ = find_root(lambda x: calls.append(x) or f(x), (b, f(b)), (a, f(a)), 1e-12)
    # Bisection needs 43 halvings of 5 to 1e-12; a flat root may vanish by underflow before.
    assert abs(found - root) < 1e-11
    assert len(calls) < 150
