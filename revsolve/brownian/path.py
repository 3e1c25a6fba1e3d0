"""Brownian motion that answers W, and its space-time area H, over any span, in any order and in both directions.

    path(ta, tb) = W(tb) - W(ta)

The noise over the steps of a known grid is a function of seed and step number; between two knots the path is a virtual Brownian
tree, whose noise is a function of seed and node. Neither is stored, but for small caches.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from revsolve.brownian.increments import Increments, concatenate
from revsolve.brownian.noise import BrownianTree, CounterRNG, GridIncrements, ThreadCache
from revsolve.field.functorch import exported, outside, transformed

_ROUNDINGS = 4  # a solver's first and last times may miss ours by so much
_FINEST = 2**-50  # relative to times, the length that their rounding leaves a meaning


class BrownianPath:
    """A Brownian motion over [t0, t1] that its seed repeats exactly.

    `path(ta, tb)` returns W(tb) - W(ta) of shape `size` with variance |tb - ta|, negated where tb < ta.
    `path(ta, tb, return_H=True)` returns (W, H) with the space-time area over the span of length h,
    H = 1/h * integral of (W_r - W_ta - (r - ta)/h * W) dr: independent of W, of variance h/12, the same in both
    directions. The tensors may be views of a cache: do not write into them.

    Values depend on the arguments below, never on which queries came before, nor on the threads that share the path; a copy
    is the same path. The numbers that a thread keeps are bounded whatever the number of steps or queries. One step of the
    grid costs about as much as `torch.randn`; an interval over many knots sums over their steps; a time between knots takes
    a descent of a tree.

    Args:
        t0: start of the interval (units of time).
        t1: end of the interval, after t0.
        size: shape of the increments.
        seed: any integer. None draws one from torch's default generator, so that `torch.manual_seed` repeats the path.
        dtype: floating dtype of the increments.
        device: where the increments live. A query never waits for it, unless the times are tensors there.
        noise_device: where the noise is drawn, `device` by default. Generators of different devices differ, and CUDA's
            may differ between GPU models; "cpu" gives the same path everywhere, for the price of copying noise over.
        grid: knots t0 < ... < t1 (floats or a 1-D tensor), usually a solver's steps. They shape the path's values.
        dt: instead of `grid`: knots every dt from t0 on, and t1.
        levy_area: "none", or "space-time" to have H.
        tol: width at which the tree ends, 2^-24 (t1 - t0) by default; a coarser one is faster. Spans longer than tol
            have the exact law; a shorter one is additive and continuous, but may be too smooth.

    Raises:
        TypeError: the seed is no integer, or the dtype is not floating.
        ValueError: t0 >= t1; a grid that does not increase from t0 to t1; grid and dt together; dt or tol not positive;
            an unknown levy_area. By a query: a time more than four roundings (of the time's dtype, else of the path's)
            outside [t0, t1], nearer ones being clamped; H of a path without it.

    On the CPU torch reduces seeds to 32 bits: among 10^4 blocks or nodes two share their noise with probability 1 %.

    Papers: Kidger, Foster, Li and Lyons (2021), "Efficient and accurate gradients for neural SDEs"; Jelincic, Foster
    and Kidger (2024), "Single-seed generation of Brownian paths and integrals".

    Example:
        >>> path = BrownianPath(0.0, 1.0, (64, 4), seed=0, dt=0.01)
        >>> torch.equal(path(0.26, 0.25), -path(0.25, 0.26))
        True
    """

    def __init__(
        self,
        t0: float,
        t1: float,
        size: Sequence[int],
        *,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        noise_device: str | torch.device | None = None,
        grid: Sequence[float] | Tensor | None = None,
        dt: float | None = None,
        levy_area: Literal["none", "space-time"] = "none",
        tol: float | None = None,
    ) -> None:
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, but is {dtype}: pass for example torch.float32.")
        if levy_area not in ("none", "space-time"):
            raise ValueError(f'levy_area must be "none" or "space-time", but is {levy_area!r}.')
        knots = _knots(float(t0), float(t1), grid, dt)
        self.t0, self.t1 = knots[0], knots[-1]
        self.shape, self.dtype, self.device = torch.Size(size), dtype, torch.device(device)
        self.levy_area = levy_area
        finest = _FINEST * max(abs(self.t0), abs(self.t1))
        self.tol = max(finest, 2**-24 * (self.t1 - self.t0)) if tol is None else tol
        if not finest <= self.tol < math.inf:
            raise ValueError(f"tol must be finite and at least {finest} (rounding of times), but is {tol}: raise it.")
        if seed is not None and not hasattr(seed, "__index__"):
            raise TypeError(f"seed must be an integer, but is {seed!r}: pass one, or None to draw it from torch.")
        drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu") if seed is None else seed
        self.seed = operator.index(drawn)
        source = self.device if noise_device is None else torch.device(noise_device)
        with outside():  # a path made within a transform belongs to none
            rng = CounterRNG(self.seed, self.shape, dtype, self.device, source, levy_area == "space-time")
            self._grid = GridIncrements(rng, knots)
            self._tree = BrownianTree(rng, self.tol)
        self._cache = ThreadCache()  # of one interval, as a reversible step asks for both of its directions

    def __repr__(self) -> str:
        return (
            f"BrownianPath({self.t0}, {self.t1}, {tuple(self.shape)}, seed={self.seed}, dtype={self.dtype}, "
            f"device='{self.device}', steps={self._grid.last + 1}, levy_area={self.levy_area!r})"
        )

    @overload
    def __call__(self, ta: float, tb: float, return_H: Literal[False] = False) -> Tensor: ...
    @overload
    def __call__(self, ta: float, tb: float, return_H: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def __call__(self, ta: float, tb: float, return_H: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return W(tb) - W(ta), or (W, H): see the class."""
        if not return_H and (W := self._grid.cached(ta, tb)) is not None:
            return W
        if transformed() or exported():  # what is kept must belong to no transform, nor to a program
            with outside():
                return self(ta, tb, return_H)  # type: ignore[call-overload]
        if return_H:
            require_area(self)
        a, b = float(ta), float(tb)
        W, H = self._grid.between_knots(a, b) or (None, None)
        if W is None or (return_H and H is None):
            total = self._between(*(clamped(t, self.t0, self.t1, self.dtype) for t in (ta, tb)))
            W, H = total.W[0] if a <= b else -total.W[0], None if total.H is None else total.H[0]
        return W if H is None or not return_H else (W, H)

    @torch.inference_mode(False)  # what is kept may meet autograd later
    def _between(self, ta: float, tb: float) -> Increments:
        """Return W and H between two times, of the earlier to the later."""
        low, high = min(ta, tb), max(ta, tb)
        if self._cache.latest[:2] == (low, high):
            return self._cache.latest[2]
        total = self._join(self._grid.locate(low), self._grid.locate(high))
        self._cache.keep(total.W, low, high, total)
        return total

    def _join(self, start: tuple[int, float], end: tuple[int, float]) -> Increments:
        """Return the increments between two places: the end of a step, whole steps, the start of a step."""
        grid, tree = self._grid, self._tree
        (first, x), (last, y) = start, end
        if start == end:
            zero = torch.zeros(1, *self.shape, dtype=self.dtype, device=self.device)
            return Increments([0.0], zero, None if self.levy_area == "none" else zero)
        if first == last and x > 0:
            return concatenate(tree.between(first, grid.step(first), x, y)).total()
        groups = []
        if x > 0:
            groups += tree.descend(first, grid.step(first), x).after()
            first += 1
        groups += grid.between(first, last)
        if y > 0:
            groups += tree.descend(last, grid.step(last), y).before()
        return concatenate(groups).total()


