"""Where steps end: fixed grids from integer step counts, and adaptive steps that meet the tolerances."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from revsolve.core.caller import warn
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.field.functorch import batching, of_every_sample, transformed
from revsolve.field.repeat import capturing
from revsolve.prepare.diagnosis import explain_step
from revsolve.prepare.options import ADAPTIVE_OPTIONS, SolverOptions, Tolerance
from revsolve.prepare.times import check_times
from revsolve.steppers.adaptive import Adaptive, ErrorControl, first_step, root_mean_square
from revsolve.steppers.fixed import FixedGrid

MAX_NUM_STEPS = 100_000
EXACT = torch.finfo(torch.float64).eps


def choose_steps(
    times: list[float],
    options: SolverOptions,
    term: Term | None,
    x0: Tensor,
    constructed: Sequence[Any] = (),
    knots: Sequence[float] = (),
    discontinuities: Sequence[float] = (),
    rounding: float = EXACT,
) -> Callable[[], Stepper]:
    """Adaptive steps, which land on the discontinuities, or the fixed ones that are asked for, by default from knot to knot.

    `term` tells adaptive steps rates of change; `constructed` are the arguments of a grid_constructor, `rounding` that of times.
    """
    if options.adaptive:
        assert term is not None
        return adaptive_grid(times, options, term, x0, discontinuities)
    check_fixed(options)
    targets, jumps = (*options.step_t, *options.jump_t), options.jump_t
    if options.grid_constructor is not None:
        with torch.no_grad():
            points = check_times(options.grid_constructor(*constructed), "grid_constructor(...)")
        return given_grid(times, points, targets, jumps)
    if knots and options.step_size is None:
        return knot_grid(times, knots, x0.real.dtype, targets, jumps)
    return fixed_grid(times, options.step_size, options.scheme.name, rounding, targets, jumps, options.longer)


def check_fixed(options: SolverOptions) -> None:
    """Raise for options that fixed steps do not have, and warn of tolerances."""
    name = options.scheme.name
    useless = options.given.intersection(ADAPTIVE_OPTIONS)
    if useless:
        raise ValueError(f"option {min(useless)!r} is for adaptive steps, but these are fixed ({name!r}).")
    if options.tolerances_given:
        warn(f"rtol and atol have no effect: the steps of {name!r} are fixed here.")


def fixed_grid(
    times: list[float],
    step_size: float | None,
    method: str,
    rounding: float = EXACT,
    targets: Sequence[float] = (),
    jumps: Sequence[float] = (),
    longer: float = 0.0,
) -> Callable[[], Stepper]:
    """Equal steps of `step_size` or less between the given times; without it, one step from each time to the next.

    `rounding` is that of the times, relative to the largest: a step may be that much longer than asked for. So it may be by
    `longer`, relative to it, where the excess over so many whole steps is less than half of one.
    """
    ends = with_targets(times, targets) if targets else times
    if step_size is None and len(ends) == 2:
        warn(
            f"method {method!r} takes fixed steps, and without a step size it takes a single one from each time to the next: "
            "pass options={'step_size': ...}."
        )
    points = ends[:1]
    slack = rounding * max(abs(times[0]), abs(times[-1]))
    for a, b in itertools.pairwise(ends):
        n = 1 if step_size is None else num_steps(abs(b - a), step_size, slack, longer)
        for i in range(1, n):
            points.append(a + (b - a) * (i / n))
        points.append(b)
    return on_points(points, times, targets, jumps)


def num_steps(span: float, step_size: float, slack: float, longer: float = 0.0) -> int:
    """The number of equal steps no longer than `step_size`, but for a millionth, or what `fixed_grid` allows."""
    steps = span / step_size
    return max(1, math.ceil(steps - max(1e-6 * steps, min(longer * steps + 4 * slack / step_size, 0.5))))


def with_targets(times: list[float], targets: Sequence[float]) -> list[float]:
    """The times, and the targets between the first and the last of them, in order."""
    lowest, highest = sorted((times[0], times[-1]))
    return sorted({*times, *(s for s in targets if lowest < s < highest)}, reverse=times[-1] < times[0])


def on_points(
    points: list[float], times: list[float], pinned: Sequence[float] = (), jumps: Sequence[float] = ()
) -> Callable[[], Stepper]:
    """Steps from each point to the next; the times are among the points."""
    place = dict(zip(points, range(len(points)), strict=True))
    outputs = list(map(place.__getitem__, times))
    fixed = [place[s] for s in pinned if s in place] if pinned else ()
    one_sided = [place[s] for s in jumps if s in place] if jumps else ()
    return functools.partial(FixedGrid, points, outputs, fixed, one_sided)


def knot_grid(
    times: list[float],
    knots: Sequence[float],
    dtype: torch.dtype,
    targets: Sequence[float] = (),
    jumps: Sequence[float] = (),
) -> Callable[[], Stepper]:
    """Steps from knot to knot, to the targets, and to every output time; one that differs from such a time by a few roundings
    of the dtype gives way to it, but no knot that is a step away."""
    ordered = sorted(times)
    shortest = min([after - before for before, after in itertools.pairwise(knots)])
    resolution = min(8 * torch.finfo(dtype).eps * max(map(abs, times)), 1e-3 * shortest)
    inner = [s for s in (*knots, *targets) if ordered[0] < s < ordered[-1] and distance(s, ordered) > resolution]
    return on_points(with_targets(times, inner), times, inner, jumps)


def distance(s: float, ordered: list[float]) -> float:
    """From s to the nearest of the increasing numbers `ordered`."""
    if not torch.compiler.is_compiling():  # which knows no bisection
        i = bisect.bisect(ordered, s)
        ordered = ordered[max(0, i - 1) : i + 1]
    return min(abs(s - other) for other in ordered)


def given_grid(
    times: list[float], points: list[float], targets: Sequence[float] = (), jumps: Sequence[float] = ()
) -> Callable[[], Stepper]:
    """Steps from each of the given points to the next; output times that are not among them are added."""
    forward = 1.0 if len(times) < 2 or times[-1] > times[0] else -1.0
    if any((b - a) * forward <= 0 for a, b in itertools.pairwise(points)):
        raise ValueError("the points of grid_constructor must be strictly monotone in the direction of t.")
    lowest, highest = sorted((times[0], times[-1]))
    outside = [s for s in points if not lowest <= s <= highest]
    if outside:
        raise ValueError(
            f"the points of grid_constructor must lie within t, [{lowest}, {highest}], but {outside[0]} does not."
        )
    return on_points(with_targets(sorted({*points, *times}, reverse=forward < 0), targets), times, targets, jumps)


def adaptive_grid(
    times: list[float], options: SolverOptions, term: Term, x0: Tensor, discontinuities: Sequence[float] = ()
) -> Callable[[], Stepper]:
    """Steps that meet the tolerances and land on every output time, on `step_t`, `jump_t` and the discontinuities."""
    if torch.compiler.is_dynamo_compiling():
        raise ValueError(
            "adaptive steps are chosen by looking at numbers, which torch.compile hides: fix the steps, say with "
            "options={'step_size': 0.1}, or solve outside of what is compiled."
        )
    if capturing():
        raise ValueError(
            "a CUDA graph cannot capture adaptive steps, which look at their error: take a fixed options={'step_size': ...}."
        )
    rtol, atol = check_tolerances(options.rtol, options.atol, x0.dtype)
    targets = with_targets(times, (*options.step_t, *options.jump_t, *discontinuities))
    outputs, jumps = set(times), set(options.jump_t)
    if not options.scheme.stays_inside and any(s in targets[1:-1] for s in (*jumps, *discontinuities)):
        raise ValueError(
            f"{options.scheme.name!r} evaluates the field outside of its steps, so at a jump (jump_t, or of the slope of a path) "
            "on the wrong side, where adaptive steps would miss their tolerance: use 'alf4' or another method, or fix the steps."
        )
    # Where nothing jumps so far.
    smooth = [*times[:1], *next(([s] for s in targets[1:] if s not in outputs), times[-1:])]
    norm = root_mean_square if options.norm is None else options.norm
    if transformed():
        norm = functools.partial(largest_of_samples, norm, x0.ndim)
    order = options.scheme.error_order or 1

    def make() -> Stepper:
        if options.first_step:
            begin = lambda memo, x: options.first_step  # noqa: E731
        else:
            begin = functools.partial(first_step, smooth, rtol, atol, norm, order)
        control = ErrorControl(
            rtol,
            atol,
            norm,
            error_order=order,
            first_step=begin,
            safety=options.safety,
            shrink=options.dfactor,
            grow=options.ifactor,
            min_step=options.min_step,
            max_step=options.max_step,
            max_num_steps=options.max_num_steps or MAX_NUM_STEPS,
        )
        explain = explain_step(None if batching() else term)
        return Adaptive(targets, [s in outputs for s in targets], control, explain, jumps)

    return make


def check_tolerances(rtol: Tolerance, atol: Tolerance, dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
    """Tolerances with defaults (1e-7 and 1e-9, or what the dtype can resolve). Raises for negative or unreachable ones."""
    eps = torch.finfo(dtype).eps
    rtol = max(1e-7, 100 * eps) if rtol is None else rtol
    atol = max(1e-9, eps) if atol is None else atol
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: pass {name}.detach().")
        if not bool(torch.as_tensor(value >= 0, device="cpu").all()):
            raise ValueError(f"{name} must not be negative, but it is {float(torch.as_tensor(value).min())}.")
    if _largest(rtol) < 2 * eps:
        raise ValueError(
            f"rtol = {_largest(rtol):.1e} is below the rounding of {dtype}, 2 eps = {2 * eps:.1e}: use rtol >= {10 * eps:.0e}."
        )
    least = torch.finfo(dtype).tiny / eps  # so that what is zero, and stays so, has no error
    return rtol, atol.clamp(min=least) if isinstance(atol, Tensor) else max(atol, least)


def largest_of_samples(norm: Callable[[Tensor], Tensor], ndim: int, x: Tensor) -> Tensor:
    """The largest norm among all samples of the torch.vmaps around, whose dimensions lie before the last `ndim` if not hidden."""
    for _ in range(x.ndim - ndim):
        norm = vmap(norm)
    return of_every_sample(torch.as_tensor(norm(x), device=x.device)).max()


def _largest(tolerance: float | Tensor) -> float:
    return float(tolerance.max()) if isinstance(tolerance, Tensor) else float(tolerance)
