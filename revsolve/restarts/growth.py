"""The automatic policy: a segment ends before what z carries of its own has grown, as far as the steps so far can tell.

A coupled pair carries, beside the solution, a parasitic mode that grows where the solution decays. A restart stores the pair and
resets z; the discrete map stays exactly differentiable. The gap between z and what a restart would make of it is compared with
what the segment's first step left, after some of the segment's steps, which come the further apart the longer it lasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.core.restart import FixedInterval, RestartPolicy
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Memo
from revsolve.restarts.spectrum import Spectrum

LONGEST = 32  # steps of a segment, or the square root of twice the steps so far
FIRST_LENGTH = 4  # steps of the first segment, each of the next ones being at most twice as long as that before
SETTLED = 2.2  # that many steps' growth is all that is allowed to a gap to which steps do not add
ODD = 1.25  # growth where the order is odd, for then steps carry errors back along the flow
ROUNDING = 100.0  # roundings of an entry are no reason to restart
TOLERATED = 0.1  # of the tolerance of adaptive steps is no reason to restart, either
COARSE = 0.1  # of its size is what the first step may leave of an entry, if it is not to excuse the gaps of others
STRIDE = 4  # evaluations of the field, at least, from one look at the gap to the next
WIDEST = 8  # evaluations, at most, from one look to the next where the fastest mode of the field is slow
# From the first look of a segment to the second, as a share of the segment before; from one of the others to the next, as a share
# of the steps so far. The first pair is for ODEs, the second where noise or a path drives.
SECOND, LATER = (0.25, 0.5), (0.75, 0.5)


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
        self.multiple = 2 if scheme.alternates else 1
        self.least_stride = max(self.multiple, STRIDE // scheme.num_evaluations if self.smooth else 1)
        # Nothing is known of the field's modes yet. Where steps do not add to the gap, what z carries of its own is undamped; a
        # velocity gains its order in pairs of steps.
        self.first_length = FIRST_LENGTH if self.adds_up else 2 if scheme.has_velocity else 1
        self.start = self.previous = self.bound = 0  # of this segment; the steps of the one before; most of this one
        self.weight: Tensor | None = None

    def longest(self, num_steps: int) -> int:
        return self.given or max(LONGEST, math.isqrt(2 * num_steps))

    def foreseen(self, num_steps: int) -> int:
        taken = num_steps - self.start
        return self.start + min(self.bound, max(self.previous, taken + max(taken, 1 + self.second)))

    def begin(self, stepper: Stepper, y: Tensor) -> int:
        n, size = stepper.num_steps, y.detach().abs()
        self.previous, self.start = n - self.start, n
        bound, stride = self.longest(n), self.least_stride
        if n == 0:
            self.largest, bound = size, min(bound, self.first_length)
        else:
            t0, t = stepper.grid.times[n - 1 : n + 1]
            lasting = self.spectrum.follow(n, t, y, t - t0, self.previous < self.bound)
            self.largest, bound = torch.maximum(self.largest, size), min(bound, 2 * self.previous, lasting)
            stride = max(stride, min(self.spectrum.calm, WIDEST // self.scheme.num_evaluations))
        self.bound, self.stride = self._even(bound), self._even(stride)
        self.second = self._even(max(2, 1 + self.stride, 1 + int(SECOND[not self.smooth] * self.previous)))
        tolerance = stepper.tolerance(self.largest)
        unit = self.largest if tolerance is None else tolerance
        self.weight = unit.reciprocal().nan_to_num_(posinf=0.0)  # an entry that was always zero has no size yet
        self.coarse, self.least = (COARSE, 0.0) if tolerance is None else (math.inf, TOLERATED)
        self.rounding = ROUNDING * torch.finfo(size.dtype).eps
        self.size: Tensor | float = (size * self.weight).amax()
        return n + (1 if self.second < self.bound else self.bound)

    def extend(self, stepper: Stepper, gap: Callable[[Tensor], Tensor | float]) -> int:
        n, taken, order = stepper.num_steps, stepper.num_steps - self.start, self.scheme.defect_order
        if taken >= self.bound:
            return n
        assert self.weight is not None
        found, length = gap(self.weight), abs(stepper.grid.times[n] - stepper.grid.times[self.start])
        if taken == 1:
            self.first: Tensor | float = found
            self.step, self.before = length, (1, 1 / self._allowed(1))
            return self.start + self.second
        self.first, self.size = float(self.first), float(self.size)  # numbers are read once
        natural = min(self.first, self.coarse) * (length / taken / self.step) ** order
        allowed = self._allowed(taken) * natural + self.least + self.rounding * self.size
        return n + self._further(taken, float(found), allowed)

    def _allowed(self, taken: int) -> float:
        """The gap after so many steps over what the first step left, at most."""
        return 1.0 + self.growth * ((taken if self.adds_up else SETTLED) - 1)

    def _further(self, taken: int, gap: float, allowed: float) -> int:
        """How many steps more, if the gap after so many is this large."""
        excess, (steps, before) = gap / max(allowed, math.ulp(0.0)), self.before
        if not excess <= 1.0:
            return 0
        self.before = taken, excess
        further = max(self.stride, int(LATER[not self.smooth] * taken))
        if self.smooth and excess > before > 0.0:  # what noise leaves tells nothing of the next step
            further = min(further, int(-math.log(excess) / math.log(excess / before) * (taken - steps)))
        return self._even(min(taken + further, self.bound)) - taken

    def _even(self, n: int) -> int:
        """Where what z carries changes sign with every step, a restart after an odd number would cost compositions an order."""
        return max(1, n - n % self.multiple)
