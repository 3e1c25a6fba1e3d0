"""When an iteration z <- f(z) has converged: residuals of the state or of every sample, and what to say if they stay large."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from revsolve.core.caller import warn
from revsolve.core.coupling import State
from revsolve.core.stepper import Grid, Step
from revsolve.field.functorch import batching, numbers, of_every_sample, outside
from revsolve.prepare.state import Packing
from revsolve.steppers.adaptive import Recording

RESIDUALS = ("absolute", "relative")
STOPS = ("batch", "all", "sample")
SMALLEST = 1e-5  # a value smaller than this counts as this large in the relative residual (as in the authors' code)
PATIENCE, SAME = 10, 1e-3  # so many steps in which the residual changes by less than this share are no convergence
DIVERGING = 1e3  # a residual that has grown so far above its least is no slow convergence


class ConvergenceWarning(UserWarning):
    """A fixed-point iteration stopped before its residual was small enough."""


@dataclass(frozen=True)
class Criterion:
    """Stop when the residual, `||z - f(z)||` or that over `1e-5 + ||f(z)||`, is at most tol: the largest of all leaves of the
    state and of all samples of a torch.vmap. Unless `stop` is "batch", every sample (leading dimension) has its own, and all
    must be small at once. With "sample", those whose residual is small rest until then; if one grows again, or the largest has
    stayed the same for `PATIENCE` steps, they depend on each other, and none rests any more."""

    tol: float
    max_steps: int
    min_steps: int = 1
    residual: str = "relative"
    stop: str = "batch"

    @property
    def per_sample(self) -> bool:
        return self.stop != "batch"

    @property
    def rests(self) -> bool:
        """Whether a sample may rest while others go on."""
        return self.stop == "sample" and self.tol > 0 and self.min_steps < self.max_steps

    def before(self, last_steps: int) -> Criterion:
        """The same for the steps before these, where a number of them is made."""
        return replace(self, max_steps=self.max_steps - last_steps) if self.tol == 0.0 else self


@dataclass
class Convergence:
    """The residuals of one iteration as it goes on, and which samples take part in each step."""

    criterion: Criterion
    packing: Packing
    bar: tqdm[Any] | None = None
    tell: Callable[[int, Tensor], Any] | None = None  # of y after n steps
    solving: str = "the fixed-point iteration"
    contracting: bool = True  # whether it needs f to contract
    trace: list[Tensor] = field(default_factory=list)  # one (2,) or (2, samples) a step: absolute, relative
    worst: list[float] = field(default_factory=list)  # the largest absolute ones
    num_steps: int = 0
    content: bool = False

    def __post_init__(self) -> None:
        stop = self.criterion.stop
        if self.criterion.per_sample and self.criterion.tol > 0 and batching():
            raise ValueError(
                f"stop={stop!r} is for the samples of one state, and each sample of torch.vmap is a state: leave it out, or "
                "solve all of them as one state, outside of torch.vmap."
            )
        if stop == "sample":
            with outside():
                self.all = torch.ones(self.packing.shapes[0][:1], dtype=torch.bool, device=self.packing.device)
            self.going = [self.all]  # the samples that take part in step 0, 1, ...
            self.coupled = ~self.all[0]

    def observe(self, n: int, y: Tensor, value: Tensor) -> bool:
        """Take note of y after n steps and the field's value there; whether the iteration may stop. One device read."""
        both = self.measure(y, value)
        absolute, relative = numbers(both.amax(1) if self.criterion.per_sample else both)
        residual = absolute if self.criterion.residual == "absolute" else relative
        self.num_steps = n
        self.trace.append(both)
        self.worst.append(absolute)
        if not math.isfinite(absolute + relative):
            raise RuntimeError(f"{self.solving} diverges: the residual is not finite after {n} steps. {self.hint()}")
        if self.bar is not None:
            self.bar.update(n - self.bar.n)
            self.bar.set_postfix_str(f"residual={residual:.1e}", refresh=False)
        if self.tell is not None:
            self.tell(n, y)
        self.content = residual <= self.criterion.tol
        enough = n >= self.criterion.min_steps
        if self.criterion.rests:
            large = self.latest() > self.criterion.tol
            self.coupled = self.coupled | (large & ~self.going[-1]).any() | self._stuck()
            self.going.append(large | self.coupled if enough else self.all)
        return self.content and enough

    def measure(self, y: Tensor, value: Tensor) -> Tensor:
        """Absolute and relative residual, shape (2,) or (2, samples)."""
        rows, dim = [], 0 if self.criterion.per_sample else -1
        with torch.no_grad():
            for a, b in zip(self._leaves(y), self._leaves(value), strict=True):
                gap, size = torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(b, dim=-1)
                relative = gap / (SMALLEST + size) + 0.0 * size  # NaN, not 0, where the norm of f overflows
                rows.append(torch.stack([gap, relative], dim))
            both = rows[0] if len(rows) == 1 else torch.stack(rows).amax(0)
            if self.criterion.per_sample:
                return both
            both = of_every_sample(both)  # (samples of every torch.vmap around, 2)
            return both if both.ndim == 1 else both.reshape(-1, 2).amax(0)

    def latest(self) -> Tensor:
        """The residual that decides, of the whole state () or of every sample (samples,)."""
        return self.trace[-1][RESIDUALS.index(self.criterion.residual)]

    def moves(self, n: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """1 for the entries of the packed state whose sample takes part in step n, 0 for those that rest."""
        after = self.content and n >= self.num_steps  # steps behind the iteration, which move all
        rested = n < len(self.going) and not after
        going = (self.going[n] if rested else self.all).to(dtype)
        if self.packing.lone:
            return going.view(-1, *(1 for _ in self.packing.shapes[0][1:]))
        return torch.cat([going.repeat_interleave(size // len(going)) for size in self.packing.sizes])

    def steps_taken(self, num_steps: int) -> int | Tensor:
        """All of them, or those in which each sample took part."""
        if self.criterion.stop != "sample":
            return num_steps
        if not self.criterion.rests:
            return self.all * num_steps
        return torch.stack(self.going[: self.num_steps]).sum(0) + (num_steps - self.num_steps)

    def conclude(self, on_failure: str) -> None:
        """Say that the iteration did not converge, if it did not."""
        if self.content or on_failure == "ignore" or not self.worst:
            return
        residual = float(self.latest().max())
        kind, tol = self.criterion.residual, self.criterion.tol
        text = f"after {self.num_steps} steps the {kind} residual is {residual:.2e}, not {tol:.2e}"
        if self.worst[-1] > DIVERGING * min(self.worst):
            raise RuntimeError(f"{self.solving} diverges: {text}. {self.hint()}")
        message = f"{self.solving} has not converged: {text}. Raise max_steps or tol, or change f. {self.hint()}"
        if on_failure == "raise":
            raise RuntimeError(message)
        warn(message, ConvergenceWarning)

    def lost(self, t: float, y: Tensor) -> str:
        """The message where the state stops being finite in step t."""
        return f"the iteration diverges: z is not finite after {int(t) + 1} steps. {self.hint()}"

    def hint(self) -> str:
        """How fast the residual grows or shrinks, and what that asks for."""
        if not self.contracting:
            return "the Jacobian of f must have no eigenvalue near 1, for where it has one there is no gradient."
        recent = [r for r in self.worst[-4:] if math.isfinite(r) and r > 0.0]
        rate = (recent[-1] / recent[0]) ** (1 / (len(recent) - 1)) if len(recent) > 1 else math.nan
        seen = "" if math.isnan(rate) else f" (in the last steps, each multiplied the residual by {rate:.3g})"
        return (
            f"f must contract: the spectral radius of its Jacobian must stay below 1{seen}. Normalise the weights of f "
            "(torch.nn.utils.parametrizations.weight_norm or spectral_norm), or scale down its last layer, or reduce beta."
            + (" Samples that depend on each other need stop='all'." if self.criterion.rests else "")
        )

    def _stuck(self) -> Tensor | bool:
        """Whether the largest residual has stayed the same, as where it depends on the pair of a sample that rests."""
        if len(self.trace) <= PATIENCE:
            return False
        then, now = (self.trace[i][RESIDUALS.index(self.criterion.residual)].amax() for i in (-1 - PATIENCE, -1))
        return (now - then).abs() <= SAME * then

    def _leaves(self, x: Tensor) -> list[Tensor]:
        parts = [x] if self.packing.lone else list(x.split(self.packing.sizes, dim=-1))
        if self.criterion.per_sample:
            return [part.reshape(self.packing.shapes[0][0], -1) for part in parts]
        if not self.packing.lone:
            return parts
        return [x.reshape(*x.shape[: x.ndim - len(self.packing.shapes[0])], -1)]


class UntilConverged(Recording):
    """The steps of an iteration, numbered 0, 1, 2, ...: until `observe` is content with y, or `max_steps` are done.

    `observe(n, y, value)` sees y after n steps and the field's value there, which is what the next step asks for first. Outputs
    are due at the end, and after every `every` steps.
    """

    done = False

    def __init__(
        self, max_steps: int, observe: Callable[[int, Tensor, Tensor], bool], every: int | None = None
    ) -> None:
        self.grid = Grid([0.0], [max_steps])
        self.max_steps, self.observe, self.every = max_steps, observe, every or max_steps

    def advance(self, step: Step, pair: State, restart: bool, limit: int) -> State:
        n, memo = self.num_steps + 1, step.memo
        t = float(n)
        pair, _ = step(pair, (t - 1.0, t), restart)
        self.grid.times.append(t)
        ahead, _ = memo.product(memo.value(t, pair[0]), memo.control(t, t, t))
        self.done = self.observe(n, pair[0], ahead) or n == self.max_steps
        if self.done:
            self.grid.outputs[-1] = n
        elif n % self.every == 0:
            self.grid.outputs.insert(-1, n)
        return pair
