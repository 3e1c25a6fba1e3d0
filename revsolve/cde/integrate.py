"""`cdeint`: the front door of controlled differential equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from revsolve.cde.arguments import check_path, choose_form, choose_gradient, refuse_kinks
from revsolve.cde.drive import Drive, Increments, Slopes, asked_for
from revsolve.cde.term import Deferred, cde_term, whole
from revsolve.core.coupling import Scheme
from revsolve.core.engine import solve
from revsolve.drivers.control import as_control
from revsolve.packing import Packing
from revsolve.problem import check_times, prepare
from revsolve.progress import AcceptedStep, watched
from revsolve.schemes.tableau import Tableau
from revsolve.solution import Solution
from revsolve.steps import adapts, choose_steps, explain, scheme_and_options

TOLERANCES = (1e-4, 1e-6)  # rtol and atol, as torchcde has them
ROWS_PER_KNOT = 4  # a table may be so many times longer than the path: its memory must not grow with the steps


def cdeint(
    X: Any,
    func: Callable[..., Any],
    z0: Any,
    t: Tensor,
    *,
    adjoint: bool = True,
    method: str | Tableau | Scheme = "rev_dopri5",
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    options: Mapping[str, Any] | None = None,
    gradient: str | None = None,
    restarts: Any = "auto",
    full_output: bool = False,
    progress: bool = False,
    callback: Callable[[AcceptedStep], Any] | None = None,
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
        t: times at which the state is wanted, (T,), strictly monotone either way, within the interval of X.
        adjoint: False means gradient="direct".
        method: a name (`revsolve.method_names()`), a `Tableau` (its plain method) or a `Scheme`. Methods with an embedded error
            estimate adapt their steps unless the options fix them; "reversible_heun" on the knots costs one evaluation each.
        rtol, atol: relative and absolute tolerance of adaptive steps, 1e-4 and 1e-6 if not given.
        options: those of `odeint`, and `form`: "derivative" steps through dX/dt at the times of the stages, "increment" through
            X(t1) - X(t0), on fixed steps; by default the latter for reversible_heun, alf and leapfrog, the former for all
            others. Fixed steps without `step_size` go from knot to knot of the path; adaptive ones land on its jumps.
        gradient: "reversible", "checkpoint" or "direct", see `odeint`.
        restarts: "auto", a fixed number of steps, a `Restarts`, or None (reversible methods only).
        full_output: return a `Solution` with statistics instead of the states alone. A `prod` is called anew wherever its
            values are used, which the statistics do not know.
        progress: show a progress bar.
        callback: called with an `AcceptedStep` after every accepted step.

    Returns:
        The states at the times t, (..., T, hidden), or a tuple of such.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
        RuntimeError: as for `odeint`.

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
        raise TypeError(f"func must be callable as func(t, z), or have a method prod(t, z, dX), but it is {func!r}.")
    gradient = choose_gradient(adjoint, gradient)
    control, packing, times = as_control(X), Packing(z0, "z0"), check_times(t)
    check_path(control, packing, times, t)
    scheme, settings = scheme_and_options(method, options, ("form",))
    scheme, form = choose_form(settings.pop("form", None), scheme, settings, (rtol, atol))
    adaptive = adapts(scheme, settings, (rtol, atol))
    if adaptive:
        rtol, atol = (TOLERANCES[0] if rtol is None else rtol), (TOLERANCES[1] if atol is None else atol)
        settings["jump_t"] = [*settings.get("jump_t", ()), *control.jump_times.tolist()]
    moving = t if isinstance(t, Tensor) and t.requires_grad else None
    if moving is not None and form == "derivative":
        refuse_kinks(control, times)

    drive: Drive = (Increments if form == "increment" else Slopes)(control)
    x0, knots = packing.pack(z0), control.grid_points.tolist()
    with torch.no_grad():
        construct = lambda constructor: constructor(func, z0, t)  # noqa: E731
        rates = whole(cde_term(func, packing, Slopes(control)))
        make = choose_steps(times, scheme, settings, (rtol, atol), rates, x0, construct, knots[2:] and knots)
    if len(times) == 1:
        return _results(x0[None], packing)
    span = (times[0], times[1])
    if not adaptive:
        grid = make().grid.times
        span = asked_for(scheme, grid[:2])[0][1:]
        if moving is None:
            drive = drive.tabulated(scheme, grid, ROWS_PER_KNOT * len(knots))
    term = cde_term(func, packing, drive, span)
    length = abs(times[-1] - times[0])
    make = watched(make, progress, callback, f"cdeint {scheme.name}", length, packing.unpack)
    problem = prepare(term, x0, moving, span, (func, *drive.tensors), scheme, make, gradient, restarts)
    problem.term = whole(term, problem.term)  # which may fix its random numbers
    problem.first_value = None if isinstance(problem.term, Deferred) else problem.first_value
    problem.explain = explain(lambda t, x: rates.product(rates.value(t, x), t, t)[0])
    ys = _results(solve(problem, x0, moving), packing)
    if not full_output:
        return ys
    assert problem.grid is not None
    return Solution(torch.as_tensor(t), ys, problem.stats, problem.grid.times)


def _results(xs: Tensor, packing: Packing) -> Any:
    return tree_map(lambda zs: zs.movedim(0, -2), packing.unpack(xs))
