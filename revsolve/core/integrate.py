"""The march: carry a pair over a grid, step by step and segment by segment. It never hears of gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from revsolve.core.arithmetic import Time, widest
from revsolve.core.coupling import Pair, Scheme, advance, moves, over
from revsolve.core.modes import Modes
from revsolve.core.problem import Problem
from revsolve.core.restarts import Segments
from revsolve.core.stepper import Grid, Measure, Step, Stepper
from revsolve.core.tape import Memo, Term


class Judged(Protocol):
    """Took steps, the latest of which left a parasitic part."""

    def parasitic(self, pair: Pair, h: float) -> Tensor: ...


class Walking(Step, Judged, Protocol):
    """Takes steps that can be judged."""


class Walk:
    """Takes steps, and remembers the pair with which the latest call began (after a restart)."""

    def __init__(self, scheme: Scheme, memo: Memo) -> None:
        self.scheme, self.memo = scheme, memo

    def __call__(
        self, pair: Pair, times: Sequence[Time], restart: bool, measure: Measure | None = None
    ) -> tuple[Pair, Tensor | None]:
        error: list[Tensor] | None = None if measure is None else []
        latest, y = self.memo.latest, pair[0]
        if restart:
            for update in self.scheme.restart:
                pair = advance(over(update, times[0], times[1]), pair, self.memo)
        self.begun = pair
        for move in moves(self.scheme, times, self.memo.adds_up):
            pair = advance(move, pair, self.memo, error)
        if measure is None or not error:
            return pair, None
        self.before_attempt = latest
        return pair, measure(sum(error[1:], start=error[0]), y, pair[0])

    def forget_attempt(self) -> None:
        self.memo.latest = self.before_attempt

    def parasitic(self, pair: Pair, h: float) -> Tensor:
        """The size of the parasitic part after a step."""
        before = self.begun[1]
        assert before is not None
        return parasitic(self.scheme, pair, before, h)


def march(
    problem: Problem,
    term: Term,
    y0: Tensor,
    store: Callable[[int, Pair], None] | None = None,
    walking: Callable[[Scheme, Memo], Walking] = Walk,
) -> tuple[list[Tensor], Pair, Grid]:
    """Carry the pair from y0 over the whole grid, segment by segment; the states due as output, the last pair and the grid."""
    stepper, memo = problem.make_stepper(), Memo(term)
    pair: Pair = (problem.widened(y0), None)
    if (first := problem.field.take_first()) is not None:
        memo.num_evaluations = 1
        memo.latest = memo.latest if torch.is_grad_enabled() else (pair[0], *first)
    walk, grid = walking(problem.scheme, memo), stepper.grid
    segments, modes = segments_of(problem, stepper), Modes(problem.scheme, memo)
    ys = [y0] if grid.outputs[0] == 0 else []
    while not stepper.done:
        start, begin, num_outputs = stepper.num_steps, pair, len(ys)
        restart = problem.scheme.reversible and (segments.resets or start == 0)
        segments.begin(start)
        while not stepper.done and stepper.num_steps - start < segments.length:
            n, limit = stepper.num_steps, start + segments.length
            limit = min(limit, stepper.num_total or limit)
            if segments.judged and n == start:  # the first step is looked at
                limit = n + 1
            elif segments.judged and problem.scheme.staggered and n + 1 < limit:  # and what the last one changes
                limit -= 1
            pair = stepper.advance(walk, pair, restart and n == start, limit)
            if len(ys) < len(grid.outputs) and grid.outputs[len(ys)] == stepper.num_steps:
                ys.append(problem.narrowed(pair[0]))
            if segments.judged and stepper.num_steps == start + 1:
                segments.start(float(walk.parasitic(pair, h := last_step(grid, start + 1))), abs(h))
        if segments.judged and not accepted(segments, modes, walk, stepper, start, pair):
            pair = begin
            stepper.rewind(start)
            del ys[num_outputs:]
            continue
        if restart:
            grid.restarts.add(start)
        if store is not None:
            store(start, begin if start else (y0, None))
    conclude(problem, term, stepper, pair[0], y0, memo.num_evaluations)
    return ys, pair, grid


def conclude(problem: Problem, term: Term, stepper: Stepper, y: Tensor, y0: Tensor, num_evaluations: int) -> None:
    """Raise unless the last state is finite; note what was done."""
    grid, stats = stepper.grid, problem.stats
    if problem.readable and not math.isfinite(size_of(y.detach())):
        raise non_finite(problem, term, grid, y0)
    stats.num_steps, stats.num_rejected = grid.num_steps, stepper.num_rejected
    stats.times = grid.times
    stats.num_restarts, stats.num_evaluations = max(0, len(grid.restarts) - 1), num_evaluations


def replay(
    problem: Problem, grid: Grid, pair: Pair, start: int, stop: int, times: Sequence[Time], walk: Walk
) -> tuple[Pair, dict[int, Tensor]]:
    """Repeat the recorded steps start..stop; the last pair, and the outputs due after them by their index."""
    outputs = {}
    for a, b in grid.runs(start, stop):
        pair, _ = walk(pair, grid.seen(a, b, times[a - start : b - start + 1]), a in grid.restarts)
        if (i := grid.output(b)) is not None:
            outputs[i] = problem.narrowed(pair[0])
    return pair, outputs


def replay_all(problem: Problem, term: Term, grid: Grid, y0: Tensor, t: Tensor | None) -> list[Tensor]:
    """Repeat the whole solve; the outputs as functions of y0, and of t where that requires a gradient."""
    times: Sequence[Time] = grid.times if t is None else list(moments(grid, t).unbind())
    walk = Walk(problem.scheme, Memo(term))
    _, outputs = replay(problem, grid, (problem.widened(y0), None), 0, grid.num_steps, times, walk)
    return [outputs.get(i, y0) for i in range(len(grid.outputs))]


def moments(grid: Grid, t: Tensor) -> Tensor:
    """The recorded times as functions of the output times t: each keeps its relative place between the nearest outputs or
    pinned times."""
    pinned = sorted(set(grid.pinned) - set(grid.outputs))
    anchors = sorted((n, i) for i, n in enumerate([*grid.outputs, *pinned]))
    left, right, place = [], [], []
    for (a, i), (b, j) in itertools.pairwise(anchors):
        t0, t1 = grid.times[a], grid.times[b]
        left += [i] * (b - a)
        right += [j] * (b - a)
        place += [(s - t0) / (t1 - t0) for s in grid.times[a:b]]
    last = anchors[-1][1]
    dtype = widest(t.device)
    fraction = torch.tensor([*place, 1.0], dtype=dtype, device=t.device)
    exact = torch.cat([t.to(dtype), t.new_tensor([grid.times[n] for n in pinned], dtype=dtype)])
    return torch.lerp(exact[[*left, last]], exact[[*right, last]], fraction)


def segments_of(problem: Problem, stepper: Stepper) -> Segments:
    """The lengths of the segments, as restarts and anchors ask for."""
    every = problem.anchor_every
    if problem.gradient == "checkpoint" and every is None and stepper.num_total is not None:
        every = max(1, math.isqrt(stepper.num_total))
    restarts = problem.restarts if problem.scheme.reversible else None
    return Segments(restarts, stepper.num_total, every, problem.scheme)


def accepted(segments: Segments, modes: Modes, walk: Judged, stepper: Stepper, start: int, pair: Pair) -> bool:
    """Whether the segment from `start` can stay as it was solved; one device read."""
    n, y = stepper.num_steps, pair[0].detach()
    product = [] if stepper.done else modes.look(stepper.grid.times[n], pair[0])
    gap = walk.parasitic(pair, last_step(stepper.grid, n))
    return stays(segments, modes, stepper, start, y.dtype, torch.stack([gap, size_of(y), *product]).tolist())


def stays(
    segments: Segments, modes: Modes, stepper: Stepper, start: int, dtype: torch.dtype, numbers: Sequence[float]
) -> bool:
    """Whether the segment can stay, by its parasitic part, the size of y and what the modes were found to be."""
    n, grid, (gap, size, *found) = stepper.num_steps, stepper.grid, numbers
    times, rounding = grid.times[start : n + 1], torch.finfo(dtype).eps * size
    return segments.accept(gap, times, stepper.tolerance(size), rounding, modes.reach(last_step(grid, n), found))


def last_step(grid: Grid, n: int) -> float:
    """The length of step number n, the first being 1."""
    return grid.times[n] - grid.times[n - 1]


def non_finite(problem: Problem, term: Term, grid: Grid, y0: Tensor) -> RuntimeError:
    """Repeat the steps one by one to say where the field or the state stopped being finite."""
    watch = _Watch(term)
    walk = Walk(problem.scheme, Memo(watch))
    pair: Pair = (problem.widened(y0), None)
    with torch.no_grad():
        for n in range(grid.num_steps):
            before = pair[0]
            pair, _ = walk(pair, grid.seen(n, n + 1, grid.times[n : n + 2]), n in grid.restarts)
            if watch.lost is not None:
                return RuntimeError(problem.explain(*watch.lost))
            if not _finite(pair[0]):
                return RuntimeError(problem.explain(grid.times[n], before))
    return RuntimeError(problem.explain(grid.times[-1], pair[0]))


class _Watch:
    """A term that remembers where its value first was not finite although the state was."""

    def __init__(self, term: Term) -> None:
        self.term, self.control, self.product = term, term.control, term.product
        self.lost: tuple[float, Tensor] | None = None

    def value(self, t: Time, x: Tensor) -> Any:
        value = self.term.value(t, x)
        parts = [value] if isinstance(value, Tensor) else tree_leaves([*value])  # those evaluated on demand, too
        finite = (_finite(part) for part in parts if isinstance(part, Tensor))
        if self.lost is None and _finite(x) and not all(finite):
            self.lost = float(t), x
        return value


def _finite(x: Any) -> bool:
    return not isinstance(x, Tensor) or bool(torch.isfinite(x).all())


def parasitic(scheme: Scheme, pair: Pair, before: Tensor, h: float | Tensor) -> Tensor:
    """The size of the parasitic part that a step of length h left, which began with z = `before`."""
    y, z = pair
    assert z is not None
    return size_of(((z - before) * h if scheme.staggered else y - z).detach())


def size_of(x: Tensor) -> Tensor:
    """The largest entry in absolute value."""
    if x.is_complex():
        return x.abs().amax()
    low, high = torch.aminmax(x)  # ten times as fast as the norm of infinite order, and no copy
    return torch.maximum(-low, high)
