"""Autocast is replayed as it was, low-precision fields run on a wide pair, and GradScaler scales."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import odeint
from tests.front_doors import DOORS, difference, gradients, make_net, make_y0
from tests.memory import most_held

DTYPES = [torch.bfloat16, torch.float16]
# Autocast rounds parameters and activations, 4e-3 each in bfloat16; `direct` adds up gradients of parameters in that, too.
ROUGH = 3e-2

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
replayed = pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])


class Seen(nn.Module):
    """Remembers the dtypes that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.dtypes.append(x.dtype)
        return x


@replayed
@every_dtype
@every_door
def test_backward_runs_under_the_autocast_of_the_forward_pass(door: Any, dtype: torch.dtype, gradient: str) -> None:
    net = make_net(Seen).float()
    with torch.autocast("cpu", dtype=dtype):
        out = door(net, make_y0(torch.float32), gradient=gradient)
    seen = net.middle[0].dtypes
    assert out.dtype == torch.float32
    assert set(seen) == {dtype}
    seen.clear()
    out.sum().backward()
    assert set(seen) == {dtype}


@replayed
@every_door
def test_autocast_on_every_device(door: Any, device: torch.device, gradient: str) -> None:
    net, y0 = make_net(Seen, device=device).float(), make_y0(torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = gradients(door, net, y0, gradient=gradient)
        wanted = gradients(door, net, y0, gradient="direct")
    assert difference(found, wanted) < ROUGH
    assert set(net.middle[0].dtypes) == {torch.bfloat16}


@replayed
@every_door
def test_backward_under_autocast_of_a_solve_without(door: Any, gradient: str) -> None:
    net = make_net(Seen).float()
    out = door(net, make_y0(torch.float32), gradient=gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.sum().backward()
    assert set(net.middle[0].dtypes) == {torch.float32}


@replayed
@every_dtype
@every_door
def test_gradients_under_autocast(door: Any, dtype: torch.dtype, gradient: str) -> None:
    net, y0 = make_net().float(), make_y0(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = gradients(door, net, y0, gradient=gradient)
        wanted = gradients(door, net, y0, gradient="direct")
    assert difference(found, wanted) < ROUGH
    assert {x.dtype for x in found} == {torch.float32}


@replayed
def test_autocast_loses_no_digits_to_undoing(gradient: str) -> None:
    """The pair is float32 whatever the field computes in, so steps are undone to the rounding of float32."""
    net, y0 = make_net().float(), make_y0(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = DOORS["odeint"](net, y0, gradient=gradient, full_output=True)
    solution.ys.sum().backward()
    assert solution.stats.reconstruction_error < 1e-6


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])
def test_the_field_can_be_used_after_the_solve_within_autocast(gradient: str) -> None:
    """What autocast keeps of cast parameters must not be cut off from them."""
    net, y0 = make_net().float(), make_y0(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        DOORS["odeint"](net, y0, gradient=gradient)
        after = net(y0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = net(y0)
    found, wanted = (torch.autograd.grad(x.float().sum(), list(net.parameters())) for x in (after, alone))
    assert difference(list(found), list(wanted)) == 0.0


STEPS: dict[str, Callable[[int], dict[str, Any]]] = {
    "odeint": lambda n: {"options": {"step_size": 1 / n}, "restarts": None},
    "sdeint": lambda n: {"dt": 1 / n, "restarts": None},
    "cdeint": lambda n: {"options": {"step_size": 1 / n}, "restarts": None, "method": "reversible_heun"},
    "fixed_point": lambda n: {"max_steps": n, "anchor_every": 100},
}


@replayed
@every_door
def test_programs_compute_as_autocast_has_it(door: Any, gradient: str) -> None:
    net, y0 = make_net().float(), make_y0(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(door, net, y0, gradient=gradient, compile={"backend": "eager"})
        wanted = gradients(door, net, y0, gradient=gradient)
    assert difference(found, wanted) < ROUGH


# Memory alone is looked at: of 5000 samples iterated without anchors in bfloat16, the worst one is undone to 10 %.
@pytest.mark.filterwarnings("ignore::revsolve.ReconstructionWarning")
@pytest.mark.parametrize("compile", [False, {"backend": "eager"}], ids=["eager", "programs"])
@pytest.mark.parametrize("door", STEPS)
def test_autocast_keeps_no_state_of_every_step(door: str, compile: Any) -> None:  # noqa: A002
    """What it casts from a leaf, a weight, it keeps until its context ends; a state must not look like one."""
    y0, net = torch.randn(5000, 3, requires_grad=True), make_net().float()

    def train(cache: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            DOORS[door](net, y0, compile=compile, **STEPS[door](40)).sum().backward()

    train(False)  # makes the programs
    # All that is kept of weights is less than a state.
    assert most_held(lambda: train(True)) < 1.01 * most_held(lambda: train(False))


@replayed
@every_dtype
@every_door
def test_a_field_that_casts_by_itself(door: Any, dtype: torch.dtype, gradient: str) -> None:
    net, y0 = make_net().to(dtype), make_y0(torch.float32)
    cast = nn.Sequential(Cast(dtype), net, Cast(torch.float32))
    found = gradients(door, cast, y0, gradient=gradient)
    wanted = gradients(door, cast, y0, gradient="direct")
    assert difference([x.float() for x in found], [x.float() for x in wanted]) < ROUGH
    assert [x.dtype for x in found[1:]] == [dtype] * len(found[1:])


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def test_a_field_of_another_dtype_is_refused_without_autocast() -> None:
    with pytest.raises(TypeError, match="must return the dtype of y0"):
        odeint(lambda t, y: y.bfloat16(), torch.ones(3), torch.tensor([0.0, 1.0]))


def trained(door: Any, scale: float | None, gradient: str, device: torch.device) -> tuple[nn.Module, float]:
    """A net after one step of SGD on its loss, and the scale in the end; scale=None trains without a scaler."""
    net, y0 = make_net(device=device).float(), make_y0(torch.float32, device).detach()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale or 1.0, enabled=scale is not None)
    torch.manual_seed(1)
    with torch.autocast(device.type, dtype=torch.float16):
        loss = door(net, y0, gradient=gradient).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return net, scaler.get_scale()


@replayed
@every_door
def test_grad_scaler_changes_nothing_but_the_scale(door: Any, gradient: str, device: torch.device) -> None:
    found, wanted = (list(trained(door, scale, gradient, device)[0].parameters()) for scale in (2.0**8, None))
    # Scaled gradients keep small numbers that fp16 would lose, so they are not quite the same.
    assert difference(found, wanted) < 1e-3


@replayed
@every_door
def test_grad_scaler_skips_the_step_of_a_gradient_that_overflows(
    door: Any, gradient: str, device: torch.device
) -> None:
    net, scale = trained(door, 2.0**120, gradient, device)
    untouched = make_net(device=device).float()
    torch.testing.assert_close(net.state_dict(), untouched.state_dict(), rtol=0, atol=0)
    assert scale == 2.0**119
