"""The time of each sample, and adaptive steps of each sample's own length.

All samples go through a step together, each as far as its own error allows. An attempt in which every sample's error is small
enough is accepted; else it is made again, with shorter steps where the error was too large. A sample that has reached its next
output time waits there, with steps of length zero, until the others have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time, widest
from revsolve.core.coupling import State
from revsolve.core.stepper import Grid, Step, Stepper
from revsolve.field.functorch import batching
from revsolve.prepare.options import SolverOptions
from revsolve.steppers.adaptive import SHORTEST, STRETCH, Adaptive, ErrorControl, Recording


class BatchedTime:
    """The time of each sample, a vector for the field, and how much of it passes, shaped to multiply values like `x0`.

    t: (T, batch), any device; x0: (batch, ...). Steps are counted from output to output; or, where `fractions` are given, one by
    one: step n then leads every sample from one fraction of the way between the outputs i and i + 1 to another, (i, start, end).
    """

    shift, additive = None, False

    def __init__(self, t: Tensor, x0: Tensor) -> None:
        self.t, self.dtype = t.to(x0.device, widest(x0.device)), x0.real.dtype
        self.shape = (-1, *(1,) * (x0.ndim - 1))
        self.fractions: list[tuple[int, Tensor, Tensor]] | None = None

    def __call__(self, s: Time) -> Tensor:
        return self.exact(s).to(self.dtype)

    def exact(self, s: Time) -> Tensor:
        """The times in the dtype with the most digits, (batch,)."""
        i, part = self._whole_steps(s := float(s))
        if self.fractions is None:
            return torch.lerp(self.t[i], self.t[i + 1], part)
        i, start, end = self.fractions[i]
        return torch.lerp(self.t[i], self.t[i + 1], torch.lerp(start, end, part))

    def _whole_steps(self, s: float) -> tuple[int, float]:
        last = len(self.t) - 2 if self.fractions is None else len(self.fractions) - 1
        n = min(max(math.floor(s), 0), last)
        return n, s - n

    @property
    def fastest(self) -> float:
        """The largest rate of any sample's time."""
        return float(self.t.detach().diff(dim=0).abs().max()) or 1.0 if len(self.t) > 1 else 1.0

    def control(self, s: Time, s0: Time, s1: Time) -> Tensor:
        """How much time passes."""
        return self.rate(s0, s1) * (s1 - s0)

    def rate(self, s0: Time, s1: Time) -> Tensor:
        """The speed of time between s0 and s1, which lie between two outputs."""
        i, _ = self._whole_steps(float(0.5 * (s0 + s1)))
        if self.fractions is None:
            speed = self.t[i + 1] - self.t[i]
        else:
            i, start, end = self.fractions[i]
            speed = (self.t[i + 1] - self.t[i]) * (end - start)
        return speed.to(self.dtype).view(self.shape)


def check_per_sample_steps(options: SolverOptions, discontinuities: Sequence[float]) -> None:
    """Raise where samples are to have steps of their own, but cannot."""
    if not options.steps_of_each:
        return
    why = None if options.adaptive else "steps are fixed here"
    why = "samples of samples have none inside torch.vmap" if batching() else why
    why = "option 'norm' measures all samples together" if options.norm is not None else why
    why = "steps land on the kinks of the path, which lie elsewhere for every sample" if discontinuities else why
    if why is not None:
        raise ValueError(f"steps_of_each gives every sample adaptive steps of its own, but {why}: leave it out.")


def per_sample_steps(clock: BatchedTime, make_shared: Callable[[], Stepper]) -> Callable[[], Stepper]:
    """Steppers with the tolerances and limits of shared ones."""

    def make() -> Stepper:
        clock.fractions = None  # the first step is guessed for all samples
        shared = make_shared()
        assert isinstance(shared, Adaptive)
        return PerSampleSteps(clock, shared.control)

    return make


