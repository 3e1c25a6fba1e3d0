"""A virtual Brownian tree: the path between two knots, as a pure function of W and H over them and of a seed.

A node splits into `FANOUT` equal children by the exact conditional law of (W, H) given the node's own. At the bottom a
leaf is split at the queried point itself by the same law, so that a query needs no depth beyond the tolerance.

Paper: Jelincic, Foster and Kidger (2024), "Single-seed generation of Brownian paths and integrals", with two children
a node.
"""

from __future__ import annotations

import math
from itertools import takewhile
from typing import NamedTuple

import torch

from revsolve.brownian.counter_rng import CounterRNG
from revsolve.brownian.increments import Increments, Partition, remainder
from revsolve.brownian.thread_cache import ThreadCache

FANOUT = 8  # a power of two: then the digits of a place are exact
_CACHED_DESCENTS = 3  # to both ends of an interval, and to the start of the next one


class Descent(NamedTuple):
    """The way down to a point x of a step: the children met and the digit taken at each depth; the leaf split at x."""

    step: int
    x: float
    rows: list[Increments]
    digits: list[int]
    leaf: Increments  # before and after the point


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
        start, end = self._descend(step, whole, x), self._descend(step, whole, y)
        fork = _num_equal(start.digits, end.digits)
        if fork == len(start.digits):
            return [remainder(end.leaf.slice(0, 1), start.leaf.slice(0, 1))]
        middle = start.rows[fork].slice(start.digits[fork] + 1, end.digits[fork])
        return [*_after(start, fork + 1), middle, *_before(end, fork + 1)]

    def before(self, step: int, whole: Increments, x: float) -> list[Increments]:
        """Return adjacent groups that make up the first fraction 0 < x < 1 of the grid's step."""
        return _before(self._descend(step, whole, x), 0)

    def after(self, step: int, whole: Increments, x: float) -> list[Increments]:
        """Return adjacent groups that make up what follows the first fraction 0 < x < 1 of the grid's step."""
        return _after(self._descend(step, whole, x), 0)

    def _descend(self, step: int, whole: Increments, x: float) -> Descent:
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


def _before(descent: Descent, depth: int) -> list[Increments]:
    """Those before the point within the node at this depth of the descent, in order of time."""
    below = zip(descent.rows[depth:], descent.digits[depth:], strict=True)
    return [*(row.slice(0, digit) for row, digit in below), descent.leaf.slice(0, 1)]


def _after(descent: Descent, depth: int) -> list[Increments]:
    """Those after the point within the node at this depth of the descent, in order of time."""
    below = list(zip(descent.rows[depth:], descent.digits[depth:], strict=True))
    return [descent.leaf.slice(1, 2), *(row.slice(digit + 1, FANOUT) for row, digit in reversed(below))]
