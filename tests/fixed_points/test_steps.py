"""Iterations whose field knows the number of the step, draws noise in every step, or whose states are outputs on the way."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import RevDEQ, fixed_point
from tests.fixed_points.cells import Dense, difference, gradients

EXACT = 1e-12


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


class Numbered(nn.Module):
    """A contraction with an embedding of the step, dropout, or both."""

    def __init__(self, num_steps: int = 40, dropout: float = 0.0) -> None:
        super().__init__()
        self.cell, self.embedding, self.dropout = Dense(), nn.Embedding(num_steps, 6), nn.Dropout(dropout)
        self.seen: list[int] = []

    def forward(self, z: Tensor, x: Tensor, step: int) -> Tensor:
        self.seen.append(step)
        shift = self.embedding.weight[step]
        return self.dropout(self.cell(z, x + 0.1 * shift))


def by_hand(f: Any, x: Tensor, num_steps: int, beta: float = 0.8) -> list[Tensor]:
    y = z = torch.zeros_like(x)
    states = [y]
    for n in range(num_steps):
        z = (1 - beta) * z + beta * f(y, x, step=n)
        y = (1 - beta) * y + beta * f(z, x, step=n)
        states.append(y)
    return states


UNTIL = {"tol": 1e-4, "max_steps": 30, "on_failure": "ignore"}
CALLS: dict[str, dict[str, Any]] = {
    "fixed": {"tol": 0, "max_steps": 30},
    "fixed, listed": {"tol": 0, "max_steps": 30, "save_at": [0, 1, 12, 30]},
    "fixed, every 7th": {"tol": 0, "max_steps": 30, "save_at": 7},
    "until converged": UNTIL,
    "until converged, every 4th": {**UNTIL, "save_at": 4},
    "samples": {**UNTIL, "stop": "sample"},
    "samples, every 3rd": {**UNTIL, "stop": "sample", "save_at": 3},
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("noise", ["solve", "step"])
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str, gradient: str, noise: str, dropout: float) -> None:
    f, x = Numbered(dropout=dropout), torch.randn(4, 6, requires_grad=True)

    def found(gradient: str) -> list[Tensor]:
        torch.manual_seed(3)
        return gradients(
            f, torch.zeros_like(x), [*f.parameters(), x], args=x, gradient=gradient, noise=noise, **CALLS[name]
        )

    assert difference(found(gradient), found("direct")) < EXACT


@pytest.mark.parametrize(("save_at", "taken"), [(None, 9), (4, [4, 8, 9]), ([0, 3, 9], [0, 3, 9]), ([2], [2])])
def test_values_are_those_of_a_loop(save_at: Any, taken: Any) -> None:
    f, x = Numbered(), torch.randn(4, 6)
    found = fixed_point(f, torch.zeros_like(x), args=x, tol=0, max_steps=9, save_at=save_at)
    torch.testing.assert_close(found, torch.stack(by_hand(f, x, 9))[taken], rtol=0, atol=1e-13)


def test_the_numbers_that_f_is_given() -> None:
    f, x = Numbered(3), torch.randn(4, 6)
    fixed_point(f, torch.zeros_like(x), args=x, tol=1e-12, max_steps=3, on_failure="ignore")
    assert f.seen == [0, 0, 1, 1, 2, 2, 2]  # the last one measures the residual


@pytest.mark.parametrize("method", ["simple", "relaxed", "anderson"])
def test_other_methods_give_it_too(method: str) -> None:
    f, x = Numbered(5), torch.randn(4, 6, requires_grad=True)
    fixed_point(f, torch.zeros_like(x), args=x, tol=0, max_steps=5, method=method, gradient="direct")
    assert f.seen == [0, 1, 2, 3, 4]


def masks_of(noise: str, max_steps: int = 4) -> list[Tensor]:
    seen: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        mask = (torch.rand(1000) < 0.5).double()
        seen.append(mask)
        return 0.5 * torch.cos(z) * mask

    fixed_point(f, torch.zeros(1000), tol=0, max_steps=max_steps, noise=noise)
    return seen


def test_noise_of_the_solve_is_one_draw() -> None:
    seen = masks_of("solve")
    assert all(torch.equal(seen[-1], mask) for mask in seen[-7:])


def test_noise_of_each_step_is_its_own() -> None:
    seen = masks_of("step")[-6:]  # those of steps 1, 2, 3
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[2], seen[4])


def test_the_state_of_the_generator_does_not_depend_on_the_steps() -> None:
    after = []
    for max_steps in (2, 9):
        torch.manual_seed(0)
        masks_of("step", max_steps)
        after.append(torch.rand(1))
    assert torch.equal(*after)


def test_pytrees_are_stacked_leaf_by_leaf() -> None:
    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    f = lambda z: {"a": 0.5 * torch.cos(z["a"]), "b": 0.5 * torch.sin(z["b"]) + z["a"].mean(1)}  # noqa: E731
    z = fixed_point(f, z0, tol=0, max_steps=6, save_at=[2, 6])
    assert {name: tuple(leaf.shape) for name, leaf in z.items()} == {"a": (2, 2, 3), "b": (2, 2)}
    torch.testing.assert_close(z["b"][-1], fixed_point(f, z0, tol=0, max_steps=6)["b"], rtol=0, atol=0)


def test_states_on_the_way_keep_their_dtype_and_the_module_passes_them_on() -> None:
    deq = RevDEQ(Dense().float(), tol=0, max_steps=6, save_at=2)
    states = deq(torch.randn(4, 6, dtype=torch.float32))
    assert (states.shape, states.dtype) == ((3, 4, 6), torch.float32)
    deq(torch.randn(4, 6, dtype=torch.float32), z0=deq.last.z[-1])


def test_states_on_the_way_are_what_is_kept_more() -> None:
    cell, x = Dense(), torch.randn(4, 6)
    stored = [
        fixed_point(
            cell, torch.zeros_like(x), args=x, tol=0, max_steps=40, beta=0.5, save_at=k, full_output=True
        ).stats.num_stored_states
        for k in (None, 1)
    ]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("gradient", [torch.func.grad, torch.func.jacrev])
def test_torch_func(gradient: Any) -> None:
    f, x = Numbered(), torch.randn(4, 6)

    def loss(x: Tensor) -> Tensor:
        return fixed_point(f, torch.zeros_like(x), args=x, tol=0, max_steps=8, save_at=3).square().sum()

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(gradient(loss)(x), expected, rtol=0, atol=1e-12)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo of torch 2.9 cannot follow a solve")
@pytest.mark.parametrize("noise", ["solve", "step"])
def test_inside_of_what_torch_compiles(noise: str) -> None:
    f, x = Numbered().cell, torch.randn(4, 6)
    shift = torch.randn(8, 6)
    numbered = lambda z, x, step: f(z, x + shift[step])  # noqa: E731
    call = lambda x: fixed_point(numbered, torch.zeros_like(x), args=x, tol=0, max_steps=5, noise=noise)  # noqa: E731
    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(x), call(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_at": [3], "tol": 1e-3}, r"save_at=\[3\] needs tol=0"),
        ({"save_at": [3, 2], "tol": 0}, "increasing whole numbers of steps from 0 to 50"),
        ({"save_at": [0, 51], "tol": 0}, "from 0 to 50"),
        ({"save_at": [0], "tol": 0}, "from 0 to 50"),
        ({"save_at": [], "tol": 0}, "from 0 to 50"),
        ({"save_at": [1.0], "tol": 0}, "from 0 to 50"),
        ({"save_at": 0}, "save_at must be a whole number of at least 1"),
        ({"save_at": 3, "method": "simple"}, "save_at=3 is for reversible"),
        ({"noise": "step", "method": "simple"}, "noise='step' is for reversible"),
        ({"noise": "none"}, "noise must be one of"),
        ({"noise": "step", "tol": 0, "compile": True}, "compile= is not for"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), **options)
