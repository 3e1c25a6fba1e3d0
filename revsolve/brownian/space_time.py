"""Gaussian calculus of a Brownian path's increments W and space-time areas H over adjacent spans.

For a span s -> t of length h, with W = W_t - W_s,

    H = 1/h * integral over [s, t] of ( W_r - W_s - (r - s)/h * W ) dr.

W ~ N(0, h) and H ~ N(0, h/12) are independent of each other and of those of every disjoint span. Over adjacent spans
of lengths h_i that make up h (Chen's relation, written without cancelling terms)

    W = sum of W_i,     H = sum of p_i H_i + c_i W_i,     p_i = h_i/h,  c_i = (length after i - length before i)/(2h).

Turning a span round reverses the order and the signs of W_i and c_i, so W flips its sign and H stays as it is.

Paper: Foster, Lyons and Oberhauser (2020), "An optimal polynomial approximation of Brownian motion".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Adjacent spans in order: widths (units of time), W and H over each, (num_spans, *size); H None if unwanted."""

    widths: list[float]
    W: Tensor
    H: Tensor | None

    def part(self, start: int, stop: int) -> Spans:
        """Return the spans from number `start` up to `stop`."""
        return Spans(self.widths[start:stop], self.W[start:stop], None if self.H is None else self.H[start:stop])

    def joined(self) -> Spans:
        """Return the one span that they make up."""
        W, total = self.W.sum(0, keepdim=True), [math.fsum(self.widths)]
        if self.H is None or len(self.widths) == 1:
            return Spans(total, W, self.H)
        return Spans(total, W, Shares.of(self.widths, self.W).area(self.W, self.H))


class Shares(NamedTuple):
    """Fractions p of a whole's width that spans take, and columns (num_spans, 1, ..., 1) made from p and Chen's c."""

    fractions: list[float]
    p: Tensor
    c: Tensor
    root: Tensor  # sqrt(p)
    pc12: Tensor  # 12 p c
    square: Tensor  # p^2

    @classmethod
    def of(cls, widths: list[float], like: Tensor) -> Shares:
        """Return the shares of spans of these widths (units of time), to scale rows like the given ones."""
        ends = list(accumulate(widths))
        total = ends[-1]
        ps = [h / total for h in widths]
        cs = [(total + h - 2 * end) / (2 * total) for h, end in zip(widths, ends, strict=True)]
        pc12 = [12 * p * c for p, c in zip(ps, cs, strict=True)]
        columns = column([ps, cs, [math.sqrt(p) for p in ps], pc12, [p * p for p in ps]], like)
        return cls(ps, *columns.unbind())

    def area(self, W: Tensor, H: Tensor) -> Tensor:
        """Return the whole's H, shape (1, *size)."""
        return torch.addcmul(self.p * H, self.c, W).sum(0, keepdim=True)  # not a matmul, which may run in TF32

    def split(self, whole: Spans, W: Tensor, H: Tensor | None) -> Spans:
        """Return parts of a whole with their exact law given its W and H, from standard normal rows W and H.

        A Gaussian x given A x = b is distributed as x + cov(x, Ax) var(Ax)^-1 (b - A x). Here x is independent W_i, H_i
        and A joins them: the outputs are independent with variances h and h/12, and cov(W_i, W) = p_i h,
        cov(W_i, H) = p_i c_i h, cov(H_i, W) = 0, cov(H_i, H) = p_i^2 h/12.
        """
        width = whole.widths[0]
        widths = [width * p for p in self.fractions]
        free_W = W * (self.root * math.sqrt(width))
        part_W = torch.addcmul(free_W, self.p, whole.W - free_W.sum(0, keepdim=True))
        if H is None or whole.H is None:
            return Spans(widths, part_W, None)
        free_H = H * (self.root * math.sqrt(width / 12))
        missing = whole.H - self.area(free_W, free_H)
        return Spans(widths, torch.addcmul(part_W, self.pc12, missing), torch.addcmul(free_H, self.square, missing))


def column(values: Sequence[float] | Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Return values as a tensor (..., len(values), 1, ..., 1) that scales such rows; the device is not waited for."""
    column = torch.tensor(values, dtype=like.dtype, device="cpu")
    return column.view(*column.shape, *[1] * (like.ndim - 1)).to(like.device, non_blocking=True)


def concatenate(groups: Sequence[Spans]) -> Spans:
    """Return adjacent groups of spans as one group."""
    areas = [group.H for group in groups if group.H is not None]
    widths = [h for group in groups for h in group.widths]
    return Spans(widths, torch.cat([group.W for group in groups]), torch.cat(areas) if areas else None)


def scaled(widths: list[float], W: Tensor, H: Tensor | None) -> Spans:
    """Return independent spans of a Brownian path, from standard normal rows W and H."""
    roots = column([math.sqrt(h) for h in widths], W)
    return Spans(widths, W * roots, None if H is None else H * (roots / math.sqrt(12)))


def difference(long: Spans, short: Spans) -> Spans:
    """Return what follows `short` in `long`, single spans with the same start: Chen's relation solved for a part."""
    y, x = long.widths[0], short.widths[0]
    W = long.W - short.W
    if long.H is None or short.H is None:
        return Spans([y - x], W, None)
    return Spans([y - x], W, (y * long.H - x * short.H - ((y - x) * short.W - x * W) / 2) / (y - x))
