"""Steppers decide where steps end; they record the accepted grid, so that every later pass replays the very same steps."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from revsolve.core.arithmetic import OneSided, Time
from revsolve.core.coupling import State
from revsolve.core.tape import Memo

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]  # of an error estimate, given y before and after the step


class Step(Protocol):
    """Takes the steps from each of the times to the next, after a restart where asked for; measures their error if told how.
    `gap` is the largest entry, weighted, of the defect (`core.integrate.defect`) after a last step of length h."""

    memo: Memo

    def __call__(
        self, state: State, times: Sequence[float], restart: bool, measure: Measure | None = None
    ) -> tuple[State, Tensor | None]: ...

    def forget_attempt(self) -> None: ...
    def gap(self, state: State, h: float, weight: Tensor) -> Tensor: ...


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

    def seen(self, start: int, stop: int, times: Sequence[Time]) -> Sequence[Any]:
        """The times of the steps start..stop, a run, where those at a jump are seen from within it."""
        if not self.jumps or self.jumps.isdisjoint((start, stop)):
            return times
        side = math.copysign(1.0, self.times[-1] - self.times[0])
        seen = list(times)
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
