"""The Brownian motion that drives a solve: the one that was given, or a new one over its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from revsolve.brownian.path import BrownianPath, clamped
from revsolve.compat.torchsde import as_brownian
from revsolve.core.arithmetic import Time
from revsolve.extras.per_sample_steps import BatchedTime
from revsolve.field.functorch import outside, sample_numbers

Path = Callable[..., Any]  # path(t0, t1) is W over a span in either direction, path(t0, t1, return_H=True) is (W, H)


def brownian(bm: Any, times: list[float], size: tuple[int, ...], y0: Tensor, area: bool, knots: dict[str, Any]) -> Path:
    """A Brownian motion over the times: `bm`, or a new one with these knots."""
    if torch.compiler.is_dynamo_compiling():
        return _followed(bm, size, y0, area, **knots)
    return _new(times, size, y0, area, knots) if bm is None else _given(bm, times, size, y0, area)


def _given(bm: Any, times: list[float], size: tuple[int, ...], y0: Tensor, area: bool) -> Path:
    """The Brownian motion that was passed. Raises unless it fits the equation."""
    path = as_brownian(bm, area=area)
    if tuple(path.shape) != size:
        raise ValueError(f"bm has shape {tuple(path.shape)}, but this SDE needs {size}: make the path with that size.")
    if path.dtype != y0.dtype or path.device != y0.device:
        raise ValueError(
            f"bm is of {path.dtype} on {path.device}, but y0 of {y0.dtype} on {y0.device}: make the path with those."
        )
    for t in (times[0], times[-1]):
        clamped(t, path.t0, path.t1, path.dtype)
    return path


def _new(times: list[float], size: tuple[int, ...], y0: Tensor, area: bool, knots: dict[str, Any]) -> Path:
    """One whose seed comes from torch's generator; inside torch.vmap for all samples or each, as its `randomness` says."""
    end = times[-1] if len(times) > 1 else times[0] + 1.0
    num_samples, number = sample_numbers(y0.device)
    with outside():
        path = BrownianPath(
            times[0],
            end,
            size if number is None else (num_samples, *size),
            dtype=y0.dtype,
            device=y0.device,
            levy_area="space-time" if area else "none",
            **knots,
        )
    return path if number is None else _Mapped(path, lambda x, t0, t1: _row(x, number))


def _followed(bm: Any, size: tuple[int, ...], y0: Tensor, area: bool, grid: Sequence[float] = (0.0, 1.0)) -> Path:
    """One that torch.compile can follow. Raises where there is none."""
    if bm is not None:
        raise ValueError(
            "torch.compile cannot follow how a Brownian path draws its noise: leave out bm=, and the compiled program draws it, "
            "or solve outside of what is compiled."
        )
    if area:
        raise ValueError(
            "methods with space-time area need noise that torch.compile cannot follow: use another, say 'reversible_heun', or "
            "solve outside of what is compiled."
        )
    return _Presampled(grid, size, y0)


class _Presampled:
    """A Brownian motion known at the knots alone, sampled at once by torch's default generator."""

    def __init__(self, knots: Sequence[float], size: tuple[int, ...], y0: Tensor) -> None:
        self.position = {t: n for n, t in enumerate(knots)}
        normal = torch.randn(len(knots) - 1, *size, dtype=y0.dtype, device=y0.device)
        self.increments = [(b - a) ** 0.5 * x for (a, b), x in zip(pairwise(knots), normal.unbind(), strict=True)]

    def __call__(self, ta: float, tb: float) -> Tensor:
        start, stop = self.position[ta], self.position[tb]
        return self.increments[start] if start < stop else -self.increments[stop]


def of_each_sample(path: Path, clock: BatchedTime) -> Path:
    """The Brownian motion of samples with times of their own, given one in the step variable that all share.

    Where time runs at the rate r, W of a span has r times the variance, and so has its space-time area.
    """
    return _Mapped(path, lambda x, s0, s1: x * clock.rate(s0, s1).sqrt())


class _Mapped:
    """A path whose answers over a span are changed: apply(W, t0, t1), and the same for H."""

    def __init__(self, path: Path, apply: Callable[[Tensor, Time, Time], Tensor]) -> None:
        self.path, self.apply = path, apply

    def __call__(self, t0: Time, t1: Time, return_H: bool = False) -> Any:
        if not return_H:
            return self.apply(self.path(t0, t1), t0, t1)
        W, H = self.path(t0, t1, return_H=True)
        return self.apply(W, t0, t1), self.apply(H, t0, t1)


def _row(x: Tensor, number: Tensor) -> Tensor:
    """x[number], for which torch 2.9 would read the number."""
    return x.index_select(0, number.reshape(1)).squeeze(0)
