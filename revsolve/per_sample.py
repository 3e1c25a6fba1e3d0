"""Observation times of each sample's own: every sample goes through its own time, all of them in the same steps.

With times t[i, b] of sample b, the step variable s runs from i to i + 1 while the time of each sample runs from t[i, b] to
t[i + 1, b] at a constant rate,

    dy_b/ds = (t[i + 1, b] - t[i, b]) f(t_b(s), y_b),

so that the times enter the field like any other argument, and their gradients are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Scheme
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.grids import given_grid
from revsolve.schemes.increment import RungeKutta
from revsolve.steps import Tolerances, adapts, choose_steps

REFUSED = ("grid_constructor", "first_step", "min_step", "max_step", "step_t", "jump_t", "dense")


def check_times_of_each(t: Tensor, y0: Any) -> list[float]:
    """The values 0, 1, 2, ... of the step variable at the outputs. Raises unless y0 is a batch and the times go one way."""
    if not isinstance(y0, Tensor) or y0.ndim == 0 or y0.shape[0] != t.shape[1]:
        shape = tuple(y0.shape) if isinstance(y0, Tensor) else type(y0).__name__
        raise ValueError(
            f"t of shape {tuple(t.shape)} gives times of each sample, so y0 must be a tensor with {t.shape[1]} samples as its "
            f"first dimension, but it is {shape}."
        )
    if not t.is_floating_point() or not t.numel():
        raise ValueError(f"t must hold floating point numbers, but it has shape {tuple(t.shape)} and dtype {t.dtype}.")
    steps = t.detach().diff(dim=0)
    bad = ~t.detach().isfinite().all(0) | ((steps > 0).any(0) & (steps < 0).any(0))
    if bool(bad.any()):
        b = int(bad.nonzero()[0])
        raise ValueError(
            f"the times of each sample must be finite and go one way (repeated ones hold its state), but t[:, {b}] = "
            f"{t[:, b].tolist()}."
        )
    return [float(i) for i in range(len(t))]


class TimesOfEach:
    """The term of an ODE whose samples have their own times; the field receives them as a vector, one for each sample."""

    def __init__(self, term: Any, t: Tensor) -> None:
        self.term, self.t = term, t.to(term.packing.device)

    def value(self, s: Time, x: Tensor) -> Tensor:
        s = float(s)
        i = min(max(math.floor(s), 0), len(self.t) - 2)
        t0, t1 = self.t[i].double(), self.t[i + 1].double()
        return self.term.value(torch.lerp(t0, t1, s - i), x)

    def product(self, value: Tensor, s0: Time, s1: Time) -> tuple[Tensor, Time]:
        i = min(max(math.floor(0.5 * (s0 + s1)), 0), len(self.t) - 2)  # a span lies between two outputs
        rate = (self.t[i + 1].double() - self.t[i].double()).to(value.device, value.real.dtype)
        return value * rate.view(-1, *[1] * (value.ndim - 1)), s1 - s0


def steps_for_each(
    t: Tensor, scheme: Scheme, options: Mapping[str, Any], tolerances: Tolerances, term: Term, x0: Tensor
) -> Callable[[], Stepper]:
    """Steps shared by all samples: adaptive, or so many that no sample takes one longer than `step_size`."""
    for name in REFUSED:
        if options.get(name) is not None:
            raise ValueError(
                f"option {name!r} has no meaning where each sample has times of its own: use step_size or rtol."
            )
    if scheme.staggered or any(not 0.0 <= place <= 1.0 for update in scheme.updates for place in _places(update)):
        fault = (
            "carries a velocity from step to step" if scheme.staggered else "evaluates the field outside of its steps"
        )
        raise ValueError(
            f"{scheme.name!r} {fault}, but with times of each sample's own the speed of time changes at every output: use "
            "another method, 'rev_rk4' say."
        )
    times = [float(i) for i in range(len(t))]
    step_size = options.get("step_size")
    if step_size is None or adapts(scheme, options, tolerances):
        return choose_steps(times, scheme, options, tolerances, term, x0, lambda constructor: constructor)
    if not (isinstance(step_size, (int, float)) and math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a positive number, but it is {step_size!r}; its sign follows from t.")
    longest = t.detach().double().diff(dim=0).abs().amax(1).tolist()
    points = [0.0]
    for i, span in enumerate(longest):
        n = max(1, math.ceil(span / step_size * (1 - 1e-9)))
        points += [i + j / n for j in range(1, n)] + [i + 1.0]
    return given_grid(times, points)


def _places(update: Any) -> list[float]:
    """Where in the step an update evaluates the field, as fractions of it."""
    start, span = update.start, update.end - update.start
    inner = (
        update.increment.tableau.c
        if isinstance(update.increment, RungeKutta)
        else (getattr(update.increment, "at", 0.0),)
    )
    return [start + c * span for c in inner] + [update.start, update.end]
