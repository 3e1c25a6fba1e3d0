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
    """The shift for a noise type; None where there is none. Probes the diffusion near y0.

    Raises ValueError where the shift cannot be had: samples of a batch mix, or the diffusion has no derivative.
    """
    if noise_type == "additive":
        return None
    if transformed():
        raise ValueError(
            "the diffusion of an Ito equation cannot be differentiated inside torch.func transforms: give the SDE in "
            "Stratonovich form, or use method='euler', which needs no derivative."
        )
    apart = _entries_stay_apart(diffusion, y0, noise_type == "diagonal")
    if noise_type != "diagonal":
        return _of_columns
    return _of_own_entries if apart else _of_diagonal_jacobian


def refuse_dependence(diffusion: Callable[[Tensor], Tensor], y0: Tensor) -> None:
    """Raise ValueError if a diffusion of additive noise has a derivative by y: it would be solved as another equation."""
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        y = (y0 + torch.randn(y0.shape, generator=generator, dtype=torch.float64).to(y0)).requires_grad_()
        g = diffusion(y)
    got = _vjp(g, y, torch.ones_like(g), False)
    if got is not None and float(got.abs().max()) > math.sqrt(torch.finfo(y0.dtype).eps) * float(
        g.detach().abs().max()
    ):
        raise ValueError(
            "noise_type is 'additive', but g changes with y: set it to 'general', or to 'diagonal' where g is shaped like y."
        )


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


def _entries_stay_apart(diffusion: Callable[[Tensor], Tensor], y0: Tensor, diagonal: bool) -> bool:
    """Whether each entry of a diagonal g depends on its own entry of y alone. Raises ValueError if samples of the batch mix,
    or if g depends on y without a derivative.

    v * (J^T v) is the diagonal of J, and the same for all signs v, exactly where J is diagonal; signs that change only
    from sample to sample leave it, and any J^T c, alone where samples do not mix.
    """
    generator = torch.Generator().manual_seed(0)  # a probe must not move the user's random state

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(y0)

    apart, values = True, []
    for scale in (0.0, 1.0):
        with torch.enable_grad():
            y = (y0.detach() + scale * normal(y0.shape)).requires_grad_()
            g = diffusion(y)
        seen = _seen_with_signs(g, y, normal, diagonal)
        values.append(None if seen else g.detach())
        if not seen:
            continue
        tolerance = math.sqrt(torch.finfo(y0.dtype).eps) * max(float(x.abs().max()) for x in seen)
        if float((seen[0] - seen[1]).abs().max()) > tolerance:
            raise ValueError(
                "the diffusion of one sample depends on other samples of the batch, so the Ito correction would need the whole "
                "Jacobian: make samples independent, or give the SDE in Stratonovich form."
            )
        apart = apart and float((seen[0] - seen[-1]).abs().max()) <= tolerance
    _refuse_no_derivative(diffusion, y0, *values)
    return apart


def _seen_with_signs(g: Tensor, y: Tensor, normal: Callable[[tuple[int, ...]], Tensor], diagonal: bool) -> list[Tensor]:
    """The same products with the Jacobian for various signs; nothing where there is no Jacobian."""
    pairs: list[tuple[Tensor | float, Tensor]]
    if diagonal:
        v, w = normal(y.shape).sign(), normal(y.shape).sign()
        sample = normal(y.shape[:1] + (1,) * (y.ndim - 1)).sign() if y.ndim > 1 else 1.0
        pairs = [(v, v), (v * sample, v * sample), (w, w)]
    else:
        c, sample = normal(g.shape), normal((*y.shape[:-1], 1)).sign()
        pairs = [(1.0, c), (sample, sample.unsqueeze(-1) * c)]
    return [u * got for u, c in pairs if (got := _vjp(g, y, c, False)) is not None]


def _refuse_no_derivative(
    diffusion: Callable[[Tensor], Tensor], y0: Tensor, here: Tensor | None, there: Tensor | None
) -> None:
    """Raise ValueError if g, of which two values without derivatives are given, changes with y and not at random."""
    if here is None or there is None or torch.equal(here, there):
        return
    with torch.no_grad():
        again = diffusion(y0)
    if torch.equal(here, again):
        raise ValueError(
            "the diffusion changes with y, but autograd finds no derivative, which the Ito correction needs: take out what cuts "
            "it off (detach, no_grad, numpy, steps), give the SDE in Stratonovich form, or use method='euler'."
        )
