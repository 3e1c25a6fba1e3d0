"""Checks of what `cdeint` is given, before any work."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from revsolve.core.caller import warn
from revsolve.paths.control import Control
from revsolve.paths.piecewise import check_inside
from revsolve.prepare.options import SolverOptions, check_choice
from revsolve.prepare.state import Packing
from revsolve.schemes.increment import OneEvaluation

FORMS = ("derivative", "increment")
MANY = 20  # knots, of which a solve should cover more than a tenth
RTOL, ATOL = 1e-4, 1e-6  # as torchcde has them


def check_path(control: Control, packing: Packing, times: list[float], t: Tensor) -> None:
    """Raise unless the path covers the times and its values fit the state: same batch, dtype and device."""
    knots = control.knots
    for i, (before, after) in enumerate(pairwise(knots)):
        if not before < after:
            raise ValueError(
                f"the knots of X must be strictly increasing, but knot {i + 1} at {after} follows knot {i} at {before}: "
                "sort its data by time."
            )
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


def choose_gradient(adjoint: bool, gradient: str | None) -> str | None:
    """The gradient mode, which adjoint=False sets."""
    if adjoint or gradient == "direct":
        return gradient
    if gradient is not None:
        raise ValueError(f"adjoint=False means gradient='direct', but gradient={gradient!r}: leave one of them out.")
    return "direct"
