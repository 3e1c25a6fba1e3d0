"""Ito equations as Stratonovich ones, exactly: the drift f becomes f + shift with

    shift_i = -1/2 sum_{j,l} (d g_il / d y_j) g_jl,

by automatic differentiation of g, never by differences. For diagonal noise that is -1/2 g_i d g_i / d y_i, which one
vector-Jacobian product J^T g gives where each g_i depends on y_i alone, and d of them where it does not (d numbers a sample).

Which of the two holds is decided before the solve, by where NaN in the state reaches: it passes zero weights, closed relus and
schedules that begin at zero, which let no derivative through. Every evaluation then compares J^T g with (J^T (v g)) / v for
powers of two v that differ from entry to entry (or from sample to sample; J in the place of J^T where g is a matrix). Scaling by
these is exact, so that a difference shows a dependence that the formula does not know, which is refused.

Paper: Kloeden and Platen (1992), "Numerical Solution of Stochastic Differential Equations", 4.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
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
NO_DERIVATIVE = (
    "the diffusion changes with y, but autograd finds no derivative, which the Ito correction needs: take out what cuts "
    "it off (detach, no_grad, numpy, steps), give the SDE in Stratonovich form, or use method='euler'."
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
        """With `check`, a dependence that the formula does not know is refused, see `settled`."""
        total = self.formula(at)
        if total is not None and check and self.weights is not None:
            total = settled(total, self.dependence(at, total), self.refusal, when)
        return None if total is None else -0.5 * total

    def dependence(self, at: Derivative, total: Tensor | None = None) -> Tensor:
        """Whether an entry depends on one of another weight: a tensor without dimensions. `total`: what the formula gave."""
        assert self.weights is not None
        along, weights, product = at.g.detach(), self.weights, at.pull  # type: Tensor, Tensor, Callable[..., Tensor | None]
        if along.ndim > at.y.ndim:  # all columns at once, with factors by which they do not cancel
            columns = torch.arange(1, along.shape[-1] + 1, dtype=along.dtype, device=along.device)
            along, weights, product = (along * columns).sum(-1), weights.unsqueeze(-1), at.push
        plain = total if total is not None and self.formula is _of_own_entries else product(along, False)
        weighted = product(along * self.weights, False)
        assert plain is not None and weighted is not None
        plain, rounding = plain.detach(), torch.finfo(plain.dtype)
        allowed = plain.abs().mul_(math.sqrt(rounding.eps)).add_(4 * rounding.tiny)
        return ((weighted.detach() / weights - plain).abs() > allowed).any()


def settled(value: Tensor, wrong: Tensor, refusal: str, when: float | None) -> Tensor:
    """The value, unless something is wrong: a ValueError where the time is given, else NaN, with which no solve ends."""
    if when is None or type(read := of_every_sample(wrong)) is not Tensor:  # a tensor of a trace holds no number
        return torch.where(wrong, math.nan, value)
    if bool(read.any()):
        raise ValueError(f"at t = {when:.6g}, {refusal}")
    return value


def shift_of(noise_type: str, diffusion: Diffusion, y0: Tensor) -> Shift | None:
    """The shift for a noise type; None where there is none. Probes the diffusion near y0.

    Raises ValueError where the shift cannot be had: samples of a batch mix, or the diffusion has no derivative.
    """
    if noise_type == "additive":
        return None
    diagonal, y = noise_type == "diagonal", y0.detach()
    samples = y.shape[: min(1, y.ndim - 1)] if diagonal else y.shape[:-1]
    of_entries = Shift(_of_own_entries, powers_of_two(y.shape, y), COUPLED)
    weights = powers_of_two((*samples, *[1] * (y.ndim - len(samples))), y)
    of_samples = Shift(_of_diagonal_jacobian if diagonal else _of_columns, weights, MIXED)
    apart, values = diagonal, []
    for x in (y, perturbed(y)):
        at = differentiated(lambda y: (y, diffusion(y)), x, record=False)[1]
        if at.pull(at.g) is None:
            values.append(of_every_sample(at.g))
            continue
        if weights is not None and _shows(of_samples.dependence(at)):
            raise ValueError(MIXED)
        apart = apart and (of_entries.weights is None or not _shows(of_entries.dependence(at)))
    if len(values) == 2:
        if not torch.equal(*values):
            _refuse_unless_random(diffusion, y, values[0])
        return of_entries if diagonal else of_samples  # a constant
    if weights is not None and _nan_stays(diffusion, y, [weights < 1]) is False:
        raise ValueError(MIXED)
    return of_entries if apart and _nan_stays(diffusion, y, _halves(y, len(samples))) else of_samples


def additive(parts: Coefficients, weights: Tensor | None, always: bool, readable: bool) -> Coefficients:
    """The coefficients with a g that is refused where it depends on y: it would be solved as another equation.

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
        return f, settled(
            at.g, (got.detach().abs() > allowed).any(), NOT_ADDITIVE, float(t.max()) if readable else None
        )

    if parts.apart is None or parts.joint:
        return replace(parts, f_and_g=lambda t, y: held(partial(parts.f_and_g, t), t, y), apart=None)
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
    rows = y.reshape(len(y) if y.ndim > 1 else 1, -1)
    units = torch.eye(rows.shape[1], dtype=y.dtype, device=y.device)
    pulled: list[Any] = [at.pull(unit.expand(rows.shape).reshape(y.shape)) for unit in units]
    if pulled[0] is None:
        return None
    return g * torch.stack([x.reshape(rows.shape)[:, i] for i, x in enumerate(pulled)], -1).reshape(y.shape)


