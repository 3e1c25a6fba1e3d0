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

from revsolve.field.functorch import of_every_sample, outside
from revsolve.sde.derivative import Derivative, differentiated

Shift = Callable[[Derivative], Tensor | None]  # of g at the state; None where g has no derivative there


def shift_of(noise_type: str, diffusion: Callable[[Tensor], Tensor], y0: Tensor) -> Shift | None:
    """The shift for a noise type; None where there is none. Probes the diffusion near y0.

    Raises ValueError where the shift cannot be had: samples of a batch mix, or the diffusion has no derivative.
    """
    if noise_type == "additive":
        return None
    apart = _entries_stay_apart(diffusion, y0, noise_type == "diagonal")
    if noise_type != "diagonal":
        return _of_columns
    return _of_own_entries if apart else _of_diagonal_jacobian


def refuse_dependence(diffusion: Callable[[Tensor], Tensor], y0: Tensor) -> None:
    """Raise ValueError if a diffusion of additive noise has a derivative by y: it would be solved as another equation."""
    normal = _generator_of(y0)
    found = _derivative(diffusion, y0 + normal(y0.shape))
    got = found.pull(torch.ones_like(found.g))
    if got is not None and _largest(got) > math.sqrt(torch.finfo(y0.dtype).eps) * _largest(found.g):
        raise ValueError(
            "noise_type is 'additive', but g changes with y: set it to 'general', or to 'diagonal' where g is shaped like y."
        )


def _of_own_entries(at: Derivative) -> Tensor | None:
    got = at.pull(at.g)
    return None if got is None else -0.5 * got


def _of_diagonal_jacobian(at: Derivative) -> Tensor | None:
    g, y = at.g, at.y
    num_samples = len(y) if y.ndim > 1 else 1
    units = torch.eye(y.numel() // num_samples, dtype=y.dtype, device=y.device)
    rows = []
    for unit in units:
        got = at.pull(unit.expand(num_samples, -1).reshape(y.shape))
        if got is None:
            return None
        rows.append((got.reshape(num_samples, -1) * unit).sum(-1))
    return -0.5 * g * torch.stack(rows, dim=-1).reshape(y.shape)


def _of_columns(at: Derivative) -> Tensor | None:
    total = None
    for column in range(at.g.shape[-1]):
        got = at.push(at.g[..., column])
        if got is None:
            return None
        total = got[..., column] if total is None else total + got[..., column]
    return None if total is None else -0.5 * total


def _derivative(diffusion: Callable[[Tensor], Tensor], y: Tensor) -> Derivative:
    return differentiated(lambda y: (y, diffusion(y)), y.detach(), record=False)[1]


def _generator_of(y0: Tensor) -> Callable[[tuple[int, ...]], Tensor]:
    """Normal numbers that do not move the user's random state, the same for all samples of a torch.vmap."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        with outside():
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(y0.device, y0.dtype)

    return normal


def _largest(x: Tensor) -> float:
    return float(of_every_sample(x).abs().max())


def _entries_stay_apart(diffusion: Callable[[Tensor], Tensor], y0: Tensor, diagonal: bool) -> bool:
    """Whether each entry of a diagonal g depends on its own entry of y alone. Raises ValueError if samples of the batch mix,
    or if g depends on y without a derivative.

    v * (J^T v) is the diagonal of J, and the same for all signs v, exactly where J is diagonal; signs that change only
    from sample to sample leave it, and any J^T c, alone where samples do not mix.
    """
    normal, apart, values = _generator_of(y0), True, []
    for scale in (0.0, 1.0):
        found = _derivative(diffusion, y0 + scale * normal(y0.shape))
        seen = _seen_with_signs(found, normal, diagonal)
        values.append(None if seen else of_every_sample(found.g))
        if not seen:
            continue
        tolerance = math.sqrt(torch.finfo(y0.dtype).eps) * max(map(_largest, seen))
        if _largest(seen[0] - seen[1]) > tolerance:
            raise ValueError(
                "the diffusion of one sample depends on other samples of the batch, so the Ito correction would need the whole "
                "Jacobian: make samples independent, or give the SDE in Stratonovich form."
            )
        apart = apart and _largest(seen[0] - seen[-1]) <= tolerance
    _refuse_no_derivative(diffusion, y0, *values)
    return apart


def _seen_with_signs(at: Derivative, normal: Callable[[tuple[int, ...]], Tensor], diagonal: bool) -> list[Tensor]:
    """The same products with the Jacobian for various signs; nothing where there is no Jacobian."""
    y = at.y
    pairs: list[tuple[Tensor | float, Tensor]]
    if diagonal:
        v, w = normal(y.shape).sign(), normal(y.shape).sign()
        sample = normal(y.shape[:1] + (1,) * (y.ndim - 1)).sign() if y.ndim > 1 else 1.0
        pairs = [(v, v), (v * sample, v * sample), (w, w)]
    else:
        c, sample = normal(at.g.shape), normal((*y.shape[:-1], 1)).sign()
        pairs = [(1.0, c), (sample, sample.unsqueeze(-1) * c)]
    return [u * got for u, c in pairs if (got := at.pull(c)) is not None]


def _refuse_no_derivative(
    diffusion: Callable[[Tensor], Tensor], y0: Tensor, here: Tensor | None, there: Tensor | None
) -> None:
    """Raise ValueError if g, of which two values without derivatives are given, changes with y and not at random."""
    if here is None or there is None or torch.equal(here, there):
        return
    with torch.no_grad():
        again = of_every_sample(diffusion(y0))
    if torch.equal(here, again):
        raise ValueError(
            "the diffusion changes with y, but autograd finds no derivative, which the Ito correction needs: take out what cuts "
            "it off (detach, no_grad, numpy, steps), give the SDE in Stratonovich form, or use method='euler'."
        )
