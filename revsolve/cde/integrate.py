"""`cdeint`: the front door of controlled differential equations."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from revsolve.cde.drive import Drive, Increments, PathOfEach, Slopes, asked_for
from revsolve.cde.term import MatrixTerm, ProductTerm, source_of
from revsolve.compat.torchcde import as_control
from revsolve.core.caller import warn
from revsolve.core.coupling import Scheme
from revsolve.extras.event_steps import EVENT_OPTIONS
from revsolve.extras.per_sample_steps import BatchedTime
from revsolve.extras.progress import AcceptedStep
from revsolve.extras.solve import solution_of
from revsolve.paths.control import Control
from revsolve.paths.piecewise import check_inside
from revsolve.prepare.options import SolverOptions, check_choice, explains_keywords, read_options
from revsolve.prepare.problem import InitialValueProblem, Posed
from revsolve.prepare.state import Packing
from revsolve.prepare.times import check_times
from revsolve.schemes.increment import OneEvaluation
from revsolve.schemes.tableau import Tableau

FORMS = ("derivative", "increment")
MANY = 20  # knots, of which a solve should cover more than a tenth
RTOL, ATOL = 1e-4, 1e-6  # as torchcde has them
ROWS_PER_KNOT = 4  # a table may be so many times longer than the path: its memory must not grow with the steps


@explains_keywords
def cdeint(
    X: Any,
    func: Callable[..., Any],
    z0: Any,
    t: Tensor | Sequence[float],
    *,
    adjoint: bool = True,
    method: str | Tableau | Scheme = "rev_dopri5",
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    gradient: str | None = None,
    restarts: Any = "auto",
    full_output: bool = False,
    event_fn: Callable[..., Any] | None = None,
    progress: bool = False,
    callback: Callable[[AcceptedStep], Any] | None = None,
    compile: bool | Mapping[str, Any] = False,  # noqa: A002
) -> Any:
    """Solve `dz = func(t, z) dX(t)` from `z(t[0]) = z0`, with exact gradients of the discrete solve.

    Gradients reach z0, t, everything differentiable that the field touches, and the path: its coefficients and the data behind
    them, and so the solution of another CDE whose output the path was made from.

    Args:
        X: the control: `LinearPath`, `HermitePath`, `NaturalCubicPath`, `LogSignaturePath`; a path of torchcde; anything with
            `evaluate`, `derivative` and `interval`; or a tuple of these. Its values are (..., channels).
        func: any callable; func(t, z) is a matrix (..., hidden, channels) for a 0-d tensor t and z of shape (..., hidden). If it
            has a method `prod(t, z, dX)`, which returns func(t, z) dX of shape (..., hidden), that is called instead.
        z0: the initial state, (..., hidden), or a tuple of such where X is a tuple.
        t: times at which the state is wanted, (T,), strictly monotone either way, within the interval of X. Or (T, batch): each
            sample's own times, for a tensor z0 of shape (batch, ..., hidden); func then receives t of shape (batch,).
        adjoint: False means gradient="direct".
        method: a name (`revsolve.method_names()`), a `Tableau` (its plain method) or a `Scheme`. Methods with an embedded error
            estimate adapt their steps unless the options fix them; "reversible_heun" on the knots costs one evaluation each.
        rtol, atol: relative and absolute tolerance of adaptive steps, 1e-4 and 1e-6 if not given.
        options: those of `odeint`, and `form`: "derivative" steps through dX/dt at the times of the stages, "increment" through
            X(t1) - X(t0), on fixed steps; by default the latter for reversible_heun, alf and leapfrog, the former for all
            others. Fixed steps without `step_size` go from knot to knot of the path; adaptive ones land on its jumps.
            `dense` interpolates between the steps, with breaks where dX/dt jumps; increments know a straight line there.
        gradient: "reversible", "checkpoint" or "direct", see `odeint`.
        restarts: "auto", a fixed number of steps, a `Restarts`, or None (reversible methods only).
        full_output: return a `Solution` with statistics instead of the states alone. A `prod` is called anew wherever its
            values are used, which the statistics do not know.
        event_fn: solve from t[0] in the direction of t[1], which need not be reached, until a component of the tensor
            `event_fn(t, z)` crosses zero; see `odeint`.
        progress: show a progress bar.
        callback: called with an `AcceptedStep` after every accepted step.
        compile: compile the steps, as in `odeint`; for one state, a field that gives matrices, and a path without
            gradients.

    Returns:
        The states at the times t, (..., T, hidden), or a tuple of such. With event_fn, the time of the event, and the two states
        at t[0] and then.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
        RuntimeError: as for `odeint`; also if no event was found before the path ends.

    Papers: Kidger, Morrill, Foster & Lyons (2020, arXiv 2005.08926); increments and windows as in Morrill, Salvi, Kidger &
    Foster (2021, arXiv 2009.08295).

    Example:
        >>> import torch
        >>> from revsolve import LinearPath, cdeint
        >>> X = LinearPath(torch.rand(8, 50, 3).cumsum(1))
        >>> matrix = torch.nn.Linear(16, 16 * 3)
        >>> func = lambda t, z: torch.tanh(matrix(z)).view(8, 16, 3)
        >>> cdeint(X, func, torch.zeros(8, 16), X.interval, method="reversible_heun").shape
        torch.Size([8, 2, 16])
    """
    if not callable(func) and not hasattr(func, "prod"):
        raise TypeError(
            f"func must be callable as func(t, z), or have a method prod(t, z, dX), but it is a {type(func).__name__}: call "
            "cdeint(X, func, z0, t)."
        )
    if not adjoint and gradient not in (None, "direct"):
        raise ValueError(f"adjoint=False means gradient='direct', but gradient={gradient!r}: leave one of them out.")
    read = read_options(
        method,
        options,
        ("form", *EVENT_OPTIONS) if event_fn is not None else ("form", "dense", "steps_of_each"),
        rtol=rtol,
        atol=atol,
        gradient=gradient if adjoint else "direct",
        restarts=restarts,
        progress=progress,
        callback=callback,
        compile=compile,
    )
    read, control, packing = choose_form(read), as_control(X), Packing(z0, "z0")
    check_path(control, packing, t, event_fn is not None)
    return solution_of(_problem(control, func, z0, packing, read), t, event_fn, full_output)


def _problem(control: Control, func: Any, z0: Any, packing: Packing, options: SolverOptions) -> InitialValueProblem:
    """All of the solve but its times."""
    knots, by_increments = control.knots, options.form == "increment"
    drive: type[Drive] = Increments if by_increments else Slopes
    term = ProductTerm if hasattr(func, "prod") else MatrixTerm

    def pose(clock: Any, steps: list[float] | None) -> Posed:
        path = PathOfEach(control, clock) if isinstance(clock, BatchedTime) else control
        driven, span = drive(path, clock.shift), None  # type: Drive, Any
        if steps is not None and path is control:
            driven = driven.tabulated(options.scheme, steps, ROWS_PER_KNOT * len(knots))
            span = asked_for(options.scheme, steps[:2])[0][1:]
        return Posed(term(func, packing, driven, clock), (func, *driven.tensors), span)

    def results(xs: Tensor, num_dims: int) -> Any:
        front, back = tuple(range(num_dims)), tuple(range(-1 - num_dims, -1))
        return tree_map(lambda zs: zs.movedim(front, back), packing.unpack(xs))

    return InitialValueProblem(
        "cdeint",
        packing,
        packing.pack(z0),
        options.for_state(packing),
        pose,
        (func, z0),
        results,
        knots=knots if len(knots) > 2 else (),
        discontinuities=() if by_increments else control.jumps,
        straight=by_increments,
        interval=(knots[0], knots[-1]),
        source=source_of,
    )


def check_path(control: Control, packing: Packing, t: Any, until_event: bool) -> None:
    """Raise unless the path covers the times and its values fit the state: same batch, dtype and device."""
    each = isinstance(t, Tensor) and t.ndim == 2 and t.numel()
    knots, times = control.knots, [*map(float, t.detach().aminmax())] if each else check_times(t)
    times = times[:1] if until_event else times
    check_inside(min(times), max(times), (knots[0], knots[-1]), t, control.interval)
    value = control.evaluate(times[0])
    if isinstance(value, Tensor) != packing.lone or (not packing.lone and len(value) != len(packing.shapes)):
        states, paths = (1 if packing.lone else len(packing.shapes)), (1 if isinstance(value, Tensor) else len(value))
        raise ValueError(
            f"z0 and X must be a tensor and a path, or equally many of both, but z0 holds {states} state(s) and X {paths} "
            "path(s)."
        )
    for x, shape, dtype in zip([value] if packing.lone else value, packing.shapes, packing.dtypes, strict=True):
        if not shape or x.shape[:-1] != shape[:-1]:
            raise ValueError(
                f"X(t) of shape (..., channels) = {tuple(x.shape)} and z0 of shape (..., hidden) = {tuple(shape)} must have the "
                "same leading dimensions, the batch: expand or reshape one of them."
            )
        if x.dtype != dtype or x.device != packing.device:
            raise TypeError(
                f"X is of {x.dtype} on {x.device}, but z0 of {dtype} on {packing.device}: convert the data or z0, say with "
                f".to(z0)."
            )
    if len(times) > 1:
        warn_of_few_knots(knots, times)


def warn_of_few_knots(knots: Sequence[float], times: Sequence[float]) -> None:
    """Warn where a solve covers less than a tenth of the path, as with t in other units than its knots."""
    if torch.compiler.is_compiling():  # which knows no bisection, and warns of nothing
        return
    met = bisect_right(knots, max(times)) - bisect_left(knots, min(times))
    if len(knots) >= MANY and met <= len(knots) // 10:
        warn(
            f"t covers less than a tenth of the {len(knots)} knots of X, which count 0, 1, 2, ... unless it was made with times "
            "of its own: t=X.interval covers them all."
        )


def choose_form(options: SolverOptions) -> SolverOptions:
    """How to step, settled, and the tolerances that adaptive steps cannot do without.

    By default, methods of order 2 with one evaluation take increments, for they resolve no more than the ends of a step. With
    increments the scheme's error estimate is given up: it does not see what the path does within a step.
    """
    form, scheme, rtol, atol = options.form, options.scheme, options.rtol, options.atol
    if form is None:
        once = all(isinstance(update.increment, (OneEvaluation, type(None))) for update in scheme.updates)
        form = "increment" if once and scheme.order <= 2 and not options.adaptive else "derivative"
    check_choice("option form", form, FORMS)
    if form == "derivative":
        if not options.adaptive:
            return replace(options, form=form)
        return replace(options, form=form, rtol=RTOL if rtol is None else rtol, atol=ATOL if atol is None else atol)
    if options.tolerances_given:
        raise ValueError(
            "form='increment' takes fixed steps, but rtol or atol ask for adaptive ones: leave them out, or use "
            "form='derivative'."
        )
    return replace(options, form=form, scheme=replace(scheme, error_order=None))
