"""How a solve goes through torch.func: its rules for gradients, gradients of gradients, and batches.

`Solve` and `Gradient` are differentiable operations that torch hands down from transform to transform, until at the lowest level
there are plain tensors: the march and the sweeps of the engine run there, on the whole batch, and keep what they always keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from revsolve.core.coupling import Pair
from revsolve.core.gradient import keep_in, recompute, time_gradient, undo
from revsolve.core.integrate import Problem, march, replay_all
from revsolve.core.replay import Ambient, Unchanged
from revsolve.core.stepper import Grid
from revsolve.core.tape import Tape
from revsolve.field.batch import Batch, Opening, Sample


def solve(problem: Problem, y0: Tensor, t: Tensor | None) -> Tensor:
    """The states at the output times, stacked: (len(t), *y0.shape), for a field that takes `problem.tensors` from outside."""
    stepper = problem.make_stepper()
    problem.make_stepper = lambda: stepper
    run = _Run(problem, Sample(problem.term, problem.tensors), Ambient.now(), Unchanged(problem.constants))
    ys: Tensor = Solve.apply(run, y0, t, *problem.tensors)[0]
    problem.grid = run.grid
    return ys


@dataclass
class _Run:
    """A solve as the transforms hand it down, and what it leaves behind besides tensors."""

    problem: Problem
    opening: Opening
    ambient: Ambient
    unchanged: Callable[[], None]
    grid: Grid | None = None
    marked: Sequence[int] = ()  # the steps at which pairs were kept; the first is y0 alone
    lone: bool = False  # whether pairs are y alone

    def forward(self, y0: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        marks: list[tuple[int, Pair]] = []
        with self.opening(tensors) as term:
            problem = replace(self.problem, term=term)
            ys, last = march(problem, y0.detach(), keep_in(problem, marks))
        kept = [x for pair in (*(pair for _, pair in marks[1:]), last) for x in pair if x is not None]
        self.grid, self.marked, self.lone = problem.grid, [n for n, _ in marks], last[1] is None
        self.problem.stats.num_stored_states = 1 + len(kept)
        return torch.stack(ys), *kept

    def gradient(
        self,
        needed: Sequence[bool],
        grad_ys: Tensor,
        y0: Tensor,
        t: Tensor | None,
        tensors: Sequence[Tensor],
        kept: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        assert self.grid is not None
        members = iter(kept)
        pairs: list[Pair] = [(y0.detach(), None)]
        pairs += [(y, None if self.lone else next(members)) for y in members]
        marks = dict(zip((*self.marked, self.grid.num_steps), pairs, strict=True))
        leaves = [
            x.detach().requires_grad_() if needs else x.detach() for x, needs in zip(tensors, needed[2:], strict=True)
        ]
        sweep = undo if self.problem.gradient == "reversible" else recompute
        with self.ambient, self.opening(leaves) as term:
            problem = replace(self.problem, term=term)
            tape = Tape(term, [x for x in leaves if x.requires_grad], self.problem.audit, self.problem.narrow)
            grad_y0, grad_times = sweep(problem, self.grid, marks, grad_ys, tape, needed[1])
        self.problem.stats.num_backward_evaluations = tape.memo.num_evaluations
        found = [torch.zeros_like(y0) if grad_y0 is None else grad_y0] if needed[0] else []
        if needed[1]:
            assert t is not None
            found.append(time_gradient(self.grid, t, grad_times))
        return *found, *(total.to(p.dtype) for total, p in zip(tape.sums, tape.tensors, strict=True))

    def replayed(self, y0: Tensor, t: Tensor | None, *tensors: Tensor) -> Tensor:
        """The solve again, with everything kept."""
        assert self.grid is not None
        with self.ambient, self.opening(tensors) as term:
            return torch.stack(replay_all(replace(self.problem, term=term), self.grid, y0, t))

    def for_batch(self, size: int, own: tuple[bool, ...], randomness: str) -> _Run:
        """The same for all samples at once; tensors marked in `own` have a sample's own values in the leading dimension."""
        opening = Batch(self.opening, own, size, randomness)
        return replace(self, opening=opening, problem=replace(self.problem, explain=_explain_batch))


