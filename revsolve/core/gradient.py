"""The gradient of a discrete solve, in three ways.

    reversible   undo the steps one by one, differentiating each as it is undone     keeps the last state and the restarts
    checkpoint   recompute segments of at most sqrt(N) steps from stored states      keeps so many states, and a segment's record
    direct       plain automatic differentiation through the steps                   keeps everything

All three give the gradient of the same discrete map. Every backward pass of a solve starts in `Solve.gradient`;
higher derivatives, and `direct`, are autograd's own. `Differentiable` is the one node that a solve is in its graph.
"""

from __future__ import annotations

import inspect
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time, accumulate
from revsolve.core.certificate import Certificate
from revsolve.core.coupling import Scheme, State, pull_back, schedule, scheduled, written
from revsolve.core.integrate import Walk, march, moments, replay, replay_all
from revsolve.core.problem import Checkpoints, Problem
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Memo, Tape, Term, leaf_of


def solve(problem: Problem, y0: Tensor, t: Tensor | None) -> Tensor:
    """The states at the output times, stacked: (len(t), *y0.shape)."""
    field, inputs = problem.field, (y0, t, *problem.field.tensors)
    if problem.operation is not None:
        return Differentiable.apply(problem.operation(problem), *inputs)[0]
    if problem.gradient != "direct" and torch.is_grad_enabled() and any(map(_requires_grad, inputs)):
        return Differentiable.apply(Solve(problem), *inputs)[0]
    if problem.gradient != "direct" or not (problem.followed or torch.is_grad_enabled()):
        with torch.no_grad():
            return states(problem, y0.detach())[0]
    if t is None:
        return states(problem, y0)[0]
    with torch.no_grad():
        _, _, grid = march(problem, field.term, y0)
    with field.as_solved():
        return torch.stack(replay_all(problem, field.term, grid, y0, t))


def _requires_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def states(
    problem: Problem, y0: Tensor, store: Callable[[int, State], None] | None = None
) -> tuple[Tensor, State, Grid]:
    """The states due as output, the last state and the grid."""
    if problem.backend is not None:
        return problem.backend.march(problem, y0, store)
    ys, state, grid = march(problem, problem.field.term, y0, store)
    return torch.stack(ys), state, grid


