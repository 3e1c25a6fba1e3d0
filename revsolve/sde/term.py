"""The term of an SDE: f h + g . dW, with f the Stratonovich drift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revsolve.brownian.path import BrownianPath
from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Combination
from revsolve.extras.per_sample import BatchedTime
from revsolve.sde.coefficients import Coefficients, contraction, increment
from revsolve.sde.derivative import differentiated
from revsolve.sde.ito import Shift

Path = Callable[..., Any]  # path(t0, t1) is W over a span in either direction, path(t0, t1, return_H=True) is (W, H)


class SDETerm:
    """Field values are pairs (f, g), controls (h, dW), or (h, W, H) with `area`; either of the two may be None for zero.

    With `on_demand`, f and g are evaluated only where asked for.
    """

    def __init__(
        self,
        coefficients: Coefficients,
        path: Path,
        clock: Any,
        shift: Shift | None,
        area: bool = False,
        on_demand: bool = False,
    ) -> None:
        self.f_and_g, self.apart = coefficients.f_and_g, coefficients.apart
        self.path, self.shift, self.clock, self.area = path, shift, clock, area
        self.multiply = contraction(coefficients.noise_type, coefficients.product_only)
        self.contract = increment(coefficients.noise_type, coefficients.product_only)
        self.on_demand = on_demand and shift is None and self.apart is not None
        self.adds_up = isinstance(path, BrownianPath)
        self.entrywise = coefficients.noise_type in ("diagonal", "scalar") and not coefficients.product_only

    def value(self, t: Time, x: Tensor) -> Any:
        if self.on_demand:
            assert self.apart is not None
            return OnDemand(*self.apart, self.clock(t), x)
        return self.f_and_g(self.clock(t), x) if self.shift is None else self.converted(t, x)[:2]

    def converted(self, t: Time, x: Tensor) -> tuple[Tensor, Any, Tensor | None]:
        """(f + shift, g, shift): the shift of an Ito equation differentiates g by y."""
        assert self.shift is not None
        now = self.clock(t)
        f, derivative = differentiated(lambda y: self.f_and_g(now, y), x, torch.is_grad_enabled())
        shift = self.shift(derivative)
        return f if shift is None else f + shift, derivative.g, shift

    def control(self, t: Time, t0: Time, t1: Time) -> tuple[Any, ...]:
        h = self.clock.control(t, t0, t1)
        return (h, *self.path(t0, t1, return_H=True)) if self.area else (h, self.path(t0, t1))

    def product(self, value: Any, control: tuple[Any, ...]) -> tuple[Tensor, Time]:
        h, dW, *_ = control
        if h is None:
            return self.multiply(value[1], dW), 1.0
        if dW is None:
            return (value[0] * h, 1.0) if isinstance(h, Tensor) else (value[0], h)
        f, g = value
        return self.contract(f, h, g, dW), 1.0

    def summands(self, value: Any, control: tuple[Any, ...]) -> Combination:
        """h and f, and dW and g where they multiply entry by entry: two kernels fewer than the product, and no history."""
        if not self.entrywise:
            return [(1.0, self.product(value, control)[0])]
        (h, dW, *_), (f, g) = control, value
        return [(h, f), (dW, g if g.shape == f.shape else g.squeeze(-1))]


class NoiseOfEach:
    """The Brownian motion of samples with times of their own, given one in the step variable that all share.

    Where time runs at the rate r, W of a span has r times the variance, and so has its space-time area.
    """

    def __init__(self, path: Path, clock: BatchedTime) -> None:
        self.path, self.clock = path, clock

    def __call__(self, s0: Time, s1: Time, return_H: bool = False) -> Any:
        speed = self.clock.rate(s0, s1).sqrt()
        found = self.path(s0, s1, return_H=return_H)
        return (found[0] * speed, found[1] * speed) if return_H else found * speed


class OnDemand:
    """The pair (f, g) at one point, each evaluated when it is first asked for."""

    def __init__(self, f: Callable[..., Tensor], g: Callable[..., Any], t: Tensor, x: Tensor) -> None:
        self.fields, self.at = (f, g), (t, x)
        self.known: dict[int, Any] = {}

    def __getitem__(self, which: int) -> Any:
        if which not in self.known:
            self.known[which] = self.fields[which](*self.at)
        return self.known[which]

    def detach(self) -> OnDemand:
        """The same point, cut off from how it was computed."""
        (f, g), (t, x) = self.fields, self.at
        other = OnDemand(f, g, t, x.detach())
        other.known = {which: value.detach() for which, value in self.known.items()}
        return other


class LogRatioTerm:
    """A term whose state has one more entry, the integral of |u|^2/2 with g u = f - h: the log-ratio of two laws of paths.

    f and the drift h of the prior share g, and Girsanov's theorem gives the Kullback-Leibler divergence of their path laws
    as the expectation of that integral.
    """

    def __init__(self, term: SDETerm, coefficients: Coefficients) -> None:
        assert coefficients.prior is not None
        self.adds_up, self.control = term.adds_up, term.control
        self.term, self.prior, self.diagonal = term, coefficients.prior, coefficients.diagonal

    def value(self, t: Time, x: Tensor) -> Any:
        y = x[..., :-1]
        f, g, shift = self.term.converted(t, y) if self.term.shift is not None else (*self.both(t, y), None)
        excess = (f if shift is None else f - shift) - self.prior(self.term.clock(t), y)
        u = excess / g if self.diagonal else (torch.linalg.pinv(g) @ excess.unsqueeze(-1)).squeeze(-1)
        return (f, g), 0.5 * u.square().sum(-1, keepdim=True)

    def both(self, t: Time, y: Tensor) -> tuple[Tensor, Any]:
        return self.term.f_and_g(self.term.clock(t), y)

    def product(self, value: Any, control: tuple[Any, ...]) -> tuple[Tensor, Time]:
        inner, rate = value
        k, scale = self.term.product(inner, control)
        h = 0.0 if control[0] is None else control[0]
        return torch.cat((k, rate * (h / scale)), -1), scale
