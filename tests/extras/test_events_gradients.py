"""The gradients of when and where events happen: closed forms, the discrete event, memory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import odeint_event
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
@pytest.mark.parametrize("gradient", ["checkpoint", "direct"])
def test_higher_derivatives(gradient: str, order: int) -> None:
    inputs = numbers(**CLOSED["decay"][2])

    def derivative(t: Tensor) -> Tensor:
        for _ in range(order):
            t = torch.autograd.grad(t, inputs["rate"], create_graph=True)[0] + 0 * inputs["rate"]
        return t

    got = decay(inputs, method="rk4", options={"step_size": 0.005}, gradient=gradient)[0]
    # Each derivative in time costs RK4's last step one order: 1e-6 is left of the third with these steps.
    assert torch.allclose(derivative(got), derivative(decayed(inputs)[0]), rtol=1e-6)


@pytest.mark.parametrize("way", ["rev_dopri5", "dopri8 checkpoint"])
@pytest.mark.parametrize("case", CLOSED)
def test_second_derivatives_are_the_closed_ones(case: str, way: str) -> None:
    solved, closed, values = CLOSED[case]
    inputs = numbers(**values)
    got, wanted = (hessian(f, inputs) for f in (lambda inputs: solved(inputs, **WAYS[way]), closed))
    assert worst_difference(got, wanted) < (CLOSE, "")


def hessian(outputs: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of a weighted sum of all first derivatives."""
    first = torch.autograd.grad(sum(outputs(inputs)), list(inputs.values()), create_graph=True)
    total = sum(weight * slope for weight, slope in zip((1.0, -0.7, 0.4, 1.3, 0.9), first, strict=False))
    found = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


@pytest.mark.parametrize("way", COARSE.values(), ids=COARSE)
@pytest.mark.parametrize("case", CLOSED)
def test_second_derivatives_are_those_of_the_discrete_event(case: str, way: dict[str, Any]) -> None:
    solved, _, values = CLOSED[case]
    inputs = numbers(**values)
    got, direct = (hessian(lambda x, m=mode: solved(x, **way, gradient=m), inputs) for mode in (None, "direct"))
    assert worst_difference(got, direct) < (EXACT, "")


def test_parameters_of_the_event_function() -> None:
    surface = torch.nn.Linear(2, 1).double()
    with torch.no_grad():
        surface.weight.copy_(torch.tensor([[1.0, 0.0]]))
        surface.bias.fill_(-0.5)
    event_t, _ = odeint_event(
        lambda t, y: torch.stack([y[1], -y[0]]),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
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


@pytest.mark.parametrize("kind", ["dictionary", "variable"])
def test_a_level_that_the_event_function_keeps_has_its_gradient(kind: str) -> None:
    """exp(-t) = exp(-w) at t = w: what was kept during the search knows nothing of w."""
    w, cache, variable = leaf(), {}, None  # type: Any, dict[str, Tensor], Tensor | None

    def kept(t: Tensor, y: Tensor) -> Tensor:
        nonlocal variable
        if kind == "dictionary":
            return y - cache.setdefault("level", torch.exp(-w)) if "level" not in cache else y - cache["level"]
        variable = torch.exp(-w) if variable is None else variable
        return y - variable

    y0, t0 = torch.ones(1, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    event_t, _ = odeint_event(lambda t, y: -y, y0, t0, event_fn=kept, rtol=1e-9, atol=1e-9)
    (found,) = torch.autograd.grad(event_t, w)
    assert abs(found.item() - 1.0) < 1e-6
