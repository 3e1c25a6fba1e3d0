"""What `sdeint` is given, checked before any work: times, state, steps, shapes of the noise, and the Brownian motion."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from revsolve.brownian.path import BrownianPath, clamped
from revsolve.brownian.presampled import PresampledPath
from revsolve.compat.torchsde import ForeignBrownian, as_brownian
from revsolve.extras.per_sample import check_sample_times
from revsolve.field.functorch import followed, outside, sample_numbers
from revsolve.prepare.times import check_times
from revsolve.sde.coefficients import SDE, Coefficients, check_value

Brownian = BrownianPath | ForeignBrownian
Path = Callable[..., Any]


def increasing(ts: Tensor | Sequence[float]) -> list[float]:
    """The times as floats."""
    _check_constant(ts)
    times = check_times(ts, "ts")
    if times[-1] < times[0]:
        raise ValueError(
            f"ts must increase, but it runs from {times[0]} to {times[-1]}: noise is independent of the past only forward."
        )
    return times


def increasing_for_each(ts: Tensor, y0: Tensor, bm: Any) -> list[float]:
    """The values 0, 1, 2, ... of the step variable at the times of each sample, (T, batch)."""
    _check_constant(ts)
    times = check_sample_times(ts, y0, ("ts", "y0"))
    falls = (ts.diff(dim=0) < 0).any(0)
    if bool(falls.any()):
        b = int(falls.nonzero()[0])
        raise ValueError(
            f"ts must increase, but ts[:, {b}] = {ts[:, b].tolist()}: noise is independent of the past only forward."
        )
    if bm is not None:
        raise ValueError(
            "bm is one path in one time, but ts gives every sample times of its own: leave it out, torch.manual_seed repeats "
            "what is drawn instead."
        )
    return times


def _check_constant(ts: Any) -> None:
    if isinstance(ts, Tensor) and followed(ts):
        raise ValueError("ts requires a gradient, but a Brownian path has no derivative in time: pass ts.detach().")


def check_state(y0: Any) -> None:
    """Raise unless y0 is a real tensor with at least one dimension."""
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0 must be a tensor, but it is a {type(y0).__name__}: pack the parts of a state into one.")
    if not y0.is_floating_point():
        raise TypeError(f"y0 must be real and floating point, but it has dtype {y0.dtype}: cast it, say with .float().")
    if y0.ndim == 0 or y0.numel() == 0:
        raise ValueError(f"y0 has shape {tuple(y0.shape)}, but a state of shape (..., d) is needed: reshape it.")


def checked_steps(dt: float | Tensor, dt_min: float | Tensor, adaptive: bool) -> tuple[float, float]:
    """The step lengths as floats. Raises unless they are positive, and the shortest is no longer than the first."""
    for name, value in (("dt", dt), ("dt_min", dt_min)):
        if isinstance(value, Tensor) and followed(value):
            raise ValueError(f"{name} requires a gradient, but steps have none: pass a float.")
        if not isinstance(value, (Real, Tensor)):
            raise TypeError(f"{name} must be a number, but it is {value!r}.")
        if not 0.0 < float(value) < math.inf:
            raise ValueError(f"{name} must be positive and finite, but it is {value!r}: pass a length of time.")
    if adaptive and dt_min > dt:
        raise ValueError(f"dt_min = {dt_min} is larger than the first step, dt = {dt}: lower dt_min or raise dt.")
    return float(dt), float(dt_min)


def refuse_events(event_fn: Any) -> None:
    """Raise if there is an event function."""
    if event_fn is not None:
        raise ValueError(
            "sdeint has no events: a Brownian path that meets a level crosses it infinitely often at once, so that steps see "
            "the first crossing late, by about the square root of their length, and in which step they see it jumps with every "
            "parameter, which a gradient would not know. Look for the crossing in the states at many times ts."
        )


def as_sde(sde: Any, evaluate: Callable[[Callable[..., Any]], Any], y0: Tensor) -> Any:
    """A tuple (f, g) as an SDE in the sense of Stratonovich; anything else as it is."""
    if not isinstance(sde, tuple):
        return sde
    if len(sde) != 2 or not all(map(callable, sde)):
        raise TypeError(f"a tuple must hold two functions, drift f(t, y) and diffusion g(t, y), but it is {sde!r}.")
    shape = getattr(evaluate(sde[1]), "shape", None)
    return SDE(*sde, noise_type="diagonal" if shape == y0.shape else "general")


def noise_shape(parts: Coefficients, f: Any, g: Any, y0: Tensor, path: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of W, from the values of f and g at y0, which are checked against y0 and each other."""
    check_value("drift", f, y0, tuple(y0.shape))
    if parts.product_only:
        assert path is not None
        channels = path[-1]
        g = g(torch.zeros(*y0.shape[:-1], channels, dtype=y0.dtype, device=y0.device))
        check_value("product of diffusion and noise", g, y0, tuple(y0.shape))
        return *y0.shape[:-1], channels
    if parts.diagonal:
        check_value("diffusion (diagonal noise)", g, y0, tuple(y0.shape))
        return tuple(y0.shape)
    channels = g.shape[-1] if isinstance(g, Tensor) and g.ndim else 1
    if parts.noise_type == "scalar" and channels != 1:
        raise ValueError(
            f"scalar noise has one channel, but g returned shape {tuple(g.shape)}: return (..., d, 1), or set "
            'noise_type = "general".'
        )
    check_value(f"diffusion ({parts.noise_type} noise)", g, y0, (*y0.shape, channels))
    return *y0.shape[:-1], channels


def new_path(times: list[float], size: tuple[int, ...], y0: Tensor, area: bool, **steps: Any) -> Path:
    """A Brownian motion over the times, with noise counted on the steps; its seed comes from torch's generator.

    Inside torch.vmap one for all samples, or one for each, as its `randomness` says.
    """
    end = times[-1] if len(times) > 1 else times[0] + 1.0
    levy_area: Any = "space-time" if area else "none"
    num_samples, number = sample_numbers(y0.device)
    with outside():
        shape = size if number is None else (num_samples, *size)
        path = BrownianPath(times[0], end, shape, dtype=y0.dtype, device=y0.device, levy_area=levy_area, **steps)
    return path if number is None else functools.partial(_of_one, path, number)


def followed_path(bm: Any, size: tuple[int, ...], y0: Tensor, area: bool, grid: Sequence[float] = (0.0, 1.0)) -> Path:
    """A Brownian motion that torch.compile can follow. Raises where there is none."""
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
    return PresampledPath(grid, size, y0.dtype, y0.device)


def _of_one(path: Path, number: Tensor, ta: float, tb: float, return_H: bool = False) -> Any:
    """What one sample sees of the Brownian motions of all."""
    if return_H:
        W, H = path(ta, tb, return_H=True)
        return _row(W, number), _row(H, number)
    return _row(path(ta, tb), number)


def _row(x: Tensor, number: Tensor) -> Tensor:
    """x[number], for which torch 2.9 would read the number."""
    return x.index_select(0, number.reshape(1)).squeeze(0)


def given_path(bm: Any, times: list[float], size: tuple[int, ...], y0: Tensor, area: bool) -> Brownian:
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
