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

from revsolve.backends import CompilationError, TensorControl
from revsolve.backends.inductor.adaptive import CompiledSteps
from revsolve.backends.inductor.checkpoints import recompute
from revsolve.backends.inductor.context import CompileContext
from revsolve.backends.inductor.control_table import Tabulated, Untabulated
from revsolve.backends.inductor.options import Compiler, compiler
from revsolve.backends.inductor.segments import Backward, Forward
from revsolve.backends.inductor.torch_internals import LOWEST, is_batched, supported
from revsolve.core import gradient
from revsolve.core.coupling import Pair
from revsolve.core.gradient import certify
from revsolve.core.integrate import conclude, last_step, march, segments_of, size_of, stays
from revsolve.core.modes import Modes
from revsolve.core.problem import Problem
from revsolve.core.stepper import Adaptive, FixedGrid, Grid
from revsolve.core.tape import Grads, Memo, Tape


class InductorBackend:
    """Marches, undoes and recomputes by programs, in the place of the functions of these names."""

    def __init__(self, by: Compiler, source: TensorControl | None) -> None:
        self.compiler, self.source = by, source

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
        source = self.source
        table = Untabulated(term) if source is None else Tabulated(term, source, problem.scheme, grid, most)
        self.context = CompileContext(problem, table, grid, y0, self.compiler, graded=store is not None)
        modes = Modes(problem.scheme, Memo(term))
        ahead = Forward(self.context, grid, y0, modes if segments.judged else None)
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
        ys, pair, grid = march(problem, problem.field.term, y0, store, functools.partial(CompiledSteps, self.compiler))
        if store is not None:
            table = Untabulated(problem.field.term)
            self.context = CompileContext(problem, table, grid, y0, self.compiler, graded=True)
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
        if is_batched(grad_ys):  # is_grads_batched=True, which programs know nothing of
            return gradient.undo(problem, grid, marks, grad_ys, tape, moving)
        back = Backward(self.context, grad_ys, tape)
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
        if is_batched(grad_ys):
            return gradient.recompute(problem, grid, marks, grad_ys, tape, moving)
        return recompute(self.context, problem, grid, marks, grad_ys, tape), {}


def compiled(
    problem: Problem, given: Any, x0: Tensor, moving: Tensor | None = None, source: TensorControl | None = None
) -> Problem:
    """The problem, solved by programs, as `compile=` says. `source` is what drives the term, such as noise."""
    if not supported():
        raise CompilationError(
            f"compile= needs torch {'.'.join(map(str, LOWEST))} or newer, but this is torch {torch.__version__}: leave it out."
        )
    by = compiler(given)
    if moving is not None:
        raise ValueError("compile= has no gradients with respect to times: detach t, or leave out compile=.")
    _check(problem, x0, source)
    if x0.is_complex() and by.backend == "inductor":
        raise ValueError(
            "inductor has no complex numbers: split the state into real and imaginary part, or leave out compile=."
        )
    stepper = problem.make_stepper()
    _check_steps(stepper, source)
    field: Any = problem.field
    return replace(problem, make_stepper=lambda: stepper, field=field.unguarded(), backend=InductorBackend(by, source))


def _check(problem: Problem, x0: Tensor, source: TensorControl | None) -> None:
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


def _check_steps(stepper: Any, source: TensorControl | None) -> None:
    if not isinstance(stepper, FixedGrid if source else (FixedGrid, Adaptive)):
        raise ValueError(
            "compile= needs steps that nobody watches, fixed ones where noise or a path drives the equation, and no tol: give "
            "options={'step_size': ...} or dt, no progress and no callback, or leave out compile=."
        )
