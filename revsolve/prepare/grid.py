"""Where steps may end: fixed grids from integer step counts, and the settings of adaptive steps."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from revsolve.core.coupling import Scheme
from revsolve.core.stepper import Adaptive, Control, FixedGrid, Stepper
from revsolve.core.tape import Term
from revsolve.field.functorch import batching, of_every_sample, transformed
from revsolve.field.repeat import capturing

FIXED_OPTIONS = ("step_size", "grid_constructor")
ADAPTIVE_OPTIONS = (
    *("first_step", "safety", "ifactor", "dfactor", "min_step", "max_step", "max_num_steps"),
    *("step_t", "jump_t", "norm"),
)


# By the names of torchdiffeq: what `Control` calls them, and what they must be.
LIMITS: dict[str, tuple[str, str, Callable[[float], bool]]] = {
    "safety": ("safety", "lie in (0, 1]", lambda x: 0 < x <= 1),
    "ifactor": ("grow", "be at least 1", lambda x: x >= 1),
    "dfactor": ("shrink", "lie in (0, 1)", lambda x: 0 < x < 1),
    "min_step": ("min_step", "be finite and not negative", lambda x: 0 <= x < math.inf),
    "max_step": ("max_step", "be positive", lambda x: x > 0),
    "max_num_steps": ("max_num_steps", "be a whole number of at least 1", lambda x: x >= 1 and x % 1 == 0),
}


def fixed_grid(times: list[float], step_size: float | None, method: str) -> Callable[[], Stepper]:
    """Equal steps of `step_size` or less between the given times; without it, one step from each time to the next.

    Times may come from float32: a step may be longer than asked for by a millionth.
    """
    if step_size is None:
        if len(times) == 2:
            warnings.warn(
                f"method {method!r} takes fixed steps, and without a step size it takes a single one from t = {times[0]} to "
                f"{times[1]}: pass options={{'step_size': ...}}.",
                stacklevel=4,
            )
        return lambda: FixedGrid(times, list(range(len(times))))
    if not (isinstance(step_size, (int, float)) and math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a positive number, but it is {step_size!r}; its sign follows from t.")
    grid, outputs = times[:1], [0]
    for a, b in itertools.pairwise(times):
        n = max(1, math.ceil(abs(b - a) / step_size * (1 - 1e-6)))
        grid += [a + (b - a) * (i / n) for i in range(1, n)] + [b]
        outputs.append(len(grid) - 1)
    return lambda: FixedGrid(grid, outputs)


def knot_grid(times: list[float], knots: Sequence[float], resolution: float) -> Callable[[], Stepper]:
    """Steps from knot to knot, and to every output time; a knot within `resolution` of one of these gives way to it."""
    lowest, highest = sorted((times[0], times[-1]))
    ordered = sorted(times)
    inner = [s for s in knots if lowest < s < highest and distance(s, ordered) > resolution]
    grid = sorted({*inner, *times}, reverse=times[-1] < times[0])
    place = {s: n for n, s in enumerate(grid)}
    return lambda: FixedGrid(list(grid), [place[s] for s in times], [place[s] for s in inner])


def distance(s: float, ordered: list[float]) -> float:
    """From s to the nearest of the increasing numbers `ordered`."""
    if not torch.compiler.is_compiling():  # which knows no bisection
        i = bisect.bisect(ordered, s)
        ordered = ordered[max(0, i - 1) : i + 1]
    return min(abs(s - other) for other in ordered)


def given_grid(times: list[float], points: list[float]) -> Callable[[], Stepper]:
    """Steps from each of the given points to the next; output times that are not among them are added."""
    forward = 1.0 if len(times) < 2 or times[-1] > times[0] else -1.0
    if any((b - a) * forward <= 0 for a, b in itertools.pairwise(points)):
        raise ValueError("the points of grid_constructor must be strictly monotone in the direction of t.")
    lowest, highest = sorted((times[0], times[-1]))
    if points and not (lowest <= min(points) and max(points) <= highest):
        raise ValueError(
            f"the points of grid_constructor must lie within t, [{lowest}, {highest}], but they leave it: {points}."
        )
    grid = sorted({*points, *times}, reverse=forward < 0)
    return lambda: FixedGrid(grid, [grid.index(s) for s in times])


def adaptive_grid(
    times: list[float],
    options: Mapping[str, Any],
    rtol: float | Tensor | None,
    atol: float | Tensor | None,
    scheme: Scheme,
    term: Term,
    x0: Tensor,
) -> Callable[[], Stepper]:
    """Steps that meet the tolerances and land on every output time, and on `step_t` and `jump_t`."""
    assert scheme.error_order is not None
    if torch.compiler.is_dynamo_compiling():
        raise ValueError(
            "adaptive steps are chosen by looking at numbers, which torch.compile hides: fix the steps, say with "
            "options={'step_size': 0.1}, or solve outside of what is compiled."
        )
    if capturing():
        raise ValueError(
            "a CUDA graph cannot capture adaptive steps, which look at their error: take a fixed options={'step_size': ...}."
        )
    rtol, atol = check_tolerances(rtol, atol, x0.dtype)
    extra = [float(s) for name in ("step_t", "jump_t") for s in options.get(name, ())]
    lowest, highest = sorted((times[0], times[-1]))
    targets = sorted({*times, *(s for s in extra if lowest < s < highest)}, reverse=times[-1] < times[0])
    outputs = set(times)
    limits = check_limits(options)
    norm = options.get("norm", root_mean_square)
    first = options.get("first_step")
    if first is not None and not (isinstance(first, (int, float)) and math.isfinite(first) and first > 0):
        raise ValueError(f"first_step must be a positive number, but it is {first!r}; its sign follows from t.")

    if transformed():
        norm = functools.partial(largest_of_samples, norm, x0.ndim)

    def make() -> Stepper:
        order = scheme.error_order or 1
        h = first or first_step(term, x0, times, rtol, atol, norm, order)
        control = Control(rtol, atol, norm, (_largest(atol), _largest(rtol)), order, h, **limits)
        return Adaptive(targets, [s in outputs for s in targets], control, explain_step(None if batching() else term))

    return make


def check_limits(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of adaptive steps, by the names that `Control` has for them."""
    limits = {}
    for name, (ours, wanted, holds) in LIMITS.items():
        if name in options:
            limit = options[name]
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not holds(limit):
                raise ValueError(f"option {name} must {wanted}, but it is {limit!r}.")
            limits[ours] = limit
    if limits.get("min_step", 0.0) > limits.get("max_step", math.inf):
        raise ValueError(f"min_step = {limits['min_step']} is larger than max_step = {limits['max_step']}.")
    return limits


