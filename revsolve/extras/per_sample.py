"""Observation times of each sample's own: every sample goes through its own time, all of them in the same steps.

With times t[i, b] of sample b, the step variable s runs from i to i + 1 while the time of each sample runs from t[i, b] to
t[i + 1, b] at a constant rate,

    dy_b/ds = (t[i + 1, b] - t[i, b]) f(t_b(s), y_b),

so that the times enter the field like any other argument, and their gradients are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

from revsolve.core.gradient import solve
from revsolve.core.problem import Stats
from revsolve.core.stepper import Stepper
from revsolve.extras.per_sample_steps import BatchedTime, check_per_sample_steps, per_sample_steps
from revsolve.extras.progress import watched_steps
from revsolve.field.functorch import followed, numbers
from revsolve.prepare.grid import check_fixed, choose_steps, num_steps, on_points
from revsolve.prepare.problem import InitialValueProblem
from revsolve.prepare.times import resolution
from revsolve.solution import Solution

CLOSE = 1e-9  # places nearer to each other than so many steps between outputs count as one
REFUSED = ("grid_constructor", "first_step", "min_step", "max_step", "step_t", "jump_t", "dense")


def solve_per_sample(ivp: InitialValueProblem, t: Tensor) -> Solution:
    """The states where each sample has observation times of its own, t of shape (T, batch)."""
    options = ivp.options
    if options.compile:
        raise ValueError("compile= is for the same fixed steps of all samples: leave it out with 2-D times.")
    times = check_sample_times(t, ivp.constructor_arguments[1], ("t", ivp.packing.name))
    clock = BatchedTime(t, ivp.x0)
    places = passed_by_samples(ivp.discontinuities, t)
    if places and followed(t):
        raise ValueError(
            f"dX/dt jumps {len(places)} times on the way, so that the times of a sample move what its steps see: pass "
            "t.detach(), a path whose slope does not jump (HermitePath), or options={'form': 'increment'}."
        )
    check_per_sample_steps(options, places)
    make = steps_for_samples(ivp, t, clock, places)
    make = per_sample_steps(clock, make) if options.steps_of_each else make
    if len(times) == 1:
        return Solution(t, ivp.results(ivp.x0[None].clone(), 1), Stats(), times)
    posed = ivp.pose(clock, None if options.adaptive else make().grid.times)
    problem = ivp.problem(posed, times, watched_steps(make, ivp, times[-1]))
    xs = solve(problem, ivp.x0, None)
    return Solution(t, ivp.results(xs, 1), problem.stats, list(problem.stats.times))


def check_sample_times(t: Tensor, y0: Any, names: tuple[str, str] = ("t", "y0")) -> list[float]:
    """The values 0, 1, 2, ... of the step variable at the outputs. Raises unless y0 is a batch and the times go one way."""
    name, state = names
    if not isinstance(y0, Tensor) or y0.ndim == 0 or y0.shape[0] != t.shape[1]:
        shape = tuple(y0.shape) if isinstance(y0, Tensor) else type(y0).__name__
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} gives times of each sample, so {state} must be a tensor with {t.shape[1]} samples "
            f"as its first dimension, but it is {shape}."
        )
    if not t.is_floating_point() or not t.numel():
        raise ValueError(
            f"{name} must hold floating point numbers, but it has shape {tuple(t.shape)} and dtype {t.dtype}."
        )
    steps = t.detach().diff(dim=0)
    bad = ~t.detach().isfinite().all(0) | ((steps > 0).any(0) & (steps < 0).any(0))
    if bool(bad.any()):
        b = int(bad.nonzero()[0])
        raise ValueError(
            f"the times of each sample must be finite and go one way (repeated ones hold its state), but {name}[:, {b}] = "
            f"{t[:, b].tolist()!r:.80}."
        )
    return [float(i) for i in range(len(t))]


def steps_for_samples(
    ivp: InitialValueProblem, t: Tensor, clock: BatchedTime, discontinuities: Sequence[float]
) -> Callable[[], Stepper]:
    """Steps shared by all samples: adaptive ones, which land on the discontinuities, or so many that no sample takes one longer
    than `step_size`."""
    options, scheme = ivp.options, ivp.options.scheme
    refuse_options(options.given)
    fault = None if scheme.stays_inside else "evaluates the field outside of its steps"
    fault = "carries a velocity from step to step" if scheme.has_velocity else fault
    if fault is not None:
        raise ValueError(
            f"{scheme.name!r} {fault}, but with times of each sample's own the speed of time changes at every output: use "
            "another method, 'rev_rk4' say."
        )
    times = [float(i) for i in range(len(t))]
    if options.step_size is not None:
        check_fixed(options)
        return on_points(points_for_samples(t, options.step_size), times)
    if discontinuities and not options.adaptive:
        raise ValueError(
            f"{scheme.name!r} takes fixed steps, and the knots of the path lie elsewhere for every sample: pass "
            "options={'step_size': ...}."
        )
    posed = ivp.pose(clock, None)
    with torch.no_grad():
        return choose_steps(times, options, posed.rates or posed.term, ivp.x0, discontinuities=discontinuities)


def refuse_options(given: Container[str]) -> None:
    """Raise where an option speaks of one time for all samples."""
    for name in REFUSED:
        if name in given:
            raise ValueError(
                f"option {name!r} has no meaning where each sample has times of its own: use step_size or rtol."
            )


def points_for_samples(t: Tensor, step_size: float) -> list[float]:
    """Where steps begin and end, so many that no sample takes one longer than `step_size`."""
    points, slack = [0.0], resolution(t) * float(t.detach().abs().max())
    for i, span in enumerate(numbers(t.detach().to("cpu", torch.float64).diff(dim=0).abs().amax(1))):
        n = num_steps(span, step_size, slack)
        points += [i + j / n for j in range(1, n)] + [i + 1.0]
    return points


def passed_by_samples(places: Sequence[float], t: Tensor) -> list[float]:
    """Where the time of some sample passes one of the places, in the step variable: increasing numbers. t: (T, batch)."""
    if not places:
        return []
    t = t.detach().to("cpu", torch.float64)
    ahead = torch.tensor(places, dtype=t.dtype, device="cpu")[:, None, None] - t[:-1]
    part = ahead / t.diff(dim=0)  # (k, T - 1, batch)
    inside = (part > CLOSE) & (part < 1 - CLOSE)
    passed = (part + torch.arange(len(t) - 1, dtype=t.dtype, device="cpu")[:, None])[inside].unique()
    return numbers(passed[torch.cat([passed.new_ones(1), passed.diff()])[: len(passed)] > CLOSE])
