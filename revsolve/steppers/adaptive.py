"""Adaptive steps: a controller follows an error estimate, and steps land on every time at which something is due."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import OneSided
from revsolve.core.coupling import State
from revsolve.core.stepper import Grid, Step
from revsolve.core.tape import Memo, Term

STRETCH = 1.1  # a step becomes so much longer if it ends on a target then, as in MATLAB's ode45: no sliver is left
SHORTEST = 8.0  # steps of fewer roundings of the time cannot be shortened reliably


@dataclass(frozen=True)
class ErrorControl:
    """How steps follow the error: it is accepted where norm(error / (atol + rtol max(|y0|, |y1|))) <= 1, and a PI controller
    (Gustafsson 1991) scales the next step by safety * error**-(0.7/k) * previous**(0.4/k), k = error_order + 1."""

    rtol: float | Tensor
    atol: float | Tensor
    norm: Callable[[Tensor], Tensor]
    error_order: int
    first_step: Callable[[Memo, Tensor], float]  # from the term and the state at the start
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 100_000

    def tolerance(self, size: Tensor) -> Tensor:
        """The error that a step to states of this size may make."""
        return self.atol + self.rtol * size

    def factor(self, ratio: Any, previous: Any) -> Any:
        """What scales the next step, without limits, from the error ratios of this step and of the one before."""
        k = self.error_order + 1
        return self.safety * ratio ** (-0.7 / k) * previous ** (0.4 / k)


class Recording:
    """A stepper that records steps as it takes them, as many as its grid has; in all unknown, and none rejected so far."""

    grid: Grid
    control: ErrorControl | None = None  # where steps are chosen by their error
    num_total: int | None = None
    num_rejected = 0

    @property
    def num_steps(self) -> int:
        return self.grid.num_steps

    def tolerance(self, size: Tensor) -> Tensor | None:
        return None if self.control is None else self.control.tolerance(size)


class Adaptive(Recording):
    """Steps whose error estimate meets the tolerances, landing on every target; one device read per attempted step."""

    def __init__(
        self,
        targets: list[float],
        is_output: list[bool],
        control: ErrorControl,
        explain: Callable[..., str],
        jumps: Container[float] = (),
    ) -> None:
        self.grid = Grid(targets[:1], [0])
        self.jumps = jumps  # those among the targets at which the field is discontinuous
        self.grid.jumps = {0} if targets[0] in jumps else set()
        self.targets, self.is_output = targets, is_output
        self.control: ErrorControl = control
        self.explain = explain
        self.direction = math.copysign(1.0, targets[-1] - targets[0]) if len(targets) > 1 else 1.0
        self.h = 0.0  # that of the first step is found when it is taken
        self.previous = 1.0
        self.lost: float | None = None  # the end of the latest attempt whose error was not finite
        self.next_target = 1
        self.every_step = False  # an output after every accepted step, not only at targets

    @property
    def done(self) -> bool:
        return self.next_target == len(self.targets)

    def advance(self, step: Step, pair: State, restart: bool, limit: int) -> State:
        t0, grown = self.grid.times[-1], self.control.grow
        if not self.h:
            h = self.control.first_step(step.memo, pair[0])
            self.h = max(min(h, self.control.max_step), self.control.min_step)
        while True:
            self._check_progress(t0, pair)
            target = self.targets[self.next_target]
            lands = abs(target - t0) <= min(self.h * STRETCH, max(self.control.max_step, self.h)) * (1 + 1e-9)
            t1 = target if lands else t0 + self.direction * self.h
            after, measured = step(pair, self._seen(t0, t1), restart, self._ratio)
            assert measured is not None
            ratio = float(measured)
            factor = self._factor(ratio, grown)
            h = abs(t1 - t0)
            if ratio <= 1.0 or (h <= self.control.min_step * (1 + 1e-9) and math.isfinite(ratio)):
                self.h = min(max(h * factor, self.h if lands and factor > 1 else 0.0), self.control.max_step)
                self.h = max(self.h, self.control.min_step)
                self.previous = max(ratio, 1e-4)
                self._accept(t1, lands)
                return after
            self.num_rejected += 1
            self.lost = self.lost if math.isfinite(ratio) else t1
            if h <= self.control.min_step * (1 + 1e-9):
                raise RuntimeError(self.explain("shortest step", t0, self, pair))
            step.forget_attempt()
            self.h, grown = max(h * min(factor, 0.9), self.control.min_step), 1.0

    def forget(self, num_steps: int) -> None:
        """Count the accepted steps after the first `num_steps` as rejected."""
        self.num_rejected += self.num_steps - num_steps
        del self.grid.times[num_steps + 1 :]
        for counts in (self.grid.outputs, self.grid.pinned):
            while counts and counts[-1] > num_steps:
                counts.pop()
        self.grid.jumps = {n for n in self.grid.jumps if n <= num_steps}
        forward = self.direction
        self.next_target = next(i for i, t in enumerate(self.targets) if forward * t > forward * self.grid.times[-1])

    def _ratio(self, error: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
        size = y0.detach().abs().maximum(y1.detach().abs())
        return self.control.norm(error / self.control.tolerance(size))

    def _factor(self, ratio: float, grow: float) -> float:
        shrink = self.control.shrink
        if not math.isfinite(ratio):
            return shrink
        return grow if ratio == 0.0 else min(grow, max(shrink, self.control.factor(ratio, self.previous)))

    def _seen(self, t0: float, t1: float) -> tuple[float, float]:
        """The ends of a step, where those at a jump are seen from within it."""
        if self.jumps:
            t0 = OneSided(t0, self.direction) if t0 in self.jumps else t0
            t1 = OneSided(t1, -self.direction) if t1 in self.jumps else t1
        return t0, t1

    def _accept(self, t1: float, lands: bool) -> None:
        self.grid.times.append(t1)
        if t1 in self.jumps:
            self.grid.jumps.add(self.num_steps)
        if lands or self.every_step:
            due = self.every_step or self.is_output[self.next_target]
            (self.grid.outputs if due else self.grid.pinned).append(self.num_steps)
        self.next_target += lands

    def _check_progress(self, t0: float, pair: State) -> None:
        if self.num_steps + self.num_rejected >= self.control.max_num_steps:
            raise RuntimeError(self.explain("too many steps", t0, self, pair))
        if not self.h >= SHORTEST * math.ulp(t0):  # also where the field's NaN has made it NaN
            raise RuntimeError(self.explain("step underflow", t0, self, pair))


def first_step(
    span: list[float], rtol: Any, atol: Any, norm: Callable[[Tensor], Tensor], order: int, memo: Memo, x0: Tensor
) -> float:
    """The starting step of Hairer, Norsett & Wanner (Solving ODEs I, II.4): one more evaluation, two device reads."""
    if span[0] == span[1]:
        return 1.0
    t0, length = span[0], abs(span[1] - span[0])
    direction = math.copysign(1.0, span[1] - span[0])
    with torch.no_grad():
        scale = atol + rtol * x0.abs()
        f0 = rate(memo, t0, x0, direction)
        d0, d1 = (float(norm(v / scale)) for v in (x0, f0))
        h0 = min(1e-6 if not (d0 >= 1e-5 and 1e-5 <= d1 < math.inf) else 0.01 * d0 / d1, length)
        f1 = rate(memo, t0 + direction * h0, x0 + h0 * f0, direction)
        d2 = float(norm((f1 - f0) / scale)) / h0
    steepest = max(d1, d2)
    if not math.isfinite(steepest):
        return h0
    h1 = max(1e-6, h0 * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1.0 / (order + 1))
    return min(100 * h0, h1, length)


def rate(term: Term, t: float, x: Tensor, direction: float) -> Tensor:
    """The increment per unit of time in the direction of integration."""
    value = term.peek(t, x) if isinstance(term, Memo) else term.value(t, x)
    k, scale = term.product(value, term.control(t, t, t + direction))
    return k * scale


def root_mean_square(x: Tensor) -> Tensor:
    """The norm of torchdiffeq and scipy: the square root of the mean square."""
    return torch.linalg.vector_norm(x) / math.sqrt(x.numel())
