"""Higher derivatives, torch.func transforms and torch.compile around a solve."""

import math

import pytest
import torch
from torch import nn
from torch.func import hessian

from revsolve import odeint

# torch scripts parts of its own forward mode and inductor on first use, and says that it should not.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
TIMES = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
SCHEMES = ["rk4", "rev_rk4", "reversible_heun", "alf4", "leapfrog"]
ROUNDING = 1e-12  # relative; the same arithmetic in another order


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def solve(field, y0, t=TIMES, method="rev_rk4", **settings):
    restarts = "auto" if method == "rk4" else 4  # plain methods have none
    return odeint(field, y0, t, method=method, options={"step_size": 0.1}, restarts=restarts, **settings)


def close(found, expected, tolerance=ROUNDING):
    return bool((found - expected).norm() <= tolerance * expected.norm())


def flat(tensors):
    return torch.cat([x.reshape(-1) for x in tensors])


class TestHigherDerivatives:
    @pytest.mark.parametrize("gradient", ["reversible", "direct"])
    def test_second_derivative_of_a_linear_ode_by_its_rate_is_the_analytic_one(self, gradient):
        rate = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
        y = odeint(
            lambda t, y: rate * y,
            torch.ones(1).double(),
            TIMES,
            method="rev_dopri8",
            options={"step_size": 0.1},
            gradient=gradient,
        )[-1]
        first = torch.autograd.grad(y.sum(), rate, create_graph=True)[0]
        second = torch.autograd.grad(first, rate, create_graph=True)[0]
        third = torch.autograd.grad(second, rate)[0]
        assert torch.stack([first, second, third]).tolist() == pytest.approx([math.exp(-0.7)] * 3, abs=1e-8)

    @pytest.mark.parametrize("method", SCHEMES)
    def test_derivatives_up_to_the_third_agree_with_plain_autograd(self, net, method):
        def derivatives(gradient):
            y0 = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
            t = TIMES.clone().requires_grad_()
            inputs = [y0, t, *net.parameters()]
            value = solve(lambda t, y: net(y) * torch.cos(t), y0, t, method, gradient=gradient).pow(3).sum()
            found = []
            for _ in range(3):
                grads = torch.autograd.grad(value, inputs, create_graph=True)
                found.append(flat(grads))
                value = found[-1].pow(2).sum()
            return found

        expected = derivatives("direct")
        found = derivatives(None)
        assert [close(a, b) for a, b in zip(found, expected, strict=True)] == [True, True, True]

    def test_hessian_of_autograd_functional(self, net):
        y0 = torch.randn(3, dtype=torch.float64)
        found = torch.autograd.functional.hessian(lambda y: solve(lambda t, x: net(x), y)[-1].sum(), y0)
        assert close(found, hessian(lambda y: solve(lambda t, x: net(x), y)[-1].sum())(y0))

    def test_gradient_penalty_reaches_the_parameters(self, net):
        def penalty(gradient):
            y0 = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
            out = solve(lambda t, y: net(y), y0, gradient=gradient)[-1].sum()
            slope = torch.autograd.grad(out, y0, create_graph=True)[0]
            return flat(torch.autograd.grad((slope.norm(dim=-1) - 1).pow(2).sum(), list(net.parameters())[:-1]))

        assert close(penalty("reversible"), penalty("direct"))


@pytest.mark.slow
def test_a_training_step_around_a_solve_compiles_into_one_graph(net):
    net = net.float()

    def loss(y0):
        return (
            odeint(lambda t, y: net(y), y0, [0.0, 1.0], method="rev_rk4", options={"step_size": 0.5}, restarts=4)
            .pow(2)
            .sum()
        )

    y0 = torch.randn(4, 3)
    expected = torch.autograd.grad(loss(y0), list(net.parameters()))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(y0), list(net.parameters()))
    assert close(flat(found), flat(expected), tolerance=1e-5)  # float32, other kernels
