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
    def weight(self) -> Tensor | None:
        """The weights of its entries with which the gap is asked for, if it is."""
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

        `gap(weight)` is the largest entry of the distance of z from what a restart would make of it, each times its weight.
        """
        ...


class RestartSettings(Protocol):
    """What `restarts=` takes: it makes a policy for each solve."""

    def policy(self, scheme: Scheme, memo: Memo) -> RestartPolicy: ...
    def capacity(self, num_steps: int) -> float:
        """The number of pairs that may be stored of so many steps."""
        ...


SMALL = 2**18  # bytes: more segments are not worth it where so few are kept
SPARE = 1.25  # times the least memory, for half as many segments


def checkpoint_spacing(num_steps: int, state: int, tape: int) -> int:
    """The number of steps between checkpoints, where a state takes `state` bytes and the record of a step `tape` (0: unknown).

    With k steps between them, num_steps / k * state + k * tape bytes are kept: least at k = sqrt(num_steps * state / tape). It is
    the largest k up to sqrt(num_steps) with which they are SPARE times as many, or SMALL, at most.
    """
    product = num_steps * state * tape
    most = max(2 * SPARE * math.sqrt(product), SMALL)
    largest = (most + math.sqrt(most**2 - 4 * product)) / (2 * tape) if tape else math.inf
    return max(1, int(min(math.sqrt(num_steps), largest)))


class FixedInterval:
    """Segments of so many steps each; or as many as `spacing` says of the number of all steps."""

    weight = None

    def __init__(self, interval: int | None, spacing: Callable[[int], int] = math.isqrt) -> None:
        self.interval, self.spacing = interval, spacing

    def longest(self, num_steps: int) -> int:
        return self.interval or max(1, self.spacing(num_steps))

    def foreseen(self, num_steps: int) -> int:
        return num_steps + self.longest(num_steps)

    def begin(self, stepper: Stepper, y: Tensor) -> int:
        return self.foreseen(stepper.num_steps)

    def extend(self, stepper: Stepper, gap: Callable[[Tensor], Tensor | float]) -> int:
        return stepper.num_steps
