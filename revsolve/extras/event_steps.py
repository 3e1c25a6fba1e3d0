"""Event functions, and steps that stop where one of them changes sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Pair, Scheme
from revsolve.core.stepper import Grid, Step, Stepper
from revsolve.core.tape import Term
from revsolve.prepare.grid import adaptive_grid, check_limits, knot_grid
from revsolve.prepare.options import Tolerances, adapts

EVENT_OPTIONS = ("event_direction", "max_num_steps")
MAX_NUM_STEPS = 10_000
FAR = 1e300  # where time ends for an equation that knows no end


@dataclass(frozen=True)
class Crossing:
    """Components of the event function that change sign between two times, by the sign that each had before."""

    signs: dict[int, float]
    between: tuple[float, float]


class Event:
    """An event function `func(t, y)` on packed states, the directions in which it counts, and the crossing that was found.

    `direction`: 0 for any, 1 for crossings from negative to positive, -1 for the others, in the order in which the steps go; a
    number, or one for each component. `end`: where time ends, or the path of a controlled equation.
    """

    def __init__(self, func: Callable[[Time, Tensor], Any], direction: Any, end: float) -> None:
        self.func, self.direction, self.end = func, direction, end
        self.crossing: Crossing | None = None

    def value(self, t: Time, x: Tensor) -> Tensor:
        """The components as a vector."""
        value = self.func(t, x)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"event_fn must return a real floating point tensor, one number for each event, but it returned {kind}."
            )
        return value.reshape(-1)

    @torch.no_grad()
    def values(self, t: float, x: Tensor) -> list[float]:
        values = self.value(t, x.detach()).tolist()
        if any(math.isnan(v) for v in values):
            raise RuntimeError(f"event_fn returned NaN at t = {t}: {values}.")
        return values

    def directions(self, num_components: int) -> list[float]:
        given = self.direction if isinstance(self.direction, (list, tuple)) else [self.direction] * num_components
        if len(given) != num_components or any(d not in (-1, 0, 1) for d in given):
            raise ValueError(
                f"event_direction must be -1, 0 or 1, or one of these for each of the {num_components} components of event_fn, "
                f"but it is {self.direction!r}."
            )
        return [float(d) for d in given]

    def crossed(self, before: Sequence[float], after: Sequence[float]) -> dict[int, float]:
        """The components that changed sign the way they should, with their sign before."""
        signs = {}
        for i, (a, b, wanted) in enumerate(zip(before, after, self.directions(len(before)), strict=True)):
            if a and a * wanted <= 0 and (b == 0 or (a < 0) != (b < 0)):
                signs[i] = math.copysign(1.0, a)
        return signs


class NumberedSteps:
    """Steps that end at the times `when(1)`, `when(2)`, ..., until that is None."""

    num_total = None

    def __init__(self, t0: float, when: Callable[[int], float | None]) -> None:
        self.grid, self.when = Grid([t0], [0]), when
        self.num_rejected = 0

    @property
    def num_steps(self) -> int:
        return self.grid.num_steps

    @property
    def done(self) -> bool:
        return self.when(self.num_steps + 1) is None

    def advance(self, step: Step, pair: Pair, restart: bool, limit: int) -> Pair:
        t1 = self.when(self.num_steps + 1)
        assert t1 is not None
        pair, _ = step(pair, (self.grid.times[-1], t1), restart)
        self.grid.times.append(t1)
        return pair

    def rewind(self, num_steps: int) -> None:
        self.num_rejected += self.num_steps - num_steps
        del self.grid.times[num_steps + 1 :]

    def tolerance(self, size: float) -> float:
        return 0.0


class UntilEvent:
    """The steps of another stepper until shortly before or after the event; `event.crossing` then says what to look for."""

    num_total = None

    def __init__(self, stepper: Stepper, event: Event, max_num_steps: int) -> None:
        self.stepper, self.grid, self.tolerance = stepper, stepper.grid, stepper.tolerance
        self.event, self.max_num_steps = event, max_num_steps
        self.done, self.num_rejected = False, 0
        self.latest: tuple[Tensor | None, list[float]] = (None, [])

    @property
    def num_steps(self) -> int:
        return self.grid.num_steps

    def advance(self, step: Step, pair: Pair, restart: bool, limit: int) -> Pair:
        n, t0 = self.num_steps, self.grid.times[-1]
        before = self._values(t0, pair[0])
        if n + self.num_rejected >= self.max_num_steps or self.stepper.done or not math.isfinite(t0):
            remedy = "give the path over a longer time" if self.stepper.done else "raise the option max_num_steps"
            raise RuntimeError(
                f"no event by t = {t0}, where event_fn is {before}, after {n} steps and {self.num_rejected} rejected ones: make "
                f"sure that it changes sign, check the direction of time and event_direction, or {remedy}."
            )
        after = self.stepper.advance(step, pair, restart, n + 1)
        self.num_rejected, t1 = self.stepper.num_rejected, self.grid.times[-1]
        values = self._values(t1, after[0])
        if n == 0:
            before = _without_initial_zeros(before, values, t0, t1, torch.finfo(pair[0].dtype).eps)
        signs = self.event.crossed(before, values)
        if not signs:
            return after
        self.event.crossing = Crossing(signs, (t0, t1))
        self.stepper.rewind(n)
        self.num_rejected = self.stepper.num_rejected
        self.grid.times.append(middle := 0.5 * (t0 + t1))
        self.grid.outputs.append(n + 1)
        self.done = True
        return step(pair, (t0, middle), restart)[0]

    def rewind(self, num_steps: int) -> None:
        while self.grid.outputs[-1] > num_steps:
            self.grid.outputs.pop()
        self.stepper.rewind(num_steps)
        self.num_rejected, self.done = self.stepper.num_rejected, False

    def _values(self, t: float, y: Tensor) -> list[float]:
        if self.latest[0] is not y:
            self.latest = (y, self.event.values(t, y))
        return self.latest[1]


def steps_until(
    event: Event,
    t0: float,
    scheme: Scheme,
    options: dict[str, Any],
    tolerances: Tolerances,
    term: Term,
    x0: Tensor,
    knots: Sequence[float] = (),
) -> Callable[[], Stepper]:
    """Steps from t0 until the event or the end of time; without a word from the options, from knot to knot."""
    event.directions(len(event.values(t0, x0)))
    most = options.setdefault("max_num_steps", MAX_NUM_STEPS)
    check_limits({"max_num_steps": most})
    if adapts(scheme, options, tolerances):
        make = adaptive_grid([t0, event.end], options, *tolerances, scheme, term, x0)
        return lambda: UntilEvent(make(), event, most)
    step_size = options.get("step_size")
    if knots and step_size is None:
        points = knot_grid([t0, event.end], knots, 8 * torch.finfo(x0.real.dtype).eps * abs(event.end))().grid.times
        return lambda: UntilEvent(NumberedSteps(t0, dict(enumerate(points)).get), event, most)
    if not (isinstance(step_size, (int, float)) and math.isfinite(step_size) and step_size > 0):
        raise ValueError(
            f"{scheme.name!r} takes fixed steps towards the event, so step_size must be a positive number, but it is "
            f"{step_size!r}: pass options={{'step_size': ...}}, or rtol and atol where the method can adapt."
        )
    return lambda: UntilEvent(NumberedSteps(t0, equal_steps(t0, step_size, event.end)), event, most)


def equal_steps(t0: float, step_size: float, end: float) -> Callable[[int], float | None]:
    """When the n-th of equal steps from t0 ends; the last one, which may be shorter, at the end."""
    h = math.copysign(step_size, end - t0)

    def when(n: int) -> float | None:
        left = (end - t0) / h - (n - 1)  # in steps, before the n-th
        return None if left <= 1e-9 else end if left <= 1 + 1e-9 else t0 + n * h

    return when


def _without_initial_zeros(before: list[float], after: list[float], t0: float, t1: float, eps: float) -> list[float]:
    """The first values, with those set to zero whose zero lies within rounding of the initial time: an event just handled."""
    nearby = 16 * eps * max(abs(t0), abs(t1 - t0))
    return [0.0 if abs(a) * abs(t1 - t0) <= nearby * abs(b - a) else a for a, b in zip(before, after, strict=True)]
