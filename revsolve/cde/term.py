"""The term of a CDE: the field f(t, z), a matrix, applied to what the path does over a span of time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revsolve.backends import TensorControl
from revsolve.cde.drive import Drive, Slopes
from revsolve.core.arithmetic import Time
from revsolve.prepare.state import Packing, form


class CDETerm:
    """f(t, z) dX, whose control is what the path does over a span."""

    def __init__(self, func: Any, packing: Packing, drive: Drive, clock: Any) -> None:
        self.func, self.packing, self.control = func, packing, drive
        self.clock, self.additive = clock, drive.additive
        self.form: Any = None


class MatrixTerm(CDETerm):
    """For a field whose value is the matrix f(t, z), or one for every state of a tuple."""

    def value(self, t: Time, x: Tensor) -> Any:
        return self.func(self.clock(t), self.packing.unpack(x))

    def product(self, value: Any, control: tuple[Any, Time]) -> tuple[Tensor, Time]:
        dx, scale = control
        if (found := form(value)) != self.form:
            check_field(self.packing, value, dx)
            self.form = found
        if self.packing.lone:
            return applied(value, dx), scale
        return self.packing.pack([applied(*pair) for pair in zip(value, dx, strict=True)]), scale


class ProductTerm(CDETerm):
    """For a field with a method `prod(t, z, dX)`, of which the value is but the place (t, x)."""

    late = True

    def value(self, t: Time, x: Tensor) -> tuple[Time, Tensor]:
        return t, x

    def product(self, value: tuple[Time, Tensor], control: tuple[Any, Time]) -> tuple[Tensor, Time]:
        (t, x), (dx, scale) = value, control
        own = dx.clone() if isinstance(dx, Tensor) else tuple(map(torch.clone, dx))  # which may be changed in place
        k = self.func.prod(self.clock(t), self.packing.unpack(x), own)
        self.packing.check_like(k, "func.prod")
        return self.packing.pack(k), scale


def source_of(term: CDETerm) -> TensorControl:
    """The path as what drives the term in programs. Raises ValueError where programs cannot take it."""
    drive = term.control
    if isinstance(term, ProductTerm) or not term.packing.lone or any(x.requires_grad for x in drive.tensors):
        raise ValueError(
            "compile= is for one state, a field whose value is a matrix and a path without gradients: detach the path, or leave "
            "out compile=."
        )
    by_slope = isinstance(drive, Slopes)

    def ask(t: float, t0: float, t1: float) -> Tensor:
        dx, scale = drive(t, t0, t1)
        return dx if by_slope else dx * scale

    return TensorControl(ask, lambda row, t0, t1: (row, t1 - t0 if by_slope else 1.0))


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
        wanted = (*shape, slope.shape[-1])
        told = f"(..., hidden, channels) = {wanted} for z of shape {tuple(shape)} and a path of {wanted[-1]} channels"
        hint = f": reshape it, say with .view(*z.shape, {wanted[-1]})"
        packing.check_leaf(out, "func", wanted, dtype, told, hint)
