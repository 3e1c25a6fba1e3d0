"""Neural ODEs: `odeint`, whose term is h f(t, x)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.core.engine import solve
from revsolve.core.march import Problem
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.dense import Dense, every_step
from revsolve.event_steps import EVENT_OPTIONS, Event, steps_until
from revsolve.events import solve_until
from revsolve.field_term import FieldTerm, time_shift
from revsolve.packing import Packing
from revsolve.per_sample import TimesOfEach, check_times_of_each, steps_for_each
from revsolve.problem import check_times, prepare, values_hidden
from revsolve.progress import AcceptedStep, watched
from revsolve.schemes.tableau import Tableau
from revsolve.solution import Solution
from revsolve.steps import Tolerances, choose_steps, explain, scheme_and_options


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    args: Any = (),
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    method: str | Tableau | Scheme = "rev_dopri5",
    options: Mapping[str, Any] | None = None,
    gradient: str | None = None,
    restarts: Any = "auto",
    full_output: bool = False,
    event_fn: Callable[..., Any] | None = None,
    progress: bool = False,
    callback: Callable[[AcceptedStep], Any] | None = None,
) -> Any:
    """Solve `dy/dt = func(t, y, *args)` from `y(t[0]) = y0`, with exact gradients of the discrete solve.

    Reversible pairs follow McCallum & Foster (2024, arXiv 2410.11648).

    Args:
        func: the field, any callable `func(t, y, *args)`; t is a 0-d tensor, the value is shaped like y.
        y0: a tensor of any shape, real or complex, or a pytree of tensors.
        t: times at which the state is wanted, shape (T,), strictly monotone either way; in the unit of the field. Or (T, batch):
            each sample's own times, for a tensor y0 of shape (batch, ...); func then receives t of shape (batch,).
        args: a tuple of further arguments for func; anything else is passed on as a single one.
        rtol, atol: relative and absolute tolerance of adaptive steps; by default 1e-7 and 1e-9 in float64.
        method: a name (`revsolve.method_names()`), a `Tableau` (its plain method) or a `Scheme`.
        options: `step_size` or `grid_constructor` for fixed steps; `first_step`, `safety`, `ifactor`, `dfactor`, `min_step`,
            `max_step`, `max_num_steps`, `step_t`, `jump_t`, `norm` for adaptive ones; `coupling` (`rev_` methods), `eta` (alf).
            Methods with an embedded error estimate adapt unless the steps are fixed here; the natively reversible ones
            adapt when rtol or atol is given. `dense`: steps need not land on output times, which are interpolated; keeps the
            state after every step. `event_direction`: 1 or -1 for crossings from below or from above only.
        gradient: "reversible" (undo the steps), "checkpoint" (about 2 sqrt(N) states) or "direct" (keep everything);
            by default the first that the method allows.
        restarts: "auto", a fixed number of steps, a `Restarts`, or None to switch them off (reversible methods only).
        full_output: return a `Solution` with statistics instead of the states alone.
        event_fn: solve from t[0] in the direction of t[1], which need not be reached, until a component of the tensor
            `event_fn(t, y)` crosses zero. A zero at t[0] does not count, nor does one that is left again within a step.
        progress: show a progress bar.
        callback: called with an `AcceptedStep` after every accepted step.

    Returns:
        The states at the times t: like y0, with a leading dimension T. With event_fn, the time of the event, and the two states
        at t[0] and then.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
        RuntimeError: if the field returns NaN, the step size underflows, there are too many steps, or no event was found after
            10,000 steps (or `max_num_steps`), with the time reached.

    Example:
        >>> import torch
        >>> from revsolve import odeint
        >>> y = odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), method="rev_rk4", options={"step_size": 0.1})
        >>> y[-1]
        tensor([0.3679])
    """
    known = EVENT_OPTIONS if event_fn is not None else ("dense",)
    solve_options = scheme_and_options(method, options, known)
    equation = _Equation(func, y0, args, *solve_options, (rtol, atol), gradient, restarts, progress, callback)
    if event_fn is not None:
        return equation.until_event(t, event_fn, full_output)
    if isinstance(t, Tensor) and t.ndim == 2:
        return equation.at_times_of_each(t, full_output)
    packing, x0, times = equation.packing, equation.x0, check_times(t)
    dense = bool(equation.options.pop("dense", False)) and len(times) > 1
    if dense and equation.options.get("jump_t"):
        raise ValueError(
            "dense output is smooth, so it cannot cross jump_t: solve from jump to jump, or leave out 'dense'."
        )
    targets, shift = ([times[0], times[-1]], time_shift(t)) if dense else (times, None)
    term = FieldTerm(equation.field, packing, shift)
    with torch.no_grad():
        construct = lambda constructor: constructor(equation.field, y0, t)  # noqa: E731
        make_stepper = choose_steps(targets, equation.scheme, equation.options, (rtol, atol), term, x0, construct)
    moving = t if isinstance(t, Tensor) and t.requires_grad and not dense else None
    problem = equation.problem(term, times, every_step(make_stepper) if dense else make_stepper, moving)
    states = solve(problem, x0, moving) if len(times) > 1 else x0[None]
    interpolant = Dense(problem, packing, states, shift) if dense else None
    ys = packing.unpack(states) if interpolant is None else interpolant.evaluate(t)
    if not full_output:
        return ys
    steps = times if problem.grid is None else problem.grid.times
    again = None
    if len(steps) > 1 and not equation.options.get("jump_t"):
        over = {"grid_constructor": lambda *_: steps, "dense": True}
        ends = t[[0, -1]] if isinstance(t, Tensor) else [t[0], t[-1]]
        way = {"method": equation.scheme, "gradient": gradient, "restarts": restarts}
        again = functools.partial(odeint, func, y0, ends, args=args, options=over, full_output=True, **way)
    return Solution(torch.as_tensor(t), ys, problem.stats, steps, interpolant, again)


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Callable[..., Any],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve from t0 until `event_fn(t, y)` crosses zero; called like the function of this name in torchdiffeq.

    Event times as differentiable functions follow Chen, Amos & Nickel (2021, arXiv 2011.03902), here with the derivative of the
    discrete solve.

    Args:
        func, y0: as in `odeint`.
        t0: the initial time, a tensor with one number.
        event_fn: a tensor function of time and state; see `odeint`.
        reverse_time: go towards smaller times.
        odeint_interface: what solves, called as `odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)`.
        **kwargs: further keywords of `odeint_interface`.

    Returns:
        The time of the event and the states at t0 and then, both with exact gradients.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
        RuntimeError: if no event was found, with the time reached and the last value of event_fn.

    Example:
        >>> import torch
        >>> from revsolve import odeint_event
        >>> event_t, _ = odeint_event(
        ...     lambda t, y: -y, torch.ones(1), torch.tensor(0.0), event_fn=lambda t, y: y - 0.5, rtol=1e-6, atol=1e-6
        ... )
        >>> event_t
        tensor(0.6931)
    """
    start = torch.as_tensor(t0).reshape(1)
    if not start.is_floating_point():
        raise TypeError(f"t0 must be a floating point tensor, but it has dtype {start.dtype}: cast it with .float().")
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


