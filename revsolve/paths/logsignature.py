"""Log-signatures of piecewise-linear paths to depth 3, over a whole path or over windows.

The signature of a path collects its iterated integrals S^{i1...ik} = int_{s1 < ... < sk} dX^{i1} ... dX^{ik}; its
logarithm in the tensor algebra is a Lie series, so that one number per Lyndon word describes it. Both are sums over the
linear pieces here, taken for all pieces, windows and samples at once. See Reutenauer, "Free Lie algebras" (1993),
and for the log-ODE method Morrill et al., "Neural rough differential equations for long time series" (2021).
"""

from functools import lru_cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from revsolve.field.functorch import numbers
from revsolve.paths.control import Lengths, LinearPath
from revsolve.paths.observations import as_times, fill_linear, observe
from revsolve.paths.piecewise import PiecewisePath, Times, lies_inside, number

Word = tuple[int, ...]
Basis = Literal["words", "brackets"]
Windows = float | Times


@lru_cache(maxsize=64)
def lyndon_words(channels: int, depth: int) -> tuple[Word, ...]:
    """The words over 0, ..., channels - 1 that are smaller than all their rotations, by length, then alphabetically.

    Example:
        >>> lyndon_words(2, 3)
        ((0,), (1,), (0, 1), (0, 0, 1), (0, 1, 1))
    """
    words = (word for length in range(1, depth + 1) for word in product(range(channels), repeat=length))
    return tuple(word for word in words if all(word < word[i:] + word[:i] for i in range(1, len(word))))


def standard_factors(word: Word) -> tuple[Word, Word]:
    """`word` = u v with v its longest proper suffix that is a Lyndon word; its bracket is [u, v], recursively."""
    suffixes = (word[i:] for i in range(1, len(word)))
    v = next(v for v in suffixes if all(v < v[i:] for i in range(1, len(v))))
    return word[: -len(v)], v


def logsignature(x: Tensor, depth: int, *, t: Times | None = None, basis: Basis = "words") -> Tensor:
    """The log-signature of the linear path through `x`, (..., len(lyndon_words(channels, depth))); see Reutenauer (1993).

    Args:
        x: points, (..., length, channels); NaN is missing and is filled linearly.
        depth: 1, 2 or 3.
        t: times of the points, (length,), which matter only for filling gaps.
        basis: "words" gives the coefficients of the Lyndon words in the logarithm, as signatory does; "brackets" those
            of their standard brackets, which the log-ODE method needs. They differ only in words of 3 distinct letters.

    Raises:
        TypeError, ValueError: depth or basis not among the above, or `x` as for `LinearPath`.

    Example:
        >>> logsignature(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), depth=2)
        tensor([1.0000, 1.0000, 0.5000])
    """
    _check(depth, basis)
    return _logsignature(fill_linear(observe(x, t)).movedim(0, -2), depth, basis)


def window_logsignatures(
    x: Tensor, depth: int, windows: Windows, t: Times | None = None, *, lengths: Lengths = None, basis: Basis = "words"
) -> tuple[Tensor, Tensor]:
    """Log-signatures over consecutive windows, (..., number of windows, words), and the windows' ends, (number + 1,).

    Args:
        x, t, lengths: observations as for `LinearPath`.
        depth, basis: as for `logsignature`.
        windows: length of every window in the unit of `t` (the last one may be shorter), or the increasing times at
            which windows begin and end, (number + 1,), within those of `t`.

    Raises:
        TypeError, ValueError: as for `logsignature`, or unsuitable windows.
    """
    _check(depth, basis)
    return _over_windows(LinearPath(x, t, lengths=lengths), depth, windows, basis)


def logsig_windows(x: Tensor, depth: int, window_length: float, t: Times | None = None) -> Tensor:
    """The path of summed log-signatures over windows, (..., number of windows + 1, words), as torchcde's function.

    Interpolate it at times 0, 1, 2, ... for a neural rough differential equation, whose field has one column per Lyndon
    word. Its first row is the first value of the path followed by zeros. Arguments and errors are those of
    `window_logsignatures`.
    """
    _check(depth, "words")
    path = LinearPath(x, t)
    logs, times = _over_windows(path, depth, window_length, "words")
    return torch.cat([_start(path, times, logs), logs], -2).cumsum(-2)


class LogSignaturePath(PiecewisePath):
    """The control of the log-ODE method: over each window it moves by the path's log-signature, at constant speed.

    Channels are the Lyndon words, in coordinates of their brackets, and the knots are the windows' ends: drive a
    `LogODEField` of the same depth with it. Any scheme then solves, one window after the other,
    dz/dt = sum_w [f_w](z) logsig_w / (length of the window), see Morrill, Salvi, Kidger & Foster (2021, arXiv 2009.08295).

    Args:
        x, t, lengths: observations as for `LinearPath`; time has to be one of the channels for a field to depend on it.
        depth, windows: as for `window_logsignatures`.

    Raises:
        TypeError, ValueError: as for `window_logsignatures`.
    """

    def __init__(
        self, x: Tensor, depth: int, windows: Windows, t: Times | None = None, *, lengths: Lengths = None
    ) -> None:
        _check(depth, "brackets")
        path = LinearPath(x, t, lengths=lengths)
        logs, times = _over_windows(path, depth, windows, "brackets")
        first = _start(path, times, logs).movedim(-2, 0)
        logs = logs.movedim(-2, 0)
        values = torch.cat([first, logs[:-1]]).cumsum(0)
        steps = times.diff().to(logs.dtype).reshape(-1, *(1,) * (logs.ndim - 1))
        super().__init__(times, torch.stack([values, logs / steps], 1), logs, times[1:-1])