class Operation(Protocol):
    """What a node of the graph does: a function of tensors, its gradient, and what it is for a batch."""

    num_differentiable: int | None  # so many results have a gradient, the first ones; None: all

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]: ...

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs; saved are the inputs and the results without gradient."""
        ...

    def map_batch(self, info: Any, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> tuple[Any, Any]:
        """The results for all samples of a torch.vmap, and the dimensions in which samples lie."""
        ...


class Differentiable(torch.autograd.Function):
    """`operation(*inputs)` as one node of the graph of autograd, and of every level of torch.func."""

    @staticmethod
    def forward(operation: Operation, *inputs: Any) -> tuple[Tensor, ...]:
        return operation(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operation, *given = inputs
        first = ctx.operation.num_differentiable
        kept = () if first is None else output[first:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*given, *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_inference_mode_enabled():  # nothing could be recorded, and all gradients would be zero
            raise RuntimeError("the gradient of a solve needs autograd: take it outside of torch.inference_mode().")
        return None, *ctx.operation.backward(ctx, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: Any, operation: Operation, *inputs: Any) -> tuple[Any, Any]:
        return operation.map_batch(info, in_dims[1:], inputs)


# Asked for at every call: 30 us, if it is not known.
Differentiable.forward.__signature__ = inspect.signature(Differentiable.forward)  # type: ignore[attr-defined]


class Solve:
    """The solve of a problem as an operation: (y0, t, *tensors) to the states at the output times, and the pairs kept."""

    num_differentiable = 1

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.grid: Grid | None = None
        self.stored_after: list[int] = []  # the steps after which states were kept; the first is y0 alone
        self.num_members = 1  # of the others

    def __call__(self, y0: Tensor, t: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        problem = self.problem
        checkpoints: list[tuple[int, State]] = []
        ys, last, self.grid = states(problem, y0.detach(), store_in(problem, checkpoints))
        kept = self._keep(checkpoints, last)
        if problem.readable:
            problem.field.check_repeatable(
                partial(self.again, y0.detach()), self.grid.times[-1], problem.narrowed(last[0])
            )
        return ys, *kept

    def again(self, y0: Tensor) -> None:
        """Take the same steps once more."""
        assert self.grid is not None
        replay_all(self.problem, self.problem.field.term, self.grid, y0, None)

    def _keep(self, checkpoints: list[tuple[int, State]], last: State) -> list[Tensor]:
        """All members of the states kept, but y0; the statistics count them."""
        assert self.grid is not None
        numbers, states = zip(*checkpoints, (self.grid.num_steps, last), strict=True)
        kept = list(itertools.chain(*states[1:]))
        self.stored_after, self.num_members = list(numbers), len(last)
        self.problem.stats.num_stored_states = 1 + len(kept)
        return kept

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y0, t, *rest = ctx.saved_tensors  # unpacking checks that nothing was changed in place
        field, needed = self.problem.field, ctx.needs_input_grad[1:]
        tensors, grad_ys = rest[: len(field.tensors)], grads[0]
        if grad_ys is None:
            return (None,) * len(needed)
        with field.as_solved():
            if torch.is_grad_enabled():
                return self.differentiable_gradient(grad_ys, y0, t, tensors)
            checkpoints = self.checkpoints(y0, rest[len(tensors) :])
            del rest
            ctx.maybe_clear_saved_tensors()  # each pair is given back as soon as it has been passed, unless the graph is kept
            leaves = field.stand_ins(tensors, lambda x: x.detach().requires_grad_())
            return self.gradient(needed, grad_ys, t, leaves, checkpoints)

    def checkpoints(self, y0: Tensor, kept: Sequence[Tensor]) -> Checkpoints:
        """The states that were kept, by the steps after which."""
        states = zip(*[iter(kept)] * self.num_members, strict=True)
        return dict(zip(self.stored_after, [(y0.detach(),), *states], strict=True))

    def gradient(
        self,
        needed: Sequence[bool],
        grad_ys: Tensor,
        t: Tensor | None,
        leaves: Sequence[Tensor],
        checkpoints: Checkpoints,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of those among y0, t and tensors that are needed; `leaves` are the tensors, or stand for them."""
        problem, field, grid = self.problem, self.problem.field, self.grid
        assert grid is not None
        times = torch.tensor(grid.times, dtype=torch.float64, device="cpu", requires_grad=True) if needed[1] else None
        undoing, repeating = (
            (undo, recompute) if problem.backend is None else (problem.backend.undo, problem.backend.recompute)
        )
        sweep = undoing if problem.gradient == "reversible" else repeating
        wanted = [*itertools.compress(leaves, needed[2:]), *(() if times is None else (times,))]
        with field.at(leaves) as term:
            tape = Tape(term, wanted, field.audit(leaves), problem.state_dtype, field.differentiate)
            grad_y0 = sweep(problem, grid, checkpoints, grad_ys, tape, times)
        problem.stats.num_backward_evaluations = tape.memo.num_evaluations
        sums = iter(tape.sums)
        found = [next(sums).to(x.dtype) if needs else None for x, needs in zip(leaves, needed[2:], strict=True)]
        grad_t = None if times is None or t is None else time_gradient(grid, t, next(sums))
        return grad_y0 if needed[0] else None, grad_t, *found

    def differentiable_gradient(
        self, grad_ys: Tensor, y0: Tensor, t: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The gradient as a differentiable function of all inputs, for higher derivatives: replayed with everything kept."""
        assert self.grid is not None
        field = self.problem.field
        with Gate() as gate:
            start, times, stand_ins = gate(y0), None if t is None else gate(t), field.stand_ins(tensors, gate)
            inputs = [start, times, *stand_ins]
            audit = field.audit([x for x in inputs if x is not None])
            with field.at(stand_ins) as term:
                ys = torch.stack(replay_all(self.problem, term, self.grid, start, times))
            if audit is not None:
                audit([ys], [])
            wanted = [x for x in inputs if x is not None and x.requires_grad]
            got = torch.autograd.grad(ys, wanted, grad_ys, create_graph=True, allow_unused=True)
        found = {id(x): g for x, g in zip(wanted, got, strict=True)}
        return tuple(None if x is None else found.get(id(x)) for x in inputs)

    def map_batch(self, info: Any, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> tuple[Any, Any]:
        raise AssertionError("inside torch.func a problem brings an operation of its own")


class Gate:
    """Cuts tensors off from their history while the context is open, and joins them to it again afterwards.

    A gradient that is itself differentiable must not run into the history of its inputs while it is taken (the surrounding
    backward pass does that), but derivatives of it must. A view would do where no input was computed from another one, but a
    field may use the start itself, and what that was computed from.
    """

    def __enter__(self) -> Gate:
        self.shut = True
        return self

    def __exit__(self, *error: object) -> None:
        self.shut = False

    def __call__(self, x: Tensor) -> Tensor:
        return _Gated.apply(self, x)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Gate, x: Tensor) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        return None, None if ctx.gate.shut else grad


@torch.enable_grad()  # for what the tape records; the state and the cotangents themselves never require a gradient
def undo(
    problem: Problem, grid: Grid, checkpoints: Checkpoints, grad_ys: Tensor, tape: Tape, times: Tensor | None
) -> Tensor | None:
    """Undo the steps from the last of the `checkpoints`, differentiating each as it is undone: the gradient of y0. `times` are
    those recorded, among the tensors of the tape, if they have gradients."""
    scheme, member = problem.scheme, problem.scheme.updates[0].source  # which is read, not written, as a step begins
    certificate, state = Certificate(problem, checkpoints, grid.num_steps), checkpoints.pop(grid.num_steps)
    grads = Grads(*[None] * len(state))
    for start, stop, stored in segments_back(problem, grid, checkpoints, tape):
        # Merged steps share times, and the graph of a time is gone once it has been differentiated.
        for first, last in reversed(list(grid.runs(start, stop, None if times is None else 1))):
            if (i := grid.output(last)) is not None:
                grads.add(0, grad_ys[i])
            ends = grid.seen(first, last, taken(grid, times, first, last))
            path = schedule(scheme, ends, tape.memo.additive)
            for move in reversed(path[1:]):
                state = pull_back(move, state, grads, tape)
            certificate.follow(state[0])
            if first == start:  # all but the segment's first update has been undone
                if member == 0:
                    certificate.compare(state[0], stored[0], stored[0])
                # evaluated at the stored state: at a kink, the undone one could lie on the other side
                if (known := known_source(scheme, stored, start in grid.restarts)) is not None:
                    state = written(state, member, problem.widened(known))
            state = pull_back(path[0], state, grads, tape)
        tape.flush(grads)  # its graph need not be there with all that follows
        if member != 0:
            certificate.compare(state[0], stored[0], stored[0])
        if start in grid.restarts:
            state = written(state, 0, stored[0])
            for update in reversed(scheme.restart):
                state = pull_back(scheduled(update, ends[0], ends[1]), state, grads, tape, restored=stored)
        state = stored
    tape.flush(grads)
    if (i := grid.output(0)) is not None:
        grads.add(0, grad_ys[i])
    certificate.check()
    return grads[0]


def taken(grid: Grid, times: Tensor | None, start: int, stop: int) -> Sequence[Time]:
    """The times of the steps start..stop: numbers, or entries of `times`."""
    return grid.times[start : stop + 1] if times is None else [times[n] for n in range(start, stop + 1)]


def segments_back(
    problem: Problem, grid: Grid, checkpoints: Checkpoints, tape: Tape
) -> Iterator[tuple[int, int, State]]:
    """The segments, the last one first: the steps start..stop, and the state at the start, which is taken out of `checkpoints`.
    Restarts that were not kept are filled in before they are passed."""
    stop, missing = grid.num_steps, sorted(grid.restarts - checkpoints.keys())
    while stop > 0:
        start = max(checkpoints)
        if missing and missing[-1] > start:
            tape.memo.num_evaluations += refill(problem, tape.memo.term, grid, checkpoints, missing)
        else:
            yield start, stop, checkpoints.pop(start)
            stop = start


def refill(problem: Problem, term: Term, grid: Grid, checkpoints: Checkpoints, missing: list[int]) -> int:
    """Take the recorded steps from the last of the `checkpoints` on again, to add some at the restarts `missing` after it: as
    many as there is room for, the last included. The number of evaluations."""
    assert problem.restarts is not None
    start, memo, room = max(checkpoints), Memo(term), problem.restarts.capacity(grid.num_steps) - len(checkpoints)
    ahead = missing[bisect_right(missing, start) :]
    wanted = set(ahead[:: -math.ceil(len(ahead) / max(1, room))])
    state, walk = widened(problem, checkpoints[start]), Walk(problem.scheme, memo)
    with torch.no_grad():
        for a, b in itertools.pairwise([start, *ahead]):
            state, _ = replay(problem, grid, state, a, b, grid.times[a : b + 1], walk)
            if b in wanted:
                checkpoints[b] = state
    missing[:] = [n for n in missing if n not in wanted]
    return memo.num_evaluations


def known_source(scheme: Scheme, stored: State, restarted: bool) -> Tensor | None:
    """The member that the first update behind a stored state reads, if no evaluation is needed to know it."""
    member = scheme.updates[0].source
    if not (restarted and member):
        return stored[member]
    return None if any(update.increment is not None for update in scheme.restart) else stored[0]


def widened(problem: Problem, state: State) -> State:
    """The state as it goes on from where it was kept: y may have been kept as it is due as output."""
    return written(state, 0, problem.widened(state[0]))


def recompute(
    problem: Problem, grid: Grid, checkpoints: Checkpoints, grad_ys: Tensor, tape: Tape, times: Tensor | None
) -> Tensor | None:
    """Repeat segment after segment from its stored state, last one first, and differentiate each by itself."""
    grads: Sequence[Tensor | None] = (None,)
    stop, certificate = grid.num_steps, Certificate(problem, checkpoints, grid.num_steps)
    end = checkpoints.pop(stop)[0]
    for start in sorted(checkpoints, reverse=True):
        leaves, walk = tuple(map(leaf_of, checkpoints[start])), Walk(problem.scheme, tape.memo)
        with torch.enable_grad():
            ends = taken(grid, times, start, stop)
            after, outputs = replay(problem, grid, widened(problem, leaves), start, stop, ends, walk)
        certificate.compare(after[0].detach(), end, checkpoints[start][0])
        results, cotangents = [], []
        for x, grad in (*zip(after, grads, strict=False), *((y, grad_ys[i]) for i, y in outputs.items())):
            if x.requires_grad and grad is not None:
                results.append(x)
                cotangents.append(grad)
        grads = tape.products(results, leaves, cotangents)
        stop, end = start, checkpoints[start][0]
    certificate.check()
    return accumulate(grads[0], grad_ys[0]) if grid.outputs[0] == 0 else grads[0]


def store_in(problem: Problem, checkpoints: list[tuple[int, State]]) -> Callable[[int, State], None]:
    """Keep the state at the start of every segment; or of every 2nd, 4th, ... so that what is kept, and what the backward pass
    adds between two of these, fits in the capacity. A checkpointed gradient keeps as many as `checkpoint_spacing` says."""
    seen, spacing = 0, 1

    def store(n: int, state: State) -> None:
        nonlocal seen, spacing
        if problem.gradient != "reversible":
            if not checkpoints or n - checkpoints[-1][0] >= (problem.checkpoint_every or problem.checkpoint_spacing(n)):
                checkpoints.append((n, state))
            return
        if seen % spacing == 0:
            checkpoints.append((n, state))
        seen, room = seen + 1, math.inf if problem.restarts is None else problem.restarts.capacity(n)
        while len(checkpoints) > room or spacing < len(checkpoints) > room - spacing + 1:
            del checkpoints[1::2]
            spacing *= 2

    return store


def time_gradient(grid: Grid, t: Tensor, grad_times: Tensor) -> Tensor:
    """The gradient of the output times, from that of all recorded times."""
    with torch.enable_grad():
        leaf = t.detach().requires_grad_()
        times = moments(grid, leaf)
        return torch.autograd.grad(times, leaf, grad_times.to(times))[0]
