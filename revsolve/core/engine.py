"""The engine: march a scheme over a grid, and the gradient of that discrete solve in three ways.

    reversible   undo the steps one by one, differentiating each as it is undone     keeps the last pair and the restarts
    checkpoint   recompute segments of about sqrt(N) steps from stored states        keeps about 2 sqrt(N) states
    direct       plain automatic differentiation through the march                   keeps everything

All three give the gradient of the same discrete map. `march` never hears of gradients; `Solved` is the only autograd.Function.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from revsolve.core.coupling import Memo, Pair, Scheme, Tape, Term, Time, accumulate, advance, pull_back
from revsolve.core.replay import Ambient, Gate
from revsolve.core.restarts import Restarts, Segments
from revsolve.core.stepper import Grid, Stepper


class ReconstructionWarning(UserWarning):
    """Undoing the steps did not lead back to the stored states: the gradient may be inaccurate."""


@dataclass
class Stats:
    """What a solve did. Counters of the backward pass are filled in by it."""

    num_steps: int = 0
    num_rejected: int = 0
    num_restarts: int = 0
    num_evaluations: int = 0
    num_backward_evaluations: int = 0
    num_stored_states: int = 0
    reconstruction_error: float | None = None


@dataclass
class Problem:
    """Everything the engine needs: raw input has been checked and packed before."""

    scheme: Scheme
    term: Term
    make_stepper: Callable[[], Stepper]
    gradient: str
    restarts: Restarts | None
    tensors: tuple[Tensor, ...] = ()
    audit: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = lambda outputs, own: None
    first_value: tuple[Any, ...] | None = None
    explain: Callable[[float, Tensor], str] = lambda t, y: f"the state is not finite after t = {t}"
    anchor_every: int | None = None
    severed: bool = False
    stats: Stats = field(default_factory=Stats)
    grid: Grid | None = None


def solve(problem: Problem, y0: Tensor, t: Tensor | None) -> Tensor:
    """The states at the output times, stacked: (len(t), *y0.shape)."""
    inputs = [x for x in (y0, t, *problem.tensors) if x is not None]
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        with torch.no_grad():
            return _stack(march(problem, y0)[0])
    if problem.gradient != "direct":
        return Solved.apply(problem, y0, t, *problem.tensors)
    if t is None or not t.requires_grad:
        return _stack(march(problem, y0)[0])
    with torch.no_grad():
        march(problem, y0)
    assert problem.grid is not None
    return _stack(replay_all(problem, problem.grid, y0, t))


class Walk:
    """Takes single steps, and remembers the pair with which the latest one began (after a restart)."""

    def __init__(self, scheme: Scheme, memo: Memo) -> None:
        self.scheme, self.memo = scheme, memo
        self.restarted_updates = scheme.restart + scheme.updates

    def __call__(
        self, pair: Pair, t0: Time, t1: Time, restart: bool, with_error: bool = False
    ) -> tuple[Pair, Tensor | None]:
        error: list[Tensor] | None = [] if with_error else None
        latest = self.memo.latest
        if restart:
            for update in self.scheme.restart:
                pair = advance(update, pair, t0, t1, self.memo)
        self.begun = pair
        for update in self.scheme.updates:
            pair = advance(update, pair, t0, t1, self.memo, error)
        if not error:
            return pair, None
        self.before_attempt = latest
        return pair, sum(error[1:], start=error[0])

    def forget_attempt(self) -> None:
        self.memo.latest = self.before_attempt

    def parasitic(self, pair: Pair, h: float) -> Tensor:
        """The size of the parasitic part after a step."""
        y, z = pair
        before = self.begun[1]
        assert z is not None and before is not None
        return _size((z - before) * h if self.scheme.staggered else y - z)


def march(
    problem: Problem, y0: Tensor, store: Callable[[int, Pair], None] | None = None
) -> tuple[list[Tensor], Pair]:
    """Carry the pair from y0 over the whole grid, segment by segment; the states due as output, and the last pair."""
    stepper, memo = problem.make_stepper(), Memo(problem.term)
    if problem.first_value is not None:
        memo.latest = (y0, *problem.first_value)
    walk, grid = Walk(problem.scheme, memo), stepper.grid
    segments = _segments(problem, stepper)
    pair: Pair = (y0, None)
    ys = [y0] if grid.outputs[0] == 0 else []
    while not stepper.done:
        start, begin, num_outputs = stepper.num_steps, pair, len(ys)
        restart = problem.scheme.reversible and (segments.resets or start == 0)
        segments.begin(start)
        while not stepper.done and stepper.num_steps - start < segments.length:
            pair = stepper.advance(walk, pair, restart and stepper.num_steps == start)
            if len(ys) < len(grid.outputs) and grid.outputs[len(ys)] == stepper.num_steps:
                ys.append(pair[0])
            if segments.judged and stepper.num_steps == start + 1:
                segments.start(float(walk.parasitic(pair, h := _last_step(grid, start + 1))), abs(h))
        if segments.judged and not _accept(segments, walk, stepper, start, pair):
            pair = begin
            stepper.rewind(start)
            del ys[num_outputs:]
            continue
        if restart:
            grid.restarts.add(start)
        if store is not None:
            store(start, begin)
    if not bool(torch.isfinite(pair[0]).all()):
        raise _non_finite(problem, grid, y0)
    problem.grid = grid
    stats = problem.stats
    stats.num_steps, stats.num_rejected = grid.num_steps, stepper.num_rejected
    stats.num_restarts, stats.num_evaluations = max(0, len(grid.restarts) - 1), memo.num_evaluations
    return ys, pair


def replay(
    problem: Problem, grid: Grid, pair: Pair, start: int, stop: int, times: Sequence[Time], walk: Walk
) -> tuple[Pair, dict[int, Tensor]]:
    """Repeat the recorded steps start..stop; the last pair, and the outputs due after them by their index."""
    due = {n: i for i, n in enumerate(grid.outputs)}
    outputs = {}
    for n in range(start, stop):
        pair, _ = walk(pair, times[n - start], times[n - start + 1], n in grid.restarts)
        if n + 1 in due:
            outputs[due[n + 1]] = pair[0]
    return pair, outputs


def replay_all(problem: Problem, grid: Grid, y0: Tensor, t: Tensor | None) -> list[Tensor]:
    times = grid.times if t is None or not t.requires_grad else list(moments(grid, t).unbind())
    walk = Walk(problem.scheme, Memo(problem.term))
    _, outputs = replay(problem, grid, (y0, None), 0, grid.num_steps, times, walk)
    return [outputs.get(i, y0) for i in range(len(grid.outputs))]


def moments(grid: Grid, t: Tensor) -> Tensor:
    """The recorded times as functions of the output times t: each keeps its relative place between its neighbours."""
    left, place = [], []
    for i, (a, b) in enumerate(zip(grid.outputs, grid.outputs[1:], strict=False)):
        t0, t1 = grid.times[a], grid.times[b]
        left += [i] * (b - a)
        place += [(s - t0) / (t1 - t0) for s in grid.times[a:b]]
    index = torch.tensor([*left, len(grid.outputs) - 2], device=t.device)
    fraction = torch.tensor([*place, 1.0], dtype=torch.float64, device=t.device)
    exact = t.double()
    return torch.lerp(exact[index], exact[index + 1], fraction)


class Solved(torch.autograd.Function):
    """The discrete solve as one differentiable operation: the single place where gradients are computed."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, y0: Tensor, t: Tensor | None, *tensors: Tensor) -> Tensor:
        marks: list[tuple[int, Pair]] = []
        ys, pair = march(problem, y0, _store(problem, marks))
        ctx.problem, ctx.grid, ctx.num_tensors = problem, problem.grid, len(tensors)
        ctx.steps = [n for n, _ in marks]
        ctx.ambient = Ambient.now()
        pairs = [x for _, kept in [*marks, (0, pair)] for x in kept]
        ctx.save_for_backward(y0, t, *tensors, *pairs)
        problem.stats.num_stored_states = sum(x is not None for x in pairs)
        return _stack(ys)

    @staticmethod
    def backward(ctx: Any, grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        problem, grid, split = ctx.problem, ctx.grid, 2 + ctx.num_tensors
        saved = ctx.saved_tensors
        y0, t, *tensors = saved[:split]
        if torch.is_grad_enabled():
            return None, *_differentiable_gradient(problem, grid, y0, t, tensors, grad_ys)
        pairs = list(zip(saved[split::2], saved[split + 1 :: 2], strict=True))
        marks = dict(zip(ctx.steps, pairs[:-1], strict=True))
        method = undo if problem.gradient == "reversible" else recompute
        with ctx.ambient:
            tape = Tape(problem.term, tensors, problem.audit)
            moving = t is not None and ctx.needs_input_grad[2]
            grad_y0, grad_times = method(problem, grid, marks, pairs[-1], grad_ys, tape, moving)
        problem.stats.num_backward_evaluations = tape.memo.num_evaluations
        grad_t = _grad_t(grid, t, grad_times) if moving else None
        grads = (total.to(p.dtype) for total, p in zip(tape.sums, tensors, strict=True))
        return None, grad_y0, grad_t, *grads


def undo(
    problem: Problem, grid: Grid, marks: dict[int, Pair], pair: Pair, grad_ys: Tensor, tape: Tape, moving: bool
) -> tuple[Tensor | None, dict[int, Tensor | None]]:
    """Undo the steps from the last pair, differentiating each as it is undone."""
    scheme, due = problem.scheme, {n: i for i, n in enumerate(grid.outputs)}
    grads: list[Tensor | None] = [None, None]
    mismatches: list[Tensor] = []
    clock = _Clock(grid, tape, moving)
    end = pair[0]
    for n in reversed(range(grid.num_steps)):
        if n + 1 in due:
            grads[0] = accumulate(grads[0], grad_ys[due[n + 1]])
        t0, t1 = clock(n), clock(n + 1)
        for update in reversed(scheme.updates):
            pair = pull_back(update, pair, grads, t0, t1, tape)
        if n in marks:
            stored = marks[n]
            mismatches.append(_size(pair[0] - stored[0]) / torch.maximum(_size(stored[0]), _size(end)))
            if n in grid.restarts:
                pair = (stored[0], pair[1])
                for update in reversed(scheme.restart):
                    pair = pull_back(update, pair, grads, t0, t1, tape, restored=stored[1])
            pair, end, tape.audit_due = stored, stored[0], True
    tape.flush(grads)
    if 0 in due:
        grads[0] = accumulate(grads[0], grad_ys[due[0]])
    _certify(problem, mismatches)
    return grads[0], clock.close()


def recompute(
    problem: Problem, grid: Grid, marks: dict[int, Pair], pair: Pair, grad_ys: Tensor, tape: Tape, moving: bool
) -> tuple[Tensor | None, dict[int, Tensor | None]]:
    """Repeat segment after segment from its stored state, last one first, and differentiate each by itself."""
    grads: tuple[Tensor | None, ...] = (None, None)
    grad_times: dict[int, Tensor | None] = {}
    stop = grid.num_steps
    for start in sorted(marks, reverse=True):
        leaves = [None if x is None else x.detach().requires_grad_() for x in marks[start]]
        times = [torch.tensor(s, dtype=torch.float64) for s in grid.times[start : stop + 1]] if moving else []
        with torch.enable_grad():
            times = [s.requires_grad_() for s in times]
            walk = Walk(problem.scheme, tape.memo)
            kept: Pair = (leaves[0], leaves[1])  # type: ignore[assignment]
            after, outputs = replay(problem, grid, kept, start, stop, times or grid.times[start : stop + 1], walk)
        ends = [(x, g) for x, g in zip(after, grads, strict=True) if x is not None and g is not None]
        ends += [(y, grad_ys[i]) for i, y in outputs.items()]
        ends = [(x, g) for x, g in ends if x.requires_grad]
        inputs = [x for x in leaves if x is not None]
        tape.audit([x for x, _ in ends], [*inputs, *times])
        got = torch.autograd.grad(
            [x for x, _ in ends], [*inputs, *times, *tape.tensors], [g for _, g in ends], allow_unused=True
        )
        grads = (got[0], got[1] if len(inputs) == 2 else None)
        for n, grad in enumerate(got[len(inputs) : len(inputs) + len(times)]):
            grad_times[start + n] = accumulate(grad_times.get(start + n), grad)
        tape.add_up(got[len(inputs) + len(times) :])
        stop = start
    grad_y0 = accumulate(grads[0], grad_ys[0]) if grid.outputs[0] == 0 else grads[0]
    return grad_y0, grad_times


class _Clock:
    """The recorded times; where gradients with respect to them are wanted, as leaves that the tape watches."""

    def __init__(self, grid: Grid, tape: Tape, moving: bool) -> None:
        self.times, self.tape, self.moving = grid.times, tape, moving
        self.leaves: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor | None] = {}

    def __call__(self, n: int) -> Time:
        if not self.moving:
            return self.times[n]
        if n not in self.leaves:
            self.leaves[n] = torch.tensor(self.times[n], dtype=torch.float64, requires_grad=True)
            self.tape.times[self.leaves[n]] = None
            self._retire(n + 3)
        return self.leaves[n]

    def _retire(self, n: int) -> None:
        if n in self.leaves:
            self.grads[n] = self.tape.times.pop(self.leaves.pop(n))

    def close(self) -> dict[int, Tensor | None]:
        for n in list(self.leaves):
            self._retire(n)
        return self.grads


