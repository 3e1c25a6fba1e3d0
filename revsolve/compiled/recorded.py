"""One step ahead and one step back as functions of tensors alone, recorded for programs from the code that solves eagerly.

Where a method evaluates the field at the end of a step and again at the start of the next, at the same state and time
(reversible Heun), a program's step runs from behind the first evaluation to behind that of the next step, so that both are one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from revsolve.compiled.driven import Driver, Undriven
from revsolve.compiled.programs import PROGRAMS, Compiler, Program, loop
from revsolve.compiled.transcript import Swap, derivative_transcript, transcript
from revsolve.core.arithmetic import Time, scaled_add
from revsolve.core.coupling import CouplingUpdate, Pair, Scheme, advance, over, pull_back
from revsolve.core.march import Problem, size_of
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Memo, Tape, Term

LEAST_TIMES = (
    64  # arrays over steps have this length, or the next power of two: another number of steps finds the same program
)
Updates = tuple[CouplingUpdate, ...]


class Setting:
    """What both directions share: the method's updates, the grid as tensors, the field and what it uses from outside."""

    def __init__(self, problem: Problem, grid: Grid, y: Tensor, way: Compiler, driver: Driver | Undriven) -> None:
        self.scheme, self.way, self.narrow, self.wide = problem.scheme, way, problem.narrow, problem.wide
        self.lead, self.rest = split(problem.scheme)
        self.term, self.driver = problem.term, driver
        self.call = problem.term, grid.times[0], y, grid.times[1], driver.first
        with driver:
            text, self.outside = transcript(*self.call)
        place = {id(x): i for i, x in enumerate(problem.tensors)}
        self.wanted = [(i, place[id(x)]) for i, x in enumerate(self.outside) if id(x) in place]
        self.times, self.due = _over_steps(tuple(grid.times), tuple(grid.outputs))
        states = (y.shape, y.stride(), y.dtype, self.wide, len(self.times), len(grid.outputs), driver.most)
        self.programs = PROGRAMS.made((problem.scheme, way, text, *surroundings(), *states))

    @cached_property
    def differentiating(self) -> dict[Hashable, Program]:
        """Those that differentiate what the field does, which its operations alone do not tell."""
        with self.driver:
            return self.programs.setdefault(derivative_transcript(*self.call, self.outside), {})

    def run(
        self,
        programs: dict[Hashable, Program],
        name: Hashable,
        step: Callable[..., Any],
        span: tuple[int, int],
        carried: list[Tensor],
        constant: list[Tensor],
        changed: range,
    ) -> tuple[list[Tensor], int]:
        """What is carried from the first of these step counts to the last by the program of this name, made now unless there is
        one; and how often it evaluated the field."""
        (start, stop), (first, last) = span, map(counted, span)
        if name not in programs:
            counts: list[int] = []
            repeat = loop(
                lambda *inputs: step(counts, *inputs), start < stop, first, carried, constant, changed, self.way
            )
            programs[name] = Program(repeat, counts[-1])
        _, *after = programs[name].run(first, *carried, last, *constant)
        return after, programs[name].num_evaluations * abs(stop - start)

    def zeros(self) -> list[Tensor]:
        """For the gradients of the tensors that the field uses; half precision ones in float32."""
        used = [self.outside[i] for i, _ in self.wanted]
        return [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in used]

    def hand_over(self, sums: list[Tensor], tape: Tape) -> None:
        """Add the gradients of the tensors that the field uses to those on the tape."""
        for total, (_, i) in zip(sums, self.wanted, strict=True):
            tape.sums[i] += total

    def cotangent(self, due: Tensor, grad_ys: Tensor, n: Tensor) -> Tensor:
        """That of the output after n steps, zero where none is due."""
        output = at(due, n)
        found = row(grad_ys, output.clamp(min=0))
        return torch.where(output >= 0, found, torch.zeros_like(found))

    def narrowed(self, y: Tensor) -> Tensor:
        return y if self.narrow is None else y.to(self.narrow)


