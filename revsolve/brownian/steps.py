"""The Brownian path over steps between known knots: step n is sqrt(h_n) * N(seed, n), drawn when asked for."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from revsolve.brownian.noise import Noise
from revsolve.brownian.space_time import Spans, scaled

_BLOCK_STEPS = 64  # drawn at once: spreads the cost of seeding a generator
_BLOCK_NUMBERS = 2**18
_ROUNDINGS = 4


class Block(NamedTuple):
    """Consecutive steps of the grid, together and one by one."""

    spans: Spans
    forward: tuple[Tensor, ...]
    areas: tuple[Tensor, ...]
    pairs: list[Tensor]  # each step and the next one together, once they are asked for
    known: dict[tuple[float, float], Tensor]  # W by its times: of these, and of each step backward


class Steps:
    """Steps between increasing knots; keeps two blocks of them, so that a sweep in either direction draws each once."""

    def __init__(self, noise: Noise, knots: list[float]) -> None:
        self.knots = knots
        self.last = len(knots) - 2  # number of the last step
        self._noise = noise
        self._block_steps = max(1, min(_BLOCK_STEPS, _BLOCK_NUMBERS // max(1, noise.size.numel())))
        self._blocks: dict[int, Block] = {}
        self._slack = _ROUNDINGS * torch.finfo(torch.float64).eps * max(abs(knots[0]), abs(knots[-1]))

    def block(self, step: int) -> tuple[Block, int]:
        """Return the block that holds the step, and the step's place in it."""
        number, row = divmod(step, self._block_steps)
        return self._blocks.get(number) or self._draw(number), row

    def known(self, ta: float, tb: float) -> Tensor | None:
        """Return W over a step, or two, of the blocks that are kept."""
        for block in self._blocks.values():
            if (W := block.known.get((ta, tb))) is not None:
                return W
        return None

    def whole(self, step: int) -> Spans:
        """Return one step."""
        block, row = self.block(step)
        return block.spans.part(row, row + 1)

    def two(self, step: int) -> Tensor:
        """Return W over one step and the next."""
        block, row = self.block(step)
        if row + 1 == len(block.forward):
            following, first = self.block(step + 1)
            return block.forward[row] + following.forward[first]
        return (block.pairs or self._paired(block, step - row))[row]

    def between(self, start: int, stop: int) -> list[Spans]:
        """Return the steps from number `start` up to `stop`, those of a block joined, so that few are held."""
        groups = []
        while start < stop:
            block, row = self.block(start)
            group = block.spans.part(row, row + stop - start)
            groups.append(group.joined())
            start += len(group.widths)
        return groups

    def locate(self, t: float) -> tuple[int, float]:
        """Return the step in which t lies and the fraction of it before t; 0 at a knot, up to rounding."""
        step = bisect_right(self.knots, t) - 1
        knot = min((step, min(step + 1, self.last + 1)), key=lambda n: abs(self.knots[n] - t))
        if abs(self.knots[knot] - t) <= self._slack:
            return knot, 0.0
        return step, (t - self.knots[step]) / (self.knots[step + 1] - self.knots[step])

    @torch.inference_mode(False)
    def _paired(self, block: Block, start: int) -> list[Tensor]:
        block.pairs.extend((block.spans.W[:-1] + block.spans.W[1:]).unbind())
        knots = self.knots[start : start + len(block.forward) + 1]
        block.known.update(zip(zip(knots, knots[2:], strict=False), block.pairs, strict=True))
        return block.pairs

    @torch.inference_mode(False)  # what is kept may meet autograd later
    def _draw(self, number: int) -> Block:
        start = number * self._block_steps
        knots = self.knots[start : start + self._block_steps + 1]
        steps = list(pairwise(knots))
        widths = [end - begin for begin, end in steps]
        spans = scaled(widths, *self._noise.draw(len(widths), number, 0))
        areas = () if spans.H is None else spans.H.unbind()
        if len(self._blocks) == 2:
            del self._blocks[max(self._blocks, key=lambda kept: abs(kept - number))]
        forward = spans.W.unbind()
        known = dict(zip(steps, forward, strict=True))
        known.update(zip(zip(knots[1:], knots, strict=False), (-spans.W).unbind(), strict=True))
        self._blocks[number] = Block(spans, forward, areas, [], known)
        return self._blocks[number]
