"""Tables over the steps of a grid, which programs read by the number of a step: times, and outputs due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from revsolve.core.arithmetic import OneSided
from revsolve.core.stepper import Grid

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
