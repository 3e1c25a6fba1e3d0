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
from revsolve.sde.coefficients import Coefficients, check_value, noise_shape
from revsolve.sde.derivative import differentiated
from revsolve.sde.ito import Shift

Path = Callable[..., Any]  # path(t0, t1) is W over a span in either direction, path(t0, t1, return_H=True) is (W, H)


@dataclass
class SDETerm:
    """Field values are pairs (f, g), controls (h, dW), or (h, W, H) with `area`; either of the two may be None for zero.

    With `on_demand`, f and g are evaluated only where asked for. W has the shape `size`; values that have not the `forms` of the
    first ones of f and g are checked. Dependences of g that the shift does not know are looked for where no gradient by the state
    is recorded, or `always`; they raise where a number may be read from a tensor (`readable`), else give NaN.
    """

    parts: Coefficients
    path: Path
    clock: Any
    shift: Shift | None
    size: tuple[int, ...]
    forms: tuple[Any, ...]
    always: bool
    readable: bool
    area: bool = False
    on_demand: bool = False

    def __post_init__(self) -> None:
        self.on_demand = self.on_demand and self.shift is None and self.parts.apart is not None
        self.additive = isinstance(self.path, BrownianPath)
        self.repeats_graph = self.shift is None and not self.on_demand
        self.entrywise = self.parts.noise_type in ("diagonal", "scalar") and not self.parts.product_only

    @property
    def at_once(self) -> SDETerm:
        """The same without `on_demand`."""
        return replace(self, on_demand=False)

    def value(self, t: Time, x: Tensor) -> Any:
        if self.on_demand:
            return OnDemand(self, self.clock(t), x)
        return self.evaluated(self.clock(t), x) if self.shift is None else self.converted(t, x)[:2]

    def evaluated(self, now: Tensor, x: Tensor) -> tuple[Any, Any]:
        f, g = self.parts.f_and_g(now, x)
        return self.checked(0, f, x), self.checked(1, g, x)

    def checked(self, which: int, value: Any, x: Tensor) -> Any:
        """A value of f (0) or g (1). Raises unless it is of a shape and dtype that the equation can have."""
        if form(value) == self.forms[which]:
            return value
        if which == 0:
            check_value("drift", value, x, tuple(x.shape))
        elif (size := noise_shape(self.parts, value, x, self.size)) != self.size:
            raise ValueError(
                f"the diffusion must keep its {self.size[-1]} noise channels, but later it has {size[-1]}."
            )
        return value

    def converted(self, t: Time, x: Tensor) -> tuple[Tensor, Any, Tensor | None]:
        """(f + shift, g, shift): the shift of an Ito equation differentiates g by y."""
        parts, record, now = self.parts, torch.is_grad_enabled(), self.clock(t)
        if self.shift is None:
            return *self.evaluated(now, x), None
        if record or parts.apart is None or parts.joint:
            f, at = differentiated(lambda y: self.evaluated(now, y), x, record)
        else:  # with no derivative of f prepared
            drift, diffusion = parts.apart
            f = self.checked(0, drift(now, x), x)
            at = differentiated(lambda y: (y, self.checked(1, diffusion(now, y), y)), x, record)[1]
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

    def __init__(self, term: SDETerm, t: Tensor, x: Tensor) -> None:
        self.term, self.t, self.x = term, t, x
        self.known: list[Any] = [None, None]

    def __getitem__(self, which: int) -> Any:
        if self.known[which] is None:
            assert self.term.parts.apart is not None
            self.known[which] = self.term.checked(which, self.term.parts.apart[which](self.t, self.x), self.x)
        return self.known[which]

    def detach(self) -> OnDemand:
        """The same point, cut off from how it was computed."""
        other = OnDemand(self.term, self.t, self.x.detach())
        other.known = [x if x is None else x.detach() for x in self.known]
        return other


class LogRatioTerm:
    """A term whose state has one more entry, the integral of |u|^2/2 with g u = f - h: the log-ratio of two laws of paths.

    f and the drift h of the prior share g, and Girsanov's theorem gives the Kullback-Leibler divergence of their path laws
    as the expectation of that integral.
    """

    def __init__(self, term: SDETerm) -> None:
        self.term, self.additive, self.control = term, term.additive, term.control
        self.repeats_graph = term.repeats_graph

    def value(self, t: Time, x: Tensor) -> Any:
        y, parts = x[..., :-1], self.term.parts
        f, g, shift = self.term.converted(t, y)
        assert parts.prior is not None
        excess = (f if shift is None else f - shift) - parts.prior(self.term.clock(t), y)
        u = excess / g if parts.noise_type == "diagonal" else (torch.linalg.pinv(g) @ excess.unsqueeze(-1)).squeeze(-1)
        return (f, g), 0.5 * u.square().sum(-1, keepdim=True)

    def product(self, value: Any, control: tuple[Any, ...]) -> tuple[Tensor, Time]:
        inner, rate = value
        k, scale = self.term.product(inner, control)
        h = 0.0 if control[0] is None else control[0]
        return torch.cat((k, rate * (h / scale)), -1), scale
