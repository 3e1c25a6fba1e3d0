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
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.extras.per_sample import BatchedTime, points_for_samples, refuse_options
from revsolve.extras.progress import AcceptedStep, watched
from revsolve.field.functorch import dual_numbers, transformed
from revsolve.field.holders import Holdings
from revsolve.field.repeat import Buffers
from revsolve.prepare.grid import adaptive_grid, explain_field, fixed_grid, on_points
from revsolve.prepare.keywords import explains_keywords
from revsolve.prepare.options import SolverOptions
from revsolve.prepare.problem import prepare, values_hidden
from revsolve.prepare.state import form
from revsolve.prepare.times import Clock, as_tensor, resolution
from revsolve.schemes.tableau import Tableau
from revsolve.sde.arguments import check_arguments, check_ts, noise_shape
from revsolve.sde.coefficients import SDE, Coefficients, check_value, coefficients
from revsolve.sde.ito import additive, perturbed, powers_of_two, shift_of
from revsolve.sde.methods import default_restarts, needs_area, scheme_and_options, solves_ito
from revsolve.sde.noise import Path, brownian, of_each_sample
from revsolve.sde.term import LogRatioTerm, SDETerm
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
    dt, dt_min = check_arguments(y0, dt, dt_min, adaptive, event_fn)
    compiling = torch.compiler.is_dynamo_compiling()
    inference = not compiling and torch.is_inference_mode_enabled()  # in which g would have no derivative
    with torch.inference_mode(False) if inference else nullcontext(), torch.no_grad() if inference else nullcontext():
        y0 = y0.clone() if inference else y0
        times = check_ts(ts, y0, bm)
        with nullcontext() if compiling else _given_back(sde, y0):
            equation = _Equation(sde, y0, ts, times[0], bm, names, logqp)
            scheme, given = scheme_and_options(method, equation.parts, options, adaptive)
            equation.examine(scheme, given, gradient, bool(compile))
        if adaptive:
            given |= {"first_step": dt / equation.speed, "min_step": dt_min / equation.speed}
            read = SolverOptions(scheme, rtol, atol, given=frozenset(given), **given)
            span = (times[0], min(times[0] + given["first_step"], times[-1]))
            make = adaptive_grid(times, read, equation.rates, equation.x0)
            finest = max(given["min_step"] / 16, 2**-40 * max(map(abs, times)))
            knots: dict[str, Any] = {"dt": given["first_step"], "tol": finest}
        else:
            make = _fixed_steps(equation.clock, times, dt, scheme.name, resolution(ts))
            grid = make().grid.times
            span, knots = (grid[0], grid[min(1, len(grid) - 1)]), {"grid": grid} if len(grid) > 1 else {}
        path = brownian(bm, times, equation.size, y0, equation.area, knots)
        if len(times) == 1:
            return equation.results(equation.x0[None].clone())
        make = watched(make, progress, callback, f"sdeint {scheme.name}", times[-1] - times[0], equation.state_of)
        problem = prepare(
            equation.term(path, equation.area),
            equation.x0,
            None,
            span,
            equation.owners,
            scheme,
            make,
            gradient,
            default_restarts(scheme)
            if scheme.reversible and isinstance(restarts, str) and restarts == "auto"
            else restarts,
            explain=partial(_explain, equation.rates),
            compile=compile,
            source=equation.source(path) if compile else None,
        )
        ys = equation.results(solve(problem, equation.x0, None))
        return Solution(as_tensor(ts), ys, problem.stats, list(problem.stats.times)) if full_output else ys


