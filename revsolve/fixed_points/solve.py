"""Deep equilibria: `fixed_point`, whose term is the value of f itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from revsolve.core.problem import Stats
from revsolve.extras.progress import AcceptedStep
from revsolve.fixed_points.arguments import check_compiled, check_whole, checked, refuse, stepper
from revsolve.fixed_points.convergence import Convergence
from revsolve.fixed_points.implicit import GRADIENTS, METHODS, OPTIONS, equilibrium
from revsolve.fixed_points.iteration import Iteration
from revsolve.fixed_points.precision import anchor_spacing, packed_beta, pair_dtype_of
from revsolve.fixed_points.term import ValueTerm, applied, takes_step
from revsolve.prepare.options import check_choice, check_options
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
        gradient: "reversible" (the default), "checkpoint" (about 2 sqrt(steps) states) or "direct" (keep everything); for the
            other methods "implicit" (the default; the implicit function theorem), "phantom" (a few damped steps from the
            fixed point) or "direct".
        pair_dtype: what the pair is kept in; by default float64, and float32 on devices without it.
        anchor_every: keep the pair after so many steps; by default as many as the dtypes and beta allow.
        noise: "solve", what f draws at random is the same in every step, or "step", drawn anew in each (but the same for both
            evaluations of one).
        save_at: return the states after these steps, stacked in front; a number k stands for every k-th step and the last
            one. For the reversible method; a list needs tol=0, and its last one is the last step made.
        options: for the other methods, see `revsolve.implicit`.
        on_failure: "warn", "raise" or "ignore" when max_steps are not enough, or b_max_steps of an implicit gradient.
        full_output: return a `FixedPoint` instead of z alone.
        progress: show a progress bar.
        callback: called with an `AcceptedStep` after every step; by the methods for comparison only if tol > 0.
        compile: make machine code of the steps, as in `odeint`: for the reversible method, tol=0 and a number beta.

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
    packing, criterion = checked(f, z0, tol, max_steps, min_steps, residual, stop, on_failure)
    if criterion.tol > 0 and torch.compiler.is_dynamo_compiling():
        raise ValueError(
            "residuals are numbers, which torch.compile hides: use tol=0 and max_steps, or solve outside of what is compiled."
        )
    arguments = args if isinstance(args, tuple) else (args,)
    check_choice("method", method, ("reversible", *METHODS))
    check_choice("noise", noise, ("solve", "step"))
    bar = tqdm(total=criterion.max_steps, desc="fixed point") if progress else None
    x0 = packing.pack(z0)
    if method == "reversible":
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))  # what cotangents are added up in
    term = ValueTerm(applied(f, arguments, criterion.max_steps - 1), packing, x0.dtype, noise == "solve")
    report = functools.partial(_report, bar, None if method == "reversible" else callback, term.unpack)
    convergence = Convergence(criterion, packing, report)
    with nullcontext() if bar is None else bar:
        if method == "reversible":
            refuse(method, METHODS, options=options)
            wide = pair_dtype_of(packing, pair_dtype)
            real = wide.to_real() if wide.is_complex else wide
            beta = packed_beta(beta, packing, real)
            by_step = takes_step(f) or noise == "step"
            check_compiled(compile, beta, by_step)
            active = functools.partial(convergence.moves, dtype=real) if criterion.rests else None
            iteration = Iteration(
                relaxation(beta, active, by_step),
                gradient,
                wide,
                check_whole("anchor_every", anchor_every),
                spacing=functools.partial(anchor_spacing, beta),
                explain=convergence.lost,
                remedy="move beta away from 1, ",
                callback=callback,
                compile=compile,
            )
            make = stepper(criterion, convergence.observe, save_at, by_step)
            ys, stats = iteration.solve(term, x0, make, (f, arguments, beta))
            y = ys[-1] if save_at is None else ys
        else:
            mine = {"compile": compile or None, "pair_dtype": pair_dtype, "anchor_every": anchor_every}
            refuse(method, ("reversible",), **mine, save_at=save_at, noise=None if noise == "solve" else noise)
            check_choice("gradient", gradient or "implicit", GRADIENTS)
            beta, options = packed_beta(beta, packing, x0.real.dtype), check_options(options, OPTIONS, method)
            y, stats = equilibrium(term, x0, beta, method, gradient or "implicit", convergence, options, on_failure)
    convergence.conclude(on_failure)
    z = term.unpack(y)
    return _full_output(z, convergence, stats) if full_output else z


def _report(
    bar: Any,
    callback: Callable[[AcceptedStep], Any] | None,
    unpack: Callable[[Tensor], Any],
    n: int,
    y: Tensor,
    residual: float,
) -> None:
    if bar is not None:
        bar.update(n - bar.n)
        bar.set_postfix_str(f"residual={residual:.1e}", refresh=False)
    if callback is not None:
        callback(AcceptedStep(n, float(n), 1.0, unpack(y.detach()), 0))


def _full_output(z: Any, convergence: Convergence, stats: Stats) -> FixedPoint:
    steps = convergence.steps_taken(stats.num_steps)
    if not convergence.trace:
        return FixedPoint(z, steps, None, None, None, stats)
    residual = convergence.latest()
    return FixedPoint(z, steps, residual, residual <= convergence.criterion.tol, torch.stack(convergence.trace), stats)
