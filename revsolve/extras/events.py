"""Events: solve until a function of time and state crosses zero, with exact gradients of when and where that happens.

The event function g is looked at after every accepted step. Where a component changes sign, the step is repeated with half its
length, to a time tm, and that is where the solve ends; one more step from there, of the length s - tm for which g(s, y(s)) = 0,
leads to the event. A change of anything else moves the event by the implicit function theorem,

    ds = -dg / (d/ds g(s, y(s))),

where y(s) is that last step as a function of its own end: the derivative of the discrete solve, not of the equation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import OneSided, Time
from revsolve.core.gradient import solve
from revsolve.core.integrate import Walk
from revsolve.core.problem import Problem
from revsolve.core.tape import Memo
from revsolve.extras.event_steps import Crossing, Event, steps_until
from revsolve.extras.progress import watched_steps
from revsolve.field.discover import boundary
from revsolve.field.functorch import dual_numbers
from revsolve.field.snapshot import Snapshot
from revsolve.prepare.problem import InitialValueProblem, values_hidden
from revsolve.prepare.times import as_tensor, check_times, next_to, resolution
from revsolve.solution import Solution

NEWTON_STEPS = 3  # each makes one more derivative of a root right
MOST_EXTENSIONS = 8


def solve_until_event(ivp: InitialValueProblem, t: Any, event_fn: Callable[..., Any]) -> tuple[Tensor, Solution]:
    """The time of the event, and the solution at the times t[0] and then."""
    if ivp.options.compile:
        raise ValueError("compile= is for the same fixed steps of all samples: leave it out with event_fn.")
    if values_hidden() or dual_numbers():
        raise RuntimeError(
            "an event is found by looking at numbers, which torch.func transforms, forward mode and torch.compile hide: "
            "differentiate with torch.autograd.grad or backward(), and solve outside of what is compiled."
        )
    times = check_times(t)
    if len(times) != 2:
        raise ValueError(
            f"with event_fn, t must hold the initial time and one that gives the direction, but it holds {len(times)} times."
        )
    end = ivp.interval[1] if times[1] > times[0] else ivp.interval[0]
    if not (end - times[0]) * (times[1] - times[0]) > 0:
        raise ValueError(f"the path ends at t = {end}, where the solve would begin: give one over a longer time.")
    clock, packing = ivp.moving_clock(t, times[0], end), ivp.packing
    posed = ivp.pose(clock, None)
    direction = ivp.options.event_direction
    event = Event(
        lambda s, x: event_fn(clock(s), packing.unpack(x)), direction, end, resolution(t), {*ivp.options.jump_t}
    )
    event.snapshot = Snapshot(event_fn)
    with torch.no_grad():
        make = steps_until(event, ivp, times, posed.term, ivp.discontinuities)
    problem = ivp.problem(posed, [times[0], end], watched_steps(make, ivp, None))
    found, states = solve_until(event, problem, ivp.x0)
    t = as_tensor(t)
    event_t = found.to(t) if clock.shift is None else found.to(t) + (t[0] - t[0].detach())
    steps = [*problem.stats.times, float(found.detach())]
    return event_t, Solution(torch.stack([t[0], event_t]), ivp.results(states, 1), problem.stats, steps)


def solve_until(event: Event, problem: Problem, x0: Tensor) -> tuple[Tensor, Tensor]:
    """The time of the event, a float64 number on the CPU, and the states at the start and then, (2, *x0.shape).

    The problem's steppers are `UntilEvent` ones of this event. The event's time has its first three derivatives.
    """
    middle = solve(problem, x0, None)[1]
    assert event.crossing is not None
    last = _LastStep(problem, event, problem.stats.times[-1], middle)
    with problem.field.as_solved():  # trial steps are no evaluations that running statistics should see
        with torch.no_grad():
            found, component = last.locate(event.crossing)
        time = torch.tensor(found, dtype=torch.float64, device="cpu")
        if torch.is_grad_enabled():
            with event.snapshot.restored():  # what event_fn kept during the search was computed without a graph
                time = last.differentiable(found, component)
        return time, torch.stack([x0, last.state(time, middle)])


class _LastStep:
    """The step from where the solve ended to a time s, and the event function there, as functions of s."""

    def __init__(self, problem: Problem, event: Event, t0: float, y: Tensor) -> None:
        self.problem, self.event, self.t0, self.y = problem, event, t0, y
        self.before = t0  # the latest time known before the event

    def state(self, s: Time, y: Tensor) -> Tensor:
        walk = Walk(self.problem.scheme, Memo(self.problem.field.term))
        at, real = float(s.detach()) if isinstance(s, Tensor) else s, y.real.dtype
        if any(abs(at - jump) <= torch.finfo(real).eps * abs(jump) for jump in self.event.jumps):
            side = self.t0 - at  # the step that ends there sees the field before
            near = next_to(torch.tensor(at, dtype=real, device="cpu"), side)
            s = s + (float(near) - at) if isinstance(s, Tensor) else OneSided(at, side)
        return walk((y,), (self.t0, s), self.problem.scheme.reversible)[0][0]

    def value(self, s: Time, y: Tensor, component: int) -> Tensor:
        return self.event.value(s, self.state(s, y))[component]

    def locate(self, crossing: Crossing) -> tuple[float, int]:
        """When the first component fires, to rounding, and which one it is."""

        y = self.y.detach()  # as the solve has it, for fields that set requires_grad of their state

        def heights(s: float) -> list[tuple[float, int]]:
            values = self.event.values(s, y if s == self.t0 else self.state(s, y))
            return [(sign * values[i], i) for i, sign in crossing.signs.items()]

        def lowest(s: float) -> float:
            return min(heights(s))[0]

        here = lowest(self.t0)
        a, b = self.t0, crossing.between[1 if here > 0 else 0]
        for _ in range(MOST_EXTENSIONS):  # steps of another length may cross a little later
            if ((there := lowest(b)) > 0) != (here > 0):
                break
            b += 0.5 * (b - a)
            b = b if abs(b - a) < abs(self.event.end - a) else self.event.end
        else:
            raise RuntimeError(
                f"event_fn changed sign between t = {crossing.between[0]} and {crossing.between[1]}, but not in steps of other "
                "lengths: the steps are too long for it, take smaller ones (step_size, max_step, or rtol and atol)."
            )
        exact = torch.finfo(torch.float64).eps  # times are, but states may tell them apart by parts of the step only
        tolerance = 4 * exact * max(abs(a), abs(b)) + torch.finfo(self.y.dtype).eps * abs(b - a)
        found, self.before = find_root(lowest, (a, here), (b, there), tolerance)
        if found == self.t0:  # a step of no length has no velocity
            found = math.nextafter(found, b)
        return found, min(heights(found))[1]

    def differentiable(self, s: float, component: int) -> Tensor:
        """s as a function of all that it depends on."""
        found = torch.tensor(s, dtype=torch.float64, device="cpu", requires_grad=True)
        for _ in range(NEWTON_STEPS):
            value = self.value(found, self.y, component)
            alone = not self.y.requires_grad and all(leaf is found for leaf in boundary([value])[0])
            if alone or not value.requires_grad:
                return found.detach()
            (rate,) = torch.autograd.grad(value, found, retain_graph=True, materialize_grads=True)
            if float(rate.detach()) == 0.0 and self._stays_zero(s, component):  # it changes on the other side alone
                return self._reached(s, component)
            found = _Newton.apply(found, value, _checked(rate, s))
        return found

    @torch.no_grad()
    def _stays_zero(self, s: float, component: int) -> bool:
        later = s + 16 * (s - self.before)
        return all(self.event.values(t, self.state(t, self.y.detach()))[component] == 0.0 for t in (s, later))

    def _reached(self, s: float, component: int) -> Tensor:
        """When the function becomes zero, from its values just before."""
        found = torch.tensor(self.before, dtype=torch.float64, device="cpu", requires_grad=True)
        value = self.value(found, self.y, component)
        (rate,) = torch.autograd.grad(value, found, retain_graph=True, materialize_grads=True)
        # Then it is not reached, but jumps there.
        if abs(float(value.detach())) > 8 * abs(float(rate.detach()) * (s - self.before)):
            return torch.tensor(s, dtype=torch.float64, device="cpu")
        return _Newton.apply(found, value, _checked(rate, self.before)) + (s - self.before)


class _Newton(torch.autograd.Function):
    """A root of `value`, a function of `end` that is zero there and changes at a `rate`: one step of Newton's method.

    The rate is differentiated in its turn only where the gradient is: only then must the field be differentiable twice.
    """

    @staticmethod
    def forward(ctx: Any, end: Tensor, value: Tensor, rate: float) -> Tensor:
        ctx.save_for_backward(end, value)
        ctx.rate = rate
        return end.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        end, value = ctx.saved_tensors
        rate = ctx.rate
        if torch.is_grad_enabled():
            (rate,) = torch.autograd.grad(value, end, create_graph=True)
        return grad, (-grad / rate).to(value), None


def _checked(rate: Tensor, s: float) -> float:
    number = float(rate.detach())
    if not math.isfinite(number) or number == 0.0:
        raise RuntimeError(
            f"event_fn changes at the rate {number} at its zero t = {s}, so the time of the event has no derivative: the "
            "solution only touches the event, or event_fn is not differentiable there."
        )
    return number


def find_root(
    f: Callable[[float], float], left: tuple[float, float], right: tuple[float, float], tolerance: float
) -> tuple[float, float]:
    """A zero of f between two points (x, f(x)) where its signs differ, to a tolerance in x, and the nearest point known where f
    is positive. Where f is zero on a stretch, the zero is the end of it that is nearest to where f is positive.

    Inverse quadratic interpolation where that is safe, else bisection (Chandrupatla 1997, Advances in Engineering Software 28).
    """
    (b, fb), (a, fa) = left, right
    c, fc = b, fb
    fraction, met_zero = 0.5, False
    while True:
        x, fx = (x := a + fraction * (b - a)), f(x)
        if (fx > 0) == (fa > 0):
            c, fc = a, fa
        else:
            c, fc, b, fb = b, fb, a, fa
        a, fa = x, fx
        best, fbest = (a, fa) if abs(fa) < abs(fb) else (b, fb)
        least = max(0.5 * tolerance, abs(math.ulp(best))) / abs(b - a)
        if least > 0.5:
            return best, a if fa > 0 else b
        if fbest == 0.0:  # is there another zero just before it?
            fraction = 0.5 if met_zero else min(0.5, 1.9 * least) if best == a else max(0.5, 1 - 1.9 * least)
            met_zero = True
            continue
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        fraction = 0.5
        if phi**2 < xi and (1 - phi) ** 2 < 1 - xi:
            fraction = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        fraction = min(1 - least, max(least, fraction))
