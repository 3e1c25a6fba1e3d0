"""Restarts: when z is made to follow from y again, so that neither the parasitic mode nor rounding can grow far.

A coupled pair carries, beside the solution, a parasitic mode that grows where the solution decays. A restart stores the pair and
resets z; the discrete map stays exactly differentiable. The steps from one restart to the next are a segment.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from revsolve.core.coupling import Scheme


@dataclass(frozen=True)
class Restarts:
    """When to store the pair and reset z.

    Unless `interval` is given, segments also end before the fastest modes of an ODE's field, excited or not, would have grown.

    Args:
        interval: restart after exactly so many steps (None: when the parasitic part has grown, see below).
        longest: never go further than this many steps (None: 32, or the square root of the number of steps if more;
            8 for pairs of order 3).
        growth: the parasitic part after n steps may be 1 + growth * (n - 1) times what the first step left; where steps do not
            add to it, n counts as 3 at most.
        budget: at most this many stored pairs on a fixed grid; segments become as long as that asks for.
        adds_up: whether steps add to the parasitic part, as noise does (None: where it is of higher order than the error).

    Raises:
        ValueError: a number of steps or pairs below 1 or not whole, or a growth that is not positive.
    """

    interval: int | None = None
    longest: int | None = None
    growth: float = 2.0
    budget: int | None = None
    adds_up: bool | None = None

    def __post_init__(self) -> None:
        for name in ("interval", "longest", "budget"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"Restarts({name}={number!r}) must be a whole number of at least 1, or None.")
        if not self.growth > 0:
            raise ValueError(f"Restarts(growth={self.growth!r}) must be positive; 2.0 is the measured default.")


ROUNDING = 100.0  # parasitic parts below so many roundings of the state are no reason to restart
FIRST_LENGTH = 4
DOUBLING, CAREFUL = 1.0, 0.5  # how much longer a segment may be than the last: until one went too far, and since
SETTLED = 3  # that many steps' growth is all that is allowed to a parasitic part to which steps do not add
RISE = 1.25  # by so much a segment may be longer for each that was accepted since one had to be solved again
TOO_FAR = 1.5  # a segment this many times as long as the modes at its end allow is solved again


class Segments:
    """The lengths of the segments of one solve: chosen as `Restarts` says, or `every` steps where nothing is reset.

    Decisions take two numbers a segment: the parasitic part that its first step left, and the one at its end. The latter is
    judged against the former, and against what the first step of the next segment leaves, for a decaying solution allows less
    and less; the growth per step seen so tells how long the next segment may be. Where what z carries of its own changes sign
    with every step, segments are even: after an odd number of steps a restart would cost compositions an order.
    """

    def __init__(self, restarts: Restarts | None, num_steps: int | None, every: int | None, scheme: Scheme) -> None:
        self.resets, self.gap_order = restarts is not None, scheme.gap_order
        self.judged = restarts is not None and restarts.interval is None
        self.alternates, self.adds_up = self.judged and scheme.alternates, scheme.gap_order > scheme.order
        if restarts is not None and restarts.adds_up is not None:
            self.adds_up = restarts.adds_up
        self.open_ended = restarts is None and every is None and num_steps is None
        self.shortest, self.wanted = 1, every or num_steps or 1
        if restarts is not None:
            self.growth = restarts.growth
            root = math.isqrt(num_steps) if num_steps else 0
            self.longest = self.wanted = restarts.interval or restarts.longest or scheme.longest or max(32, root)
            if restarts.budget is not None and num_steps is None:
                raise ValueError(
                    f"Restarts(budget={restarts.budget}) needs a fixed grid, where the number of steps is known. "
                    "Fix the step size, or bound the segments with longest= instead."
                )
            if restarts.budget is not None and num_steps:
                self.shortest = -(-num_steps // restarts.budget)
        self.per_step, self.reach = 0.0, self.wanted
        self.last: tuple[int, float] | None = None  # the length of the latest segment, if it stayed, and what it left
        if self.judged:
            self.longest = max(self.longest, self.shortest)
            self.wanted = max(self.shortest, min(FIRST_LENGTH, self.longest))
            self.ceiling, self.pace = float(self.longest), DOUBLING

    @property
    def length(self) -> int:
        """That of the segment that has begun, in steps."""
        return self._even(self.wanted)

    @property
    def foreseen(self) -> int:
        """The longest that it may be, before `start` tells."""
        return self._even(self._wanted(self.per_step))

    def begin(self, num_steps: int) -> None:
        if self.open_ended:  # about as many steps in a segment as there are segments
            self.wanted = max(1, math.isqrt(num_steps))

    def start(self, gap: float, h: float) -> None:
        """Take note of the parasitic part that a first step of length h left; this settles the segment's length."""
        per_step = gap / h**self.gap_order
        self.wanted, self.per_step = self._wanted(min(per_step, self.per_step)), per_step

    def accept(self, gap: float, times: list[float], tolerance: float, rounding: float, reach: int) -> bool:
        """Take note of the parasitic part at the end, and for how many steps the modes there may be followed; False if the
        segment went so far that it must be solved again."""
        n = len(times) - 1
        weight = sum(abs(b - a) ** self.gap_order for a, b in itertools.pairwise(times)) / n
        left = max(gap - ROUNDING * rounding, 0.0 * gap) / weight
        natural = max(self.per_step, tolerance / weight)
        self.reach = reach
        if n > max(self.shortest, TOO_FAR * reach):
            self.last, self.pace = None, CAREFUL
            self.wanted = max(self.shortest, n // 2)
            return False
        if n > self.shortest and not left <= natural * self._limit(n):
            self.last, self.pace = None, CAREFUL
            self.wanted = max(self.shortest, min(n // 2, self._fitting(n, left, natural)))
            self.ceiling = float(self.wanted)
            return False
        self.ceiling = min(RISE * self.ceiling, self.longest)
        self.last = (n, left)
        self.per_step = natural
        return True

    def _even(self, n: int) -> int:
        return n - n % 2 if self.alternates and n > max(1, self.shortest) else n

    def _wanted(self, natural: float) -> int:
        """The length where the first step left so much a step."""
        if self.last is None:
            return self.wanted
        return min(self._fitting(*self.last, natural), max(self.shortest, self.reach))

    def _limit(self, n: int) -> float:
        return 1.0 + self.growth * ((n if self.adds_up else min(n, SETTLED)) - 1)

    def _fitting(self, n: int, left: float, natural: float) -> int:
        """The longest segment whose parasitic part stays within its limit, if it grows as it did over the last n steps."""
        longest = min(self.longest, int(self.ceiling), n + max(1 + self.alternates, int(self.pace * n)))
        per_step = (left / natural) ** (1.0 / n) if natural > 0.0 else math.inf if left > 0.0 else 1.0
        fitting = self.shortest
        if per_step <= 1.0:
            return max(fitting, longest)
        while fitting < longest and per_step ** (fitting + 1) <= self._limit(fitting + 1):
            fitting += 1
        return fitting
