"""Ito equations as Stratonovich ones, exactly: the drift f becomes f + shift with

    shift_i = -1/2 sum_{j,l} (d g_il / d y_j) g_jl,

by automatic differentiation of g, never by differences. For diagonal noise that is -1/2 g_i d g_i / d y_i, which one
vector-Jacobian product J^T g gives where each g_i depends on y_i alone, and d of them where it does not (d numbers a sample).

Which of the two holds is decided before the solve, by where NaN in the state reaches: it passes zero weights, closed relus and
schedules that begin at zero, which let no derivative through. Every evaluation then compares J^T g with (J^T (v g)) / v for
powers of two v that differ from entry to entry (or from sample to sample). Scaling by these is exact, so that a difference shows
a dependence that the formula does not know; the shift becomes NaN there.

Paper: Kloeden and Platen (1992), "Numerical Solution of Stochastic Differential Equations", 4.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from revsolve.field.functorch import of_every_sample, outside
from revsolve.sde.coefficients import Coefficients, Product
from revsolve.sde.derivative import Derivative, Fields, differentiated

Diffusion = Callable[[Tensor], Tensor]
LARGEST = 30  # exponent of the powers of two, for all dtypes but float16
MIXED = (
    "the diffusion of one sample depends on other samples of the batch, so the Ito correction would need the whole Jacobian: "
    "make samples independent, or give the SDE in Stratonovich form."
)
COUPLED = (
    "an entry of the diffusion depends on another one, or on other samples of the batch, which did not show when it was first "
    "called: set noise_type to 'general' and return torch.diag_embed(g), or give the SDE in Stratonovich form."
)
NOT_ADDITIVE = (
    "noise_type is 'additive', but g changes with y: set it to 'general', or to 'diagonal' where g is shaped like y."
)


@dataclass(frozen=True)
class Shift:
    """The shift by the derivative of g at a state; None where g has no derivative there.

    `formula` gives -2 times the shift if no entry of g depends on one of another weight; `weights` are powers of two that
    broadcast like the state, None where all depend on each other as they may.
    """

    formula: Callable[[Derivative], Tensor | None]
    weights: Tensor | None
    refusal: str

    def __call__(self, at: Derivative, check: bool = True, when: float | None = None) -> Tensor | None:
        """With `check`, NaN where g has a dependence that the formula does not know; a ValueError where the time is given."""
        total = self.formula(at)
        if total is None:
            return None
        shift = -0.5 * total
        if not check or self.weights is None:
            return shift
        wrong = self.dependence(at, total if self.formula is _of_own_entries else at.pull(at.g))
        return settled(shift, wrong, self.refusal, when)

    def dependence(self, at: Derivative, plain: Tensor | None) -> Tensor:
        """Whether an entry depends on one of another weight, given J^T g: a tensor without dimensions."""
        assert self.weights is not None and plain is not None
        weights = self.weights if at.g.ndim == at.y.ndim else self.weights.unsqueeze(-1)
        weighted = at.pull(at.g.detach() * weights)
        assert weighted is not None
        plain, rounding = plain.detach(), torch.finfo(plain.dtype)
        allowed = plain.abs().mul(math.sqrt(rounding.eps)).add(4 * rounding.tiny)
        return ((weighted.detach() / self.weights - plain).abs() > allowed).any()


def settled(value: Tensor, wrong: Tensor, refusal: str, when: float | None) -> Tensor:
    """The value, NaN where something is wrong, so that no solve ends with a number; a ValueError where the time is given."""
    if when is not None and bool(of_every_sample(wrong).any()):
        raise ValueError(f"at t = {when:.6g}, {refusal}")
    return torch.where(wrong, math.nan, value)


def shift_of(noise_type: str, diffusion: Diffusion, y0: Tensor) -> Shift | None:
    """The shift for a noise type; None where there is none. Probes the diffusion near y0.

    Raises ValueError where the shift cannot be had: samples of a batch mix, or the diffusion has no derivative.
    """
    if noise_type == "additive":
        return None
    diagonal = noise_type == "diagonal"
    samples = y0.shape[:1] if diagonal and y0.ndim > 1 else y0.shape[:0] if diagonal else y0.shape[:-1]
    shape = *samples, *(1 for _ in y0.shape[len(samples) :])
    of_entries = Shift(_of_own_entries, powers_of_two(y0.shape, y0), COUPLED)
    of_samples = Shift(_of_diagonal_jacobian if diagonal else _of_columns, powers_of_two(shape, y0), MIXED)
    normal, apart, values = _generator_of(y0), diagonal, []
    for scale in (0.0, 1.0):
        at = differentiated(lambda y: (y, diffusion(y)), y0.detach() + scale * normal(y0.shape), record=False)[1]
        plain = at.pull(at.g)
        values.append(of_every_sample(at.g) if plain is None else None)
        if plain is not None:
            refused = of_samples.weights is not None and _shows(of_samples.dependence(at, plain))
            apart = apart and (y0.numel() == 1 or not _shows(of_entries.dependence(at, plain)))
            if refused:
                raise ValueError(MIXED)
    _refuse_no_derivative(diffusion, y0, *values)
    if None not in values:  # a constant
        return of_entries if diagonal else of_samples
    if apart and _nan_stays(diffusion, y0, _patterns(y0, len(samples))):
        return of_entries
    if of_samples.weights is not None and _nan_stays(diffusion, y0, [_half(of_samples.weights)]) is False:
        raise ValueError(MIXED)
    return of_samples


def additive(parts: Coefficients, weights: Tensor | None, always: bool, refuse: bool) -> Coefficients:
    """The coefficients with a g that is NaN where it depends on y, or raises: it would be solved as another equation.

    Looked for where no gradient by the state is recorded, or `always`. `weights` are powers of two in the shape of g, or of its
    products with the noise, if that is all there is: derivatives with these do not cancel.
    """

    def held(fields: Fields, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        record = torch.is_grad_enabled()
        if record and y.requires_grad and not always:
            return fields(y)
        f, at = differentiated(fields, y, record)
        same = weights is not None and weights.shape == at.g.shape  # another shape is refused by the term
        got = at.pull(weights if weights is not None and same else torch.ones_like(at.g))
        if got is None:
            return f, at.g
        allowed = math.sqrt(torch.finfo(got.dtype).eps) * at.g.detach().abs().amax()
        return f, settled(at.g, (got.detach().abs() > allowed).any(), NOT_ADDITIVE, float(t.max()) if refuse else None)

    if parts.apart is None or parts.joint:
        return replace(parts, f_and_g=lambda t, y: held(lambda y: parts.f_and_g(t, y), t, y), apart=None)
    f, g = parts.apart

    def diffusion(t: Tensor, y: Tensor) -> Any:
        if parts.product_only:
            return Product(lambda t, y, v: held(lambda y: (y, g(t, y).product(t, y, v)), t, y)[1], t, y)
        return held(lambda y: (y, g(t, y)), t, y)[1]

    return replace(parts, f_and_g=lambda t, y: (f(t, y), diffusion(t, y)), apart=(f, diffusion))


def _of_own_entries(at: Derivative) -> Tensor | None:
    return at.pull(at.g)


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
    return g * torch.stack(rows, dim=-1).reshape(y.shape)


def _of_columns(at: Derivative) -> Tensor | None:
    total = None
    for column in range(at.g.shape[-1]):
        got = at.push(at.g[..., column])
        if got is None:
            return None
        total = got[..., column] if total is None else total + got[..., column]
    return total


def perturbed(y: Tensor) -> Tensor:
    """A state nearby, with nothing special about it."""
    return y + _generator_of(y)(y.shape)


def _generator_of(y0: Tensor) -> Callable[[tuple[int, ...]], Tensor]:
    """Normal numbers that do not move the user's random state, the same for all samples of a torch.vmap."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        with outside():
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(y0.device, y0.dtype)

    return normal