class PerSampleSteps(Recording):
    """Steps numbered 0, 1, 2, ...; the clock knows how far each of them takes every sample."""

    def __init__(self, clock: BatchedTime, control: ErrorControl) -> None:
        self.clock = clock
        self.control: ErrorControl = control
        self.fractions: list[Any] = []
        self.grid = Grid([0.0], [0])
        self.spans = clock.t.detach().to("cpu", torch.float64).diff(dim=0).abs()  # (T - 1, batch)
        self.previous = torch.ones_like(self.spans[0])
        self.h = 0.0 * self.previous  # those of the first step are found when it is taken
        self.done = False

    def advance(self, step: Step, pair: State, restart: bool, limit: int) -> State:
        n = self.num_steps
        i, start = self._place()
        span, grow = self.spans[i], torch.full_like(start, self.control.grow)
        if n == 0:
            self.h = self.control.first_step(step.memo, pair[0]) * self.spans.amax(0)
            self.clock.fractions = self.fractions  # from now on
        while True:
            self._check_progress(i, start)
            end = torch.where(span * (1 - start) <= self.h * STRETCH, 1.0, start + self.h / span)
            self.fractions[n:] = [(i, start.to(self.clock.t), end.to(self.clock.t))]
            after, ratio = step(pair, (float(n), float(n + 1)), restart, self._ratios)
            assert ratio is not None
            length = (end - start) * span
            factor, good = self._factors(ratio, grow), ratio <= 1.0
            if bool(good.all()):
                self._accept(i, end, length * factor, ratio)
                return after
            step.forget_attempt()
            self.num_rejected += 1
            self.h = torch.where(good, self.h, length * factor.clamp(max=0.9))
            grow = torch.where(good, grow, 1.0)

    def _place(self) -> tuple[int, Tensor]:
        """Between which outputs the samples are, and how far each has come."""
        if not self.fractions:
            return 0, torch.zeros_like(self.h)
        i, _, end = self.fractions[-1]
        return (i + 1, torch.zeros_like(self.h)) if bool((end == 1).all()) else (i, end.cpu())

    def _accept(self, i: int, end: Tensor, h: Tensor, ratio: Tensor) -> None:
        moved, landed = h > 0, end == 1
        self.h = torch.where(moved, torch.where(landed, h.maximum(self.h), h), self.h)
        self.previous = torch.where(moved, ratio.clamp(min=1e-4), self.previous)
        self.grid.times.append(float(self.num_steps + 1))
        if bool(landed.all()):
            self.grid.outputs.append(self.num_steps)
            self.done = i + 1 == len(self.spans)

    def _ratios(self, error: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
        """The error of each sample, relative to what it may be."""
        size = y0.detach().abs().maximum(y1.detach().abs())
        scaled = (error / self.control.tolerance(size)).reshape(len(error), -1)
        return torch.linalg.vector_norm(scaled, dim=1).to("cpu", torch.float64) / scaled.shape[1] ** 0.5

    def _factors(self, ratio: Tensor, grow: Tensor) -> Tensor:
        wanted = torch.where(ratio.isfinite(), self.control.factor(ratio, self.previous), 0.0)
        return wanted.clamp(min=self.control.shrink).minimum(grow)

    def _check_progress(self, i: int, start: Tensor) -> None:
        c, t = self.control, self.clock.t.detach().to("cpu", torch.float64)[i : i + 2].abs().amax(0)
        told = (
            f"after {self.num_steps} steps and {self.num_rejected} rejected ones, between the outputs {i} and {i + 1}"
        )
        if self.num_steps + self.num_rejected >= c.max_num_steps:
            raise RuntimeError(
                f"max_num_steps = {c.max_num_steps} was reached {told}: raise it, or loosen rtol and atol; if that does not "
                "help, see docs: Stiff problems."
            )
        short = (start < 1) & (self.h < SHORTEST * torch.finfo(torch.float64).eps * t) & (self.spans[i] > 0)
        if bool(short.any()):
            raise RuntimeError(
                f"the step size of sample {int(short.nonzero()[0])} fell below rounding {told}: its field has a singularity, is "
                "discontinuous, not finite or stiff there, or the tolerances are too tight."
            )
