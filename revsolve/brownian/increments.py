"""Increments W and space-time areas H of a Brownian path over adjacent intervals: how they join, and their law when split.

For an interval s -> t of length h, with W = W_t - W_s,

    H = 1/h * integral over [s, t] of ( W_r - W_s - (r - s)/h * W ) dr.

W ~ N(0, h) and H ~ N(0, h/12) are independent of each other and of those of every disjoint interval. Over adjacent
intervals of lengths h_i that make up h (Chen's relation, written without cancelling terms)

    W = sum of W_i,     H = sum of p_i H_i + c_i W_i,     p_i = h_i/h,  c_i = (length after i - length before i)/(2h).

Reversing time reverses the order and the signs of W_i and c_i, so W flips its sign and H stays as it is.

Paper: Foster, Lyons and Oberhauser (2020), "An optimal polynomial approximation of Brownian motion".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Increments(NamedTuple):
    """Adjacent intervals in order: lengths (units of time), W and H over each, (number, *size); H None if unwanted."""

    lengths: list[float]
    W: Tensor
    H: Tensor | None

    def slice(self, start: int, stop: int) -> Increments:
        """Return those of the intervals from number `start` up to `stop`."""
        return Increments(self.lengths[start:stop], self.W[start:stop], None if self.H is None else self.H[start:stop])

    def total(self) -> Increments:
        """Return those of the one interval that they make up."""
        W, length = self.W.sum(0, keepdim=True), [math.fsum(self.lengths)]
        if self.H is None or len(self.lengths) == 1:
            return Increments(length, W, self.H)
        return Increments(length, W, Partition.of(self.lengths, self.W).area(self.W, self.H))


class Partition(NamedTuple):
    """An interval cut into parts: their fractions p of its length, and columns (parts, 1, ..., 1) of p and Chen's c."""

    fractions: list[float]
    p: Tensor
    c: Tensor
    root: Tensor  # sqrt(p)
    pc12: Tensor  # 12 p c
    square: Tensor  # p^2

    @classmethod
    def of(cls, lengths: list[float], like: Tensor) -> Partition:
        """Return the partition into parts of these lengths (units of time), to scale rows like the given ones."""
        ends = list(accumulate(lengths))
        total = ends[-1]
        ps = [h / total for h in lengths]
        cs = [(total + h - 2 * end) / (2 * total) for h, end in zip(lengths, ends, strict=True)]
        pc12 = [12 * p * c for p, c in zip(ps, cs, strict=True)]
        columns = column([ps, cs, [math.sqrt(p) for p in ps], pc12, [p * p for p in ps]], like)
        return cls(ps, *columns.unbind())

    def area(self, W: Tensor, H: Tensor) -> Tensor:
        """Return H of the whole interval, shape (1, *size)."""
        return torch.addcmul(self.p * H, self.c, W).sum(0, keepdim=True)  # not a matmul, which may run in TF32

    def split(self, whole: Increments, W: Tensor, H: Tensor | None) -> Increments:
        """Return increments of the parts with their exact law given the whole's W and H, from standard normal rows W and H.

        A Gaussian x given A x = b is distributed as x + cov(x, Ax) var(Ax)^-1 (b - A x). Here x is independent W_i, H_i
        and A joins them: the outputs are independent with variances h and h/12, and cov(W_i, W) = p_i h,
        cov(W_i, H) = p_i c_i h, cov(H_i, W) = 0, cov(H_i, H) = p_i^2 h/12.
        """
        length = whole.lengths[0]
        lengths = [length * p for p in self.fractions]
        free_W = W * (self.root * math.sqrt(length))
        part_W = torch.addcmul(free_W, self.p, whole.W - free_W.sum(0, keepdim=True))
        if H is None or whole.H is None:
            return Increments(lengths, part_W, None)
        free_H = H * (self.root * math.sqrt(length / 12))
        missing = whole.H - self.area(free_W, free_H)
        return Increments(
            lengths, torch.addcmul(part_W, self.pc12, missing), torch.addcmul(free_H, self.square, missing)
        )


def column(values: Sequence[float] | Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Return values as a tensor (..., len(values), 1, ..., 1) that scales such rows; the device is not waited for."""
    column = torch.tensor(values, dtype=like.dtype, device="cpu")
    return column.view(*column.shape, *[1] * (like.ndim - 1)).to(like.device, non_blocking=True)


def concatenate(groups: Sequence[Increments]) -> Increments:
    """Return adjacent groups of increments as one group."""
    areas = [group.H for group in groups if group.H is not None]
    lengths = [h for group in groups for h in group.lengths]
    return Increments(lengths, torch.cat([group.W for group in groups]), torch.cat(areas) if areas else None)


def independent(lengths: list[float], W: Tensor, H: Tensor | None) -> Increments:
    """Return increments over adjacent intervals of these lengths, from standard normal rows W and H."""
    roots = column([math.sqrt(h) for h in lengths], W)
    return Increments(lengths, W * roots, None if H is None else H * (roots / math.sqrt(12)))


def remainder(long: Increments, short: Increments) -> Increments:
    """Return what follows `short` in `long`, single intervals with the same start: Chen's relation solved for a part."""
    y, x = long.lengths[0], short.lengths[0]
    W = long.W - short.W
    if long.H is None or short.H is None:
        return Increments([y - x], W, None)
    return Increments([y - x], W, (y * long.H - x * short.H - ((y - x) * short.W - x * W) / 2) / (y - x))