class Solve(torch.autograd.Function):
    """(run, y0, t, *tensors) -> the states at the output times, and the pairs that were kept."""

    @staticmethod
    def forward(run: _Run, y0: Tensor, t: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        return run.forward(y0, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[1:], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_ys: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        ctx.run.unchanged()
        needed = ctx.needs_input_grad[1:]
        found = iter(Gradient.apply(ctx.run, needed, grad_ys, *ctx.saved_tensors))
        return None, *(next(found) if needs else None for needs in needed)

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: _Run, y0: Tensor, t: Tensor | None, *tensors: Tensor) -> tuple[Any, Any]:
        dims = in_dims[3:]
        below = run.for_batch(info.batch_size, tuple(dim is not None for dim in dims), info.randomness)
        rows = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]
        ys, *kept = Solve.apply(below, _rows(y0, in_dims[1], info.batch_size), t, *rows)
        run.grid, run.marked, run.lone = below.grid, below.marked, below.lone
        return (ys, *kept), (1, *(0 for _ in kept))


class Gradient(torch.autograd.Function):
    """(run, needed, grad_ys, y0, t, *tensors, *kept) -> the gradients of those among y0, t and tensors that are needed."""

    @staticmethod
    def forward(
        run: _Run, needed: Sequence[bool], grad_ys: Tensor, y0: Tensor, t: Tensor | None, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        tensors, kept = rest[: len(needed) - 2], rest[len(needed) - 2 :]
        return run.gradient(needed, grad_ys, y0, t, tensors, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.run, ctx.needed, *given = inputs
        ctx.save_for_backward(*given[: len(ctx.needed) + 1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The derivative of a derivative: of the replayed solve, by torch.func itself."""
        run, needed, saved = ctx.run, ctx.needed, ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 : 2 + len(saved)]  # among grad_ys, y0, t and tensors

        def gradient(*chosen: Tensor) -> tuple[Tensor, ...]:
            grad_ys, *inputs = _filled(saved, wanted, chosen)
            pull = vjp(lambda *xs: run.replayed(*_filled(inputs, needed, xs)), *_chosen(inputs, needed))[1]
            return pull(grad_ys)

        pull = vjp(gradient, *_chosen(saved, wanted))[1]
        found = _filled([None] * len(saved), wanted, pull(tuple(grads)))
        return None, None, *found, *(None for _ in ctx.needs_input_grad[2 + len(saved) :])

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: _Run, needed: Sequence[bool], *given: Tensor | None) -> tuple[Any, Any]:
        dims, size, split = in_dims[2:], info.batch_size, len(needed) + 1
        if given[2] is not None:  # steps of one sample cannot move alone, so those of each are undone by themselves
            each = [
                Gradient.apply(run, needed, *(_sample(x, dim, i) for x, dim in zip(given, dims, strict=True)))
                for i in range(size)
            ]
            return tuple(map(torch.stack, zip(*each, strict=True))), 0
        new = all(
            dim is None for dim in dims[split:]
        )  # this batch is one of cotangents, of which the solve knew nothing
        below = run.for_batch(size, (True,) * (split - 3), "same" if new else info.randomness)
        grad_ys, *inputs = (x if x is None else _rows(x, dim, size) for x, dim in zip(given, dims, strict=True))
        assert grad_ys is not None
        return Gradient.apply(below, needed, grad_ys.movedim(0, 1), *inputs), 0


def _explain_batch(t: float, y: Tensor) -> str:
    return f"the state of a sample is not finite after t = {t}: solve that sample outside of torch.vmap to see why."


def _rows(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x with one entry for every sample in the leading dimension."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _sample(x: Tensor | None, dim: int | None, i: int) -> Tensor | None:
    return x if x is None or dim is None else x.select(dim, i)


def _chosen(xs: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    return [x for x, wanted in zip(xs, mask, strict=True) if wanted]


def _filled(xs: Sequence[Any], mask: Sequence[bool], chosen: Sequence[Any]) -> list[Any]:
    """xs, with the chosen ones put where the mask says."""
    found = iter(chosen)
    return [next(found) if wanted else x for x, wanted in zip(xs, mask, strict=True)]
