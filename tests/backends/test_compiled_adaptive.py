"""Adaptive steps by programs are those of the eager solve: as many accepted and rejected, the same states and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from revsolve import Solution, odeint
from revsolve.backends import CompilationError
from revsolve.backends.inductor.programs import PROGRAMS
from tests.backends.test_compiled import EXACT, RECORDED, compiles, needs_compiler, quiet
from tests.equations import BACKWARD, EQUATIONS, FORWARD, loss_of, worst_difference

TIGHT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
RESTARTS = {
    "rev_bosh3": 3,
    "reversible_heun": 3,
    "alf": 3,
    "dopri5": "auto",
    "fehlberg45": "auto",
}  # of no plain method
METHODS = list(RESTARTS)
SAME_STEPS = 1e-9  # an error estimate of 1e-7 is known to 1e-9, for the state is rounded to 1e-16: so are steps, by the same rule


def difference(
    equation: str,
    times: tuple[float, ...] = FORWARD,
    compile: Any = RECORDED,  # noqa: A002
    gradient: str | None = None,
    **solve: Any,
) -> float:
    """The worst relative difference between the compiled solve and plain differentiation over the very steps that it took."""
    made, t = EQUATIONS[equation](), torch.tensor(times, dtype=torch.float64)

    def gradients(**more: Any) -> tuple[dict[str, Tensor], list[float]]:
        solution = odeint(made.func, made.y0, t, args=made.args, full_output=True, **solve, **more)
        inputs = list(made.inputs.values())
        found = torch.autograd.grad(loss_of(solution.ys), inputs, retain_graph=True, materialize_grads=True)
        return dict(zip(made.inputs, found, strict=True)), solution.times

    got, steps = gradients(compile=compile, gradient=gradient, **TIGHT)
    wanted, _ = gradients(gradient="direct", options={"grid_constructor": lambda *_: steps})
    return worst_difference(got, wanted)[0]


@pytest.mark.parametrize("method", METHODS)
def test_adaptive_is_direct(method: str) -> None:
    assert difference("module", method=method, restarts=RESTARTS[method]) < EXACT


def test_checkpoints_of_steps_that_can_be_undone() -> None:
    assert difference("module", gradient="checkpoint", method="rev_bosh3", restarts=3) < EXACT


def test_towards_smaller_times() -> None:
    assert difference("module", BACKWARD, method="rev_dopri5", restarts=3) < EXACT


@pytest.mark.parametrize("equation", EQUATIONS)
def test_every_kind_of_state(equation: str) -> None:
    assert difference(equation, method="rev_bosh3", restarts=3) < EXACT


def test_without_restarts() -> None:
    assert difference("module", method="rev_bosh3", restarts=None) < EXACT


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
    torch.testing.assert_close(got.ys, wanted.ys, rtol=SAME_STEPS, atol=SAME_STEPS)


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


@compiles
def test_a_norm_that_looks_at_numbers() -> None:
    with pytest.raises(CompilationError, match="may not look at numbers"):
        solved(RECORDED, "rev_dopri5", options={"norm": lambda x: torch.tensor(x.abs().max().item())})


@needs_compiler
@quiet
@pytest.mark.slow
def test_compiled_is_direct() -> None:
    assert difference("module", method="rev_bosh3", compile=True, restarts=3) < EXACT