def _of_columns(at: Derivative) -> Tensor | None:
    pushed: list[Any] = [at.push(column) for column in at.g.unbind(-1)]
    return None if pushed[0] is None else torch.stack([x[..., i] for i, x in enumerate(pushed)]).sum(0)


def perturbed(y: Tensor) -> Tensor:
    """A state nearby, with nothing special about it; the user's random state stays where it is."""
    with outside():
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu").to(
            y.device, y.dtype
        )
    return y + noise


def powers_of_two(shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """As many different ones as there are, in no order; None where one is enough."""
    number, largest = math.prod(shape), 3 if like.dtype == torch.float16 else LARGEST
    if number == 1:
        return None
    with outside():
        exponents = torch.randperm(number, generator=torch.Generator().manual_seed(0), device="cpu") % (
            2 * largest + 1
        ) - min(largest, number // 2)
        return torch.pow(2.0, exponents.double()).reshape(shape).to(like.device, like.dtype)


def _shows(wrong: Tensor) -> bool:
    return bool(of_every_sample(wrong).any())


def _nan_stays(diffusion: Diffusion, y: Tensor, masks: Iterable[Tensor]) -> bool | None:
    """Whether NaN in these places of the state reaches no others of the diffusion; None if it cannot be said."""
    for mask in masks:
        try:
            with torch.no_grad():
                g = diffusion(torch.where(mask, math.nan, y))
        except Exception:  # noqa: BLE001 - whatever a field makes of NaN; the general formula needs no answer
            return None
        if _shows(g.isnan() & ~(mask if g.ndim == y.ndim else mask.unsqueeze(-1))):
            return False
    return True


def _halves(y: Tensor, batched: int) -> Iterable[Tensor]:
    """Halves of the entries of a sample, such that of any two each is once among them without the other."""
    shape = y.shape[batched:]
    with outside():
        place = torch.arange(math.prod(shape), device=y.device).reshape(shape)
        return [place >> bit & 1 == side for bit in range((place.numel() - 1).bit_length()) for side in (0, 1)]


def _refuse_unless_random(diffusion: Diffusion, y: Tensor, value: Tensor) -> None:
    """Raise ValueError if g, which has no derivative but changes with y, has this value again."""
    with torch.no_grad():
        again = of_every_sample(diffusion(y))
    if torch.equal(value, again):
        raise ValueError(NO_DERIVATIVE)
