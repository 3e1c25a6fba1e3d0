"""Control paths X(t) of controlled differential equations dz = f(t, z) dX, made from data or adopted from elsewhere.

`LinearPath`, `HermitePath` and `NaturalCubicPath` interpolate observations (..., length, channels) in which NaN is a
missing value; `compat/torchcde.py` adopts the paths of other packages. All are a `Control`: it answers one time within
microseconds, or a whole grid of times in one call.
"""

from collections.abc import Sequence

from torch import Tensor

from revsolve.paths import interpolation
from revsolve.paths.observations import observe, staircase
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
        coefficients, values = interpolation.linear(obs)
        super().__init__(obs.t, coefficients, values.diff(dim=0), obs.t[1:-1])


class HermitePath(PiecewisePath):
    """Cubics whose slope at a knot is that of the line arriving there: dX/dt is continuous, and no piece looks ahead.

    Arguments and errors are those of `LinearPath`; gaps are first bridged by lines. Where a sample ends early its path
    stands still at once, so that dX/dt jumps there. See `interpolation.hermite` for the formula, and Morrill, Kidger, Yang &
    Lyons (2021, arXiv 2106.11028) for the choice of backward differences.
    """

    def __init__(self, x: Tensor, t: Times | None = None, *, lengths: Lengths = None) -> None:
        obs = observe(x, t, lengths)
        coefficients, values = interpolation.hermite(obs)
        super().__init__(obs.t, coefficients, values.diff(dim=0), _early_ends(obs.t, obs.within))


class NaturalCubicPath(PiecewisePath):
    """Natural cubic splines: the second derivative is continuous, but every piece looks at the whole series.

    Arguments and errors are those of `LinearPath`; each series has its knots where it was observed. Where a sample ends
    early its spline ends and its path stands still, so that dX/dt jumps there. See `interpolation.natural`, and Kidger,
    Morrill, Foster & Lyons (2020, arXiv 2005.08926) for their use in neural CDEs.
    """

    def __init__(self, x: Tensor, t: Times | None = None, *, lengths: Lengths = None) -> None:
        obs = observe(x, t, lengths)
        coefficients, values = interpolation.natural(obs)
        super().__init__(obs.t, coefficients, values.diff(dim=0), _early_ends(obs.t, obs.within))


def _early_ends(t: Tensor, within: Tensor | None) -> Tensor:
    """The inner knots at which some sample ends."""
    if within is None:
        return t[:0]
    ends = within[:-1] & ~within[1:]
    return t[1:-1][ends[1:].flatten(1).any(1)]
