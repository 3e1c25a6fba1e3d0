"""Observation times of each sample's own: every sample goes through its own time, all of them in the same steps.

With times t[i, b] of sample b, the step variable s runs from i to i + 1 while the time of each sample runs from t[i, b] to
t[i + 1, b] at a constant rate,

    dy_b/ds = (t[i + 1, b] - t[i, b]) f(t_b(s), y_b),

so that the times enter the field like any other argument, and their gradients are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Scheme
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.field.functorch import numbers
from revsolve.prepare.grid import given_grid
from revsolve.prepare.options import Tolerances, adapts, choose_steps
from revsolve.schemes.increment import RungeKutta

REFUSED = ("grid_constructor", "first_step", "min_step", "max_step", "step_t", "jump_t", "dense")


def check_times_of_each(t: Tensor, y0: Any, names: tuple[str, str] = ("t", "y0")) -> list[float]:
    """The values 0, 1, 2, ... of the step variable at the outputs. Raises unless y0 is a batch and the times go one way."""
    name, state = names
    if not isinstance(y0, Tensor) or y0.ndim == 0 or y0.shape[0] != t.shape[1]:
        shape = tuple(y0.shape) if isinstance(y0, Tensor) else type(y0).__name__
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} gives times of each sample, so {state} must be a tensor with {t.shape[1]} samples "
            f"as its first dimension, but it is {shape}."
        )
    if not t.is_floating_point() or not t.numel():
        raise ValueError(
            f"{name} must hold floating point numbers, but it has shape {tuple(t.shape)} and dtype {t.dtype}."
        )
    steps = t.detach().diff(dim=0)
    bad = ~t.detach().isfinite().all(0) | ((steps > 0).any(0) & (steps < 0).any(0))
    if bool(bad.any()):
        b = int(bad.nonzero()[0])
        raise ValueError(
            f"the times of each sample must be finite and go one way (repeated ones hold its state), but {name}[:, {b}] = "
            f"{t[:, b].tolist()}."
        )
    return [float(i) for i in range(len(t))]


class ClockOfEach:
    """The time of each sample, a vector for the field, and how much of it passes, shaped to multiply values like `x0`.

    t: (T, batch), any device; x0: (batch, ...). Steps are counted from output to output; or, where a `pace` is given, one by one:
    step n then leads every sample from one fraction of the way between the outputs i and i + 1 to another, (i, start, end).
    """

    shift, adds_up = None, False

    def __init__(self, t: Tensor, x0: Tensor) -> None:
        self.t, self.dtype = t.to(x0.device), x0.real.dtype
        self.shape = (-1, *(1,) * (x0.ndim - 1))
        self.pace: list[tuple[int, Tensor, Tensor]] | None = None

    def __call__(self, s: Time) -> Tensor:
        return self.exact(s).to(self.dtype)

    def exact(self, s: Time) -> Tensor:
        """The times in float64, (batch,)."""
        i, part = self._whole_steps(s := float(s))
        if self.pace is None:
            return torch.lerp(self.t[i].double(), self.t[i + 1].double(), part)
        i, start, end = self.pace[i]
        return torch.lerp(self.t[i].double(), self.t[i + 1].double(), torch.lerp(start, end, part))

    def _whole_steps(self, s: float) -> tuple[int, float]:
        last = len(self.t) - 2 if self.pace is None else len(self.pace) - 1
        n = min(max(math.floor(s), 0), last)
        return n, s - n

    def foresee(self, times: Iterable[float]) -> None:
        """Nothing is made beforehand."""

    @property
    def fastest(self) -> float:
        """The largest rate of any sample's time."""
        return float(self.t.detach().diff(dim=0).abs().max()) or 1.0 if len(self.t) > 1 else 1.0

    def control(self, s: Time, s0: Time, s1: Time) -> Tensor:
        """How much time passes."""
        return self.rate(s0, s1) * (s1 - s0)

    def rate(self, s0: Time, s1: Time) -> Tensor:
        """The speed of time between s0 and s1, which lie between two outputs."""
        i, _ = self._whole_steps(float(0.5 * (s0 + s1)))
        if self.pace is None:
            speed = self.t[i + 1].double() - self.t[i].double()
        else:
            i, start, end = self.pace[i]
            speed = (self.t[i + 1].double() - self.t[i].double()) * (end - start)
        return speed.to(self.dtype).view(self.shape)


def steps_for_each(
    t: Tensor,
    scheme: Scheme,
    options: Mapping[str, Any],
    tolerances: Tolerances,
    term: Term,
    x0: Tensor,
    kinks: Sequence[float] = (),
) -> Callable[[], Stepper]:
    """Steps shared by all samples: adaptive ones, which land on the `kinks`, or so many that no sample takes one longer than
    `step_size`."""
    refuse_options(options)
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
        chosen = {**options, "jump_t": kinks} if kinks else options
        return choose_steps(times, scheme, chosen, tolerances, term, x0, lambda constructor: constructor)
    if not (isinstance(step_size, (int, float)) and math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a positive number, but it is {step_size!r}; its sign follows from t.")
    return given_grid(times, points_for_each(t, step_size))


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raise where an option speaks of one time for all samples."""
    for name in REFUSED:
        if options.get(name) is not None:
            raise ValueError(
                f"option {name!r} has no meaning where each sample has times of its own: use step_size or rtol."
            )


def points_for_each(t: Tensor, step_size: float) -> list[float]:
    """Where steps begin and end, so many that no sample takes one longer than `step_size`."""
    points = [0.0]
    for i, span in enumerate(numbers(t.detach().double().diff(dim=0).abs().amax(1))):
        n = max(1, math.ceil(span / step_size * (1 - 1e-9)))
        points += [i + j / n for j in range(1, n)] + [i + 1.0]
    return points


def _places(update: Any) -> list[float]:
    """Where in the step an update evaluates the field, as fractions of it."""
    start, span = update.start, update.end - update.start
    inner = (
        update.increment.tableau.c
        if isinstance(update.increment, RungeKutta)
        else (getattr(update.increment, "at", 0.0),)
    )
    return [start + c * span for c in inner] + [update.start, update.end]
