"""Observations of a series, checked, with its gaps located and filled.

A series is obs through a tensor `x` of shape (..., length, channels) at times `t` of shape (length,). NaN marks a
missing value, and a sample of the batch may end early (`lengths`). Inside, the length comes first, as everything here
runs along it. All work is vectorised over series and over time, and differentiable in observed values and times.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revsolve.core.arithmetic import widest
from revsolve.core.caller import warn
from revsolve.field.functorch import of_every_sample, outside
from revsolve.paths.piecewise import Times


@dataclass(frozen=True)
class Observations:
    """Checked observations, length first.

    `x` (length, ..., channels) carries 0 where `observed` is False; `t` is (length,); `observed` has the shape of `x`,
    or is None where everything was observed; `within` (length, ..., 1) is False after the end of a sample, or None.
    """

    x: Tensor
    t: Tensor
    observed: Tensor | None
    within: Tensor | None

    def column(self, values: Tensor) -> Tensor:
        """One-dimensional `values` along the length, ready to broadcast against `x`."""
        return values.reshape(-1, *(1,) * (self.x.ndim - 1))


def observe(x: Tensor, t: Times | None = None, lengths: Tensor | Sequence[int] | None = None) -> Observations:
    """The `Observations` of a series, checked; arguments and errors are those of `LinearPath`. It reads the device."""
    if torch.compiler.is_dynamo_compiling():
        raise ValueError(
            "a path looks for missing values in its data, which torch.compile hides: make it outside of what is compiled, and "
            "hand it in."
        )
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, but it is {found}: convert it first.")
    if x.ndim < 2 or x.shape[-2] < 2:
        raise ValueError(f"x must have shape (..., length >= 2, channels), but its shape is {tuple(x.shape)}.")
    t = _checked_times(x, t)
    x = x.movedim(-2, 0)
    within = None if lengths is None else _rows_within(x, lengths)
    missing = torch.isnan(x) if within is None else torch.isnan(x) | ~within
    flags = torch.stack([missing.any(), (torch.isinf(x) & ~missing).any(), missing.all(0).any()])
    with outside():
        problems = of_every_sample(flags).reshape(-1, 3).any(0).tolist()  # inside torch.vmap it may be any sample's
    _raise_if_unusable(x, missing, infinite=problems[1], empty=problems[2])
    if not problems[0]:
        return Observations(x, t, None, None)
    return Observations(x.masked_fill(missing, 0), t, ~missing, within)


def neighbours(obs: Observations) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the last observation at or before, and of the first at or after, each row: (lower, upper, before, after).

    `before` marks the rows ahead of a series' first observation and `after` those behind its last one; there both neighbours are
    the nearest observation.
    """
    assert obs.observed is not None
    length = obs.x.shape[0]
    row = obs.column(torch.arange(length, device=obs.x.device))
    lower = torch.where(obs.observed, row, -1).cummax(0).values
    upper = torch.where(obs.observed, row, length).flip(0).cummin(0).values.flip(0)
    before, after = lower < 0, upper == length
    return torch.where(before, upper, lower), torch.where(after, lower, upper), before, after


def fill_linear(obs: Observations) -> Tensor:
    """The values of `obs` with gaps filled by straight lines and ends held constant, (length, ..., channels)."""
    if obs.observed is None:
        return obs.x
    lower, upper, _, _ = neighbours(obs)
    start, stop = obs.x.gather(0, lower), obs.x.gather(0, upper)
    gap = torch.where(upper > lower, obs.t[upper] - obs.t[lower], 1)
    weight = (obs.column(obs.t) - obs.t[lower]) / gap
    return start + weight.to(start.dtype) * (stop - start)


