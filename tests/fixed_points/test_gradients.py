"""Gradients by their names: each is what the name says, behind the same forward iteration."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import RevDEQ, fixed_point, reversible_loop
from tests.fixed_points.cells import Dense, difference, gradients

EXACT = 1e-12
METHODS = ["reversible", "simple", "relaxed", "anderson"]
IMPLICIT = ["implicit", "implicit_simple", "implicit_relaxed", "implicit_anderson", "implicit_gmres"]
WORDS = ["reversible", "checkpoint", "direct", "truncated", "one_step", "phantom", *IMPLICIT]


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


def cell_and_input() -> tuple[Dense, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    cell, x = Dense(), torch.randn(4, 6, requires_grad=True)
    return cell, x, [*cell.parameters(), x]


def of_loss(z: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((z.square() + z).sum(), inputs))


def pair_by_hand(cell: Dense, x: Tensor, num_steps: int, last_steps: int, beta: float = 0.8) -> Tensor:
    y = z = torch.zeros_like(x)
    for n in range(num_steps):
        with torch.set_grad_enabled(n >= num_steps - last_steps):
            z = (1 - beta) * z + beta * cell(y, x)
            y = (1 - beta) * y + beta * cell(z, x)
    return y


@pytest.mark.parametrize("last_steps", [1, 4, 8, 20])
@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_truncated_is_that_of_the_last_steps(tol: float, last_steps: int) -> None:
    cell, x, inputs = cell_and_input()
    options = {"gradient": "truncated", "options": {"last_steps": last_steps}}
    found = fixed_point(cell, torch.zeros_like(x), args=x, tol=tol, max_steps=12, full_output=True, **options)
    expected = pair_by_hand(cell, x, found.num_steps, last_steps)
    torch.testing.assert_close(found.z, expected, rtol=0, atol=1e-14)
    assert difference(of_loss(found.z, inputs), of_loss(expected, inputs)) < EXACT


def test_truncated_begins_once_the_iteration_has_converged() -> None:
    cell, x, _ = cell_and_input()
    exact, truncated = (
        fixed_point(cell, torch.zeros_like(x), args=x, tol=1e-4, gradient=gradient, stop=stop, full_output=True)
        for gradient, stop in (("reversible", "sample"), ("truncated", "sample"))
    )
    assert (truncated.num_steps == exact.num_steps + 4).all()
    assert truncated.stats.num_evaluations == exact.stats.num_evaluations + 8
    assert truncated.converged.all()


@pytest.mark.parametrize("method", ["simple", "relaxed"])
def test_truncated_of_the_other_methods(method: str) -> None:
    cell, x, inputs = cell_and_input()
    found = fixed_point(cell, torch.zeros_like(x), args=x, method=method, tol=0, max_steps=9, gradient="truncated")
    z, beta = torch.zeros_like(x), {"simple": 1.0, "relaxed": 0.8}[method]
    for n in range(9):
        with torch.set_grad_enabled(n >= 5):
            z = z + beta * (cell(z, x) - z)
    assert difference(of_loss(found, inputs), of_loss(z, inputs)) < EXACT


@pytest.mark.parametrize(("gradient", "num_steps", "beta"), [("one_step", 1, 1.0), ("phantom", 5, 0.5)])
@pytest.mark.parametrize("method", METHODS)
def test_steps_from_the_fixed_point(method: str, gradient: str, num_steps: int, beta: float) -> None:
    cell, x, inputs = cell_and_input()
    call = {"args": x, "method": method, "tol": 1e-10, "max_steps": 200}
    found = fixed_point(cell, torch.zeros_like(x), gradient=gradient, **call)
    with torch.no_grad():
        z = fixed_point(cell, torch.zeros_like(x), **call)
    for _ in range(num_steps):
        z = z + beta * (cell(z, x) - z)
    assert difference(of_loss(found, inputs), of_loss(z, inputs)) < EXACT


@pytest.mark.parametrize("gradient", IMPLICIT)
@pytest.mark.parametrize("method", METHODS)
def test_implicit_gradients_agree_at_the_fixed_point(method: str, gradient: str) -> None:
    cell, x, inputs = cell_and_input()
    tight = {"tol": 1e-13, "max_steps": 300, "args": x}
    options = {"b_tol": 1e-12, "b_max_steps": 200}
    found = gradients(cell, torch.zeros(4, 6), inputs, method=method, gradient=gradient, options=options, **tight)
    assert difference(found, gradients(cell, torch.zeros(4, 6), inputs, gradient="direct", **tight)) < 1e-10


@pytest.mark.parametrize("gradient", WORDS)
def test_a_study_is_a_loop_over_words(gradient: str) -> None:
    """At convergence every one of them points where the exact gradient does, within what it leaves out."""
    cell, x, inputs = cell_and_input()
    deq = RevDEQ(cell, tol=1e-8, gradient=gradient)
    found, exact = (torch.cat([g.flatten() for g in of_loss(d(x), inputs)]) for d in (deq, RevDEQ(cell, tol=1e-8)))
    assert torch.cosine_similarity(found, exact, dim=0) > 0.9


@pytest.mark.parametrize("gradient", ["truncated", "one_step", "phantom", "implicit"])
def test_random_numbers_are_those_of_the_iteration(gradient: str) -> None:
    seen: list[Tensor] = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.append((torch.rand(6) < 0.5).double())
        return 0.5 * torch.cos(z) * seen[-1] + x

    x = torch.randn(6, requires_grad=True)
    fixed_point(f, torch.zeros(6), args=x, tol=0, max_steps=6, gradient=gradient)
    assert len(seen) > 10
    assert all(torch.equal(mask, seen[-1]) for mask in seen[4:])  # those before were looks at what f is like


@pytest.mark.parametrize("gradient", ["truncated", "one_step", "phantom"])
def test_torch_func(gradient: str) -> None:
    cell, x, _ = cell_and_input()

    def loss(x: Tensor) -> Tensor:
        z = fixed_point(cell, torch.zeros_like(x), args=x, tol=0, max_steps=8, gradient=gradient)
        return (z.square() + z).sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gradient", "last_steps"), [("truncated", 4), ("one_step", 1)])
@pytest.mark.parametrize("scheme", ["coupling", "midpoint", "momentum", "relaxation"])
def test_loops(scheme: str, gradient: str, last_steps: int) -> None:
    cell, x, inputs = cell_and_input()
    run = lambda **options: reversible_loop(cell, x, args=x, num_steps=9, scheme=scheme, **options)  # noqa: E731
    torch.testing.assert_close(run(gradient=gradient), run(), rtol=0, atol=1e-13)
    found, expected = (of_loss(run(**o), inputs) for o in ({"gradient": gradient}, {"last_steps": last_steps}))
    assert difference(found, expected) == 0.0


@pytest.mark.parametrize("last_steps", [1, 3, 20])
def test_last_steps_of_a_relaxation(last_steps: int) -> None:
    cell, x, inputs = cell_and_input()
    start = torch.zeros_like(x)
    found = reversible_loop(cell, start, args=x, num_steps=9, scheme="relaxation", beta=0.5, last_steps=last_steps)
    expected = pair_by_hand(cell, x, 9, last_steps, beta=0.5)
    assert difference(of_loss(found, inputs), of_loss(expected, inputs)) < EXACT


def test_a_stream_that_was_computed_has_its_gradient() -> None:
    """The other stream of a coupling is no leaf where a network begins with other layers."""
    cell, x, inputs = cell_and_input()
    run = lambda gradient: reversible_loop(  # noqa: E731
        cell, 2 * x, args=x, num_steps=9, scheme="coupling", previous=torch.sin(x), gradient=gradient
    )
    assert difference(of_loss(run("reversible"), inputs), of_loss(run("direct"), inputs)) < EXACT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient": "implicit_gmres", "options": {"b_method": "simple"}},
            "b_method='simple' is for gradient='implicit'",
        ),
        ({"gradient": "implicit_newton"}, "gradient must be one of 'reversible', .* 'implicit_gmres'"),
        ({"gradient": "checkpoint", "options": {"last_steps": 3}}, "options=.* for gradients that are not exact"),
        ({"gradient": "truncated", "options": {"last_step": 3}}, "did you mean 'last_steps'"),
        ({"gradient": "truncated", "options": {"last_steps": 0}}, "last_steps must be a whole number of at least 1"),
        ({"gradient": "truncated", "save_at": 2}, "save_at=2 is for exact gradients"),
        ({"gradient": "checkpoint", "method": "simple"}, "gradient must be one of 'direct', 'truncated'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: reversible_loop(f, x, num_steps=4, gradient="one_step", last_steps=2), "last_steps=2 is for"),
        (lambda f, x: reversible_loop(f, x, num_steps=4, gradient="implicit"), "gradient must be one of"),
    ],
)
def test_refusals_of_loops(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lambda x: 0.1 * x, torch.ones(2, 3))
