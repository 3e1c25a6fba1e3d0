"""Observation times of each sample's own: against a loop over the samples, closed forms, and the direct gradient."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import odeint
from revsolve.schemes.names import scheme
from tests.equations import Network, leaf, times_of_each, worst_difference

EXACT = 1e-12
FIXED: dict[str, Any] = {"options": {"step_size": 0.11}}
LOOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
METHODS = ["rev_rk4", "rev_bosh3", "reversible_heun", "reversible_heun4", "rk4", "dopri8"]


def gradients(**way: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network, rate, y0, t = Network().double(), leaf(), leaf(3, 3), times_of_each()

    def func(t: Tensor, y: Tensor) -> Tensor:
        return network.net(y) * torch.cos(t)[:, None] - rate**2 * y

    ys = odeint(func, y0, t, **way)
    inputs = {"y0": y0, "rate": rate, "t": t, **dict(network.net.named_parameters())}
    weights = torch.linspace(0.3, 1.7, ys.numel(), dtype=torch.float64).view(ys.shape)
    return dict(zip(inputs, torch.autograd.grad((weights * ys).sum(), list(inputs.values())), strict=True))


@pytest.mark.parametrize(
    ("method", "steps"), [("rev_rk4", FIXED), ("rev_bosh3", FIXED), ("rev_bosh3", LOOSE), ("reversible_heun", LOOSE)]
)
def test_reversible_is_direct(method: str, steps: dict[str, Any]) -> None:
    got = gradients(method=method, **steps)
    wanted = gradients(method=method, gradient="direct", **steps)
    assert worst_difference(got, wanted) < (EXACT, "")


def test_checkpoint_is_direct() -> None:
    got = gradients(method="dopri5", **LOOSE)
    wanted = gradients(method="dopri5", gradient="direct", **LOOSE)
    assert worst_difference(got, wanted) < (EXACT, "")


def swing(t: Tensor, y: Tensor) -> Tensor:
    return torch.cos(t).view(-1, 1) * y


@pytest.mark.parametrize("method", ["rev_rk4", "rk4", "dopri8", "rev_dopri5"])
def test_closed_form(method: str) -> None:
    t, y0 = times_of_each(), leaf(3, 2)
    ys = odeint(swing, y0, t, method=method, options={"step_size": 0.01})
    wanted = y0 * torch.exp(torch.sin(t) - torch.sin(t[0]))[..., None]
    # RK4 with steps of 0.01 errs by 1e-10.
    assert torch.allclose(ys, wanted, atol=1e-9)
    got, closed = (torch.autograd.grad(y.square().sum(), (t, y0)) for y in (ys, wanted))
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(got, closed, strict=True))


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_each_sample_as_if_alone(method: str, sample: int) -> None:
    t = torch.tensor(((0.0, 1.0), (0.5, 0.8), (1.0, 0.3)), dtype=torch.float64)
    y0 = torch.rand(2, 3, dtype=torch.float64)

    def five_steps_each(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        inner = [a + (b - a) * i / 5 for a, b in itertools.pairwise(t) for i in range(5)]
        return torch.stack([*inner, t[-1]])

    together = odeint(
        swing, y0, t, method=method, options={"step_size": 0.1}, restarts=EVERY[scheme(method).reversible]
    )
    alone = odeint(
        swing,
        y0[sample, None],
        t[:, sample],
        method=method,
        options={"grid_constructor": five_steps_each},
        restarts=EVERY[scheme(method).reversible],
    )
    # Times are rounded differently.
    assert torch.allclose(together[:, sample], alone[:, 0], rtol=1e-13)


EVERY: dict[bool, Any] = {True: 3, False: None}


def test_on_every_device(device: torch.device) -> None:
    t = times_of_each()
    ys = odeint(
        swing, torch.ones(3, 2, dtype=torch.float64, device=device), t, method="rev_rk4", options={"step_size": 0.02}
    )
    wanted = torch.exp(torch.sin(t) - torch.sin(t[0]))[..., None].expand(4, 3, 2)
    # RK4 with steps of 0.02 errs by 1e-9, its gradient by ten times that.
    assert torch.allclose(ys.cpu(), wanted, atol=1e-8)
    got, closed = (torch.autograd.grad(y.sum(), t)[0] for y in (ys, wanted))
    assert torch.allclose(got, closed, atol=1e-7)


def test_a_repeated_time_holds_the_state() -> None:
    t = times_of_each().detach()
    ys = odeint(swing, torch.rand(3, 2, dtype=torch.float64), t, method="rev_rk4", **FIXED)
    assert torch.equal(ys[0, 2], ys[1, 2]) and torch.equal(ys[2, 2], ys[3, 2])


def test_the_field_receives_a_time_for_each_sample() -> None:
    seen: list[tuple[torch.Size, torch.dtype]] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append((t.shape, t.dtype))
        return -y

    odeint(func, torch.ones(3, 2, 2), times_of_each().detach(), method="rk4", **FIXED)
    assert set(seen) == {(torch.Size([3]), torch.float32)}


def test_no_sample_takes_longer_steps_than_asked_for() -> None:
    solution = odeint(
        swing, torch.rand(3, 2, dtype=torch.float64), times_of_each().detach(), method="rk4", full_output=True, **FIXED
    )
    # The longest of each interval: 0.5, 0.8, 0.4 and steps of 0.11.
    assert solution.stats.num_steps == 5 + 8 + 4
    assert solution.ys.shape == (4, 3, 2) and solution.ts.shape == (4, 3)


def test_a_single_time_gives_the_initial_state() -> None:
    y0 = torch.rand(3, 2)
    assert torch.equal(odeint(swing, y0, torch.zeros(1, 3)), y0[None])


RAISES: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"y0": torch.ones(2, 2)}, r"with 3 samples as its first dimension, but it is \(2, 2\)"),
    "a pytree": ({"y0": (torch.ones(3),)}, "but it is tuple"),
    "back and forth": (
        {"t": torch.tensor([[0.0, 0, 0], [1, 1, 1], [2, 0.5, 2]])},
        r"but t\[:, 1\] = \[0.0, 1.0, 0.5\]",
    ),
    "infinite": ({"t": torch.tensor([[0.0, 0, 0], [1, torch.inf, 1]])}, "must be finite"),
    "whole numbers": ({"t": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "floating point numbers"),
    "first step": ({"method": "bosh3", "options": {"first_step": 0.1}}, "'first_step' has no meaning"),
    "dense": ({"options": {"dense": True}}, "'dense' has no meaning"),
    "step size": ({"options": {"step_size": -1}}, "step_size must be a positive number"),
    "outside of its steps": ({"method": "reversible_heun4_yoshida"}, "outside of its steps"),
    "velocity": ({"method": "alf"}, "carries a velocity"),
}


@pytest.mark.parametrize("case", RAISES)
def test_messages(case: str) -> None:
    changed, message = RAISES[case]
    arguments = {"y0": torch.ones(3, 2), "t": times_of_each().detach(), "method": "rev_rk4", **changed}
    with pytest.raises(ValueError, match=message):
        odeint(swing, **arguments)
