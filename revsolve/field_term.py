"""The term of an ODE, h f(t, x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.prepare.state import Packing


class FieldTerm:
    """The term of an ODE: field value times h. `clock` says which time the field sees, and how much of it passes, the control."""

    def __init__(self, func: Callable[..., Any], packing: Packing, clock: Any) -> None:
        self.func, self.packing, self.clock = func, packing, clock
        self.adds_up = self.is_rate = clock.adds_up
        self.control, self.foresee = clock.control, clock.foresee
        self.checked = False

    def value(self, t: Time, x: Tensor) -> Tensor:
        lone = self.packing.lone
        out = self.func(self.clock(t), x if lone else self.packing.unpack(x))
        if not self.checked or (lone and (out.dtype is not x.dtype or out.shape != x.shape)):
            self.packing.check_like(out, "the field")
            self.checked = True
        if not lone:
            out = self.packing.pack(out)
        return out if out.dtype is x.dtype else out.to(x.dtype)

    def product(self, value: Tensor, control: Time) -> tuple[Tensor, Time]:
        return value, control
