"""Neural ODEs: `odeint`, whose term is h f(t, x)."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from revsolve.core.coupling import Scheme, Time
from revsolve.core.engine import solve
from revsolve.core.stepper import Stepper
from revsolve.grids import ADAPTIVE_OPTIONS, FIXED_OPTIONS, adaptive_grid, explain_field, fixed_grid, given_grid
from revsolve.packing import Clock, Packing
from revsolve.problem import check_options, check_times, prepare
from revsolve.schemes.names import scheme as named_scheme
from revsolve.schemes.tableau import TABLEAUS, Tableau
from revsolve.solution import Solution

SCHEME_OPTIONS = ("coupling", "eta")


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
    scheme, options = _scheme_and_options(method, options)
    arguments = args if isinstance(args, tuple) else (args,)
    field = functools.partial(_with_arguments, func, arguments) if arguments else func
    term = FieldTerm(field, packing)
    x0 = packing.pack(y0)
    with torch.no_grad():
        make_stepper = _stepper(times, t, term, x0, scheme, options, rtol, atol, field, y0)
    span = (times[0], times[1] if len(times) > 1 else times[0] + 1.0)
    moving = t if isinstance(t, Tensor) and t.requires_grad else None
    problem = prepare(term, x0, moving, span, (func, arguments), scheme, make_stepper, gradient, restarts)
    problem.explain = _explain(term)
    ys = packing.unpack(solve(problem, x0, moving) if len(times) > 1 else x0[None])
    if not full_output:
        return ys
    assert problem.grid is not None
    return Solution(torch.as_tensor(t), ys, problem.stats, problem.grid.times)


def _with_arguments(func: Callable[..., Any], arguments: tuple[Any, ...], t: Tensor, y: Any) -> Any:
    return func(t, y, *arguments)


def _scheme_and_options(
    method: str | Tableau | Scheme, options: Mapping[str, Any] | None
) -> tuple[Scheme, dict[str, Any]]:
    given = dict(options or {})
    scheme = named_scheme(method, **{name: given.pop(name) for name in SCHEME_OPTIONS if name in given})
    known = FIXED_OPTIONS if scheme.error_order is None else (*FIXED_OPTIONS, *ADAPTIVE_OPTIONS)
    return scheme, check_options(given, (*known, *SCHEME_OPTIONS), scheme.name)


def _stepper(
    times: list[float],
    t: Tensor,
    term: FieldTerm,
    x0: Tensor,
    scheme: Scheme,
    options: dict[str, Any],
    rtol: float | Tensor | None,
    atol: float | Tensor | None,
    field: Callable[..., Any],
    y0: Any,
) -> Callable[[], Stepper]:
    """A fixed grid where the options ask for one or the method has no error estimate, else adaptive steps."""
    tolerances = rtol is not None or atol is not None
    fixed = [name for name in FIXED_OPTIONS if options.get(name) is not None]
    if len(fixed) > 1:
        raise ValueError("step_size and grid_constructor exclude each other: give one of them.")
    embedded = scheme.name.removeprefix("rev_") in TABLEAUS or not scheme.reversible
    adaptive = scheme.error_order is not None and not fixed and (embedded or tolerances)
    if adaptive:
        return adaptive_grid(times, options, rtol, atol, scheme, term, x0)
    useless = [name for name in options if name not in FIXED_OPTIONS]
    if useless:
        raise ValueError(f"option {useless[0]!r} is for adaptive steps, but these are fixed ({scheme.name!r}).")
    if tolerances:
        warnings.warn(f"rtol and atol have no effect: the steps of {scheme.name!r} are fixed here.", stacklevel=3)
    if options.get("grid_constructor") is not None:
        return given_grid(times, check_times(options["grid_constructor"](field, y0, t), "grid_constructor(...)"))
    return fixed_grid(times, options.get("step_size"), scheme.name)


def _explain(term: FieldTerm) -> Callable[[float, Tensor], str]:
    def explain(t: float, x: Tensor) -> str:
        with torch.no_grad():
            value = term.value(t, x)
        if not bool(torch.isfinite(value).all()):
            return explain_field(t, x, value)
        size = float(torch.linalg.vector_norm(x, ord=math.inf))
        return (
            f"the state stopped being finite in the step from t = {t}, where its largest entry is {size:.3g}: the step is too "
            "long for the method (take smaller ones), or the solution itself grows without bound."
        )

    return explain