class Ahead:
    """Carries pairs ahead over steps; `ys` are the outputs, `gap` is the parasitic part that the latest step left."""

    def __init__(self, setting: Setting, grid: Grid, y0: Tensor) -> None:
        self.setting, self.num_evaluations = setting, 0
        self.ys = y0.new_empty(len(grid.outputs), *y0.shape)
        self.ys[0] = y0
        self.gap = torch.zeros((), dtype=(setting.wide or y0.dtype).to_real(), device=y0.device)
        self.outside = [x.detach() for x in setting.outside]

    def __call__(self, pair: Pair, start: int, stop: int) -> Pair:
        if start == stop:
            return pair
        carried = [self.gap, *(x for x in pair if x is not None)]
        setting = self.setting
        table = setting.driver.table(start, stop)
        constant = [setting.times, setting.due, self.ys, counted(start), table, *self.outside]
        program = setting.programs, "ahead", self.step
        (self.gap, y, *rest), count = setting.run(*program, (start, stop), carried, constant, range(2, 3))
        self.num_evaluations += count
        return y, rest[0] if rest else None

    def parasitic(self, pair: Pair, h: float) -> Tensor:
        return self.gap

    def step(self, counts: list[int], n: Tensor, gap: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, size = self.setting, 2 if self.setting.scheme.reversible else 1
        y, z = inputs[0], inputs[1] if size == 2 else None
        stop, times, due, ys, first, table, *outside = inputs[size:]
        t0, t1, t2 = (at(times, i) for i in (n, n + 1, torch.minimum(n + 2, stop)))
        pair: Pair = (y, z)
        memo = Recalled(setting.term)
        with torch.no_grad(), Swap(setting.outside, outside), setting.driver:
            for update in setting.rest:
                setting.driver.turn(update, row(table, n - first))
                pair = advance(over(update, t0, t1), pair, memo)
            if z is not None and pair[1] is not None:
                gap = size_of(
                    (pair[1] - z) * (t1 - t0).to(gap.dtype) if setting.scheme.staggered else pair[0] - pair[1]
                )
            output = at(due, n + 1)
            place = output.clamp(min=0).reshape(1)
            y = setting.narrowed(pair[0])
            ys.index_copy_(0, place, torch.where(output >= 0, y[None], ys.index_select(0, place)))
            for update in setting.lead:  # after the last step over no time at all
                setting.driver.turn(update, row(table, n + 1 - first))
                pair = advance(over(update, t1, t2), pair, memo)
        counts.append(memo.num_evaluations)
        return n + 1, gap.clone(), *(x.clone() for x in pair if x is not None)


class Back:
    """Carries pairs and cotangents back over steps; `sums` are the gradients of the tensors that the field uses."""

    def __init__(self, setting: Setting, grad_ys: Tensor) -> None:
        self.setting, self.programs, self.num_evaluations = setting, setting.differentiating, 0
        self.grad_ys, self.sums = grad_ys.contiguous(), setting.zeros()
        self.outside = [x.detach() for x in setting.outside]

    def __call__(self, pair: Pair, grads: Grads, start: int, stop: int) -> Pair:
        """The pair before the steps start..stop, given that after them; `grads` are changed in place."""
        filled = [
            torch.zeros_like(pair[0], dtype=self.setting.narrow) if g is None else g for g in (grads[0], grads[1])
        ]
        y, z = pair
        assert z is not None
        setting, carried = self.setting, [y, z, *filled]
        table = setting.driver.table(start, stop)
        constant = [counted(stop), setting.times, setting.due, self.grad_ys, table, *self.outside, *self.sums]
        changed, program = range(len(constant) - len(self.sums), len(constant)), (self.programs, "back", self.step)
        (y, z, grads[0], grads[1]), count = setting.run(*program, (stop, start), carried, constant, changed)
        self.num_evaluations += count
        return y, z

    def step(self, counts: list[int], n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting = self.setting
        y, z, grad_y, grad_z, first, end, times, due, grad_ys, table, *others = inputs
        t0, t1, t2 = (at(times, i) for i in (n - 1, n, torch.minimum(n + 1, end)))
        outside, sums = others[: len(setting.outside)], others[len(setting.outside) :]
        leaves = [x.detach() for x in outside]
        tape = _Recorder(setting.term, [leaves[i].requires_grad_() for i, _ in setting.wanted], setting.narrow)
        pair: Pair = (y, z)
        grads = Grads(grad_y, grad_z)
        with torch.enable_grad(), Swap(setting.outside, leaves), setting.driver:
            for update in reversed(setting.lead):
                setting.driver.turn(update, row(table, n - first))
                pair = pull_back(over(update, t1, t2), pair, grads, tape)
            grads.add(0, setting.cotangent(due, grad_ys, n))
            for update in reversed(setting.rest):
                setting.driver.turn(update, row(table, n - 1 - first))
                pair = pull_back(over(update, t0, t1), pair, grads, tape)
            tape.flush(grads)
        for total, grad in zip(sums, tape.found, strict=True):
            if grad is not None:
                total.add_(grad.detach())
        counts.append(tape.memo.num_evaluations)
        return n - 1, *(x.detach().clone() for x in (*pair, grads[0], grads[1]) if x is not None)


class Recalled(Memo):
    """A memo that compares no numbers, for a recording has none."""

    def value(self, t: Time, x: Tensor) -> Any:
        if x is not self.latest[0] or t is not self.latest[1]:
            self.num_evaluations += 1
            self.latest = (x, t, self.term.value(t, x))
        return self.latest[2]


class _Recorder(Tape):
    """A tape whose gradients of tensors are results of the recording, `found`."""

    def __init__(self, term: Term, tensors: Sequence[Tensor], narrow: torch.dtype | None) -> None:
        super().__init__(term, tensors, lambda outputs, own: None, narrow)
        self.memo, self.audit_due = Recalled(term), False
        self.found: list[Tensor | None] = [None for _ in tensors]

    def add_up(self, grads: Sequence[Tensor | None], weight: float = 1.0, complete: bool = False) -> None:
        self.found = [
            total if grad is None else scaled_add(total, grad, weight)
            for total, grad in zip(self.found, grads, strict=True)
        ]


def advanced(updates: Updates, pair: Pair, grid: Grid, n: int, memo: Memo) -> Pair:
    """The pair after updates of step n."""
    for update in updates:
        pair = advance(over(update, grid.times[n], grid.times[n + 1]), pair, memo)
    return pair


def pulled_before(setting: Setting, grid: Grid, n: int, pair: Pair, stored: Pair, grads: Grads, tape: Tape) -> Tensor:
    """Carry cotangents from behind the restart, if any, and the lead of step n to the stored pair before them; y as undone."""
    t0, t1 = grid.times[n : n + 2]
    with torch.enable_grad():
        for update in reversed(setting.lead):
            pair = pull_back(over(update, t0, t1), pair, grads, tape)
        undone = pair[0]
        if n in grid.restarts:
            pair = (stored[0], pair[1])
            for update in reversed(setting.scheme.restart):
                pair = pull_back(over(update, t0, t1), pair, grads, tape, restored=stored[1])
        tape.flush(grads)
    return undone


def split(scheme: Scheme) -> tuple[Updates, Updates]:
    """The updates of a step, as those that belong to the end of the step before in a program, and the rest."""
    ahead = 1 if scheme.run is not None and scheme.updates[0].increment is not None else 0
    return scheme.updates[:ahead], scheme.updates[ahead:]


def surroundings() -> list[Hashable]:
    """What else decides what a recorded field does: autocast."""
    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]


@lru_cache(maxsize=16)
def _over_steps(times: tuple[float, ...], outputs: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The times, and for every number of steps the output due then, or -1."""
    length = max(LEAST_TIMES, 1 << (len(times) - 1).bit_length())
    padded = torch.tensor([*times, *[times[-1]] * (length - len(times))], dtype=torch.float64, device="cpu")
    due = torch.full((length,), -1, device="cpu")
    due[list(outputs)] = torch.arange(len(outputs), device="cpu")
    return padded, due


@lru_cache(maxsize=4096)
def counted(n: int) -> Tensor:
    """A number of steps as programs take it."""
    return torch.tensor(n, device="cpu")


def row(table: Tensor, n: Tensor) -> Tensor:
    """Row n, or the last one."""
    return table.index_select(0, n.clamp(max=len(table) - 1).reshape(1))[0]


def at(values: Tensor, n: Tensor) -> Tensor:
    """Entry n."""
    return values.index_select(0, n.reshape(1)).reshape(())
