"""Higher derivatives through every front door: those of `direct`, and those of closed forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import BrownianPath, LinearPath, cdeint, fixed_point, odeint, sdeint
from tests.front_doors import DOORS, difference, make_net, make_y0

EXACT = 1e-10  # relative; second derivatives of the same discrete map, added up in another order
ANALYTIC = 1e-8  # methods of order 8, constant coefficients or converged iterations: truncation is far below

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
replayed = pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])


def through_odeint(a: Tensor, y0: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """y' = a y, up to t = 1."""
    t = [0.0, 1.0]
    end = odeint(lambda t, y: a * y, y0, t, method="rev_dopri8", options={"step_size": 0.1})[-1]
    return end, lambda a, y0: y0 * torch.exp(a)


def through_sdeint(a: Tensor, y0: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """dy = a**2 dt + a**3 dW: coefficients that are constant, so that the discrete solution is the exact one."""
    path = BrownianPath(0.0, 1.0, tuple(y0.shape), seed=0, dt=0.1, dtype=y0.dtype, device=y0.device)
    fields = (lambda t, y: a**2 + 0 * y, lambda t, y: a**3 + 0 * y)
    W = path(0.0, 1.0)
    return sdeint(fields, y0, [0.0, 1.0], bm=path, dt=0.1)[-1], lambda a, y0: y0 + a**2 + a**3 * W


def through_cdeint(a: Tensor, y0: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """dy = a y dX along straight lines."""
    values = torch.tensor([[0.0], [0.7], [0.2], [1.1]], dtype=y0.dtype, device=y0.device)
    X = LinearPath(values.expand(len(y0), *values.shape))
    settings = {"method": "rev_dopri8", "options": {"step_size": 0.1}}
    end = cdeint(X, lambda t, y: (a * y).unsqueeze(-1), y0, [0.0, 3.0], **settings)[..., -1, :]
    return end, lambda a, y0: y0 * torch.exp(a * 1.1)


def through_fixed_point(a: Tensor, y0: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """z = a z + y0."""
    z = fixed_point(lambda z: a * z + y0, torch.zeros_like(y0), tol=0.0, max_steps=100, beta=0.5)
    return z, lambda a, y0: y0 / (1 - a)


CLOSED_FORMS = [through_odeint, through_sdeint, through_cdeint, through_fixed_point]


@pytest.mark.parametrize("solve", CLOSED_FORMS)
def test_derivatives_up_to_the_third_are_the_analytic_ones(solve: Callable[..., Any], device: torch.device) -> None:
    a = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    y0 = make_y0(device=device)

    def derivatives(value: Tensor) -> list[Tensor]:
        found = []
        for _ in range(3):
            grads = torch.autograd.grad(value, [a, y0], create_graph=True, materialize_grads=True)
            found += grads
            value = grads[0] + grads[1].square().sum()
        return found

    end, closed_form = solve(a, y0)
    found, wanted = derivatives(end.square().sum()), derivatives(closed_form(a, y0).square().sum())
    assert [difference([x], [y]) < ANALYTIC for x, y in zip(found, wanted, strict=True)] == [True] * 6


@replayed
@every_door
def test_hessian_vector_products(door: Any, gradient: str, device: torch.device) -> None:
    """With respect to the initial state, all parameters and a result from outside the field."""

    def product(gradient: str) -> list[Tensor]:
        net, y0, code = make_net(device=device), make_y0(device=device), make_y0(device=device)
        torch.manual_seed(1)
        encoded = torch.sin(code)
        loss = door(lambda y: net(y) * encoded, y0, gradient=gradient).square().sum()
        inputs = [y0, code, *net.parameters()]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        weights = [torch.linspace(-1.0, 1.0, x.numel(), dtype=x.dtype, device=device).view(x.shape) for x in inputs]
        return list(torch.autograd.grad(first, inputs, weights))

    assert difference(product(gradient), product("direct")) < EXACT


@every_door
def test_hessian_and_products_of_autograd_functional(door: Any) -> None:
    net, y0 = make_net(), make_y0().detach()

    def loss(y: Tensor, gradient: str | None = None) -> Tensor:
        torch.manual_seed(1)
        return door(net, y, gradient=gradient).square().sum()

    hessian = torch.autograd.functional.hessian(loss, y0)
    wanted = torch.autograd.functional.hessian(lambda y: loss(y, "direct"), y0)
    assert difference([hessian], [wanted]) < EXACT
    direction = torch.sin(y0)
    assert (
        difference([torch.autograd.functional.hvp(loss, y0, direction)[1]], [torch.tensordot(hessian, direction, 2)])
        < EXACT
    )


@replayed
@every_door
def test_a_gradient_penalty_trains(door: Any, gradient: str) -> None:
    """The penalty's gradient is that of direct, accumulated by backward() with that of the loss itself."""

    def trained(gradient: str) -> list[Tensor]:
        net, y0 = make_net(), make_y0()
        torch.manual_seed(1)
        loss = door(net, y0, gradient=gradient).square().sum()
        slope = torch.autograd.grad(loss, y0, create_graph=True)[0]
        (loss + (slope.norm(dim=-1) - 1).square().mean()).backward()
        return [p.grad for p in net.parameters()]

    assert difference(trained(gradient), trained("direct")) < EXACT


@replayed
def test_the_gradient_penalty_of_a_generator_that_is_an_sde(gradient: str, device: torch.device) -> None:
    """WGAN-GP (Gulrajani and others 2017, arXiv 1704.00028), its critic a CDE, as in Kidger and others (2021): the slope of the
    critic at paths between data and samples, with respect to these, enters what both are trained on."""
    times = torch.linspace(0.0, 1.0, 6, dtype=torch.float64, device=device)
    data = torch.sin(times)[:, None, None] * make_y0(device=device).detach()

    def penalty(gradient: str) -> list[Tensor]:
        generator, critic = make_net(device=device), make_net(device=device)
        readout = nn.Linear(3, 1).double().to(device)
        torch.manual_seed(1)
        fields = (lambda t, y: generator(y), lambda t, y: 0.3 * torch.cos(y))
        samples = sdeint(fields, make_y0(device=device), times.tolist(), dt=0.1, gradient=gradient)
        between = torch.lerp(data, samples, 0.4)  # (times, batch, channels)
        path = LinearPath(between.transpose(0, 1), times)
        matrix = lambda t, z: critic(z).unsqueeze(-1) * torch.ones(3, dtype=z.dtype, device=device)  # noqa: E731
        start = torch.ones(len(between[0]), 3, dtype=torch.float64, device=device)
        scores = readout(cdeint(path, matrix, start, [0.0, 1.0], method="reversible_heun", gradient=gradient)[:, -1])
        slope = torch.autograd.grad(scores.sum(), between, create_graph=True)[0]
        loss = (slope.norm(dim=(0, 2)) - 1).square().mean()
        return list(torch.autograd.grad(loss, [*generator.parameters(), *critic.parameters(), readout.weight]))

    assert difference(penalty(gradient), penalty("direct")) < EXACT


def test_gradients_of_implicit_differentiation_are_not_differentiated_again() -> None:
    z0 = torch.zeros(3, requires_grad=True)
    x = torch.full((3,), 0.5, requires_grad=True)
    z = fixed_point(lambda z: 0.5 * torch.tanh(z) + x, z0, method="simple", tol=1e-6)
    with pytest.raises(RuntimeError, match="gradient='implicit' cannot be differentiated again"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


@replayed
@every_door
def test_a_field_that_uses_the_start_itself(door: Callable[..., Any], gradient: str) -> None:
    """The start comes in twice, by itself and through the field: neither derivative holds that of the other."""

    def second(gradient: str) -> list[Tensor]:
        net, x = make_net(), make_y0()
        torch.manual_seed(1)
        y0 = 1.5 * x  # a result, which the field takes too, and what it was computed from
        loss = door(lambda y: net(y) + 0.3 * y0 - 0.1 * x, y0, gradient=gradient).square().sum()
        inputs = [x, *net.parameters()]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True))

    assert difference(second(gradient), second("direct")) < EXACT
