"""The term of a CDE: the field f(t, z), a matrix, applied to what the path does over a span of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revsolve.cde.drive import Drive
from revsolve.core.coupling import Time
from revsolve.drivers.control import Control
from revsolve.packing import Clock, Packing


class CDETerm:
    """The term f(t, z) dX of a lone state or a tuple of states.

    A field with a method `prod(t, z, dX)` computes its product with dX itself. As dX is not known before the span is, its
    value then stands for the place of the evaluation, and the product evaluates.
    """

    def __init__(self, func: Any, packing: Packing, drive: Drive) -> None:
        self.func, self.packing, self.drive = func, packing, drive
        self.prod: Callable[..., Any] | None = getattr(func, "prod", None)
        self.clock = Clock(packing.real_dtype, packing.device)
        self.checked = False

    def value(self, t: Time, x: Tensor) -> tuple[Time, Any]:
        z = self.packing.unpack(x)
        return (t, z) if self.prod is not None else (t, self.func(self.clock(t), z))

    def product(self, value: tuple[Time, Any], t0: Time, t1: Time) -> tuple[Tensor, Time]:
        t, f = value
        dx, scale = self.drive(t, t0, t1)
        return self.along(t, f, dx), scale

    def along(self, t: Time, f: Any, dx: Any) -> Tensor:
        """f dX as one tensor, where f is the value of the field, or the state if that has a method `prod`."""
        if self.prod is not None:
            k = self.prod(self.clock(t), f, dx)
            if not self.checked:
                self.packing.check_like(k, "func.prod")
        else:
            if not self.checked:
                check_field(self.packing, f, dx)
            k = applied(f, dx) if self.packing.lone else [applied(*pair) for pair in zip(f, dx, strict=True)]
        self.checked = True
        return self.packing.pack(k)

    def rate(self, t: float, x: Tensor, control: Control) -> Tensor:
        """dz/dt at one time and state."""
        return self.along(*self.value(t, x), control.derivative(t))


def applied(f: Tensor, dx: Tensor) -> Tensor:
    """f dX: (..., hidden, channels) times (..., channels) gives (..., hidden), in the precision of dX."""
    if torch.is_autocast_enabled(f.device.type):  # a matrix product would be rounded to half precision
        return (f.to(dx.dtype) * dx.unsqueeze(-2)).sum(-1)
    # torch.matmul finds its way to the same kernel, but takes half as long again.
    product = torch.bmm if f.ndim == 3 else torch.matmul
    return product(f, dx.unsqueeze(-1)).squeeze(-1)


def check_field(packing: Packing, f: Any, dx: Any) -> None:
    """Raise unless the field returned a matrix (..., hidden, channels) for every state, of the state's dtype and device."""
    fields, paths = ([f], [dx]) if packing.lone else (f, dx)
    if not isinstance(fields, (tuple, list)) or len(fields) != len(packing.shapes):
        raise ValueError(
            f"func must return one matrix for each of the {len(packing.shapes)} states in z0, but it returned {f!r:.60}."
        )
    for out, slope, shape, dtype in zip(fields, paths, packing.shapes, packing.dtypes, strict=True):
        if not isinstance(out, Tensor):
            raise TypeError(f"func must return tensors, but it returned {type(out).__name__} {out!r:.60}.")
        wanted = (*shape, slope.shape[-1])
        if out.shape != wanted:
            raise ValueError(
                f"func must return (..., hidden, channels) = {wanted} for z of shape {tuple(shape)} and a path of {wanted[-1]} "
                f"channels, but it returned {tuple(out.shape)}: reshape it, say with .view(*z.shape, {wanted[-1]})."
            )
        if out.device != packing.device:
            raise ValueError(f"func returned a tensor on {out.device}, but {packing.name} is on {packing.device}.")
        if out.dtype != dtype and not torch.is_autocast_enabled(out.device.type):
            raise TypeError(f"func must return the dtype of {packing.name}, {dtype}, but it returned {out.dtype}.")
