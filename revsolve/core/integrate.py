"""The march: carry a state over a grid, step by step and segment by segment. It takes no gradients."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time, widest
from revsolve.core.coupling import Scheme, State, advance, schedule, scheduled
from revsolve.core.problem import Problem
from revsolve.core.restart import FixedInterval, RestartPolicy
from revsolve.core.stepper import Grid, Measure, Step, Stepper
from revsolve.core.tape import Memo, Term


class Walk:
    """Takes steps, and remembers the state with which the latest call began (after a restart)."""

    def __init__(self, scheme: Scheme, memo: Memo) -> None:
        self.scheme, self.memo = scheme, memo

    def __call__(
        self, state: State, times: Sequence[Time], restart: bool, measure: Measure | None = None
    ) -> tuple[State, Tensor | None]:
        error: list[Tensor] | None = None if measure is None else []
        latest, y = self.memo.latest, state[0]
        if restart:
            for update in self.scheme.restart:
                state = advance(scheduled(update, times[0], times[1]), state, self.memo)
        self.begun = state
        for move in schedule(self.scheme, times, self.memo.additive):
            state = advance(move, state, self.memo, error)
        if measure is None or not error:
            return state, None
        self.before_attempt = latest
        return state, measure(sum(error[1:], start=error[0]), y, state[0])

    def forget_attempt(self) -> None:
        self.memo.latest = self.before_attempt

    def gap(self, state: State, h: float, weight: Tensor) -> Tensor:
        return size_of(defect(self.scheme, state, self.begun[1], h) * weight)


def march(
    problem: Problem,
    term: Term,
    y0: Tensor,
    store: Callable[[int, State], None] | None = None,
    make_step: Callable[[Scheme, Memo], Step] = Walk,
) -> tuple[list[Tensor], State, Grid]:
    """Carry the state from y0 over the whole grid, segment by segment; the outputs, the last state and the grid."""
    stepper, memo = problem.make_stepper(), Memo(term)
    state: State = (problem.widened(y0),)
    if (first := problem.field.take_first()) is not None:
        memo.num_evaluations = 1
        memo.latest = (state[0], *first)
    step, grid = make_step(problem.scheme, memo), stepper.grid
    policy, scheme = policy_of(problem, stepper, memo), problem.scheme
    ys = [y0] if grid.outputs[0] == 0 else []
    next_decision = 0
    while not stepper.done:
        n, restart = stepper.num_steps, False
        if next_decision == n:  # a segment begins
            restart = scheme.reversible and (problem.restarts is not None or n == 0)
            if restart:
                grid.restarts.add(n)
            if store is not None:
                store(n, state if n else (y0,))
            next_decision = policy.begin(stepper, state[0])
        limit = next_decision
        if scheme.has_velocity and problem.restarts is not None and limit > n + 1:
            limit -= 1  # the last step is taken alone, so that its change of the velocity can be measured
        state = stepper.advance(step, state, restart, min(limit, stepper.num_total or limit))
        if len(ys) < len(grid.outputs) and grid.outputs[len(ys)] == stepper.num_steps:
            ys.append(problem.narrowed(state[0]))
        if stepper.num_steps == next_decision and not stepper.done:
            h = grid.times[next_decision] - grid.times[next_decision - 1]
            next_decision = policy.extend(stepper, functools.partial(step.gap, state, h))
    finish(problem, term, stepper, state[0], y0, memo.num_evaluations)
    return ys, state, grid


def finish(problem: Problem, term: Term, stepper: Stepper, y: Tensor, y0: Tensor, num_evaluations: int) -> None:
    """Raise unless the last state is finite; note what was done."""
    grid, stats = stepper.grid, problem.stats
    if problem.readable and not math.isfinite(size_of(y.detach())):
        raise non_finite(problem, term, grid, y0)
    stats.num_steps, stats.num_rejected = grid.num_steps, stepper.num_rejected
    stats.times = grid.times
    stats.num_restarts, stats.num_evaluations = max(0, len(grid.restarts) - 1), num_evaluations


def replay(
    problem: Problem, grid: Grid, state: State, start: int, stop: int, times: Sequence[Time], walk: Walk
) -> tuple[State, dict[int, Tensor]]:
    """Repeat the recorded steps start..stop; the last state, and the outputs due after them by their index."""
    outputs = {}
    for a, b in grid.runs(start, stop):
        state, _ = walk(state, grid.seen(a, b, times[a - start : b - start + 1]), a in grid.restarts)
        if (i := grid.output(b)) is not None:
            outputs[i] = problem.narrowed(state[0])
    return state, outputs


def replay_all(problem: Problem, term: Term, grid: Grid, y0: Tensor, t: Tensor | None) -> list[Tensor]:
    """Repeat the whole solve; the outputs as functions of y0, and of t where that requires a gradient."""
    times: Sequence[Time] = grid.times if t is None else list(moments(grid, t).unbind())
    walk = Walk(problem.scheme, Memo(term))
    _, outputs = replay(problem, grid, (problem.widened(y0),), 0, grid.num_steps, times, walk)
    return [outputs.get(i, y0) for i in range(len(grid.outputs))]


def moments(grid: Grid, t: Tensor) -> Tensor:
    """The recorded times as functions of the output times t: each keeps its relative place between the nearest outputs or
    pinned times."""
    pinned = sorted(set(grid.pinned) - set(grid.outputs))
    knots = sorted((n, i) for i, n in enumerate([*grid.outputs, *pinned]))
    left, right, place = [], [], []
    for (a, i), (b, j) in itertools.pairwise(knots):
        t0, t1 = grid.times[a], grid.times[b]
        left += [i] * (b - a)
        right += [j] * (b - a)
        place += [(s - t0) / (t1 - t0) for s in grid.times[a:b]]
    last = knots[-1][1]
    dtype = widest(t.device)
    fraction = torch.tensor([*place, 1.0], dtype=dtype, device=t.device)
    exact = torch.cat([t.to(dtype), t.new_tensor([grid.times[n] for n in pinned], dtype=dtype)])
    return torch.lerp(exact[[*left, last]], exact[[*right, last]], fraction)


def policy_of(problem: Problem, stepper: Stepper, memo: Memo) -> RestartPolicy:
    """The ends of the segments, as restarts and checkpoints ask for."""
    if problem.restarts is not None and problem.scheme.reversible:
        return problem.restarts.policy(problem.scheme, memo)
    if problem.gradient != "checkpoint" or problem.checkpoint_every is not None:
        return FixedInterval(problem.checkpoint_every or stepper.num_total)
    total = stepper.num_total
    return FixedInterval(None if total is None else problem.checkpoint_spacing(total), problem.checkpoint_spacing)


def non_finite(problem: Problem, term: Term, grid: Grid, y0: Tensor) -> RuntimeError:
    """Repeat the steps one by one to say where the field or the state stopped being finite."""
    watch = _NonFiniteWatch(term)
    walk = Walk(problem.scheme, Memo(watch))
    state: State = (problem.widened(y0),)
    with torch.no_grad():
        for n in range(grid.num_steps):
            before = state[0]
            state, _ = walk(state, grid.seen(n, n + 1, grid.times[n : n + 2]), n in grid.restarts)
            if watch.lost is not None:
                return RuntimeError(problem.explain(*watch.lost))
            if not _finite(state[0]):
                return RuntimeError(problem.explain(grid.times[n], before))
    return RuntimeError(problem.explain(grid.times[-1], state[0]))


class _NonFiniteWatch:
    """A term that remembers where its value first was not finite although the state was."""

    def __init__(self, term: Term) -> None:
        self.term, self.control, self.product = term, term.control, term.product
        self.lost: tuple[float, Tensor] | None = None

    def value(self, t: Time, x: Tensor) -> Any:
        value = self.term.value(t, x)
        parts = [value] if isinstance(value, Tensor) else [*value]  # those evaluated on demand, too
        finite = (_finite(part) for part in parts if isinstance(part, Tensor))
        if self.lost is None and _finite(x) and not all(finite):
            self.lost = float(t), x
        return value


def _finite(x: Any) -> bool:
    return not isinstance(x, Tensor) or bool(torch.isfinite(x).all())


def defect(scheme: Scheme, state: State, before: Tensor, h: float | Tensor) -> Tensor:
    """The distance of z from what a restart would make of it, after a step of length h that began with z = `before`."""
    y, z = state
    return ((z - before) * h if scheme.has_velocity else y - z).detach()


def size_of(x: Tensor) -> Tensor:
    """The largest entry in absolute value."""
    if x.is_complex():
        return x.abs().amax()
    low, high = torch.aminmax(x)  # ten times as fast as the norm of infinite order, and no copy
    return torch.maximum(-low, high)
