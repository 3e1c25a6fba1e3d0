"""No leaks: what a solve kept is freed with the last name for it, without waiting for the garbage collector."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.front_doors import DOORS, make_net, make_y0

every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
every_gradient = pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "direct"])


@pytest.fixture(autouse=True)
def _no_garbage_collector() -> Iterator[None]:
    """Cycles would stay, so a test that passes shows that there are none.

    The very first solve of a process is not looked at: torch imports parts of itself then, whose frames are left in cycles.
    """
    DOORS["odeint"](make_net(), make_y0()).sum().backward()
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def drop(out: Tensor, y0: Tensor) -> None:
    del out


def backward(out: Tensor, y0: Tensor) -> None:
    out.sum().backward()


def backward_twice(out: Tensor, y0: Tensor) -> None:
    out.sum().backward(retain_graph=True)
    out.sum().backward()


def second_derivative(out: Tensor, y0: Tensor) -> None:
    first = torch.autograd.grad(out.square().sum(), y0, create_graph=True)[0]
    first.square().sum().backward(inputs=[y0])


def traces_of(
    door: Any, gradient: str, use: Callable[[Tensor, Tensor], None], device: torch.device
) -> list[weakref.ref[Any]]:
    """Weak references to all that one solve touched and gave, after it has gone out of scope."""
    net, y0, code = make_net(device=device), make_y0(device=device), make_y0(device=device)
    encoded = torch.sin(code)
    out = door(lambda y: net(y) * encoded, y0, gradient=gradient)
    use(out, y0)
    return [weakref.ref(x) for x in (net, net.first.weight, y0, code, encoded, out)]


@pytest.mark.parametrize("use", [drop, backward, backward_twice, second_derivative])
@every_gradient
@every_door
def test_everything_is_freed(
    door: Any, gradient: str, use: Callable[[Tensor, Tensor], None], device: torch.device
) -> None:
    assert not [ref() for ref in traces_of(door, gradient, use, device) if ref() is not None]


class Broken(Exception):
    pass


def traces_of_failure(door: Any, gradient: str, when: int) -> list[weakref.ref[Any]]:
    """The same, of a solve whose field raises when it is called for the `when`-th time."""
    net, y0 = make_net(), make_y0()
    calls = 0

    def field(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls >= when:
            raise Broken
        return net(y)

    with pytest.raises(Broken):
        door(field, y0, gradient=gradient).sum().backward()
    return [weakref.ref(x) for x in (net, net.first.weight, y0, field)]


@pytest.mark.parametrize("when", [1, 3, 7])
@every_gradient
@every_door
def test_a_field_that_raises_frees_everything(door: Any, gradient: str, when: int) -> None:
    assert not [ref() for ref in traces_of_failure(door, gradient, when) if ref() is not None]


@every_door
def test_a_field_that_raises_leaves_modes_and_the_random_state_as_they_were(door: Any) -> None:
    def field(y: Tensor) -> Tensor:
        torch.rand(())
        raise Broken

    before = torch.get_rng_state()
    noise = door is DOORS["sdeint"]  # its noise is drawn before the first call
    with pytest.raises(Broken):
        door(field, make_y0())
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert noise or torch.equal(torch.get_rng_state(), before)


def test_a_field_that_raises_in_the_backward_pass_leaves_buffers_and_autocast_as_they_were() -> None:
    """A second solve works as if the first had not been."""
    net, y0, failing = make_net(lambda: torch.nn.BatchNorm1d(8)), make_y0(), []

    def field(y: Tensor) -> Tensor:
        if failing:
            raise Broken
        return net(y)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = DOORS["odeint"](field, y0)
    statistics = net.middle[0].running_mean.clone()
    buffer = net.middle[0].running_mean
    failing.append(True)
    with pytest.raises(Broken):
        out.sum().backward()
    assert net.middle[0].running_mean is buffer
    assert torch.equal(buffer, statistics)
    assert not torch.is_autocast_enabled("cpu")


@every_gradient
def test_repeated_solves_keep_nothing(gradient: str) -> None:
    net, y0 = make_net(), make_y0().detach()

    def tensors_after_a_solve() -> int:
        DOORS["odeint"](net, y0, gradient=gradient).sum().backward()
        net.zero_grad()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    assert len({tensors_after_a_solve() for _ in range(3)}) == 1
