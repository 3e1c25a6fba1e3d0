"""GMRES against dense solves."""

import pytest
import torch
from torch import Tensor

from revsolve import ConvergenceWarning, fixed_point
from revsolve.fixed_points.convergence import Convergence, Criterion
from revsolve.fixed_points.implicit import gmres
from revsolve.prepare.state import Packing
from tests.fixed_points.cells import difference


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


def solved(matrix: Tensor, g: Tensor, tol: float = 1e-13, max_steps: int = 400, memory: int = 20) -> Convergence:
    """The convergence of u = g + matrix @ u, with u as its attribute."""
    convergence = Convergence(Criterion(tol, max_steps), Packing(g), contracting=False)
    convergence.u = gmres(lambda u: matrix @ u, g, memory, convergence)
    return convergence


def dense(matrix: Tensor, g: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(len(g)) - matrix, g)


def normal(size: int, norm: float) -> Tensor:
    """Not symmetric, with eigenvalues in a disc of about that radius, which holds 1 where it is more than 1."""
    return norm * torch.randn(size, size) / size**0.5


@pytest.mark.parametrize("memory", [12, 40])
@pytest.mark.parametrize("norm", [0.5, 0.9])
def test_a_contraction(norm: float, memory: int) -> None:
    matrix, g = normal(40, norm), torch.randn(40)
    found = solved(matrix, g, memory=memory)
    assert found.content
    assert difference([found.u], [dense(matrix, g)]) < 1e-10


@pytest.mark.parametrize("norm", [2.0, 20.0])
def test_no_contraction_is_needed(norm: float) -> None:
    matrix, g = normal(40, norm), torch.randn(40)
    assert difference([solved(matrix, g, memory=40).u], [dense(matrix, g)]) < 1e-10


def test_as_many_directions_as_there_are_eigenvalues_suffice() -> None:
    basis = torch.linalg.qr(torch.randn(30, 30)).Q
    matrix, g = basis @ torch.diag(torch.tensor([0.5, -2.0, 3.0]).repeat(10)) @ basis.mT, torch.randn(30)
    found = solved(matrix, g)
    assert found.num_steps == 3
    assert difference([found.u], [dense(matrix, g)]) < 1e-12


@pytest.mark.parametrize("matrix", [torch.zeros(5, 5), -torch.eye(5)], ids=["zero", "minus one"])
def test_one_direction(matrix: Tensor) -> None:
    found = solved(matrix.double(), torch.arange(1.0, 6.0))
    assert found.num_steps == 1
    assert difference([found.u], [dense(matrix.double(), torch.arange(1.0, 6.0))]) < 1e-14


def test_nothing_to_solve() -> None:
    assert solved(normal(5, 0.5), torch.zeros(5)).u.tolist() == [0.0] * 5


def test_a_singular_system_does_not_converge() -> None:
    found = solved(torch.eye(4), torch.ones(4), max_steps=8)
    with pytest.warns(ConvergenceWarning, match="no eigenvalue near 1"):
        found.conclude("warn")


def test_the_real_derivative_of_a_complex_field() -> None:
    turn, x = torch.tensor(0.2 + 0.3j, requires_grad=True), 0.5 * torch.randn(3, dtype=torch.complex128)
    options = {"method": "simple", "tol": 1e-13, "max_steps": 300}
    grads = [
        torch.autograd.grad(
            fixed_point(lambda z: turn * torch.sin(z) + 0.3 * z.conj() + x, torch.zeros_like(x), **options, **kind)
            .abs()
            .sum(),
            turn,
        )[0]
        for kind in ({"options": {"b_method": "gmres", "b_tol": 1e-13}}, {"gradient": "direct"})
    ]
    assert difference([torch.view_as_real(grads[0])], [torch.view_as_real(grads[1])]) < 1e-9


def test_where_the_adjoint_iteration_diverges() -> None:
    matrix = normal(12, 1.5).requires_grad_()
    z = fixed_point(
        lambda z: matrix @ z + 1,
        torch.zeros(12),
        method="anderson",
        tol=1e-13,
        max_steps=300,
        options={"b_method": "gmres", "b_tol": 1e-13, "memory": 12},
    )
    g = torch.randn(12)
    expected = torch.outer(torch.linalg.solve((torch.eye(12) - matrix).mT, g), z).detach()
    assert difference(torch.autograd.grad(z, matrix, g), [expected]) < 1e-10
