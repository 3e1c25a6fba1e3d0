"""The march and its undoing as compiled programs: a call or two a segment, with the numbers of the eager solve.

The same grid, restarts and updates: only what lies between two restarts is a program, recorded from the same `advance` and
`pull_back`. What happens once a segment (restarts, stored pairs, the certificate) is done as without compilation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from revsolve.backends.inductor.attempts import Attempts
from revsolve.backends.inductor.compiler import Compiler, compiler
from revsolve.backends.inductor.driven import Driven, Source, Undriven
from revsolve.backends.inductor.recorded import Ahead, Back
from revsolve.backends.inductor.repeated import recompute
from revsolve.backends.inductor.setting import Setting
from revsolve.core import gradient
from revsolve.core.coupling import Pair
from revsolve.core.gradient import certify
from revsolve.core.integrate import conclude, last_step, march, segments_of, size_of, stays
from revsolve.core.modes import Modes
from revsolve.core.problem import Problem
from revsolve.core.stepper import Adaptive, FixedGrid, Grid
from revsolve.core.tape import Grads, Memo, Tape


class Compiled:
    """How a problem is solved by programs; `march` and `undo` do what the functions of these names do."""

    def __init__(self, way: Compiler, source: Source | None) -> None:
        self.way, self.source = way, source

    def march(
        self, problem: Problem, y0: Tensor, store: Callable[[int, Pair], None] | None = None
    ) -> tuple[Tensor, Pair, Grid]:
        """Carry the pair from y0 over the whole grid; the states due as output, the last pair and the grid."""
        stepper = problem.make_stepper()
        if not isinstance(stepper, FixedGrid):
            return self._adapted(problem, y0.contiguous(), store)
        pair: Pair = (problem.widened(y0).contiguous(), None)  # as programs give it back
        grid, segments = stepper.grid, segments_of(problem, stepper)
        most = segments.longest if segments.resets else segments.length
        term = problem.field.term
        driven = Undriven(term) if self.source is None else Driven(term, self.source, problem.scheme, grid, most)
        self.setting = Setting(problem, driven, grid, y0, self.way)
        modes = Modes(problem.scheme, Memo(term))
        ahead = Ahead(self.setting, grid, y0, modes if segments.judged else None)
        as_foreseen = True  # was the length of the latest segment; else the next one's first step is taken alone
        while not stepper.done:
            start, begin = stepper.num_steps, pair
            restart = problem.scheme.reversible and (segments.resets or start == 0)
            segments.begin(start)
            foreseen = min(start + segments.foreseen, grid.num_steps)
            stop = foreseen if as_foreseen else start + 1
            stepper.num_steps, pair = stop, ahead(begin, start, stop, restart)
            if segments.judged:
                first, *numbers = ahead.numbers.tolist()
                segments.start(first, abs(last_step(grid, start + 1)))
                stepper.num_steps = min(start + segments.length, grid.num_steps)
                as_foreseen = stepper.num_steps == foreseen
                if stepper.num_steps != stop:
                    pair = ahead(begin, start, stepper.num_steps, restart)
                    _, *numbers = ahead.numbers.tolist()
                if not stays(segments, modes, stepper, start, pair[0].dtype, numbers[: 2 if stepper.done else None]):
                    pair = begin
                    stepper.rewind(start)
                    continue
            if restart:
                grid.restarts.add(start)
            if store is not None:
                store(start, begin if start else (y0, None))
        beforehand = problem.field.take_first() is not None
        conclude(problem, problem.field.term, stepper, pair[0], y0, beforehand + ahead.num_evaluations)
        return ahead.ys, pair, grid

    def _adapted(
        self, problem: Problem, y0: Tensor, store: Callable[[int, Pair], None] | None
    ) -> tuple[Tensor, Pair, Grid]:
        """The same with steps that follow their error, each attempted by a program."""
        ys, pair, grid = march(problem, problem.field.term, y0, store, functools.partial(Attempts, self.way))
        if store is not None:
            self.setting = Setting(problem, Undriven(problem.field.term), grid, y0, self.way)
        return torch.stack(ys), pair, grid

    def undo(
        self,
        problem: Problem,
        grid: Grid,
        marks: dict[int, Pair],
        grad_ys: Tensor,
        tape: Tape,
        moving: bool,
    ) -> tuple[Tensor | None, dict[int, Tensor | None]]:
        """Undo the segments from the last pair, differentiating each step as it is undone."""
        if is_legacy_batchedtensor(grad_ys):  # is_grads_batched=True, which programs know nothing of
            return gradient.undo(problem, grid, marks, grad_ys, tape, moving)
        back = Back(self.setting, grad_ys, tape)
        grads, missed = Grads(), []  # type: Grads, list[Tensor]
        stop, pair = grid.num_steps, marks.pop(grid.num_steps)
        end = size_of(pair[0])
        for start in sorted(marks, reverse=True):
            stored = marks.pop(start)
            y = problem.widened(stored[0]).contiguous()
            missed.append(back(pair, grads, start, stop, y, start in grid.restarts))
            pair, stop = stored, start
        tape.memo.num_evaluations += back.num_evaluations
        distances, sizes = torch.stack(missed).unbind(-1)
        certify(problem, distances.unbind(), [end, *sizes.unbind()])
        grads.add(0, grad_ys[0] if grid.outputs[0] == 0 else None)
        return grads[0], {}

    def recompute(
        self,
        problem: Problem,
        grid: Grid,
        marks: dict[int, Pair],
        grad_ys: Tensor,
        tape: Tape,
        moving: bool,
    ) -> tuple[Tensor | None, dict[int, Tensor | None]]:
        """Repeat segment after segment from its stored state, last one first, and differentiate its steps one by one."""
        if is_legacy_batchedtensor(grad_ys):
            return gradient.recompute(problem, grid, marks, grad_ys, tape, moving)
        return recompute(self.setting, problem, grid, marks, grad_ys, tape), {}


def compiled(
    problem: Problem, given: Any, x0: Tensor, moving: Tensor | None = None, source: Source | None = None
) -> Problem:
    """The problem, solved by programs, as `compile=` says. `source` is what drives the term, such as noise."""
    way = compiler(given)
    if moving is not None:
        raise ValueError("compile= has no gradients with respect to times: detach t, or leave out compile=.")
    _check(problem, x0, source)
    if x0.is_complex() and way.backend == "inductor":
        raise ValueError(
            "inductor has no complex numbers: split the state into real and imaginary part, or leave out compile=."
        )
    stepper = problem.make_stepper()
    _check_steps(stepper, source)
    field: Any = problem.field
    return replace(problem, make_stepper=lambda: stepper, field=field.unguarded(), backend=Compiled(way, source))


def _check(problem: Problem, x0: Tensor, source: Source | None) -> None:
    """Raise ValueError unless this can be compiled."""
    instead = "leave out compile="
    if problem.followed or problem.operation is not None:
        raise ValueError(f"inside torch.func transforms and torch.compile, the solve is traced as it is: {instead}.")
    if x0.device.type != "cpu":
        raise ValueError(f"compile= works on the CPU so far, but the state is on {x0.device}: {instead}.")
    field: Any = problem.field
    if field.repeats or field.lent is not None:
        raise ValueError(
            f"compile= needs a field that draws no random numbers and changes no buffers: call .eval() on it, or {instead}."
        )
    if problem.gradient == "direct":
        raise ValueError(
            f"gradient='direct' keeps every operation, which a program does not: use another, or {instead}."
        )


def _check_steps(stepper: Any, source: Source | None) -> None:
    if not isinstance(stepper, FixedGrid if source else (FixedGrid, Adaptive)):
        raise ValueError(
            "compile= needs steps that nobody watches, fixed ones where noise or a path drives the equation, and no tol: give "
            "options={'step_size': ...} or dt, no progress and no callback, or leave out compile=."
        )
