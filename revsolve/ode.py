"""Neural ODEs: `odeint`, whose term is h f(t, x)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from revsolve.core.coupling import Scheme, Time
from revsolve.core.engine import solve
from revsolve.packing import Clock, Packing
from revsolve.problem import check_times, prepare
from revsolve.schemes.tableau import Tableau
from revsolve.solution import Solution
from revsolve.steps import choose_steps, explain, scheme_and_options


class FieldTerm:
    """The term of an ODE: field value times h."""

    def __init__(self, func: Callable[..., Any], packing: Packing) -> None:
        self.func, self.packing = func, packing
        self.clock = Clock(packing.real_dtype, packing.device)
        self.checked = False

    def value(self, t: Time, x: Tensor) -> Tensor:
        out = self.func(self.clock(t), self.packing.unpack(x))
        if not self.checked or (self.packing.lone and (out.shape != x.shape or out.dtype != x.dtype)):
            self.packing.check_like(out, "the field")
            self.checked = True
        out = self.packing.pack(out)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def product(self, value: Tensor, t0: Time, t1: Time) -> tuple[Tensor, Time]:
        return value, t1 - t0


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
) -> Any:
    """Solve `dy/dt = func(t, y, *args)` from `y(t[0]) = y0`, with exact gradients of the discrete solve.

    Reversible pairs follow McCallum & Foster (2024, arXiv 2410.11648).

    Args:
        func: the field, any callable `func(t, y, *args)`; t is a 0-d tensor, the value is shaped like y.
        y0: a tensor of any shape, real or complex, or a pytree of tensors.
        t: times at which the state is wanted, shape (T,), strictly monotone either way; in the unit of the field.
        args: a tuple of further arguments for func; anything else is passed on as a single one.
        rtol, atol: relative and absolute tolerance of adaptive steps; by default 1e-7 and 1e-9 in float64.
        method: a name (`revsolve.method_names()`), a `Tableau` (its plain method) or a `Scheme`.
        options: `step_size` or `grid_constructor` for fixed steps; `first_step`, `safety`, `ifactor`, `dfactor`, `min_step`,
            `max_step`, `max_num_steps`, `step_t`, `jump_t`, `norm` for adaptive ones; `coupling` (`rev_` methods), `eta` (alf).
            Methods with an embedded error estimate adapt unless the steps are fixed here; the natively reversible ones
            adapt when rtol or atol is given.
        gradient: "reversible" (undo the steps), "checkpoint" (about 2 sqrt(N) states) or "direct" (keep everything);
            by default the first that the method allows.
        restarts: "auto", a fixed number of steps, a `Restarts`, or None to switch them off (reversible methods only).
        full_output: return a `Solution` with statistics instead of the states alone.

    Returns:
        The states at the times t: like y0, with a leading dimension T.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
        RuntimeError: if the field returns NaN, the step size underflows or there are too many steps, with the time reached.

    Example:
        >>> import torch
        >>> from revsolve import odeint
        >>> y = odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), method="rev_rk4", options={"step_size": 0.1})
        >>> y[-1]
        tensor([0.3679])
    """
    if not callable(func):
        raise TypeError(f"func must be callable as func(t, y), but it is {func!r}.")
    packing = Packing(y0)
    times = check_times(t)
    scheme, options = scheme_and_options(method, options)
    arguments = args if isinstance(args, tuple) else (args,)
    field = functools.partial(_with_arguments, func, arguments) if arguments else func
    term = FieldTerm(field, packing)
    x0 = packing.pack(y0)
    with torch.no_grad():
        construct = lambda constructor: constructor(field, y0, t)  # noqa: E731
        make_stepper = choose_steps(times, scheme, options, (rtol, atol), term, x0, construct)
    span = (times[0], times[1] if len(times) > 1 else times[0] + 1.0)
    moving = t if isinstance(t, Tensor) and t.requires_grad else None
    problem = prepare(term, x0, moving, span, (func, arguments), scheme, make_stepper, gradient, restarts)
    problem.explain = explain(term.value)
    ys = packing.unpack(solve(problem, x0, moving) if len(times) > 1 else x0[None])
    if not full_output:
        return ys
    assert problem.grid is not None
    return Solution(torch.as_tensor(t), ys, problem.stats, problem.grid.times)


def _with_arguments(func: Callable[..., Any], arguments: tuple[Any, ...], t: Tensor, y: Any) -> Any:
    return func(t, y, *arguments)
