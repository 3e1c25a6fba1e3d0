"""Tables over the steps of a grid, which programs read by the number of a step: times, outputs due, and the control of a term
(noise, a path), for which they know no numbers to ask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from revsolve.backends import TensorControl
from revsolve.core.arithmetic import OneSided, Time, moment
from revsolve.core.coupling import CouplingUpdate, Scheme
from revsolve.core.stepper import Grid
from revsolve.core.tape import Term, Wrapped

# Arrays over steps have this length, or the next power of two: another number of steps finds the same program.
LEAST_TIMES = 64


def as_seen(t: float, dtype: torch.dtype) -> float:
    """The time as a field with times of this dtype receives it: at a jump, the next one on the side from which it is seen."""
    if not isinstance(t, OneSided):
        return t
    rounded = torch.tensor(t, dtype=dtype, device="cpu")
    return float(torch.nextafter(rounded, torch.full_like(rounded, math.copysign(math.inf, t.side))))


def times_seen(grid: Grid, dtype: torch.dtype) -> list[tuple[float, ...]]:
    """The times of the steps; with jumps, those at which steps begin as they see them, and those at which they end."""
    if not grid.jumps:
        return [tuple(grid.times)]
    steps = [grid.seen(n, n + 1, grid.times[n : n + 2]) for n in range(grid.num_steps)]
    starts, ends = ([as_seen(step[end], dtype) for step in steps] for end in (0, 1))
    return [(*starts, grid.times[-1]), (grid.times[0], *ends)]


@lru_cache(maxsize=16)
def padded(times: tuple[float, ...]) -> Tensor:
    """The times as a table, the last one repeated."""
    length = max(LEAST_TIMES, 1 << (len(times) - 1).bit_length())
    return torch.tensor([*times, *[times[-1]] * (length - len(times))], dtype=torch.float64, device="cpu")


@lru_cache(maxsize=16)
def outputs_due(outputs: tuple[int, ...], length: int) -> Tensor:
    """For every number of steps the output due then, or -1."""
    due = torch.full((length,), -1, device="cpu")
    due[list(outputs)] = torch.arange(len(outputs), device="cpu")
    return due


@lru_cache(maxsize=4096)
def counter(n: int) -> Tensor:
    """A number of steps as programs take it."""
    return torch.tensor(n, device="cpu")


def row(table: Tensor, n: Tensor) -> Tensor:
    """Row n, or the last one."""
    return table.index_select(0, n.clamp(max=len(table) - 1).reshape(1))[0]


def at(values: Tensor, n: Tensor) -> Tensor:
    """Entry n."""
    return values.index_select(0, n.reshape(1)).reshape(())


def around(times: Sequence[Tensor], n: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The times at which the step after n steps begins and ends, and those of the step after that one, which takes no time if
    that is the `last`; with jumps there are two tables, of the times at which steps begin and end as they see them."""
    t0, t1, t2 = at(times[0], n), at(times[-1], n + 1), at(times[-1], torch.minimum(n + 2, last))
    return t0, t1, t1 if len(times) == 1 else at(times[0], n + 1), t2


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
