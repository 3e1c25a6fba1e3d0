"""Ito equations as Stratonovich ones, exactly: the drift f becomes f + shift with

    shift_i = -1/2 sum_{j,l} (d g_il / d y_j) g_jl,

by automatic differentiation of g, never by differences. For diagonal noise that is -1/2 g_i d g_i / d y_i, which one
vector-Jacobian product gives where each g_i depends on y_i alone, and d of them where it does not (d numbers a sample).

Paper: Kloeden and Platen (1992), "Numerical Solution of Stochastic Differential Equations", 4.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from revsolve.transforms.levels import transformed

Shift = Callable[[Tensor, Tensor, bool], Tensor | None]  # of g, the y from which it was computed, and whether to record


def shift_of(noise_type: str, diffusion: Callable[[Tensor], Tensor], y0: Tensor) -> Shift | None:
    """The shift for a noise type; None where there is none. Probes the diffusion of diagonal noise near y0."""
    if noise_type == "additive":
        return None
    if transformed():
        raise ValueError(
            "the diffusion of an Ito equation cannot be differentiated inside torch.func transforms: give the SDE in "
            "Stratonovich form, or use method='euler', which needs no derivative."
        )
    if noise_type != "diagonal":
        return _of_columns
    return _of_own_entries if _entries_stay_apart(diffusion, y0) else _of_diagonal_jacobian


def _of_own_entries(g: Tensor, y: Tensor, record: bool) -> Tensor | None:
    got = _vjp(g, y, g if record else g.detach(), record)
    return None if got is None else -0.5 * got


def _of_diagonal_jacobian(g: Tensor, y: Tensor, record: bool) -> Tensor | None:
    num_samples = len(y) if y.ndim > 1 else 1
    units = torch.eye(y.numel() // num_samples, dtype=y.dtype, device=y.device)
    rows = []
    for unit in units:
        got = _vjp(g, y, unit.expand(num_samples, -1).reshape(y.shape), record)
        if got is None:
            return None
        rows.append((got.reshape(num_samples, -1) * unit).sum(-1))
    return -0.5 * g * torch.stack(rows, dim=-1).reshape(y.shape)


def _of_columns(g: Tensor, y: Tensor, record: bool) -> Tensor | None:
    """Jacobian-vector products as derivatives of the vector-Jacobian product, which is linear in its cotangent."""
    cotangent = torch.zeros_like(g, requires_grad=True)
    linear = _vjp(g, y, cotangent, True)
    if linear is None or not linear.requires_grad:
        return None
    total = None
    for column in range(g.shape[-1]):
        direction = g[..., column] if record else g[..., column].detach()
        got = torch.autograd.grad(linear, cotangent, direction, retain_graph=True, create_graph=record)[0][..., column]
        total = got if total is None else total + got
    return None if total is None else -0.5 * total


def _vjp(g: Tensor, y: Tensor, cotangent: Tensor, record: bool) -> Tensor | None:
    if not g.requires_grad:
        return None
    return torch.autograd.grad(g, y, cotangent, retain_graph=True, create_graph=record, allow_unused=True)[0]


def _entries_stay_apart(diffusion: Callable[[Tensor], Tensor], y0: Tensor) -> bool:
    """Whether each entry of g depends on its own entry of y alone. Raises ValueError if samples of the batch mix.

    v * (J^T v) is the diagonal of J, and the same for all signs v, exactly where J is diagonal; signs that change only
    from sample to sample leave it alone where samples do not mix.
    """
    generator = torch.Generator().manual_seed(0)  # a probe must not move the user's random state

    def signs(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator).mul(2).sub(1).to(y0)

    apart = True
    for scale in (0.0, 1.0):
        noise = torch.randn(y0.shape, generator=generator, dtype=torch.float64).to(y0)
        with torch.enable_grad():
            y = (y0.detach() + scale * noise).requires_grad_()
            g = diffusion(y)
        v = signs(tuple(y0.shape))
        sample = signs((len(y0), *(1,) * (y0.ndim - 1))) if y0.ndim > 1 else 1.0
        seen = [u * got for u in (v, v * sample, signs(tuple(y0.shape))) if (got := _vjp(g, y, u, False)) is not None]
        if not seen:
            continue
        tolerance = math.sqrt(torch.finfo(y0.dtype).eps) * max(float(x.abs().max()) for x in seen)
        if float((seen[0] - seen[1]).abs().max()) > tolerance:
            raise ValueError(
                "the diffusion of one sample depends on other samples of the batch (dimension 0), so the Ito correction would "
                "need the whole Jacobian: make samples independent, or give the SDE in Stratonovich form."
            )
        apart = apart and float((seen[0] - seen[2]).abs().max()) <= tolerance
    return apart
