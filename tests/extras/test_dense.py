"""Dense output: how accurate it is between the steps, and its gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import Solution, method_names, odeint
from revsolve.extras.dense import _weight_derivatives, _weights
from revsolve.schemes.names import scheme
from tests.equations import EQUATIONS, leaf, loss_of, worst_difference

EXACT = 1e-12
BETWEEN = torch.linspace(0, 3, 401, dtype=torch.float64)
SINGLE = {"alf4_s3", "alf4_s5", "reversible_heun4_s3", "reversible_heun4_s5"}  # of order 4 between restarts only
METHODS = [name for name in method_names() if not name.startswith("rev_") and name not in {"dop853", *SINGLE}]


def swing(t: Tensor, y: Tensor) -> Tensor:
    return torch.cos(t) * y


def swung(t: Tensor) -> Tensor:
    return torch.exp(torch.sin(t))


def solved(
    t: Tensor | None = None, *, field: Any = swing, options: dict[str, Any] | None = None, **way: Any
) -> Solution:
    t = torch.tensor([0.0, 3.0], dtype=torch.float64) if t is None else t
    y0 = torch.ones(1, dtype=torch.float64)
    return odeint(field, y0, t, options={"dense": True, **(options or {})}, full_output=True, **way)


def errors(method: str, num_steps: int) -> Tensor:
    """The largest error of the state and of its derivative between the steps."""
    solution = solved(method=method, options={"step_size": 3 / num_steps})
    state, derivative = solution.evaluate(BETWEEN)[:, 0], solution.derivative(BETWEEN)[:, 0]
    return torch.stack(
        [(state - swung(BETWEEN)).abs().max(), (derivative - torch.cos(BETWEEN) * swung(BETWEEN)).abs().max()]
    )


@pytest.mark.parametrize("method", METHODS)
def test_order_between_the_steps(method: str) -> None:
    coarse, fine = errors(method, 24), errors(method, 48)
    order = scheme(method).order
    slopes = torch.log2(coarse / fine)
    # Slopes scatter by 0.35 for so few steps; rounding ends those of order 8.
    assert bool((slopes > order - 0.35).all() | (fine < 1e-11).all())


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("method", ["bosh3", "tsit5", "dopri5", "rev_dopri5"])
def test_as_accurate_between_adaptive_steps_as_at_them(method: str, tolerance: float) -> None:
    solution = solved(method=method, rtol=tolerance, atol=tolerance)
    steps = torch.tensor(solution.times, dtype=torch.float64)
    at, between = ((solution.evaluate(t)[:, 0] - swung(t)).abs().max() for t in (steps, BETWEEN))
    assert between < max(3 * at, tolerance / 4)


@pytest.mark.parametrize("num_knots", [2, 3, 4, 5])
def test_polynomials_are_reproduced(num_knots: int) -> None:
    knots = torch.tensor([0.0, 0.3, 0.7, 1.2, 1.3], dtype=torch.float64)[:num_knots]
    t = torch.linspace(0, 1.3, 50, dtype=torch.float64)
    nodes, degree = knots.expand(50, num_knots), 2 * num_knots - 1
    values, slopes = knots**degree, degree * knots ** (degree - 1)
    for_values, for_slopes = _weights(t[:, None], nodes)
    assert torch.allclose(for_values @ values + for_slopes @ slopes, t**degree, atol=1e-11)
    for_values, for_slopes = _weight_derivatives(t[:, None], nodes)
    assert torch.allclose(for_values @ values + for_slopes @ slopes, degree * t ** (degree - 1), atol=1e-10)


@pytest.mark.parametrize("way", [{"method": "rev_rk4", "options": {"step_size": 0.25}}, {}], ids=["fixed", "adaptive"])
def test_steps_are_met_exactly(way: dict[str, Any]) -> None:
    solution = solved(**way)
    steps = torch.tensor(solution.times, dtype=torch.float64)
    assert solution.interpolant is not None
    assert torch.equal(solution.evaluate(steps), solution.interpolant.states)
    assert torch.allclose(
        solution.derivative(steps)[:, 0], torch.cos(steps) * solution.evaluate(steps)[:, 0], rtol=1e-12
    )


def test_output_times_do_not_force_steps() -> None:
    few, many = solved(), solved(BETWEEN)
    assert few.times == many.times
    assert len(many.times) < 40 < len(BETWEEN)
    assert many.ys.shape == (401, 1)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize(
    "steps", [{"options": {"step_size": 0.11}}, {"rtol": 1e-2, "atol": 1e-3}], ids=["fixed", "adaptive"]
)
@pytest.mark.parametrize("times", [(0.0, 0.4, 1.3), (1.0, 0.3, -0.2)], ids=["forward", "backward"])
@pytest.mark.parametrize("name", EQUATIONS)
def test_gradient_is_direct(name: str, times: tuple[float, ...], steps: dict[str, Any], gradient: str) -> None:
    equation = EQUATIONS[name]()
    got, wanted = (
        dense_gradients(equation, times, method="rev_bosh3", gradient=mode, **steps) for mode in (gradient, "direct")
    )
    assert worst_difference(got, wanted) < (EXACT, "")


def dense_gradients(equation: Any, times: tuple[float, ...], **way: Any) -> dict[str, Tensor]:
    options = {"dense": True, **way.pop("options", {})}
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    solution = odeint(equation.func, equation.y0, t, args=equation.args, options=options, full_output=True, **way)
    loss = loss_of(solution.ys) + loss_of(solution.derivative(0.3 * t[0] + 0.7 * t[-1]))
    inputs = {**equation.inputs, "t": t}
    found = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


@pytest.mark.parametrize("times", [(0.0, 0.4, 1.3), (1.0, 0.3, -0.2)], ids=["forward", "backward"])
def test_gradient_of_the_times(times: tuple[float, ...]) -> None:
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    ys = solved(t, rtol=1e-10, atol=1e-11).ys[:, 0]
    weights = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)
    (got,) = torch.autograd.grad(weights @ ys, t)
    (wanted,) = torch.autograd.grad(weights @ torch.exp(torch.sin(t) - torch.sin(t[0])), t)
    # Errors of the solve and of the quintic between its steps.
    assert torch.allclose(got, wanted, atol=1e-8)


def test_shape_follows_time_and_state() -> None:
    y0 = {"a": torch.ones(2, 3), "b": torch.ones((), dtype=torch.complex64)}
    t = torch.tensor([0.0, 1.0])
    solution = odeint(lambda t, y: {"a": -y["a"], "b": 1j * y["b"]}, y0, t, options={"dense": True}, full_output=True)
    found = solution.evaluate(torch.rand(4, 5))
    assert found["a"].shape == (4, 5, 2, 3) and found["b"].shape == (4, 5)
    assert found["b"].dtype == torch.complex64
    assert solution.evaluate(0.5)["a"].shape == (2, 3)
    assert solution.evaluate(0.5)["a"][0, 0] == pytest.approx(math.exp(-0.5), abs=1e-5)


def test_on_every_device(device: torch.device) -> None:
    rate, t = torch.tensor(1.5, device=device, requires_grad=True), torch.tensor([0.0, 0.4, 1.0], requires_grad=True)
    options = {"dense": True}
    ys = odeint(lambda t, y: -rate * y, torch.ones(2, 3, device=device), t.to(device), options=options)
    assert ys.device.type == device.type
    slope, slope_t = torch.autograd.grad(ys[1].mean(), (rate, t))
    assert float(slope) == pytest.approx(-0.4 * math.exp(-0.6), rel=1e-4)
    assert slope_t.tolist() == pytest.approx([1.5 * math.exp(-0.6), -1.5 * math.exp(-0.6), 0.0], rel=1e-4, abs=1e-6)


def test_the_field_is_evaluated_again_instead_of_kept() -> None:
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x
        return x

    weight = leaf(100, 1)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return (torch.tanh(y * weight) * weight).mean(0)

    solution = solved(field=field, method="rev_rk4", options={"step_size": 0.02})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        solution.evaluate(BETWEEN)
    # Weights of the interpolation, but none of the 150 hidden layers of 100 numbers.
    assert sum(x.numel() == 100 and x.data_ptr() != weight.data_ptr() for x in kept.values()) <= 1


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_torch_func(transform: Any) -> None:
    def state(rate: Tensor) -> Tensor:
        way: dict[str, Any] = {"method": "rev_rk4", "options": {"step_size": 0.1}}
        return solved(field=lambda t, y: -rate * y, **way).evaluate(0.77)[0]

    # The derivative of RK4 with steps of 0.1 errs by 1.5e-6.
    assert transform(state)(torch.tensor(1.0, dtype=torch.float64)) == pytest.approx(-0.77 * math.exp(-0.77), abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solved().evaluate(3.5), r"covers \[0.0, 3.0\], but was asked for t = 3.5"),
        (lambda: solved().derivative(torch.tensor([1.0, -0.1])), "was asked for t = -0.1"),
        (lambda: solved(options={"dense": False, "jump_t": [1.0]}).evaluate(1.0), "this solve has no dense output"),
    ],
)
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("options", [{}, {"dense": False}, {"dense": None}], ids=str)
@pytest.mark.parametrize("ask", [Solution.evaluate, Solution.derivative])
def test_without_the_option_there_is_none(options: dict[str, Any], ask: Any) -> None:
    solution = odeint(swing, torch.ones(1), [0.0, 1.0], options=options, full_output=True)
    with pytest.raises(ValueError, match=r"solve again with options=\{'dense': True\}"):
        ask(solution, 0.5)
