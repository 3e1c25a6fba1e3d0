"""Checkpointed gradients by programs: steps repeated from a stored pair, those before each kept, then differentiated one by one.

As a step is differentiated from the pair that it began with, it need not be one that can be undone; and what is kept of a
segment is its pairs, not what the field computed in it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from revsolve.backends.inductor.recorded import Recalled, Recorder
from revsolve.backends.inductor.setting import Setting, Swept, apart, at, counted, row
from revsolve.backends.inductor.transcript import Swap
from revsolve.core.coupling import Pair
from revsolve.core.gradient import certify
from revsolve.core.integrate import size_of
from revsolve.core.problem import Problem
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Tape, vector_jacobian_product


class Again(Swept):
    """Carries pairs ahead over steps that were taken before, keeping the pair with which each begins, up to `most` of them."""

    def __init__(self, setting: Setting, most: int, pair: Pair) -> None:
        super().__init__(setting)
        size, rows = 1 + setting.scheme.reversible, 1 << (most - 1).bit_length()  # few sizes, so few programs
        self.kept = [pair[0].new_empty(rows, *pair[0].shape) for _ in range(size)]

    def __call__(self, pair: Pair, origin: int, start: int, stop: int, restart: bool) -> Pair:
        """The pair after the steps start..stop, before which z is reset if so said; what is kept of step n goes to the place
        n - origin."""
        setting, self.restart = self.setting, restart
        given = [x.contiguous() for x in (pair[0], None if restart else pair[1]) if x is not None]
        table = setting.term.table(start, stop)
        constant = [setting.times, counted(origin), counted(start), table, *self.kept, *setting.given]
        changed, program = range(4, 4 + len(self.kept)), (setting.programs, ("again", len(self.kept[0]), restart), self)
        y, *rest = setting.run(*program, (start, stop), given, constant, changed)
        return y, rest[0] if rest else None

    def begin(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, size, memo = self.setting, len(self.kept), Recalled(self.setting.term)
        given = 1 if self.restart else size
        y, z = inputs[0], inputs[1] if given == 2 else None
        _, times, _, _, table, *others = inputs[given:]
        with torch.no_grad(), Swap(setting.outside, others[size:]):
            pair = setting.begun(self.restart, (y, z), n, times, table, memo)
        self.counts["begin"] = memo.num_evaluations
        return apart(*pair)

    def step(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, size = self.setting, len(self.kept)
        y, z = inputs[0], inputs[1] if size == 2 else None
        stop, times, origin, first, table, *others = inputs[size:]
        t0, t1, t2 = (at(times, i) for i in (n, n + 1, torch.minimum(n + 2, stop)))
        pair, memo = (y, z), Recalled(setting.term)  # type: Pair, Recalled
        with torch.no_grad(), Swap(setting.outside, others[size:]):
            for x, kept in zip(inputs[:size], others[:size], strict=True):
                kept.index_copy_(0, (n - origin).reshape(1), x[None])
            pair = setting.advanced(setting.rest, pair, t0, t1, row(table, n - first), memo)
            pair = setting.advanced(setting.lead, pair, t1, t2, row(table, n + 1 - first), memo)
        self.counts["step"] = memo.num_evaluations
        return n + 1, *apart(*pair)

    def end(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.counts["end"] = 0
        return inputs[: len(self.kept)]


class Through(Swept):
    """Carries cotangents back over steps of which the first pairs are `kept`; what the tensors used get is added up on a tape."""

    def __init__(self, setting: Setting, again: Again, grad_ys: Tensor, tape: Tape) -> None:
        super().__init__(setting)
        self.kept, self.grad_ys, self.sums = again.kept, grad_ys.contiguous(), setting.sums(tape)

    def __call__(self, grads: Grads, origin: int, start: int, stop: int, stored: Tensor, restart: bool) -> None:
        """Change cotangents after the steps start..stop and a restart before them to those of the pair before, of which y is
        `stored`."""
        setting, self.restart = self.setting, restart
        zero, cotangents = torch.zeros_like(self.kept[0][0]), [grads[member] for member in range(len(self.kept))]
        given = [zero if g is None else g.to(zero).contiguous() for g in cotangents]
        table = setting.term.table(start, stop)
        constant = [
            counted(stop),
            setting.times,
            setting.due,
            counted(origin),
            self.grad_ys,
            table,
            stored.contiguous(),
        ]
        constant += [*self.kept, *setting.given, *self.sums]
        changed, name = range(len(constant) - len(self.sums), len(constant)), ("through", len(self.kept[0]), restart)
        program = setting.differentiating, name, self
        for member, grad in enumerate(setting.run(*program, (stop, start), given, constant, changed)):
            grads[member] = grad

    def begin(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.counts["begin"] = 0
        return apart(*inputs[: len(self.kept)])

    def step(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, size, used = self.setting, len(self.kept), len(self.setting.outside)
        cotangents = list(inputs[:size])
        first, end, times, due, origin, grad_ys, table, _, *others = inputs[size:]
        kept, outside, sums = others[:size], others[size : size + used], others[size + used :]
        t0, t1, t2 = (at(times, i) for i in (n - 1, n, torch.minimum(n + 1, end)))
        leaves, memo = [x.detach() for x in outside], Recalled(setting.term)
        begun = [row(x, n - 1 - origin).detach().requires_grad_() for x in kept]
        inputs = (*begun, *(leaves[i].requires_grad_() for i, _ in setting.wanted))
        pair: Pair = (begun[0], begun[1] if size == 2 else None)
        with torch.enable_grad(), Swap(setting.outside, leaves):
            pair = setting.advanced(setting.rest, pair, t0, t1, row(table, n - 1 - first), memo)
            output = setting.narrowed(pair[0])
            pair = setting.advanced(setting.lead, pair, t1, t2, row(table, n - first), memo)
            outputs = [output, *(x for x in pair if x is not None)]
            found = vector_jacobian_product(outputs, inputs, [setting.cotangent(due, grad_ys, n), *cotangents])
        for total, grad in zip(sums, found[size:], strict=True):
            if grad is not None:
                total.add_(grad.detach())
        self.counts["step"] = memo.num_evaluations
        return n - 1, *apart(*(torch.zeros_like(x) if g is None else g for x, g in zip(begun, found, strict=False)))

    def end(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, size = self.setting, len(self.kept)
        _, _, times, _, origin, _, table, stored, *others = inputs[size:]
        self.counts["end"] = 0
        if size == 1:
            return inputs[:1]
        y, z = (row(x, n - origin) for x in others[:size])
        grads = Grads(*inputs[:size])
        with Recorder(setting, others[size:]) as tape:
            setting.pulled_before(self.restart, (y, z), n, times, table, stored, grads, tape)
        self.counts["end"] = tape.memo.num_evaluations
        return apart(*(torch.zeros_like(stored) if g is None else g for g in (grads[0], grads[1])))


def recompute(
    setting: Setting, problem: Problem, grid: Grid, marks: dict[int, Pair], grad_ys: Tensor, tape: Tape
) -> Tensor | None:
    """Repeat segment after segment from its stored state, last one first, and carry cotangents back through its steps."""
    stop, (end, _) = grid.num_steps, marks.pop(grid.num_steps)
    most = max(b - a for a, b in pairwise([*sorted(marks), stop]))
    again = Again(setting, most, (problem.widened(end), None))
    through, grads = Through(setting, again, grad_ys, tape), Grads()
    distances, sizes = [], [size_of(end)]  # type: list[Tensor], list[Tensor]
    for start in sorted(marks, reverse=True):
        sizes.append(size_of(marks[start][0]))
        pair = problem.widened(marks[start][0]), marks[start][1]
        runs = list(pairwise([start, *(n for n in range(start + 1, stop) if n in grid.restarts), stop]))
        stored: list[Tensor] = []
        for a, b in runs:
            stored.append(pair[0])
            pair = again(pair, start, a, b, a in grid.restarts)
        distances.append(size_of(pair[0] - end))
        for (a, b), before in zip(reversed(runs), reversed(stored), strict=True):
            through(grads, start, a, b, before, a in grid.restarts)
        stop, (end, _) = start, marks.pop(start)
    tape.memo.num_evaluations += again.num_evaluations + through.num_evaluations
    certify(problem, distances, sizes)
    if (grad := grads[0]) is not None:
        grads[0] = problem.narrowed(grad)
    grads.add(0, grad_ys[0] if grid.outputs[0] == 0 else None)
    return grads[0]
