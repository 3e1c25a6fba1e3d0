"""The gradient of the reversible iteration is that of the same iteration unrolled."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import fixed_point
from tests.fixed_points.cells import Convolution, Dense, difference, gradients

# Rounding: undoing may cost a quarter of the 16 digits before the pair is restored from an anchor.
EXACT = 1e-12


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


def dense(norm: float = 0.8, samples: int = 5) -> tuple[Dense, Tensor, Tensor]:
    cell = Dense(norm=norm)
    return cell, torch.randn(samples, 6, requires_grad=True), torch.randn(samples, 6, requires_grad=True)


@pytest.mark.parametrize("num_steps", [4, 30, 500])
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8, 0.9, 1.1, 1.5])
def test_parameters_injection_start_and_beta(beta: float, num_steps: int) -> None:
    cell, x, z0 = dense(norm=0.6)
    beta = torch.tensor(beta, requires_grad=True)
    inputs = [*cell.parameters(), x, z0, beta]
    found, unrolled = (
        gradients(cell, z0, inputs, args=x, beta=beta, tol=0, max_steps=num_steps, gradient=gradient)
        for gradient in ("reversible", "direct")
    )
    assert difference(found, unrolled) < EXACT


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize("stop", ["batch", "all", "sample"])
@pytest.mark.parametrize("residual", ["relative", "absolute"])
def test_until_converged(gradient: str, stop: str, residual: str) -> None:
    cell, x, z0 = dense()
    with torch.no_grad():
        x[0] *= 10  # saturates, so that this sample converges early
    options = {"args": x, "tol": 1e-8, "max_steps": 200, "stop": stop, "residual": residual}
    inputs = [*cell.parameters(), x, z0]
    found, unrolled = (gradients(cell, z0, inputs, gradient=g, **options) for g in (gradient, "direct"))
    assert difference(found, unrolled) < EXACT


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize("beta", [0.5, 0.8])
def test_samples_that_depend_on_each_other(beta: float, gradient: str) -> None:
    """Some rest for a while and go on: those that a negative bias keeps at 0 at first."""
    mix = (0.3 * torch.rand(5, 5)).requires_grad_()
    b = torch.tensor([[1.0], [-0.2], [0.5], [-0.3], [-0.1]], requires_grad=True)
    options = {"beta": beta, "tol": 1e-8, "max_steps": 300, "stop": "sample"}
    found, unrolled = (
        gradients(lambda z: torch.relu(mix @ z + b), torch.zeros(5, 1), [mix, b], gradient=g, **options)
        for g in (gradient, "direct")
    )
    assert difference(found, unrolled) < EXACT


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("num_steps", [4, 40])
def test_convolutional_cell(beta: float, num_steps: int) -> None:
    cell, x = Convolution(), torch.randn(2, 8, 5, 5, requires_grad=True)
    inputs = [*cell.parameters(), x]
    found, unrolled = (
        gradients(cell, torch.zeros_like(x), inputs, args=x, beta=beta, tol=0, max_steps=num_steps, gradient=gradient)
        for gradient in ("reversible", "direct")
    )
    assert difference(found, unrolled) < EXACT


def learnable(*shape: int) -> Tensor:
    return torch.linspace(0.4, 0.9, torch.Size(shape).numel()).reshape(shape).requires_grad_()


@pytest.mark.parametrize("beta", [learnable(6), learnable(5, 1), learnable(1)], ids=["channel", "sample", "one"])
@pytest.mark.parametrize("stop", ["batch", "sample"])
def test_beta_of_many_numbers(beta: Tensor, stop: str) -> None:
    cell, x, z0 = dense()
    beta = beta.detach().double().requires_grad_()
    options = {"args": x, "beta": beta, "tol": 1e-6, "stop": stop, "max_steps": 200}
    inputs = [*cell.parameters(), x, z0, beta]
    found, unrolled = (gradients(cell, z0, inputs, gradient=g, **options) for g in ("reversible", "direct"))
    assert difference(found, unrolled) < EXACT


def test_beta_computed_from_a_parameter() -> None:
    cell, x, z0 = dense()
    raw = nn.Parameter(torch.tensor(0.3))
    found, unrolled = (
        gradients(cell, z0, [raw, x], args=x, beta=torch.sigmoid(raw), tol=0, max_steps=9, gradient=g)
        for g in ("reversible", "direct")
    )
    assert difference(found, unrolled) < EXACT


class Two(nn.Module):
    """A state of two parts, one of them complex, that turn into each other."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.3 * torch.randn(3, 4))

    def forward(self, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        a, b = z["a"], z["b"]
        return {"a": torch.sin(b.real @ self.mix) + x, "b": 0.3j * b.conj() + a @ self.mix.mT}


@pytest.mark.parametrize("stop", ["batch", "sample"])
@pytest.mark.parametrize("beta", [0.7, {"a": learnable(4), "b": 0.6}], ids=["one", "each"])
def test_pytrees(stop: str, beta: Any) -> None:
    cell, x = Two(), torch.randn(5, 4, requires_grad=True)
    z0 = {
        "a": torch.randn(5, 4, requires_grad=True),
        "b": torch.randn(5, 3, dtype=torch.complex128, requires_grad=True),
    }
    inputs = [cell.mix, x, *z0.values(), *(b for b in [beta] if isinstance(b, Tensor))]
    options = {"args": x, "beta": beta, "tol": 1e-7, "stop": stop, "max_steps": 300}
    found, unrolled = (
        [
            torch.view_as_real(g) if g.is_complex() else g
            for g in gradients(cell, z0, inputs, gradient=gradient, **options)
        ]
        for gradient in ("reversible", "direct")
    )
    assert difference(found, unrolled) < EXACT


def test_lone_complex_state() -> None:
    turn = torch.tensor(0.5 + 0.4j, requires_grad=True)
    z0 = torch.ones(3, dtype=torch.complex128, requires_grad=True)
    found, unrolled = (
        gradients(lambda z: turn * torch.sin(z) + 1, z0, [turn, z0], tol=0, max_steps=20, gradient=g)
        for g in ("reversible", "direct")
    )
    assert difference(map(torch.view_as_real, found), map(torch.view_as_real, unrolled)) < EXACT


def test_dropout_is_the_same_in_every_step() -> None:
    cell, x, z0 = dense()
    drop = nn.Dropout(0.4)
    grads = []
    for gradient in ("reversible", "direct"):
        torch.manual_seed(7)
        grads.append(
            gradients(lambda z: cell(drop(z), x), z0, [cell.map.weight, z0], tol=1e-9, max_steps=300, gradient=gradient)
        )
    assert difference(*grads) < EXACT


def test_second_derivatives() -> None:
    cell, x, z0 = dense(samples=2)

    def penalty(gradient: str) -> Tensor:
        z = gradients_with_graph(cell, z0, x, gradient)
        return torch.autograd.grad(z.square().sum(), cell.map.weight)[0]

    assert difference([penalty("reversible")], [penalty("direct")]) < EXACT


def gradients_with_graph(cell: Dense, z0: Tensor, x: Tensor, gradient: str) -> Tensor:
    z = fixed_point(cell, z0, args=x, tol=0, max_steps=6, gradient=gradient)
    return torch.autograd.grad(z.square().sum(), x, create_graph=True)[0]
