"""Control paths X(t) of controlled differential equations dz = f(t, z) dX, made from data or adopted from elsewhere.

`LinearPath`, `HermitePath` and `NaturalCubicPath` interpolate observations (..., length, channels) in which NaN is a
missing value; `compat/torchcde.py` adopts the paths of other packages. All are a `Control`: it answers one time within
microseconds, or a whole grid of times in one call.

The functions turn `Observations` (length first) into the coefficients of every piece,

    X(t) = c_0 + c_1 s + c_2 s^2 + c_3 s^3,   s = t - t_i,   t_i <= t <= t_{i+1},

stacked as (length - 1, degree + 1, ..., channels), and the values at the knots, (length, ..., channels). The last piece
of a sample that ends early is followed by constant ones: its path stands still, and its rows of padding change nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from revsolve.paths.observations import Observations, fill_linear, neighbours, observe, staircase
from revsolve.paths.piecewise import Control, PiecewisePath, Times

__all__ = ["Control", "HermitePath", "LinearPath", "NaturalCubicPath"]

Lengths = Tensor | Sequence[int] | None


class LinearPath(PiecewisePath):
    """Straight lines between observations.

    Args:
        x: observations, (..., length, channels); NaN is missing. A gap is bridged by a line, ends are held constant.
        t: strictly increasing times, (length,), numbers being taken in double precision; 0, 1, 2, ... if not given.
        lengths: rows of each sample that count, (...,) integers; after them the sample's path stands still.
        rectilinear: index of a channel that holds the time. The path then moves in that channel first and in the others
            second, on 2 length - 1 knots, which makes it causal (Morrill et al. 2021); `t` must have that length.

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: wrong shapes, infinite values, times out of order, a channel without any value: with the values.

    Example:
        >>> import torch
        >>> path = LinearPath(torch.tensor([[0.0], [float("nan")], [4.0]]))
        >>> path.evaluate(1.0).item(), path.derivative(0.5).item()
        (2.0, 2.0)
    """

    def __init__(
        self, x: Tensor, t: Times | None = None, *, lengths: Lengths = None, rectilinear: int | None = None
    ) -> None:
        obs = observe(x, t, lengths) if rectilinear is None else staircase(observe(x, None, lengths), t, rectilinear)
        coefficients, values = _linear(obs)
        super().__init__(obs.t, coefficients, values.diff(dim=0), obs.t[1:-1])


class HermitePath(PiecewisePath):
    """Cubics whose slope at a knot is that of the line arriving there: dX/dt is continuous, and no piece looks ahead.

    Arguments and errors are those of `LinearPath`; gaps are first bridged by lines. Where a sample ends early its path
    stands still at once, so that dX/dt jumps there. Morrill, Kidger, Yang & Lyons (2021, arXiv 2106.11028) chose backward
    differences.
    """

    def __init__(self, x: Tensor, t: Times | None = None, *, lengths: Lengths = None) -> None:
        obs = observe(x, t, lengths)
        coefficients, values = _hermite(obs)
        super().__init__(obs.t, coefficients, values.diff(dim=0), _early_ends(obs.t, obs.within))


class NaturalCubicPath(PiecewisePath):
    """Natural cubic splines: the second derivative is continuous, but every piece looks at the whole series.

    Arguments and errors are those of `LinearPath`; each series has its knots where it was observed. Where a sample ends
    early its spline ends and its path stands still, so that dX/dt jumps there. See Kidger, Morrill, Foster & Lyons (2020, arXiv
    2005.08926) for their use in neural CDEs.
    """

    def __init__(self, x: Tensor, t: Times | None = None, *, lengths: Lengths = None) -> None:
        obs = observe(x, t, lengths)
        coefficients, values = _natural(obs)
        super().__init__(obs.t, coefficients, values.diff(dim=0), _early_ends(obs.t, obs.within))


def _linear(obs: Observations) -> tuple[Tensor, Tensor]:
    values = fill_linear(obs)
    return torch.stack([values[:-1], _slopes(obs, values)], 1), values


def _hermite(obs: Observations) -> tuple[Tensor, Tensor]:
    """With d_i the slope of line i (d_{-1} = d_0): x_i + d_{i-1} s + (d_i - d_{i-1}) (2 s^2 / h - s^3 / h^2)."""
    values = fill_linear(obs)
    slope = _slopes(obs, values)
    arriving = torch.cat([slope[:1], slope[:-1]])
    if obs.within is not None:
        arriving = arriving * obs.within[1:]
    inverse = obs.column(obs.t.diff()).reciprocal().to(values.dtype)
    bend = (slope - arriving) * inverse
    return torch.stack([values[:-1], arriving, 2 * bend, -bend * inverse], 1), values


def _natural(obs: Observations) -> tuple[Tensor, Tensor]:
    # Each series has its own knots, its observed rows; rows ahead of the first and behind the last observation count as observed
    # with the nearest value, which keeps the ends of the spline calm.
    if obs.observed is None:
        return _spline(obs.x, obs.column(obs.t), None)[:-1], obs.x
    lower, _, before, after = neighbours(obs)
    known = obs.observed | before | after
    if obs.within is not None:
        known = known & obs.within
    rank = known.cumsum(0) - 1  # the last knot at or before each row, counted per series
    x = obs.x.gather(0, lower)
    knot_row = _rows_of(known, rank)
    knot_t = obs.t[knot_row]
    has_piece = obs.column(torch.arange(len(rank), device=x.device)) < rank[-1:]
    pieces = _spline(x.gather(0, knot_row), knot_t, has_piece)
    pieces = pieces.gather(0, rank.unsqueeze(1).expand(-1, 4, *rank.shape[1:]))
    pieces = _moved_origin(pieces, (obs.column(obs.t) - knot_t.gather(0, rank)).to(x.dtype))
    return pieces[:-1], pieces[:, 0]


def _slopes(obs: Observations, values: Tensor) -> Tensor:
    return values.diff(dim=0) / obs.column(obs.t.diff()).to(values.dtype)


def _rows_of(known: Tensor, rank: Tensor) -> Tensor:
    """The rows that are knots, moved to the front of each series; what follows them is row 0 and is never used."""
    length = known.shape[0]
    row = torch.arange(length, device=known.device).reshape(-1, *(1,) * (known.ndim - 1)).expand_as(known)
    spare = torch.where(known, rank, length)  # unknown rows all go to one slot behind the end
    return row.new_zeros(length + 1, *known.shape[1:]).scatter(0, spare, row)[:-1]


def _spline(x: Tensor, t: Tensor, has_piece: Tensor | None) -> Tensor:
    """Pieces (length, 4, ..., channels) of natural splines with the knots in front; rows without a piece are constant.

    The slopes k solve, with h_i the steps and d_i the slopes of the straight lines,
    k_{i-1} / h_{i-1} + 2 k_i (1 / h_{i-1} + 1 / h_i) + k_{i+1} / h_i = 3 (d_{i-1} / h_{i-1} + d_i / h_i).
    """
    step = t.diff(dim=0)
    if has_piece is not None:
        step = torch.where(has_piece[:-1], step, 1)
    inverse = step.reciprocal().to(x.dtype)
    if has_piece is not None:
        inverse = inverse * has_piece[:-1]
    zero = torch.zeros_like(inverse[:1])
    left, right = torch.cat([zero, inverse]), torch.cat([inverse, zero])
    line = torch.cat([x.diff(dim=0) * inverse, torch.zeros_like(x[:1])])
    arriving = torch.cat([torch.zeros_like(x[:1]), line[:-1]])
    diagonal = 2 * (left + right)
    diagonal = torch.where(diagonal > 0, diagonal, 1)
    slope = _solve_dominant(left / diagonal, right / diagonal, 3 * (arriving * left + line * right) / diagonal)
    following = torch.cat([slope[1:], slope[-1:]])
    bend = (3 * line - 2 * slope - following) * right
    twist = (slope + following - 2 * line) * right * right
    if has_piece is not None:
        slope, bend, twist = (torch.where(has_piece, c, 0) for c in (slope, bend, twist))
    return torch.stack([x, slope, bend, twist], 1)


def _solve_dominant(lower: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
    """Solve y_i + lower_i y_{i-1} + upper_i y_{i+1} = rhs_i along the first axis where |lower_i| + |upper_i| <= 1/2.

    Cyclic reduction in parallel: eliminating the neighbours of every row at once doubles the distance of the rows it
    still depends on and at least squares the sum of their weights, 1/2 -> 1/4 -> ... -> 2^-64 after six rounds, which
    is below rounding.
    """
    stride = 1
    for _ in range(min(6, (len(rhs) - 1).bit_length())):
        scale = 1 / (1 - lower * _down(upper, stride) - upper * _up(lower, stride))
        rhs = (rhs - lower * _down(rhs, stride) - upper * _up(rhs, stride)) * scale
        lower, upper = -lower * _down(lower, stride) * scale, -upper * _up(upper, stride) * scale
        stride *= 2
    return rhs


def _down(rows: Tensor, stride: int) -> Tensor:
    return torch.cat([torch.zeros_like(rows[:stride]), rows[:-stride]])


def _up(rows: Tensor, stride: int) -> Tensor:
    return torch.cat([rows[stride:], torch.zeros_like(rows[:stride])])


def _moved_origin(pieces: Tensor, s: Tensor) -> Tensor:
    """The cubics `pieces` (length, 4, ...) written around an origin moved by `s` (length, ...)."""
    c0, c1, c2, c3 = pieces.unbind(1)
    return torch.stack([((c3 * s + c2) * s + c1) * s + c0, (3 * c3 * s + 2 * c2) * s + c1, 3 * c3 * s + c2, c3], 1)


def _early_ends(t: Tensor, within: Tensor | None) -> Tensor:
    """The inner knots at which some sample ends."""
    if within is None:
        return t[:0]
    ends = within[:-1] & ~within[1:]
    return t[1:-1][ends[1:].flatten(1).any(1)]
