"""Neural ODEs: `odeint`, whose term is h f(t, x)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Scheme
from revsolve.extras.event_steps import EVENT_OPTIONS
from revsolve.extras.progress import AcceptedStep
from revsolve.extras.solve import solution_of
from revsolve.field.functorch import version
from revsolve.prepare.options import explains_keywords, read_options
from revsolve.prepare.problem import InitialValueProblem, Posed
from revsolve.prepare.state import Packing
from revsolve.prepare.times import as_tensor
from revsolve.schemes.tableau import Tableau


@explains_keywords
def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    args: Any = (),
    rtol: float | Tensor | None = None,
    atol: float | Tensor | None = None,
    method: str | Tableau | Scheme | None = "rev_dopri5",
    options: Mapping[str, Any] | None = None,
    gradient: str | None = None,
    restarts: Any = "auto",
    full_output: bool = False,
    event_fn: Callable[..., Any] | None = None,
    progress: bool = False,
    callback: Callable[[AcceptedStep], Any] | None = None,
    compile: bool | Mapping[str, Any] = False,  # noqa: A002
) -> Any:
    """Solve `dy/dt = func(t, y, *args)` from `y(t[0]) = y0`, with exact gradients of the discrete solve.

    Reversible pairs follow McCallum & Foster (2024, arXiv 2410.11648).

    Args:
        func: the field, any callable `func(t, y, *args)`; t is a 0-d tensor, the value is shaped like y.
        y0: a tensor of any shape, real or complex, or a pytree of tensors.
        t: times at which the state is wanted, shape (T,), strictly monotone either way; in the unit of the field. Or (T, batch):
            each sample's own times, for a tensor y0 of shape (batch, ...); func then receives t of shape (batch,).
        args: a tuple of further arguments for func; anything else is passed on as a single one.
        rtol, atol: relative and absolute tolerance of adaptive steps, by default 1e-7 and 1e-9 in float64: numbers, tensors that
            broadcast against y0, or, where y0 is a pytree, one of these for each of its parts.
        method: a name (`revsolve.method_names()`), a `Tableau` (its plain method) or a `Scheme`; None is the default.
        options: `step_size` or `grid_constructor` for fixed steps; `first_step`, `safety`, `ifactor`, `dfactor`, `min_step`,
            `max_step`, `max_num_steps`, `norm` for adaptive ones; `step_t`, `jump_t` for times where steps end, with a jump of
            the field at the latter, of which each step sees its own side; `coupling` (`rev_` methods), `eta` (alf).
            Methods with an embedded error estimate adapt unless the steps are fixed here; the natively reversible ones
            adapt when rtol or atol is given. `dense`: steps need not land on output times, which are interpolated; keeps the
            state after every step. `steps_of_each`: with 2-D t, each sample has adaptive steps of its own length.
            `event_direction`: 1 or -1 for crossings from below or from above only.
        gradient: "reversible" (undo the steps), "checkpoint" (about 2 sqrt(N) states) or "direct" (keep everything);
            by default the first that the method allows.
        restarts: "auto", a fixed number of steps, a `Restarts`, or None to switch them off (reversible methods only).
        full_output: return a `Solution` with statistics instead of the states alone.
        event_fn: solve from t[0] in the direction of t[1], which need not be reached, until a component of the tensor
            `event_fn(t, y)` crosses zero. A zero at t[0] does not count, nor does one that is left again within a step.
        progress: show a progress bar.
        callback: called with an `AcceptedStep` after every accepted step.
        compile: compile the forward steps and their reversal, once for each field, method and shape, on the CPU:
            True, or a dict with "options" or "mode" of `torch.compile`, or "backend": "eager" to look for errors.

    Returns:
        The states at the times t: like y0, with a leading dimension T. With event_fn, the time of the event, and the two states
        at t[0] and then.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
        RuntimeError: if the field returns NaN, the step size underflows, there are too many steps, or no event was found after
            10,000 steps, or 1,000 far from the start (docs: Events), with the time reached; if compile= cannot compile the field.

    Example:
        >>> import torch
        >>> from revsolve import odeint
        >>> y = odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), method="rev_rk4", options={"step_size": 0.1})
        >>> y[-1]
        tensor([0.3679])
    """
    if not callable(func):
        raise TypeError(
            f"func must be callable as func(t, y), but it is a {type(func).__name__}: call odeint(func, y0, t)."
        )
    read = read_options(
        "rev_dopri5" if method is None else method,
        options,
        EVENT_OPTIONS if event_fn is not None else ("dense", "steps_of_each"),
        rtol=rtol,
        atol=atol,
        gradient=gradient,
        restarts=restarts,
        progress=progress,
        callback=callback,
        compile=compile,
    )
    arguments = args if isinstance(args, tuple) else (args,)
    field = functools.partial(_with_arguments, func, arguments) if arguments else func
    packing = Packing(y0)

    def pose(clock: Any, steps: list[float] | None) -> Posed:
        return Posed(FieldTerm(field, packing, clock), (func, arguments))

    results = lambda xs, num_dims: packing.unpack(xs)  # noqa: E731
    x0, read = packing.pack(y0), read.for_state(packing)
    ivp = InitialValueProblem("odeint", packing, x0, read, pose, (field, y0), results)
    return solution_of(ivp, t, event_fn, full_output)


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor | float,
    *,
    event_fn: Callable[..., Any],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve from t0 until `event_fn(t, y)` crosses zero; called like the function of this name in torchdiffeq.

    Event times as differentiable functions follow Chen, Amos & Nickel (2021, arXiv 2011.03902), here with the derivative of the
    discrete solve.

    Args:
        func, y0: as in `odeint`.
        t0: the initial time, a tensor with one number.
        event_fn: a tensor function of time and state; see `odeint`.
        reverse_time: go towards smaller times.
        odeint_interface: what solves, called as `odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)`.
        **kwargs: further keywords of `odeint_interface`.

    Returns:
        The time of the event and the states at t0 and then, both with exact gradients.

    Raises:
        ValueError, TypeError: for bad arguments, before any work.
        RuntimeError: if no event was found, with the time reached and the last value of event_fn.

    Example:
        >>> import torch
        >>> from revsolve import odeint_event
        >>> event_t, _ = odeint_event(
        ...     lambda t, y: -y, torch.ones(1), torch.tensor(0.0), event_fn=lambda t, y: y - 0.5, rtol=1e-6, atol=1e-6
        ... )
        >>> event_t
        tensor(0.6931)
    """
    start = as_tensor(t0).reshape(1)
    if not start.is_floating_point():
        raise TypeError(f"t0 must be a floating point tensor, but it has dtype {start.dtype}: cast it with .float().")
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)


class FieldTerm:
    """The term of an ODE: field value times h. `clock` says which time the field sees, and how much of it passes, the control."""

    def __init__(self, func: Callable[..., Any], packing: Packing, clock: Any) -> None:
        self.func, self.packing, self.clock = func, packing, clock
        self.additive = self.is_rate = clock.additive
        self.control = clock.control
        self.checked = False

    def value(self, t: Time, x: Tensor) -> Tensor:
        if not self.packing.lone:
            return self.packing.pack(self.func(self.clock(t), self.packing.unpack(x)), "the field")
        out = self.func(self.clock(t), x)
        if not (self.checked and isinstance(out, Tensor) and out.dtype is x.dtype and out.shape == x.shape):
            self.packing.check_like(out, "the field")
            self.checked = True
        if not torch.compiler.is_compiling() and version(out) > 0:
            out = out.clone()  # written in place, perhaps where the next call writes again
        return out if out.dtype is x.dtype else out.to(x.dtype)

    def product(self, value: Tensor, control: Time) -> tuple[Tensor, Time]:
        return value, control


def _with_arguments(func: Callable[..., Any], arguments: tuple[Any, ...], t: Tensor, y: Any) -> Any:
    return func(t, y, *arguments)
