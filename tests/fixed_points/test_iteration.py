"""What the iteration does: where it stops, what it costs, what it says, what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import ConvergenceWarning, FixedPoint, ReconstructionWarning, RevDEQ, fixed_point
from tests.fixed_points.cells import Dense, difference


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


def solved(cell: Dense, x: Tensor, **options: Any) -> FixedPoint:
    return fixed_point(cell, torch.zeros_like(x), args=x, full_output=True, **options)


def residual(cell: Dense, z: Tensor, x: Tensor) -> Tensor:
    value = cell(z, x)
    return torch.linalg.vector_norm(z - value) / (1e-5 + torch.linalg.vector_norm(value))


@pytest.mark.parametrize("method", ["reversible", "simple", "relaxed", "anderson"])
@pytest.mark.parametrize("tol", [1e-3, 1e-9])
def test_the_residual_of_what_comes_back_is_what_is_reported(method: str, tol: float) -> None:
    cell, x = Dense(), torch.randn(4, 6)
    solution = solved(cell, x, method=method, tol=tol, max_steps=500)
    assert solution.residual <= tol
    assert solution.converged
    # One more evaluation differs from the solver's own by rounding only.
    torch.testing.assert_close(solution.residual, residual(cell, solution.z, x).detach(), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("residual", ["relative", "absolute"])
def test_the_iteration_stops_at_the_first_small_residual(residual: str) -> None:
    cell, x = Dense(), torch.randn(4, 6)
    solution = solved(cell, x, tol=1e-6, residual=residual)
    trace = solution.trace[:, ["absolute", "relative"].index(residual)]
    assert len(trace) == solution.num_steps
    assert (trace[:-1] > 1e-6).all()


@pytest.mark.parametrize("num_steps", [1, 7, 60])
def test_tol_0_makes_exactly_so_many_steps(num_steps: int) -> None:
    solution = solved(Dense(), torch.randn(4, 6), tol=0, max_steps=num_steps)
    assert (solution.num_steps, solution.stats.num_evaluations) == (num_steps, 2 * num_steps)
    assert solution.residual is None


def test_min_steps() -> None:
    assert solved(Dense(), torch.randn(4, 6), tol=0.5, min_steps=9).num_steps == 9


def test_the_number_of_steps_may_be_drawn() -> None:
    draws = iter([3, 5])
    numbers = [solved(Dense(), torch.randn(4, 6), tol=0, max_steps=lambda: next(draws)).num_steps for _ in range(2)]
    assert numbers == [3, 5]


def test_a_sample_stops_by_itself() -> None:
    cell, x = Dense(norm=0.9), torch.randn(3, 6) * torch.tensor([[0.1], [1.0], [10.0]])
    together = solved(cell, x, tol=1e-6, stop="sample")
    alone = [solved(cell, row[None], tol=1e-6) for row in x]
    assert together.num_steps.tolist() == [solution.num_steps for solution in alone]
    assert len(set(together.num_steps.tolist())) > 1
    torch.testing.assert_close(together.z, torch.cat([s.z for s in alone]), rtol=0, atol=1e-14)  # sums in other orders


CHAIN = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.5]], dtype=torch.float64)
OFF = torch.tensor([[-0.4], [-0.6], [1.0]], dtype=torch.float64)


@pytest.mark.parametrize("residual", ["relative", "absolute"])
@pytest.mark.parametrize("method", ["reversible", "simple", "relaxed", "anderson"])
def test_samples_that_depend_on_each_other_go_on(method: str, residual: str) -> None:
    """Each row of relu(W z + b) is off until the next one has grown: the fixed point is (0, 0.4, 2)."""
    options = {"method": method, "residual": residual, "stop": "sample", "tol": 1e-9, "max_steps": 200}
    solution = fixed_point(lambda z: torch.relu(CHAIN @ z + OFF), torch.zeros(3, 1), full_output=True, **options)
    torch.testing.assert_close(solution.z, torch.tensor([[0.0], [0.4], [2.0]]), rtol=0, atol=1e-7)
    assert solution.converged.all()
    assert solution.num_steps[0] < solution.num_steps[2]


@pytest.mark.parametrize("beta", [0.5, 0.8])
@pytest.mark.parametrize("seed", range(0, 240, 20))
def test_samples_that_hold_others_up_go_on(seed: int, beta: float) -> None:
    """Sparse couplings of rows that are off at first: some rest while others still need the partner of their pair."""
    torch.manual_seed(seed)
    weight = torch.randn(5, 5) * (torch.rand(5, 5) < 0.5)
    weight, b = 0.9 * weight / weight.abs().sum(1).max(), 3 * torch.randn(5, 1) - 1
    f = lambda z: torch.relu(weight @ z + b)  # noqa: E731
    expected = fixed_point(f, torch.zeros(5, 1), method="relaxed", beta=0.7, tol=1e-13, max_steps=3000)
    found = fixed_point(f, torch.zeros(5, 1), beta=beta, tol=1e-8, max_steps=400, stop="sample", on_failure="raise")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_steps", [4, 40])
def test_evaluations(num_steps: int) -> None:
    cell, x = Dense(), torch.randn(4, 6)
    solution = solved(cell, x, tol=0, max_steps=num_steps)
    forward, cell.num_calls = cell.num_calls, 0
    solution.z.sum().backward()
    assert forward == 2 * num_steps
    assert cell.num_calls == 2 * num_steps
    assert solution.stats.num_backward_evaluations == 2 * num_steps


def test_the_last_residual_costs_one_evaluation() -> None:
    cell, x = Dense(), torch.randn(4, 6)
    solution = solved(cell, x, tol=1e-6)
    assert cell.num_calls == solution.stats.num_evaluations == 2 * solution.num_steps + 1
    cell.num_calls = 0
    solution.z.sum().backward()
    assert cell.num_calls == 2 * solution.num_steps


def test_a_warm_start_is_shorter() -> None:
    cell, x = Dense(), torch.randn(4, 6)
    first = solved(cell, x, tol=1e-6)
    again = fixed_point(cell, first.z.detach(), args=x + 1e-3, tol=1e-6, full_output=True)
    assert again.num_steps < first.num_steps


@pytest.mark.parametrize("method", ["reversible", "simple", "relaxed", "anderson"])
def test_too_few_steps_are_said(method: str) -> None:
    with pytest.warns(
        ConvergenceWarning, match=r"after 3 steps the relative residual is .*, not 1.00e-12.*spectral radius"
    ):
        fixed_point(Dense(), torch.zeros(2, 6), args=torch.randn(2, 6), tol=1e-12, max_steps=3, method=method)


def test_too_few_steps_raise_or_are_ignored_on_request() -> None:
    options = {"args": torch.randn(2, 6), "tol": 1e-12, "max_steps": 3}
    with pytest.raises(RuntimeError, match="has not converged"):
        fixed_point(Dense(), torch.zeros(2, 6), on_failure="raise", **options)
    assert not fixed_point(Dense(), torch.zeros(2, 6), on_failure="ignore", full_output=True, **options).converged


@pytest.mark.parametrize("factor", [3.0, -3.0, 1e200])
@pytest.mark.parametrize("method", ["reversible", "simple"])
def test_divergence_raises_with_the_remedy(factor: float, method: str) -> None:
    with pytest.raises(RuntimeError, match=r"diverges.*spectral radius of its Jacobian must stay below 1"):
        fixed_point(lambda z: factor * z + 1, torch.ones(3), method=method)


def test_divergence_without_residuals_raises() -> None:
    with pytest.raises(RuntimeError, match="diverges: z is not finite after"):
        fixed_point(lambda z: 1e100 * z + 1, torch.ones(3), tol=0)


def test_a_field_that_differs_when_repeated_is_found_out() -> None:
    calls = iter(range(1000))
    weight = torch.tensor(0.5, requires_grad=True)
    z = fixed_point(lambda z: weight * torch.cos(z) + 0.01 * math.sin(next(calls)), torch.ones(3), tol=0, max_steps=8)
    with pytest.warns(ReconstructionWarning, match=r"anchor_every=1.*make sure that the field is deterministic"):
        z.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"beta must lie in \(0, 2\), but it reaches from 0.0 to 0.0"),
        ({"beta": 2.5}, r"beta must lie in \(0, 2\)"),
        ({"beta": 1.0}, "beta must not be 1: undoing a step divides by 1 - beta"),
        ({"beta": 1 + 1e-6}, "so near to 1, from which it is 1.0e-06 away.* Move beta away from 1"),
        ({"beta": torch.full((5,), 0.5)}, r"beta of shape \(5,\) does not broadcast"),
        ({"tol": -1.0}, "tol must be 0 or positive"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1"),
        ({"max_steps": 3, "min_steps": 4}, "min_steps = 4 is more than max_steps = 3"),
        ({"residual": "rel"}, "residual must be one of 'absolute', 'relative'"),
        ({"stop": "samples"}, "stop must be one of"),
        ({"on_failure": "log"}, "on_failure must be one of"),
        ({"method": "broyden"}, "method must be one of"),
        ({"gradient": "unrolled"}, "gradient must be one of"),
        ({"method": "simple", "gradient": "reversible"}, "gradient must be one of"),
        ({"method": "simple", "anchor_every": 3}, "anchor_every=3 is for reversible, and has no"),
        ({"options": {"b_tol": 1e-3}}, "options=.* is for simple and relaxed and anderson"),
        ({"method": "simple", "options": {"b_tl": 1e-3}}, "did you mean 'b_tol'"),
        ({"pair_dtype": torch.float32}, "pair_dtype must be .* no narrower than z0"),
        ({"anchor_every": 0}, "anchor_every must be"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), **options)


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda z: z[:1], ValueError, r"f must return the shape of z0, \(2, 3\), but it returned \(1, 3\)"),
        (lambda z: z.float(), TypeError, "f must return the dtype of z0"),
        (lambda z: [z, z], ValueError, "f must return the structure of z0"),
        (3, TypeError, "f must be callable"),
    ],
)
def test_bad_fields(f: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fixed_point(f, torch.ones(2, 3))


def test_samples_need_a_common_dimension() -> None:
    with pytest.raises(ValueError, match=r"one leading dimension common to all of z0.*\(2, 3\), \(3,\)"):
        fixed_point(lambda z: z, (torch.ones(2, 3), torch.ones(3)), stop="sample")


def test_beta_1_is_possible_where_nothing_is_undone() -> None:
    cell, x = Dense(), torch.randn(2, 6, requires_grad=True)
    grads = [
        torch.autograd.grad(fixed_point(cell, torch.zeros(2, 6), args=x, beta=1.0, gradient=gradient).sum(), x)
        for gradient in ("checkpoint", "direct")
    ]
    assert difference(*grads) < 1e-14


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fixed_point(Dense(), torch.zeros(2, 6), args=torch.randn(2, 6), progress=True)
    assert "residual=" in capsys.readouterr().err


def rotation(size: float) -> Tensor:
    return size * torch.tensor([[0.0, -1.0], [1.0, 0.0]])


@pytest.mark.parametrize("beta", [0.3, 0.8, 1.5])
@pytest.mark.parametrize(
    "jacobian",
    [
        lambda beta: 0.95 * torch.eye(2),
        lambda beta: -0.95 * torch.eye(2),
        lambda beta: rotation(0.95 * (2 - beta) / beta),
    ],
    ids=["positive", "negative", "rotation"],
)
def test_where_it_converges(jacobian: Any, beta: float) -> None:
    map_ = jacobian(beta)
    z = fixed_point(lambda z: map_ @ z + 1, torch.ones(2), beta=beta, tol=1e-9, max_steps=3000)
    torch.testing.assert_close(z, torch.linalg.solve(torch.eye(2) - map_, torch.ones(2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.3, 0.8, 1.5])
@pytest.mark.parametrize(
    "jacobian",
    [lambda beta: 1.1 * torch.eye(2), lambda beta: -1.1 * torch.eye(2), lambda beta: rotation(1.1 * (2 - beta) / beta)],
    ids=["positive", "negative", "rotation"],
)
def test_where_it_diverges(jacobian: Any, beta: float) -> None:
    map_ = jacobian(beta)
    with pytest.raises(RuntimeError, match="diverges"):
        fixed_point(lambda z: map_ @ z + 1, torch.ones(2), beta=beta, tol=1e-9, max_steps=3000)


def mapped(x: Tensor, **options: Any) -> Tensor:
    return torch.vmap(lambda x: fixed_point(lambda z: 0.5 * torch.tanh(z) + x, torch.zeros_like(x), **options))(x)


def test_inside_vmap_steps_are_shared() -> None:
    x = torch.randn(4, 3)
    found = mapped(x, tol=0, max_steps=30)
    expected = fixed_point(lambda z: 0.5 * torch.tanh(z) + x, torch.zeros_like(x), tol=0, max_steps=30)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(mapped(x, tol=1e-6), expected, rtol=0, atol=1e-5)


class Wider(torch.nn.Module):
    """A cell whose state is wider than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.inject = torch.nn.Linear(5, 5), torch.nn.Linear(2, 5)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.1 * self.recurrent(z) + self.inject(x))


def test_an_input_of_another_shape_than_the_state() -> None:
    with pytest.raises(RuntimeError, match=r"z starts as zeros shaped like x; if it has another shape, pass init="):
        RevDEQ(Wider())(torch.ones(3, 2))


def test_a_missing_input() -> None:
    with pytest.raises(TypeError, match=r"The solver calls f\(z\), but the function takes \(z, x\): pass args= for x"):
        fixed_point(Wider(), torch.zeros(3, 5))
