"""An initial value problem as a front door puts it, and what the engine is asked for its solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revsolve.core.problem import Problem
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.field.functorch import followed
from revsolve.prepare.grid import TOO_LONG, choose_steps, explain
from revsolve.prepare.options import SolverOptions
from revsolve.prepare.problem import prepare
from revsolve.prepare.state import Packing
from revsolve.prepare.times import Clock, resolution

FAR = 1e300  # where time ends for an equation that knows no end


@dataclass(frozen=True)
class Posed:
    """A term, the objects whose tensors it may use, and the first span that it is evaluated for, where that is not a step.

    rates: a term whose product over any span tells the rate of change, where that of `term` does not.
    """

    term: Term
    owners: Sequence[Any]
    span: tuple[float, float] | None = None
    rates: Term | None = None


@dataclass(frozen=True)
class InitialValueProblem:
    """All of a solve but its times.

    Attributes:
        name: that of the front door.
        pose: the term whose field sees the times of a clock; from the times of its steps, where these are known and fixed.
        constructor_arguments: what a grid_constructor is called with, before the times.
        results: packed states with some dimensions in front as users see them.
        knots: where fixed steps end by default. discontinuities: the times at which the slope of the solution jumps.
        straight: whether the solution is a straight line within steps. interval: where the equation is defined.
        source: what drives the term in programs. remedy: advice where the state stops being finite.
    """

    name: str
    packing: Packing
    x0: Tensor
    options: SolverOptions
    pose: Callable[[Any, list[float] | None], Posed]
    constructor_arguments: tuple[Any, Any]
    results: Callable[[Tensor, int], Any]
    knots: Sequence[float] = ()
    discontinuities: Sequence[float] = ()
    straight: bool = False
    interval: tuple[float, float] = (-FAR, FAR)
    source: Callable[[Any], Any] | None = None
    remedy: str = TOO_LONG

    @property
    def jumps(self) -> Sequence[float]:
        """The times at which the field or the slope of the solution jumps."""
        return (*self.discontinuities, *self.options.jump_t)

    def clock(self, shift: Tensor | None = None) -> Clock:
        return Clock(self.packing.real_dtype, self.packing.device, shift)


def steps_to(ivp: InitialValueProblem, times: list[float], t: Any) -> Callable[[], Stepper]:
    """Steps to each of the times, as the options ask for them."""
    options, arguments, term = ivp.options, (*ivp.constructor_arguments, t), None
    if options.adaptive:
        posed = ivp.pose(ivp.clock(), None)
        term = posed.rates or posed.term
    with torch.no_grad():
        return choose_steps(times, options, term, ivp.x0, arguments, ivp.knots, ivp.discontinuities, resolution(t))


def moving_clock(ivp: InitialValueProblem, t: Any, start: float, end: float) -> Clock:
    """A clock by which all times between two move with t[0], where that has a gradient."""
    shift = t[0] - t[0].detach() if isinstance(t, Tensor) and followed(t) else None
    lowest, highest = sorted((start, end))
    jumps = [s for s in ivp.jumps if lowest < s < highest]
    if shift is not None and jumps:
        raise ValueError(
            f"the gradient of t[0] moves all steps, with event_fn or 'dense', but the field jumps at t = {jumps[0]}: pass "
            "t.detach(), leave out jump_t, or give a path whose slope does not jump."
        )
    return ivp.clock(shift)


def problem_of(
    ivp: InitialValueProblem,
    posed: Posed,
    times: Sequence[float],
    make_stepper: Callable[[], Stepper],
    t: Tensor | None = None,
    num_steps: int | None = None,
) -> Problem:
    """What the engine takes. t: the times where these have a gradient; num_steps: if known."""
    options = ivp.options
    return prepare(
        posed.term,
        ivp.x0,
        t,
        posed.span or (times[0], times[1]),
        posed.owners,
        options.scheme,
        make_stepper,
        options.gradient,
        options.restarts,
        explain=partial(explain, posed.rates or posed.term, ivp.remedy),
        compile=options.compile,
        source=ivp.source(posed.term) if options.compile and ivp.source else None,
        num_steps=num_steps,
        checkpoint_every=options.checkpoint_every,
    )