def clamped(t: float | Tensor, t0: float, t1: float, dtype: torch.dtype) -> float:
    """Return a query time as a float within [t0, t1]; ValueError where it is further outside than rounding explains."""
    value = float(t)
    times = t.dtype if isinstance(t, Tensor) and t.is_floating_point() else dtype
    eps = torch.finfo(torch.float64 if times == torch.float64 else torch.float32).eps
    slack = min(_ROUNDINGS * eps * max(abs(t0), abs(t1)), 0.01 * (t1 - t0))  # far from zero, roundings may be long
    if not t0 - slack <= value <= t1 + slack:
        raise ValueError(
            f"A Brownian increment was asked at t = {value}, outside the path's interval [{t0}, {t1}]: "
            "make the path with t0 and t1 that cover all times of the solve."
        )
    return min(max(value, t0), t1)


def require_area(path: Any) -> None:
    """Raise ValueError where a path has no space-time area."""
    if path.levy_area == "none":
        raise ValueError(
            'the space-time area H was asked of a Brownian motion without: make it with levy_area="space-time", paths of '
            'torchsde with levy_area_approximation="space-time".'
        )


def _knots(t0: float, t1: float, grid: Sequence[float] | Tensor | None, dt: float | None) -> list[float]:
    """Return the knots t0 < ... < t1 that `grid` or `dt` describe; without either, t0 and t1."""
    if not -math.inf < t0 < t1 < math.inf:
        raise ValueError(f"t0 < t1 is needed, but t0 = {t0} and t1 = {t1}: a path is made forward and read both ways.")
    if grid is not None and dt is not None:
        raise ValueError(f"grid and dt = {dt} were both given: pass one of them.")
    if dt is not None:
        if not 0 < dt < math.inf:
            raise ValueError(f"dt must be positive, but is {dt}: pass a step size in units of time.")
        rounding = 2**-40 * (t1 - t0) + _FINEST * max(abs(t0), abs(t1))
        num_steps = max(1, math.ceil((t1 - t0 - rounding) / dt))  # no sliver of a last step
        return [t0 + n * dt for n in range(num_steps)] + [t1]
    if grid is None:
        return [t0, t1]
    knots: list[float] = torch.as_tensor(grid, dtype=torch.float64, device="cpu").tolist()
    if len(knots) < 2 or (knots[0], knots[-1]) != (t0, t1):
        ends = f"from {knots[0]} to {knots[-1]}" if knots else "nowhere"
        raise ValueError(f"grid must run from t0 = {t0} to t1 = {t1}, but runs {ends}: start and end it there.")
    for n, (before, after) in enumerate(pairwise(knots)):
        if not before < after:
            raise ValueError(
                f"grid must increase, but grid[{n + 1}] = {after} follows grid[{n}] = {before}: sort it, drop repeats."
            )
    return knots
