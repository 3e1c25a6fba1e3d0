"""The arithmetic of the pair: linear combinations of tensors in as few kernels as their coefficients allow.

Another arithmetic (fixed-point integers that are undone to the last bit, say) would take the place of this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor
Time = float | Tensor


class OneSided(float):
    """A time at which the field jumps, seen from one side: the field receives the next representable time on that side, later
    where `side` is 1, earlier where it is -1. Spans of time are those to the jump itself."""

    side: float

    def __new__(cls, t: float, side: float) -> OneSided:
        made = super().__new__(cls, t)
        made.side = side
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OneSided) and float(self) == float(other) and self.side == other.side

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((float(self), self.side))


def moment(t0: Time, t1: Time, fraction: float) -> Time:
    """t0 + fraction * (t1 - t0), exact at both ends."""
    if fraction == 0.0:
        return t0
    if fraction == 1.0:
        return t1
    return t0 + fraction * (t1 - t0)


def plus(x: Tensor, k: Tensor, weight: float) -> Tensor:
    """x + weight * k, in one kernel."""
    if torch.compiler.is_compiling():  # inductor of torch 2.13 leaves out alpha where k is a product of matrices
        return x + weight * k
    return torch.add(x, k, alpha=weight)


def scaled_add(x: Tensor | None, k: Tensor, weight: Scalar, factor: Scalar = 1.0) -> Tensor:
    """x + factor * weight * k, where x = None stands for zero."""
    if not (isinstance(weight, Tensor) or isinstance(factor, Tensor)):
        weight *= factor
        if x is None:
            return k if weight == 1.0 else k.mul(weight)  # two thirds of the time of the operator
        return plus(x, k, weight)
    if isinstance(factor, Tensor):
        weight, factor = factor * weight, 1.0
    assert isinstance(weight, Tensor)
    if x is not None and x.dtype == k.dtype == weight.dtype:
        return torch.addcmul(x, k, weight, value=factor)
    scaled = like(weight, k) * k
    return scaled * factor if x is None else plus(x, scaled, factor)


def linear(keep: Scalar, target: Tensor | None, mix: Scalar, source: Tensor) -> Tensor | None:
    """keep * target + mix * source in as few kernels as the coefficients allow; None stands for zero.

    A source narrower than the target is widened first, so that a sum has the same rounding whichever term is solved for.
    """
    own = target is not None and source.dtype is not target.dtype  # whether the result may take the place of the source
    if own:
        source = source.to(target.dtype)  # type: ignore[union-attr]
    if keep.__class__ is not float or mix.__class__ is not float:
        out = None if target is None else target if equals(keep, 1.0) else keep * target
        return out if equals(mix, 0.0) else scaled_add(out, source, mix)
    if target is None:
        return None if mix == 0.0 else source if mix == 1.0 else source.mul(mix)
    if mix == 0.0:
        return target if keep == 1.0 else -target if keep == -1.0 else target.mul(keep)
    if keep == 1.0:
        return plus(target, source, mix)
    if abs(keep + mix - 1.0) < 1e-14:
        return _lerp_in(source, target, keep) if own else torch.lerp(source, target, keep)
    if keep == -1.0:
        return -plus(target, source, -mix)
    return plus(target.mul(keep), source, mix)


def _lerp_in(source: Tensor, target: Tensor, weight: float) -> Tensor:
    """source + weight * (target - source), in the memory of the source: a state less at the peak."""
    try:
        return source.lerp_(target, weight)
    except RuntimeError:  # inside torch.vmap, a source that all samples share has no room for theirs
        return torch.lerp(source, target, weight)


def accumulate(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """total + grad, where None stands for zero."""
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad


def widest(device: torch.device) -> torch.dtype:
    """The real dtype with the most digits on a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def value_of(coefficient: Scalar) -> Scalar:
    """The coefficient without its history."""
    return coefficient.detach() if isinstance(coefficient, Tensor) else coefficient


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient without dimensions in the real dtype of x, so that it promotes nothing."""
    return coefficient.to(x.real.dtype) if coefficient.ndim == 0 else coefficient


def equals(coefficient: Scalar, number: float) -> bool:
    """Whether it is this number, and not a tensor."""
    return coefficient.__class__ is float and coefficient == number
