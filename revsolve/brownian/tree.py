"""A virtual Brownian tree: the path between two knots, as a pure function of W and H over them and of a seed.

A node splits into `FANOUT` equal children by the exact conditional law of (W, H) given the node's own. At the bottom a
leaf is split at the queried point itself by the same law, so that a query needs no depth beyond the tolerance.

Paper: Jelincic, Foster and Kidger (2024), "Single-seed generation of Brownian paths and integrals", with two children
a node.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple, TypeVar

import torch

from revsolve.brownian.noise import Noise
from revsolve.brownian.space_time import Shares, Spans, difference

FANOUT = 8  # a power of two: then the digits of a place are exact
_CACHED_NUMBERS = 2**22
_CACHED_WALKS = 3  # a span's two ends, and the start of the next one

Key = TypeVar("Key")
Value = TypeVar("Value")


class Walk(NamedTuple):
    """The way down to a point: the children met and the digit taken at each depth; the leaf split at the point."""

    rows: list[Spans]
    digits: list[int]
    leaf: Spans  # two spans, before and after the point


class Tree:
    """Splits the steps of a grid; keeps a few walks' worth of nodes, so that neighbouring queries share their way."""

    def __init__(self, noise: Noise, tol: float) -> None:
        self._noise = noise
        self._tol = tol
        self._row = torch.empty((0, *noise.size), dtype=noise.dtype, device=noise.device)
        self._equal = Shares.of([1.0] * FANOUT, self._row)
        self._walks: OrderedDict[tuple[int, float], Walk] = OrderedDict()
        self._nodes: OrderedDict[tuple[int, int], Spans] = OrderedDict()
        numbers_per_node = max(1, (1 + noise.areas) * FANOUT * noise.size.numel())
        self._num_nodes = min(64, max(16, _CACHED_NUMBERS // numbers_per_node))

    def between(self, step: int, whole: Spans, x: float, y: float) -> list[Spans]:
        """Return adjacent groups that make up the fraction from x to y, 0 < x < y < 1, of the grid's step."""
        start, end = self._walk(step, whole, x), self._walk(step, whole, y)
        same = [a == b for a, b in zip(start.digits, end.digits, strict=True)]
        if all(same):
            return [difference(end.leaf.part(0, 1), start.leaf.part(0, 1))]
        fork = same.index(False)
        middle = start.rows[fork].part(start.digits[fork] + 1, end.digits[fork])
        return [*_after(start, fork + 1), middle, *_before(end, fork + 1)]

    def before(self, step: int, whole: Spans, x: float) -> list[Spans]:
        """Return adjacent groups that make up the first fraction 0 < x < 1 of the grid's step."""
        return _before(self._walk(step, whole, x), 0)

    def after(self, step: int, whole: Spans, x: float) -> list[Spans]:
        """Return adjacent groups that make up what follows the first fraction 0 < x < 1 of the grid's step."""
        return _after(self._walk(step, whole, x), 0)

    def _walk(self, step: int, whole: Spans, x: float) -> Walk:
        walk = self._walks.get((step, x))
        if walk is None:
            walk = self._descend(step, whole, x)
            _keep(self._walks, (step, x), walk, _CACHED_WALKS)
        return walk

    def _descend(self, step: int, whole: Spans, x: float) -> Walk:
        depth = max(0, math.ceil(math.log(whole.widths[0] / self._tol, FANOUT) - 1e-9))
        rows, digits, node = [], [], 1  # node numbers: the root is 1, the children of n are FANOUT n + digit
        for _ in range(depth):
            row = self._children(step, node, whole)
            x *= FANOUT
            digit = int(x)
            x -= digit
            rows.append(row)
            digits.append(digit)
            whole = row.part(digit, digit + 1)
            node = node * FANOUT + digit
        leaf = Shares.of([x, 1 - x], self._row).split(whole, *self._noise.draw(2, step, node))
        return Walk(rows, digits, leaf)

    def _children(self, step: int, node: int, whole: Spans) -> Spans:
        row = self._nodes.get((step, node))
        if row is None:
            row = self._equal.split(whole, *self._noise.draw(FANOUT, step, node))
        _keep(self._nodes, (step, node), row, self._num_nodes)
        return row


def _keep(cache: OrderedDict[Key, Value], key: Key, value: Value, capacity: int) -> None:
    """Make an entry the latest of a cache and drop the oldest beyond its capacity."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > capacity:
        cache.popitem(last=False)


def _before(walk: Walk, depth: int) -> list[Spans]:
    """What lies before the point within the node at this depth of the walk, in order of time."""
    below = zip(walk.rows[depth:], walk.digits[depth:], strict=True)
    return [*(row.part(0, digit) for row, digit in below), walk.leaf.part(0, 1)]


def _after(walk: Walk, depth: int) -> list[Spans]:
    """What lies after the point within the node at this depth of the walk, in order of time."""
    below = list(zip(walk.rows[depth:], walk.digits[depth:], strict=True))
    return [walk.leaf.part(1, 2), *(row.part(digit + 1, FANOUT) for row, digit in reversed(below))]