def powers_of_two(shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """As many different ones as there are, in no order; None where one is enough."""
    number, largest, kind = math.prod(shape), 3 if like.dtype == torch.float16 else LARGEST, (like.device, like.dtype)
    if number == 1:
        return None
    with outside():
        order = torch.randperm(number, generator=torch.Generator().manual_seed(0), device="cpu")
        exponents = order % (2 * largest + 1) - min(largest, number // 2)
        return torch.pow(2.0, exponents.double()).reshape(shape).to(*kind)


def _shows(wrong: Tensor) -> bool:
    return bool(of_every_sample(wrong).any())


def _nan_stays(diffusion: Diffusion, y0: Tensor, masks: Iterable[Tensor]) -> bool | None:
    """Whether NaN in these places of the state reaches no others of the diffusion; None if it cannot be said."""
    for mask in masks:
        try:
            with torch.no_grad():
                g = diffusion(torch.where(mask, math.nan, y0.detach()))
        except Exception:  # noqa: BLE001 - whatever a field makes of NaN; the general formula needs no answer
            return None
        if _shows(g.isnan() & ~(mask if g.ndim == y0.ndim else mask.unsqueeze(-1))):
            return False
    return True


def _patterns(y0: Tensor, batched: int) -> Iterable[Tensor]:
    """Places of the state such that of any two entries of a sample each is once among them without the other."""
    num_samples = len(y0) if batched else 1
    size = y0.numel() // num_samples
    bits = max(1, (size - 1).bit_length())
    places = torch.arange(size, device="cpu")
    generator = torch.Generator().manual_seed(1)
    chosen = [places >> bit & 1 == side for bit in range(bits) for side in (0, 1)]
    with outside():
        while len(chosen) % num_samples:  # the other samples show whether samples mix
            chosen.append(torch.rand(size, generator=generator, device="cpu") < 0.5)
        return [x.reshape(y0.shape).to(y0.device) for x in torch.stack(chosen).split(num_samples)]


def _half(weights: Tensor) -> Tensor:
    """Every other sample, in no order."""
    with outside():
        order = weights.flatten().argsort(stable=True).argsort()
        return (order % 2 == 0).reshape(weights.shape)


def _refuse_no_derivative(diffusion: Diffusion, y0: Tensor, here: Tensor | None, there: Tensor | None) -> None:
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
