"""Loops that are no equilibria: a block applied many times, or many blocks one after the other, as updates that can be undone.

    coupling    v = f(y) - v;    y = y + v    the two streams of a RevNet (Gomez et al. 2017): y_{n+1} = y_{n-1} + f(y_n)
    midpoint    v = 2 f(y) - v;  y = y + v    leapfrog (Chang et al. 2018): y_{n+1} = y_{n-1} + 2 f(y_n)
    momentum    v = m v + (1 - m) f(y);  y = y + v    momentum residual networks (Sander et al. 2021)
    relaxation  z = (1 - b) z + b f(y);  y = (1 - b) y + b f(z)    that of `fixed_point`, two evaluations a step

v is y_n - y_{n-1}. A midpoint loop begins with a plain residual step, y_1 = y_0 + f(y_0), the others with v = 0.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from revsolve.core.coupling import Scheme
from revsolve.core.stepper import FixedGrid
from revsolve.fixed_points.arguments import check_whole, output_steps
from revsolve.fixed_points.iteration import Iteration
from revsolve.fixed_points.precision import anchor_spacing, pair_dtype_of, steps_undone
from revsolve.fixed_points.solve import FixedPoint
from revsolve.fixed_points.term import ValueTerm, applied
from revsolve.prepare.options import check_choice
from revsolve.prepare.state import Packing
from revsolve.schemes.reversible import relaxation, two_step

SCHEMES = ("coupling", "midpoint", "momentum", "relaxation")
LONGEST = 32  # steps from one stored pair to the next
GROWTH = 0.2  # by which rounding is taken to grow in a step undone, as a logarithm, because of the blocks themselves
BEFORE = -1  # the step for which the term is asked for v at the start


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
    full_output: bool = False,
) -> Any:
    """The state after num_steps applications of one block, or one of each of a list of blocks, by steps that can be undone.

    With f the block of a step, v = y_n - y_{n-1} and the steps of the `scheme`:

        coupling    y_{n+1} = y_{n-1} + f(y_n)      two streams (RevNet: Gomez et al. 2017, arXiv 1707.04585)
        midpoint    y_{n+1} = y_{n-1} + 2 f(y_n)    leapfrog, from y_1 = y_0 + f(y_0) (Chang et al. 2018, arXiv 1709.03698)
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
        gradient: "reversible" (the default), "checkpoint" or "direct", as in `fixed_point`.
        last_steps: take the gradient of so many last steps only, and let those before count as constant.
        noise: "step", what blocks draw at random is drawn anew in every step, or "solve", once; replayed when steps are undone.
        save_at: return the states after these steps, stacked in front; a number k stands for every k-th step and the last one.
        pair_dtype: what the pair is kept in; by default float64, and float32 on devices without it.
        anchor_every: keep the pair after so many steps; by default 32, or fewer where the dtypes, momentum or beta ask for it.
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
    num_steps = _checked(blocks, scheme, num_steps, momentum, residual, previous, last_steps)
    check_choice("noise", noise, ("step", "solve"))
    packing, outputs = Packing(x, "x"), output_steps(save_at, num_steps)
    wide = pair_dtype_of(packing, pair_dtype)
    arguments = args if isinstance(args, tuple) else (args,)
    each: Sequence[Any] = [blocks] * num_steps if _is_one(blocks) else blocks  # type: ignore[assignment]
    calls = [applied(f, arguments, num_steps - 1) for f in each]

    def run(x: Any, previous: Any, first: int, outputs: list[int]) -> FixedPoint:
        x0 = packing.pack(x)
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        value = functools.partial(_value, calls[first:], residual, first, previous)
        term = ValueTerm(value, packing, x0.dtype, noise == "solve", "a block")
        iteration = Iteration(
            _scheme(scheme, momentum, beta, previous is not None),
            gradient,
            wide,
            check_whole("anchor_every", anchor_every),
            spacing=functools.partial(_spacing, scheme, momentum, beta),
            explain=lambda t, y: (
                f"the state is not finite after step {int(t) + first}: make what the blocks add smaller."
            ),
        )
        grid = [float(n) for n in range(outputs[-1] + 1)]
        ys, stats = iteration.solve(term, x0, lambda: FixedGrid(grid, outputs), (blocks, arguments, previous))
        return FixedPoint(term.unpack(ys), stats.num_steps, None, None, None, stats)

    first = 0 if last_steps is None else max(0, outputs[-1] - last_steps)
    if outputs[0] < first:
        raise ValueError(
            f"save_at asks for step {outputs[0]}, which is not one of the last {last_steps} of {outputs[-1]}."
        )
    if first > 0:
        with torch.no_grad():
            both = run(x, previous, 0, [first - 1, first]).z
        previous, x = (tree_map(lambda states, i=i: states[i], both) for i in (0, 1))
    result = run(x, previous, first, [n - first for n in outputs])
    if save_at is None:
        result = replace(result, z=tree_map(lambda states: states[-1], result.z))
    return result if full_output else result.z


