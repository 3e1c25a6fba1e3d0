"""`with_divergence`: the trace of a Jacobian along a solve, exact or estimated, in every gradient mode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from revsolve import odeint, with_divergence
from tests.front_doors import difference

EXACT = 1e-12  # the modes sum in another order, and undone steps are rounded
TIMES = (0.0, 1.0)
STEPS = {"step_size": 0.1}

every_trace = pytest.mark.parametrize("trace", ["exact", "rademacher", "gaussian"])


def network(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), *middle, nn.Linear(16, 3)).double()


def points(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module, x: Tensor, trace: str, **settings: Any) -> Tensor:
    torch.manual_seed(2)
    x = x.requires_grad_()
    field, start = with_divergence(lambda t, x: torch.cos(t) * net(x), x, trace)
    end, log_det = odeint(field, start, TIMES, **settings)
    found = torch.autograd.grad(end[-1].square().sum() + log_det[-1].square().sum(), [x, *net.parameters()])
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)])
def test_exact_trace_is_that_of_the_jacobian(shape: tuple[int, ...]) -> None:
    net, x = network(), points(*shape)
    field, start = with_divergence(lambda t, x: net(x), x)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(net, sample).view(*[sample.numel()] * 2) for sample in x]
    )
    wanted = jacobians.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert torch.allclose(field(torch.tensor(0.0), start)[1], wanted, rtol=EXACT)


@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf4", "rev_dopri5"])
@every_trace
def test_gradient_is_that_of_direct(trace: str, method: str) -> None:
    options = {"rev_dopri5": None}.get(method, STEPS)
    found = {
        gradient: gradients(network(), points(5, 3), trace, method=method, options=options, gradient=gradient)
        for gradient in ("direct", "checkpoint", "reversible")
    }
    assert difference([found["checkpoint"]], [found["direct"]]) < EXACT
    assert difference([found["reversible"]], [found["direct"]]) < EXACT


def test_log_density_of_a_linear_flow() -> None:
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    field, start = with_divergence(lambda t, x: -rate * t * x, points(4, 3))
    _, log_det = odeint(field, start, TIMES)
    assert torch.allclose(log_det[-1], -3 * rate / 2, atol=1e-9)
    assert torch.allclose(torch.autograd.grad(log_det[-1, 0], rate)[0], torch.tensor(-1.5).double(), atol=1e-9)


@pytest.mark.parametrize("trace", ["rademacher", "gaussian"])
def test_estimates_are_unbiased(trace: str) -> None:
    net, x, count = network(), points(1, 3), 20_000
    exact, start = with_divergence(lambda t, x: net(x), x)
    torch.manual_seed(3)
    averaged, _ = with_divergence(lambda t, x: net(x), x, trace, num_samples=count)
    one_by_one, many = with_divergence(lambda t, x: net(x), x.expand(count, 3), trace)
    wanted, found = exact(torch.tensor(0.0), start)[1], one_by_one(torch.tensor(0.0), many)[1]
    error = found.std() / math.sqrt(count)
    assert abs(found.mean() - wanted) < 4 * error
    assert abs(averaged(torch.tensor(0.0), start)[1] - wanted) < 4 * error
    assert found.std() > 0.1, "one estimate is no exact trace"


def test_signs_are_exact_where_the_jacobian_is_diagonal() -> None:
    field, start = with_divergence(lambda t, x: x.sin(), points(4, 3), "rademacher")
    assert torch.allclose(field(torch.tensor(0.0), start)[1], start[0].cos().sum(1), rtol=EXACT)


@every_trace
def test_noise_is_that_of_the_solve(trace: str) -> None:
    net, x, times = network(), points(4, 3), torch.tensor(0.0)
    field, start = with_divergence(lambda t, x: net(x), x, trace)
    other, _ = with_divergence(lambda t, x: net(x), x, trace)
    assert torch.equal(field(times, start)[1], field(times, start)[1])
    assert torch.equal(field(times, start)[1], other(times, start)[1]) == (trace == "exact")


@every_trace
def test_dropout_of_the_field_is_replayed(trace: str) -> None:
    net, x = network(nn.Dropout(0.5)), points(5, 3)
    wanted = gradients(net, x, trace, method="rev_rk4", options=STEPS, gradient="direct")
    assert difference([gradients(net, x, trace, method="rev_rk4", options=STEPS)], [wanted]) < EXACT


@every_trace
def test_steps_that_are_recorded_for_compilation(trace: str) -> None:
    pytest.importorskip("torch", minversion="2.13", reason="compile= needs torch 2.13")
    net, x = network(), points(5, 3)
    wanted = gradients(net, x, trace, method="rev_rk4", options=STEPS)
    found = gradients(net, x, trace, method="rev_rk4", options=STEPS, compile={"backend": "eager"})
    assert difference([found], [wanted]) < EXACT


def test_per_sample_gradients() -> None:
    net, x = network(), points(5, 3)
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def log_det(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        field, start = with_divergence(lambda t, x: functional_call(net, weights, (x,)), x[None])
        return odeint(field, start, TIMES, method="rev_rk4", options=STEPS, restarts=4)[1][-1].sum()

    found = vmap(grad(log_det), in_dims=(None, 0))(weights, x)
    wanted = [grad(log_det)(weights, sample) for sample in x]
    assert all(difference([found[name]], [torch.stack([w[name] for w in wanted])]) < EXACT for name in weights)


def test_further_arguments_reach_the_field() -> None:
    field, start = with_divergence(lambda t, x, rate: rate * x, points(4, 3))
    assert torch.allclose(odeint(field, start, TIMES, args=(0.5,))[1][-1], torch.tensor(1.5).double(), atol=1e-9)


@pytest.mark.parametrize(
    ("x", "keywords", "message"),
    [
        (torch.ones(3), {}, r"shape \(batch, \.\.\.\), but it is torch.float32 of shape \(3,\)"),
        (torch.ones(2, 3, dtype=torch.complex64), {}, "must be real"),
        (torch.ones(2, 3), {"trace": "hutchinson"}, "'exact', 'rademacher', 'gaussian'"),
        (torch.ones(2, 3), {"num_samples": 4}, "an exact trace one"),
        (torch.ones(2, 3), {"trace": "gaussian", "num_samples": 0}, "estimates take one or more"),
    ],
)
def test_what_is_refused(x: Tensor, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_divergence(lambda t, x: x, x, **keywords)


def test_a_state_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"x must be a tensor of shape .*, but it is a tuple"):
        with_divergence(lambda t, x: x, (torch.ones(2, 3),))  # type: ignore[arg-type]