def _segments(problem: Problem, stepper: Stepper) -> Segments:
    every = problem.anchor_every
    if problem.gradient == "checkpoint" and every is None and stepper.num_total is not None:
        every = max(1, math.isqrt(stepper.num_total))
    restarts = problem.restarts if problem.scheme.reversible else None
    return Segments(restarts, stepper.num_total, every, problem.scheme.gap_order)


def _accept(segments: Segments, walk: Walk, stepper: Stepper, start: int, pair: Pair) -> bool:
    n, y = stepper.num_steps, pair[0].detach()
    gap, size = torch.stack([walk.parasitic(pair, _last_step(stepper.grid, n)), _size(y)]).detach().tolist()
    times = stepper.grid.times[start : n + 1]
    return segments.accept(gap, times, stepper.tolerance(size), torch.finfo(y.dtype).eps * size)


def _last_step(grid: Grid, n: int) -> float:
    return grid.times[n] - grid.times[n - 1]


def _store(problem: Problem, marks: list[tuple[int, Pair]]) -> Callable[[int, Pair], None]:
    """Keep the pair at every restart and anchor; a checkpointed gradient keeps every sqrt(n)-th only."""

    def store(n: int, pair: Pair) -> None:
        if problem.gradient == "reversible" or not marks or n - marks[-1][0] >= math.isqrt(n):
            marks.append((n, pair))

    return store


