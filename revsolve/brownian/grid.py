"""The Brownian path over the steps between known knots: that of step n is sqrt(h_n) * N(seed, n), drawn when asked for."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from revsolve.brownian.counter_rng import CounterRNG
from revsolve.brownian.increments import Increments, independent
from revsolve.brownian.thread_cache import ThreadCache

_BLOCK_STEPS = 64  # drawn at once: spreads the cost of seeding a generator
_BLOCK_NUMBERS = 2**18
_ROUNDINGS = 4


class Block(NamedTuple):
    """Consecutive steps of the grid."""

    number: int
    increments: Increments
    W: dict[
        tuple[float, float], Tensor
    ]  # by times: of each step in both directions; of two, once one such was asked for
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
