"""Restarts: when the pair is stored and z is made to follow from y again. Steps from one restart to the next are a segment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Memo


class RestartPolicy(Protocol):
    """The end of each segment, decided from nothing later than that step: what was solved is never solved again."""

    @property
    def scale(self) -> Tensor | None:
        """The units in which the gap is asked for, if it is."""
        ...

    def longest(self, num_steps: int) -> int:
        """No segment is longer among so many steps."""
        ...

    def foreseen(self, num_steps: int) -> int:
        """The number of steps at which the segment is likely to end, when so many have been taken."""
        ...

    def begin(self, stepper: Stepper, y: Tensor) -> int:
        """A segment begins at y: the number of steps after which to ask whether it ends."""
        ...

    def extend(self, stepper: Stepper, gap: Callable[[Tensor], Tensor | float]) -> int:
        """The number of steps after which to ask again; those taken so far if the segment ends here.

        `gap(scale)` is the largest entry, in units of the scale, of the distance of z from what a restart would make of it.
        """
        ...


class Restarting(Protocol):
    """Settings of restarts."""

    def policy(self, scheme: Scheme, memo: Memo) -> RestartPolicy: ...
    def capacity(self, num_steps: int) -> float:
        """The number of pairs that may be stored of so many steps."""
        ...


class FixedInterval:
    """Segments of so many steps each; None: of as many steps as there are segments, about."""

    scale = None

    def __init__(self, interval: int | None) -> None:
        self.interval = interval

    def longest(self, num_steps: int) -> int:
        return self.interval or max(1, math.isqrt(num_steps))

    def foreseen(self, num_steps: int) -> int:
        return num_steps + self.longest(num_steps)

    def begin(self, stepper: Stepper, y: Tensor) -> int:
        return self.foreseen(stepper.num_steps)

    def extend(self, stepper: Stepper, gap: Callable[[Tensor], Tensor | float]) -> int:
        return stepper.num_steps
