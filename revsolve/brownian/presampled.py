"""Brownian motion over the steps of a grid, sampled at once by torch's default generator, as torch.compile follows no other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class PresampledPath:
    """A Brownian motion known at the knots alone: `path(ta, tb)` is W(tb) - W(ta) for neighbouring knots, in either order."""

    def __init__(self, knots: Sequence[float], size: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.position = {t: n for n, t in enumerate(knots)}
        normal = torch.randn(len(knots) - 1, *size, dtype=dtype, device=device)
        self.increments = [(b - a) ** 0.5 * x for (a, b), x in zip(pairwise(knots), normal.unbind(), strict=True)]

    def __call__(self, ta: float, tb: float) -> Tensor:
        start, stop = self.position[ta], self.position[tb]
        return self.increments[start] if start < stop else -self.increments[stop]
