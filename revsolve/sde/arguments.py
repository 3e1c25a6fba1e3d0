"""Checks of what `sdeint` is given, before any work: times, state, steps, and the shape of the noise."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from revsolve.extras.per_sample import check_sample_times
from revsolve.field.functorch import followed
from revsolve.prepare.times import check_times
from revsolve.sde.coefficients import Coefficients, check_value


def check_ts(ts: Any, y0: Tensor, bm: Any) -> list[float]:
    """The increasing times as floats; for times of each sample, (T, batch), the values 0, 1, 2, ... of the step variable."""
    if isinstance(ts, Tensor) and followed(ts):
        raise ValueError("ts requires a gradient, but a Brownian path has no derivative in time: pass ts.detach().")
    if not (isinstance(ts, Tensor) and ts.ndim == 2):
        times = check_times(ts, "ts")
        falls = f"it runs from {times[0]} to {times[-1]}" if times[-1] < times[0] else ""
    else:
        times, fall = check_sample_times(ts, y0, ("ts", "y0")), (ts.diff(dim=0) < 0).any(0).nonzero()
        falls = f"ts[:, {int(fall[0])}] = {ts[:, int(fall[0])].tolist()}" if len(fall) else ""
    if falls:
        raise ValueError(f"ts must increase, but {falls}: noise is independent of the past only forward.")
    if bm is not None and isinstance(ts, Tensor) and ts.ndim == 2:
        raise ValueError(
            "bm is one path in one time, but ts gives every sample times of its own: leave it out, torch.manual_seed repeats "
            "what is drawn instead."
        )
    return times


def check_arguments(y0: Any, dt: Any, dt_min: Any, adaptive: bool, event_fn: Any) -> tuple[float, float]:
    """The step lengths as floats. Raises unless y0 is a real tensor with at least one dimension, and steps are positive."""
    if event_fn is not None:
        raise ValueError(
            "sdeint has no events: a Brownian path that meets a level crosses it infinitely often at once, so that steps see "
            "the first crossing late, by about the square root of their length, and in which step they see it jumps with every "
            "parameter, which a gradient would not know. Look for the crossing in the states at many times ts."
        )
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0 must be a tensor, but it is a {type(y0).__name__}: pack the parts of a state into one.")
    if not y0.is_floating_point():
        raise TypeError(f"y0 must be real and floating point, but it has dtype {y0.dtype}: cast it, say with .float().")
    if y0.ndim == 0 or y0.numel() == 0:
        raise ValueError(f"y0 has shape {tuple(y0.shape)}, but a state of shape (..., d) is needed: reshape it.")
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


def noise_shape(parts: Coefficients, g: Any, y0: Tensor, path: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of W, from the value of g at y0, which is checked."""
    if parts.product_only:
        assert path is not None
        channels = path[-1]
        g = g(torch.zeros(*y0.shape[:-1], channels, dtype=y0.dtype, device=y0.device))
        check_value("product of diffusion and noise", g, y0, tuple(y0.shape))
        return *y0.shape[:-1], channels
    if parts.noise_type == "diagonal":
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
