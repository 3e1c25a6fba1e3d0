"""Checks of what `cdeint` is given, before any work."""

from __future__ import annotations

from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.drivers.control import Control
from revsolve.drivers.piecewise import check_inside
from revsolve.packing import Packing
from revsolve.problem import check_choice
from revsolve.schemes.increment import OneEvaluation

FORMS = ("derivative", "increment")


def check_path(control: Control, packing: Packing, times: list[float], t: Tensor) -> None:
    """Raise unless the path covers the times and its values fit the state: same batch, dtype and device."""
    knots = control.grid_points.detach()
    if not bool((knots.diff() > 0).all()):
        i = int((knots.diff() > 0).int().argmin())
        raise ValueError(
            f"the knots of X must be strictly increasing, but knot {i + 1} at {knots[i + 1]} follows knot {i} at {knots[i]}: "
            "sort its data by time."
        )
    first, last = control.interval.tolist()
    check_inside(min(times), max(times), (first, last), t, control.interval)
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


def choose_form(form: str | None, scheme: Scheme, adaptive: bool) -> str:
    """Increments for methods of order 2 that evaluate once, for more than the ends of a step they cannot resolve anyway."""
    if form is None:
        once = all(isinstance(update.increment, OneEvaluation | None) for update in scheme.updates)
        return "increment" if once and scheme.order <= 2 and not adaptive else "derivative"
    check_choice("option form", form, FORMS)
    if form == "increment" and adaptive:
        raise ValueError(
            "form='increment' takes fixed steps, for the error that steps would follow does not see what the path does within "
            f"them: leave rtol and atol out and fix the steps of {scheme.name!r} (step_size), or use form='derivative'."
        )
    return form


def refuse_kinks(control: Control, times: list[float]) -> None:
    """Raise where a gradient with respect to output times is wanted but does not exist."""
    kinks = {*control.jump_times.tolist()} & {*times[1:-1]}
    if kinks:
        t = min(kinks)
        raise ValueError(
            f"t[{times.index(t)}] = {t} lies where dX/dt jumps, so that the solution has no derivative with respect to it: shift "
            "it, pass t.detach(), or step by options={'form': 'increment'}."
        )