def check_depth(depth: int) -> None:
    """Raise ValueError unless the depth is one that log-signatures are computed to."""
    if depth not in (1, 2, 3):
        raise ValueError(f"depth must be 1, 2 or 3, but it is {depth!r}.")


def _check(depth: int, basis: str) -> None:
    check_depth(depth)
    if basis not in ("words", "brackets"):
        raise ValueError(f"basis must be 'words' or 'brackets', but it is {basis!r}.")


def _logsignature(x: Tensor, depth: int, basis: Basis) -> Tensor:
    """Log-signature of the points `x` (..., length, channels)."""
    step = x.diff(dim=-2)  # (..., pieces, channels)
    s1 = step.sum(-2)
    if depth == 1:
        return s1
    so_far = x[..., :-1, :] - x[..., :1, :]
    middle = so_far + step / 2
    s2 = middle.mT @ step  # (..., channels, channels)
    log2 = (s2 - s2.mT) / 2
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)  # the Lyndon words of length 2
    coordinates = [s1, log2[..., first, second]]
    if depth == 3:
        log3 = _third_level(s1, s2, step, so_far, middle)
        coordinates.append(_third_coordinates(log3, basis))
    return torch.cat(coordinates, -1)


def _third_level(s1: Tensor, s2: Tensor, step: Tensor, so_far: Tensor, middle: Tensor) -> Tensor:
    """The third level of log S = S - S^2 / 2 + S^3 / 3 (without the 1 of S), (..., channels, channels, channels)."""
    areas = middle.unsqueeze(-1) * step.unsqueeze(-2)  # (..., pieces, channels, channels)
    areas_so_far = torch.cat([torch.zeros_like(areas[..., :1, :, :]), areas.cumsum(-3)[..., :-1, :, :]], -3)
    within = (so_far / 2 + step / 6).unsqueeze(-1) * step.unsqueeze(-2)
    s3 = torch.einsum("...pij,...pk->...ijk", areas_so_far + within, step)
    s12 = torch.einsum("...i,...jk->...ijk", s1, s2)
    s21 = torch.einsum("...ij,...k->...ijk", s2, s1)
    return s3 - (s12 + s21) / 2 + torch.einsum("...i,...j,...k->...ijk", s1, s1, s1) / 3


def _third_coordinates(log3: Tensor, basis: Basis) -> Tensor:
    words = [word for word in lyndon_words(log3.shape[-1], 3) if len(word) == 3]
    i, j, k = torch.tensor(words, dtype=torch.long, device=log3.device).reshape(-1, 3).T
    coordinates = log3[..., i, j, k]
    if basis == "words":
        return coordinates
    # [i, [j, k]] holds the word i k j with coefficient -1; all other brackets hold no Lyndon word but their own.
    return coordinates + torch.where((i < k) & (k < j), log3[..., i, k, j], 0)


def _over_windows(path: LinearPath, depth: int, windows: Windows, basis: Basis) -> tuple[Tensor, Tensor]:
    times = _window_ends(path, windows)
    points = torch.cat([path.grid_points, times]).sort().values
    # Windows differ in their number of points: shorter ones repeat their last point, which adds nothing.
    start, stop = (torch.searchsorted(points.detach(), ends.detach().contiguous()) for ends in (times[:-1], times[1:]))
    most = int((stop - start).max())
    index = torch.minimum(start.unsqueeze(-1) + torch.arange(most + 1, device=start.device), stop.unsqueeze(-1))
    return _logsignature(path.evaluate(points)[..., index, :], depth, basis), times


def _window_ends(path: LinearPath, windows: Windows) -> Tensor:
    knots = path.grid_points
    if not isinstance(windows, (int, float)):
        times = as_times(windows, knots.device)
        ends = numbers(times.reshape(-1))
        if times.ndim != 1 or len(ends) < 2 or not (times.diff() > 0).all():
            shown = f"[{', '.join(map(str, ends[:6]))}{', ...' if len(ends) > 6 else ''}]"
            raise ValueError(f"windows must be increasing times (number + 1,), but they are {shown}.")
        if not lies_inside(ends[0], ends[-1], (path.knots[0], path.knots[-1]), times, knots):
            raise ValueError(
                f"windows reach from {ends[0]} to {ends[-1]}, outside the data's times [{path.knots[0]}, {path.knots[-1]}]: cut "
                "them to it."
            )
        return times.clamp(knots[0], knots[-1])
    if not windows > 0:
        raise ValueError(f"the length of windows must be positive, but it is {windows}.")
    # A quotient that rounding lifted just above an integer must not open one more, empty window.
    quotient = number(knots[-1] - knots[0]) / windows
    count = max(1, -int(-quotient * (1 - 4 * torch.finfo(knots.dtype).eps) // 1))
    inner = knots[0] + windows * torch.arange(count, dtype=knots.dtype, device=knots.device)
    return torch.cat([inner, knots[-1:]])


def _start(path: LinearPath, times: Tensor, logs: Tensor) -> Tensor:
    """The value of the path at the first of `times`, followed by zeros, (..., 1, words)."""
    value = path.evaluate(times[0])
    padding = value.new_zeros(*value.shape[:-1], logs.shape[-1] - value.shape[-1])
    return torch.cat([value, padding], -1).unsqueeze(-2)
