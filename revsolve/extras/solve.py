"""The solution of an initial value problem as it is asked for: at times, between the steps, for each sample, until an event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from revsolve.core.gradient import solve
from revsolve.core.problem import Stats
from revsolve.core.stepper import Grid
from revsolve.extras.dense import solve_densely
from revsolve.extras.events import solve_until_event
from revsolve.extras.per_sample import solve_per_sample
from revsolve.extras.progress import watched_steps
from revsolve.field.functorch import followed
from revsolve.prepare.grid import distance
from revsolve.prepare.problem import InitialValueProblem
from revsolve.prepare.times import as_tensor, check_times, warn_of_indistinct
from revsolve.solution import Solution

CLOSE = 1e-9  # steps that end so near to a discontinuity, relative to the whole time, end there


def solution_of(ivp: InitialValueProblem, t: Any, event_fn: Callable[..., Any] | None, full_output: bool) -> Any:
    """What a front door returns."""
    if event_fn is not None:
        event_t, solution = solve_until_event(ivp, t, event_fn)
        return event_t, solution if full_output else solution.ys
    if isinstance(t, Tensor) and t.ndim == 2:
        solution = solve_per_sample(ivp, t)
    elif ivp.options.steps_of_each:
        raise ValueError(
            "steps_of_each goes with times of each sample, t of shape (T, batch): pass t[:, None].expand(-1, batch) where they "
            "are the same for all."
        )
    else:
        times = check_times(t)
        solution = (solve_densely if ivp.options.dense and len(times) > 1 else solve_at)(ivp, t, times)
    return solution if full_output else solution.ys


def solve_at(ivp: InitialValueProblem, t: Any, times: list[float]) -> Solution:
    """The solution at the times t, on which steps land."""
    make, options = ivp.steps(times, t), ivp.options
    grid = None if options.adaptive else make().grid
    moving = t if isinstance(t, Tensor) and followed(t) else None
    if moving is not None and ivp.jumps:
        refuse_discontinuities(ivp, times, grid)
    if len(times) == 1:
        return Solution(as_tensor(t), ivp.results(ivp.x0[None].clone(), 1), Stats(), times)
    foreseen = None if grid is None or moving is not None or options.jump_t else grid.times
    posed = ivp.pose(ivp.clock(), foreseen)
    first = times if grid is None else grid.times
    if options.progress or options.callback is not None:
        make = watched_steps(make, ivp, abs(times[-1] - times[0]))
    problem = ivp.problem(posed, first, make, moving, num_steps=None if grid is None else grid.num_steps)
    xs = solve(problem, ivp.x0, moving)
    warn_of_indistinct(problem.stats.times, ivp.packing.real_dtype)
    return Solution(as_tensor(t), ivp.results(xs, 1), problem.stats, list(problem.stats.times))


def refuse_discontinuities(ivp: InitialValueProblem, times: list[float], grid: Grid | None) -> None:
    """Raise where a gradient with respect to output times is wanted but does not exist, or would not be seen by fixed steps."""
    on_output = {*ivp.discontinuities} & {*times[1:-1]} | {*ivp.options.jump_t} & {*times}
    if on_output:
        t = min(on_output)
        raise ValueError(
            f"t[{times.index(t)}] = {t} lies where dX/dt jumps or the field does, so that the solution has no derivative with "
            "respect to it: shift it, pass t.detach(), or let cdeint step by options={'form': 'increment'}."
        )
    if grid is None:
        return
    lowest, highest = sorted((times[0], times[-1]))
    met = sorted([grid.times[n] for n in grid.pinned] + times)
    missed = [t for t in ivp.discontinuities if lowest < t < highest and distance(t, met) > CLOSE * (highest - lowest)]
    if missed:
        raise ValueError(
            f"t requires a gradient, but dX/dt jumps at {missed[0]}, within a step that moves with t, and the gradient would not "
            "know: leave out step_size, so that steps go from knot to knot, pass t.detach(), or step by options={'form': "
            "'increment'}."
        )
