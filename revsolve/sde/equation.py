"""An SDE between the user's functions and the engine: its terms, the Brownian motion that drives them, and what is returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from revsolve.backends import TensorControl
from revsolve.brownian.path import BrownianPath, clamped
from revsolve.compat.torchsde import ForeignBrownian, as_brownian
from revsolve.core.arithmetic import Time
from revsolve.core.tape import Term
from revsolve.extras.per_sample_steps import BatchedTime
from revsolve.field.functorch import dual_numbers, outside, sample_numbers, transformed
from revsolve.prepare.options import SolverOptions
from revsolve.prepare.problem import FEW, InitialValueProblem, Posed, values_hidden
from revsolve.prepare.state import Packing, form
from revsolve.schemes.stochastic import StochasticRungeKutta
from revsolve.sde.coefficients import Coefficients, check_value, noise_shape
from revsolve.sde.ito import additive, perturbed, powers_of_two, shift_of
from revsolve.sde.term import LogRatioTerm, Path, SDETerm


class WithLogRatio(Packing):
    """A state with one more entry, the log-ratio, which users do not see in it."""

    def unpack(self, x: Tensor) -> Tensor:
        return x[..., :-1]


class Equation:
    """An SDE over the times of a solve, driven by `bm`, or by a Brownian motion that is drawn for its steps.

    f and g are called once at the start, on `clock`. Raises ValueError where the method does not fit them, or they not the state.
    Gradients are recorded where they are wanted: what the field keeps of this call (a cached weight) must have its own.
    """

    def __init__(
        self,
        parts: Coefficients,
        options: SolverOptions,
        y0: Tensor,
        clock: Any,
        times: list[float],
        bm: BrownianPath | ForeignBrownian | None,
    ) -> None:
        self.parts, self.options, self.times, self.bm = parts, options, times, bm
        self.x0 = y0 if parts.prior is None else torch.cat((y0, torch.zeros_like(y0[..., :1])), -1)
        self.packing = Packing(y0) if parts.prior is None else WithLogRatio(self.x0)
        self.area = any(isinstance(update.increment, StochasticRungeKutta) for update in options.scheme.updates)
        self.path: Path | None = None
        y0, now = y0.detach(), clock(times[0])
        f0, g0 = parts.f_and_g(now, y0)
        check_value("drift", f0, y0, tuple(y0.shape))
        self.size = noise_shape(parts, g0, y0, () if bm is None else tuple(bm.shape))
        self.forms, self.shift, self.weights = (form(f0), form(g0)), None, None
        if parts.noise_type == "additive":
            self.weights = powers_of_two(y0.shape if parts.product_only else g0.shape, y0)
        elif parts.sde_type == "ito" and options.scheme.order > 1:  # Euler-Maruyama takes it in the sense of Ito
            self.shift = shift_of(parts.noise_type, lambda y: parts.f_and_g(now, y)[1], y0)
        if parts.noise_type == "additive" and not torch.compiler.is_compiling():
            rates, start = self._rates(clock), times[0]
            with torch.no_grad():
                rates.product(rates.value(start, perturbed(self.x0.detach())), rates.control(start, start, start))

    def problem(self) -> InitialValueProblem:
        """All of the solve but its times."""
        return InitialValueProblem(
            "sdeint",
            self.packing,
            self.x0,
            self.options,
            self._pose,
            (None, self.x0),
            self._results,
            source=self._source,
            remedy="lower dt, or check that drift and diffusion grow no faster than the state.",
        )

    def _pose(self, clock: Any, steps: list[float] | None) -> Posed:
        """The equation on a clock, over these steps or adaptive ones."""
        options, times, first = self.options, self.times, self.options.first_step or 0.0
        if steps is None:
            span, finest = (times[0], min(times[0] + first, times[-1])), 2**-40 * max(map(abs, times))
            knots: dict[str, Any] = {"dt": first, "tol": max(options.min_step / 16, finest)}
        else:
            span, knots = (steps[0], steps[1]), {"grid": steps}
        if self.path is None:
            self.path = brownian(self.bm, times, self.size, self.x0, self.area, knots)
        few = steps is not None and len(steps) <= 1 + FEW and not options.scheme.reversible  # differentiated directly
        always = few or options.gradient == "direct" or values_hidden() or dual_numbers()
        # Reading a number from the GPU in every step would wait for it; transforms do so anyway.
        readable = self.x0.device.type == "cpu" or transformed()
        readable = readable and not (options.compile or torch.compiler.is_compiling())
        term = self._term(self.path, clock, self.area, always, readable)
        return Posed(term, self.parts.owners, span, self._rates(clock))

    def _source(self, term: Term) -> TensorControl:
        """The noise as what drives compiled programs."""
        if self.area:
            raise ValueError("compile= is not for methods with space-time area: leave it out.")
        path: Any = self.path
        return TensorControl(lambda t, t0, t1: path(t0, t1), lambda dW, t0, t1: (t1 - t0, dW))

    def _results(self, xs: Tensor, num_dims: int) -> Any:
        return xs if self.parts.prior is None else (xs[..., :-1], xs[..., -1].diff(dim=0))

    def _rates(self, clock: Any) -> Term:
        """The term with noise of variance 1 in every span."""
        unit = torch.ones(self.size, dtype=self.x0.dtype, device=self.x0.device)
        return self._term(lambda t0, t1: unit, clock, area=False, always=True, readable=True)

    def _term(self, path: Path, clock: Any, area: bool, always: bool, readable: bool) -> Term:
        """The term that this path drives. `readable`: whether numbers may be read from tensors."""
        parts, plain = self.parts, path is self.path and self.parts.sde_type == "stratonovich" and not area
        if parts.noise_type == "additive" and not plain and not torch.compiler.is_compiling():
            parts = additive(parts, self.weights, always, readable)
        on_demand = area and parts.prior is None and not values_hidden()
        # Where time runs at the rate r, W of a span has r times the variance, and so has H.
        if isinstance(clock, BatchedTime):
            path = _Mapped(path, lambda x, s0, s1: x * clock.rate(s0, s1).sqrt())
        term = SDETerm(parts, path, clock, self.shift, self.size, self.forms, always, readable, area, on_demand)
        return term if parts.prior is None else LogRatioTerm(term)


def brownian(bm: Any, times: list[float], size: tuple[int, ...], y0: Tensor, area: bool, knots: dict[str, Any]) -> Path:
    """A Brownian motion over the times: `bm`, or a new one with these knots."""
    if torch.compiler.is_dynamo_compiling():
        return _followed(bm, size, y0, area, **knots)
    return _new(times, size, y0, area, knots) if bm is None else _given(bm, times, size, y0, area)


def _given(bm: Any, times: list[float], size: tuple[int, ...], y0: Tensor, area: bool) -> Path:
    """The Brownian motion that was passed. Raises unless it fits the equation."""
    path = as_brownian(bm, area=area)
    if tuple(path.shape) != size:
        raise ValueError(f"bm has shape {tuple(path.shape)}, but this SDE needs {size}: make the path with that size.")
    if path.dtype != y0.dtype or path.device != y0.device:
        raise ValueError(
            f"bm is of {path.dtype} on {path.device}, but y0 of {y0.dtype} on {y0.device}: make the path with those."
        )
    for t in (times[0], times[-1]):
        clamped(t, path.t0, path.t1, path.dtype)
    return path


def _new(times: list[float], size: tuple[int, ...], y0: Tensor, area: bool, knots: dict[str, Any]) -> Path:
    """One whose seed comes from torch's generator; inside torch.vmap for all samples or each, as its `randomness` says."""
    num_samples, number = sample_numbers(y0.device)
    with outside():
        path = BrownianPath(
            times[0],
            times[-1],
            size if number is None else (num_samples, *size),
            dtype=y0.dtype,
            device=y0.device,
            levy_area="space-time" if area else "none",
            **knots,
        )
    return path if number is None else _Mapped(path, lambda x, t0, t1: _row(x, number))


