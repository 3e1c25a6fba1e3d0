"""The term of an ODE, h f(t, x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.packing import Clock, Packing


class FieldTerm:
    """The term of an ODE: field value times h. The field sees times `shift` later, a tensor that is zero: its gradient is that
    with respect to the initial time, where the whole grid moves with it."""

    adds_up = True

    def __init__(self, func: Callable[..., Any], packing: Packing, shift: Tensor | None = None) -> None:
        self.func, self.packing, self.shift = func, packing, shift
        self.clock = Clock(packing.real_dtype, packing.device)
        self.checked = False

    def time(self, t: Time) -> Tensor:
        """The time as the field receives it."""
        return self.clock(t) if self.shift is None else self.clock(t) + self.clock(self.shift)

    def value(self, t: Time, x: Tensor) -> Tensor:
        out = self.func(self.time(t), self.packing.unpack(x))
        if not self.checked or (self.packing.lone and (out.shape != x.shape or out.dtype != x.dtype)):
            self.packing.check_like(out, "the field")
            self.checked = True
        out = self.packing.pack(out)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def product(self, value: Tensor, t0: Time, t1: Time) -> tuple[Tensor, Time]:
        return value, t1 - t0


def time_shift(t: Any) -> Tensor | None:
    """Zero, with the gradient of the initial time; None where that needs none."""
    return t[0] - t[0].detach() if isinstance(t, Tensor) and t.requires_grad else None
