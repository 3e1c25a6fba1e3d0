"""An SDE between the user's functions and the engine: its terms, the Brownian motion that drives them, and what is returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from revsolve.backends import TensorControl
from revsolve.brownian.path import BrownianPath
from revsolve.compat.torchsde import ForeignBrownian
from revsolve.core.tape import Term
from revsolve.extras.per_sample_steps import BatchedTime
from revsolve.field.functorch import dual_numbers, transformed
from revsolve.prepare.options import SolverOptions
from revsolve.prepare.problem import FEW, InitialValueProblem, Posed, values_hidden
from revsolve.prepare.state import Packing, form
from revsolve.schemes.stochastic import StochasticRungeKutta
from revsolve.sde.coefficients import Coefficients, check_value, noise_shape
from revsolve.sde.ito import additive, perturbed, powers_of_two, shift_of
from revsolve.sde.methods import solves_ito
from revsolve.sde.noise import Path, brownian, of_each_sample
from revsolve.sde.term import LogRatioTerm, SDETerm


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
        elif parts.sde_type == "ito" and not solves_ito(options.scheme, parts.noise_type):
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
        path = of_each_sample(path, clock) if isinstance(clock, BatchedTime) else path
        term = SDETerm(parts, path, clock, self.shift, self.size, self.forms, always, readable, area, on_demand)
        return term if parts.prior is None else LogRatioTerm(term)
