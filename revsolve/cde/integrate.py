"""`cdeint`: the front door of controlled differential equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from revsolve.cde.arguments import check_path, choose_form, choose_gradient, warn_of_few_knots
from revsolve.cde.drive import Drive, Increments, Slopes, asked_for
from revsolve.cde.each import PathOfEach
from revsolve.cde.term import MatrixTerm, ProductTerm, source_of
from revsolve.compat.torchcde import as_control
from revsolve.core.coupling import Scheme
from revsolve.extras.event_steps import EVENT_OPTIONS
from revsolve.extras.per_sample_steps import BatchedTime
from revsolve.extras.progress import AcceptedStep
from revsolve.extras.solve import solution_of
from revsolve.prepare.initial_value import InitialValueProblem, Posed
from revsolve.prepare.keywords import explains_keywords
from revsolve.prepare.options import read_options
from revsolve.prepare.state import Packing
from revsolve.prepare.times import check_times
from revsolve.schemes.tableau import Tableau

ROWS_PER_KNOT = 4  # a table may be so many times longer than the path: its memory must not grow with the steps


@explains_keywords
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
        compile: make machine code of the steps, as in `odeint`; for one state, a field that gives matrices, and a path without
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
        raise TypeError(f"func must be callable as func(t, z), or have a method prod(t, z, dX), but it is {func!r}.")
    read = read_options(
        method,
        options,
        ("form", *EVENT_OPTIONS) if event_fn is not None else ("form", "dense", "steps_of_each"),
        rtol=rtol,
        atol=atol,
        gradient=choose_gradient(adjoint, gradient),
        restarts=restarts,
        progress=progress,
        callback=callback,
        compile=compile,
    )
    read, control, packing = choose_form(read), as_control(X), Packing(z0, "z0")
    each = isinstance(t, Tensor) and t.ndim == 2
    times = [*map(float, t.detach().aminmax())] if each and t.numel() else check_times(t)
    check_path(control, packing, times[:1] if event_fn is not None else times, t)
    if event_fn is None and len(times) > 1:
        warn_of_few_knots(control.knots, times)
    drive: type[Drive] = Increments if read.form == "increment" else Slopes
    term = ProductTerm if hasattr(func, "prod") else MatrixTerm

    def pose(clock: Any, steps: list[float] | None) -> Posed:
        path = PathOfEach(control, clock) if isinstance(clock, BatchedTime) else control
        driven, span = drive(path, clock.shift), None
        if steps is not None and path is control:
            low, high = asked_for(read.scheme, steps[:2])[0][1:]
            driven, span = driven.tabulated(read.scheme, steps, ROWS_PER_KNOT * len(control.knots)), (low, high)
        return Posed(term(func, packing, driven, clock), (func, *driven.tensors), span)

    def results(xs: Tensor, num_dims: int) -> Any:
        front, back = tuple(range(num_dims)), tuple(range(-1 - num_dims, -1))
        return tree_map(lambda zs: zs.movedim(front, back), packing.unpack(xs))

    knots = control.knots
    ivp = InitialValueProblem(
        "cdeint",
        packing,
        packing.pack(z0),
        read.for_state(packing),
        pose,
        (func, z0),
        results,
        knots=knots if len(knots) > 2 else (),
        discontinuities=control.jumps if read.form == "derivative" else (),
        straight=read.form == "increment",
        interval=(knots[0], knots[-1]),
        source=source_of,
    )
    return solution_of(ivp, t, event_fn, full_output)
