"""The derivative of a diffusion by the state, taken within the field: by autograd, or by torch.func where its transforms are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from revsolve.core.tape import leaf_of
from revsolve.field.functorch import dual_numbers, followed_innermost, transformed, vector_jacobian_product

Fields = Callable[[Tensor], tuple[Tensor, Tensor]]  # y -> (f, g)


def differentiated(fields: Fields, x: Tensor, record: bool) -> tuple[Tensor, Derivative]:
    """f and the derivative of g at x, from one call; functions of all they depend on where `record`, else constant."""
    own = not (record and x.requires_grad)
    if not torch.compiler.is_compiling() and (transformed() or dual_numbers() or (record and own)):
        return _by_transform(fields, x)  # which leaves no trace of a leaf of our own
    with torch.enable_grad():
        y = leaf_of(x) if own else x
        f, g = fields(y)
        _check_tensor(g)
    return (f if record else f.detach()), Derivative(g if record else g.detach(), y, g, record)


class Derivative:
    """Products with the Jacobian J of g at y; None where g does not depend on y. They have a graph if they may be recorded."""

    def __init__(self, g: Tensor, y: Tensor, history: Tensor, record: bool) -> None:
        self.g, self.y, self.history, self.record = g, y, history, record

    def pull(self, cotangent: Tensor, record: bool = True) -> Tensor | None:
        """J^T cotangent, shaped like y."""
        return self._pull(cotangent, record and self.record)

    def push(self, tangent: Tensor, record: bool = True) -> Tensor | None:
        """J tangent, shaped like g: the derivative of the vector-Jacobian product, which is linear in its cotangent."""
        linear, cotangent = self._transpose
        if linear is None or not linear.requires_grad:
            return None
        return vector_jacobian_product([linear], [cotangent], [tangent], keep=True, record=record and self.record)[0]

    @cached_property
    def _transpose(self) -> tuple[Tensor | None, Tensor]:
        """J^T cotangent as a function of a cotangent that is zero, and that.

        The zero is computed from g: autograd looks for what was made after its inputs only, and a leaf would let it look through
        the whole history of y.
        """
        with torch.enable_grad():
            cotangent = self.history - self.history
        return self._pull(cotangent, True), cotangent

    def _pull(self, cotangent: Tensor, record: bool) -> Tensor | None:
        if not self.history.requires_grad:
            return None
        return vector_jacobian_product([self.history], [self.y], [cotangent], keep=True, record=record)[0]


class _ByTransform(Derivative):
    """By torch.func, whose other transforms go through it."""

    def __init__(self, g: Tensor, y: Tensor, products: Callable[[Tensor], tuple[Tensor]], depends: bool) -> None:
        self.g, self.y, self.products, self.depends = g, y, products, depends

    def pull(self, cotangent: Tensor, record: bool = True) -> Tensor | None:
        return self.products(cotangent)[0] if self.depends else None

    def push(self, tangent: Tensor, record: bool = True) -> Tensor | None:
        return self._linear((tangent,))[0] if self.depends else None

    @cached_property
    def _linear(self) -> Any:
        return vjp(self.products, torch.zeros_like(self.g))[1]


def _by_transform(fields: Fields, x: Tensor) -> tuple[Tensor, Derivative]:
    depends: list[bool] = []

    def swapped(y: Tensor) -> tuple[Tensor, Tensor]:
        f, g = fields(y)
        _check_tensor(g)
        depends.append(followed_innermost(g))
        return g, f

    g, products, f = vjp(swapped, x, has_aux=True)  # type: ignore[misc]
    return f, _ByTransform(g, x, products, depends[0])


def _check_tensor(g: Any) -> None:
    if not isinstance(g, Tensor):
        raise TypeError(f"the diffusion must be a tensor, but it is a {type(g).__name__}.")