def _followed(bm: Any, size: tuple[int, ...], y0: Tensor, area: bool, grid: Sequence[float]) -> Path:
    """One that torch.compile can follow. Raises where there is none."""
    if bm is not None:
        raise ValueError(
            "torch.compile cannot follow how a Brownian path draws its noise: leave out bm=, and the compiled program draws it, "
            "or solve outside of what is compiled."
        )
    if area:
        raise ValueError(
            "methods with space-time area need noise that torch.compile cannot follow: use another, say 'reversible_heun', or "
            "solve outside of what is compiled."
        )
    return _Presampled(grid, size, y0)


class _Presampled:
    """A Brownian motion known at the knots alone, sampled at once by torch's default generator."""

    def __init__(self, knots: Sequence[float], size: tuple[int, ...], y0: Tensor) -> None:
        self.position = {t: n for n, t in enumerate(knots)}
        normal = torch.randn(len(knots) - 1, *size, dtype=y0.dtype, device=y0.device)
        self.increments = [(b - a) ** 0.5 * x for (a, b), x in zip(pairwise(knots), normal.unbind(), strict=True)]

    def __call__(self, ta: float, tb: float) -> Tensor:
        start, stop = self.position[ta], self.position[tb]
        return self.increments[start] if start < stop else -self.increments[stop]


class _Mapped:
    """A path whose answers over a span are changed: apply(W, t0, t1), and the same for H."""

    def __init__(self, path: Path, apply: Callable[[Tensor, Time, Time], Tensor]) -> None:
        self.path, self.apply = path, apply

    def __call__(self, t0: Time, t1: Time, return_H: bool = False) -> Any:
        if not return_H:
            return self.apply(self.path(t0, t1), t0, t1)
        W, H = self.path(t0, t1, return_H=True)
        return self.apply(W, t0, t1), self.apply(H, t0, t1)


def _row(x: Tensor, number: Tensor) -> Tensor:
    """x[number], for which torch 2.9 would read the number."""
    return x.index_select(0, number.reshape(1)).squeeze(0)