def _differentiable_gradient(
    problem: Problem, grid: Grid, y0: Tensor, t: Tensor | None, tensors: Sequence[Tensor], grad_ys: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradient as a differentiable function of all inputs, for higher derivatives: replayed with everything kept."""
    with Gate() as gate:
        y, s = gate(y0), None if t is None else gate(t)
        ys = _stack(replay_all(problem, grid, y, s))
        inputs = [x for x in (y, s, *tensors) if x is not None and x.requires_grad]
        got = torch.autograd.grad(ys, inputs, grad_ys, create_graph=True, allow_unused=True)
    found = {id(x): g for x, g in zip(inputs, got, strict=True)}
    return tuple(None if x is None else found.get(id(x)) for x in (y, s, *tensors))


def _grad_t(grid: Grid, t: Tensor, grads: dict[int, Tensor | None]) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=t.device)
    rows = [g if (g := grads.get(n)) is not None else zero for n in range(len(grid.times))]
    with torch.enable_grad():
        leaf = t.detach().requires_grad_()
        return torch.autograd.grad(moments(grid, leaf), leaf, torch.stack(rows))[0]


def _certify(problem: Problem, mismatches: list[Tensor]) -> None:
    """Compare what was reconstructed with what was stored; a gradient is never silently wrong."""
    worst = float(torch.stack(mismatches).nan_to_num(nan=math.inf).max())
    problem.stats.reconstruction_error = worst
    if not math.isfinite(worst):
        raise RuntimeError(
            "undoing the steps gave a state that is not finite, so the gradient would be wrong: restart more often "
            "(restarts=8, say), use a wider dtype, or gradient='checkpoint'."
        )
    limit = math.sqrt(torch.finfo(mismatches[0].dtype).eps)
    if worst > limit:
        warnings.warn(
            f"undoing the steps missed the stored states by {worst:.1e} (relative), more than {limit:.1e}: the gradient may be "
            "that inaccurate. Restart more often (restarts=8, say), use a wider dtype, make sure that the field is "
            "deterministic, or use gradient='checkpoint'.",
            ReconstructionWarning,
            stacklevel=2,
        )


def _non_finite(problem: Problem, grid: Grid, y0: Tensor) -> RuntimeError:
    """Repeat the steps one by one to say where the state stopped being finite."""
    walk, pair = Walk(problem.scheme, Memo(problem.term)), (y0, None)
    with torch.no_grad():
        for n in range(grid.num_steps):
            before = pair[0]
            pair, _ = walk(pair, grid.times[n], grid.times[n + 1], n in grid.restarts)
            if not bool(torch.isfinite(pair[0]).all()):
                return RuntimeError(problem.explain(grid.times[n], before))
    return RuntimeError(problem.explain(grid.times[-1], pair[0]))


def _size(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, ord=math.inf)


def _stack(ys: list[Tensor]) -> Tensor:
    return torch.stack(ys)
