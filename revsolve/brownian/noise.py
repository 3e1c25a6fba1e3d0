"""The noise of a Brownian path, drawn when asked for as a function of a seed and a place.

Over step n of a grid of known knots it is sqrt(h_n) * N(seed, n). Within a step it is that of a virtual Brownian tree: a node
splits into `FANOUT` equal children by the exact conditional law of (W, H) given the node's own. At the bottom a leaf is split at
the queried point itself by the same law, so that a query needs no depth beyond the tolerance.

Paper: Jelincic, Foster and Kidger (2024), "Single-seed generation of Brownian paths and integrals", with two children
a node.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revsolve.brownian.increments import Increments, Partition, independent, remainder

FANOUT = 8  # a power of two: then the digits of a place are exact
_CACHED_DESCENTS = 3  # to both ends of an interval, and to the start of the next one
_BLOCK_STEPS = 64  # drawn at once: spreads the cost of seeding a generator
_BLOCK_NUMBERS = 2**18
_ROUNDINGS = 4
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """Scramble 64 bits one-to-one: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


@dataclass(frozen=True)
class CounterRNG:
    """Standard normal rows of shape `size` for any counter (index, node): one set for W and, where `areas` is set, one for H."""

    seed: int
    size: torch.Size
    dtype: torch.dtype
    device: torch.device
    source: torch.device  # where they are generated
    areas: bool

    def normal(self, num_rows: int, index: int, node: int) -> tuple[Tensor, Tensor | None]:
        """The rows of one counter, each (num_rows, *size)."""
        # A generator of its own, because threads that shared one could seed it between another's seed and draw.
        generator = torch.Generator(self.source)
        mixed = _mix((self.seed + _GOLDEN * index) & _MASK)
        generator.manual_seed(_mix((mixed + _GOLDEN * node) & _MASK))
        options: Any = {"generator": generator, "dtype": self.dtype, "device": self.source}
        W, *H = (torch.randn((num_rows, *self.size), **options) for _ in range(1 + self.areas))
        return W.to(self.device, non_blocking=True), H[0].to(self.device, non_blocking=True) if H else None


class ThreadCache(threading.local):
    """The latest results of each thread: the one mutable part of a Brownian path.

    Threads that share a path share no results, so that none meets another's changes halfway and none waits for a lock.
    A copy starts empty.
    """

    latest: tuple[Any, ...] = ()

    def keep(self, made: Tensor, *latest: Any) -> None:
        """Keep these results, unless what was made lives in a mode of its own, such as the fake tensors of a trace."""
        if type(made) is Tensor:
            self.latest = latest

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ThreadCache, ()


class Block(NamedTuple):
    """Consecutive steps of the grid."""

    number: int
    increments: Increments
    W: dict[tuple[float, float], Tensor]  # by times: of each step both ways; of two, once one such was asked for
    H: tuple[Tensor, ...]


