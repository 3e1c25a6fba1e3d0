"""Events: when and where a function of time and state crosses zero, with gradients against closed forms and torchdiffeq."""

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
from revsolve.events import find_root
from tests.equations import leaf, worst_difference

# Times are found to rounding, and closed forms differ by the error of the solve: below 1e-9 with these steps.
CLOSE = 1e-8
EXACT = 1e-12
WAYS: dict[str, dict[str, Any]] = {
    "rev_dopri5": {"method": "rev_dopri5", "rtol": 1e-11, "atol": 1e-12},
    "rev_dopri5 direct": {"method": "rev_dopri5", "rtol": 1e-11, "atol": 1e-12, "gradient": "direct"},
    "dopri8 checkpoint": {"method": "dopri8", "rtol": 1e-11, "atol": 1e-12},
    "rev_rk4 fixed": {"method": "rev_rk4", "options": {"step_size": 0.004}},
    "rk4 fixed": {"method": "rk4", "options": {"step_size": 0.004}},
    "alf4 fixed": {"method": "alf4", "options": {"step_size": 0.007}},
}
# Steps so long that the gradient of the discrete event is visibly not that of the equation.
COARSE: dict[str, dict[str, Any]] = {
    "rev_rk4": {"method": "rev_rk4", "options": {"step_size": 0.3}},
    "reversible_heun": {"method": "reversible_heun", "options": {"step_size": 0.3}},
    "alf": {"method": "alf", "options": {"step_size": 0.3}},
    "leapfrog": {"method": "leapfrog", "options": {"step_size": 0.3}},
    "euler": {"method": "euler", "options": {"step_size": 0.3}},
}
FIXED: dict[str, Any] = {"method": "rev_rk4", "options": {"step_size": 0.05}}


