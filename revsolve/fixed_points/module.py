"""`RevDEQ`: a reversible deep equilibrium as a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from revsolve.extras.progress import AcceptedStep
from revsolve.fixed_points.solve import FixedPoint, fixed_point

# Where a learnable beta may lie: on its side of 1, and so far from it that a step undone costs little more than one digit.
BELOW, ABOVE = (0.05, 0.95), (1.05, 1.95)
PASSED_ON = (
    *("method", "tol", "min_steps", "residual", "stop", "gradient", "pair_dtype", "anchor_every", "noise", "save_at"),
    *("options", "on_failure", "progress", "callback"),
)


class RevDEQ(nn.Module):
    """A layer whose output is the fixed point `z = f(z, x, *args)`, with exact gradients from a reversible iteration.

    McCallum, Arora & Foster (2025, arXiv 2509.12917). The same in eval mode, gradients included, but for the number of steps.

    Args:
        f: a module or function `f(z, x, *args)`, whose value is shaped like z.
        beta: as in `fixed_point`.
        learn_beta: make beta a parameter, kept by a sigmoid within (0.05, 0.95), or (1.05, 1.95) if it starts above 1.
        tol, max_steps: as in `fixed_point`; tol=0 and few steps is a weight-tied network rather than an equilibrium.
        eval_max_steps: the most steps in eval mode; by default those of training, unless these are drawn by a function.
        init: makes the initial z from x, where that is neither zero nor shaped like x.
        min_steps, residual, stop, method, gradient, pair_dtype: as in `fixed_point`.
        anchor_every, noise, save_at, options, on_failure, progress, callback, compile: as in `fixed_point`.

    Attributes:
        last: the `FixedPoint` of the latest call, its z detached: statistics, and a warm start for the next call.

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
        tol: float = 1e-3,
        max_steps: int | Callable[[], int] = 50,
        eval_max_steps: int | None = None,
        min_steps: int = 1,
        init: Callable[[Any], Any] | None = None,
        residual: str = "relative",
        stop: str = "batch",
        method: str = "reversible",
        gradient: str | None = None,
        pair_dtype: torch.dtype | None = None,
        anchor_every: int | None = None,
        noise: str = "solve",
        save_at: int | Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,
        on_failure: str = "warn",
        progress: bool = False,
        callback: Callable[[AcceptedStep], Any] | None = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002
    ) -> None:
        super().__init__()
        if callable(max_steps) and eval_max_steps is None:
            raise ValueError(
                "eval_max_steps must be a number where max_steps is a function, which may draw another one in every call: say "
                "how many steps eval mode may make."
            )
        self.f, self.init = f, init
        self.learnable = Bounded(beta) if learn_beta else None
        self.fixed_beta = beta
        self.max_steps, self.eval_max_steps, self.tol, self.min_steps = max_steps, eval_max_steps, tol, min_steps
        self.residual, self.stop, self.on_failure = residual, stop, on_failure
        self.method, self.gradient, self.options = method, gradient, options
        self.pair_dtype, self.anchor_every = pair_dtype, anchor_every
        self.noise, self.save_at = noise, save_at
        self.progress, self.callback = progress, callback
        self.programs = compile  # a module's `compile` is a method
        self.last: FixedPoint | None = None

    @property
    def beta(self) -> Any:
        return self.fixed_beta if self.learnable is None else self.learnable()

    def forward(self, x: Any, *args: Any, z0: Any = None) -> Any:
        """z like z0, which is by default `init(x)`, or zeros of the shape of x; with `save_at` states stacked in front.

        Raises:
            RuntimeError: the iteration diverges, or does not converge with on_failure="raise".
        """
        if z0 is None:
            z0 = tree_map(torch.zeros_like, x) if self.init is None else self.init(x)
        more = not self.training and self.eval_max_steps is not None
        solution = fixed_point(
            self.f,
            z0,
            args=(x, *args),
            beta=self.beta,
            max_steps=self.eval_max_steps if more else self.max_steps,  # type: ignore[arg-type]
            full_output=True,
            compile=self.programs,
            **{name: getattr(self, name) for name in PASSED_ON},
        )
        self.last = replace(solution, z=tree_map(torch.Tensor.detach, solution.z))
        return solution.z

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
