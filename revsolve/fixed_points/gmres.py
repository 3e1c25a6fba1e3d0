"""GMRES (Saad & Schultz 1986), restarted: solves u = g + L u for a linear L that need not contract, by products with it alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from revsolve.fixed_points.convergence import SMALLEST, Convergence

Linear = Callable[[Tensor], Tensor]


def gmres(product: Linear, g: Tensor, memory: int, convergence: Convergence) -> Tensor:
    """The u that differs little enough from g + L u, where product(u) = L u, or the last one after max_steps directions.

    After `memory` directions it starts again from what it has; `convergence` sees the true residual whenever it does.
    """
    criterion = convergence.criterion
    u, value, used = torch.zeros_like(g), g, 0
    while used < criterion.max_steps:
        enough = criterion.tol * (SMALLEST + float(torch.linalg.vector_norm(value)))
        change, number = _cycle(product, value - u, min(memory, criterion.max_steps - used), enough)
        u, used = u + change, used + number
        value = g + product(u)
        if convergence.observe(used, u, value):
            break
    return u


def _cycle(product: Linear, gap: Tensor, most: int, enough: float) -> tuple[Tensor, int]:
    """Of all combinations of gap, L gap, L^2 gap, ... that x for which x - L x comes closest to the gap, and how many it took."""
    length = torch.linalg.vector_norm(gap)
    basis = [_vector(gap) / length.clamp_min(torch.finfo(length.dtype).tiny)]
    projected = torch.zeros(
        most + 1, most, dtype=torch.float64, device="cpu"
    )  # x - L x in the basis, one column for every direction
    target = torch.zeros(most + 1, dtype=torch.float64, device="cpu")
    target[0] = length
    for j in range(most):
        rest = basis[j] - _vector(product(_shaped(basis[j], gap)))
        rows = torch.stack(basis)  # (directions, numbers)
        for _ in range(2):  # the second time removes what rounding left of the first
            along = rows @ rest
            rest = rest - along @ rows
            projected[: j + 1, j] += along.to(projected)
        projected[j + 1, j] = size = float(torch.linalg.vector_norm(rest))
        part = projected[: j + 2, : j + 1]
        weights = torch.linalg.lstsq(part, target[: j + 2, None], driver="gelsd").solution[:, 0]
        left = float(torch.linalg.vector_norm(part @ weights - target[: j + 2]))
        if left <= enough or size <= torch.finfo(rest.dtype).eps or not math.isfinite(left):
            break  # close enough, or nothing new is reached
        basis.append(rest / size)
    return _shaped(weights.to(rows) @ rows, gap), j + 1


def _vector(x: Tensor) -> Tensor:
    """As a real vector, of float32 or wider: a derivative need not be linear over the complex numbers."""
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return real.reshape(-1).to(torch.promote_types(real.dtype, torch.float32))


def _shaped(vector: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(vector.view(*like.shape, 2)).to(like.dtype)
    return vector.view(like.shape).to(like.dtype)
