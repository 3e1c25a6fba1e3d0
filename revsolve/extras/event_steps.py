"""Event functions, and steps that stop where one of them changes sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.core.coupling import State
from revsolve.core.stepper import Grid, Step, Stepper
from revsolve.core.tape import Term
from revsolve.field.snapshot import Snapshot
from revsolve.prepare.grid import adaptive_grid, knot_grid
from revsolve.prepare.options import TARGETS
from revsolve.prepare.problem import InitialValueProblem
from revsolve.steppers.adaptive import Adaptive, Recording

EVENT_OPTIONS = ("event_direction", "max_num_steps")
MAX_NUM_STEPS = 10_000
# Without max_num_steps, the search ends as well after so many steps, once it is so many times as far from t[0] as t[1] is.
FEW_STEPS, HORIZON = 1_000, 1_000.0
# Where steps grow without bound it ends where rounding hides t[1] - t[0], and before numbers of float32 end.
FARTHEST, LATEST = 2.0**53, 1e30


@dataclass(frozen=True)
class Crossing:
    """Components of the event function that change sign between two times, by the sign that each had before."""

    signs: dict[int, float]
    between: tuple[float, float]


class Event:
    """An event function `func(t, y)` on packed states, the directions in which it counts, and the crossing that was found.

    `direction`: 0 for any, 1 for crossings from negative to positive, -1 for the others, in the order in which the steps go; a
    number, or one for each component. `end`: where time ends, or the path of a controlled equation. `rounding`: that of the
    initial time. `jumps`: the times at which the field jumps.
    """

    def __init__(
        self,
        func: Callable[[Time, Tensor], Any],
        direction: Any,
        end: float,
        rounding: float,
        jumps: Collection[float] = (),
    ) -> None:
        self.func, self.direction, self.end, self.rounding, self.jumps = func, direction, end, rounding, jumps
        self.crossing: Crossing | None = None
        self.snapshot = Snapshot()  # of the event function

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
            raise RuntimeError(f"event_fn returned NaN at t = {t}: {values!s:.80}.")
        return values

    def directions(self, num_components: int) -> list[float]:
        given = self.direction if isinstance(self.direction, (list, tuple)) else [self.direction] * num_components
        if len(given) != num_components or any(d not in (-1, 0, 1) for d in given):
            raise ValueError(
                f"event_direction must be -1, 0 or 1, or one of these for each of the {num_components} components of event_fn, "
                f"but it is {self.direction!r:.80}."
            )
        return [float(d) for d in given]

    def crossed(self, before: Sequence[float], after: Sequence[float]) -> dict[int, float]:
        """The components that changed sign the way they should, with their sign before."""
        signs = {}
        for i, (a, b, wanted) in enumerate(zip(before, after, self.directions(len(before)), strict=True)):
            if a and math.copysign(1.0, a) * wanted <= 0 and (b == 0 or (a < 0) != (b < 0)):
                signs[i] = math.copysign(1.0, a)
        return signs


class NumberedSteps(Recording):
    """Steps that end at the times `when(1)`, `when(2)`, ..., until that is None."""

    def __init__(self, t0: float, when: Callable[[int], float | None]) -> None:
        self.grid, self.when = Grid([t0], [0]), when

    @property
    def done(self) -> bool:
        return self.when(self.num_steps + 1) is None

    def advance(self, step: Step, pair: State, restart: bool, limit: int) -> State:
        t1 = self.when(self.num_steps + 1)
        assert t1 is not None
        pair, _ = step(pair, (self.grid.times[-1], t1), restart)
        self.grid.times.append(t1)
        return pair

    def forget(self, num_steps: int) -> None:
        self.num_rejected += self.num_steps - num_steps
        del self.grid.times[num_steps + 1 :]


class UntilEvent(Recording):
    """The steps of another stepper until shortly before or after the event; `event.crossing` then says what to look for."""

    def __init__(self, stepper: Adaptive | NumberedSteps, event: Event, max_num_steps: int | None, unit: float) -> None:
        self.stepper, self.grid, self.control = stepper, stepper.grid, stepper.control
        self.event, self.max_num_steps = event, max_num_steps or MAX_NUM_STEPS
        self.few_steps, self.horizon = max_num_steps or FEW_STEPS, HORIZON * unit
        self.farthest = min(FARTHEST * unit, LATEST)
        self.done = False
        self.latest: tuple[Tensor | None, list[float]] = (None, [])

    def advance(self, step: Step, pair: State, restart: bool, limit: int) -> State:
        n, t0 = self.num_steps, self.grid.times[-1]
        before = self._values(t0, pair[0])
        taken, distance = n + self.num_rejected, abs(t0 - self.grid.times[0])
        lost = not distance <= self.farthest
        if taken >= (self.few_steps if distance > self.horizon else self.max_num_steps) or self.stepper.done or lost:
            remedy = "give the path over a longer time" if self.stepper.done else "raise the option max_num_steps"
            remedy = "count time in larger units" if lost else remedy
            raise RuntimeError(
                f"no event by t = {t0}, where event_fn is {before!s:.80}, after {n} steps and {self.num_rejected} rejected ones: "
                f"make sure that it changes sign, check the direction of time and event_direction, or {remedy}."
            )
        after = self.stepper.advance(step, pair, restart, n + 1)
        self.num_rejected, t1 = self.stepper.num_rejected, self.grid.times[-1]
        values = self._values(t1, after[0])
        if n == 0:
            eps = torch.finfo(pair[0].dtype).eps
            nearby = max(self.event.rounding * abs(t0), eps * max(min(abs(t0), 1.0), abs(t1 - t0)))
            # A zero within a few roundings of the initial time is that of an event just handled.
            h, near = abs(t1 - t0), 16 * nearby
            before = [0.0 if abs(a) * h < near * abs(b - a) else a for a, b in zip(before, values, strict=True)]
        signs = self.event.crossed(before, values)
        if not signs:
            return after
        self.event.crossing = Crossing(signs, (t0, t1))
        self.stepper.forget(n)
        self.num_rejected = self.stepper.num_rejected
        self.grid.times.append(middle := 0.5 * (t0 + t1))
        self.grid.outputs.append(n + 1)
        self.done = True
        return step(pair, self.grid.seen(n, n + 1, (t0, middle)), restart)[0]

    def _values(self, t: float, y: Tensor) -> list[float]:
        if self.latest[0] is not y:
            self.latest = (y, self.event.values(t, y))
        return self.latest[1]


def steps_until(
    event: Event, ivp: InitialValueProblem, times: list[float], term: Term, discontinuities: Sequence[float] = ()
) -> Callable[[], Stepper]:
    """Steps from the first of two times until the event or the end of time; by default from knot to knot."""
    options, t0, unit = ivp.options, times[0], abs(times[1] - times[0])
    event.directions(len(event.values(t0, ivp.x0)))
    if options.adaptive:
        make: Callable[[], Any] = adaptive_grid([t0, event.end], options, term, ivp.x0, discontinuities)
    else:
        make = _fixed_steps(event, ivp, t0)
    return lambda: UntilEvent(make(), event, options.max_num_steps, unit)


def _fixed_steps(event: Event, ivp: InitialValueProblem, t0: float) -> Callable[[], Stepper]:
    options, name = ivp.options, ivp.options.scheme.name
    useless = options.given - {"step_size", "form", *EVENT_OPTIONS}
    if useless:
        where = "only adaptive steps land on" if useless <= {*TARGETS} else "fixed steps towards an event do not have"
        raise ValueError(f"{where} option {min(useless)!r} ({name!r}): leave it out, or pass rtol and atol.")
    if ivp.knots and options.step_size is None:
        points = dict(enumerate(knot_grid([t0, event.end], ivp.knots, ivp.x0.real.dtype)().grid.times))
        return lambda: NumberedSteps(t0, points.get)
    if options.step_size is None:
        raise ValueError(
            f"{name!r} takes fixed steps towards the event, so step_size must be a positive number, but it is None: pass "
            "options={'step_size': ...}, or rtol and atol where the method can adapt."
        )
    when = equal_steps(t0, options.step_size, event.end)
    return lambda: NumberedSteps(t0, when)


def equal_steps(t0: float, step_size: float, end: float) -> Callable[[int], float | None]:
    """When the n-th of equal steps from t0 ends; the last one, which may be shorter, at the end."""
    h = math.copysign(step_size, end - t0)

    def when(n: int) -> float | None:
        left = (end - t0) / h - (n - 1)  # in steps, before the n-th
        return None if left <= 1e-9 else end if left <= 1 + 1e-9 else t0 + n * h

    return when
