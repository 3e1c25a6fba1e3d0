"""Restarts: when z is made to follow from y again, so that neither the parasitic mode nor rounding can grow far.

A coupled pair carries, beside the solution, a parasitic mode that grows where the solution decays. A restart stores the pair and
resets z; the discrete map stays exactly differentiable. When to restart is decided once per segment of several steps, from three
numbers read together, so that a fixed grid never waits for the device at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Restarts:
    """When to store the pair and reset z.

    interval: restart after exactly so many steps (None: when the parasitic part has grown, see below).
    longest: never go further than this many steps (None: 32, or the square root of the number of steps if that is more).
    growth: a segment of n steps is too long when the parasitic part exceeds growth * n times what its first step left.
    budget: at most this many stored pairs on a fixed grid; segments become as long as that asks for.

    A segment whose parasitic part outgrew the limit ten times is solved again in shorter segments.
    """

    interval: int | None = None
    longest: int | None = None
    growth: float = 3.0
    budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("interval", "longest", "budget"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"Restarts({name}={number!r}) must be a whole number of at least 1, or None.")
        if not self.growth > 0:
            raise ValueError(f"Restarts(growth={self.growth!r}) must be positive; 3.0 is the measured default.")


FIRST_LENGTH = 4
HOPELESS = 10.0
ROUNDING = 100.0


class Segments:
    """The lengths of the segments of one solve: chosen by `Restarts`, or by `every` steps where nothing is reset."""

    def __init__(self, restarts: Restarts | None, num_steps: int | None, every: int | None = None) -> None:
        self.resets = restarts is not None
        self.judged = restarts is not None and restarts.interval is None
        if restarts is None:
            self.length = self.longest = every or num_steps or 1
            self.open_ended = num_steps is None and every is None
            return
        self.growth = restarts.growth
        root = math.isqrt(num_steps) if num_steps else 0
        self.longest = restarts.interval or restarts.longest or max(32, root)
        self.shortest = 1
        if restarts.budget is not None and num_steps:
            self.shortest = -(-num_steps // restarts.budget)
            self.longest = max(self.longest, self.shortest)
        self.length = self.longest if restarts.interval else max(self.shortest, min(FIRST_LENGTH, self.longest))

    def accept(self, num_steps: int, expected: float, found: float, rounding: float) -> bool:
        """Choose the next length by the parasitic part expected and found at the segment's end; False: solve it again."""
        limit = self.growth * expected + rounding
        if found > HOPELESS * limit and num_steps > self.shortest:
            self.length = max(self.shortest, num_steps // 4)
            return False
        if found > limit:
            self.length = max(self.shortest, num_steps // 2)
        elif num_steps >= self.length:
            self.length = min(2 * self.length, self.longest)
        return True

    def grow(self, num_steps: int) -> None:
        """Where nothing is reset and the number of steps is not known beforehand: about as long as there are segments."""
        if self.open_ended:
            self.length = max(1, math.isqrt(num_steps))
