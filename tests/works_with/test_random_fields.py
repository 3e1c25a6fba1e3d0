"""Fields that draw random numbers or keep a state: the same when a step is replayed, or caught by the certificate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from revsolve import ReconstructionWarning, odeint, sdeint
from tests.front_doors import DOORS, EVALUATED_LATER, difference, gradients, make_net, make_y0

# The order of summation differs, and undone steps are rounded; a relaxation by half multiplies that by 4 in each of its
# 5 steps.
EXACT = 1e-12

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
replayed = pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


def dropout() -> nn.Module:
    return nn.Dropout(0.5)


NOISY: dict[str, Callable[[], nn.Module]] = {"dropout": dropout, "noise": Noise}


@replayed
@pytest.mark.parametrize("middle", NOISY.values(), ids=NOISY)
@every_door
def test_draws_are_the_same_when_replayed(
    door: Any, middle: Callable[[], nn.Module], gradient: str, device: torch.device
) -> None:
    net, y0 = make_net(middle, device=device), make_y0(device=device)
    wanted = gradients(door, net, y0, gradient="direct")
    assert difference(gradients(door, net, y0, gradient=gradient), wanted) < EXACT


@replayed
def test_draws_on_every_device(device: torch.device, gradient: str) -> None:
    net, y0 = make_net(dropout).to(device), make_y0().detach().to(device).requires_grad_()
    wanted = gradients(DOORS["odeint"], net, y0, gradient="direct")
    states = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    out = DOORS["odeint"](net, y0, gradient=gradient).sum()
    drawn = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    out.backward()
    assert difference(gradients(DOORS["odeint"], net, y0, gradient=gradient), wanted) < EXACT
    assert all(torch.equal(a, b) for a, b in zip(states, drawn, strict=True)), "the seed comes from the CPU"


@every_door
def test_solves_draw_anew(door: Any) -> None:
    net, y0 = make_net(dropout), make_y0()
    assert not torch.equal(door(net, y0), door(net, y0))


@every_door
def test_a_seed_repeats_the_solve(door: Any) -> None:
    net, y0 = make_net(dropout), make_y0()
    assert difference(gradients(door, net, y0), gradients(door, net, y0)) == 0.0


@pytest.mark.parametrize("middle", [dropout, nn.Identity], ids=["noisy", "not noisy"])
@every_door
def test_backward_leaves_the_random_state_alone(door: Any, middle: Callable[[], nn.Module]) -> None:
    loss = door(make_net(middle), make_y0()).sum()
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@every_door
def test_a_field_without_noise_draws_nothing_in_its_name(door: Any) -> None:
    """An equation may draw noise of its own, but no more of it for the gradient."""
    net, y0 = make_net(), make_y0()
    after = []
    for gradient in ("direct", "reversible"):
        gradients(door, net, y0, gradient=gradient)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def batch_norm() -> nn.Module:
    return nn.BatchNorm1d(8)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in net.named_buffers()}


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "batch norm": batch_norm,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral norm by hook": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
}


@replayed
@pytest.mark.parametrize("middle", STATEFUL.values(), ids=STATEFUL)
@every_door
def test_modules_with_a_state_have_exact_gradients(
    door: Any, middle: Callable[[], nn.Module], gradient: str, device: torch.device
) -> None:
    y0 = make_y0(device=device)
    wanted = gradients(door, make_net(middle, device=device), y0, gradient="direct")
    assert difference(gradients(door, make_net(middle, device=device), y0, gradient=gradient), wanted) < EXACT


def noisy_with_a_state() -> nn.Module:
    return nn.Sequential(dropout(), STATEFUL["spectral norm"]())


@pytest.mark.parametrize("middle", [STATEFUL["spectral norm"], dropout, noisy_with_a_state])
@pytest.mark.parametrize("door", EVALUATED_LATER.values(), ids=EVALUATED_LATER)
def test_fields_that_are_evaluated_after_their_value_was_asked_for(door: Any, middle: Callable[[], nn.Module]) -> None:
    y0 = make_y0()
    wanted = gradients(door, make_net(middle), y0, gradient="direct")
    assert difference(gradients(door, make_net(middle), y0), wanted) < EXACT


@replayed
@pytest.mark.parametrize("middle", [batch_norm, STATEFUL["spectral norm"]], ids=["batch norm", "spectral norm"])
@every_door
def test_backward_leaves_the_state_alone(
    door: Any, middle: Callable[[], nn.Module], gradient: str, device: torch.device
) -> None:
    net = make_net(middle, device=device)
    loss = door(net, make_y0(device=device), gradient=gradient).sum()
    before = state(net)
    loss.backward()
    torch.testing.assert_close(state(net), before, rtol=0, atol=0)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
@pytest.mark.parametrize("moving", [False, True], ids=["", "gradient of t"])
def test_running_statistics_are_updated_once_per_evaluation(gradient: str, moving: bool, device: torch.device) -> None:
    net = make_net(batch_norm, device=device)
    t = torch.linspace(0, 1, 3, dtype=torch.float64, requires_grad=moving)
    settings = {"method": "rev_rk4", "options": {"step_size": 0.1}, "restarts": 4, "gradient": gradient}
    solution = odeint(lambda t, y: net(y), make_y0(device=device), t, **settings, full_output=True)
    solution.ys.sum().backward()
    # Two increments of four stages, in each of ten steps, and none of them is known from the step before.
    assert int(net.middle[0].num_batches_tracked) == solution.stats.num_evaluations == 80


def test_running_statistics_are_those_of_plain_training() -> None:
    """With one evaluation a step, what they see is the trajectory of Euler's method."""
    net, twin, y = make_net(batch_norm), make_net(batch_norm), make_y0()
    odeint(lambda t, y: net(y), y, torch.linspace(0, 1, 6), method="euler")[-1].sum().backward()
    for _ in range(5):
        y = y + 0.2 * twin(y)
    torch.testing.assert_close(state(net), state(twin))


