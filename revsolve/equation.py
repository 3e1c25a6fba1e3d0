"""What can be asked of the solution of a deterministic equation: all of it, each sample at its own times, or until an event.

The front doors `odeint` and `cdeint` say how their equations become a term and a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.core.gradient import solve
from revsolve.core.problem import Problem
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.extras.dense import Dense, every_step
from revsolve.extras.event_steps import Event, steps_until
from revsolve.extras.events import solve_until
from revsolve.extras.per_sample import ClockOfEach, check_times_of_each, steps_for_each
from revsolve.extras.per_sample_steps import check_own_steps, steps_of_each
from revsolve.extras.progress import AcceptedStep
from revsolve.field.functorch import dual_numbers, followed
from revsolve.prepare.options import Tolerances, adapts
from revsolve.prepare.problem import values_hidden
from revsolve.prepare.state import Packing
from revsolve.prepare.times import Clock, as_tensor, check_times
from revsolve.solution import Solution


@dataclass
class Way:
    """How an equation is solved, as its front door was told."""

    scheme: Scheme
    options: dict[str, Any]
    tolerances: Tolerances
    gradient: str | None
    restarts: Any
    progress: bool
    callback: Callable[[AcceptedStep], Any] | None
    compile: Any

    def fit(self, packing: Packing) -> None:
        """Make tolerances and a norm, which are for the parts of the state, fit the packed one."""
        rtol, atol = self.tolerances
        self.tolerances = packing.spread(rtol, "rtol"), packing.spread(atol, "atol")
        if (norm := self.options.get("norm")) is not None and not packing.lone:
            self.options = {**self.options, "norm": lambda x: norm(packing.unpack(x))}


class Equation(Protocol):
    """All of a solve but its times. `kinks` are the times at which the field jumps, `knots` those where fixed steps end by
    default."""

    packing: Packing
    x0: Tensor
    scheme: Scheme
    options: dict[str, Any]
    tolerances: Tolerances
    compile: Any
    kinks: Sequence[float]
    knots: Sequence[float]

    def term(self, clock: Any) -> Term:
        """The term of which the field's times are those of the clock."""
        ...

    def steps(self, times: list[float], term: Term, t: Any) -> Callable[[], Stepper]:
        """Steps to each of the times."""
        ...

    def problem(
        self, term: Term, times: list[float], make: Callable[[], Stepper], length: float | None, t: Tensor | None = None
    ) -> Problem:
        """What the engine takes; `length` is the time to cover, None if not known, t the times if these have a gradient."""
        ...

    def results(self, xs: Tensor, num_dims: int) -> Any:
        """Packed states with some dimensions in front as users see them."""
        ...

    def kinks_of_each(self, clock: ClockOfEach) -> Sequence[float]:
        """The kinks in the step variable that all samples share."""
        ...

    def breaks(self, steps: list[float]) -> Sequence[int]:
        """The numbers of the steps after which the solution has a kink."""
        ...

    def end(self, times: list[float]) -> float:
        """Where time ends in the direction of the times."""
        ...

    def at_times(self, t: Any) -> Solution:
        """The solution at the times t, on which steps land."""
        ...


def solution_at(equation: Equation, y0: Any, t: Any) -> Solution:
    """The solution at the times t, in the way that these and the options ask for."""
    if isinstance(t, Tensor) and t.ndim == 2:
        return at_times_of_each(equation, y0, t)
    if equation.options.pop("steps_of_each", False):
        raise ValueError(
            "steps_of_each goes with times of each sample, t of shape (T, batch): pass t[:, None].expand(-1, batch) where they "
            "are the same for all."
        )
    if equation.options.pop("dense", False) and len(check_times(t)) > 1:
        return densely(equation, t)
    return equation.at_times(t)


def densely(equation: Equation, t: Any) -> Solution:
    """The solution at the times t, at least two, and in between: interpolated from steps that need not land on them."""
    if equation.options.get("jump_t"):
        raise ValueError(
            "dense output is smooth, so it cannot cross jump_t: solve from jump to jump, or leave out 'dense'."
        )
    times = check_times(t)
    clock = _clock(equation, t, times[0], times[-1])
    term = equation.term(clock)
    with torch.no_grad():
        make = equation.steps([times[0], times[-1]], term, t)
    problem = equation.problem(term, times, every_step(make), abs(times[-1] - times[0]))
    states = solve(problem, equation.x0, None)
    steps = list(problem.stats.times)
    interpolant = Dense(problem, states, equation.results, clock.shift, equation.breaks(steps))
    return Solution(as_tensor(t), interpolant.evaluate(t), problem.stats, steps, interpolant)


