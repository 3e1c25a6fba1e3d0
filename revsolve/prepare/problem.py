"""From what a front door is given to what the engine takes: an initial value problem, its field as a pure function, its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revsolve.core.caller import warn
from revsolve.core.coupling import Scheme
from revsolve.core.problem import Problem, Stats
from revsolve.core.restart import RestartSettings
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.field.functorch import dual_numbers, followed, transformed
from revsolve.field.pure import Pure, pure
from revsolve.field.repeat import capturing
from revsolve.field.transformed import TransformedSolve, transformed_field
from revsolve.prepare.diagnosis import TOO_LONG, explain
from revsolve.prepare.grid import choose_steps
from revsolve.prepare.options import SolverOptions, check_choice
from revsolve.prepare.state import Packing
from revsolve.prepare.times import Clock, resolution
from revsolve.restarts.growth import Restarts

FAR = 1e300  # where time ends for an equation that knows no end
GRADIENTS = ("reversible", "checkpoint", "direct")
FEW = 2  # steps, of which checkpoints would keep no less than plain automatic differentiation does
REMEDY = "restart more often (restarts=8, say), use a wider dtype"
BLIND_INTERVAL = 4  # short enough for all of the classical problems that restarts were tuned on, but the stiffest


@dataclass(frozen=True)
class Posed:
    """A term, the objects whose tensors it may use, and the first span that it is evaluated for, where that is not a step.

    rates: a term whose product over any span tells the rate of change, where that of `term` does not.
    """

    term: Term
    owners: Sequence[Any]
    span: tuple[float, float] | None = None
    rates: Term | None = None


@dataclass(frozen=True)
class InitialValueProblem:
    """All of a solve but its times.

    Attributes:
        name: that of the front door.
        pose: the term whose field sees the times of a clock; from the times of its steps, where these are known and fixed.
        constructor_arguments: what a grid_constructor is called with, before the times.
        results: packed states with some dimensions in front as users see them.
        knots: where fixed steps end by default. discontinuities: the times at which the slope of the solution jumps.
        straight: whether the solution is a straight line within steps. interval: where the equation is defined.
        source: what drives the term in programs. remedy: advice where the state stops being finite.
    """

    name: str
    packing: Packing
    x0: Tensor
    options: SolverOptions
    pose: Callable[[Any, list[float] | None], Posed]
    constructor_arguments: tuple[Any, Any]
    results: Callable[[Tensor, int], Any]
    knots: Sequence[float] = ()
    discontinuities: Sequence[float] = ()
    straight: bool = False
    interval: tuple[float, float] = (-FAR, FAR)
    source: Callable[[Any], Any] | None = None
    remedy: str = TOO_LONG

    @property
    def jumps(self) -> Sequence[float]:
        """The times at which the field or the slope of the solution jumps."""
        return (*self.discontinuities, *self.options.jump_t)

    def clock(self, shift: Tensor | None = None) -> Clock:
        return Clock(self.packing.real_dtype, self.packing.device, shift)

    def moving_clock(self, t: Any, start: float, end: float) -> Clock:
        """A clock by which all times between two move with t[0], where that has a gradient."""
        shift = t[0] - t[0].detach() if isinstance(t, Tensor) and followed(t) else None
        lowest, highest = sorted((start, end))
        jumps = [s for s in self.jumps if lowest < s < highest]
        if shift is not None and jumps:
            raise ValueError(
                f"the gradient of t[0] moves all steps, with event_fn or 'dense', but the field jumps at t = {jumps[0]}: pass "
                "t.detach(), leave out jump_t, or give a path whose slope does not jump."
            )
        return self.clock(shift)

    def steps(self, times: list[float], t: Any) -> Callable[[], Stepper]:
        """Steps to each of the times, as the options ask for them."""
        options, arguments, term = self.options, (*self.constructor_arguments, t), None
        if options.adaptive:
            posed = self.pose(self.clock(), None)
            term = posed.rates or posed.term
        return choose_steps(times, options, term, self.x0, arguments, self.knots, self.discontinuities, resolution(t))

    def problem(
        self,
        posed: Posed,
        times: Sequence[float],
        make_stepper: Callable[[], Stepper],
        t: Tensor | None = None,
        num_steps: int | None = None,
    ) -> Problem:
        """What the engine takes. t: the times where these have a gradient; num_steps: if known."""
        options, dtype = self.options, self.packing.real_dtype
        undone = options.scheme.reversible and options.gradient in (None, "reversible")
        if undone and dtype.itemsize < 4 and torch.is_grad_enabled():
            warn(
                f"undoing steps in {dtype} keeps two or three digits: make y0 float32 (under torch.autocast the field computes "
                "in half precision all the same), or use gradient='checkpoint'."
            )
        explained = partial(explain, posed.rates or posed.term, self.remedy)
        source = self.source(posed.term) if options.compile and self.source else None
        span = posed.span or (times[0], times[1])
        return prepare(
            posed.term, posed.owners, span, self.x0, t, options, make_stepper, explained, num_steps, source=source
        )


def prepare(
    term: Term,
    owners: Sequence[Any],
    span: tuple[float, float],
    x0: Tensor,
    t: Tensor | None,
    options: SolverOptions,
    make_stepper: Callable[[], Stepper],
    explain: Callable[[float, Tensor], str],
    num_steps: int | None = None,
    *,
    source: Any = None,
    pair_dtype: torch.dtype | None = None,
    spacing: Callable[[], int] | None = None,
    rounding: float | None = None,
    undoing_remedy: str = REMEDY,
) -> Problem:
    """Everything the engine needs, found by a first call of the term over `span`.

    Args:
        owners: the callables and objects whose tensors the term may use.
        explain: the message where the state stops being finite, from a time and a state.
        num_steps: the number of steps, where it is known beforehand.
        source: what drives the term, such as noise, for programs.
        pair_dtype: the dtype of the pair, where it is wider than that of x0.
        spacing: gives the steps between stored pairs; asked only where steps will be undone, as are the next two.
        rounding: that of the field, where it is coarser than the state's.
        undoing_remedy: advice where undoing the steps is too inaccurate.
    """
    scheme, few = options.scheme, t is None and num_steps is not None and num_steps <= FEW
    mode, restarts = _gradient_mode(options, few), check_restarts(options.restarts, scheme)
    pair_dtype = None if pair_dtype == x0.dtype else pair_dtype
    hidden, field, followed = values_hidden(), None, False  # type: bool, Any, bool
    if hidden and mode != "direct" and not scheme.tensors:
        field = transformed_field(term, x0 if pair_dtype is None else x0.to(pair_dtype), span, owners)
    operation = None if field is None else TransformedSolve
    if field is None:
        followed = hidden or dual_numbers()  # looking at values would cut them off from their tangents
        if followed and options.gradient not in (None, "direct"):
            raise ValueError(
                f"gradient={options.gradient!r} is not possible here, because torch.compile, a transform of torch.func or "
                "forward mode differentiates the solve itself (docs: Works with): leave it out, or say gradient='direct'."
            )
        mode = "direct" if followed else mode
        field = Pure(term) if hidden else pure(term, x0, pair_dtype, span, owners, mode, t is not None, scheme.tensors)
    readable, undoes = not (capturing() or (hidden and followed)), mode == "reversible"
    problem = Problem(
        scheme,
        field,
        make_stepper,
        mode,
        restarts if readable and not followed else _blind(restarts),
        Stats(),
        explain,
        checkpoint_every=spacing() if undoes and spacing else options.checkpoint_every,
        state_dtype=None if pair_dtype is None else x0.dtype,
        pair_dtype=pair_dtype,
        rounding=rounding if undoes else None,
        undoing_remedy=undoing_remedy,
        readable=readable,
        followed=followed,
        operation=operation,
    )
    if not options.compile:
        return problem
    from revsolve.backends.inductor.backend import compiled  # importing what compiles takes longer than many solves

    return compiled(problem, owners, options.compile, x0, t, source)


def values_hidden() -> bool:
    """Whether numbers cannot be read from tensors now: inside torch.func transforms, and while torch.compile traces."""
    return torch.compiler.is_compiling() or transformed()


def _gradient_mode(options: SolverOptions, plain: bool) -> str:
    """How the gradient is computed: as asked for, or by default for the scheme. `plain`: whether nothing but the solve is wanted
    of steps that are no more than their checkpoints."""
    gradient, scheme = options.gradient, options.scheme
    if gradient is None:
        mode = "reversible" if scheme.reversible else "direct" if plain and not options.compile else "checkpoint"
    else:
        check_choice("gradient", mode := gradient, GRADIENTS)
        if gradient == "reversible" and not scheme.reversible:
            raise ValueError(
                f"{scheme.name!r} cannot be undone, so gradient='reversible' is not possible: use "
                f"method='rev_{scheme.name}', or gradient='checkpoint'."
            )
    if options.checkpoint_every is not None and mode != "checkpoint":
        raise ValueError(
            f"checkpoint_every = {options.checkpoint_every} goes with gradient='checkpoint', but it is {mode!r} here."
        )
    return mode


def _blind(restarts: RestartSettings | None) -> RestartSettings | None:
    """Restarts that do not look at values: at a fixed interval."""
    if restarts is None or (isinstance(restarts, Restarts) and restarts.interval is not None):
        return restarts
    if not isinstance(restarts, Restarts):
        raise ValueError(
            f"restarts={restarts!r:.80} may look at values, which torch.compile, torch.func, forward mode or a CUDA graph hide "
            "here: give a number of steps."
        )
    return Restarts(interval=restarts.longest or BLIND_INTERVAL)


def check_restarts(restarts: Any, scheme: Scheme) -> RestartSettings | None:
    """'auto', a number of steps, a `Restarts` or what has its methods, or None; a scheme whose steps are not undone has none."""
    if not scheme.reversible and restarts not in ("auto", None):
        raise ValueError(
            f"restarts={restarts!r} has no meaning for {scheme.name!r}, whose steps are not undone: leave it out."
        )
    if restarts is None or hasattr(restarts, "policy"):
        return restarts
    if restarts == "auto":
        return Restarts()
    if isinstance(restarts, int) and not isinstance(restarts, bool):
        return Restarts(interval=restarts)
    raise ValueError(f"restarts must be 'auto', a number of steps, a Restarts(...) or None, but it is {restarts!r}.")
