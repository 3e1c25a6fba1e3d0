"""Deep equilibria: `fixed_point`, whose term is the value of f itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from revsolve.core.problem import Stats
from revsolve.core.stepper import Stepper
from revsolve.extras.progress import AcceptedStep
from revsolve.field.functorch import dual_numbers
from revsolve.field.pure import Pure, pure
from revsolve.fixed_points.convergence import RESIDUALS, STOPS, Convergence, Criterion, UntilConverged
from revsolve.fixed_points.implicit import AT_THE_END, gradient_at_the_end, gradient_options, iterate, rule
from revsolve.fixed_points.iteration import Iteration, ValueTerm, check_whole, output_steps, steps, takes_step
from revsolve.fixed_points.precision import anchor_spacing, packed_beta, pair_dtype_of
from revsolve.prepare.options import check_choice, explains_keywords
from revsolve.prepare.problem import GRADIENTS, values_hidden
from revsolve.prepare.state import Packing
from revsolve.schemes.reversible import relaxation


@dataclass(frozen=True)
class FixedPoint:
    """The result of `fixed_point` with ``full_output=True``.

    Attributes:
        z: the fixed point, like z0.
        num_steps: steps taken, a number; with ``stop="sample"`` those of every sample, shape (samples,).
        residual: the residual that decides at z, of shape () or (samples,); None where tol is 0, for then none is measured.
        converged: whether it is at most tol, of the same shape.
        trace: absolute and relative residuals after every step, shape (steps, 2) or (steps, 2, samples).
        stats: what the solve did; the backward pass fills in its own counters when it has run.
    """

    z: Any
    num_steps: int | Tensor
    residual: Tensor | None
    converged: Tensor | None
    trace: Tensor | None
    stats: Stats


@explains_keywords
def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *,
    args: Any = (),
    method: str = "reversible",
    beta: Any = 0.8,
    tol: float = 1e-3,
    max_steps: int | Callable[[], int] = 50,
    min_steps: int = 1,
    residual: str = "relative",
    stop: str = "batch",
    gradient: str | None = None,
    pair_dtype: torch.dtype | None = None,
    anchor_every: int | None = None,
    noise: str = "solve",
    save_at: int | Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    on_failure: str = "warn",
    full_output: bool = False,
    progress: bool = False,
    callback: Callable[[AcceptedStep], Any] | None = None,
    compile: bool | Mapping[str, Any] = False,  # noqa: A002
) -> Any:
    """The fixed point `z = f(z, *args)`, reached from z0, with the exact gradient of the iteration that was made.

    The reversible iteration of McCallum, Arora & Foster (2025, arXiv 2509.12917) keeps a pair (y, z), undoes its steps when
    gradients are taken, and needs two evaluations a step forward and two backward:

        z = (1 - beta) z + beta f(y);    y = (1 - beta) y + beta f(z)

    Real eigenvalues of the Jacobian of f must lie in (-1, 1), whatever beta is; those off the real axis ask for a smaller beta.
    What f draws at random (dropout) it draws once a call, the same in every step, so that there is a fixed point; see `noise`.

    Args:
        f: any callable `f(z, *args)`; its value is shaped like z. If it has a parameter named `step`, it is given the number of
            the step, 0, 1, ..., the same for both evaluations of one step, and the last one again where the residual is
            measured after it.
        z0: where the iteration starts: a tensor of any shape, real or complex, or a pytree of tensors. It gets a gradient.
        args: a tuple of further arguments for f, the injected input for example; anything else is passed as a single one.
        method: "reversible", or for comparison "simple", "relaxed" (by beta) or "anderson".
        beta: how far a step goes, in (0, 2) but not 1: a number, a tensor that broadcasts against z (shape (channels, 1, 1) for
            one number a channel) or a pytree of these like z0. It gets a gradient. Undoing a step divides by 1 - beta, so
            gradient="reversible" needs |1 - beta| >= 1.3e-3 (3e-5 if f computes in bfloat16, 9e-5 if in float64; with float32
            pairs 0.03 and, if f computes in float32, 0.016). Where 1 - beta is a power of 1/2, as for 0.5 and 0.75, fewer
            states are stored.
        tol: stop at this residual; 0 makes exactly max_steps steps and measures none.
        max_steps: the most steps; a callable without arguments is called for it, to draw it at random in training.
        min_steps: the fewest steps.
        residual: "relative", ||z - f(z)|| / (1e-5 + ||f(z)||), or "absolute", of each leaf; the largest counts.
        stop: "batch", one residual over all entries, "all", one for every sample (the leading dimension of all leaves), or
            "sample", where besides those that have converged rest, so that the result of none depends on the others.
        gradient: "reversible" (the default), "checkpoint" (about 2 sqrt(steps) states) or "direct" (keep everything), which are
            exact. To compare with: "truncated" (the last steps alone), "one_step" (one evaluation at the fixed point),
            "phantom" (a few damped steps from there), "implicit" (the implicit function theorem, by Anderson's method) and the
            same by "implicit_simple", "implicit_relaxed", "implicit_anderson" or "implicit_gmres". The other methods have
            these, of which "implicit" is the default, and "direct".
        pair_dtype: what the pair is kept in; by default float64, and float32 on devices without it.
        anchor_every: keep the pair after so many steps; by default as many as the dtypes and beta allow.
        noise: "solve", what f draws at random is the same in every step, or "step", drawn anew in each (but the same for both
            evaluations of one).
        save_at: return the states after these steps, stacked in front; a number k stands for every k-th step and the last
            one. For the reversible method and exact gradients; a list needs tol=0, and its last one is the last step made.
        options: of the other methods and gradients: `last_steps` (4) of "truncated", `phantom_steps` (5) and `phantom_beta`
            (0.5), `b_tol` (1e-6), `b_max_steps` (50) and `b_method` of "implicit", `memory` and `ridge` of Anderson's method.
        on_failure: "warn", "raise" or "ignore" when max_steps are not enough, or b_max_steps of an implicit gradient.
        full_output: return a `FixedPoint` instead of z alone.
        progress: show a progress bar.
        callback: called with an `AcceptedStep` after every step; by the methods for comparison only if tol > 0.
        compile: compile the steps, as in `odeint`: for the reversible method, tol=0 and a number beta.

    Returns:
        The last y, like z0; with `save_at` those asked for, in an additional leading dimension.

    Raises:
        ValueError, TypeError: for bad arguments, before any step.
        RuntimeError: if the iteration diverges, or does not converge with on_failure="raise".

    Example:
        >>> import torch
        >>> from revsolve import fixed_point
        >>> x = torch.tensor([0.5], requires_grad=True)
        >>> z = fixed_point(lambda z, x: 0.5 * torch.tanh(z) + x, torch.zeros(1), args=x, tol=1e-6)
        >>> z.detach(), torch.autograd.grad(z, x)[0]
        (tensor([0.8439]), tensor([1.3576]))
    """
    packing, criterion = _checked(f, z0, tol, max_steps, min_steps, residual, stop, on_failure)
    check_choice("noise", noise, ("solve", "step"))
    gradient, options = gradient_options(method, gradient, options)
    reversible, x0, exact = method == "reversible", packing.pack(z0), gradient in (None, *GRADIENTS)
    if reversible:
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))  # what cotangents are added up in
    else:
        given = {"pair_dtype": pair_dtype, "anchor_every": anchor_every, "save_at": save_at, "compile": compile or None}
        _refuse(f"method={method!r}", "reversible", noise=None if noise == "solve" else noise, **given)
    _refuse(f"gradient={gradient!r}", "exact gradients", save_at=None if exact else save_at)
    term: Any = ValueTerm([f], args, packing, x0.dtype, num_steps=criterion.max_steps, one_draw=noise == "solve")
    last_steps = options["last_steps"] if gradient == "truncated" else 0
    last_steps = min(last_steps, criterion.max_steps) if criterion.tol == 0.0 else last_steps
    with tqdm(total=criterion.max_steps, desc="fixed point") if progress else nullcontext() as bar:
        tell = None
        if callback is not None and not reversible:
            tell = lambda n, y: callback(AcceptedStep(n, float(n), 1.0, term.unpack(y.detach()), 0))  # noqa: E731
        convergence = Convergence(criterion.before(last_steps), packing, bar, tell)
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient not in AT_THE_END):
            if reversible:
                by_step, more = takes_step(f) or noise == "step", (lambda n: [n + last_steps]) if last_steps else None
                iteration = _relaxation(
                    term, f, beta, by_step, pair_dtype, anchor_every, convergence, callback, compile
                )
                chosen = gradient if exact else None
                ys, problem = iteration.solve(x0, _stepper(convergence, save_at), chosen, outputs_after=more)
                y, term, stats = ys[-1] if save_at is None else ys, problem.field.term, problem.stats
            else:
                change = rule(method, packed_beta(beta, packing, x0.dtype), options)
                hidden, held = values_hidden() or dual_numbers(), (f, term.arguments)
                field = Pure(term) if hidden else pure(term, x0, None, (0.0, 0.0), held, "direct", False)
                term, (y, stats) = field.term, iterate(field, x0, change, convergence, last_steps)
    if gradient in AT_THE_END and torch.is_grad_enabled():
        y = gradient_at_the_end(term, y, gradient, packing, options, on_failure, stats)
    convergence.conclude(on_failure)
    z = packing.unpack(y.to(packing.dtypes[0]) if packing.lone else y)
    return _full_output(z, convergence, stats) if full_output else z


def _checked(
    f: Any,
    z0: Any,
    tol: float,
    max_steps: int | Callable[[], int],
    min_steps: int,
    residual: str,
    stop: str,
    on_failure: str,
) -> tuple[Packing, Criterion]:
    """The state as it is packed, and when to stop."""
    if not callable(f):
        raise TypeError(f"f must be callable as f(z), but it is {f!r}.")
    check_choice("residual", residual, RESIDUALS)
    check_choice("stop", stop, STOPS)
    check_choice("on_failure", on_failure, ("warn", "raise", "ignore"))
    num_steps = check_whole("max_steps", max_steps() if callable(max_steps) else max_steps)
    if check_whole("min_steps", min_steps) > num_steps:
        raise ValueError(f"min_steps = {min_steps} is more than max_steps = {num_steps}.")
    if not (tol >= 0.0 and math.isfinite(tol)):
        raise ValueError(f"tol must be 0 or positive, but it is {tol!r}: 0 makes exactly max_steps steps.")
    if tol > 0 and torch.compiler.is_dynamo_compiling():
        raise ValueError(
            "residuals are numbers, which torch.compile hides: use tol=0 and max_steps, or solve outside of what is compiled."
        )
    packing = Packing(z0, "z0")
    if stop != "batch" and len({shape[:1] for shape in packing.shapes} | {torch.Size()}) != 2:
        raise ValueError(
            f"stop={stop!r} needs one leading dimension common to all of z0, but the shapes are {[*map(tuple, packing.shapes)]}."
        )
    return packing, Criterion(float(tol), num_steps, min_steps, residual, stop)


def _refuse(asked: str, owners: str, **given: Any) -> None:
    """Raise for what was given although it is for others, the `owners`."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} is for {owners}, and has no meaning for {asked}.")


