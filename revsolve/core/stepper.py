"""Steppers decide where steps end; they record the accepted grid, so that every later pass replays the very same steps."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from revsolve.core.arithmetic import OneSided
from revsolve.core.coupling import State
from revsolve.core.tape import Memo

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]  # of an error estimate, given y before and after the step

T = TypeVar("T", bound="float | Tensor")
LONGEST_RUN = 64  # what is kept for each step of a run is let go after it


class Step(Protocol):
    """Takes the steps from each of the times to the next, after a restart where asked for; measures their error if told how."""

    memo: Memo

    def __call__(
        self, state: State, times: Sequence[float], restart: bool, measure: Measure | None = None
    ) -> tuple[State, Tensor | None]: ...

    def forget_attempt(self) -> None: ...


@dataclass
class Grid:
    """The accepted steps: `times` (one more than steps), the step counts at which outputs are due, and where z was reset.

    The times at `pinned` step counts stay where they are when outputs move. At those in `jumps`, which are pinned, the field is
    discontinuous: the steps on both sides see it from their own. Up to `longest_run` steps are taken in one go.
    """

    times: list[float]
    outputs: list[int]
    restarts: set[int] = field(default_factory=set)
    pinned: list[int] = field(default_factory=list)
    jumps: set[int] = field(default_factory=set)
    longest_run: int = 1

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def output(self, n: int) -> int | None:
        """Which output is due after n steps."""
        i = bisect_left(self.outputs, n)
        return i if i < len(self.outputs) and self.outputs[i] == n else None

    def runs(self, start: int, stop: int, longest: int | None = None) -> Iterator[tuple[int, int]]:
        """The steps start..stop in runs of steps between which there is no output, no restart and no jump."""
        first = start
        for n in range(start + 1, stop + 1):
            if (
                n - first == (longest or self.longest_run)
                or n == stop
                or n in self.restarts
                or n in self.jumps
                or self.output(n) is not None
            ):
                yield first, n
                first = n

    def seen(self, start: int, stop: int, times: Sequence[T]) -> Sequence[T]:
        """The times of the steps start..stop, a run, where those at a jump are seen from within it."""
        if not self.jumps or self.jumps.isdisjoint((start, stop)):
            return times
        side = math.copysign(1.0, self.times[-1] - self.times[0])
        seen: list[Any] = list(times)
        if start in self.jumps:
            seen[0] = OneSided(self.times[start], side)
        if stop in self.jumps:
            seen[-1] = OneSided(self.times[stop], -side)
        return seen


class Stepper(Protocol):
    """Advances a pair by accepted steps and records them."""

    grid: Grid

    @property
    def num_rejected(self) -> int: ...
    @property
    def num_steps(self) -> int:
        """Accepted so far."""
        ...

    @property
    def num_total(self) -> int | None:
        """In all, where known beforehand."""
        ...

    @property
    def done(self) -> bool: ...
    def advance(self, step: Step, pair: State, restart: bool, limit: int) -> State:
        """The pair after one more accepted step, or, where states need no look in between, after at most `limit` in all."""
        ...

    def tolerance(self, size: Tensor) -> Tensor | None:
        """The error that a step to states of this size may make; None where steps are not chosen by their error."""
        ...


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


class FixedGrid:
    """Steps between given times; `outputs` are the step counts at which outputs are due, for `pinned` and `jumps` see `Grid`."""

    def __init__(
        self, times: list[float], outputs: list[int], pinned: Sequence[int] = (), jumps: Collection[int] = ()
    ) -> None:
        self.grid = Grid(times, outputs, pinned=list(pinned), jumps=set(jumps), longest_run=LONGEST_RUN)
        self.num_steps = self.num_rejected = 0
        self.num_total = len(times) - 1
        self.next_output = 0  # which of them; bisection would be a riddle to torch.compile

    @property
    def done(self) -> bool:
        return self.num_steps == self.num_total

    def advance(self, step: Step, pair: State, restart: bool, limit: int) -> State:
        n, outputs = self.num_steps, self.grid.outputs
        while outputs[self.next_output] <= n:
            self.next_output += 1
        stop = min(limit, n + LONGEST_RUN, outputs[self.next_output])
        if self.grid.jumps:
            stop = min([stop, *(jump for jump in self.grid.jumps if jump > n)])
        pair, _ = step(pair, self.grid.seen(n, stop, self.grid.times[n : stop + 1]), restart)
        self.num_steps = stop
        return pair

    def tolerance(self, size: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class ErrorControl:
    """How steps follow the error: it is accepted where norm(error / (atol + rtol max(|y0|, |y1|))) <= 1, and a PI controller
    (Gustafsson 1991) scales the next step by safety * error**-(0.7/k) * previous**(0.4/k), k = error_order + 1."""

    rtol: float | Tensor
    atol: float | Tensor
    norm: Callable[[Tensor], Tensor]
    loosest: tuple[float, float]  # largest entries of (atol, rtol)
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


SHORTEST = 8.0  # steps of fewer roundings of the time cannot be shortened reliably


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
            lands = abs(target - t0) <= self.h * (1 + 1e-9)
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
        c, k = self.control, self.control.error_order + 1
        if not math.isfinite(ratio):
            return c.shrink
        if ratio == 0.0:
            return grow
        return min(grow, max(c.shrink, c.safety * ratio ** (-0.7 / k) * self.previous ** (0.4 / k)))

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
