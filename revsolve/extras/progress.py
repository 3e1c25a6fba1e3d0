"""Watching a solve: a progress bar and a callback around its stepper. Neither the march nor the stepper knows of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from revsolve.core.coupling import State
from revsolve.core.stepper import Step, Stepper
from revsolve.prepare.problem import InitialValueProblem

OVER_TIME = "{desc}: {percentage:3.0f}%|{bar}| {n:.4g}/{total:.4g} [{elapsed}<{remaining}{postfix}]"
OPEN_ENDED = "{desc}: {n:.4g} [{elapsed}{postfix}]"


@dataclass(frozen=True)
class AcceptedStep:
    """What a callback is told after each accepted step of the forward pass.

    Attributes:
        number: steps accepted so far.
        t: the time reached, in the unit of the field; for fixed points the number of the step.
        h: the length of the step, negative backwards in time.
        y: the state there, shaped like y0; detached.
        num_rejected: steps rejected so far.
    """

    number: int
    t: float
    h: float
    y: Any
    num_rejected: int


class Watched:
    """A stepper whose accepted steps are shown by a bar and told to a callback.

    The bar counts steps where their number is known, else the time that they cover.
    """

    def __init__(self, stepper: Stepper, bar: tqdm[Any] | None, tell: Callable[[AcceptedStep], Any] | None) -> None:
        self.stepper, self.bar, self.tell = stepper, bar, tell
        self.grid, self.num_total, self.tolerance = stepper.grid, stepper.num_total, stepper.tolerance

    @property
    def num_steps(self) -> int:
        return self.stepper.num_steps

    @property
    def num_rejected(self) -> int:
        return self.stepper.num_rejected

    @property
    def done(self) -> bool:
        done = self.stepper.done
        if done and self.bar is not None:
            self.bar.close()
        return done

    def advance(self, step: Step, pair: State, restart: bool, limit: int) -> State:
        try:
            pair = self.stepper.advance(step, pair, restart, limit if self.tell is None else self.num_steps + 1)
            self._report(pair[0])
        except BaseException:
            if self.bar is not None:
                self.bar.close()
            raise
        return pair

    def _report(self, y: Tensor) -> None:
        n, times = self.num_steps, self.grid.times
        t, h = times[n], times[n] - times[max(n - 1, 0)]
        if self.bar is not None:
            self.bar.set_postfix_str(f"t={t:.4g}, h={h:.2g}", refresh=False)
            self.bar.update((abs(t - times[0]) if self.num_total is None else n) - self.bar.n)
        if self.tell is not None:
            self.tell(AcceptedStep(n, t, h, y.detach(), self.num_rejected))


def watched_steps(make: Callable[[], Stepper], ivp: InitialValueProblem, length: float | None) -> Callable[[], Stepper]:
    """Steppers watched as the options of an initial value problem ask for it."""
    options = ivp.options
    name = f"{ivp.name} {options.scheme.name}"
    return watched(make, options.progress, options.callback, name, length, ivp.packing.unpack)


def watched(
    make: Callable[[], Stepper],
    progress: bool,
    callback: Callable[[AcceptedStep], Any] | None,
    name: str = "solve",
    length: float | None = None,
    unpack: Callable[[Tensor], Any] = lambda x: x,
) -> Callable[[], Stepper]:
    """Steppers as `make` makes them, with a bar where progress is wanted (`length` is the time to cover, None if not
    known), and a callback that sees states as `unpack` gives them.

    Raises:
        TypeError: the callback is not callable.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable with one AcceptedStep, but it is {callback!r}.")
    if not progress and callback is None:
        return make
    tell = None if callback is None else lambda step: callback(replace(step, y=unpack(step.y)))

    def made() -> Stepper:
        stepper, bar = make(), None
        if progress:
            look = None if stepper.num_total is not None else OPEN_ENDED if length is None else OVER_TIME
            bar = tqdm(total=stepper.num_total or length, desc=name, unit="step", bar_format=look)
        return Watched(stepper, bar, tell)

    return made
