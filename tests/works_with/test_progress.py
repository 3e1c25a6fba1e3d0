"""Progress bars and callbacks: told after each accepted step of the forward pass, and in nobody's way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import AcceptedStep, LinearPath, cdeint, odeint, odeint_event, sdeint
from tests.front_doors import DOORS, difference, gradients, make_net, make_y0

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
@every_door
def test_a_bar_changes_nothing(door: Any, gradient: str, device: torch.device) -> None:
    net, y0 = make_net(device=device), make_y0(device=device)
    found = gradients(door, net, y0, gradient=gradient, progress=True)
    assert difference(found, gradients(door, net, y0, gradient=gradient)) == 0.0


@every_door
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
def test_a_callback_changes_nothing_but_rounding(door: Any, gradient: str, device: torch.device) -> None:
    """It wants to see every step, so none of them are taken together."""
    net, y0 = make_net(device=device), make_y0(device=device)
    seen: list[AcceptedStep] = []
    found = gradients(door, net, y0, gradient=gradient, callback=seen.append)
    assert difference(found, gradients(door, net, y0, gradient=gradient)) < 1e-13
    assert seen


@every_door
def test_the_last_step_told_is_the_result(door: Any, device: torch.device) -> None:
    net, y0 = make_net(device=device), make_y0(device=device)
    seen: list[AcceptedStep] = []
    torch.manual_seed(1)
    out = door(net, y0, callback=seen.append)
    assert torch.equal(seen[-1].y, out.detach().reshape(-1, *y0.shape)[-1])
    assert not seen[-1].y.requires_grad


def test_fixed_steps_are_told_one_by_one() -> None:
    seen: list[AcceptedStep] = []
    odeint(decay, torch.ones(2), torch.linspace(1, 0, 6), method="rk4", callback=seen.append)
    assert [step.number for step in seen] == [1, 2, 3, 4, 5]
    assert [step.t for step in seen] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-6)
    assert [step.h for step in seen] == pytest.approx([-0.2] * 5, abs=1e-6)


def test_adaptive_steps_tell_what_was_rejected() -> None:
    seen: list[AcceptedStep] = []
    settings = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6, "options": {"first_step": 1.0}}
    solution = odeint(
        lambda t, y: -50 * y,
        torch.ones(2),
        torch.tensor([0.0, 1.0]),
        callback=seen.append,
        full_output=True,
        **settings,
    )
    assert [step.t for step in seen] == solution.times[1:]
    assert seen[-1].num_rejected == solution.stats.num_rejected > 0


def test_states_look_as_the_field_sees_them() -> None:
    seen: list[AcceptedStep] = []
    y0 = {"a": torch.ones(2), "b": (torch.ones(1, 3, dtype=torch.complex64),)}
    odeint(lambda t, y: {"a": -y["a"], "b": (-y["b"][0],)}, y0, torch.tensor([0.0, 1.0]), callback=seen.append)
    assert seen[-1].y["b"][0].dtype == torch.complex64
    assert seen[-1].y["b"][0].shape == (1, 3)


def test_events_and_dense_output_and_times_of_each_sample_tell_their_steps() -> None:
    seen: list[AcceptedStep] = []
    odeint(decay, torch.ones(2), torch.linspace(0, 1, 9), options={"dense": True}, callback=seen.append)
    assert seen[-1].t == 1.0
    event_t, _ = odeint_event(
        decay, torch.ones(1), torch.tensor(0.0), event_fn=lambda t, y: y - 0.5, callback=seen.append, progress=True
    )
    assert 0.0 < seen[-1].t <= float(event_t)
    times = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    odeint(decay, torch.ones(2, 3), times, method="rk4", options={"step_size": 0.5}, callback=seen.append)
    assert seen[-1].y.shape == (2, 3)


def test_so_do_those_of_controlled_and_stochastic_equations() -> None:
    seen: list[AcceptedStep] = []
    X, z0 = LinearPath(torch.tensor([[[0.0], [1.0]]] * 2)), torch.ones(2, 3)
    watched: dict[str, Any] = {"callback": seen.append, "progress": True}

    def growth(t: Tensor, z: Tensor) -> Tensor:
        return z.unsqueeze(-1)

    cdeint(X, growth, z0, X.interval, options={"dense": True}, **watched)
    assert seen[-1].t == 1.0
    event_t, _ = cdeint(X, growth, z0, X.interval, event_fn=lambda t, z: z.sum() - 8.0, **watched)
    assert 0.0 < seen[-1].t <= float(event_t)
    times = torch.tensor([[0.0, 0.2], [0.5, 0.9]])
    cdeint(X, growth, z0, times, **watched)
    assert seen[-1].y.shape == (2, 3)
    sdeint((lambda t, y: -y, lambda t, y: y), z0, times, dt=0.1, **watched)
    assert (seen[-1].number, seen[-1].t, seen[-1].y.shape) == (7, 1.0, (2, 3))


@pytest.mark.parametrize("settings", [{"options": {"step_size": 0.1}}, {"rtol": 1e-3, "atol": 1e-3}])
def test_the_bar_ends_full_and_tells_time_and_step(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    odeint(decay, torch.ones(2), torch.tensor([0.0, 1.0]), method="rev_bosh3", progress=True, **settings)
    last = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert "odeint rev_bosh3: 100%" in last
    assert "t=1, h=" in last


def test_without_progress_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    odeint(decay, torch.ones(2), torch.tensor([0.0, 1.0]))
    assert capsys.readouterr().err == ""


@every_door
def test_an_exception_in_the_callback_ends_the_solve_and_the_bar(door: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(step: AcceptedStep) -> None:
        if step.number == 2:
            raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        door(make_net(), make_y0(), callback=stop, progress=True)
    assert capsys.readouterr().err.endswith("\n")  # a bar that was closed leaves its line


@every_door
def test_what_cannot_be_called_is_refused(door: Any) -> None:
    with pytest.raises(TypeError, match="callback must be callable"):
        door(make_net(), make_y0(), callback=3)
