"""`RevDEQ`: equilibria as a layer."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import RevDEQ
from revsolve.backends.inductor.programs import PROGRAMS
from tests.fixed_points.cells import Convolution, Dense, difference


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


def grads(deq: RevDEQ, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(deq(x).square().sum(), [*deq.parameters(), x]))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("learn_beta", [True, False], ids=["learnable beta", "given beta"])
def test_gradients_in_either_mode(training: bool, learn_beta: bool) -> None:
    deq = RevDEQ(Convolution(), beta=0.6, learn_beta=learn_beta, tol=1e-3, max_steps=200).train(training)
    unrolled = copy.deepcopy(deq)
    unrolled.gradient = "direct"
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    assert difference(grads(deq, x), grads(unrolled, x)) < 1e-11  # dozens of steps of a cell that hardly contracts


@pytest.mark.parametrize(
    "beta", [0.3, 0.9, 1.2, torch.linspace(0.2, 0.8, 6, dtype=torch.float64)], ids=["0.3", "0.9", "1.2", "channels"]
)
def test_a_learnable_beta_starts_where_it_is_told(beta: Any) -> None:
    deq = RevDEQ(Dense(), beta=beta, learn_beta=True)
    torch.testing.assert_close(deq.beta, torch.as_tensor(beta, dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.3, 1.7])
@pytest.mark.parametrize("push", [1e3, -1e3])
def test_a_learnable_beta_stays_in_range(beta: float, push: float) -> None:
    deq = RevDEQ(Dense(), beta=beta, learn_beta=True)
    with torch.no_grad():
        deq.learnable.raw.add_(push)
    assert 0.0 < deq.beta < 2.0
    assert abs(deq.beta - 1.0) >= 0.0499


def test_a_learnable_beta_starts_in_range() -> None:
    with pytest.raises(ValueError, match="a learnable beta must start within"):
        RevDEQ(Dense(), beta=0.99, learn_beta=True)


def test_eval_may_take_more_steps() -> None:
    deq = RevDEQ(Dense(), tol=1e-10, max_steps=4, eval_max_steps=100, on_failure="ignore")
    x = torch.randn(3, 6)
    deq(x)
    assert (deq.last.num_steps, bool(deq.last.converged)) == (4, False)
    deq.eval()(x)
    assert deq.last.num_steps > 4
    assert deq.last.converged


def test_eval_does_not_draw_its_steps() -> None:
    """Training may, but what a trained layer returns must not be another thing in every call."""
    drawn = iter([2, 3])
    deq = RevDEQ(Dense(), tol=0.0, max_steps=lambda: next(drawn), eval_max_steps=7)
    deq(torch.randn(3, 6))
    assert deq.last.num_steps == 2
    deq.eval()(torch.randn(3, 6))
    assert deq.last.num_steps == 7
    with pytest.raises(ValueError, match="eval_max_steps must be a number where max_steps is a function"):
        RevDEQ(Dense(), max_steps=lambda: 5)


def test_steps_are_seen_as_they_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    deq = RevDEQ(Dense(), tol=1e-3, progress=True, callback=lambda step: seen.append(step.number))
    deq(torch.randn(3, 6))
    assert seen == [*range(1, deq.last.num_steps + 1)]
    assert "fixed point" in capsys.readouterr().err


def test_compiled_steps_are_the_eager_ones() -> None:
    deq, x = RevDEQ(Dense(), tol=0.0, max_steps=12), torch.randn(3, 6, requires_grad=True)
    compiled = RevDEQ(deq.f, tol=0.0, max_steps=12, compile={"backend": "eager"})
    made = len(PROGRAMS.known)
    assert difference(grads(compiled, x), grads(deq, x)) < 1e-12
    assert len(PROGRAMS.known) > made


def test_the_latest_state_is_kept_without_its_history() -> None:
    deq = RevDEQ(Dense(), tol=1e-8)
    z = deq(torch.randn(3, 6, requires_grad=True))
    assert not deq.last.z.requires_grad
    torch.testing.assert_close(deq.last.z, z.detach(), rtol=0, atol=0)


def test_warm_start() -> None:
    deq, x = RevDEQ(Dense(), tol=1e-8), torch.randn(3, 6)
    deq(x)
    cold = deq.last.num_steps
    deq(x, z0=deq.last.z)
    assert deq.last.num_steps < cold


class Scales(nn.Module):
    """Two states at two widths, coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 3), nn.Linear(3, 6)

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = z
        return torch.tanh(0.5 * self.up(coarse) + x), torch.tanh(0.5 * self.down(fine))


def test_several_states() -> None:
    deq = RevDEQ(Scales(), init=lambda x: (torch.zeros_like(x), x.new_zeros(len(x), 3)), tol=1e-9)
    x = torch.randn(4, 6)
    z = deq(x)
    torch.testing.assert_close(z, deq.f(z, x), rtol=0, atol=1e-8)


def test_training_lowers_the_loss() -> None:
    deq, head = RevDEQ(Dense(), learn_beta=True, tol=1e-4), nn.Linear(6, 1)
    x = torch.randn(32, 6)
    target = x.prod(1, keepdim=True).tanh()
    optimizer = torch.optim.Adam([*deq.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (head(deq(x)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_state_dict_round_trip() -> None:
    first, second = (RevDEQ(Dense(), learn_beta=True) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 6)
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
