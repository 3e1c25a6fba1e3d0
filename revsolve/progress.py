"""A progress bar around a stepper; neither the march nor the stepper knows of it."""

from __future__ import annotations

from collections.abc import Callable

from tqdm.auto import tqdm

from revsolve.core.coupling import Pair
from revsolve.core.stepper import Step, Stepper


class Shown:
    """A stepper whose accepted steps move a bar: counted where their number is known, else by the time they cover."""

    def __init__(self, stepper: Stepper, name: str, length: float) -> None:
        self.stepper, self.grid, self.num_total = stepper, stepper.grid, stepper.num_total
        self.tolerance = stepper.tolerance
        total = length if stepper.num_total is None else stepper.num_total
        self.bar = tqdm(total=total, desc=name, unit="step" if stepper.num_total is not None else "time")

    @property
    def num_steps(self) -> int:
        return self.stepper.num_steps

    @property
    def num_rejected(self) -> int:
        return self.stepper.num_rejected

    @num_rejected.setter
    def num_rejected(self, number: int) -> None:
        self.stepper.num_rejected = number

    @property
    def done(self) -> bool:
        done = self.stepper.done
        if done:
            self.bar.close()
        return done

    def advance(self, step: Step, pair: Pair, restart: bool) -> Pair:
        pair = self.stepper.advance(step, pair, restart)
        self._move()
        return pair

    def rewind(self, num_steps: int) -> None:
        self.stepper.rewind(num_steps)
        self._move()

    def _move(self) -> None:
        times = self.grid.times
        reached = self.num_steps if self.num_total is not None else abs(times[-1] - times[0])
        self.bar.update(reached - self.bar.n)


def shown(make: Callable[[], Stepper], name: str, length: float) -> Callable[[], Stepper]:
    """Steppers as `make` makes them, with a bar; `length` is the time to cover."""
    return lambda: Shown(make(), name, length)