def first_step(
    term: Term, x0: Tensor, times: list[float], rtol: Any, atol: Any, norm: Callable[[Tensor], Tensor], order: int
) -> float:
    """The starting step of Hairer, Norsett & Wanner (Solving ODEs I, II.4): two evaluations, two device reads."""
    if len(times) < 2:
        return 1.0
    t0, length = times[0], abs(times[-1] - times[0])
    direction = math.copysign(1.0, times[-1] - times[0])
    with torch.no_grad():
        scale = atol + rtol * x0.abs()
        f0 = _rate(term, t0, x0, direction)
        d0, d1 = (float(norm(v / scale)) for v in (x0, f0))
        h0 = min(1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1, length)
        f1 = _rate(term, t0 + direction * h0, x0 + h0 * f0, direction)
        d2 = float(norm((f1 - f0) / scale)) / h0
    steepest = max(d1, d2)
    if not math.isfinite(steepest):
        return h0
    h1 = max(1e-6, h0 * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1.0 / (order + 1))
    return min(100 * h0, h1, length)


def check_tolerances(
    rtol: float | Tensor | None, atol: float | Tensor | None, dtype: torch.dtype
) -> tuple[float | Tensor, float | Tensor]:
    """Tolerances with defaults (1e-7 and 1e-9, or what the dtype can resolve). Raises for negative or unreachable ones."""
    eps = torch.finfo(dtype).eps
    rtol = max(1e-7, 100 * eps) if rtol is None else rtol
    atol = max(1e-9, eps) if atol is None else atol
    for name, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: pass {name}.detach().")
        if not bool(torch.as_tensor(value >= 0, device="cpu").all()):
            raise ValueError(f"{name} must not be negative, but it is {value}.")
    if _largest(rtol) < 2 * eps:
        raise ValueError(
            f"rtol = {_largest(rtol):.1e} is below the rounding of {dtype}, {eps:.1e}: use rtol >= {10 * eps:.0e}."
        )
    return rtol, atol


