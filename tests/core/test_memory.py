"""Memory: what backward needs does not grow with the number of steps, counted by hooks on what autograd saves."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import Restarts, odeint


def field(t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([y[..., 1:], -y[..., :1]], -1)


class Saved:
    """A solve over num_steps steps, and the numbers that autograd keeps for its backward pass."""

    def __init__(self, num_steps: int, size: int = 1000, **solve: Any) -> None:
        self.y0 = torch.linspace(0.5, 1.5, 2 * size, dtype=torch.float64).reshape(size, 2).requires_grad_()
        self.storages: dict[int, int] = {}
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        options = {"step_size": 1.0 / num_steps}
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x):
            self.solution = odeint(field, self.y0, t, options=options, full_output=True, **solve)

    def _keep(self, x: Tensor) -> Tensor:
        self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    @property
    def num_states(self) -> float:
        """All that is kept, in numbers of states, without y0, which the caller keeps anyway."""
        own = self.y0.untyped_storage().data_ptr()
        return sum(n for address, n in self.storages.items() if address != own) / self.y0.numel()


METHODS = ["rev_rk4", "rev_dopri5", "reversible_heun", "alf4", "leapfrog"]


@pytest.mark.parametrize("method", METHODS)
def test_without_restarts_nothing_grows(method: str) -> None:
    few, many = (Saved(n, method=method, restarts=None).num_states for n in (10, 160))
    assert few == many <= 3  # the last pair, and z at the beginning where it is not y


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_restarts_is_kept(method: str) -> None:
    """A stored pair is two states."""
    saved = Saved(160, method=method, restarts=Restarts(budget=5))
    assert saved.num_states <= 2 * 5 + 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("restarts", ["auto", None, 7])
def test_the_statistic_counts_what_is_kept(method: str, restarts: Any) -> None:
    """Tensors saved twice, as y0 is, are counted as often as the statistic names them, so it never says too little."""
    saved = Saved(50, method=method, restarts=restarts)
    named = saved.solution.stats.num_stored_states
    assert named - 3 <= saved.num_states <= named


@pytest.mark.parametrize("num_steps", [25, 400])
def test_checkpoints_grow_as_the_square_root(num_steps: int) -> None:
    saved = Saved(num_steps, method="rk4")
    assert saved.num_states <= num_steps**0.5 + 2


@pytest.mark.parametrize("method", ["rk4", "rev_rk4"])
def test_direct_keeps_everything(method: str) -> None:
    """The hooks do see what is kept: a field without products keeps nothing, one with them keeps every stage."""
    y0 = torch.ones(10, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        odeint(
            lambda t, y: y * y,
            -y0,
            torch.tensor([0.0, 1.0]),
            method=method,
            options={"step_size": 0.05},
            gradient="direct",
        )
    assert len(kept) >= 80


def live_numbers() -> int:
    """Numbers held by all tensors that the garbage collector knows."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.layout is torch.strided]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()) // 8


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
def test_backward_leaves_nothing_behind(gradient: str) -> None:
    """Solves one after another: what is alive afterwards is what was alive after the first."""

    def train() -> int:
        saved = Saved(20, method="rev_rk4", gradient=gradient)
        saved.solution.ys.sum().backward()
        del saved
        return live_numbers()

    train()
    second = train()
    assert [train() for _ in range(3)] == [second] * 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rev_midpoint", "reversible_heun"])
def test_a_hundred_thousand_steps(method: str) -> None:
    """An undamped oscillator in long segments: few states, and still the gradient of the exact flow, a rotation."""
    num_steps = 100_000
    saved = Saved(num_steps, size=1, method=method)
    (grad,) = torch.autograd.grad(saved.solution.ys[-1].sum(), saved.y0)
    turn = torch.tensor([[1.0, 1.0]], dtype=torch.float64) @ rotation(1.0)
    assert saved.solution.stats.num_steps == num_steps
    assert saved.num_states <= 4 * num_steps**0.5
    torch.testing.assert_close(grad, turn, rtol=1e-8, atol=1e-8)


def rotation(angle: float) -> Tensor:
    c, s = torch.cos(torch.tensor(angle, dtype=torch.float64)), torch.sin(torch.tensor(angle, dtype=torch.float64))
    return torch.stack([torch.stack([c, s]), torch.stack([-s, c])])
