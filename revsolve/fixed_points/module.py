"""`RevDEQ` and `RevLoop`: reversible equilibria and loops as layers, whose keywords are those of their doors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from revsolve.fixed_points.loop import is_one, reversible_loop
from revsolve.fixed_points.solve import FixedPoint, fixed_point
from revsolve.schemes.names import did_you_mean

# Where a learnable beta may lie: on its side of 1, and so far from it that a step undone costs little more than one digit.
BELOW, ABOVE = (0.05, 0.95), (1.05, 1.95)
PROGRAMS = {"compile": "programs"}  # the attribute, for a module's `compile` is a method


def keywords(door: Callable[..., Any], *own: str) -> dict[str, Any]:
    """Those of a door that a layer takes as well, with their defaults, but for its `own`."""
    parameters = inspect.signature(door).parameters.values()
    own = (*own, "args", "full_output")
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in own}


class Layer(nn.Module):
    """A door as a layer, which keeps the door's keywords as attributes and the latest result as `last`."""

    def __init__(self, defaults: dict[str, Any], given: dict[str, Any]) -> None:
        super().__init__()
        for name in given.keys() - defaults.keys():
            raise TypeError(f"{type(self).__name__} has no keyword {name!r}{did_you_mean(name, defaults, cutoff=0.0)}")
        self.passed_on = {name: PROGRAMS.get(name, name) for name in defaults}
        for name, value in {**defaults, **given}.items():
            setattr(self, self.passed_on[name], value)
        self.shown = tuple(given)
        self.last: FixedPoint | None = None

    def solve(self, door: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
        """The state that the door gives."""
        options = {name: getattr(self, attribute) for name, attribute in self.passed_on.items()}
        solution = door(*inputs, full_output=True, **{**options, **more})
        self.last = replace(solution, z=tree_map(torch.Tensor.detach, solution.z))
        return solution.z


class RevDEQ(Layer):
    """A layer whose output is the fixed point `z = f(z, x, *args)`, with exact gradients from a reversible iteration.

    McCallum, Arora & Foster (2025, arXiv 2509.12917). The same in eval mode, gradients included, but for the number of steps.

    Args:
        f: a module or function `f(z, x, *args)`, whose value is shaped like z.
        beta: as in `fixed_point`.
        learn_beta: make beta a parameter, kept by a sigmoid within (0.05, 0.95), or (1.05, 1.95) if it starts above 1.
        eval_max_steps: the most steps in eval mode; by default those of training, unless these are drawn by a function.
        init: makes the initial z from x, where that is neither zero nor shaped like x.
        options: the other keywords of `fixed_point`, such as tol, max_steps (tol=0 and few steps is a weight-tied network rather
            than an equilibrium), gradient or compile.

    Attributes:
        last: the `FixedPoint` of the latest call, its z detached: statistics, and a warm start for the next call.

    Raises:
        TypeError: for an unknown keyword.

    Example:
        >>> import torch
        >>> from revsolve import RevDEQ
        >>> _ = torch.manual_seed(0)
        >>> layer = torch.nn.Linear(3, 3)
        >>> deq = RevDEQ(lambda z, x: torch.tanh(0.5 * layer(z) + x))
        >>> deq(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        f: Callable[..., Any],
        *,
        beta: Any = 0.8,
        learn_beta: bool = False,
        eval_max_steps: int | None = None,
        init: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(keywords(fixed_point, "beta"), options)
        if callable(self.max_steps) and eval_max_steps is None:
            raise ValueError(
                "eval_max_steps must be a number where max_steps is a function, which may draw another one in every call: say "
                "how many steps eval mode may make."
            )
        self.f, self.init, self.eval_max_steps = f, init, eval_max_steps
        self.learnable, self.fixed_beta = Bounded(beta) if learn_beta else None, beta

    @property
    def beta(self) -> Any:
        return self.fixed_beta if self.learnable is None else self.learnable()

    def forward(self, x: Any, *args: Any, z0: Any = None) -> Any:
        """z like z0, which is by default `init(x)`, or zeros of the shape of x; with `save_at` states stacked in front.

        Raises:
            RuntimeError: the iteration diverges, or does not converge with on_failure="raise".
        """
        like_x = z0 is None and self.init is None
        if z0 is None:
            z0 = tree_map(torch.zeros_like, x) if self.init is None else self.init(x)
        more = {} if self.training or self.eval_max_steps is None else {"max_steps": self.eval_max_steps}
        try:
            return self.solve(fixed_point, self.f, z0, args=(x, *args), beta=self.beta, **more)
        except (RuntimeError, ValueError) as error:
            if like_x and re.search("shape|size|channels", str(error)):
                raise type(error)(
                    f"{error} (z starts as zeros shaped like x; if it has another shape, pass init=.)"
                ) from error
            raise

    def extra_repr(self) -> str:
        return f"beta={self.beta}, tol={self.tol}, max_steps={self.max_steps}, method={self.method!r}"


class Bounded(nn.Module):
    """A learnable beta that cannot leave its range: low + (high - low) sigmoid(raw)."""

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        start = torch.as_tensor(beta, dtype=None if isinstance(beta, Tensor) else torch.get_default_dtype()).detach()
        self.low, self.high = BELOW if bool((start < 1.0).all()) else ABOVE
        if not bool(((start > self.low) & (start < self.high)).all()):
            raise ValueError(
                f"a learnable beta must start within {BELOW} or {ABOVE}, on one side of 1, but it is {beta}."
            )
        self.raw = nn.Parameter(torch.logit((start - self.low) / (self.high - self.low)))

    def forward(self) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(self.raw)


class RevLoop(Layer):
    """A layer that applies one block many times, or a list of blocks once each, and keeps no more for many than for few.

    See `reversible_loop`, whose keywords it takes, among them the `scheme`: leapfrog (Chang et al. 2018), the coupling of a
    RevNet (Gomez et al. 2017), momentum (Sander et al. 2021) or relaxation.

    Args:
        blocks: a module or function `f(x, *args)`, or a sequence of these.
        num_steps: how often one block is applied; a call may say otherwise.
        options: the other keywords of `reversible_loop`.

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
        super().__init__(keywords(reversible_loop), {"num_steps": num_steps, **options})
        several = not is_one(blocks) and all(isinstance(block, nn.Module) for block in blocks)
        self.blocks = nn.ModuleList(blocks) if several else blocks

    def forward(self, x: Any, *args: Any, num_steps: int | None = None) -> Any:
        """The state after all steps, like x; with `save_at` those asked for, stacked in front."""
        steps: Any = self.num_steps if num_steps is None else num_steps
        return self.solve(reversible_loop, self.blocks, x, args=args, num_steps=steps)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, self.passed_on[name])!r}" for name in self.shown)
