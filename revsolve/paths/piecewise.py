"""The interface of control paths, `Control`, and paths made of polynomial pieces, `PiecewisePath`."""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from revsolve.core.arithmetic import plus
from revsolve.field.functorch import followed, numbers

Time: TypeAlias = float | Tensor
Times: TypeAlias = Sequence[float] | Tensor
Spans: TypeAlias = tuple[Time | Times, Time | Times]
Value: TypeAlias = Any  # a tensor (..., channels), or a tuple of such


class Control(ABC):
    """A path X on an interval, with values of shape (..., channels), or a tuple of such.

    One time may be a float or a 0-d tensor. At a knot where dX/dt jumps it is that of the piece before; a `span`
    (t0, t1), in either order, says which stretch is being travelled: times are kept inside it, and at its earlier end
    the piece after counts. Times outside the interval raise ValueError, except where their values lie on a GPU and
    would have to be waited for.

    Attributes:
        interval: first and last time, (2,).
        grid_points: the knots, (length,), increasing; `knots` are the same as numbers.
        jump_times: the times strictly inside the interval at which dX/dt may jump, increasing, possibly none; `jumps` are
            the same as numbers.
        tensors: every tensor that the path reads, so that whoever differentiates through it can name them.
    """

    interval: Tensor
    grid_points: Tensor
    knots: list[float]
    jump_times: Tensor
    jumps: list[float]
    tensors: tuple[Tensor, ...]

    @abstractmethod
    def evaluate(self, t: Time) -> Value:
        """X(t), (..., channels); for `t` of shape (n,), (..., n, channels)."""

    @abstractmethod
    def derivative(self, t: Time, *, span: tuple[Time, Time] | None = None) -> Value:
        """dX/dt, per unit of time, with the shapes of `evaluate`; a `span` holds for all of `t`."""

    @abstractmethod
    def increment(self, t0: Time, t1: Time) -> Value:
        """X(t1) - X(t0), (..., channels); exact between neighbouring knots."""

    @abstractmethod
    def derivatives(self, times: Times, *, spans: tuple[Times, Times] | None = None) -> Value:
        """dX/dt at n times at once, (n, ..., channels); `spans` holds a start and an end for each time, twice (n,)."""

    @abstractmethod
    def increments(self, grid: Times) -> Value:
        """X(grid[i+1]) - X(grid[i]) along n + 1 times at once, (n, ..., channels)."""


