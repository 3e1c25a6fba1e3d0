"""Checkpointed gradients by programs: steps repeated from stored pairs, and differentiated one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import LinearPath, cdeint, odeint, sdeint
from tests.backends.test_compiled import EXACT, FIXED, RECORDED, Noise, needs_compiler, quiet, solved
from tests.equations import EQUATIONS, loss_of, worst_difference


def difference(equation: str, compile: Any = RECORDED, **solve: Any) -> float:  # noqa: A002
    """The worst relative difference between the compiled solve and plain differentiation of the eager one."""
    made = EQUATIONS[equation]()
    wanted = solved(made, gradient="direct", **solve)
    return worst_difference(solved(made, gradient="checkpoint", compile=compile, **solve), wanted)[0]


@pytest.mark.parametrize("method", ["rk4", "dopri5", "rev_bosh3", "reversible_heun", "alf"])
def test_recorded_is_direct(method: str) -> None:
    assert difference("module", method=method, **FIXED) < EXACT


@pytest.mark.parametrize("restarts", [None, 1, 3])
@pytest.mark.parametrize("method", ["rev_bosh3", "reversible_heun"])
def test_with_and_without_restarts(method: str, restarts: int | None) -> None:
    assert difference("module", method=method, restarts=restarts, **FIXED) < EXACT


@pytest.mark.parametrize("equation", EQUATIONS)
def test_every_kind_of_state(equation: str) -> None:
    assert difference(equation, method="heun2", **FIXED) < EXACT


@needs_compiler
@quiet
@pytest.mark.slow
def test_compiled_is_direct() -> None:
    assert difference("module", method="rk4", compile=True, **FIXED) < EXACT


@pytest.mark.parametrize("method", ["midpoint", "reversible_heun"])
def test_sdeint(method: str) -> None:
    sde, y0 = Noise("general", "stratonovich"), torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    inputs = {"y0": y0, **dict(sde.named_parameters())}

    def gradients(**solve: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        loss = loss_of(sdeint(sde, y0, [0.0, 0.3, 1.7], method=method, dt=0.1, **solve))
        found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(inputs, found, strict=True))

    got = gradients(gradient="checkpoint", compile=RECORDED)
    assert worst_difference(got, gradients(gradient="direct"))[0] < EXACT


def test_cdeint() -> None:
    net, z0 = nn.Linear(3, 6).double(), torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    X = LinearPath(torch.randn(2, 12, 2, dtype=torch.float64).cumsum(1), torch.linspace(0, 1, 12, dtype=torch.float64))
    inputs = {"z0": z0, **dict(net.named_parameters())}

    def gradients(**solve: Any) -> dict[str, Tensor]:
        field = lambda t, z: torch.tanh(net(z)).view(2, 3, 2)  # noqa: E731
        zs = cdeint(X, field, z0, X.interval, method="rk4", options={"step_size": 0.07}, **solve)
        return dict(zip(inputs, torch.autograd.grad(loss_of(zs), list(inputs.values())), strict=True))

    got = gradients(gradient="checkpoint", compile=RECORDED)
    assert worst_difference(got, gradients(gradient="direct"))[0] < EXACT


def test_as_many_states_are_stored_as_without_programs() -> None:
    y0, t = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.tensor([0.0, 10.0], dtype=torch.float64)
    settings: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.1}, "full_output": True}
    stored = [odeint(lambda t, y: torch.sin(y), y0, t, compile=c, **settings).stats for c in (RECORDED, False)]
    assert stored[0].num_stored_states == stored[1].num_stored_states < 2 * 100**0.5
