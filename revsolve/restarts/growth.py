"""The automatic policy: a segment ends before what z carries of its own has grown, as far as the steps so far can tell.

A coupled pair carries, beside the solution, a parasitic mode that grows where the solution decays. A restart stores the pair and
resets z; the discrete map stays exactly differentiable. The gap between z and what a restart would make of it is compared with
what the segment's first step left, after some of the segment's steps, which come the further apart the longer it lasts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.core.restart import FixedInterval, RestartPolicy
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Memo
from revsolve.restarts.spectrum import Spectrum

LONGEST = 32  # steps of a segment, or the square root of twice the steps so far
SETTLED = 2.4  # that many steps' growth is all that is allowed to a gap to which steps do not add
ODD = 1.25  # growth where the order is odd, for then steps carry errors back along the flow
ROUNDING = 100.0  # roundings of an entry are no reason to restart
TOLERATED = 0.1  # of the tolerance of adaptive steps is no reason to restart, either
COARSE = 0.1  # of its size is what the first step may leave of an entry, if it is not to excuse the gaps of others
FIRST_LENGTH = 4  # steps of the first segment, each of the next ones being at most twice as long as that before
STRIDE = 4  # evaluations of the field, at least, from one look at the gap to the next
LATER = 0.75  # of the steps of the segment so far: no look is further from the one before, however small the gap


@dataclass(frozen=True)
class Restarts:
    """When to store the pair and reset z.

    Unless `interval` is given, segments also end before the fastest modes of an ODE's field, excited or not, would have grown.

    Args:
        interval: restart after exactly so many steps (None: when the gap between y and z has grown, see below).
        longest: never go further than this many steps (None: 32, or the square root of twice the number of steps so far if more;
            8 for pairs of order 3).
        growth: the gap after n steps may be 1 + growth * (n - 1) times what the first step left; where steps do not
            add to it, n counts as 3 at most.
        budget: at most this many pairs are stored; those between are computed again in the backward pass.
        adds_up: whether steps add to the gap, as noise does (None: where it is of higher order than the error).

    Raises:
        ValueError: a number of steps or pairs below 1 or not whole, or a growth that is not positive.
    """

    interval: int | None = None
    longest: int | None = None
    growth: float = 1.75
    budget: int | None = None
    adds_up: bool | None = None

    def __post_init__(self) -> None:
        for name in ("interval", "longest", "budget"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"Restarts({name}={number!r}) must be a whole number of at least 1, or None.")
        if not self.growth > 0:
            raise ValueError(f"Restarts(growth={self.growth!r}) must be positive: 1.75 is the default.")

    def capacity(self, num_steps: int) -> float:
        return self.budget or (math.inf if self.interval else 2 * math.isqrt(num_steps) + 6)

    def policy(self, scheme: Scheme, memo: Memo) -> RestartPolicy:
        return FixedInterval(self.interval) if self.interval else Growth(self, scheme, memo)


class Growth:
    """Ends a segment when the gap is, or is about to be, larger than the steps of the segment should have made it.

    Each entry is measured by its largest size so far, or by the tolerance where steps adapt, so that small parts of a state count
    like large ones.
    """

    def __init__(self, restarts: Restarts, scheme: Scheme, memo: Memo) -> None:
        self.scheme, self.spectrum, self.smooth = scheme, Spectrum(scheme, memo), memo.is_rate
        self.adds_up = scheme.defect_order > scheme.order if restarts.adds_up is None else restarts.adds_up
        self.growth = min(restarts.growth, ODD) if self.smooth and scheme.order % 2 else restarts.growth
        rough = scheme.has_velocity and not self.smooth  # then a velocity says nothing of the next step
        self.given = 1 if rough else restarts.longest or scheme.max_segment
        evaluations = sum(len(update.increment.nodes) for update in scheme.updates if update.increment is not None)
        self.stride = self._even(max(1 + scheme.alternates, STRIDE // evaluations if self.smooth else 1))
        self.start, self.length = 0, FIRST_LENGTH / 2  # of this segment, of the one before
        self.largest: Tensor | None = None
        self.scale: Tensor | None = None

    def longest(self, num_steps: int) -> int:
        return self.given or max(LONGEST, math.isqrt(2 * num_steps))

    def foreseen(self, num_steps: int) -> int:
        taken = num_steps - self.start
        return self.start + min(self.bound, max(int(self.length), taken + max(taken, 1 + self.stride)))

    def begin(self, stepper: Stepper, y: Tensor) -> int:
        n, size = stepper.num_steps, y.detach().abs()
        self.length, self.start = n - self.start if n else self.length, n
        bound = min(self.longest(n), int(2 * self.length))
        if n:
            t0, t = stepper.grid.times[n - 1 : n + 1]
            self.spectrum.follow(n, t, y)
            bound = min(bound, self.spectrum.reach(t - t0))
        self.bound = self._even(max(1, bound))
        self.largest = size if self.largest is None else torch.maximum(self.largest, size)
        tolerance = stepper.tolerance(self.largest)
        scale = self.largest if tolerance is None else tolerance
        self.scale = scale.masked_fill(scale == 0.0, math.inf)  # an entry that was always zero has no size yet
        self.coarse, self.least = (COARSE, 0.0) if tolerance is None else (math.inf, TOLERATED)
        self.rounding = ROUNDING * torch.finfo(size.dtype).eps
        self.size: Tensor | float = (size / self.scale).amax()
        return n + 1

    def extend(self, stepper: Stepper, gap: Callable[[Tensor], Tensor | float]) -> int:
        n, taken, order = stepper.num_steps, stepper.num_steps - self.start, self.scheme.defect_order
        if taken >= self.bound:
            return n
        assert self.scale is not None
        times, found = stepper.grid.times[self.start : n + 1], gap(self.scale)
        if taken == 1:
            self.first: tuple[Tensor | float, float] = found, abs(times[1] - times[0]) ** order
            self.before = 1, 1.0 / self._allowed(2 - self.smooth)
            return self.start + self._even(max(2, min(1 + self.stride, self.bound)))
        left, weight = self.first = float(self.first[0]), self.first[1]  # numbers are read once
        self.size = float(self.size)
        natural = min(left, self.coarse) * _mean(times, order) / weight
        allowed = self._allowed(taken) * natural + self.least + self.rounding * self.size
        return n + self._further(taken, float(found), allowed)

    def _further(self, taken: int, gap: float, allowed: float) -> int:
        """How many steps more, if the gap after so many is this large."""
        excess, (steps, before) = gap / max(allowed, math.ulp(0.0)), self.before
        if not excess <= 1.0:
            return 0
        self.before = taken, excess
        per_step = math.log(excess / before) / (taken - steps) if excess > 0.0 < before else 0.0
        most = max(
            self.stride, int(LATER * taken) if self.smooth else 0
        )  # what noise leaves tells little of the next step
        further = most if per_step <= 0.0 else min(most, int(-math.log(excess) / per_step))
        return self._even(min(taken + further, self.bound)) - taken

    def _allowed(self, taken: int) -> float:
        return 1.0 + self.growth * ((taken if self.adds_up else SETTLED) - 1)

    def _even(self, n: int) -> int:
        """Where what z carries changes sign with every step, a restart after an odd number would cost compositions an order."""
        return n - n % 2 if self.scheme.alternates and n > 1 else n


def _mean(times: Sequence[float], order: int) -> float:
    """Of the lengths of the steps to this power."""
    return sum(abs(b - a) ** order for a, b in itertools.pairwise(times)) / (len(times) - 1)
