"""From a method, its options and tolerances to a scheme and the steps it takes: shared by the solvers that step through time."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.prepare.grid import (
    ADAPTIVE_OPTIONS,
    FIXED_OPTIONS,
    adaptive_grid,
    explain_field,
    fixed_grid,
    given_grid,
    knot_grid,
)
from revsolve.prepare.times import check_times
from revsolve.schemes.names import scheme as named_scheme
from revsolve.schemes.tableau import TABLEAUS, Tableau

SCHEME_OPTIONS = ("coupling", "eta")
TIMES = {"step_t", "jump_t"}
EXPLAINED = {  # names that options have elsewhere
    "restart": "pass the keyword restarts=, a number of steps say",
    "perturb": "leave it out, jump_t alone says where a step sees one side of the field",
    "dtype": "leave it out, times are kept in double precision, and the field sees them in the dtype of y0",
    "grad_free": "leave it out, no method takes derivatives of g by itself",
    "interp": "leave it out, fixed steps land on the output times; dense=True interpolates between any steps",
    "solver": "choose by method=; there are no solvers of scipy",
    "max_order": "leave it out, there are no Adams methods",
    "max_iters": "leave it out, there are no implicit methods",
}
Tolerances = tuple[float | Tensor | None, float | Tensor | None]  # rtol, atol


def scheme_and_options(
    method: str | Tableau | Scheme, options: Mapping[str, Any] | None, extra: Sequence[str] = ()
) -> tuple[Scheme, dict[str, Any]]:
    """The scheme, with the options that are its own, and those that are left; `extra` ones are known besides the usual."""
    rest = dict(options or {})
    scheme = named_scheme(method, **{name: rest.pop(name) for name in SCHEME_OPTIONS if name in rest})
    known = FIXED_OPTIONS if scheme.error_order is None else (*FIXED_OPTIONS, *ADAPTIVE_OPTIONS)
    chosen = check_options(rest, (*known, *SCHEME_OPTIONS, *extra), scheme.name)
    for name in TIMES.intersection(chosen):
        chosen[name] = [float(s) for s in chosen[name]]
    return scheme, chosen


def adapts(scheme: Scheme, options: Mapping[str, Any], tolerances: Tolerances) -> bool:
    """Whether steps follow the error: methods with an embedded estimate do unless the options fix the steps, the natively
    reversible ones only when a tolerance is given."""
    fixed = [name for name in FIXED_OPTIONS if options.get(name) is not None]
    if len(fixed) > 1:
        raise ValueError("step_size and grid_constructor exclude each other: give one of them.")
    embedded = scheme.name.removeprefix("rev_") in TABLEAUS or not scheme.reversible
    return scheme.error_order is not None and not fixed and (embedded or given(tolerances))


def given(tolerances: Tolerances) -> bool:
    """Whether the user asked for any."""
    return any(tolerance is not None for tolerance in tolerances)


def choose_steps(
    times: list[float],
    scheme: Scheme,
    options: Mapping[str, Any],
    tolerances: Tolerances,
    term: Term,
    x0: Tensor,
    construct: Callable[[Callable[..., Any]], Any],
    knots: Sequence[float] = (),
) -> Callable[[], Stepper]:
    """Adaptive steps, or the fixed ones that the options ask for; without a word from them, from knot to knot.

    `construct` calls the user's grid_constructor with the arguments that it expects.
    """
    if adapts(scheme, options, tolerances):
        return adaptive_grid(times, options, *tolerances, scheme, term, x0)
    useless = [name for name in options if name not in FIXED_OPTIONS]
    if useless:
        raise ValueError(f"option {useless[0]!r} is for adaptive steps, but these are fixed ({scheme.name!r}).")
    if given(tolerances):
        warnings.warn(f"rtol and atol have no effect: the steps of {scheme.name!r} are fixed here.", stacklevel=3)
    if options.get("grid_constructor") is not None:
        return given_grid(times, check_times(construct(options["grid_constructor"]), "grid_constructor(...)"))
    if knots and options.get("step_size") is None:
        return knot_grid(times, knots, 8 * torch.finfo(x0.real.dtype).eps * max(map(abs, times)))
    return fixed_grid(times, options.get("step_size"), scheme.name)


def explain(rate: Callable[[float, Tensor], Tensor]) -> Callable[[float, Tensor], str]:
    """Why the state stopped being finite, in words, given the rate of change at one time and state."""

    def explained(t: float, x: Tensor) -> str:
        with torch.no_grad():
            value = rate(t, x)
        if not bool(torch.isfinite(value).all()):
            return explain_field(t, x, value)
        size = float(torch.linalg.vector_norm(x, ord=math.inf))
        return (
            f"the state stopped being finite in the step from t = {t}, where its largest entry is {size:.3g}: the step is too "
            "long for the method (take smaller ones), or the solution itself grows without bound."
        )

    return explained


def check_options(options: Mapping[str, Any] | None, known: Sequence[str], method: str) -> dict[str, Any]:
    """The options that are not None, numbers as those of Python. Raises ValueError for one that the method does not have."""
    given = {}
    for name, value in (options or {}).items():
        if value is None:
            continue
        if name in EXPLAINED:
            raise ValueError(f"option {name!r} does not exist here: {EXPLAINED[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown option {name!r} for method {method!r}{hint} Options: {', '.join(known)}.")
        given[name] = _number(value)
    return given


def _number(value: Any) -> Any:
    """A number of another kind, a tensor without dimensions or one of numpy's, as that of Python; anything else as it is."""
    of_another_kind = isinstance(value, (Tensor, np.generic)) and value.ndim == 0
    return value.item() if of_another_kind else value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but it is {value!r}.")
