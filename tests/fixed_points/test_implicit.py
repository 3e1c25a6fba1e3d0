"""The methods that reversible equilibria are compared with."""

import pytest
import torch
from torch import Tensor

from revsolve import ConvergenceWarning, fixed_point
from tests.fixed_points.cells import Dense, difference, gradients


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


def true_gradient(cell: Dense, x: Tensor) -> list[Tensor]:
    """By a dense solve with the Jacobian, at a fixed point to rounding: for a loss of sum(z**2 + z)."""
    z = (
        fixed_point(cell, torch.zeros_like(x), args=x, method="anderson", tol=1e-14, max_steps=100)
        .detach()
        .requires_grad_()
    )
    value = cell(z, x)
    jacobian = torch.autograd.functional.jacobian(lambda z: cell(z, x), z.detach()).reshape(z.numel(), z.numel())
    u = torch.linalg.solve(torch.eye(z.numel()) - jacobian.mT, (2 * z + 1).detach().reshape(-1)).view_as(z)
    return list(torch.autograd.grad(value, [*cell.parameters(), x], u))


@pytest.mark.parametrize("stop", ["batch", "sample"])
@pytest.mark.parametrize("b_method", ["simple", "relaxed", "anderson", "gmres"])
@pytest.mark.parametrize("method", ["simple", "relaxed", "anderson"])
def test_implicit_gradient_at_a_fixed_point(method: str, b_method: str, stop: str) -> None:
    cell, x = Dense(), torch.randn(3, 6, requires_grad=True)
    options = {"b_method": b_method, "b_tol": 1e-12, "b_max_steps": 200}
    found = gradients(
        cell,
        torch.zeros(3, 6),
        [*cell.parameters(), x],
        args=x,
        method=method,
        tol=1e-12,
        max_steps=300,
        stop=stop,
        options=options,
    )
    assert difference(found, true_gradient(cell, x)) < 1e-10


def test_reversible_iteration_converges_to_the_same_gradient() -> None:
    cell, x = Dense(), torch.randn(3, 6, requires_grad=True)
    found = gradients(cell, torch.zeros(3, 6), [*cell.parameters(), x], args=x, tol=1e-12, max_steps=300)
    assert (
        difference(found, true_gradient(cell, x)) < 1e-9
    )  # its derivatives converge a little later than it does itself


@pytest.mark.parametrize("method", ["simple", "relaxed", "anderson"])
def test_unrolled(method: str) -> None:
    cell, x = Dense(), torch.randn(3, 6, requires_grad=True)
    options = {"args": x, "method": method, "gradient": "direct", "tol": 1e-11, "max_steps": 300}
    found = gradients(cell, torch.zeros(3, 6), [*cell.parameters(), x], **options)
    assert difference(found, true_gradient(cell, x)) < 1e-6  # derivatives of Anderson's weights converge more slowly


def phantom_error(num_steps: int) -> float:
    torch.manual_seed(0)
    cell, x = Dense(), torch.randn(3, 6, requires_grad=True)
    options = {"phantom_steps": num_steps, "phantom_beta": 0.8}
    kind = {"method": "anderson", "gradient": "phantom", "tol": 1e-12, "options": options}
    return difference(
        gradients(cell, torch.zeros(3, 6), [*cell.parameters(), x], args=x, **kind), true_gradient(cell, x)
    )


def test_phantom_gradients_improve_with_their_steps() -> None:
    assert phantom_error(1) > 0.05
    assert phantom_error(60) < 1e-6


def test_anderson_needs_the_fewest_steps() -> None:
    cell, x = Dense(norm=0.95), torch.randn(3, 6)
    steps = {
        method: fixed_point(
            cell, torch.zeros(3, 6), args=x, method=method, tol=1e-8, max_steps=500, full_output=True
        ).num_steps
        for method in ("simple", "relaxed", "anderson")
    }
    assert min(steps, key=steps.get) == "anderson"


def failing(b_method: str, on_failure: str) -> Tensor:
    """A number whose backward solve may take two steps, which do not suffice."""
    cell, x = Dense(), torch.randn(3, 6, requires_grad=True)
    options = {"b_method": b_method, "b_max_steps": 2}
    kind = {"method": "simple", "options": options, "on_failure": on_failure}
    return fixed_point(cell, torch.zeros(3, 6), args=x, tol=1e-6, max_steps=200, **kind).sum()


@pytest.mark.parametrize("b_method", ["simple", "anderson", "gmres"])
def test_a_backward_solve_that_fails_is_said(b_method: str) -> None:
    message = f"the backward solve with b_method='{b_method}' has not converged: after 2 steps"
    with pytest.warns(ConvergenceWarning, match=message):
        failing(b_method, "warn").backward()
    with pytest.raises(RuntimeError, match=message):
        failing(b_method, "raise").backward()
    failing(b_method, "ignore").backward()


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("b_method", ["anderson", "gmres"])
def test_the_scale_of_the_loss_is_that_of_the_gradient(b_method: str, scale: float) -> None:
    cell, x = Dense(), torch.randn(3, 6, requires_grad=True)
    options = {"b_method": b_method, "b_tol": 1e-10}
    z = fixed_point(cell, torch.zeros(3, 6), args=x, method="anderson", tol=1e-10, options=options)
    one, other = (torch.autograd.grad(s * z.sum(), x, retain_graph=True)[0] for s in (1.0, scale))
    assert difference([other / scale], [one]) < 1e-12


def test_second_derivatives_are_refused() -> None:
    cell, x = Dense(), torch.randn(3, 6, requires_grad=True)
    z = fixed_point(cell, torch.zeros(3, 6), args=x, method="simple", max_steps=200)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


@pytest.mark.parametrize("gradient", ["implicit", "one_step", "phantom", "truncated", "direct"])
@pytest.mark.parametrize("method", ["simple", "relaxed", "anderson"])
def test_dropout_is_drawn_once_by_every_method(method: str, gradient: str) -> None:
    """Otherwise there would be no fixed point; that of the reversible method has the same draws."""
    cell, x = Dense(), torch.randn(3, 6)
    drawing = lambda z: torch.nn.functional.dropout(cell(z, x), 0.3)  # noqa: E731
    way = {"tol": 1e-10, "max_steps": 300, "on_failure": "raise"}
    found = []
    for other in ({}, {"method": method, "gradient": gradient}):
        torch.manual_seed(0)
        z = fixed_point(drawing, torch.zeros(3, 6), **way, **other)
        found.append([z, *torch.autograd.grad(z.square().sum(), cell.parameters()), torch.rand(1)])
    assert difference(found[1][:1] + found[1][-1:], found[0][:1] + found[0][-1:]) < 1e-8
    if gradient in ("implicit", "direct"):
        assert difference(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("method", ["reversible", "simple", "relaxed", "anderson"])
def test_the_result_shares_no_memory_with_what_f_returns(method: str) -> None:
    kept = torch.ones(3)
    with torch.no_grad():
        fixed_point(lambda z: kept, torch.zeros(3), method=method).add_(5.0)
    assert kept.tolist() == [1.0, 1.0, 1.0]
