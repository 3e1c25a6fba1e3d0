"""The control of a CDE over a span of time, in two forms.

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

from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Scheme, evaluations, schedule, scheduled
from revsolve.extras.per_sample_steps import BatchedTime
from revsolve.field.functorch import wrapped
from revsolve.paths.control import Control
from revsolve.paths.piecewise import PiecewisePath

Key = tuple[Any, ...]  # times


class Drive(ABC):
    """What the path does over the span t0 -> t1 in which the field was evaluated at t: (dX, scale) means scale * dX.

    `tensors` are all that dX is read from. The path is asked for times that are later by `shift`, a tensor that is zero.
    """

    additive = False

    def __init__(self, control: Control | PathOfEach, shift: Tensor | None = None) -> None:
        self.control, self.tensors = control, control.tensors
        self.shift = None if shift is None else shift.to("cpu", torch.float64)
        self.lone = True  # whether dX is one tensor
        self.known: dict[Key, tuple[list[Any], int]] = {}  # blocks of rows, one for each path of a tuple, and which row

    def __call__(self, t: Time, t0: Time, t1: Time) -> tuple[Any, Time]:
        if (found := self.known.get((t, t0, t1))) is not None:
            blocks, row = found
            return blocks[0][row] if self.lone else tuple(block[row] for block in blocks), self.scale(t0, t1)
        key = self.key(t, t0, t1)
        return self.ask(*(key if self.shift is None else [s + self.shift for s in key])), self.scale(t0, t1)

    @abstractmethod
    def key(self, t: Time, t0: Time, t1: Time) -> Key:
        """The times that dX depends on."""

    @abstractmethod
    def scale(self, t0: Time, t1: Time) -> Time: ...
    @abstractmethod
    def ask(self, *key: Time) -> Any:
        """dX for a key."""

    @abstractmethod
    def rows(self, keys: list[Key]) -> Any:
        """dX for every key, in one call: (len(keys), ..., channels), or a tuple of such."""

    def tabulated(self, scheme: Scheme, times: list[float], most: int) -> Drive:
        """This, but with all that the steps between `times` ask for computed beforehand, unless it is more than `most` rows.

        Rows lie in about as many blocks as a block has rows: the gradient of a row is as large as the tensor that it is taken
        from, and every tensor that the engine differentiates by costs something in every step; the square root is both.
        """
        if (len(times) - 1) * len({self.key(*asked) for asked in asked_for(scheme, times[:2])}) > most:
            return self
        asked = {each: self.key(*each) for each in asked_for(scheme, times, self.additive)}
        keys = sorted(set(asked.values()))
        table, rows, length = type(self)(self.control), self.rows(keys), math.isqrt(len(keys) - 1) + 1
        table.lone = isinstance(rows, Tensor)
        columns = [column.split(length) for column in ([rows] if table.lone else rows)]
        table.tensors = tuple(itertools.chain(*columns))
        followed = [[x if x.requires_grad or wrapped(x) else x.unbind() for x in column] for column in columns]
        blocks = [*map(list, zip(*followed, strict=True))]
        place = {key: (blocks[i // length], i % length) for i, key in enumerate(keys)}
        table.known = {each: place[key] for each, key in asked.items()}
        return table


class Slopes(Drive):
    """dX/dt at the time of the evaluation, times the length of the span."""

    def key(self, t: Time, t0: Time, t1: Time) -> Key:
        # A composed method may evaluate outside the span that it uses the value for.
        return t, min(t, t0, t1), max(t, t0, t1)

    def scale(self, t0: Time, t1: Time) -> Time:
        return t1 - t0

    def ask(self, *key: Time) -> Any:
        return self.control.derivative(key[0], span=(key[1], key[2]))

    def rows(self, keys: list[Key]) -> Any:
        assert isinstance(self.control, Control)
        times, starts, ends = torch.tensor(keys, dtype=torch.float64, device="cpu").T.contiguous()
        return self.control.derivatives(times, spans=(starts, ends))


class Increments(Drive):
    """X(t1) - X(t0)."""

    additive = True

    def key(self, t: Time, t0: Time, t1: Time) -> Key:
        return min(t0, t1), max(t0, t1)

    def scale(self, t0: Time, t1: Time) -> Time:
        return 1.0 if t1 > t0 else -1.0

    def ask(self, *key: Time) -> Any:
        return self.control.increment(*key)

    def rows(self, keys: list[Key]) -> Any:
        assert isinstance(self.control, Control)
        points = sorted({t for key in keys for t in key})
        place = {t: i for i, t in enumerate(points)}
        first, last = [place[start] for start, _ in keys], [place[end] - 1 for _, end in keys]
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


def asked_for(scheme: Scheme, times: list[float], additive: bool = False) -> list[Key]:
    """The (t, t0, t1) for which the steps between these times ask the term: its evaluations, and the spans they are used for."""
    alone = [
        scheduled(update, *step) for step in itertools.pairwise(times) for update in (*scheme.restart, *scheme.updates)
    ]
    joined = [move for move in schedule(scheme, times, additive) if move[3] is not None]
    return list(evaluations([*alone, *joined]))


class PathOfEach:
    """X_b(t_b(s)) for every sample b: a path in the step variable s, which all samples share."""

    def __init__(self, control: Control, clock: BatchedTime) -> None:
        self.control, self.clock = control, clock

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.control.tensors

    def derivative(self, s: Time, *, span: tuple[Time, Time]) -> Any:
        """dX/dt dt/ds, (batch, ..., channels)."""
        times, spans = self.clock.exact(s), (self.clock.exact(span[0]), self.clock.exact(span[1]))
        if isinstance(self.control, PiecewisePath):
            slopes = self.control.derivatives_of_each(times, spans=spans)
        else:
            slopes = tree_map(_own, self.control.derivatives(times, spans=spans))
        rate = self.clock.rate(*span).reshape(-1)
        return tree_map(lambda x: x * rate.to(x.dtype).view(-1, *(1,) * (x.ndim - 1)), slopes)

    def increment(self, s0: Time, s1: Time) -> Any:
        return tree_map(torch.sub, self._values(s1), self._values(s0))

    def _values(self, s: Time) -> Any:
        times = self.clock.exact(s)
        if isinstance(self.control, PiecewisePath):
            return self.control.values_of_each(times)
        return tree_map(lambda x: _own(x.movedim(-2, 0)), self.control.evaluate(times))


def _own(x: Tensor) -> Tensor:
    """(batch, ...) from (batch, batch, ...): what each sample has at its own time."""
    return x[(each := torch.arange(len(x), device=x.device)), each]
