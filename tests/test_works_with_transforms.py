"""Higher derivatives, torch.func transforms and torch.compile around a solve."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

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


class TestTransforms:
    @pytest.fixture
    def loss(self, net):
        def loss(params, y0, t=TIMES):
            return solve(lambda t, y: functional_call(net, params, (y,)) * torch.cos(t), y0, t).pow(2).sum()

        return loss

    @pytest.fixture
    def params(self, net):
        return {name: p.detach() for name, p in net.named_parameters()}

    def plain_gradients(self, loss, params, y0):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        y = y0.clone().requires_grad_()
        return torch.autograd.grad(loss(leaves, y), [y, *leaves.values()])

    def test_grad_of_state_and_parameters(self, loss, params):
        y0 = torch.randn(3, dtype=torch.float64)
        by_params, by_y0 = grad(loss, argnums=(0, 1))(params, y0)
        assert close(flat([by_y0, *by_params.values()]), flat(self.plain_gradients(loss, params, y0)))

    def test_vmap_agrees_with_a_loop(self, loss, params):
        ys = torch.randn(5, 3, dtype=torch.float64)
        assert close(vmap(lambda y: loss(params, y))(ys), torch.stack([loss(params, y) for y in ys]))

    def test_per_sample_gradients(self, loss, params):
        ys = torch.randn(5, 3, dtype=torch.float64)
        found = vmap(grad(loss), in_dims=(None, 0))(params, ys)["0.weight"]
        expected = torch.stack([self.plain_gradients(loss, params, y)[1] for y in ys])
        assert close(found, expected)

    def test_vmap_over_parameters_is_an_ensemble(self, loss, params):
        stacked = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
        y0 = torch.randn(3, dtype=torch.float64)
        found = vmap(loss, in_dims=(0, None))(stacked, y0)
        expected = torch.stack([loss({name: p[i] for name, p in stacked.items()}, y0) for i in range(2)])
        assert close(found, expected)

    @pytest.mark.filterwarnings(
        "ignore::DeprecationWarning"
    )  # torch's forward mode scripts a decomposition on first use
    def test_forward_and_reverse_jacobians_agree(self, net):
        final = lambda y: solve(lambda t, x: net(x), y)[-1]  # noqa: E731
        y0, direction = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        reverse = jacrev(final)(y0)
        assert close(jacfwd(final)(y0), reverse)
        assert close(jvp(final, (y0,), (direction,))[1], reverse @ direction)
        assert close(vjp(final, y0)[1](direction)[0], direction @ reverse)

    def test_grad_of_the_times(self, loss, params):
        y0 = torch.randn(3, dtype=torch.float64)
        t = TIMES.clone().requires_grad_()
        expected = torch.autograd.grad(loss(params, y0, t), t)[0]
        assert close(grad(lambda s: loss(params, y0, s))(TIMES), expected)

    def test_bounded_memory_gradients_are_refused_where_the_transform_differentiates(self, net):
        field = lambda t, y: net(y)  # noqa: E731
        with pytest.raises(ValueError, match=r"gradient='reversible' is not possible inside torch\.func"):
            vmap(lambda y: solve(field, y, gradient="reversible"))(torch.randn(2, 3, dtype=torch.float64))


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
