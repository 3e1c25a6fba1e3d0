"""The control of a term (noise, a path) as a table for programs, which know no numbers to ask for it with."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from revsolve.backends import TensorControl
from revsolve.core.arithmetic import Time, moment
from revsolve.core.coupling import CouplingUpdate, Scheme
from revsolve.core.stepper import Grid
from revsolve.core.tape import Term, Wrapped


class Tabulated(Wrapped):
    """A term whose controls are rows of a table, one for every step, `most` at a time.

    A row has an entry for every evaluation in a step, in the order in which the increments ask; behind these, the first row has
    those of a restart.
    """

    def __init__(self, term: Term, source: TensorControl, scheme: Scheme, grid: Grid, most: int) -> None:
        super().__init__(term)
        self.value = term.value
        del self.control  # so that it is the method
        self.source, self.times, self.most = source, grid.times, most
        self.updates = [u for u in (*scheme.updates, *scheme.restart) if u.increment is not None]
        self.nodes = [[(c, u.start, u.end) for c in u.increment.nodes] for u in self.updates if u.increment]
        self.in_steps = sum(len(u.increment.nodes) for u in scheme.updates if u.increment)
        self.first = self._at(0, *self.nodes[0][0])
        self.rewind()

    def _at(self, n: int, node: float, start: float, end: float) -> Tensor:
        t0, t1 = (moment(self.times[n], self.times[n + 1], place) for place in (start, end))
        return self.source.at(moment(t0, t1, node), t0, t1)  # type: ignore[arg-type]

    def table(self, start: int, stop: int) -> Tensor:
        """The controls in the steps start..stop, and zeros: (most + 1, evaluations, ...)."""
        nodes = [node for update in self.nodes for node in update]
        rows = self.first.new_zeros(self.most + 1, len(nodes), *self.first.shape)
        for n, row in zip(range(start, stop), rows, strict=False):
            for place, entry in zip(nodes if n == start else nodes[: self.in_steps], row, strict=False):
                entry.copy_(self._at(n, *place))
        return rows

    def turn_to(self, update: CouplingUpdate, row: Tensor) -> None:
        """Answer with the entries of this update from now on."""
        if update.increment is not None:
            place = self.updates.index(update)
            self.queue: Iterator[Tensor] = iter(row[sum(map(len, self.nodes[:place])) :].unbind())

    def rewind(self) -> None:
        """Answer with the first entry from now on."""
        self.queue = repeat(self.first)

    def control(self, t: Time, t0: Time, t1: Time) -> Any:
        return self.source.control(next(self.queue), t0, t1)


class Untabulated(Wrapped):
    """In the place of a `Tabulated` term where nothing but time drives it: a table of nothing."""

    first, most, nothing = torch.zeros(0, device="cpu"), 0, torch.zeros(1, device="cpu")

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self.value = term.value

    def table(self, start: int, stop: int) -> Tensor:
        return self.nothing

    def turn_to(self, update: CouplingUpdate, row: Tensor) -> None:
        pass

    def rewind(self) -> None:
        pass
