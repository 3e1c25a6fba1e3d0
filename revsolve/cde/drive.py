"""What the path does over a span of time, said in two ways.

`Slopes` takes dX/dt at the time of the evaluation: f dX/dt is the right-hand side of an ODE, which every tableau solves at its
own order. `Increments` takes X(t1) - X(t0): one evaluation then covers all that the path does in between, exactly where it is
a straight line.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from revsolve.cde.each import PathOfEach
from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Scheme, evaluations, moves, over
from revsolve.field.functorch import wrapped
from revsolve.paths.control import Control

Key = tuple[Any, ...]  # times


class Drive(ABC):
    """What the path does over the span t0 -> t1 in which the field was evaluated at t: (dX, scale) means scale * dX.

    The path is asked for times that are later by `shift`, a tensor that is zero.
    """

    adds_up = False

    def __init__(self, control: Control | PathOfEach, table: Table | None = None, shift: Tensor | None = None) -> None:
        self.control, self.table = control, table
        self.shift = None if shift is None else shift.to("cpu", torch.float64)

    @abstractmethod
    def __call__(self, t: Time, t0: Time, t1: Time) -> tuple[Any, Time]: ...

    @abstractmethod
    def rows(self, keys: list[Key]) -> Any:
        """dX for every key, in one call: (len(keys), ..., channels), or a tuple of such."""

    @abstractmethod
    def keys(self, asked: list[Key]) -> list[Key]:
        """What has to be known to answer for every (t, t0, t1)."""

    def tabulated(self, scheme: Scheme, times: list[float], most: int) -> Drive:
        """This, but with all that the steps between `times` ask for computed beforehand, unless it is more than `most` rows."""
        if (len(times) - 1) * len(self.keys(asked_for(scheme, times[:2]))) > most:
            return self
        keys = self.keys(asked_for(scheme, times, self.adds_up))
        return type(self)(self.control, Table(keys, self.rows(keys)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that dX is read from."""
        return self.control.tensors if self.table is None else self.table.tensors


class Slopes(Drive):
    """dX/dt at the time of the evaluation, times the length of the span."""

    def __call__(self, t: Time, t0: Time, t1: Time) -> tuple[Any, Time]:
        if self.table is not None:
            return self.table((t, *_ordered(t, t0, t1))), t1 - t0
        low, high = _ordered(t, t0, t1)
        if self.shift is None:
            return self.control.derivative(t, span=(low, high)), t1 - t0
        return self.control.derivative(t + self.shift, span=(low + self.shift, high + self.shift)), t1 - t0

    def keys(self, asked: list[Key]) -> list[Key]:
        return list(dict.fromkeys((t, *_ordered(t, t0, t1)) for t, t0, t1 in asked))

    def rows(self, keys: list[Key]) -> Any:
        assert isinstance(self.control, Control)
        times, starts, ends = torch.tensor(keys, dtype=torch.float64, device="cpu").T.contiguous()
        return self.control.derivatives(times, spans=(starts, ends))


class Increments(Drive):
    """X(t1) - X(t0)."""

    adds_up = True

    def __call__(self, t: Time, t0: Time, t1: Time) -> tuple[Any, Time]:
        if self.table is not None:
            return self.table(_ordered(t0, t1)), 1.0 if t1 > t0 else -1.0
        if self.shift is not None:
            t0, t1 = t0 + self.shift, t1 + self.shift
        return self.control.increment(t0, t1), 1.0

    def keys(self, asked: list[Key]) -> list[Key]:
        return sorted({_ordered(t0, t1) for _, t0, t1 in asked})

    def rows(self, keys: list[Key]) -> Any:
        assert isinstance(self.control, Control)
        points = sorted({t for key in keys for t in key})
        place = {t: i for i, t in enumerate(points)}
        first, last = ([place[key[i]] - i for key in keys] for i in (0, 1))
        if all(b - a in (0, 1) for a, b in zip(first, last, strict=True)):  # steps, and two of them joined
            pieces = self.control.increments(points)
            return pieces if first == last else tree_map(lambda x: _one_or_two(x, first, last), pieces)
        starts, ends = torch.tensor(keys, dtype=torch.float64, device="cpu").T.contiguous()
        before, after = self.control.evaluate(starts), self.control.evaluate(ends)
        return tree_map(lambda b, a: (a - b).movedim(-2, 0), before, after)


def _one_or_two(pieces: Tensor, first: list[int], last: list[int]) -> Tensor:
    """Pieces, with the next one added where `last` is not `first`."""
    joined = torch.tensor([a != b for a, b in zip(first, last, strict=True)], dtype=pieces.dtype, device=pieces.device)
    return torch.addcmul(pieces[first], pieces[last], joined.view(-1, *[1] * (pieces.ndim - 1)))


class Table:
    """Rows found by key. They lie in about as many blocks as a block has rows.

    The gradient of a row is as large as the tensor that it is taken from, and every tensor that the engine differentiates with
    respect to costs something in every step: blocks keep both at the square root of the number of rows.
    """

    def __init__(self, keys: list[Key], rows: Any) -> None:
        length = math.isqrt(len(keys) - 1) + 1
        self.place = {key: divmod(i, length) for i, key in enumerate(keys)}
        self.lone = isinstance(rows, Tensor)
        self.columns = [column.split(length) for column in ([rows] if self.lone else rows)]
        self.rows = [[block if _followed(block) else block.unbind() for block in blocks] for blocks in self.columns]

    def __call__(self, key: Key) -> Any:
        block, row = self.place[key]
        if self.lone:
            return self.rows[0][block][row]
        return tuple(blocks[block][row] for blocks in self.rows)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(block for blocks in self.columns for block in blocks)


def _followed(x: Tensor) -> bool:
    return x.requires_grad or wrapped(x)


def asked_for(scheme: Scheme, times: list[float], adds_up: bool = False) -> list[Key]:
    """The (t, t0, t1) for which the steps between these times ask the term: its evaluations, and the spans they are used for."""
    alone = [over(update, *step) for step in itertools.pairwise(times) for update in (*scheme.restart, *scheme.updates)]
    joined = [move for move in moves(scheme, times, adds_up) if move[3] is not None]
    return list(evaluations([*alone, *joined]))


def _ordered(*times: Time) -> Key:
    """The earliest and the latest. A composed method may evaluate outside the span that it uses the value for."""
    return min(times), max(times)
