"""The derivative of a diffusion by the state, taken within the field: by autograd, or by torch.func where its transforms are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import vjp

from revsolve.core.tape import leaf_of
from revsolve.field.functorch import dual_numbers, followed_innermost, transformed

Fields = Callable[[Tensor], tuple[Tensor, Tensor]]  # y -> (f, g)


class Derivative(Protocol):
    """Products with the Jacobian J of g at y; None where g does not depend on y."""

    @property
    def g(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...

    def pull(self, cotangent: Tensor) -> Tensor | None:
        """J^T cotangent, shaped like y."""
        ...

    def push(self, tangent: Tensor) -> Tensor | None:
        """J tangent, shaped like g."""
        ...


def differentiated(fields: Fields, x: Tensor, record: bool) -> tuple[Tensor, Derivative]:
    """f and the derivative of g at x, from one call; functions of all they depend on where `record`, else constant."""
    own = not (record and x.requires_grad)
    if not torch.compiler.is_compiling() and (transformed() or dual_numbers() or (record and own)):
        return _functional(fields, x)  # which leaves no trace of a leaf of our own
    with torch.enable_grad():
        y = leaf_of(x) if own else x
        f, g = fields(y)
        _check_tensor(g)
    return (f if record else f.detach()), _Recorded(g if record else g.detach(), y, g, record)


@dataclass(frozen=True)
class _Recorded:
    """By autograd."""

    g: Tensor
    y: Tensor
    history: Tensor  # g as it was computed
    record: bool

    def pull(self, cotangent: Tensor) -> Tensor | None:
        return self._pull(cotangent, self.record)

    def push(self, tangent: Tensor) -> Tensor | None:
        """The derivative of the vector-Jacobian product, which is linear in its cotangent.

        The cotangent is a zero computed from g: autograd looks for what was made after its inputs only, and a leaf would let it
        look through the whole history of y.
        """
        with torch.enable_grad():
            cotangent = self.history - self.history
        linear = self._pull(cotangent, True)
        if linear is None or not linear.requires_grad:
            return None
        return torch.autograd.grad(linear, cotangent, tangent, retain_graph=True, create_graph=self.record)[0]

    def _pull(self, cotangent: Tensor, record: bool) -> Tensor | None:
        if not self.history.requires_grad:
            return None
        return torch.autograd.grad(
            self.history, self.y, cotangent, retain_graph=True, create_graph=record, allow_unused=True
        )[0]


@dataclass(frozen=True)
class _Functional:
    """By torch.func, whose other transforms go through it."""

    g: Tensor
    y: Tensor
    products: Callable[[Tensor], tuple[Tensor]]
    depends: bool

    def pull(self, cotangent: Tensor) -> Tensor | None:
        return self.products(cotangent)[0] if self.depends else None

    def push(self, tangent: Tensor) -> Tensor | None:
        return vjp(self.products, torch.zeros_like(self.g))[1]((tangent,))[0] if self.depends else None


def _functional(fields: Fields, x: Tensor) -> tuple[Tensor, Derivative]:
    depends: list[bool] = []

    def swapped(y: Tensor) -> tuple[Tensor, Tensor]:
        f, g = fields(y)
        _check_tensor(g)
        depends.append(followed_innermost(g))
        return g, f

    g, products, f = vjp(swapped, x, has_aux=True)  # type: ignore[misc]
    return f, _Functional(g, x, products, depends[0])


def _check_tensor(g: Any) -> None:
    if not isinstance(g, Tensor):
        raise TypeError(f"the diffusion must be a tensor, but it is a {type(g).__name__}.")