def at_times_of_each(equation: Equation, y0: Any, t: Tensor) -> Solution:
    """The states where each sample has observation times of its own, t of shape (T, batch)."""
    _refuse_programs(equation)
    times = check_times_of_each(t, y0)
    clock = ClockOfEach(t, equation.x0)
    kinks = equation.kinks_of_each(clock)
    if kinks and followed(t):
        raise ValueError(
            f"dX/dt jumps {len(kinks)} times on the way, so that the times of a sample move what its steps see: pass t.detach(), "
            "a path without kinks (HermitePath), or options={'form': 'increment'}."
        )
    term = equation.term(clock)
    scheme, options, tolerances = equation.scheme, equation.options, equation.tolerances
    own = check_own_steps(options.pop("steps_of_each", False), adapts(scheme, options, tolerances), options, kinks)
    with torch.no_grad():
        make = steps_for_each(t, scheme, options, tolerances, term, equation.x0, kinks)
        make = steps_of_each(clock, make) if own else make
    problem = equation.problem(term, times, make, times[-1])
    xs = solve(problem, equation.x0, None) if len(times) > 1 else equation.x0[None]
    steps = problem.stats.times or times
    return Solution(t, equation.results(xs, 1), problem.stats, steps)


def until_event(equation: Equation, t: Any, event_fn: Callable[..., Any]) -> tuple[Tensor, Solution]:
    """The time of the event, and the solution at the times t[0] and then."""
    _refuse_programs(equation)
    if values_hidden() or dual_numbers():
        raise RuntimeError(
            "an event is found by looking at numbers, which torch.func transforms, forward mode and torch.compile hide: "
            "differentiate with torch.autograd.grad or backward(), and solve outside of what is compiled."
        )
    times = check_times(t)
    if len(times) != 2:
        raise ValueError(
            f"with event_fn, t must hold the initial time and one that gives the direction, but it holds {len(times)} times."
        )
    end = equation.end(times)
    clock = _clock(equation, t, times[0], end)
    term, packing = equation.term(clock), equation.packing
    direction = equation.options.pop("event_direction", 0)
    event = Event(lambda s, x: event_fn(clock(s), packing.unpack(x)), direction, end)
    with torch.no_grad():
        options = with_kinks(equation)
        make = steps_until(
            event, times[0], equation.scheme, options, equation.tolerances, term, equation.x0, equation.knots
        )
    problem = equation.problem(term, [times[0], end], make, None)
    found, states = solve_until(event, problem, equation.x0)
    t = as_tensor(t)
    event_t, shift = found.to(t), _shift(t)
    event_t = event_t if shift is None else event_t + shift
    steps = [*problem.stats.times, float(found.detach())]
    return event_t, Solution(torch.stack([t[0], event_t]), equation.results(states, 1), problem.stats, steps)


def with_kinks(equation: Equation) -> dict[str, Any]:
    """The options for steps that land on the kinks where they follow the error."""
    options = equation.options
    if not equation.kinks or not adapts(equation.scheme, options, equation.tolerances):
        return options
    return {**options, "jump_t": [*options.get("jump_t", ()), *equation.kinks]}


def _refuse_programs(equation: Equation) -> None:
    if equation.compile:
        raise ValueError(
            "compile= is for the same fixed steps of all samples: leave it out with event_fn or 2-D times."
        )


def _clock(equation: Equation, t: Any, start: float, end: float) -> Clock:
    """A clock by which all times move with t[0]."""
    shift, packing = _shift(t), equation.packing
    lowest, highest = sorted((start, end))
    jumps = [s for s in (*equation.options.get("jump_t", ()), *equation.kinks) if lowest < s < highest]
    if shift is not None and jumps:
        raise ValueError(
            f"the gradient of t[0] moves all steps, with event_fn or 'dense', but the field jumps at t = {float(jumps[0])}: pass "
            "t.detach(), leave out jump_t, or give a path whose slope does not jump."
        )
    return Clock(packing.real_dtype, packing.device, shift)


def _shift(t: Any) -> Tensor | None:
    """Zero, with the gradient of the initial time; None where that needs none."""
    return t[0] - t[0].detach() if isinstance(t, Tensor) and followed(t) else None
