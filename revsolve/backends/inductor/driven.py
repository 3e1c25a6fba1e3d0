"""What drives a term (noise, a path) as a table for programs, which know no numbers to ask it with."""

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


@dataclass(frozen=True)
class Source:
    """What drives a term: the attribute of this name, called with times.

    ask(t, t0, t1) is its answer, by number, to an evaluation at t for the span t0 -> t1, as one tensor; answer(row, t0, t1)
    makes of such a tensor what the attribute returns.
    """

    term: Any
    name: str
    ask: Callable[[float, float, float], Tensor]
    answer: Callable[[Tensor, Time, Time], Any] = lambda row, t0, t1: row


class Driver:
    """Stands for what drives a term in recordings: rows of a table, one for every step, `most` at a time.

    A row has an entry for every evaluation in a step, in the order in which the increments ask; behind these, the first row has
    those of a restart.
    """

    def __init__(self, source: Source, scheme: Scheme, grid: Grid, most: int) -> None:
        self.source, self.times, self.most = source, grid.times, most
        self.real = getattr(source.term, source.name)
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

    def __call__(self, *times: Time) -> Any:
        return self.source.answer(next(self.queue), *times[-2:])

    def __enter__(self) -> None:
        setattr(self.source.term, self.source.name, self)

    def __exit__(self, *error: object) -> None:
        setattr(self.source.term, self.source.name, self.real)
        self.queue = repeat(self.first)


class Undriven:
    """In the place of a `Driver` where nothing drives the term: a table of nothing."""

    first, most, nothing = torch.zeros(0, device="cpu"), 0, torch.zeros(1, device="cpu")

    def table(self, start: int, stop: int) -> Tensor:
        return self.nothing

    def turn(self, update: CouplingUpdate, row: Tensor) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass
