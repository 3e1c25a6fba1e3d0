"""The engine: the gradient of a discrete solve, in three ways.

    reversible   undo the steps one by one, differentiating each as it is undone     keeps the last pair and the restarts
    checkpoint   recompute segments of about sqrt(N) steps from stored states        keeps about 2 sqrt(N) states
    direct       plain automatic differentiation through the march                   keeps everything

All three give the gradient of the same discrete map. `Solved` is the single place where gradients are computed.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from revsolve.core.arithmetic import Time, accumulate
from revsolve.core.capture import capturing
from revsolve.core.coupling import Pair, moves, over, pull_back
from revsolve.core.integrate import Problem, Walk, march, moments, replay, replay_all, size_of
from revsolve.core.replay import Ambient, Gate, StandIns, Unchanged, has_hooks
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Tape, leaf_of

NOTHING = nullcontext()


class ReconstructionWarning(UserWarning):
    """Undoing the steps did not lead back to the stored states: the gradient may be inaccurate."""


def solve(problem: Problem, y0: Tensor, t: Tensor | None) -> Tensor:
    """The states at the output times, stacked: (len(t), *y0.shape)."""
    if problem.rule is not None:
        return problem.rule(problem, y0, t)
    inputs = [x for x in (y0, t, *problem.tensors) if x is not None]
    if problem.values_hidden and t is None:
        return torch.stack(march(problem, y0)[0])
    if not (problem.tangents or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))):
        with torch.no_grad():
            return _states(problem, y0)[0]
    if problem.gradient != "direct":
        return Solved.apply(problem, y0, t, *problem.tensors)
    if t is None:
        return torch.stack(march(problem, y0)[0])
    with torch.no_grad():
        march(problem, y0)
    assert problem.grid is not None
    with problem.buffers or NOTHING:
        return torch.stack(replay_all(problem, problem.grid, y0, t))


def _states(problem: Problem, y0: Tensor, store: Callable[[int, Pair], None] | None = None) -> tuple[Tensor, Pair]:
    if problem.compiled:
        return problem.compiled.march(problem, y0, store)
    ys, pair = march(problem, y0, store)
    return torch.stack(ys), pair


class Solved(torch.autograd.Function):
    """The discrete solve as one differentiable operation: the single place where gradients are computed."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, y0: Tensor, t: Tensor | None, *tensors: Tensor) -> Tensor:
        marks: list[tuple[int, Pair]] = []
        ys, pair = _states(problem, y0.detach(), keep_in(problem, marks))
        assert problem.grid is not None
        marks.append((problem.grid.num_steps, pair))
        ctx.problem, ctx.grid = problem, problem.grid
        ctx.steps = [n for n, _ in marks]
        ctx.ambient, ctx.unchanged = Ambient.now(), Unchanged(problem.constants)
        pairs = [x for _, kept in marks for x in kept]
        ctx.save_for_backward(y0, t, *tensors, *pairs)
        problem.stats.num_stored_states = sum(x is not None for x in pairs)
        return ys

    @staticmethod
    def backward(ctx: Any, grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        problem, grid, tensors = ctx.problem, ctx.grid, ctx.problem.tensors
        saved, split = ctx.saved_tensors, 2 + len(tensors)  # unpacking checks that nothing was changed in place
        ctx.unchanged()
        y0, t = saved[:2]
        if torch.is_grad_enabled():
            with ctx.ambient, problem.buffers or NOTHING:
                return None, *_differentiable_gradient(problem, grid, y0, t, grad_ys)
        marks = dict(zip(ctx.steps, zip(saved[split::2], saved[split + 1 :: 2], strict=True), strict=True))
        del saved
        ctx.maybe_clear_saved_tensors()  # each pair is given back as soon as it has been passed, unless the graph is kept
        sweeps, undoes, batched = problem.compiled, problem.gradient == "reversible", is_legacy_batchedtensor(grad_ys)
        method = undo if undoes else recompute
        if sweeps and not batched:  # is_grads_batched=True, which programs know nothing of
            method = sweeps.undo if undoes else sweeps.recompute
        within = _stand_ins(problem, lambda x: x.detach().requires_grad_())
        with ctx.ambient, problem.buffers or NOTHING, within as leaves:
            tape = Tape(problem.term, leaves, problem.audit, problem.narrow)
            tape.batched = batched
            moving = t is not None and ctx.needs_input_grad[2]
            grad_y0, grad_times = method(problem, grid, marks, grad_ys, tape, moving)
        problem.stats.num_backward_evaluations = tape.memo.num_evaluations
        grad_t = time_gradient(grid, t, grad_times) if moving else None
        grads = (total.to(p.dtype) for total, p in zip(tape.sums, tensors, strict=True))
        return None, grad_y0, grad_t, *grads


@torch.enable_grad()  # for what the tape records; the pair and the cotangents themselves never require a gradient
def undo(
    problem: Problem, grid: Grid, marks: dict[int, Pair], grad_ys: Tensor, tape: Tape, moving: bool
) -> tuple[Tensor | None, dict[int, Tensor | None]]:
    """Undo the steps from the last of the pairs in `marks`, differentiating each as it is undone."""
    scheme = problem.scheme
    grads = Grads()
    clock = _Clock(grid, tape, moving)
    pair = marks.pop(grid.num_steps)
    distances, sizes = [], [size_of(pair[0])]  # type: list[Tensor], list[Tensor]
    for start, stop in reversed(list(grid.runs(0, grid.num_steps, range(grid.num_steps) if moving else marks))):
        if (i := grid.output(stop)) is not None:
            grads.add(0, grad_ys[i])
        times = clock(start, stop)
        for move in reversed(moves(scheme, times, tape.memo.adds_up)):
            pair = pull_back(move, pair, grads, tape)
        if start in marks:
            tape.flush(grads)  # its graph need not be there with all that follows
            stored = marks.pop(start)
            distances.append(size_of(pair[0] - stored[0]))
            sizes.append(size_of(stored[0]))
            if start in grid.restarts:
                pair = (stored[0], pair[1])
                for update in reversed(scheme.restart):
                    pair = pull_back(over(update, times[0], times[1]), pair, grads, tape, restored=stored[1])
            pair, tape.audit_due = stored, True
    tape.flush(grads)
    if (i := grid.output(0)) is not None:
        grads.add(0, grad_ys[i])
    certify(problem, distances, sizes)
    return grads[0], clock.close()


def recompute(
    problem: Problem, grid: Grid, marks: dict[int, Pair], grad_ys: Tensor, tape: Tape, moving: bool
) -> tuple[Tensor | None, dict[int, Tensor | None]]:
    """Repeat segment after segment from its stored state, last one first, and differentiate each by itself."""
    grads: tuple[Tensor | None, ...] = (None, None)
    grad_times: dict[int, Tensor | None] = {}
    stop, end = grid.num_steps, marks.pop(grid.num_steps)[0]
    distances, sizes = [], [size_of(end)]  # type: list[Tensor], list[Tensor]
    for start in sorted(marks, reverse=True):
        leaves = [None if x is None else leaf_of(x) for x in marks[start]]
        times = (
            [torch.tensor(s, dtype=torch.float64, device="cpu") for s in grid.times[start : stop + 1]] if moving else []
        )
        with torch.enable_grad():
            times = [s.requires_grad_() for s in times]
            walk = Walk(problem.scheme, tape.memo)
            kept: Pair = (problem.widened(leaves[0]), leaves[1])  # type: ignore[arg-type]
            after, outputs = replay(problem, grid, kept, start, stop, times or grid.times[start : stop + 1], walk)
        distances.append(size_of(after[0].detach() - end))
        sizes.append(size_of(marks[start][0]))
        ends = [(x, g) for x, g in zip(after, grads, strict=True) if x is not None and g is not None]
        ends += [(y, grad_ys[i]) for i, y in outputs.items()]
        ends = [(x, g) for x, g in ends if x.requires_grad]
        inputs = [x for x in leaves if x is not None]
        tape.audit([x for x, _ in ends], [*inputs, *times, *tape.tensors])
        got = torch.autograd.grad(
            [x for x, _ in ends], [*inputs, *times, *tape.tensors], [g for _, g in ends], allow_unused=True
        )
        grads = (got[0], got[1] if len(inputs) == 2 else None)
        for n, grad in enumerate(got[len(inputs) : len(inputs) + len(times)]):
            grad_times[start + n] = accumulate(grad_times.get(start + n), grad)
        tape.add_up(got[len(inputs) + len(times) :])
        stop, end = start, marks[start][0]
    certify(problem, distances, sizes)
    grad_y0 = accumulate(grads[0], grad_ys[0]) if grid.outputs[0] == 0 else grads[0]
    return grad_y0, grad_times


class _Clock:
    """The recorded times; where gradients with respect to them are wanted, as leaves that the tape watches."""

    def __init__(self, grid: Grid, tape: Tape, moving: bool) -> None:
        self.times, self.tape, self.moving = grid.times, tape, moving
        self.leaves: dict[int, Tensor] = {}
        self.grads: dict[int, Tensor | None] = {}

    def __call__(self, start: int, stop: int) -> Sequence[Time]:
        """The times of the steps start..stop."""
        return [self._leaf(n) for n in range(start, stop + 1)] if self.moving else self.times[start : stop + 1]

    def _leaf(self, n: int) -> Tensor:
        if n not in self.leaves:
            self.leaves[n] = torch.tensor(self.times[n], dtype=torch.float64, device="cpu", requires_grad=True)
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


def keep_in(problem: Problem, marks: list[tuple[int, Pair]]) -> Callable[[int, Pair], None]:
    """Keep the pair at every restart and anchor; a checkpointed gradient keeps every sqrt(n)-th only."""

    def store(n: int, pair: Pair) -> None:
        if problem.gradient == "reversible" or not marks or n - marks[-1][0] >= math.isqrt(n):
            marks.append((n, pair))

    return store


def _differentiable_gradient(
    problem: Problem, grid: Grid, y0: Tensor, t: Tensor | None, grad_ys: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradient as a differentiable function of all inputs, for higher derivatives: replayed with everything kept."""
    with Gate() as gate, _stand_ins(problem, gate) as tensors:
        y, s = gate(y0), None if t is None else gate(t)
        ys = torch.stack(replay_all(problem, grid, y, s))
        inputs = [x for x in (y, s, *tensors) if x is not None and x.requires_grad]
        got = torch.autograd.grad(ys, inputs, grad_ys, create_graph=True, allow_unused=True)
    found = {id(x): g for x, g in zip(inputs, got, strict=True)}
    return tuple(None if x is None else found.get(id(x)) for x in (y, s, *tensors))


@contextmanager
def _stand_ins(problem: Problem, make: Callable[[Tensor], Tensor]) -> Iterator[Sequence[Tensor]]:
    """The tensors to differentiate by: those of the problem, or stand-ins where one was computed from another or has
    hooks, which are to see the gradient of the solve alone."""
    if not (problem.stand_in or any(map(has_hooks, problem.tensors))):  # hooks may be new
        yield problem.tensors
        return
    with StandIns(problem.tensors, make) as mode:
        yield mode.tensors


def time_gradient(grid: Grid, t: Tensor, grads: dict[int, Tensor | None]) -> Tensor:
    """The gradient of the output times, from those of all recorded times."""
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    rows = [g if (g := grads.get(n)) is not None else zero for n in range(len(grid.times))]
    with torch.enable_grad():
        leaf = t.detach().requires_grad_()
        return torch.autograd.grad(moments(grid, leaf), leaf, torch.stack(rows).to(t.device))[0]


def certify(problem: Problem, distances: Sequence[Tensor], sizes: Sequence[Tensor]) -> None:
    """Judge how far what was reconstructed lies from what was stored, segment by segment, relative to the larger of the `sizes`
    of the states at its ends; a gradient is never silently wrong. One device read."""
    if capturing():
        return
    kind = torch.finfo(distances[0].dtype)
    found = torch.stack([*distances, *sizes]).tolist()
    ends = itertools.pairwise(found[len(distances) :])
    relative = [distance / max(*size, kind.tiny) for distance, size in zip(found, ends, strict=False)]
    worst = math.inf if any(map(math.isnan, relative)) else max(relative)
    problem.stats.reconstruction_error = worst
    done, remedies = "repeating", "make sure that the field is deterministic"
    if problem.gradient == "reversible":
        done, remedies = "undoing", f"{problem.remedy}, {remedies}, or use gradient='checkpoint'"
    if not math.isfinite(worst):
        raise RuntimeError(
            f"{done} the steps gave a state that is not finite, so the gradient would be wrong: {remedies}."
        )
    limit = math.sqrt(problem.rounding or kind.eps)
    if worst > limit:
        warnings.warn(
            f"{done} the steps missed the stored states by {worst:.1e} (relative), more than {limit:.1e}: the gradient may be "
            f"that inaccurate. Remedies: {remedies}.",
            ReconstructionWarning,
            stacklevel=2,
        )
