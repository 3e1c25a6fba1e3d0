"""What `fixed_point` is given, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from revsolve.fixed_point.convergence import RESIDUALS, STOPS, Criterion
from revsolve.prepare.options import check_choice
from revsolve.prepare.state import Packing


def checked(
    f: Any,
    z0: Any,
    tol: float,
    max_steps: int | Callable[[], int],
    min_steps: int,
    residual: str,
    stop: str,
    on_failure: str,
) -> tuple[Packing, Criterion]:
    """The state as it is packed, and when to stop."""
    if not callable(f):
        raise TypeError(f"f must be callable as f(z), but it is {f!r}.")
    check_choice("residual", residual, RESIDUALS)
    check_choice("stop", stop, STOPS)
    check_choice("on_failure", on_failure, ("warn", "raise", "ignore"))
    steps = max_steps() if callable(max_steps) else max_steps
    check_whole("max_steps", steps)
    check_whole("min_steps", min_steps)
    if min_steps > steps:
        raise ValueError(f"min_steps = {min_steps} is more than max_steps = {steps}.")
    if not (tol >= 0.0 and math.isfinite(tol)):
        raise ValueError(f"tol must be 0 or positive, but it is {tol!r}: 0 makes exactly max_steps steps.")
    packing = Packing(z0, "z0")
    if stop != "batch" and len({shape[:1] for shape in packing.shapes} | {torch.Size()}) != 2:
        raise ValueError(
            f"stop={stop!r} needs one leading dimension common to all of z0, but the shapes are {[*map(tuple, packing.shapes)]}."
        )
    return packing, Criterion(float(tol), steps, min_steps, residual, stop)


def check_whole(name: str, number: Any) -> None:
    """Raise unless the number is a whole one of at least 1."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, but it is {number!r}.")


def refuse(method: str, owners: tuple[str, ...], **given: Any) -> None:
    """Raise for what was given although it is for other methods, the `owners`."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for {' and '.join(owners)}, and has no meaning for method={method!r}."
            )
