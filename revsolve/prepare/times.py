"""Times: checked at the door, and as the field receives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import OneSided, Time
from revsolve.core.caller import warn
from revsolve.field.functorch import numbers, transformed, version_of
from revsolve.field.repeat import capturing

REMEMBERED_TIMES = 4096  # the backward pass asks for those of the forward pass again


def check_times(t: Any, name: str = "t") -> list[float]:
    """The times as floats (one device read). Raises unless they are 1-D, finite and strictly monotone."""
    if isinstance(t, Tensor):
        if t.ndim != 1 or not t.is_floating_point():
            raise ValueError(
                f"{name} must be a 1-D floating point tensor, from the initial time on, as in torch.tensor([0.0, 1.0]), but it "
                f"has shape {tuple(t.shape)}, dtype {t.dtype}."
            )
        if torch.compiler.is_dynamo_compiling():
            raise ValueError(f"torch.compile hides the numbers in {name}: give a list of times instead of a tensor.")
        if t.is_cuda and capturing():
            raise ValueError(
                f"{name} is on the GPU, where a CUDA graph under capture cannot read it: give a list or {name}.cpu()."
            )
        times = numbers(t, name)
    else:
        try:
            times = [float(s) for s in t]
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be a 1-D tensor or a list of numbers, from the initial time on, as in [0.0, 1.0], but it is "
                f"{t!r:.80}."
            ) from error
    if not times:
        raise ValueError(f"{name} is empty: give at least the initial time.")
    for i, s in enumerate(times):
        if not math.isfinite(s):
            raise ValueError(f"{name} must be finite, but {name}[{i}] = {s}.")
        if i and (s - times[i - 1]) * (times[-1] - times[0]) <= 0:
            remedy = "drop the repeated time" if times[i] == times[i - 1] else "sort the times"
            raise ValueError(
                f"{name} must be strictly monotone, but {name}[{i}] = {times[i]} follows {name}[{i - 1}] = {times[i - 1]}: "
                f"{remedy}."
            )
    return times


class Clock:
    """Times as the field receives them: tensors without dimensions, in the real dtype and on the device of the state.

    They are later by `shift`, a tensor that is zero: its gradient is that of moving all times at once.
    """

    additive = True  # what passes in two spans, one after the other, passes at one speed

    def __init__(self, dtype: torch.dtype, device: torch.device, shift: Tensor | None = None) -> None:
        self.dtype, self.device = dtype, device
        self.shift = None if shift is None else shift.to(device, dtype)
        self.recent: dict[float, Tensor] = {}
        self.traced = torch.compiler.is_compiling()
        self.within = transformed()  # what is made there ends with the transform

    def __call__(self, t: Time) -> Tensor:
        now: Tensor | None
        if isinstance(t, Tensor):
            now = t.to(self.device, self.dtype)
        else:
            now = self.recent.get(t)
            # Fields may change theirs.
            if now is None or not (self.traced or (version_of(now) == 0 and not now.requires_grad)):
                now = self._constant(t)
        return now if self.shift is None else now + self.shift

    def control(self, t: Any, t0: Any, t1: Any) -> Any:
        """How much time passes."""
        return t1 - t0

    def _constant(self, t: float) -> Tensor:
        if len(self.recent) >= REMEMBERED_TIMES:
            self.recent.clear()
        made = torch.full((), t, dtype=self.dtype, device=self.device)
        made = next_to(made, t.side) if isinstance(t, OneSided) else made
        # One of inference mode does not tell whether a field changed it.
        if self.traced or not (self.within or made.is_inference()):
            self.recent[t] = made
        return made


def next_to(t: Tensor, side: float) -> Tensor:
    """The next number of its dtype: a later one where `side` is positive, else an earlier one."""
    return torch.nextafter(t, torch.full_like(t, math.copysign(math.inf, side)))


def resolution(t: Any) -> float:
    """The rounding of the times, relative to the largest."""
    return torch.finfo(t.dtype if isinstance(t, Tensor) else torch.float64).eps


def warn_of_indistinct(times: Sequence[float], dtype: torch.dtype) -> None:
    """Warn where the field's dtype cannot tell steps of their mean length apart."""
    start, end = times[0], times[-1]
    if abs(end - start) < (len(times) - 1) * torch.finfo(dtype).eps * max(abs(start), abs(end)):
        warn(
            f"the field receives times in the dtype of the state, {dtype}, which cannot tell these steps apart: count times "
            "from zero (pass t - t[0], and add t[0] in the field, in double precision, if it needs the date), or make the "
            "state float64."
        )


def as_tensor(x: Any) -> Tensor:
    """Numbers as a tensor in double precision, which is theirs; a tensor stays as it is."""
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")
