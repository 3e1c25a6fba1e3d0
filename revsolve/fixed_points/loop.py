"""Loops that are no equilibria: a block applied many times, or many blocks one after the other, as updates that can be undone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from revsolve.core.coupling import Scheme
from revsolve.fixed_points.implicit import LAST_STEPS
from revsolve.fixed_points.iteration import Iteration, ValueTerm, check_whole, output_steps, steps, takes_step
from revsolve.fixed_points.precision import anchor_spacing, pair_dtype_of, steps_undone
from revsolve.fixed_points.solve import FixedPoint
from revsolve.prepare.options import check_choice
from revsolve.prepare.problem import GRADIENTS
from revsolve.prepare.state import Packing
from revsolve.schemes.increment import OneEvaluation
from revsolve.schemes.reversible import relaxation, starting_from, two_step

SCHEMES = ("coupling", "midpoint", "momentum", "relaxation")
TRUNCATED = {"truncated": LAST_STEPS, "one_step": 1}  # gradients of the last steps
LONGEST = 32  # steps from one stored pair to the next
GROWTH = 0.2  # by which rounding is taken to grow in a step undone, as a logarithm, because of the blocks themselves


def reversible_loop(
    blocks: Callable[..., Any] | Sequence[Callable[..., Any]],
    x: Any,
    *,
    args: Any = (),
    scheme: str = "midpoint",
    num_steps: int | None = None,
    momentum: float = 0.9,
    beta: float = 0.5,
    residual: bool = False,
    previous: Any = None,
    gradient: str | None = None,
    last_steps: int | None = None,
    noise: str = "step",
    save_at: int | Sequence[int] | None = None,
    pair_dtype: torch.dtype | None = None,
    anchor_every: int | None = None,
    compile: bool | Mapping[str, Any] = False,  # noqa: A002
    full_output: bool = False,
) -> Any:
    """The state after num_steps applications of one block, or one of each of a list of blocks, by steps that can be undone.

    With f the block of a step, v = y_n - y_{n-1} and the steps of the `scheme`:

        coupling    v = f(y) - v;    y = y + v    two streams (RevNet: Gomez et al. 2017, arXiv 1707.04585)
        midpoint    v = 2 f(y) - v;  y = y + v    leapfrog, from y_1 = y_0 + f(y_0) (Chang et al. 2018, arXiv 1709.03698)
        momentum    v = m v + (1 - m) f(y);  y = y + v    (Sander et al. 2021, arXiv 2102.07870)
        relaxation  z = (1 - b) z + b f(y);  y = (1 - b) y + b f(z)    that of `fixed_point`, with two evaluations a step

    The backward pass undoes the steps and differentiates each by itself: the gradient is exact, and beside a few stored pairs
    nothing is kept, however many steps there are.

    Args:
        blocks: a callable `f(x, *args)`, or a sequence of these, one for every step; values are shaped like x. If it has a
            parameter named `step`, a block is given the number of the step, 0, 1, ...
        x: the start, a tensor of any shape or a pytree of tensors.
        args: a tuple of further arguments for all blocks; anything else is passed as a single one.
        scheme: "coupling", "midpoint", "momentum" or "relaxation".
        num_steps: how often one block is applied.
        momentum: m in (0, 1), for "momentum".
        beta: b in (0, 2) but not 1, for "relaxation".
        residual: blocks add their input to what they return, as those of a pretrained residual network: f(x) = block(x) - x.
        previous: the state before x, the other stream of a "coupling"; by default there is no motion at the start. With
            `save_at=[num_steps - 1, num_steps]` both streams come back.
        gradient: "reversible" (the default), "checkpoint" or "direct", as in `fixed_point`; to compare with, "truncated", that of
            the last steps alone, those before counting as constant, or "one_step", that of the last one.
        last_steps: take the gradient of so many last steps only; by default 4 if it is to be truncated.
        noise: "step", what blocks draw at random is drawn anew in every step, or "solve", once; replayed when steps are undone.
        save_at: return the states after these steps, stacked in front; a number k stands for every k-th step and the last one.
        pair_dtype: what the pair is kept in; by default float64, and float32 on devices without it.
        anchor_every: keep the pair after so many steps; by default 32, or fewer where the dtypes, momentum or beta ask for it.
        compile: compile the steps, as in `odeint`: for one block without a `step`.
        full_output: return a `FixedPoint`, whose z is the state, instead of the state alone.

    Returns:
        The last state, like x; with `save_at` those asked for, in an additional leading dimension.

    Raises:
        ValueError, TypeError: for bad arguments, before any step, and for a block whose value is not like x.
        RuntimeError: if the state stops being finite.

    Example:
        >>> import torch
        >>> from revsolve import reversible_loop
        >>> blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(8)]
        >>> reversible_loop(blocks, torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """
    each = _checked(blocks, scheme, num_steps, momentum, residual, previous)
    check_choice("noise", noise, ("step", "solve"))
    if compile and (len(each) > 1 or takes_step(each[0])):
        raise ValueError(
            "compile= is for one block without a parameter `step`, as all steps of a program are alike: leave it out, or compile "
            "the blocks themselves by torch.compile."
        )
    packing, outputs = Packing(x, "x"), output_steps(save_at, num_steps or len(each))
    last, gradient = _truncation(gradient, last_steps, outputs)
    wide, x0 = pair_dtype_of(packing, pair_dtype), packing.pack(x)
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    term = ValueTerm(
        each,
        args,
        packing,
        x0.dtype,
        num_steps=outputs[-1],
        one_draw=noise == "solve",
        name="a block",
        residual=residual,
    )
    iteration = Iteration(
        _scheme(scheme, momentum, beta, previous is not None, bool(compile)),
        term,
        (blocks, args),
        wide,
        check_whole("anchor_every", anchor_every),
        spacing=functools.partial(_spacing, scheme, momentum, beta),
        explain=lambda t, y: f"the state is not finite after step {int(t)}: make what the blocks add smaller.",
        compile=compile,
    )
    second = None
    if previous is not None:
        packing.check_like(previous, "previous")
        second = x0.to(wide) - packing.pack(previous)
    if last is None:
        ys, problem = iteration.solve(x0, steps(0, outputs), gradient, second)
    else:
        before = outputs[-1] - last
        head = steps(0, [before]) if before > 0 else None
        ys, problem = iteration.solve(x0, head, gradient, second, outputs_after=lambda n: outputs)
    z = term.unpack(ys if save_at is not None else ys[-1])
    return FixedPoint(z, problem.stats.num_steps, None, None, None, problem.stats) if full_output else z


def _checked(
    blocks: Any, scheme: str, num_steps: int | None, momentum: float, residual: bool, previous: Any
) -> Sequence[Callable[..., Any]]:
    """The blocks of the steps, or the one of all steps."""
    check_choice("scheme", scheme, SCHEMES)
    check_whole("num_steps", num_steps)
    if scheme == "momentum" and not 0.0 < momentum < 1.0:
        raise ValueError(f"momentum must lie in (0, 1), but it is {momentum!r}: 0.9 is usual.")
    if scheme == "relaxation":
        for name, value in {"residual": residual or None, "previous": previous}.items():
            if value is not None:
                raise ValueError(
                    f"{name}= has no meaning for scheme='relaxation', whose pair are no two states in a row."
                )
    if is_one(blocks):
        if num_steps is None:
            raise ValueError("num_steps must say how often the block is applied.")
        return [blocks]
    if not (isinstance(blocks, (Sequence, nn.ModuleList)) and len(blocks) and all(map(callable, blocks))):
        raise TypeError(f"blocks must be callable as f(x), or a sequence of such, but they are {blocks!r}.")
    if num_steps not in (None, len(blocks)):
        raise ValueError(
            f"num_steps={num_steps!r} does not match {len(blocks)} blocks, each of which is applied once: leave it out."
        )
    return list(blocks)


def is_one(blocks: Any) -> bool:
    """Whether it is a block, not a sequence of them."""
    return callable(blocks) and not isinstance(blocks, nn.ModuleList)  # which torch makes callable


def _truncation(gradient: str | None, last_steps: int | None, outputs: Sequence[int]) -> tuple[int | None, str | None]:
    """How many last steps the gradient is taken of, None for all, and how."""
    check_choice("gradient", gradient or "reversible", (*GRADIENTS, *TRUNCATED))
    last = check_whole("last_steps", last_steps) or TRUNCATED.get(gradient or "")
    if gradient == "one_step" and last != 1:
        raise ValueError(
            f"last_steps={last_steps} is for gradient='truncated', and gradient is 'one_step': leave out one."
        )
    if last is not None and outputs[0] < outputs[-1] - last:
        raise ValueError(f"save_at asks for step {outputs[0]}, which is not one of the last {last} of {outputs[-1]}.")
    return last, None if gradient in TRUNCATED else gradient


def _scheme(scheme: str, momentum: float, beta: float, moving: bool, compiled: bool) -> Scheme:
    if scheme == "relaxation":
        return relaxation(beta)
    keep, gain = {"coupling": (-1.0, 1.0), "midpoint": (-1.0, 2.0), "momentum": (momentum, 1.0 - momentum)}[scheme]
    if scheme != "midpoint" or moving:
        return two_step(scheme, keep, gain, first_gain=gain)
    if compiled:  # all steps are alike: from v = f(y), which costs an evaluation more, 2 f(y) - v is f(y) as well
        return starting_from(OneEvaluation(0.0), two_step(scheme, keep, gain, first_gain=gain))
    return two_step(scheme, keep, gain, first_gain=1.0)


def _spacing(
    scheme: str, momentum: float, beta: float, pair: torch.dtype, computed: torch.dtype, value: torch.dtype
) -> int:
    """How many steps may be undone from one stored pair to the one before."""
    if scheme == "relaxation":
        return anchor_spacing(beta, pair, computed, value)
    factor = momentum**2 if scheme == "momentum" else 1.0  # squared, as for a relaxation, where states decay
    return min(LONGEST, steps_undone(factor * math.exp(-GROWTH), pair, computed))
