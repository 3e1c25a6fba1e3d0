"""Adaptive steps by programs are those of the eager solve: as many accepted and rejected, the same states and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import Solution, odeint
from revsolve.compiled.programs import PROGRAMS, CompilationError
from tests.equations import BACKWARD, EQUATIONS, FORWARD
from tests.test_compiled import EXACT, RECORDED, difference, needs_compiler, quiet

TIGHT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
METHODS = ["rev_bosh3", "reversible_heun", "alf", "dopri5", "fehlberg45"]


@pytest.mark.parametrize("method", METHODS)
def test_adaptive_is_direct(method: str) -> None:
    assert difference("module", FORWARD, method=method, **TIGHT) < EXACT


def test_towards_smaller_times() -> None:
    assert difference("module", BACKWARD, method="rev_dopri5", **TIGHT) < EXACT


@pytest.mark.parametrize("equation", EQUATIONS)
def test_every_kind_of_state(equation: str) -> None:
    assert difference(equation, method="rev_bosh3", **TIGHT) < EXACT


@pytest.mark.parametrize("restarts", [None, 3])
def test_with_and_without_restarts(restarts: int | None) -> None:
    assert difference("module", method="rev_bosh3", restarts=restarts, **TIGHT) < EXACT


def pulse(t: Tensor, y: Tensor) -> Tensor:
    """Not stiff, for there a step is as long as the growth of rounding errors allows, so that each rounding counts."""
    return 30 * torch.exp(-1600 * (t - 0.5) ** 2) - y


def solved(compile: Any, method: str, **more: Any) -> Solution:  # noqa: A002
    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    with torch.no_grad():
        return odeint(pulse, y0, t, method=method, full_output=True, compile=compile, **TIGHT, **more)


@pytest.mark.parametrize("method", METHODS)
def test_as_many_steps_are_accepted_and_rejected(method: str) -> None:
    got, wanted = solved(RECORDED, method).stats, solved(False, method).stats
    assert (got.num_steps, got.num_rejected, got.num_restarts) == (
        wanted.num_steps,
        wanted.num_rejected,
        wanted.num_restarts,
    )
    assert wanted.num_rejected > 0


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "reversible_heun"])
def test_the_last_evaluation_of_a_step_is_the_first_of_the_next(method: str) -> None:
    assert solved(RECORDED, method).stats.num_evaluations == solved(False, method).stats.num_evaluations


SETTINGS: dict[str, dict[str, Any]] = {
    "tolerances": {"rtol": torch.tensor([1e-4, 1e-6], dtype=torch.float64)},
    "norm": {"options": {"norm": lambda x: x.abs().max()}},
    "jump": {"options": {"jump_t": [0.5], "first_step": 0.01, "max_step": 0.2}},
    "dense": {"options": {"dense": True}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_the_controller(settings: dict[str, Any]) -> None:
    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    usual: dict[str, Any] = {"method": "rev_dopri5", "full_output": True, **TIGHT, **settings}
    got, wanted = odeint(pulse, y0, t, compile=RECORDED, **usual), odeint(pulse, y0, t, **usual)
    assert len(got.times) == len(wanted.times)
    torch.testing.assert_close(got.ys, wanted.ys, rtol=EXACT, atol=EXACT)


def test_programs_are_found_again() -> None:
    """At other times and from other states; other tolerances are another program."""
    y0, t = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.tensor([0.0, 1.0], dtype=torch.float64)

    def solve(y0: Tensor, t: Tensor, **tolerances: float) -> None:
        odeint(pulse, y0, t, method="rev_bosh3", compile=RECORDED, **tolerances)[-1].sum().backward()

    solve(y0, t, **TIGHT)
    made = len(PROGRAMS.known)
    solve(2 * y0, t + 0.5, **TIGHT)
    assert len(PROGRAMS.known) == made
    solve(y0, t, rtol=2e-4, atol=1e-4)
    assert len(PROGRAMS.known) == made + 1


def test_a_norm_that_looks_at_numbers() -> None:
    with pytest.raises(CompilationError, match="may not look at numbers"):
        solved(RECORDED, "rev_dopri5", options={"norm": lambda x: torch.tensor(x.abs().max().item())})


@needs_compiler
@quiet
@pytest.mark.slow
def test_compiled_is_direct() -> None:
    assert difference("module", method="rev_bosh3", compile=True, rtol=1e-3, atol=1e-3) < EXACT
