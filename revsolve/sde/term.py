"""The term of an SDE: f h + g . dW, with f the Stratonovich drift."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from revsolve.brownian.path import BrownianPath
from revsolve.core.arithmetic import Time, plus
from revsolve.core.coupling import Combination
from revsolve.prepare.state import form
from revsolve.sde.coefficients import Coefficients
from revsolve.sde.derivative import differentiated
from revsolve.sde.ito import Shift
from revsolve.sde.noise import Path

UNKNOWN: Any = object()  # a value that was not asked for


@dataclass
class SDETerm:
    """Field values are pairs (f, g), controls (h, dW), or (h, W, H) with `area`; either of the two may be None for zero.

    With `on_demand`, f and g are evaluated only where asked for. `check(f, g, y)` raises unless values are of shapes and dtypes
    that the equation can have; it is asked where these are not the `forms` that the solve began with. Dependences of g that the
    shift does not know are looked for where no gradient by the state is recorded, or `always`; they raise where a number may be
    read from a tensor (`readable`), else give NaN.
    """

    parts: Coefficients
    path: Path
    clock: Any
    shift: Shift | None
    check: Callable[[Any, Any, Tensor], None]
    forms: tuple[Any, ...]
    always: bool
    readable: bool
    area: bool = False
    on_demand: bool = False

    def __post_init__(self) -> None:
        self.on_demand = self.on_demand and self.shift is None and self.parts.apart is not None
        self.adds_up = isinstance(self.path, BrownianPath)
        self.entrywise = self.parts.noise_type in ("diagonal", "scalar") and not self.parts.product_only

    @property
    def at_once(self) -> SDETerm:
        """The same without `on_demand`."""
        return replace(self, on_demand=False)

    def value(self, t: Time, x: Tensor) -> Any:
        if self.on_demand:
            return OnDemand(self, self.clock(t), x)
        return (
            self.checked(*self.parts.f_and_g(self.clock(t), x), x) if self.shift is None else self.converted(t, x)[:2]
        )

    def checked(self, f: Any, g: Any, x: Tensor) -> tuple[Any, Any]:
        """The values of f and g, or one of them and `UNKNOWN`."""
        if (f is not UNKNOWN and form(f) != self.forms[0]) or (g is not UNKNOWN and form(g) != self.forms[1]):
            self.check(f, g, x)
        return f, g

    def converted(self, t: Time, x: Tensor) -> tuple[Tensor, Any, Tensor | None]:
        """(f + shift, g, shift): the shift of an Ito equation differentiates g by y."""
        parts, record, now = self.parts, torch.is_grad_enabled(), self.clock(t)
        if self.shift is None:
            return *self.checked(*parts.f_and_g(now, x), x), None
        if record or parts.apart is None or parts.joint:
            f, at = differentiated(lambda y: self.checked(*parts.f_and_g(now, y), y), x, record)
        else:  # with no derivative of f prepared
            drift, diffusion = parts.apart
            f, _ = self.checked(drift(now, x), UNKNOWN, x)
            at = differentiated(lambda y: (y, self.checked(UNKNOWN, diffusion(now, y), y)[1]), x, record)[1]
        check = self.always or not (record and x.requires_grad)
        shift = self.shift(at, check, float(t) if self.readable else None)
        return f if shift is None else f + shift, at.g, shift

    def control(self, t: Time, t0: Time, t1: Time) -> tuple[Any, ...]:
        h = self.clock.control(t, t0, t1)
        return (h, *self.path(t0, t1, return_H=True)) if self.area else (h, self.path(t0, t1))

    def product(self, value: Any, control: tuple[Any, ...]) -> tuple[Tensor, Time]:
        h, dW, *_ = control
        if dW is None:
            return (value[0] * h, 1.0) if isinstance(h, Tensor) else (value[0], h)
        noise = self.parts.product(value[1], dW)
        if h is None:
            return noise, 1.0
        return torch.addcmul(noise, value[0], h) if isinstance(h, Tensor) else plus(noise, value[0], h), 1.0

    def summands(self, value: Any, control: tuple[Any, ...]) -> Combination:
        """h and f, and dW and g where they multiply entry by entry: two kernels fewer than the product, and no history."""
        if not self.entrywise:
            return [(1.0, self.product(value, control)[0])]
        (h, dW, *_), (f, g) = control, value
        return [(h, f), (dW, g if g.ndim == f.ndim else g.squeeze(-1))]


class OnDemand:
    """The pair (f, g) at one point, each evaluated when it is first asked for."""

    def __init__(self, term: SDETerm, t: Tensor, x: Tensor, known: tuple[Any, Any] = (UNKNOWN, UNKNOWN)) -> None:
        self.term, self.t, self.x, self.known = term, t, x, [*known]

    def __getitem__(self, which: int) -> Any:
        if self.known[which] is UNKNOWN:
            assert self.term.parts.apart is not None
            value = self.term.parts.apart[which](self.t, self.x)
            self.term.checked(*((UNKNOWN, value) if which else (value, UNKNOWN)), self.x)
            self.known[which] = value
        return self.known[which]

    def detach(self) -> OnDemand:
        """The same point, cut off from how it was computed."""
        f, g = (x if x is UNKNOWN else x.detach() for x in self.known)
        return OnDemand(self.term, self.t, self.x.detach(), (f, g))


class LogRatioTerm:
    """A term whose state has one more entry, the integral of |u|^2/2 with g u = f - h: the log-ratio of two laws of paths.

    f and the drift h of the prior share g, and Girsanov's theorem gives the Kullback-Leibler divergence of their path laws
    as the expectation of that integral.
    """

    def __init__(self, term: SDETerm) -> None:
        self.term, self.adds_up, self.control = term, term.adds_up, term.control

    def value(self, t: Time, x: Tensor) -> Any:
        y, parts = x[..., :-1], self.term.parts
        f, g, shift = self.term.converted(t, y)
        assert parts.prior is not None
        excess = (f if shift is None else f - shift) - parts.prior(self.term.clock(t), y)
        u = excess / g if parts.diagonal else (torch.linalg.pinv(g) @ excess.unsqueeze(-1)).squeeze(-1)
        return (f, g), 0.5 * u.square().sum(-1, keepdim=True)

    def product(self, value: Any, control: tuple[Any, ...]) -> tuple[Tensor, Time]:
        inner, rate = value
        k, scale = self.term.product(inner, control)
        h = 0.0 if control[0] is None else control[0]
        return torch.cat((k, rate * (h / scale)), -1), scale