def _checked(
    blocks: Any,
    scheme: str,
    num_steps: int | None,
    momentum: float,
    residual: bool,
    previous: Any,
    last_steps: int | None,
) -> int:
    """The number of steps."""
    check_choice("scheme", scheme, SCHEMES)
    if not _is_one(blocks):
        if not (isinstance(blocks, (Sequence, nn.ModuleList)) and len(blocks) and all(map(callable, blocks))):
            raise TypeError(f"blocks must be callable as f(x), or a sequence of such, but they are {blocks!r}.")
        if num_steps not in (None, len(blocks)):
            raise ValueError(
                f"num_steps={num_steps!r} does not match {len(blocks)} blocks, each of which is applied once: leave it out."
            )
        num_steps = len(blocks)
    elif num_steps is None:
        raise ValueError("num_steps must say how often the block is applied.")
    check_whole("num_steps", num_steps)
    check_whole("last_steps", last_steps)
    if scheme == "momentum" and not 0.0 < momentum < 1.0:
        raise ValueError(f"momentum must lie in (0, 1), but it is {momentum!r}: 0.9 is usual.")
    if scheme == "relaxation":
        for name, value in {"residual": residual or None, "previous": previous, "last_steps": last_steps}.items():
            if value is not None:
                raise ValueError(
                    f"{name}= has no meaning for scheme='relaxation', whose pair are no two states in a row."
                )
    return num_steps


def _is_one(blocks: Any) -> bool:
    return callable(blocks) and not isinstance(blocks, nn.ModuleList)  # which torch makes callable


def _value(
    calls: Sequence[Callable[[Any, int], Any]], residual: bool, first: int, previous: Any, x: Any, n: int
) -> Any:
    if n == BEFORE:
        return tree_map(torch.sub, x, previous)
    out = calls[min(n, len(calls) - 1)](x, n + first)  # a field is also asked at the end of the last step
    return tree_map(torch.sub, out, x) if residual else out


def _scheme(scheme: str, momentum: float, beta: float, moving: bool) -> Scheme:
    if scheme == "relaxation":
        return relaxation(beta, by_step=True)
    keep, gain = {"coupling": (-1.0, 1.0), "midpoint": (-1.0, 2.0), "momentum": (momentum, 1.0 - momentum)}[scheme]
    if moving:
        return two_step(scheme, keep, gain, gain, float(BEFORE))
    return two_step(scheme, keep, gain, 1.0 if scheme == "midpoint" else gain)


def _spacing(
    scheme: str, momentum: float, beta: float, pair: torch.dtype, computed: torch.dtype, value: torch.dtype
) -> int:
    """How many steps may be undone from one stored pair to the one before."""
    if scheme == "relaxation":
        return anchor_spacing(beta, pair, computed, value)
    factor = momentum**2 if scheme == "momentum" else 1.0  # squared, as for a relaxation, where states decay
    return min(LONGEST, steps_undone(factor * math.exp(-GROWTH), pair, computed))


class RevLoop(nn.Module):
    """A layer that applies one block many times, or a list of blocks once each, and keeps no more for many than for few.

    See `reversible_loop`, whose keywords it takes, among them the `scheme`: leapfrog (Chang et al. 2018), the coupling of a
    RevNet (Gomez et al. 2017), momentum (Sander et al. 2021) or relaxation.

    Args:
        blocks: a module or function `f(x, *args)`, or a sequence of these.
        num_steps: how often one block is applied; a call may say otherwise.
        options: the keywords of `reversible_loop`.

    Attributes:
        last: the `FixedPoint` of the latest call, its z detached: the last state and statistics.

    Raises:
        ValueError, TypeError: in a call, for what `reversible_loop` refuses; here for an unknown keyword.

    Example:
        >>> import torch
        >>> from revsolve import RevLoop
        >>> loop = RevLoop([torch.nn.Linear(3, 3) for _ in range(6)], scheme="momentum", momentum=0.8)
        >>> loop(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, blocks: Any, num_steps: int | None = None, **options: Any) -> None:
        super().__init__()
        known = inspect.signature(reversible_loop).parameters
        for name in options:
            if name not in known or name in ("blocks", "x", "args", "num_steps", "full_output"):
                raise TypeError(f"RevLoop has no keyword {name!r}: it takes those of reversible_loop.")
        several = not _is_one(blocks) and all(isinstance(block, nn.Module) for block in blocks)
        self.blocks = nn.ModuleList(blocks) if several else blocks
        self.num_steps, self.options = num_steps, options
        self.last: FixedPoint | None = None

    def forward(self, x: Any, *args: Any, num_steps: int | None = None) -> Any:
        """The state after all steps, like x; with `save_at` those asked for, stacked in front."""
        steps = self.num_steps if num_steps is None else num_steps
        result = reversible_loop(self.blocks, x, args=args, num_steps=steps, full_output=True, **self.options)
        self.last = replace(result, z=tree_map(torch.Tensor.detach, result.z))
        return result.z

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {"num_steps": self.num_steps, **self.options}.items())