def fall(inputs: dict[str, Tensor], **solve: Any) -> tuple[Tensor, Tensor]:
    """When a ball thrown up at time t0 passes a level, and its velocity then."""
    height, velocity, gravity, level, t0 = inputs.values()

    def event_fn(t: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        return y[0] - level

    y0 = (height * 1.0, velocity * 1.0)
    event_t, (_, velocities) = odeint_event(lambda t, y: (y[1], -gravity), y0, t0, event_fn=event_fn, **solve)
    return event_t, velocities[1]


def fallen(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    height, velocity, gravity, level, t0 = inputs.values()
    last = -torch.sqrt(velocity**2 + 2 * gravity * (height - level))
    return t0 + (velocity - last) / gravity, last


def decay(inputs: dict[str, Tensor], **solve: Any) -> tuple[Tensor, Tensor]:
    """When a decay whose rate grows like exp(t) comes down to a moving level; the second component never fires."""
    amount, rate, level, t0 = inputs.values()

    def event_fn(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[0] - level * torch.exp(-torch.exp(t) * rate / 2), y[0] + 1])

    y0 = amount.reshape(1)
    event_t, ys = odeint_event(lambda t, y: -rate * torch.exp(t) * y, y0, t0, event_fn=event_fn, **solve)
    return event_t, ys[1, 0]


def decayed(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    amount, rate, level, t0 = inputs.values()
    event_t = torch.log(2 * (torch.log(amount / level) / rate + torch.exp(t0)))
    return event_t, level * torch.exp(-torch.exp(event_t) * rate / 2)


def numbers(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in values.items()}


CLOSED = {
    "fall": (fall, fallen, {"height": 3.0, "velocity": 2.0, "gravity": 9.8, "level": 1.0, "t0": 0.3}),
    "decay": (decay, decayed, {"amount": 2.0, "rate": 0.8, "level": 1.1, "t0": -0.4}),
}


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(outputs[0] + 2 * outputs[1], list(inputs.values()), materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("case", CLOSED)
def test_closed_forms(case: str, way: dict[str, Any]) -> None:
    solved, closed, values = CLOSED[case]
    inputs = numbers(**values)
    got, wanted = solved(inputs, **way), closed(inputs)
    assert torch.allclose(torch.stack(got), torch.stack(wanted), rtol=0, atol=CLOSE)
    assert worst_difference(gradients(got, inputs), gradients(wanted, inputs)) < (CLOSE, "")


@pytest.mark.parametrize("way", COARSE.values(), ids=COARSE)
@pytest.mark.parametrize("case", CLOSED)
def test_gradient_is_that_of_the_discrete_event(case: str, way: dict[str, Any]) -> None:
    solved, _, values = CLOSED[case]
    inputs = numbers(**values)
    got = gradients(solved(inputs, **way), inputs)
    direct = gradients(solved(inputs, gradient="direct", **way), inputs)
    assert worst_difference(got, direct) < (EXACT, "")


@pytest.mark.parametrize("name", ["height", "velocity", "gravity", "level", "t0"])
@pytest.mark.parametrize("way", COARSE.values(), ids=COARSE)
def test_gradient_is_the_slope_of_the_discrete_event(way: dict[str, Any], name: str) -> None:
    values = CLOSED["fall"][2]
    inputs = numbers(**values)
    slope = gradients(fall(inputs, **way), inputs)[name]
    with torch.no_grad():
        above, below = (fall(numbers(**{**values, name: values[name] + d}), **way) for d in (1e-5, -1e-5))
    difference = (above[0] - below[0] + 2 * (above[1] - below[1])) / 2e-5
    # Central differences: 1e-10 of truncation and 1e-16 / 1e-5 of rounding, times the size of third derivatives.
    assert torch.allclose(slope, difference, rtol=1e-7, atol=1e-8)


def bounces(inputs: dict[str, Tensor], count: int, **solve: Any) -> Tensor:
    height, gravity, restitution = inputs.values()
    t, y = torch.zeros((), dtype=torch.float64), (height * 1.0, torch.zeros_like(height))
    for _ in range(count):
        t, after = odeint_event(lambda t, y: (y[1], -gravity), y, t, event_fn=lambda t, y: y[0], **solve)
        y = (after[0][1], -restitution * after[1][1])
    return t


@pytest.mark.parametrize("way", [FIXED, {"method": "rev_bosh3"}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_bouncing_ball(count: int, way: dict[str, Any]) -> None:
    inputs = numbers(height=1.3, gravity=9.8, restitution=0.8)
    height, gravity, restitution = inputs.values()
    powers = sum((restitution**i for i in range(1, count)), start=torch.zeros(()))
    wanted = torch.sqrt(2 * height / gravity) * (1 + 2 * powers)
    got = bounces(inputs, count, **way)
    assert torch.allclose(got, wanted, rtol=0, atol=CLOSE)
    slopes, closed = (gradients((t, torch.zeros(())), inputs) for t in (got, wanted))
    assert all(torch.allclose(slopes[name], closed[name], rtol=0, atol=CLOSE) for name in inputs)


@pytest.mark.parametrize("order", [2, 3])
def test_higher_derivatives_of_the_direct_gradient(order: int) -> None:
    inputs = numbers(**CLOSED["decay"][2])

    def derivative(t: Tensor) -> Tensor:
        for _ in range(order):
            t = torch.autograd.grad(t, inputs["rate"], create_graph=True)[0] + 0 * inputs["rate"]
        return t

    got = decay(inputs, method="rk4", options={"step_size": 0.005}, gradient="direct")[0]
    # Each derivative in time costs RK4's last step one order: 1e-6 is left of the third with these steps.
    assert torch.allclose(derivative(got), derivative(decayed(inputs)[0]), rtol=1e-6)


def test_higher_derivatives_of_other_gradients_raise() -> None:
    inputs = numbers(**CLOSED["fall"][2])
    with pytest.raises(RuntimeError, match="gradient='direct'"):
        torch.autograd.grad(fall(inputs, **FIXED)[0], inputs["height"], create_graph=True)


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


def test_parameters_of_the_event_function() -> None:
    surface = torch.nn.Linear(2, 1).double()
    with torch.no_grad():
        surface.weight.copy_(torch.tensor([[1.0, 0.0]]))
        surface.bias.fill_(-0.5)
    event_t, _ = odeint_event(
        cosine,
        start(),
        torch.tensor(0.0, dtype=torch.float64),
        event_fn=lambda t, y: surface(y),
        rtol=1e-11,
        atol=1e-12,
    )
    event_t.backward()
    # w cos t - u sin t + b = 0 at t = pi/3: dt = (cos dw - sin du + db) / sin.
    sine = math.sin(math.pi / 3)
    assert torch.allclose(surface.weight.grad, torch.tensor([[0.5 / sine, -1.0]], dtype=torch.float64), atol=CLOSE)
    assert torch.allclose(surface.bias.grad, torch.tensor([1 / sine], dtype=torch.float64), atol=CLOSE)


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


def kept_numbers(step_size: float) -> int:
    """How many numbers a solve to an event keeps for its backward pass."""
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x  # held, so that no later one gets its address
        return x

    y0, rate = torch.ones(1000, dtype=torch.float64, requires_grad=True), leaf()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        odeint_event(
            lambda t, y: -(torch.cos(rate) ** 2) * y - y,
            y0,
            torch.tensor(0.0, dtype=torch.float64),
            event_fn=lambda t, y: y.mean() - 0.1,
            method="rev_rk4",
            options={"step_size": step_size},
            restarts=1000,
        )
    return sum(x.numel() for x in kept.values())


def test_memory_does_not_grow_with_the_steps() -> None:
    assert kept_numbers(0.005) <= kept_numbers(0.05)


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
    found = find_root(lambda x: calls.append(x) or f(x), (b, f(b)), (a, f(a)), 1e-12)
    # Bisection needs 43 halvings of 5 to 1e-12; a flat root may vanish by underflow before.
    assert abs(found - root) < 1e-11
    assert len(calls) < 150
