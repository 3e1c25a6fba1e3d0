"""Brownian motion over the steps of a grid, drawn at once by torch's own generator: for torch.compile, which follows no other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class DrawnPath:
    """A Brownian motion known at the knots alone: `path(ta, tb)` is W(tb) - W(ta) for neighbouring knots, in either order."""

    def __init__(self, knots: Sequence[float], size: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.place = {t: n for n, t in enumerate(knots)}
        noise = torch.randn(len(knots) - 1, *size, dtype=dtype, device=device)
        self.steps = [(b - a) ** 0.5 * W for (a, b), W in zip(pairwise(knots), noise.unbind(), strict=True)]

    def __call__(self, ta: float, tb: float) -> Tensor:
        start, stop = self.place[ta], self.place[tb]
        return self.steps[start] if start < stop else -self.steps[stop]
