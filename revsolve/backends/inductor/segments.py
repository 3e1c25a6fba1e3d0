"""Segments ahead and back as sweeps, recorded from the code that solves eagerly.

A step of a program runs from behind the lead of a step (`lead_and_rest`) to behind that of the next. The differences at the
start of a segment (a restart, the first lead) and at its end are recorded around the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revsolve.backends.inductor.context import CompileContext, SegmentSweep, cotangent
from revsolve.backends.inductor.programs import Constants, Tensors, detached_clones
from revsolve.backends.inductor.tables import around, at, counter, row
from revsolve.core.coupling import Scheme, State
from revsolve.core.integrate import gap, size_of
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Tape


class Forward(SegmentSweep):
    """Carries pairs ahead over segments; `ys` are the outputs, `gaps` those after each step of the latest call, up to `most`."""

    def __init__(self, context: CompileContext, grid: Grid, y0: Tensor, most: int) -> None:
        super().__init__(context)
        self.ys = y0.new_empty(len(grid.outputs), *y0.shape)
        self.ys[0] = y0
        self.gaps = y0.new_empty(1 << (most - 1).bit_length(), dtype=y0.dtype.to_real())  # few sizes, so few programs

    def __call__(self, pair: State, start: int, stop: int, scale: Tensor | None) -> State:
        """The pair after the steps start..stop; gaps are measured if there is a scale."""
        context, given = self.context, [x.contiguous() for x in pair]
        constant = context.constants(first=counter(start), controls=context.term.table(start, stop))
        constant["scale"] = () if scale is None else (scale.contiguous(),)
        name = "forward", scale is not None, len(self.gaps)
        changed = [self.ys, self.gaps]
        return tuple(context.run(context.programs, name, self, (start, stop), given, constant, changed))

    def begin(self, n: Tensor, given: Tensors, constant: Constants) -> Tensors:
        return detached_clones(*self.begun(n, tuple(given), constant))

    def step(self, n: Tensor, stop: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        context, controls, (ys, gaps) = self.context, constant["controls"], changed
        pair = tuple(carried)
        t0, t1, after, t2 = around(constant["times"], n, stop)
        before, done = pair[1:], n - constant["first"]
        with self.evaluating("step", constant) as memo:
            pair = context.advanced(context.rest, pair, t0, t1, row(controls, done), memo)
            if before and constant["scale"]:
                found = size_of(gap(context.scheme, pair, before[0], (t1 - t0).to(gaps.dtype)) / constant["scale"][0])
                gaps.index_copy_(0, done.reshape(1), found.to(gaps.dtype)[None])
            output = at(constant["due"], n + 1)
            place = output.clamp(min=0).reshape(1)
            y = context.narrowed(pair[0])
            ys.index_copy_(0, place, torch.where(output >= 0, y[None], ys.index_select(0, place)))
            pair = context.advanced(context.lead, pair, after, t2, row(controls, done + 1), memo)
        return detached_clones(*pair)


class Backward(SegmentSweep):
    """Carries pairs and cotangents back over segments, and adds up the gradients of the tensors that the field uses on a tape."""

    def __init__(self, context: CompileContext, grad_ys: Tensor, tape: Tape) -> None:
        super().__init__(context)
        self.grad_ys = grad_ys.contiguous()
        self.differentiate_by(tape)

    def __call__(self, pair: State, grads: Grads, start: int, stop: int, stored: State, restart: bool) -> Tensor:
        """Change cotangents after the steps start..stop and a restart before them to those of the `stored` pair before; y as
        undone."""
        context, self.restart = self.context, restart
        y, z = pair
        zero = torch.zeros_like(y, dtype=context.problem.state_dtype)
        given = [y, z, *(zero if grad is None else grad for grad in (grads[0], grads[1]))]
        constant = context.constants(first=counter(stop), controls=context.term.table(start, stop), stored=stored[0])
        constant |= {"grad_ys": self.grad_ys, "known": _source(context.scheme, stored, restart)}
        program = context.differentiating, ("backward", restart), self
        undone, grads[0], grads[1] = context.run(*program, (stop, start), given, constant, self.sums)
        return undone

    def step(self, n: Tensor, stop: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        context, controls, known = self.context, constant["controls"], constant["known"]
        t0, t1, after, t2 = around(constant["times"], n - 1, constant["first"])
        pair, grads = tuple(carried[:2]), Grads(carried[2:])
        exactly = (lambda x: torch.where(n - 1 == stop, known[0], x)) if known and not context.lead else None
        with self.differentiating("step", constant, changed) as tape:
            pair = context.pulled_back(context.lead, pair, after, t2, row(controls, n - stop), grads, tape)
            grads.add(0, cotangent(n, constant))
            pair = context.pulled_back(context.rest, pair, t0, t1, row(controls, n - 1 - stop), grads, tape, exactly)
            tape.flush(grads)
        return detached_clones(*pair, grads[0], grads[1])

    def end(self, n: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        grads = Grads(carried[2:])
        with self.differentiating("end", constant, changed) as tape:
            undone = self.ended(n, tuple(carried[:2]), constant, grads, tape)
        found = [torch.zeros_like(carried[2]) if g is None else g for g in (grads[0], grads[1])]
        return detached_clones(undone, *found)


def _source(scheme: Scheme, stored: State, restarted: bool) -> list[Tensor]:
    """The member that the first update behind a stored pair reads, if no evaluation is needed to know it."""
    member = scheme.updates[0].source
    if not (restarted and member):
        return [stored[member]]
    return [] if any(update.increment is not None for update in scheme.restart) else [stored[0]]
