"""Segments ahead and back as sweeps, recorded from the code that solves eagerly.

A step of a program runs from behind the lead of a step (`lead_and_rest`) to behind that of the next. The differences at the
start of a segment (a restart, the first lead) and at its end are recorded around the steps. For checkpointed gradients steps are
repeated from a stored pair, those before each kept, then differentiated one by one: they need not be steps that can be undone.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from revsolve.backends.inductor.context import CompileContext, SegmentSweep, cotangent
from revsolve.backends.inductor.programs import Constants, Tensors, detached_clones
from revsolve.backends.inductor.tables import around, at, counter, row
from revsolve.core.certificate import Certificate
from revsolve.core.coupling import State
from revsolve.core.gradient import known_source, widened
from revsolve.core.integrate import defect, size_of
from revsolve.core.problem import Checkpoints, Problem
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Tape


class Forward(SegmentSweep):
    """Carries pairs ahead over segments; `ys` are the outputs, `gaps` those after each step of the latest call, up to `most`."""

    def __init__(self, context: CompileContext, grid: Grid, y0: Tensor, most: int) -> None:
        super().__init__(context)
        self.ys = y0.new_empty(len(grid.outputs), *y0.shape)
        self.ys[0] = y0
        self.gaps = y0.new_empty(1 << (most - 1).bit_length(), dtype=y0.dtype.to_real())  # few sizes, so few programs

    def __call__(self, pair: State, start: int, stop: int, weight: Tensor | None) -> State:
        """The pair after the steps start..stop; gaps are measured if there is a weight."""
        context, given = self.context, [x.contiguous() for x in pair]
        constant = context.constants(start, stop, weight=() if weight is None else (weight.contiguous(),))
        name, changed = ("forward", weight is not None, len(self.gaps)), [self.ys, self.gaps]
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
            if before and constant["weight"]:
                found = size_of(
                    defect(context.scheme, pair, before[0], (t1 - t0).to(gaps.dtype)) * constant["weight"][0]
                )
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
        given = [*pair, *_filled(grads, torch.zeros_like(pair[0], dtype=context.problem.state_dtype))]
        known = known_source(context.scheme, stored, restart)
        constant = context.constants(stop, start, stored=stored[0], grad_ys=self.grad_ys)
        constant["known"] = () if known is None else (known,)
        program = context.differentiating, ("backward", restart), self
        undone, grads[0], grads[1] = context.run(*program, (stop, start), given, constant, self.sums)
        return undone

    def step(self, n: Tensor, stop: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        context, controls, known = self.context, constant["controls"], constant["known"]
        t0, t1, after, t2 = around(constant["times"], n - 1, constant["first"])
        pair, grads = tuple(carried[:2]), Grads(*carried[2:])
        exactly = (lambda x: torch.where(n - 1 == stop, known[0], x)) if known and not context.lead else None
        with self.differentiating("step", constant, changed) as tape:
            pair = context.pulled_back(context.lead, pair, after, t2, row(controls, n - stop), grads, tape)
            grads.add(0, cotangent(n, constant))
            pair = context.pulled_back(context.rest, pair, t0, t1, row(controls, n - 1 - stop), grads, tape, exactly)
            tape.flush(grads)
        return detached_clones(*pair, grads[0], grads[1])

    def end(self, n: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        grads = Grads(*carried[2:])
        with self.differentiating("end", constant, changed) as tape:
            undone = self.ended(n, tuple(carried[:2]), constant, grads, tape)
        return detached_clones(undone, *_filled(grads, torch.zeros_like(carried[2])))


def _filled(grads: Grads, zero: Tensor) -> list[Tensor]:
    """The cotangents of all members, with a zero where there is none."""
    return [zero if (grad := grads[member]) is None else grad for member in range(len(grads.totals))]


class Repeat(SegmentSweep):
    """Carries pairs ahead over steps that were taken before, keeping the pair with which each begins, up to `most` of them."""

    def __init__(self, context: CompileContext, most: int, y: Tensor) -> None:
        super().__init__(context)
        size, rows = 1 + context.scheme.reversible, 1 << (most - 1).bit_length()  # few sizes, so few programs
        self.kept = [y.new_empty(rows, *y.shape) for _ in range(size)]

    def __call__(self, pair: State, origin: int, start: int, stop: int, restart: bool) -> State:
        """The pair after the steps start..stop, before which z is reset if so said; what is kept of step n goes to the place
        n - origin."""
        context, self.restart = self.context, restart
        given = [x.contiguous() for x in (pair[:1] if restart else pair)]
        constant, name = context.constants(start, stop, origin=counter(origin)), ("repeat", len(self.kept[0]), restart)
        return tuple(context.run(context.programs, name, self, (start, stop), given, constant, self.kept))

    def begin(self, n: Tensor, given: Tensors, constant: Constants) -> Tensors:
        return detached_clones(*self.begun(n, tuple(given), constant))

    def step(self, n: Tensor, stop: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        context, controls, done = self.context, constant["controls"], n - constant["first"]
        t0, t1, after, t2 = around(constant["times"], n, stop)
        for x, kept in zip(carried, changed, strict=True):
            kept.index_copy_(0, (n - constant["origin"]).reshape(1), x[None])
        with self.evaluating("step", constant) as memo:
            pair = context.advanced(context.rest, tuple(carried), t0, t1, row(controls, done), memo)
            pair = context.advanced(context.lead, pair, after, t2, row(controls, done + 1), memo)
        return detached_clones(*pair)


class Differentiate(SegmentSweep):
    """Carries cotangents back over steps of which the first pairs were kept; what the tensors used get is added up on a tape."""

    def __init__(self, context: CompileContext, kept: list[Tensor], grad_ys: Tensor, tape: Tape) -> None:
        super().__init__(context)
        self.kept, self.grad_ys = kept, grad_ys.contiguous()
        self.differentiate_by(tape)

    def __call__(self, grads: Grads, origin: int, start: int, stop: int, stored: Tensor, restart: bool) -> None:
        """Change cotangents after the steps start..stop and a restart before them to those of the pair before, of which y is
        `stored`."""
        context, self.restart = self.context, restart
        given = [g.to(self.kept[0]).contiguous() for g in _filled(grads, torch.zeros_like(self.kept[0][0]))]
        more = {"stored": stored.contiguous(), "kept": self.kept, "grad_ys": self.grad_ys}
        constant = context.constants(stop, start, origin=counter(origin), **more)
        program = context.differentiating, ("differentiate", len(self.kept[0]), restart), self
        for member, grad in enumerate(context.run(*program, (stop, start), given, constant, self.sums)):
            grads[member] = grad

    def step(self, n: Tensor, stop: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        context, controls = self.context, constant["controls"]
        t0, t1, after, t2 = around(constant["times"], n - 1, constant["first"])
        with self.differentiating("step", constant, changed) as tape:
            begun = [row(x, n - 1 - constant["origin"]).detach().requires_grad_() for x in constant["kept"]]
            pair = context.advanced(context.rest, tuple(begun), t0, t1, row(controls, n - 1 - stop), tape.memo)
            y = context.narrowed(pair[0])
            pair = context.advanced(context.lead, pair, after, t2, row(controls, n - stop), tape.memo)
            outputs = [y, *(x for x in pair if x is not None)]
            found = tape.products(outputs, begun, [cotangent(n, constant), *carried])
        return detached_clones(*(torch.zeros_like(x) if g is None else g for x, g in zip(begun, found, strict=False)))

    def end(self, n: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        if len(carried) == 1:
            return carried
        pair, grads = tuple(row(x, n - constant["origin"]) for x in constant["kept"]), Grads(*carried)
        with self.differentiating("end", constant, changed) as tape:
            self.ended(n, pair, constant, grads, tape)
        return detached_clones(*_filled(grads, torch.zeros_like(constant["stored"])))


def recompute(
    context: CompileContext, problem: Problem, grid: Grid, checkpoints: Checkpoints, grad_ys: Tensor, tape: Tape
) -> Tensor | None:
    """Repeat segment after segment from its stored state, last one first, and carry cotangents back through its steps."""
    stop, certificate = grid.num_steps, Certificate(problem, checkpoints, grid.num_steps)
    end = checkpoints.pop(stop)[0]
    most = max(b - a for a, b in pairwise([*sorted(checkpoints), stop]))
    repeat = Repeat(context, most, problem.widened(end))
    differentiate, grads = Differentiate(context, repeat.kept, grad_ys, tape), Grads(*[None] * len(repeat.kept))
    for start in sorted(checkpoints, reverse=True):
        pair = widened(problem, checkpoints[start])
        runs = list(pairwise([start, *(n for n in range(start + 1, stop) if n in grid.restarts), stop]))
        stored: list[Tensor] = []
        for a, b in runs:
            stored.append(pair[0])
            pair = repeat(pair, start, a, b, a in grid.restarts)
        certificate.compare(pair[0], end, checkpoints[start][0])
        for (a, b), before in zip(reversed(runs), reversed(stored), strict=True):
            differentiate(grads, start, a, b, before, a in grid.restarts)
        stop, (end, *_) = start, checkpoints.pop(start)
    tape.memo.num_evaluations += repeat.num_evaluations + differentiate.num_evaluations
    certificate.check()
    if (grad := grads[0]) is not None:
        grads[0] = problem.narrowed(grad)
    grads.add(0, grad_ys[0] if grid.outputs[0] == 0 else None)
    return grads[0]
