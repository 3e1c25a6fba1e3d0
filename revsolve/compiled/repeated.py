"""Checkpointed gradients by programs: steps repeated from a stored pair, those before each kept, then differentiated one by one.

As a step is differentiated from the pair that it began with, it need not be one that can be undone; and what is kept of a
segment is its pairs, not what the field computed in it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from revsolve.compiled.recorded import Recalled, Setting, advanced, at, counted, pulled_before, row
from revsolve.compiled.transcript import Swap
from revsolve.core.coupling import Pair, advance, over
from revsolve.core.engine import certify, mismatch
from revsolve.core.march import Problem, size_of
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Tape, vector_jacobian_product


class Again:
    """Carries pairs ahead over steps that were taken before, keeping the pair with which each begins, up to `most` of them."""

    def __init__(self, setting: Setting, most: int, pair: Pair) -> None:
        self.setting, self.num_evaluations = setting, 0
        self.outside = [x.detach() for x in setting.outside]
        size, rows = 1 + setting.scheme.reversible, 1 << (most - 1).bit_length()  # few sizes, so few programs
        self.kept = [pair[0].new_empty(rows, *pair[0].shape) for _ in range(size)]

    def __call__(self, pair: Pair, origin: int, start: int, stop: int) -> Pair:
        """The pair after the steps start..stop; what is kept of step n goes to the place n - origin."""
        setting, carried = self.setting, [x.contiguous() for x in pair if x is not None]
        table = setting.driver.table(start, stop)
        constant = [setting.times, counted(origin), counted(start), table, *self.kept, *self.outside]
        changed, program = range(4, 4 + len(self.kept)), (setting.programs, ("again", len(self.kept[0])), self.step)
        (y, *rest), count = setting.run(*program, (start, stop), carried, constant, changed)
        self.num_evaluations += count
        return y, rest[0] if rest else None

    def pair(self, place: int) -> Pair:
        """What is kept there."""
        return self.kept[0][place], self.kept[1][place] if len(self.kept) == 2 else None

    def step(self, counts: list[int], n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, size = self.setting, len(self.kept)
        y, z = inputs[0], inputs[1] if size == 2 else None
        stop, times, origin, first, table, *others = inputs[size:]
        t0, t1, t2 = (at(times, i) for i in (n, n + 1, torch.minimum(n + 2, stop)))
        pair, memo = (y, z), Recalled(setting.term)  # type: Pair, Recalled
        with torch.no_grad(), Swap(setting.outside, others[size:]), setting.driver:
            for x, kept in zip(inputs[:size], others[:size], strict=True):
                kept.index_copy_(0, (n - origin).reshape(1), x[None])
            for update in setting.rest:
                setting.driver.turn(update, row(table, n - first))
                pair = advance(over(update, t0, t1), pair, memo)
            for update in setting.lead:
                setting.driver.turn(update, row(table, n + 1 - first))
                pair = advance(over(update, t1, t2), pair, memo)
        counts.append(memo.num_evaluations)
        return n + 1, *(x.clone() for x in pair if x is not None)


class Through:
    """Carries cotangents back over steps of which the first pairs are `kept`; `sums` are the gradients of the tensors used."""

    def __init__(self, setting: Setting, again: Again, grad_ys: Tensor) -> None:
        self.setting, self.programs, self.num_evaluations = setting, setting.differentiating, 0
        self.kept, self.outside = again.kept, again.outside
        self.grad_ys, self.sums = grad_ys.contiguous(), setting.zeros()

    def __call__(self, grads: Grads, origin: int, start: int, stop: int) -> None:
        """Change cotangents after the steps start..stop to those of the pair before them."""
        setting, size = self.setting, len(self.kept)
        given = [grads[member] for member in range(size)]
        carried = [torch.zeros_like(self.kept[0][0]) if g is None else g.to(self.kept[0]).contiguous() for g in given]
        table = setting.driver.table(start, stop)
        constant = [counted(stop), setting.times, setting.due, counted(origin), self.grad_ys, table]
        constant += [*self.kept, *self.outside, *self.sums]
        changed, name = range(len(constant) - len(self.sums), len(constant)), ("through", len(self.kept[0]))
        program = self.programs, name, self.step
        after, count = setting.run(*program, (stop, start), carried, constant, changed)
        for member, grad in enumerate(after):
            grads[member] = grad
        self.num_evaluations += count

    def step(self, counts: list[int], n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, size, used = self.setting, len(self.kept), len(self.setting.outside)
        cotangents = list(inputs[:size])
        first, end, times, due, origin, grad_ys, table, *others = inputs[size:]
        kept, outside, sums = others[:size], others[size : size + used], others[size + used :]
        t0, t1, t2 = (at(times, i) for i in (n - 1, n, torch.minimum(n + 1, end)))
        leaves, memo = [x.detach() for x in outside], Recalled(setting.term)
        begun = [row(x, n - 1 - origin).detach().requires_grad_() for x in kept]
        inputs = (*begun, *(leaves[i].requires_grad_() for i, _ in setting.wanted))
        pair: Pair = (begun[0], begun[1] if size == 2 else None)
        with torch.enable_grad(), Swap(setting.outside, leaves), setting.driver:
            for update in setting.rest:
                setting.driver.turn(update, row(table, n - 1 - first))
                pair = advance(over(update, t0, t1), pair, memo)
            output = setting.narrowed(pair[0])
            for update in setting.lead:
                setting.driver.turn(update, row(table, n - first))
                pair = advance(over(update, t1, t2), pair, memo)
            outputs = [output, *(x for x in pair if x is not None)]
            found = vector_jacobian_product(outputs, inputs, [setting.cotangent(due, grad_ys, n), *cotangents])
        for total, grad in zip(sums, found[size:], strict=True):
            if grad is not None:
                total.add_(grad.detach())
        counts.append(memo.num_evaluations)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(begun, found, strict=False)]
        return n - 1, *(g.detach().clone() for g in grads)


def recompute(
    setting: Setting, problem: Problem, grid: Grid, marks: dict[int, Pair], grad_ys: Tensor, tape: Tape
) -> Tensor | None:
    """Repeat segment after segment from its stored state, last one first, and carry cotangents back through its steps."""
    stop, (end, _) = grid.num_steps, marks.pop(grid.num_steps)
    most = max(b - a for a, b in pairwise([*sorted(marks), stop]))
    again = Again(setting, most, (problem.widened(end), None))
    through, memo, mismatches = Through(setting, again, grad_ys), tape.memo, []
    grads = Grads()
    for start in sorted(marks, reverse=True):
        size, pair = size_of(marks[start][0]), (problem.widened(marks[start][0]), marks[start][1])
        runs = list(pairwise([start, *(n for n in range(start + 1, stop) if n in grid.restarts), stop]))
        stored: list[Pair] = []
        for a, b in runs:
            stored.append(pair)
            pair = advanced(setting.scheme.restart, pair, grid, a, memo) if a in grid.restarts else pair
            pair = again(advanced(setting.lead, pair, grid, a, memo), start, a, b)
        mismatches.append(mismatch(pair[0], end, size_of(end), size))
        for (a, b), before in zip(reversed(runs), reversed(stored), strict=True):
            through(grads, start, a, b)
            pulled_before(setting, grid, a, again.pair(a - start), before, grads, tape)
        stop, (end, _) = start, marks.pop(start)
    memo.num_evaluations += again.num_evaluations + through.num_evaluations
    setting.hand_over(through.sums, tape)
    certify(problem, mismatches)
    if (grad := grads[0]) is not None:
        grads[0] = problem.narrowed(grad)
    grads.add(0, grad_ys[0] if grid.outputs[0] == 0 else None)
    return grads[0]
