"""The front door for SDEs: `sdeint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from revsolve.compiled.driven import Source
from revsolve.core.coupling import Scheme
from revsolve.core.engine import solve
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.drivers.foreign_brownian import as_brownian
from revsolve.grids import ADAPTIVE_OPTIONS, adaptive_grid, explain_field, fixed_grid, given_grid
from revsolve.packing import Clock
from revsolve.per_sample import ClockOfEach, points_for_each, refuse_options
from revsolve.problem import by_programs, check_options, prepare, values_hidden
from revsolve.progress import AcceptedStep, watched
from revsolve.schemes.tableau import Tableau
from revsolve.sde.arguments import (
    as_sde,
    check_state,
    check_steps,
    given_path,
    increasing,
    increasing_for_each,
    new_path,
    noise_shape,
    refuse_events,
)
from revsolve.sde.coefficients import Coefficients, coefficients
from revsolve.sde.ito import shift_of
from revsolve.sde.methods import default_restarts, needs_area, sde_scheme, solves_ito
from revsolve.sde.term import LogRatioTerm, NoiseOfEach, Path, SDETerm
from revsolve.solution import Solution

STEPS = ("first_step", "min_step")  # are called dt and dt_min here


def sdeint(
    sde: Any,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    *,
    bm: Any = None,
    method: str | Tableau | Scheme | None = None,
    dt: float = 1e-3,
    adaptive: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-4,
    dt_min: float = 1e-5,
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
    differentiation of g.

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
        dt: length of the steps (the first one if adaptive); shortened so that steps end at every time of ts.
        adaptive: choose steps by their error estimate.
        rtol, atol: tolerances of adaptive steps.
        dt_min: length below which a step is accepted whatever its error.
        options: `coupling` (`rev_` methods); `safety`, `ifactor`, `dfactor`, `max_step`, `max_num_steps`, `step_t`,
            `jump_t`, `norm` (adaptive).
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
    check_steps(dt, dt_min, adaptive)
    clock: Any = Clock(y0.dtype, y0.device)
    if isinstance(ts, Tensor) and ts.ndim == 2:
        times, clock = increasing_for_each(ts, y0, bm), ClockOfEach(ts, y0)
    else:
        times = increasing(ts)
    start = clock(times[0])
    sde = as_sde(sde, lambda f: _at_start(f, start, y0), y0)
    path_shape = None if bm is None else tuple(as_brownian(bm).shape)
    parts = coefficients(sde, names, path_shape[-1] if path_shape else None)
    scheme, settings = _scheme_and_options(method, parts, options, adaptive)
    if isinstance(clock, ClockOfEach):
        refuse_options(settings)
    if logqp and parts.prior is None:
        raise ValueError("logqp needs the drift of a prior: give the SDE a method h(t, y), or name it in names=.")
    f0, g0 = _at_start(parts.f_and_g, start, y0)
    size = noise_shape(parts, f0, g0, y0, path_shape)

    terms = _Terms(parts, scheme, clock, start, y0, logqp)
    unit = torch.ones(size, dtype=y0.dtype, device=y0.device)
    rates = terms.over(lambda ta, tb, return_H=False: (unit, unit) if return_H else unit)
    x0 = terms.start
    if adaptive:
        speed = clock.fastest if isinstance(clock, ClockOfEach) else 1.0
        first, least = dt / speed, dt_min / speed
        make = adaptive_grid(times, {**settings, "first_step": first, "min_step": least}, rtol, atol, scheme, rates, x0)
        knots: dict[str, Any] = {"dt": first, "tol": max(least / 16, 2**-40 * max(map(abs, times)))}
    else:
        make = _fixed_steps(times, clock, dt, scheme)
        knots = {"grid": make().grid.times} if len(times) > 1 else {}
    area = needs_area(scheme)
    path = new_path(times, size, y0, area, **knots) if bm is None else given_path(bm, times, size, y0, area)
    if len(times) == 1:
        return _results(x0[None], logqp)
    term = terms.over(path, on_demand=area and not values_hidden())
    make = watched(make, progress, callback, f"sdeint {scheme.name}", times[-1] - times[0], terms.state_of)
    if scheme.reversible and isinstance(restarts, str) and restarts == "auto":
        restarts = default_restarts(scheme)
    problem = prepare(term, x0, None, (times[0], times[1]), terms.owners(sde), scheme, make, gradient, restarts)
    if problem.term is not term:  # what is fixed while a value is made would not be so if it were made later
        term.on_demand = False
    problem.explain = _explain(rates)
    if compile:
        if area or isinstance(clock, ClockOfEach):
            raise ValueError("compile= is not for methods with space-time area, nor for 2-D ts: leave it out.")
        inner = term.term if isinstance(term, LogRatioTerm) else term
        source = Source(inner, "path", lambda t, t0, t1: path(t0, t1))
        by_programs(problem, compile, x0, source=source)
    ys = _results(solve(problem, x0, None), logqp)
    if not full_output:
        return ys
    assert problem.grid is not None
    return Solution(torch.as_tensor(ts), ys, problem.stats, problem.grid.times)


class _Terms:
    """The terms of one equation, over whatever path; with a prior, their state has the log-ratio as one more entry."""

    def __init__(self, parts: Coefficients, scheme: Scheme, clock: Any, start: Tensor, y0: Tensor, logqp: bool) -> None:
        self.parts, self.clock, self.logqp = parts, clock, logqp
        self.start = torch.cat((y0, torch.zeros_like(y0[..., :1])), -1) if logqp else y0
        self.shift = None
        if parts.sde_type == "ito" and not solves_ito(scheme, parts.noise_type):
            self.shift = shift_of(parts.noise_type, lambda y: parts.f_and_g(start, y)[1], y0)

    def over(self, path: Path, on_demand: bool = False) -> SDETerm | LogRatioTerm:
        noise = NoiseOfEach(path, self.clock) if isinstance(self.clock, ClockOfEach) else path
        term = SDETerm(self.parts, noise, self.clock, self.shift, on_demand and not self.logqp)
        return LogRatioTerm(term, self.parts) if self.logqp else term

    def state_of(self, x: Tensor) -> Tensor:
        return x[..., :-1] if self.logqp else x

    def owners(self, sde: Any) -> tuple[Any, ...]:
        fields = (self.parts.f_and_g, *(self.parts.apart or ()), self.parts.prior if self.logqp else None)
        return sde, *(field for field in fields if field is not None)


def _fixed_steps(times: list[float], clock: Any, dt: float, scheme: Scheme) -> Callable[[], Stepper]:
    if isinstance(clock, ClockOfEach):
        return given_grid(times, points_for_each(clock.t, dt))
    return fixed_grid(times, dt, scheme.name)


def _at_start(field: Callable[[Tensor, Tensor], Any], start: Tensor, y0: Tensor) -> Any:
    """A first value, to look at its shape; random numbers that it draws are given back."""
    with torch.no_grad(), torch.random.fork_rng([y0.device] if y0.device.type == "cuda" else []):
        return field(start, y0.detach())


def _scheme_and_options(
    method: str | Tableau | Scheme | None, parts: Coefficients, options: Mapping[str, Any] | None, adaptive: bool
) -> tuple[Scheme, dict[str, Any]]:
    given = dict(options or {})
    scheme = sde_scheme(method, parts.noise_type, parts.sde_type, given.pop("coupling", None))
    known = [name for name in ADAPTIVE_OPTIONS if name not in STEPS]
    check_options(given, (*known, *STEPS, "coupling", "dense"), scheme.name)
    for name in given:
        if name == "dense":
            raise ValueError(
                "a Brownian path has no slope that a polynomial could follow between the steps, so sdeint has no dense output: "
                "ask for more times ts, or solve again over the same BrownianPath."
            )
        if name in STEPS:
            raise ValueError(f"option {name!r} is the argument {('dt', 'dt_min')[STEPS.index(name)]} of sdeint.")
        if not adaptive:
            raise ValueError(f"option {name!r} is for adaptive steps, but these are fixed: pass adaptive=True.")
    if adaptive and scheme.error_order is None:
        raise ValueError(
            f"{scheme.name!r} has no error estimate to adapt steps by: use 'reversible_heun', 'rev_heun_euler', 'rev_slowrk' "
            "or another embedded method."
        )
    return scheme, given


def _results(xs: Tensor, logqp: bool) -> Any:
    return (xs[..., :-1], xs[..., -1].diff(dim=0)) if logqp else xs


def _explain(rates: Term) -> Callable[[float, Tensor], str]:
    """Why the state stopped being finite, in words."""

    def explain(t: float, x: Tensor) -> str:
        with torch.no_grad():
            k, _ = rates.product(rates.value(t, x), t, t + 1.0)
        if not bool(torch.isfinite(k).all()):
            return explain_field(t, x, k)
        return (
            f"the state stopped being finite in the step from t = {t}, where its largest entry is {float(x.abs().max()):.3g}: "
            "lower dt, or check that drift and diffusion grow no faster than the state."
        )

    return explain