def staircase(obs: Observations, t: Times | None, channel: int) -> Observations:
    """The causal staircase through `obs` at 2 length - 1 times t: first the channel of time moves, then the others."""
    channels = obs.x.shape[-1]
    if not 0 <= channel < channels:
        raise ValueError(f"rectilinear is the index of the time channel, 0 to {channels - 1}, but it is {channel}.")
    x, observed = obs.x, obs.observed
    if observed is not None:
        gaps = ~observed[..., channel] if obs.within is None else ~observed[..., channel] & obs.within[..., 0]
        if gaps.any():
            where = gaps.nonzero()[0].tolist()
            raise ValueError(
                f"the time channel {channel} is NaN at row {where[0]} of sample {where[1:]}: fill it forward."
            )
        lower, _, before, _ = neighbours(obs)
        x, observed = obs.x.gather(0, lower), ~before
        if before.any():
            warn(
                "x begins with missing values, which are filled with the first later observation: the path is not causal. Put a "
                "value (such as the channel's mean) into the first row."
            )
    source = torch.arange(2 * x.shape[0] - 1, device=x.device)
    rows, ahead = source // 2, (source + 1) // 2
    is_time = torch.arange(channels, device=x.device) == channel
    x = torch.where(is_time, x[ahead], x[rows])
    return Observations(x, _checked_times(x.movedim(0, -2), t), None if observed is None else observed[rows], None)


def as_times(t: Times, device: torch.device) -> Tensor:
    """Times as a tensor: in double precision, unless they are a floating-point tensor."""
    if isinstance(t, Tensor) and t.is_floating_point():
        return t.to(device)
    dtype = widest(device)
    if isinstance(t, (list, tuple)) and any(isinstance(s, Tensor) for s in t):  # whose gradients as_tensor would drop
        return torch.stack([torch.as_tensor(s, dtype=dtype, device=device) for s in t])
    return torch.as_tensor(t, dtype=dtype, device=device)


def _checked_times(x: Tensor, t: Times | None) -> Tensor:
    length = x.shape[-2]
    if t is None:
        return torch.arange(length, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    t = as_times(t, x.device)
    if t.shape != (length,):
        raise ValueError(
            f"t must have shape ({length},), one time per row of x {tuple(x.shape)}, but it has {tuple(t.shape)}."
        )
    unordered = ~(t.detach().diff() > 0)
    if unordered.any():
        i = int(unordered.int().argmax())
        raise ValueError(
            f"t must be strictly increasing, but t[{i + 1}] = {t[i + 1].item()} follows t[{i}] = {t[i].item()}: "
            "sort the observations by time and merge those at equal times."
        )
    return t


def _rows_within(x: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
    length, batch = x.shape[0], x.shape[1:-1]
    lengths = torch.as_tensor(lengths, device=x.device)
    if lengths.shape != batch or lengths.is_floating_point():
        raise ValueError(
            f"lengths must be integers of shape {tuple(batch)}, one per sample, but they are {lengths.dtype} of shape "
            f"{tuple(lengths.shape)}."
        )
    low, high = (int(v) for v in lengths.aminmax())
    if low < 1 or high > length:
        raise ValueError(f"lengths must lie from 1 to {length}, the rows of x, but they reach from {low} to {high}.")
    row = torch.arange(length, device=x.device).reshape(-1, *(1,) * (x.ndim - 1))
    return row < lengths.unsqueeze(-1)


def _raise_if_unusable(x: Tensor, missing: Tensor, *, infinite: bool, empty: bool) -> None:
    if infinite or empty:
        num_batches = of_every_sample(x).ndim - x.ndim
        x, missing = (of_every_sample(values).movedim(num_batches, 0) for values in (x, missing))
    if infinite:
        row, *sample, channel = (torch.isinf(x) & ~missing).nonzero()[0].tolist()
        raise ValueError(
            f"x is infinite in channel {channel} at row {row} of sample {sample}: use NaN for a missing value."
        )
    if empty:
        *sample, channel = missing.all(0).nonzero()[0].tolist()
        raise ValueError(
            f"channel {channel} of sample {sample} has no observation at all (every value is NaN or past its length): "
            "drop the channel or put in a value, such as the channel's mean."
        )
