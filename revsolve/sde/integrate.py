"""The front door for SDEs: `sdeint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revsolve.backends import TensorControl
from revsolve.compat.torchsde import as_brownian
from revsolve.core.coupling import Scheme
from revsolve.core.gradient import solve
from revsolve.core.problem import Problem
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.extras.per_sample import BatchedTime, points_for_samples, refuse_options
from revsolve.extras.progress import AcceptedStep, watched
from revsolve.field.functorch import dual_numbers
from revsolve.field.holders import Holdings
from revsolve.field.repeat import Buffers
from revsolve.prepare.grid import adaptive_grid, explain_field, fixed_grid, on_points
from revsolve.prepare.keywords import explains_keywords
from revsolve.prepare.options import SolverOptions
from revsolve.prepare.problem import prepare, values_hidden
from revsolve.prepare.state import form
from revsolve.prepare.times import Clock, as_tensor, resolution
from revsolve.schemes.tableau import Tableau
from revsolve.sde.arguments import (
    as_sde,
    check_state,
    checked_steps,
    followed_path,
    given_path,
    increasing,
    increasing_for_each,
    new_path,
    noise_shape,
    refuse_events,
)
from revsolve.sde.coefficients import Coefficients, check_value, coefficients
from revsolve.sde.ito import additive, perturbed, powers_of_two, shift_of
from revsolve.sde.methods import default_restarts, needs_area, scheme_and_options, solves_ito
from revsolve.sde.term import UNKNOWN, LogRatioTerm, NoiseOfEach, Path, SDETerm
from revsolve.solution import Solution

LONGER = 1 / 16  # so much longer, relative to dt, fixed steps may be


@explains_keywords
def sdeint(
    sde: Any,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    bm: Any = None,
    *,
    method: str | Tableau | Scheme | None = None,
    dt: float | Tensor = 1e-3,
    adaptive: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-4,
    dt_min: float | Tensor = 1e-5,
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
    gradient: str | None = None,
    restarts: Any = "auto",
    full_output: bool = False,
    event_fn: None = None,
    progress: bool = False,
    callback: Callable[[AcceptedStep], Any] | None = None,
    compile: bool | Mapping[str, Any] = False,  # noqa: A002
) -> Any:
    """Solve `dy = f(t, y) dt + g(t, y) dW` from `y(ts[0]) = y0`, with exact gradients of the discrete solve.

    Every method but `euler` solves the Stratonovich equation; an Ito equation is converted to it exactly, by automatic
    differentiation of g, or refused where g has no derivative or mixes the samples of a batch.

    Args:
        sde: an object with drift `f(t, y)`, diffusion `g(t, y)`, `noise_type` ("diagonal", "scalar", "additive", "general")
            and `sde_type` ("stratonovich", "ito"), such as a torchsde SDE or `revsolve.SDE`; also those with `f_and_g`,
            `g_prod` or `f_and_g_prod`. Or a tuple of functions (f, g), in the sense of Stratonovich, with diagonal noise
            where g is shaped like y, else general.
        y0: initial state, shape (..., d) with leading batch dimensions; any shape for diagonal noise. g has shape
            (..., d, m) for m noise channels, or that of y0 for diagonal noise.
        ts: increasing times at which the state is wanted, shape (T,), in the unit of the drift. Or (T, batch): each sample's own
            times, for y0 of shape (batch, ..., d); f and g then receive t of shape (batch,), and noise has the law of its own.
        bm: the Brownian motion, of shape (..., m), or that of y0 for diagonal noise: a `BrownianPath` or one of torchsde.
            By default a new one, which `torch.manual_seed` repeats.
        method: a name (`revsolve.sde_method_names()`), a `Tableau` or a `Scheme`; reversible Heun by default.
        dt: length of the steps (the first one if adaptive); equal ones between the times of ts, as many as the nearest number
            that leaves them at most a sixteenth longer than dt: a `linspace` of 100 times and dt = 1/100 give a step an interval.
        adaptive: choose steps by their error estimate.
        rtol, atol: tolerances of adaptive steps.
        dt_min: length below which a step is accepted whatever its error.
        options: `coupling` (`rev_` methods); `safety`, `ifactor`, `dfactor`, `max_step`, `max_num_steps`, `step_t`, `jump_t`,
            `norm` (adaptive).
        names: other names of the methods of `sde`: keys "drift", "diffusion", "prior_drift", "diffusion_prod",
            "drift_and_diffusion", "drift_and_diffusion_prod".
        logqp: also return, for each interval of ts, the integral of |u|^2/2 with g u = f - h, where the method `h` of
            the sde is the drift of a prior: its mean is the Kullback-Leibler divergence of the path laws.
        gradient: "reversible" (undo the steps), "checkpoint" (about 2 sqrt(N) states) or "direct" (keep everything);
            by default the first that the method allows.
        restarts: "auto", a fixed number of steps, a `Restarts`, or None to switch them off (reversible methods only).
        full_output: return a `Solution` with statistics.
        event_fn: raises: steps do not resolve the first crossing of a rough path (docs/events.md).
        progress: show a progress bar.
        callback: called with an `AcceptedStep` after every accepted step.
        compile: make machine code of the steps, as in `odeint`; not for methods that use space-time area.

    Returns:
        The states, shape (T, *y0.shape); with logqp the pair of them and log-ratios of shape (T - 1, *y0.shape[:-1]).

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
        RuntimeError: if the state stops being finite, the step size underflows or there are too many steps.

    Papers: Kidger, Foster, Li & Lyons (2021, arXiv 2105.13493) for reversible Heun; McCallum & Foster (2024, arXiv
    2410.11648) for reversible pairs; Li, Wong, Chen & Duvenaud (2020, arXiv 2001.01328) for the log-ratio.

    Example:
        >>> import torch
        >>> from revsolve import sdeint
        >>> f, g = lambda t, y: -y, lambda t, y: 0.3 * torch.ones_like(y)
        >>> sdeint((f, g), torch.ones(64, 2), torch.linspace(0.0, 1.0, 5), dt=0.05).shape
        torch.Size([5, 64, 2])
    """
    refuse_events(event_fn)
    check_state(y0)
    dt, dt_min = checked_steps(dt, dt_min, adaptive)
    with ExitStack() as within:
        if (
            not torch.compiler.is_dynamo_compiling() and torch.is_inference_mode_enabled()
        ):  # which derivatives of g could not be taken in
            within.enter_context(torch.inference_mode(False))
            within.enter_context(torch.no_grad())
            y0 = y0.clone()
        equation = _Equation(sde, y0, ts, bm, names, logqp)
        equation.choose_scheme(method, options, adaptive, restarts, gradient)
        make, knots = equation.adaptive_steps(dt, dt_min, rtol, atol) if adaptive else equation.fixed_steps(dt)
        path = equation.motion(bm, knots)
        times, scheme = equation.times, equation.scheme
        if len(times) == 1:
            return _results(equation.x0[None].clone(), logqp)
        make = watched(make, progress, callback, f"sdeint {scheme.name}", times[-1] - times[0], equation.state_of)
        problem = equation.problem(path, make, gradient, compile)
        ys = _results(solve(problem, equation.x0, None), logqp)
        if not full_output:
            return ys
        return Solution(as_tensor(ts), ys, problem.stats, list(problem.stats.times))


class _Equation:
    """All of a solve but its steps and its Brownian motion; with a prior, the state has the log-ratio as one more entry."""

    def __init__(self, sde: Any, y0: Tensor, ts: Any, bm: Any, names: Mapping[str, str] | None, logqp: bool) -> None:
        self.clock: Any = Clock(y0.dtype, y0.device)
        if isinstance(ts, Tensor) and ts.ndim == 2:
            self.times, self.clock = increasing_for_each(ts, y0, bm), BatchedTime(ts, y0)
        else:
            self.times = increasing(ts)
        self.rounding = resolution(ts)
        self.y0, self.logqp, self.start = y0, logqp, self.clock(self.times[0])
        self.x0 = torch.cat((y0, torch.zeros_like(y0[..., :1])), -1) if logqp else y0
        hidden = torch.compiler.is_dynamo_compiling()
        self.buffers = nullcontext() if hidden else Buffers(Holdings(sde).modules.values())
        self.sde = as_sde(sde, self._at_start, y0)
        self.path_shape = None if bm is None else tuple(as_brownian(bm).shape)
        self.parts = coefficients(self.sde, names, self.path_shape[-1] if self.path_shape else None)

    def choose_scheme(
        self,
        method: str | Tableau | Scheme | None,
        options: Mapping[str, Any] | None,
        adaptive: bool,
        restarts: Any,
        gradient: str | None,
    ) -> None:
        """Settle what depends on the method. Raises ValueError where it does not fit the equation, or f and g are not shaped
        like the state."""
        parts = self.parts
        self.scheme, self.settings = scheme_and_options(method, parts, options, adaptive)
        unsaid = self.scheme.reversible and isinstance(restarts, str) and restarts == "auto"
        self.restarts = default_restarts(self.scheme) if unsaid else restarts
        if isinstance(self.clock, BatchedTime):
            refuse_options(self.settings)
        if self.logqp and parts.prior is None:
            raise ValueError("logqp needs the drift of a prior: give the SDE a method h(t, y), or name it in names=.")
        f0, g0 = self._at_start(parts.f_and_g)
        self.size = noise_shape(parts, f0, g0, self.y0, self.path_shape)
        self.forms, self.weights = (form(f0), form(g0)), None
        if parts.noise_type == "additive":
            self.weights = powers_of_two(self.y0.shape if parts.product_only else g0.shape, self.y0)
        self.area, self.shift = needs_area(self.scheme), None
        self.always = gradient == "direct" or values_hidden() or dual_numbers()
        if parts.sde_type == "ito" and not solves_ito(self.scheme, parts.noise_type):
            self.shift = self._at_start(
                lambda t, y: shift_of(parts.noise_type, lambda y: parts.f_and_g(t, y)[1], self.y0)
            )
        unit = torch.ones(self.size, dtype=self.y0.dtype, device=self.y0.device)
        self.rates = self.term(lambda ta, tb: unit, refuse=True)
        if parts.noise_type == "additive" and not torch.compiler.is_compiling():
            x = perturbed(self.x0.detach())
            with torch.no_grad():
                self._at_start(lambda t, y: self.rates.product(self.rates.value(self.times[0], x), (0.0, unit)))

    def term(self, path: Path, area: bool = False, refuse: bool = False) -> SDETerm | LogRatioTerm:
        """The term that this path drives."""
        parts = self.parts
        checked = parts.noise_type == "additive" and not torch.compiler.is_compiling()
        if checked and (parts.sde_type == "ito" or self.area or refuse):
            parts = additive(parts, self.weights, self.always, refuse)
        noise = NoiseOfEach(path, self.clock) if isinstance(self.clock, BatchedTime) else path
        on_demand = area and not (self.logqp or values_hidden())
        check = partial(
            _check_values, self.parts, self.path_shape, self.size
        )  # a method would be a cycle: terms are kept
        of_values = self.shift, check, self.forms, area, on_demand, self.always, refuse
        term = SDETerm(parts, noise, self.clock, *of_values)
        return LogRatioTerm(term) if self.logqp else term

    def fixed_steps(self, dt: float) -> tuple[Callable[[], Stepper], dict[str, Any]]:
        """Steps, and what a Brownian motion needs to know of them."""
        if isinstance(self.clock, BatchedTime):
            make = on_points(points_for_samples(self.clock.t, dt), self.times)
        else:
            make = fixed_grid(self.times, dt, self.scheme.name, self.rounding, longer=LONGER)
        grid = make().grid.times
        self.first_step = (grid[0], grid[min(1, len(grid) - 1)])
        return make, {"grid": grid} if len(grid) > 1 else {}

    def adaptive_steps(
        self, dt: float, dt_min: float, rtol: float, atol: float
    ) -> tuple[Callable[[], Stepper], dict[str, Any]]:
        """Steps, and what a Brownian motion needs to know of them."""
        speed = self.clock.fastest if isinstance(self.clock, BatchedTime) else 1.0
        first, least = dt / speed, dt_min / speed
        self.first_step = (self.times[0], min(self.times[0] + first, self.times[-1]))
        settings = {**self.settings, "first_step": first, "min_step": least}
        options = SolverOptions(self.scheme, rtol, atol, given=frozenset(settings), **settings)
        make = adaptive_grid(self.times, options, self.rates, self.x0)
        return make, {"dt": first, "tol": max(least / 16, 2**-40 * max(map(abs, self.times)))}

    def motion(self, bm: Any, knots: dict[str, Any]) -> Path:
        """The Brownian motion given, or a new one."""
        if torch.compiler.is_dynamo_compiling():
            return followed_path(bm, self.size, self.y0, self.area, **knots)
        if bm is None:
            return new_path(self.times, self.size, self.y0, self.area, **knots)
        return given_path(bm, self.times, self.size, self.y0, self.area)

    def problem(self, path: Path, make: Callable[[], Stepper], gradient: str | None, programs: Any) -> Problem:
        """What the engine takes."""
        source = None
        if programs:
            if self.area or isinstance(self.clock, BatchedTime):
                raise ValueError("compile= is not for methods with space-time area, nor for 2-D ts: leave it out.")
            source = TensorControl(lambda t, t0, t1: path(t0, t1), lambda dW, t0, t1: (t1 - t0, dW))
        return prepare(
            self.term(path, self.area),
            self.x0,
            None,
            self.first_step,
            self._owners(),
            self.scheme,
            make,
            gradient,
            self.restarts,
            explain=_explain(self.rates),
            compile=programs,
            source=source,
        )

    def state_of(self, x: Tensor) -> Tensor:
        return x[..., :-1] if self.logqp else x

    def _owners(self) -> tuple[Any, ...]:
        fields = (self.parts.f_and_g, *(self.parts.apart or ()), self.parts.prior if self.logqp else None)
        return self.sde, *(field for field in fields if field is not None)

    def _at_start(self, field: Callable[[Tensor, Tensor], Any]) -> Any:
        """A first value, to look at; random numbers that it draws are given back, and buffers that it changes. Gradients are
        recorded where they are wanted: what the field keeps of this call (a cached weight) must have its own."""
        y0 = self.y0
        devices = [y0.device] if y0.device.type == "cuda" else []
        drops = torch.compiler.is_dynamo_compiling()  # what is not used, draws too
        with self.buffers, nullcontext() if drops else torch.random.fork_rng(devices):
            return field(self.start, y0.detach())


def _check_values(parts: Coefficients, path_shape: Any, wanted: tuple[int, ...], f: Any, g: Any, y: Tensor) -> None:
    """Raise unless later values of f and g, where these are known, are of the shapes of the first ones."""
    if f is not UNKNOWN:
        check_value("drift", f, y, tuple(y.shape))
    if g is not UNKNOWN and (size := noise_shape(parts, y, g, y, path_shape)) != wanted:
        raise ValueError(f"the diffusion must keep its {wanted[-1]} noise channels, but later it has {size[-1]}.")


def _results(xs: Tensor, logqp: bool) -> Any:
    return (xs[..., :-1], xs[..., -1].diff(dim=0)) if logqp else xs


def _explain(rates: Term) -> Callable[[float, Tensor], str]:
    """Why the state stopped being finite, in words."""

    def explain(t: float, x: Tensor) -> str:
        with torch.no_grad():
            k, _ = rates.product(rates.value(t, x), rates.control(t, t, t + 1.0))
        if not bool(torch.isfinite(k).all()):
            return explain_field(t, x, k)
        return (
            f"the state stopped being finite in the step from t = {t}, where its largest entry is {float(x.abs().max()):.3g}: "
            "lower dt, or check that drift and diffusion grow no faster than the state."
        )

    return explain
