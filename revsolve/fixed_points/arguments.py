"""What `fixed_point` is given, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from revsolve.core.stepper import FixedGrid, Stepper, UntilConverged
from revsolve.fixed_points.convergence import RESIDUALS, STOPS, Criterion
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


def check_whole(name: str, number: Any) -> Any:
    """The number. Raise unless it is a whole one of at least 1, or None."""
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"{name} must be a whole number of at least 1, but it is {number!r}.")
    return number


def output_steps(save_at: int | Sequence[int] | None, num_steps: int) -> list[int]:
    """The numbers of steps after which the state is an output."""
    if save_at is None or isinstance(save_at, int):
        every = check_whole("save_at", save_at) or num_steps
        return [*range(every, num_steps, every), num_steps]
    steps = list(save_at)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in steps)
    if not (steps and whole and all(a < b for a, b in pairwise([-1, *steps, num_steps + 1])) and steps[-1] > 0):
        raise ValueError(
            f"save_at must be a number, or increasing whole numbers of steps from 0 to {num_steps}, but it is {save_at!r}."
        )
    return steps


def stepper(
    criterion: Criterion,
    observe: Callable[[int, Tensor, Tensor], bool],
    save_at: int | Sequence[int] | None,
    by_step: bool,
) -> Callable[[], Stepper]:
    """Makes what takes the steps of the iteration, `by_step` if its field depends on their number."""
    if criterion.tol == 0.0:
        outputs = output_steps(save_at, criterion.max_steps)
        return lambda: FixedGrid([float(n) for n in range(outputs[-1] + 1)], outputs)
    if save_at is not None and not isinstance(save_at, int):
        raise ValueError(
            f"save_at={save_at!r} needs tol=0, or the iteration may stop earlier: a number k is every k-th step and the last."
        )
    every = check_whole("save_at", save_at)
    return lambda: UntilConverged(criterion.max_steps, observe, every, by_step)


def check_compiled(programs: Any, beta: Any, by_step: bool) -> None:
    """Raise where there are no programs for the iteration."""
    if programs and isinstance(beta, Tensor):
        raise ValueError("compile= needs a beta that is a number: give a float, or leave out compile=.")
    if programs and by_step:
        raise ValueError(
            "compile= is not for an f(z, step=...) nor for noise='step': leave it out, or compile f itself."
        )


def refuse(method: str, owners: tuple[str, ...], **given: Any) -> None:
    """Raise for what was given although it is for other methods, the `owners`."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for {' and '.join(owners)}, and has no meaning for method={method!r}."
            )
