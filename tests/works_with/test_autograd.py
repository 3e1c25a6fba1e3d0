"""torch.autograd around a solve, besides plain backward passes: dual numbers of its forward mode, batches of cotangents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from revsolve import NaturalCubicPath, cdeint, fixed_point, odeint, odeint_event
from tests.front_doors import DOORS, difference, make_net, make_y0

EXACT = 1e-12  # relative; the order of summation, and rounding of undone steps

FIXED: dict[str, Any] = {"method": "rev_rk4", "options": {"step_size": 0.1}}

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


# Restarts that look at values become restarts every 4 steps in forward mode.
BLIND: dict[str, dict[str, Any]] = {door: {} if door == "fixed_point" else {"restarts": 4} for door in DOORS}


def tangent(solve: Any, x: Tensor, direction: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(solve(forward_ad.make_dual(x, direction))).tangent


def along(solve: Any, x: Tensor, direction: Tensor) -> Tensor:
    """The same by reverse mode: the derivative of the gradient, by what it is linear in."""
    return torch.autograd.functional.jvp(solve, x, direction)[1]


@pytest.mark.parametrize("wants_gradient", [False, True], ids=["", "others want gradients"])
@pytest.mark.parametrize("door", DOORS)
def test_dual_numbers_that_the_field_closes_over(door: str, wants_gradient: bool) -> None:
    """Also where a backward pass could be wanted besides: the tangent is not lost to what undoes the steps."""
    net, y0 = make_net().requires_grad_(wants_gradient), make_y0().detach().requires_grad_(wants_gradient)

    def solve(factor: Tensor, **mode: Any) -> Tensor:
        torch.manual_seed(1)
        return DOORS[door](lambda y: net(y) * factor, y0, **mode)

    factor, direction = torch.full((3,), 0.8, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found, wanted = tangent(solve, factor, direction), along(lambda x: solve(x, **BLIND[door]), factor, direction)
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("door", DOORS)
def test_dual_numbers_as_the_initial_state(door: str) -> None:
    net, y0 = make_net(), make_y0().detach()

    def solve(y0: Tensor, **mode: Any) -> Tensor:
        torch.manual_seed(1)
        return DOORS[door](net, y0, **mode)

    found, wanted = tangent(solve, y0, y0.cos()), along(lambda x: solve(x, **BLIND[door]), y0, y0.cos())
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)


def jvp(solve: Any, x: Tensor, direction: Tensor) -> Tensor:
    return torch.func.jvp(solve, (x,), (direction,))[1]


TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
START = make_y0().detach()
X = NaturalCubicPath(torch.sin(torch.arange(8.0, dtype=torch.float64)).view(4, 2).expand(4, 4, 2))


def at_times(net: nn.Module, t: Tensor, **way: Any) -> Tensor:
    return odeint(lambda t, y: net(y) * torch.cos(t), START, t, restarts=4, **way)


def densely(net: nn.Module, t: Tensor, **way: Any) -> Tensor:
    options = {**way.pop("options", {}), "dense": True}
    return at_times(net, t, options=options, **way)


def at_times_of_each(net: nn.Module, t: Tensor, **way: Any) -> Tensor:
    t = t[:, None] * torch.tensor([1.0, 0.5, 2.0, 0.1], dtype=torch.float64)
    return odeint(lambda t, y: net(y) * torch.cos(t)[:, None], START, t, restarts=4, **way)


def along_a_path(net: nn.Module, t: Tensor, **way: Any) -> Tensor:
    field = lambda t, z: torch.stack([net(z), z], -1) * torch.cos(t)  # noqa: E731
    return cdeint(X, field, START, t, restarts=4, **way)


@pytest.mark.parametrize("way", [FIXED, {"method": "rev_bosh3", "rtol": 1e-4, "atol": 1e-4}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("forward", [tangent, jvp])
@pytest.mark.parametrize("solve", [at_times, densely, at_times_of_each, along_a_path])
def test_derivatives_by_the_times_in_forward_mode(solve: Any, forward: Any, way: dict[str, Any]) -> None:
    """Once they were zero, without a word."""
    net, direction = make_net(), torch.tensor([0.2, 0.5, -1.0], dtype=torch.float64)
    found, wanted = (derivative(lambda t: solve(net, t, **way), TIMES, direction) for derivative in (forward, along))
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)


def test_times_of_another_transform_than_the_innermost() -> None:
    """The gradient by the state inside, its derivative by the times outside: tangents hide where the inner transform looks."""
    net, y0 = make_net(), make_y0().detach()

    def slope(t: Tensor) -> Tensor:
        field = lambda t, y: net(y) * torch.cos(t)  # noqa: E731
        return torch.func.grad(lambda y: odeint(field, y, t, restarts=4, **FIXED).square().sum())(y0)

    found = torch.func.jacfwd(slope)(TIMES)
    torch.testing.assert_close(found, torch.func.jacrev(slope)(TIMES), rtol=EXACT, atol=EXACT)


def test_events_are_refused_among_dual_numbers() -> None:
    event = lambda rate: odeint_event(  # noqa: E731
        lambda t, y: -rate * y, torch.ones(1), torch.tensor(0.0), event_fn=lambda t, y: y - 0.5
    )[0]
    with pytest.raises(RuntimeError, match=r"forward mode .*hide: differentiate with torch\.autograd\.grad"):
        tangent(event, torch.ones(()), torch.ones(()))


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@every_door
def test_undone_steps_are_refused_among_dual_numbers(door: Any, gradient: str) -> None:
    with forward_ad.dual_level(), pytest.raises(ValueError, match=f"gradient='{gradient}' is not possible here"):
        door(make_net(), make_y0(), gradient=gradient)


def test_implicit_gradients_are_refused_among_dual_numbers() -> None:
    with forward_ad.dual_level(), pytest.raises(ValueError, match="gradient='implicit' is not possible"):
        fixed_point(torch.cos, torch.ones(2), method="simple")


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
@every_door
def test_a_batch_of_cotangents(door: Any, gradient: str) -> None:
    net, y0 = make_net(), make_y0()
    torch.manual_seed(1)
    out, inputs = door(net, y0, gradient=gradient), [y0, *net.parameters()]
    cotangents = torch.randn(5, *out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(out, inputs, cotangent, retain_graph=True) for cotangent in cotangents]
    assert difference(list(found), [torch.stack(column) for column in zip(*rows, strict=True)]) < EXACT


def test_a_batch_of_cotangents_of_a_compiled_solve() -> None:
    """Steps are undone one by one then, without the program."""
    net, y0 = make_net(), make_y0()
    out = odeint(lambda t, y: net(y), y0, [0.0, 1.0], compile={"backend": "eager"}, **FIXED)
    cotangents = torch.randn(5, *out.shape, dtype=out.dtype)
    (found,) = torch.autograd.grad(out, y0, cotangents, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(out, y0, cotangent, retain_graph=True)[0] for cotangent in cotangents]
    assert difference([found], [torch.stack(rows)]) < EXACT


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize("method", ["rev_dopri5", "reversible_heun", "alf4", "leapfrog"])
def test_vectorized_jacobians(method: str, gradient: str) -> None:
    """By the state and by the times."""
    net, y0, t = make_net(), make_y0().detach(), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def final(y0: Tensor, t: Tensor) -> Tensor:
        field = lambda t, y: net(y) * torch.cos(t)  # noqa: E731
        return odeint(field, y0, t, method=method, options={"step_size": 0.1}, gradient=gradient)[-1, 0]

    found, wanted = (torch.autograd.functional.jacobian(final, (y0, t), vectorize=way) for way in (True, False))
    assert difference(list(found), list(wanted)) < EXACT


@pytest.mark.parametrize("method", ["rev_rk4", "rk4", "alf"])
def test_saved_tensors_may_come_back_as_other_tensors(method: str) -> None:
    """As from another device, torch.autograd.graph.save_on_cpu say."""
    net = torch.nn.Linear(2, 2).double()
    y0, found = torch.ones(3, 2, dtype=torch.float64, requires_grad=True), []
    for pack in (lambda x: x, torch.clone):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = odeint(lambda t, y: torch.tanh(net(y)), y0, [0.0, 1.0], method=method, options={"step_size": 0.1})
        found.append(torch.autograd.grad(y[-1].sum(), [y0, *net.parameters()]))
    assert all(map(torch.equal, *found))
