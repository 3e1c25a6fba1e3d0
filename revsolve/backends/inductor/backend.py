"""The march and its undoing as compiled programs: a call or two a segment, with the numbers of the eager solve.

The same grid, restarts and updates: only what lies between two restarts is a program, recorded from the same `advance` and
`pull_back`. What happens once a segment (restarts, stored pairs, the certificate) is done as without compilation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from revsolve.backends import CompilationError, TensorControl
from revsolve.backends.inductor.adaptive import CompiledSteps
from revsolve.backends.inductor.compiler import Compiler, compiler
from revsolve.backends.inductor.context import CompileContext
from revsolve.backends.inductor.sweeps import Backward, Forward, recompute
from revsolve.backends.inductor.tables import Tabulated, Untabulated
from revsolve.backends.inductor.torch_internals import LOWEST, supported
from revsolve.core import gradient
from revsolve.core.certificate import Certificate
from revsolve.core.coupling import State, advance, scheduled
from revsolve.core.gradient import segments_back
from revsolve.core.integrate import finish, march, policy_of
from revsolve.core.problem import Checkpoints, Problem
from revsolve.core.restart import RestartPolicy
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Memo, Tape
from revsolve.field.functorch import batched_gradient
from revsolve.steppers.adaptive import Adaptive
from revsolve.steppers.fixed import FixedGrid


class InductorBackend:
    """Marches, undoes and recomputes by programs, in the place of the functions of these names."""

    def __init__(self, by: Compiler, owners: Sequence[Any], source: TensorControl | None) -> None:
        self.compiler, self.owners, self.source = by, owners, source

    def march(
        self, problem: Problem, y0: Tensor, store: Callable[[int, State], None] | None = None
    ) -> tuple[Tensor, State, Grid]:
        """Carry the pair from y0 over the whole grid; the states due as output, the last pair and the grid."""
        stepper = problem.make_stepper()
        if not isinstance(stepper, FixedGrid):
            return self._adapted(problem, y0.contiguous(), store)
        pair: State = (problem.widened(y0).contiguous(),)  # as programs give it back
        grid, term, scheme, source = stepper.grid, problem.field.term, problem.scheme, self.source
        memo, n = Memo(term), 0
        policy = policy_of(problem, stepper, memo)
        most = policy.longest(grid.num_steps)
        table = Untabulated(term) if source is None else Tabulated(term, source, scheme, grid, most)
        self.context = CompileContext(problem, self.owners, table, grid, y0, self.compiler, graded=store is not None)
        ahead = Forward(self.context, grid, y0, most)
        while n < grid.num_steps:
            begin, first_step = pair, grid.seen(n, n + 1, grid.times[n : n + 2])
            if scheme.reversible and (problem.restarts is not None or n == 0):
                grid.restarts.add(n)
                for update in scheme.restart:
                    pair = advance(scheduled(update, *first_step), pair, memo)
            if store is not None:
                store(n, begin if n else (y0,))
            n, pair = self._segment(policy, ahead, stepper, pair)
        beforehand = problem.field.take_first() is not None
        finish(
            problem, problem.field.term, stepper, pair[0], y0, beforehand + ahead.num_evaluations + memo.num_evaluations
        )
        return ahead.ys, pair, grid

    def _segment(self, policy: RestartPolicy, ahead: Forward, stepper: FixedGrid, pair: State) -> tuple[int, State]:
        """Carry the pair to the end of a segment, and the number of steps there: as far as it should go, then, with the gaps
        behind all of these steps known, to where the policy ends it."""
        ask, total, numbers = policy.begin(stepper, pair[0]), stepper.num_total, []  # type: int, int, list[float]
        while (start := stepper.num_steps) < total:
            stop = min(policy.foreseen(start), total)
            after = ahead(pair, start, stop, policy.weight)
            if policy.weight is not None:
                numbers = ahead.gaps[: stop - start].tolist()
            while ask <= stop and ask < total:
                stepper.num_steps = n = ask
                ask = policy.extend(stepper, functools.partial(_known, numbers, n - start - 1))
                if ask == n:
                    return n, after if n == stop else ahead(pair, start, n, policy.weight)
            stepper.num_steps, pair = stop, after
        return total, pair

    def _adapted(
        self, problem: Problem, y0: Tensor, store: Callable[[int, State], None] | None
    ) -> tuple[Tensor, State, Grid]:
        """The same with steps that follow their error, each attempted by a program."""
        make_step = functools.partial(CompiledSteps, self.compiler, self.owners, y0.real.dtype)
        ys, pair, grid = march(problem, problem.field.term, y0, store, make_step)
        if store is not None:
            table = Untabulated(problem.field.term)
            self.context = CompileContext(problem, self.owners, table, grid, y0, self.compiler, graded=True)
        return torch.stack(ys), pair, grid

    def undo(
        self, problem: Problem, grid: Grid, checkpoints: Checkpoints, grad_ys: Tensor, tape: Tape, times: Tensor | None
    ) -> Tensor | None:
        """Undo the segments from the last pair, differentiating each step as it is undone."""
        if batched_gradient(grad_ys):  # is_grads_batched=True, which programs know nothing of
            return gradient.undo(problem, grid, checkpoints, grad_ys, tape, times)
        back = Backward(self.context, grad_ys, tape)
        certificate = Certificate(problem, checkpoints, grid.num_steps)
        pair, grads = checkpoints.pop(grid.num_steps), Grads()
        for start, stop, stored in segments_back(problem, grid, checkpoints, tape):
            y = problem.widened(stored[0]).contiguous()
            undone = back(pair, grads, start, stop, (y, *stored[1:]), start in grid.restarts)
            certificate.compare(undone, y, y)
            pair = stored
        tape.memo.num_evaluations += back.num_evaluations
        certificate.check()
        grads.add(0, grad_ys[0] if grid.outputs[0] == 0 else None)
        return grads[0]

    def recompute(
        self, problem: Problem, grid: Grid, checkpoints: Checkpoints, grad_ys: Tensor, tape: Tape, times: Tensor | None
    ) -> Tensor | None:
        """Repeat segment after segment from its stored state, last one first, and differentiate its steps one by one."""
        if batched_gradient(grad_ys):
            return gradient.recompute(problem, grid, checkpoints, grad_ys, tape, times)
        return recompute(self.context, problem, grid, checkpoints, grad_ys, tape)


def _known(numbers: list[float], n: int, weight: Tensor) -> float:
    return numbers[n]


def compiled(
    problem: Problem,
    owners: Sequence[Any],
    given: Any,
    x0: Tensor,
    moving: Tensor | None = None,
    source: TensorControl | None = None,
) -> Problem:
    """The problem, solved by programs, as `compile=` says. `source` is what drives the term, such as noise."""
    if not supported():
        raise CompilationError(
            f"compile= needs torch {'.'.join(map(str, LOWEST))} or newer, but this is torch {torch.__version__}: leave it out."
        )
    by, stepper, field = compiler(given), problem.make_stepper(), problem.field  # type: Compiler, Any, Any
    taken = FixedGrid if source else (FixedGrid, Adaptive)
    refused = {
        "inside torch.func transforms and torch.compile, the solve is traced as it is:": (
            problem.followed or problem.operation is not None
        ),
        "compile= has no gradients with respect to times: detach t, or": moving is not None,
        f"compile= works on the CPU so far, but the state is on {x0.device}:": x0.device.type != "cpu",
        "inductor has no complex numbers: split the state into real and imaginary part, or": (
            x0.is_complex() and by.backend == "inductor"
        ),
        "compile= needs a field that draws no random numbers and changes no buffers: call .eval() on it, or": (
            bool(field.repeats or field.lent)
        ),
        "gradient='direct' keeps every operation, which a program does not: use another, or": problem.gradient
        == "direct",
        "compile= needs steps that nobody watches (no progress bar, no callback), fixed steps in cdeint and sdeint, no "
        "tol (tol=0) in fixed_point: change that, or": not isinstance(stepper, taken),
        f"compile= takes no jump_t with method {problem.scheme.name!r}, whose velocity jumps with the field: use one like "
        "'reversible_heun' or 'rev_rk4', or": (
            problem.scheme.has_velocity and bool(getattr(stepper, "jumps", stepper.grid.jumps))
        ),
    }
    for why, applies in refused.items():
        if applies:
            raise ValueError(f"{why} leave out compile=.")
    return replace(
        problem, make_stepper=lambda: stepper, field=field.unguarded(), backend=InductorBackend(by, owners, source)
    )
