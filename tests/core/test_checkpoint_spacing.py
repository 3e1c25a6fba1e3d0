"""The distance between checkpoints: memory at its peak against every other distance, by torch's own record of allocations."""

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from revsolve import odeint
from revsolve.core.restart import SMALL, SPARE, checkpoint_spacing


class OfState(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 16)), torch.randn(256, 16)


def convolution() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(4, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 4, 3, padding=1)
    return nn.Sequential(*layers), torch.randn(8, 4, 12, 12)


def transformer() -> tuple[nn.Module, Tensor]:
    return nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True), torch.randn(16, 12, 16)


def peak(num_steps: int, case: str, every: int | None) -> float:
    """The most memory that a training gradient takes beyond what was there, in bytes."""
    torch.manual_seed(0)
    net, y0 = globals()[case]()
    field, options = OfState(net), {"step_size": 1.0 / num_steps, "checkpoint_every": every}

    def train() -> None:
        odeint(field, y0, torch.tensor([0.0, 1.0]), method="rk4", options=options, gradient="checkpoint")[
            -1
        ].sum().backward()

    train()  # gradients have their memory from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        train()
    level = highest = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level)
    return highest


@pytest.mark.parametrize("case", ["mlp", "convolution", "transformer"])
def test_the_peak_is_near_the_least_of_all_distances(case: str) -> None:
    num_steps = 16
    least = min(peak(num_steps, case, every) for every in (1, 2, 3, 4, 8, 16))
    assert peak(num_steps, case, None) <= max(1.3 * least, SMALL)


@pytest.mark.parametrize(("tape", "wanted"), [(0, 10), (1, 10), (10**4, 10), (10**9, 1)])
def test_spacing_follows_the_tape(tape: int, wanted: int) -> None:
    assert checkpoint_spacing(100, 1000, tape) == wanted


@pytest.mark.parametrize("num_steps", [10, 100, 10_000])
@pytest.mark.parametrize("tape", [10**5, 10**7])
def test_no_more_memory_than_said(num_steps: int, tape: int) -> None:
    state = 10**5

    def kept(k: int) -> float:
        return num_steps / k * state + k * tape

    k = checkpoint_spacing(num_steps, state, tape)
    assert kept(k) <= max(SPARE * min(map(kept, range(1, num_steps + 1))) + tape, SMALL)


def test_spacing_can_be_told() -> None:
    y0, t = torch.ones(3, requires_grad=True), torch.tensor([0.0, 1.0])
    options = {"step_size": 0.05, "checkpoint_every": 4}
    solution = odeint(lambda t, y: torch.sin(y), y0, t, method="rk4", options=options, full_output=True)
    assert solution.stats.num_stored_states == 6  # after 0, 4, 8, 12, 16 and 20 steps
    with pytest.raises(
        ValueError, match="checkpoint_every = 4 goes with gradient='checkpoint', but it is 'reversible'"
    ):
        odeint(lambda t, y: torch.sin(y), y0, t, method="rev_rk4", options=options)
    with pytest.raises(ValueError, match="checkpoint_every must be a whole number"):
        odeint(lambda t, y: torch.sin(y), y0, t, method="rk4", options={"checkpoint_every": 0})