def root_mean_square(x: Tensor) -> Tensor:
    """The norm of torchdiffeq and scipy: the square root of the mean square."""
    return torch.linalg.vector_norm(x) / math.sqrt(x.numel())


def largest_of_samples(norm: Callable[[Tensor], Tensor], ndim: int, x: Tensor) -> Tensor:
    """The largest norm among all samples of the torch.vmaps around, whose dimensions lie before the last `ndim` if not hidden."""
    for _ in range(x.ndim - ndim):
        norm = vmap(norm)
    return of_every_sample(torch.as_tensor(norm(x), device=x.device)).max()


def explain_step(term: Term | None) -> Callable[..., str]:
    """Why adaptive stepping cannot go on, in words; without a term, whose field is not asked."""

    def explain(kind: str, t0: float, stepper: Adaptive, pair: Any) -> str:
        lost = t0 if stepper.lost is None else stepper.lost
        found = None if term is None else _fault(term, (t0, lost), pair[0], stepper.direction)
        if found is not None:
            return found
        progress = (
            f"{stepper.num_steps} steps were accepted and {stepper.num_rejected} rejected, step size {stepper.h:.1e}"
        )
        if kind == "too many steps":
            return (
                f"max_num_steps = {stepper.control.max_num_steps} was reached at t = {t0}, before t = {stepper.targets[-1]} "
                f"({progress}): raise max_num_steps, loosen rtol and atol, or use a method for stiff problems."
            )
        if kind == "shortest step":
            return (
                f"a step of min_step = {stepper.control.min_step} from t = {t0} has an error that is not finite ({progress}): "
                "lower min_step, or use a method for stiff problems."
            )
        return (
            f"the step size fell below rounding at t = {t0} ({progress}): the solution has a singularity there, or the field is "
            "discontinuous (give its times as options={'jump_t': ...}) or stiff; or the tolerances are too tight."
        )

    return explain


def explain_field(t: float, y: Tensor, value: Tensor) -> str:
    """That the field returned NaN or infinity, where, and for which size of state."""
    kind = "NaN" if bool(torch.isnan(value).any()) else "an infinite value"
    size = float(torch.linalg.vector_norm(y, ord=math.inf))
    return f"the field returned {kind} at t = {t}, where the largest entry of the state is {size:.3g}: check the field there."


def _fault(term: Term, times: Sequence[float], x: Tensor, direction: float) -> str | None:
    """In words, if the field is not finite at one of the times."""
    for t in times:
        with torch.no_grad():
            value = _rate(term, t, x, direction)
        if not bool(torch.isfinite(value).all()):
            return explain_field(t, x, value)
    return None


def _rate(term: Term, t: float, x: Tensor, direction: float) -> Tensor:
    """The increment per unit of time in the direction of integration."""
    k, scale = term.product(term.value(t, x), term.control(t, t, t + direction))
    return k * scale


def _largest(tolerance: float | Tensor) -> float:
    return float(tolerance.max()) if isinstance(tolerance, Tensor) else float(tolerance)
