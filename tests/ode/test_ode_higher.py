"""Higher derivatives: the gradient is itself differentiable, and its derivatives are those of closed forms and of `direct`."""

import pytest
import torch
from torch import Tensor

from revsolve import odeint
from tests.equations import leaf, relative_difference

TIMES = torch.tensor([0.0, 0.6, 1.0], dtype=torch.float64)
METHODS = ["rev_rk4", "reversible_heun4", "alf4", "leapfrog", "rk4"]


def solve(method: str, field: object, y0: Tensor, t: Tensor = TIMES, mode: str | None = None) -> Tensor:
    return odeint(field, y0, t, method=method, options={"step_size": 0.05}, gradient=mode)


@pytest.mark.parametrize("method", ["rev_rk4", "rev_dopri5", "reversible_heun4", "alf4", "rk4"])
def test_second_derivatives_of_exponential_decay(method: str) -> None:
    """y(1) = y0 exp(-a): twenty steps of order 4 are within 1e-5 of it, derivatives included."""
    y0, rate = leaf(), leaf()
    end = solve(method, lambda t, y: -rate * y, y0)[-1]
    (by_rate,) = torch.autograd.grad(end, rate, create_graph=True)
    by_both = torch.autograd.grad(by_rate, [rate, y0])
    decay = torch.exp(-rate.detach())
    wanted = (y0.detach() * decay, -decay)
    torch.testing.assert_close(by_both, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun4", "alf4", "leapfrog"])
def test_second_derivatives_are_those_of_direct(method: str, mode: str) -> None:
    """With respect to the state, the times, parameters and a closed-over result, all at once."""
    weight, y0, code = leaf(3, 3), leaf(3), leaf(3)
    t = TIMES.clone().requires_grad_()

    def hessian_times_ones(gradient: str) -> Tensor:
        encoded = torch.sin(code)
        ys = solve(method, lambda t, y: torch.tanh(weight @ y * torch.cos(t)) + encoded, y0, t, gradient)
        inputs = [weight, y0, code, t]
        first = torch.autograd.grad(ys.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), inputs)
        return torch.cat([g.flatten() for g in second])

    assert relative_difference(hessian_times_ones(mode), hessian_times_ones("direct")) < 1e-12


def test_third_derivative() -> None:
    """d3/dy0 of the logistic solution, against automatic differentiation of its closed form."""
    y0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def third(end: Tensor) -> Tensor:
        for _ in range(3):
            (end,) = torch.autograd.grad(end, y0, create_graph=True)
        return end.detach()

    growth = torch.exp(TIMES[-1])
    wanted = third(y0 * growth / (1 - y0 + y0 * growth))
    torch.testing.assert_close(third(solve("rev_rk4", lambda t, y: y * (1 - y), y0)[-1]), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str) -> None:
    """Finite differences agree, for all inputs; the step divides no span, so that their steps are no more and no fewer."""
    y0, rate, t = leaf(2), leaf(), TIMES.clone().requires_grad_()

    def solution(y0: Tensor, rate: Tensor, t: Tensor) -> Tensor:
        field = lambda s, y: torch.sin(rate * y + s)  # noqa: E731
        return odeint(field, y0, t, method=method, options={"step_size": 0.27})

    assert torch.autograd.gradcheck(solution, (y0, rate, t))


def test_gradgradcheck() -> None:
    y0, rate = leaf(2), leaf()

    def solution(y0: Tensor, rate: Tensor) -> Tensor:
        return odeint(lambda s, y: torch.sin(rate * y + s), y0, TIMES, method="rev_rk4", options={"step_size": 0.4})

    assert torch.autograd.gradgradcheck(solution, (y0, rate))


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_up_to_the_third_are_those_of_direct(method: str) -> None:
    """Whether restarts come where they are needed or where they are told to is the same for all of them."""
    weight, y0, t = leaf(3, 3), leaf(3), TIMES.clone().requires_grad_()

    def derivatives(mode: str | None) -> list[Tensor]:
        field = lambda s, y: torch.tanh(weight @ y) * torch.cos(s)  # noqa: E731
        value = odeint(field, y0, t, method=method, options={"step_size": 0.25}, gradient=mode).pow(3).sum()
        found = []
        for _ in range(3):
            grads = torch.autograd.grad(value, [weight, y0, t], create_graph=True)
            found.append(torch.cat([g.flatten() for g in grads]))
            value = found[-1].square().sum()
        return [x.detach() for x in found]

    pairs = zip(derivatives(None), derivatives("direct"), strict=True)
    assert [relative_difference(a, b) < 1e-12 for a, b in pairs] == [True] * 3


def test_gradients_of_the_end_times_are_the_field() -> None:
    """d y(t1) / d t1 = f(t1, y1) and d y / d t0 = -(dy/dy0) f(t0, y0), up to the error of the method."""
    y0 = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
    t = TIMES.clone().requires_grad_()
    field = lambda s, y: torch.sin(3 * y) * torch.cos(s)  # noqa: E731
    end = solve("rev_rk4", field, y0, t)[-1]
    by_t, by_y0 = torch.autograd.grad(end.sum(), [t, y0])
    wanted = torch.stack([-(by_y0 * field(t[0], y0)).sum(), torch.zeros(()).double(), field(t[-1], end).sum()])
    torch.testing.assert_close(by_t, wanted.detach(), rtol=0, atol=1e-5)
