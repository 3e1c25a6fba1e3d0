"""The control of a term (noise, a path) as a table for programs, which know no numbers to ask for it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time, moment
from revsolve.core.coupling import CouplingUpdate, Scheme
from revsolve.core.stepper import Grid
from revsolve.core.tape import Term, Wrapped


@dataclass(frozen=True)
class Source:
    """A control as one tensor: ask(t, t0, t1) is that of an evaluation at t over the span t0 -> t1, by number;
    answer(row, t0, t1) makes of such a tensor the control itself."""

    ask: Callable[[float, float, float], Tensor]
    answer: Callable[[Tensor, Time, Time], Any]


class Driven(Wrapped):
    """A term whose controls are rows of a table, one for every step, `most` at a time.

    A row has an entry for every evaluation in a step, in the order in which the increments ask; behind these, the first row has
    those of a restart.
    """

    def __init__(self, term: Term, source: Source, scheme: Scheme, grid: Grid, most: int) -> None:
        super().__init__(term)
        self.value = term.value
        del self.control  # so that it is the method
        self.source, self.times, self.most = source, grid.times, most
        self.updates = [u for u in (*scheme.updates, *scheme.restart) if u.increment is not None]
        self.asked = [(c, u.start, u.end) for u in self.updates if u.increment for c in u.increment.nodes]
        self.in_steps = sum(len(u.increment.nodes) for u in scheme.updates if u.increment)
        self.first = self._asked(0, *self.asked[0])
        self.queue: Iterator[Tensor] = repeat(self.first)

    def _asked(self, n: int, node: float, start: float, end: float) -> Tensor:
        t0, t1 = (moment(self.times[n], self.times[n + 1], place) for place in (start, end))
        return self.source.ask(moment(t0, t1, node), t0, t1)  # type: ignore[arg-type]

    def table(self, start: int, stop: int) -> Tensor:
        """The answers in the steps start..stop, and zeros: (most + 1, evaluations, ...)."""
        rows = self.first.new_zeros(self.most + 1, len(self.asked), *self.first.shape)
        for n, row in zip(range(start, stop), rows, strict=False):
            for place, entry in zip(self.asked if n == start else self.asked[: self.in_steps], row, strict=False):
                entry.copy_(self._asked(n, *place))
        return rows

    def turn(self, update: CouplingUpdate, row: Tensor) -> None:
        """Answer with the entries of this update from now on."""
        if update.increment is not None:
            counts = [len(u.increment.nodes) for u in self.updates if u.increment]
            place = self.updates.index(update)
            self.queue = iter(row[sum(counts[:place]) :].unbind())

    def rewind(self) -> None:
        """Answer with the first entry from now on."""
        self.queue = repeat(self.first)

    def control(self, t: Time, t0: Time, t1: Time) -> Any:
        return self.source.answer(next(self.queue), t0, t1)


class Undriven(Wrapped):
    """In the place of a `Driven` term where nothing but time drives it: a table of nothing."""

    first, most, nothing = torch.zeros(0, device="cpu"), 0, torch.zeros(1, device="cpu")

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self.value = term.value

    def table(self, start: int, stop: int) -> Tensor:
        return self.nothing

    def turn(self, update: CouplingUpdate, row: Tensor) -> None:
        pass

    def rewind(self) -> None:
        pass