class _Equation:
    """An SDE as a term, but for its Brownian motion; with a prior, the state has the log-ratio as one more entry."""

    def __init__(
        self, sde: Any, y0: Tensor, ts: Any, start: float, bm: Any, names: Mapping[str, str] | None, logqp: bool
    ) -> None:
        each = isinstance(ts, Tensor) and ts.ndim == 2
        self.clock: Any = BatchedTime(ts, y0) if each else Clock(y0.dtype, y0.device)
        self.speed: float = self.clock.fastest if each else 1.0  # type: ignore[union-attr]
        self.y0, self.logqp, self.start = y0, logqp, start
        self.x0 = torch.cat((y0, torch.zeros_like(y0[..., :1])), -1) if logqp else y0
        if isinstance(sde, tuple):
            sde = _of_functions(sde, self.clock(start), y0.detach())
        self.path_shape = None if bm is None else tuple(as_brownian(bm).shape)
        self.parts = coefficients(sde, names, self.path_shape[-1] if self.path_shape else None)
        prior = (self.parts.prior,) if logqp else ()
        self.owners = (sde, self.parts.f_and_g, *(self.parts.apart or ()), *prior)

    def examine(self, scheme: Scheme, given: Mapping[str, Any], gradient: str | None, programs: bool) -> None:
        """Look at f and g at the start. Raises ValueError where the method does not fit the equation, or they not the state.

        Gradients are recorded where they are wanted: what the field keeps of this call (a cached weight) must have its own.
        """
        parts, y0, now = self.parts, self.y0.detach(), self.clock(self.start)
        if isinstance(self.clock, BatchedTime):
            refuse_options(given)
        if self.logqp and parts.prior is None:
            raise ValueError("logqp needs the drift of a prior: give the SDE a method h(t, y), or name it in names=.")
        f0, g0 = parts.f_and_g(now, y0)
        check_value("drift", f0, y0, tuple(y0.shape))
        self.size = noise_shape(parts, g0, y0, self.path_shape)
        self.forms, self.area, self.shift, self.weights = (form(f0), form(g0)), needs_area(scheme), None, None
        self.always = gradient == "direct" or values_hidden() or dual_numbers()
        # Reading a number from the GPU in every step would wait for it; transforms do so anyway.
        readable = y0.device.type == "cpu" or transformed()
        self.readable = readable and not (programs or torch.compiler.is_compiling())
        if parts.noise_type == "additive":
            self.weights = powers_of_two(y0.shape if parts.product_only else g0.shape, y0)
        elif parts.sde_type == "ito" and not solves_ito(scheme, parts.noise_type):
            self.shift = shift_of(parts.noise_type, lambda y: parts.f_and_g(now, y)[1], y0)
        unit = torch.ones(self.size, dtype=y0.dtype, device=y0.device)
        self.unit = lambda ta, tb: unit
        self.rates = self.term(self.unit, readable=True)
        if parts.noise_type == "additive" and not torch.compiler.is_compiling():
            with torch.no_grad():
                self.rates.product(self.rates.value(self.start, perturbed(self.x0.detach())), (0.0, unit))

    def term(self, path: Path, area: bool = False, readable: bool = False) -> SDETerm | LogRatioTerm:
        """The term that this path drives. `readable`: whether numbers may be read from tensors."""
        parts, clock, traced = self.parts, self.clock, torch.compiler.is_compiling()
        readable = readable or self.readable
        on_demand = area and not (self.logqp or values_hidden())
        check = partial(_check_value, parts, self.path_shape, self.size)  # a method would be a cycle: terms are kept
        if (
            parts.noise_type == "additive"
            and not traced
            and (parts.sde_type == "ito" or self.area or path is self.unit)
        ):
            parts = additive(parts, self.weights, self.always, readable)
        path = of_each_sample(path, clock) if isinstance(clock, BatchedTime) else path
        term = SDETerm(parts, path, clock, self.shift, check, self.forms, self.always, readable, area, on_demand)
        return LogRatioTerm(term) if self.logqp else term

    def source(self, path: Path) -> TensorControl:
        """The noise as what drives compiled programs."""
        if self.area or isinstance(self.clock, BatchedTime):
            raise ValueError("compile= is not for methods with space-time area, nor for 2-D ts: leave it out.")
        return TensorControl(lambda t, t0, t1: path(t0, t1), lambda dW, t0, t1: (t1 - t0, dW))

    def state_of(self, x: Tensor) -> Tensor:
        return x[..., :-1] if self.logqp else x

    def results(self, xs: Tensor) -> Any:
        return (xs[..., :-1], xs[..., -1].diff(dim=0)) if self.logqp else xs


def _of_functions(sde: tuple[Any, ...], start: Tensor, y0: Tensor) -> SDE:
    """A tuple (f, g) as an SDE in the sense of Stratonovich."""
    if len(sde) != 2 or not all(map(callable, sde)):
        raise TypeError(f"a tuple must hold two functions, drift f(t, y) and diffusion g(t, y), but it is {sde!r}.")
    shape = getattr(sde[1](start, y0), "shape", None)
    return SDE(*sde, noise_type="diagonal" if shape == y0.shape else "general")


def _given_back(sde: Any, y0: Tensor) -> ExitStack:
    """A context after which the random numbers drawn in it are drawn again, and the buffers of modules are what they were."""
    within = ExitStack()
    within.enter_context(Buffers(Holdings(sde).modules.values()))
    within.enter_context(torch.random.fork_rng([y0.device] if y0.device.type == "cuda" else []))
    return within


def _fixed_steps(clock: Any, times: list[float], dt: float, name: str, rounding: float) -> Callable[[], Stepper]:
    """Equal steps between the times, for all samples or each."""
    if isinstance(clock, BatchedTime):
        return on_points(points_for_samples(clock.t, dt), times)
    return fixed_grid(times, dt, name, rounding, longer=LONGER)


def _check_value(
    parts: Coefficients, path_shape: Any, wanted: tuple[int, ...], which: int, value: Any, y: Tensor
) -> None:
    """Raise unless a later value of f (0) or g (1) is of the shape of the first one."""
    if which == 0:
        check_value("drift", value, y, tuple(y.shape))
    elif (size := noise_shape(parts, value, y, path_shape)) != wanted:
        raise ValueError(f"the diffusion must keep its {wanted[-1]} noise channels, but later it has {size[-1]}.")


def _explain(rates: Term, t: float, x: Tensor) -> str:
    """Why the state stopped being finite, in words."""
    with torch.no_grad():
        k, _ = rates.product(rates.value(t, x), rates.control(t, t, t + 1.0))
    if not bool(torch.isfinite(k).all()):
        return explain_field(t, x, k)
    return (
        f"the state stopped being finite in the step from t = {t}, where its largest entry is {float(x.abs().max()):.3g}: "
        "lower dt, or check that drift and diffusion grow no faster than the state."
    )