def test_statistics_stay_put_in_eval_mode() -> None:
    net = make_net(batch_norm).eval()
    before = state(net)
    DOORS["odeint"](net, make_y0()).sum().backward()
    torch.testing.assert_close(state(net), before, rtol=0, atol=0)


def test_a_state_that_values_depend_on_is_that_at_the_start() -> None:
    """One power iteration a solve, as one evaluation of the field would make."""
    net, twin, y0 = make_net(STATEFUL["spectral norm"]), make_net(STATEFUL["spectral norm"]), make_y0()
    DOORS["odeint"](net, y0).sum().backward()
    twin(y0)
    torch.testing.assert_close(state(net), state(twin), rtol=0, atol=0)


@replayed
@every_door
def test_a_state_that_values_depend_on_late_is_refused(door: Callable[..., Any], gradient: str) -> None:
    """Buffers that a later call is the first one to change; in a list of blocks, see the tests of loops."""
    net, y0 = make_net(STATEFUL["spectral norm"]), make_y0()

    def late(y: Tensor) -> Tensor:
        return net(y) if (y.detach() - y0.detach()).abs().max() > 0.2 else torch.tanh(y)

    with pytest.raises(RuntimeError, match=r"changes buffers .* but not when it was first called"):
        door(late, y0, gradient=gradient)


class Plain:
    """Equations that are not callable: what they hold is not found before the field is called."""

    noise_type, sde_type = "diagonal", "stratonovich"

    def __init__(self, net: nn.Module, scale: Tensor) -> None:
        self.net, self.scale = net, scale

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * self.scale

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * y


def test_a_second_look_at_what_the_field_takes_from_outside_changes_no_state() -> None:
    states = []
    for computed in (False, True):  # only results that nobody is known to hold ask for a second look
        net, y0 = make_net(STATEFUL["spectral norm"]), make_y0()
        scale = torch.ones((), dtype=y0.dtype, requires_grad=True)
        sdeint(Plain(net, 2 * scale if computed else scale), y0, [0.0, 1.0], dt=0.1, method="rev_midpoint")
        states.append(state(net))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_two_solves_before_one_backward() -> None:
    net, twin, y0 = make_net(STATEFUL["spectral norm"]), make_net(STATEFUL["spectral norm"]), make_y0()
    solve = DOORS["odeint"]
    both = [solve(net, y0), solve(net, 2 * y0)]
    apart = [solve(twin, y0, gradient="direct"), solve(twin, 2 * y0, gradient="direct")]
    found = torch.autograd.grad(sum(x.sum() for x in both), list(net.parameters()))
    wanted = torch.autograd.grad(sum(x.sum() for x in apart), list(twin.parameters()))
    assert difference(list(found), list(wanted)) < EXACT


class Counter(nn.Module):
    """What nobody can know of: a state in a Python number."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.01 * self.calls)


class PrivateNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=self.generator, dtype=x.dtype).to(x.device)


@replayed
@pytest.mark.parametrize("middle", [Counter, PrivateNoise])
@every_door
def test_what_is_not_repeatable_is_caught_by_the_certificate(
    door: Any, middle: Callable[[], nn.Module], gradient: str, device: torch.device
) -> None:
    loss = door(make_net(middle, device=device), make_y0(device=device), gradient=gradient).sum()
    with pytest.warns(ReconstructionWarning, match="deterministic"):
        loss.backward()