def _stepper(convergence: Convergence, save_at: int | Sequence[int] | None) -> Callable[[], Stepper] | None:
    """Makes what takes the steps of the iteration, None if there are none."""
    criterion = convergence.criterion
    if criterion.max_steps == 0:
        return None
    if criterion.tol == 0.0:
        return steps(0, output_steps(save_at, criterion.max_steps))
    if save_at is not None and not isinstance(save_at, int):
        raise ValueError(
            f"save_at={save_at!r} needs tol=0, or the iteration may stop earlier: a number k is every k-th step and the last."
        )
    every = check_whole("save_at", save_at)
    return lambda: UntilConverged(criterion.max_steps, convergence.observe, every)


def _relaxation(
    term: ValueTerm,
    f: Any,
    beta: Any,
    by_step: bool,
    pair_dtype: torch.dtype | None,
    anchor_every: int | None,
    convergence: Convergence,
    callback: Callable[[AcceptedStep], Any] | None,
    compile: Any,  # noqa: A002
) -> Iteration:
    """The reversible iteration; `by_step`, f is another one in every step."""
    wide = pair_dtype_of(term.packing, pair_dtype)
    beta = packed_beta(beta, term.packing, wide)
    if compile and isinstance(beta, Tensor):
        raise ValueError("compile= needs a beta that is a number: give a float, or leave out compile=.")
    if compile and by_step:
        raise ValueError(
            "compile= is not for an f(z, step=...) nor for noise='step': leave it out, or compile f itself."
        )
    active = functools.partial(convergence.moves, dtype=wide) if convergence.criterion.rests else None
    return Iteration(
        relaxation(beta, active),
        term,
        (f, term.arguments, beta),
        wide,
        check_whole("anchor_every", anchor_every),
        spacing=functools.partial(anchor_spacing, beta),
        explain=convergence.lost,
        remedy="move beta away from 1, ",
        callback=callback,
        compile=compile,
    )


def _full_output(z: Any, convergence: Convergence, stats: Stats) -> FixedPoint:
    taken = convergence.steps_taken(stats.num_steps)
    if not convergence.trace:
        return FixedPoint(z, taken, None, None, None, stats)
    residual = convergence.latest()
    return FixedPoint(z, taken, residual, residual <= convergence.criterion.tol, torch.stack(convergence.trace), stats)