@dataclass
class _Equation:
    """All of a solve but its times."""

    func: Callable[..., Any]
    y0: Any
    args: Any
    scheme: Scheme
    options: dict[str, Any]
    tolerances: Tolerances
    gradient: str | None
    restarts: Any
    progress: bool
    callback: Callable[[AcceptedStep], Any] | None

    def __post_init__(self) -> None:
        if not callable(self.func):
            raise TypeError(f"func must be callable as func(t, y), but it is {self.func!r}.")
        self.arguments = self.args if isinstance(self.args, tuple) else (self.args,)
        self.field = functools.partial(_with_arguments, self.func, self.arguments) if self.arguments else self.func
        self.packing = Packing(self.y0)
        self.x0 = self.packing.pack(self.y0)

    def problem(
        self,
        term: Term,
        times: list[float],
        make: Callable[[], Stepper],
        moving: Tensor | None = None,
        open_ended: bool = False,
    ) -> Problem:
        span = (times[0], times[1] if len(times) > 1 else times[0] + 1.0)
        length = None if open_ended else abs(times[-1] - times[0])
        name = f"odeint {self.scheme.name}"
        make = watched(make, self.progress, self.callback, name, length, self.packing.unpack)
        owners = (self.func, self.arguments)
        problem = prepare(term, self.x0, moving, span, owners, self.scheme, make, self.gradient, self.restarts)
        problem.explain = explain(term.value)
        return problem

    def until_event(self, t: Tensor, event_fn: Callable[..., Any], full_output: bool) -> tuple[Tensor, Any]:
        """The time of the event, and what `odeint` returns for the times t[0] and then."""
        if values_hidden():
            raise RuntimeError(
                "an event is found by looking at numbers, which torch.func transforms and torch.compile hide: differentiate with "
                "torch.autograd (gradient='direct' for higher derivatives), and solve outside of what is compiled."
            )
        times, shift = check_times(t), time_shift(t)
        if shift is not None and self.options.get("jump_t"):
            raise ValueError(
                "with event_fn, the gradient of t[0] moves all steps, which jump_t forbids: detach t, or leave out jump_t."
            )
        term = FieldTerm(self.field, self.packing, shift)
        event = Event(
            lambda s, x: event_fn(term.time(s), self.packing.unpack(x)), self.options.pop("event_direction", 0)
        )
        with torch.no_grad():
            make = steps_until(event, times, self.scheme, self.options, self.tolerances, term, self.x0)
        problem = self.problem(term, times, make, open_ended=True)
        found, states = solve_until(event, problem, self.x0)
        t = torch.as_tensor(t)
        event_t = found.to(t) if shift is None else found.to(t) + shift
        ys = self.packing.unpack(states)
        if not full_output:
            return event_t, ys
        assert problem.grid is not None
        steps = [*problem.grid.times, float(found.detach())]
        return event_t, Solution(torch.stack([t[0], event_t]), ys, problem.stats, steps)

    def at_times_of_each(self, t: Tensor, full_output: bool) -> Any:
        """The states where each sample has observation times of its own."""
        times = check_times_of_each(t, self.y0)
        term = TimesOfEach(FieldTerm(self.field, self.packing), t)
        with torch.no_grad():
            make = steps_for_each(t, self.scheme, self.options, self.tolerances, term, self.x0)
        problem = self.problem(term, times, make)
        ys = solve(problem, self.x0, None) if len(times) > 1 else self.x0[None]
        if not full_output:
            return ys
        return Solution(t, ys, problem.stats, times if problem.grid is None else problem.grid.times)


def _with_arguments(func: Callable[..., Any], arguments: tuple[Any, ...], t: Tensor, y: Any) -> Any:
    return func(t, y, *arguments)