class GridIncrements:
    """Increments over the steps between knots; two blocks are kept, so that a sweep in either direction draws each once."""

    def __init__(self, rng: CounterRNG, knots: list[float]) -> None:
        self.knots = knots
        self.last = len(knots) - 2  # number of the last step
        self._rng = rng
        self._block_steps = max(1, min(_BLOCK_STEPS, _BLOCK_NUMBERS // max(1, rng.size.numel())))
        self._cache = ThreadCache()  # of blocks
        self._slack = _ROUNDINGS * torch.finfo(torch.float64).eps * max(abs(knots[0]), abs(knots[-1]))

    def cached(self, ta: float, tb: float) -> Tensor | None:
        """Return W over a step, or two, of the blocks that are kept."""
        for block in self._cache.latest:
            if (W := block.W.get((ta, tb))) is not None:
                return W
        return None

    def between_knots(self, ta: float, tb: float) -> tuple[Tensor, Tensor | None] | None:
        """Return W and H over one step, if it has these knots for ends; or W over two steps, and None."""
        low, high = (ta, tb) if ta <= tb else (tb, ta)
        step = bisect_left(self.knots, low, 0, self.last)
        ends = self.knots[step : step + 3]
        if ends[0] != low or high not in ends[1:]:
            return None
        block, row = self._block(step)
        if high == ends[1]:
            return block.W[ta, tb], block.H[row] if block.H else None
        if row + 1 == len(block.increments.lengths):
            W = block.W[low, ends[1]] + self._block(step + 1)[0].W[ends[1], high]
        else:
            W = self._with_pairs(block).W[low, high]
        return (W if ta <= tb else -W), None

    def step(self, step: int) -> Increments:
        """Return those of one step."""
        block, row = self._block(step)
        return block.increments.slice(row, row + 1)

    def between(self, start: int, stop: int) -> list[Increments]:
        """Return the steps from number `start` up to `stop`, those of a block joined, so that few are held."""
        groups = []
        while start < stop:
            block, row = self._block(start)
            group = block.increments.slice(row, row + stop - start)
            groups.append(group.total())
            start += len(group.lengths)
        return groups

    def locate(self, t: float) -> tuple[int, float]:
        """Return the step in which t lies and the fraction of it before t; 0 at a knot, up to rounding."""
        step = bisect_right(self.knots, t) - 1
        knot = min((step, min(step + 1, self.last + 1)), key=lambda n: abs(self.knots[n] - t))
        if abs(self.knots[knot] - t) <= self._slack:
            return knot, 0.0
        return step, (t - self.knots[step]) / (self.knots[step + 1] - self.knots[step])

    def _block(self, step: int) -> tuple[Block, int]:
        """Return the block that holds the step, and the step's place in it."""
        number, row = divmod(step, self._block_steps)
        for block in self._cache.latest:
            if block.number == number:
                return block, row
        return self._draw(number), row

    def _knots_of(self, number: int) -> list[float]:
        start = number * self._block_steps
        return self.knots[start : start + self._block_steps + 1]

    @torch.inference_mode(False)  # what is kept may meet autograd later
    def _with_pairs(self, block: Block) -> Block:
        W, knots = block.increments.W, self._knots_of(block.number)
        block.W.update(zip(zip(knots, knots[2:], strict=False), (W[:-1] + W[1:]).unbind(), strict=True))
        return block

    @torch.inference_mode(False)
    def _draw(self, number: int) -> Block:
        knots = self._knots_of(number)
        lengths = [end - start for start, end in pairwise(knots)]
        increments = independent(lengths, *self._rng.normal(len(lengths), number, 0))
        W = dict(zip(pairwise(knots), increments.W.unbind(), strict=True))
        W.update(zip(zip(knots[1:], knots, strict=False), (-increments.W).unbind(), strict=True))
        block = Block(number, increments, W, () if increments.H is None else increments.H.unbind())
        nearest = sorted(self._cache.latest, key=lambda kept: abs(kept.number - number))[:1]
        self._cache.keep(increments.W, block, *nearest)
        return block


class Descent(NamedTuple):
    """The way down to a point x of a step: the children met and the digit taken at each depth; the leaf split at x."""

    step: int
    x: float
    rows: list[Increments]
    digits: list[int]
    leaf: Increments  # before and after the point

    def before(self, depth: int = 0) -> list[Increments]:
        """Those before the point within the node at this depth of the descent, in order of time."""
        below = zip(self.rows[depth:], self.digits[depth:], strict=True)
        return [*(row.slice(0, digit) for row, digit in below), self.leaf.slice(0, 1)]

    def after(self, depth: int = 0) -> list[Increments]:
        """Those after the point within the node at this depth of the descent, in order of time."""
        below = list(zip(self.rows[depth:], self.digits[depth:], strict=True))
        return [self.leaf.slice(1, 2), *(row.slice(digit + 1, FANOUT) for row, digit in reversed(below))]


class BrownianTree:
    """Splits the steps of a grid; keeps the latest descents, so that neighbouring queries share their beginnings."""

    def __init__(self, rng: CounterRNG, tol: float) -> None:
        self._rng = rng
        self._tol = tol
        self._row = torch.empty((0, *rng.size), dtype=rng.dtype, device=rng.device)
        self._equal = Partition.of([1.0] * FANOUT, self._row)
        self._cache = ThreadCache()  # of descents

    def between(self, step: int, whole: Increments, x: float, y: float) -> list[Increments]:
        """Return adjacent groups that make up the fraction from x to y, 0 < x < y < 1, of the grid's step."""
        start, end = self.descend(step, whole, x), self.descend(step, whole, y)
        fork = _num_equal(start.digits, end.digits)
        if fork == len(start.digits):
            return [remainder(end.leaf.slice(0, 1), start.leaf.slice(0, 1))]
        middle = start.rows[fork].slice(start.digits[fork] + 1, end.digits[fork])
        return [*start.after(fork + 1), middle, *end.before(fork + 1)]

    def descend(self, step: int, whole: Increments, x: float) -> Descent:
        """Return the way down to the fraction 0 < x < 1 of the grid's step."""
        kept = [descent for descent in self._cache.latest if descent.step == step]
        for descent in kept:
            if descent.x == x:
                return descent
        depth = max(0, math.ceil(math.log(whole.lengths[0] / self._tol, FANOUT) - 1e-9))
        digits, place = [], x
        for _ in range(depth):
            place *= FANOUT
            digits.append(int(place))
            place -= digits[-1]
        rows: list[Increments] = []
        for descent in kept:
            rows = max(rows, descent.rows[: _num_equal(digits, descent.digits) + 1], key=len)
        rows, node = list(rows), 1  # node numbers: the root is 1, the children of n are FANOUT n + digit
        for n, digit in enumerate(digits):
            if n == len(rows):
                rows.append(self._equal.split(whole, *self._rng.normal(FANOUT, step, node)))
            if n + 1 == len(rows):
                whole = rows[n].slice(digit, digit + 1)
            node = node * FANOUT + digit
        leaf = Partition.of([place, 1 - place], self._row).split(whole, *self._rng.normal(2, step, node))
        found = Descent(step, x, rows, digits, leaf)
        self._cache.keep(leaf.W, found, *self._cache.latest[: _CACHED_DESCENTS - 1])
        return found


def _num_equal(one: list[int], other: list[int]) -> int:
    """The length of the common beginning of two lists of digits."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
