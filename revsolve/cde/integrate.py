"""`cdeint`: the front door of controlled differential equations."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from revsolve.cde.arguments import check_path, choose_form, choose_gradient, choose_tolerances, refuse_kinks
from revsolve.cde.drive import Drive, Increments, Slopes, asked_for
from revsolve.cde.each import PathOfEach, kinks_of_each
from revsolve.cde.term import MatrixTerm, ProductTerm, cde_term, source_of
from revsolve.compat.torchcde import as_control
from revsolve.core.coupling import Scheme
from revsolve.core.gradient import solve
from revsolve.core.problem import Problem, Stats
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.equation import Way, solution_at, until_event, with_kinks
from revsolve.extras.event_steps import EVENT_OPTIONS
from revsolve.extras.per_sample import ClockOfEach
from revsolve.extras.progress import AcceptedStep, watched
from revsolve.field.functorch import followed
from revsolve.paths.control import Control
from revsolve.prepare.options import adapts, choose_steps, explain, scheme_and_options
from revsolve.prepare.problem import prepare
from revsolve.prepare.state import Packing
from revsolve.prepare.times import as_tensor, check_times
from revsolve.schemes.tableau import Tableau
from revsolve.solution import Solution

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
    known = ("form", *EVENT_OPTIONS) if event_fn is not None else ("form", "dense", "steps_of_each")
    scheme, settings = scheme_and_options(method, options, known)
    scheme, form = choose_form(settings.pop("form", None), scheme, settings, (rtol, atol))
    tolerances = choose_tolerances(adapts(scheme, settings, (rtol, atol)), rtol, atol)
    gradient = choose_gradient(adjoint, gradient)
    way = (scheme, settings, tolerances, gradient, restarts, progress, callback, compile)
    equation = _Equation(*way, func, as_control(X), z0, form)
    if event_fn is not None:
        check_path(equation.control, equation.packing, check_times(t)[:1], t)
        event_t, solution = until_event(equation, t, event_fn)
        return event_t, solution if full_output else solution.ys
    each = isinstance(t, Tensor) and t.ndim == 2
    times = [*t.detach().aminmax()] if each and t.numel() else check_times(t)
    check_path(equation.control, equation.packing, [float(s) for s in times], t)
    solution = solution_at(equation, z0, t)
    return solution if full_output else solution.ys


@dataclass
class _Equation(Way):
    func: Any
    control: Control
    z0: Any
    form: str

    def __post_init__(self) -> None:
        self.packing = Packing(self.z0, "z0")
        self.fit(self.packing)
        self.x0 = self.packing.pack(self.z0)
        self.kinks: Sequence[float] = self.control.jumps if self.form == "derivative" else []
        knots = self.control.knots
        self.knots: Sequence[float] = knots if len(knots) > 2 else []
        self.drive: type[Drive] = Increments if self.form == "increment" else Slopes
        self.rates = cde_term(self.func, self.packing, Slopes(self.control))

    def term(self, clock: Any) -> MatrixTerm | ProductTerm:
        source = PathOfEach(self.control, clock) if isinstance(clock, ClockOfEach) else self.control
        return cde_term(self.func, self.packing, self.drive(source, shift=clock.shift), clock)

    def steps(self, times: list[float], term: Term, t: Any) -> Callable[[], Stepper]:
        construct = lambda constructor: constructor(self.func, self.z0, t)  # noqa: E731
        options = with_kinks(self)
        return choose_steps(times, self.scheme, options, self.tolerances, self.rates, self.x0, construct, self.knots)

    def problem(
        self, term: Term, times: list[float], make: Callable[[], Stepper], length: float | None, t: Tensor | None = None
    ) -> Problem:
        span = (times[0], times[1])
        assert isinstance(term, (MatrixTerm, ProductTerm))
        make = watched(make, self.progress, self.callback, f"cdeint {self.scheme.name}", length, self.packing.unpack)
        owners = (self.func, *term.control.tensors)
        rates = term if isinstance(term.control.control, PathOfEach) else self.rates
        return prepare(
            term,
            self.x0,
            t,
            span,
            owners,
            self.scheme,
            make,
            self.gradient,
            self.restarts,
            explain=explain(lambda t, x: rates.product(rates.value(t, x), rates.control(t, t, t))[0]),
            compile=self.compile,
            source=source_of(term) if self.compile else None,
        )

    def results(self, xs: Tensor, num_dims: int) -> Any:
        front, back = tuple(range(num_dims)), tuple(range(-1 - num_dims, -1))
        return tree_map(lambda zs: zs.movedim(front, back), self.packing.unpack(xs))

    def kinks_of_each(self, clock: ClockOfEach) -> Sequence[float]:
        return kinks_of_each(self.control.jump_times, clock.t) if self.kinks else []

    def breaks(self, steps: list[float]) -> Sequence[int]:
        """Increments follow straight lines within steps; else the ends of the steps that meet a kink."""
        if self.form == "increment":
            return range(len(steps))
        forward = steps if steps[-1] > steps[0] else [-s for s in steps]
        ends = set()
        for kink in self.kinks:
            place = kink if forward is steps else -kink
            ends |= {bisect_right(forward, place) - 1, bisect_left(forward, place)}
        return sorted(ends & {*range(len(steps))})

    def end(self, times: list[float]) -> float:
        first, last = self.control.knots[0], self.control.knots[-1]
        end = last if times[1] > times[0] else first
        if not abs(end - times[0]) > 0 or (end > times[0]) != (times[1] > times[0]):
            raise ValueError(f"the path ends at t = {end}, where the solve would begin: give one over a longer time.")
        return end

    def at_times(self, t: Any) -> Solution:
        times = check_times(t)
        moving = t if isinstance(t, Tensor) and followed(t) else None
        with torch.no_grad():
            make = self.steps(times, self.rates, t)
        grid = None if adapts(self.scheme, self.options, self.tolerances) else make().grid
        if moving is not None:
            refuse_kinks(self.kinks, times, grid)
        if len(times) == 1:
            return Solution(as_tensor(t), self.results(self.x0[None], 1), Stats(), times)
        drive, span = self.drive(self.control), times[:2]
        if grid is not None:
            span = list(asked_for(self.scheme, grid.times[:2])[0][1:])
            if moving is None:
                drive = drive.tabulated(self.scheme, grid.times, ROWS_PER_KNOT * len(self.control.grid_points))
        term = cde_term(self.func, self.packing, drive)
        problem = self.problem(term, span, make, abs(times[-1] - times[0]), moving)
        xs = solve(problem, self.x0, moving)
        return Solution(as_tensor(t), self.results(xs, 1), problem.stats, problem.stats.times)
