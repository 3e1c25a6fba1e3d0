"""The front door for SDEs: `sdeint`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from revsolve.compat.torchsde import as_brownian
from revsolve.core.coupling import Scheme
from revsolve.extras.per_sample import check_sample_times
from revsolve.extras.per_sample_steps import BatchedTime
from revsolve.extras.progress import AcceptedStep
from revsolve.extras.solve import solution_of
from revsolve.field.functorch import followed
from revsolve.field.repeat import Buffers
from revsolve.field.snapshot import Snapshot
from revsolve.prepare.options import explains_keywords
from revsolve.prepare.times import Clock, check_times
from revsolve.schemes.tableau import Tableau
from revsolve.sde.coefficients import SDE, coefficients
from revsolve.sde.equation import Equation
from revsolve.sde.methods import read_sde_options

LONGER = 1 / 16  # so much longer, relative to dt, fixed steps may be
REMEDY = "lower dt, or check that drift and diffusion grow no faster than the state."


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
        compile: compile the steps, as in `odeint`; not for methods that use space-time area.

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
        times, bm = check_ts(ts, y0, bm), None if bm is None else as_brownian(bm)
        clock: Any = BatchedTime(ts, y0) if isinstance(ts, Tensor) and ts.ndim == 2 else Clock(y0.dtype, y0.device)
        with nullcontext() if compiling else _given_back(sde, y0):
            sde = _of_functions(sde, clock(times[0]), y0.detach()) if isinstance(sde, tuple) else sde
            parts = coefficients(sde, names, bm.shape[-1] if bm is not None and bm.shape else None, logqp)
            speed = clock.fastest if isinstance(clock, BatchedTime) else 1.0
            read = read_sde_options(
                method,
                parts,
                options,
                {"rtol": rtol, "atol": atol, "first_step": dt / speed, "min_step": dt_min / speed} if adaptive else dt,
                gradient=gradient,
                restarts=restarts,
                progress=progress,
                callback=callback,
                compile=compile,
            )
            equation = Equation(parts, read, y0, clock, times, bm)
        return solution_of(equation.problem(), ts, None, full_output)


def check_ts(ts: Any, y0: Tensor, bm: Any) -> list[float]:
    """The increasing times as floats; for times of each sample, (T, batch), the values 0, 1, 2, ... of the step variable."""
    if isinstance(ts, Tensor) and followed(ts):
        raise ValueError("ts requires a gradient, but a Brownian path has no derivative in time: pass ts.detach().")
    if not (isinstance(ts, Tensor) and ts.ndim == 2):
        times = check_times(ts, "ts")
        falls = f"it runs from {times[0]} to {times[-1]}" if times[-1] < times[0] else ""
    else:
        times, fall = check_sample_times(ts, y0, ("ts", "y0")), (ts.diff(dim=0) < 0).any(0).nonzero()
        falls = f"ts[:, {int(fall[0])}] = {ts[:, int(fall[0])].tolist()}" if len(fall) else ""
    if falls:
        raise ValueError(f"ts must increase, but {falls}: noise is independent of the past only forward.")
    if bm is not None and isinstance(ts, Tensor) and ts.ndim == 2:
        raise ValueError(
            "bm is one path in one time, but ts gives every sample times of its own: leave it out, torch.manual_seed repeats "
            "what is drawn instead."
        )
    return times


def check_arguments(y0: Any, dt: Any, dt_min: Any, adaptive: bool, event_fn: Any) -> tuple[float, float]:
    """The step lengths as floats. Raises unless y0 is a real tensor with at least one dimension, and steps are positive."""
    if event_fn is not None:
        raise ValueError(
            "sdeint has no events: a Brownian path that meets a level crosses it infinitely often at once, so that steps see "
            "the first crossing late, by about the square root of their length, and in which step they see it jumps with every "
            "parameter, which a gradient would not know. Look for the crossing in the states at many times ts."
        )
    if not isinstance(y0, Tensor):
        raise TypeError(f"y0 must be a tensor, but it is a {type(y0).__name__}: pack the parts of a state into one.")
    if not y0.is_floating_point():
        raise TypeError(f"y0 must be real and floating point, but it has dtype {y0.dtype}: cast it, say with .float().")
    if y0.ndim == 0 or y0.numel() == 0:
        raise ValueError(f"y0 has shape {tuple(y0.shape)}, but a state of shape (..., d) is needed: reshape it.")
    for name, value in (("dt", dt), ("dt_min", dt_min)):
        if isinstance(value, Tensor) and followed(value):
            raise ValueError(f"{name} requires a gradient, but steps have none: pass a float.")
        if not isinstance(value, (Real, Tensor)):
            raise TypeError(f"{name} must be a number, but it is {value!r}.")
        if not 0.0 < float(value) < math.inf:
            raise ValueError(f"{name} must be positive and finite, but it is {value!r}: pass a length of time.")
    if adaptive and dt_min > dt:
        raise ValueError(f"dt_min = {dt_min} is larger than the first step, dt = {dt}: lower dt_min or raise dt.")
    return float(dt), float(dt_min)


def _of_functions(sde: tuple[Any, ...], start: Tensor, y0: Tensor) -> SDE:
    """A tuple (f, g) as an SDE in the sense of Stratonovich."""
    if len(sde) != 2 or not all(map(callable, sde)):
        raise TypeError(f"a tuple must hold two functions, drift f(t, y) and diffusion g(t, y), but it is {sde!r}.")
    shape = getattr(sde[1](start, y0), "shape", None)
    return SDE(*sde, noise_type="diagonal" if shape == y0.shape else "general")


def _given_back(sde: Any, y0: Tensor) -> ExitStack:
    """A context after which the random numbers drawn in it are drawn again, and the buffers of modules are what they were."""
    within = ExitStack()
    within.enter_context(Buffers(Snapshot(sde).modules.values()))
    within.enter_context(torch.random.fork_rng([y0.device] if y0.device.type == "cuda" else []))
    return within