class PiecewisePath(Control):
    """A control given by polynomial pieces.

    Args:
        knots: (length,), increasing.
        coefficients: of the powers of t - t_i, (length - 1, degree + 1, ..., channels).
        differences: X at the next knot minus X at this one, (length - 1, ..., channels).
        jump_times: times at which dX/dt jumps.
    """

    def __init__(self, knots: Tensor, coefficients: Tensor, differences: Tensor, jump_times: Tensor) -> None:
        self.interval = knots[:: len(knots) - 1]
        self.grid_points, self.knots = knots, numbers(knots)
        self.jump_times = jump_times.detach()
        self.jumps = numbers(self.jump_times)
        self.tensors = knots, coefficients, differences
        self._coefficients, self._differences = coefficients, differences
        self._row = {t: i for i, t in enumerate(self.knots)}
        self._ends = self.knots[0], self.knots[-1]

    def evaluate(self, t: Time) -> Tensor:
        if _readable(t):
            piece, s = self._locate(t, None)
            return _polynomial(self._coefficients[piece].unbind(0), s)
        assert isinstance(t, Tensor)
        return _like_query(self._values(t.reshape(-1)), t)

    def derivative(self, t: Time, *, span: tuple[Time, Time] | None = None) -> Tensor:
        if _readable(t):
            piece, s = self._locate(t, span)
            return _slope(self._coefficients[piece].unbind(0), s)
        assert isinstance(t, Tensor)
        return _like_query(self.derivatives(t.reshape(-1), spans=span), t)

    def increment(self, t0: Time, t1: Time) -> Tensor:
        if _readable(t0) and _readable(t1) and not (_has_grad(t0) or _has_grad(t1)):
            i, j = self._row.get(number(t0)), self._row.get(number(t1))
            if i is not None and j is not None and abs(i - j) == 1:
                return self._differences[i] if j > i else -self._differences[j]
        return self.evaluate(t1) - self.evaluate(t0)

    def derivatives(self, times: Times, *, spans: Spans | None = None) -> Tensor:
        pieces, s = self._locate_all(times, spans)
        return _slope(self._coefficients[pieces].unbind(1), s)

    def increments(self, grid: Times) -> Tensor:
        if not _has_grad(grid):
            times = numbers(grid) if isinstance(grid, Tensor) else [number(t) for t in grid]
            first = self._row.get(times[0], 0)
            if times == self.knots[first : first + len(times)]:
                return self._differences[first : first + len(times) - 1]
        return self._values(grid).diff(dim=0)

    def values_of_each(self, times: Tensor) -> Tensor:
        """X(t) where every sample has a time of its own: (batch, ..., channels) for times (batch,)."""
        return _polynomial(*self._locate_per_sample(times, None))

    def derivatives_of_each(self, times: Tensor, *, spans: tuple[Tensor, Tensor]) -> Tensor:
        """dX/dt where every sample has a time and a span of its own."""
        return _slope(*self._locate_per_sample(times, spans))

    def _locate_per_sample(
        self, times: Tensor, spans: tuple[Tensor, Tensor] | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        pieces, s = self._locate_all(times, spans)
        own = self._coefficients[pieces, :, torch.arange(len(pieces), device=pieces.device)]
        return own.unbind(1), s.squeeze(1)

    def _values(self, times: Times) -> Tensor:
        pieces, s = self._locate_all(times, None)
        return _polynomial(self._coefficients[pieces].unbind(1), s)

    def _locate(self, t: Time, span: tuple[Time, Time] | None) -> tuple[int, Time]:
        """The piece that holds `t` and the distance from its left knot."""
        where, after = number(t), False
        check_inside(where, where, self._ends, self.grid_points, t)
        if span is not None:
            low, high = sorted((number(span[0]), number(span[1])))
            where, after = min(max(where, low), high), where <= low
        if torch.compiler.is_compiling():  # which knows no bisection
            piece = sum(t < where or (after and t == where) for t in self.knots[1:-1])
        else:
            piece = (bisect_right if after else bisect_left)(self.knots, where, 1, len(self.knots) - 1) - 1
        if _has_grad(t) or followed(self.grid_points):
            return piece, t - self.grid_points[piece]
        return piece, where - self.knots[piece]

    def _locate_all(self, times: Times, spans: Spans | None) -> tuple[Tensor, Tensor]:
        """The pieces (n,) that hold `times` (n,) and the distances (n, 1, ..., 1) from their left knots."""
        # Plain numbers are looked up in double precision, as in `_locate`, whatever the precision of the knots.
        times = times if isinstance(times, Tensor) else torch.tensor(times, dtype=torch.float64, device="cpu")
        knots = self.grid_points.to(times.device, torch.promote_types(self.grid_points.dtype, times.dtype))
        where = times.detach().to(knots.dtype).contiguous()
        if where.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = where.aminmax()
            check_inside(float(low), float(high), self._ends, self.grid_points, times)
        inner = knots.detach()[1:-1].contiguous()
        pieces = torch.bucketize(where, inner)
        if spans is not None:
            one, other = (torch.as_tensor(end, dtype=where.dtype, device=where.device).detach() for end in spans)
            low, high = torch.minimum(one, other), torch.maximum(one, other)
            after, where = where <= low, where.clamp(low, high)
            pieces = torch.where(after, torch.bucketize(where, inner, right=True), torch.bucketize(where, inner))
        s = (times if followed(times) else where) - knots[pieces]
        c = self._coefficients
        return pieces.to(c.device), s.to(c).reshape(-1, *(1,) * (c.ndim - 2))


def check_inside(earliest: float, latest: float, interval: tuple[float, float], *sources: Time) -> None:
    """Raise ValueError if times leave `interval` by more than rounding of the coarsest tensor they came from explains."""
    if not lies_inside(earliest, latest, interval, *sources):
        first, last = interval
        raise ValueError(
            f"t = {latest if first <= earliest else earliest} lies outside the interval [{first}, {last}] of the path: "
            "solve within it, or give data over a longer time (methods named _yoshida or _s3 look beyond their steps, so use "
            "another one there)."
        )


def lies_inside(earliest: float, latest: float, interval: tuple[float, float], *sources: Time) -> bool:
    """True where `check_inside` does not raise."""
    first, last = interval
    if first <= earliest and latest <= last:
        return True
    eps = max(torch.finfo(x.dtype).eps for x in sources if isinstance(x, Tensor) and x.is_floating_point())
    # Far from zero a few ulps may be longer than the whole interval.
    slack = min(4 * eps * max(abs(first), abs(last)), 0.01 * (last - first))
    return first - slack <= earliest and latest <= last + slack


def number(t: Time) -> float:
    """The value of one time."""
    return float(t.detach()) if isinstance(t, Tensor) else float(t)


def _readable(t: Time) -> bool:
    """True for one time whose value is known without waiting for a device."""
    return not isinstance(t, Tensor) or (t.ndim == 0 and t.device.type == "cpu")


def _has_grad(t: Time | Times) -> bool:
    return isinstance(t, Tensor) and followed(t)


def _polynomial(coefficients: Sequence[Tensor], s: Time) -> Tensor:
    return _weighted_sum(coefficients, [s**k for k in range(1, len(coefficients))])


def _slope(coefficients: Sequence[Tensor], s: Time) -> Tensor:
    return _weighted_sum(coefficients[1:], [k * s ** (k - 1) for k in range(2, len(coefficients))])


def _weighted_sum(terms: Sequence[Tensor], weights: Sequence[Time]) -> Tensor:
    """The first of `terms`, and each later one times its weight; a single kernel per term if weights are numbers."""
    value = terms[0]
    for c, weight in zip(terms[1:], weights, strict=True):
        value = value + weight * c if isinstance(weight, Tensor) else plus(value, c, weight)
    return value


def _like_query(values: Tensor, t: Tensor) -> Tensor:
    """Values (n, ..., channels) in the shape that a query at `t` of shape (n,) or () asks for."""
    return values.movedim(0, -2) if t.ndim else values[0]
