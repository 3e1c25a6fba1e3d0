"""Segments ahead and back as functions of tensors alone, recorded for programs from the code that solves eagerly.

Where a method evaluates the field at the end of a step and again at the start of the next, at the same state and time
(reversible Heun), a program's step runs from behind the first evaluation to behind that of the next step, so that both are one.
What is different at the start of a segment (a restart, that first evaluation) and at its end is recorded around the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from revsolve.backends.inductor.setting import Setting, Swept, apart, at, counted, row
from revsolve.backends.inductor.transcript import Swap
from revsolve.core.arithmetic import Time, scaled_add
from revsolve.core.coupling import Pair
from revsolve.core.integrate import parasitic, size_of
from revsolve.core.modes import Modes, transposed_product
from revsolve.core.stepper import Grid
from revsolve.core.tape import Grads, Memo, Tape


class Ahead(Swept):
    """Carries pairs ahead over segments; `ys` are the outputs.

    `numbers` are the parasitic parts that the first and the latest step left and the size of y, then those of the modes there.
    """

    def __init__(self, setting: Setting, grid: Grid, y0: Tensor, modes: Modes | None) -> None:
        super().__init__(setting)
        self.modes, self.size = modes, 1 + setting.scheme.reversible
        self.ys = y0.new_empty(len(grid.outputs), *y0.shape)
        self.ys[0] = y0
        self.numbers = self.ys

    def __call__(self, pair: Pair, start: int, stop: int, restart: bool) -> Pair:
        """The pair after the steps start..stop, before which z is reset if so said."""
        setting, self.restart = self.setting, restart
        directions = None if self.modes is None else self.modes.directions(pair[0])
        self.looks = directions is not None
        given = [x for x in (pair[0], None if restart else pair[1]) if x is not None]
        table = setting.term.table(start, stop)
        constant = [setting.times, setting.due, self.ys, counted(start), table, *(directions or ()), *setting.given]
        programs = setting.differentiating if self.looks else setting.programs
        program = programs, ("ahead", restart, self.looks), self
        self.numbers, y, *others = setting.run(*program, (start, stop), given, constant, range(2, 3))
        z = others.pop(0) if self.size == 2 else None
        if self.modes is not None and others:
            (self.modes.product,) = others
        return y, z

    def begin(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, memo, given = self.setting, Recalled(self.setting.term), 1 if self.restart else self.size
        y, z = inputs[0], inputs[1] if given == 2 else None
        _, times, _, _, _, table, *others = inputs[given:]
        with torch.no_grad(), Swap(setting.outside, others[2 * self.looks :]):
            pair = setting.begun(self.restart, (y, z), n, times, table, memo)
        self.counts["begin"] = memo.num_evaluations
        gap = torch.zeros((), dtype=y.dtype.to_real(), device=y.device)
        return gap, gap.clone(), *apart(*pair)

    def step(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, (first_gap, gap, y), z = self.setting, inputs[:3], inputs[3] if self.size == 2 else None
        stop, times, due, ys, first, table, *others = inputs[2 + self.size :]
        t0, t1, t2 = (at(times, i) for i in (n, n + 1, torch.minimum(n + 2, stop)))
        pair: Pair = (y, z)
        memo = Recalled(setting.term)
        with torch.no_grad(), Swap(setting.outside, others[2 * self.looks :]):
            pair = setting.advanced(setting.rest, pair, t0, t1, row(table, n - first), memo)
            if z is not None:
                gap = parasitic(setting.scheme, pair, z, (t1 - t0).to(gap.dtype))
            output = at(due, n + 1)
            place = output.clamp(min=0).reshape(1)
            y = setting.narrowed(pair[0])
            ys.index_copy_(0, place, torch.where(output >= 0, y[None], ys.index_select(0, place)))
            # after the last step over no time at all
            pair = setting.advanced(setting.lead, pair, t1, t2, row(table, n + 1 - first), memo)
        self.counts["step"] = memo.num_evaluations
        return n + 1, torch.where(n == first, gap, first_gap), gap.clone(), *apart(*pair)

    def end(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting, memo = self.setting, Recalled(self.setting.term)
        first_gap, gap, *pair = inputs[: 2 + self.size]
        _, times, _, _, _, _, *others = inputs[2 + self.size :]
        numbers, found = [first_gap, gap, size_of(pair[0])], None
        if self.looks:
            v, before, *outside = others
            with Swap(setting.outside, outside):
                found = transposed_product(memo, at(times, n), pair[0], v, before)
        self.counts["end"] = memo.num_evaluations
        if found is None:
            return torch.stack(numbers), *pair
        return torch.stack([*numbers, *found[1]]), *pair, found[0]


class Back(Swept):
    """Carries pairs and cotangents back over segments, and adds up the gradients of the tensors that the field uses on a tape."""

    def __init__(self, setting: Setting, grad_ys: Tensor, tape: Tape) -> None:
        super().__init__(setting)
        self.grad_ys, self.sums = grad_ys.contiguous(), setting.sums(tape)

    def __call__(self, pair: Pair, grads: Grads, start: int, stop: int, stored: Tensor, restart: bool) -> Tensor:
        """Change cotangents after the steps start..stop and a restart before them to those of the pair before, of which y is
        `stored`; how far it lies from what was undone, and its size."""
        filled = [
            torch.zeros_like(pair[0], dtype=self.setting.narrow) if g is None else g for g in (grads[0], grads[1])
        ]
        y, z = pair
        assert z is not None
        setting, self.restart = self.setting, restart
        table = setting.term.table(start, stop)
        constant = [counted(stop), setting.times, setting.due, self.grad_ys, table, stored, *setting.given, *self.sums]
        program = setting.differentiating, ("back", restart), self
        changed = range(len(constant) - len(self.sums), len(constant))
        numbers, grads[0], grads[1] = setting.run(*program, (stop, start), [y, z, *filled], constant, changed)
        return numbers

    def begin(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.counts["begin"] = 0
        return apart(*inputs[:4])

    def step(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting = self.setting
        y, z, grad_y, grad_z, first, end, times, due, grad_ys, table, _, *others = inputs
        t0, t1, t2 = (at(times, i) for i in (n - 1, n, torch.minimum(n + 1, end)))
        pair, grads = (y, z), Grads(grad_y, grad_z)  # type: Pair, Grads
        with Recorder(setting, others) as tape:
            pair = setting.pulled_back(setting.lead, pair, t1, t2, row(table, n - first), grads, tape)
            grads.add(0, setting.cotangent(due, grad_ys, n))
            pair = setting.pulled_back(setting.rest, pair, t0, t1, row(table, n - 1 - first), grads, tape)
            tape.flush(grads)
        self.counts["step"] = tape.memo.num_evaluations
        return n - 1, *apart(*pair, grads[0], grads[1])

    def end(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        setting = self.setting
        y, z, grad_y, grad_z, _, _, times, _, _, table, stored, *others = inputs
        grads = Grads(grad_y, grad_z)
        with Recorder(setting, others) as tape:
            undone = setting.pulled_before(self.restart, (y, z), n, times, table, stored, grads, tape)
        self.counts["end"] = tape.memo.num_evaluations
        found = [torch.zeros_like(grad_y) if g is None else g.detach() for g in (grads[0], grads[1])]
        return torch.stack([size_of(undone - stored), size_of(stored)]), *apart(*found)


class Recalled(Memo):
    """A memo that compares no numbers, for a recording has none."""

    def value(self, t: Time, x: Tensor) -> Any:
        if x is not self.latest[0] or t is not self.latest[1]:
            self.num_evaluations += 1
            self.latest = (x, t, self.term.value(t, x))
        return self.latest[2]


class Recorder(Tape):
    """A tape whose gradients of tensors are results of the recording.

    `others` are what stands for the outside tensors, then the sums to which it adds when it is closed.
    """

    def __init__(self, setting: Setting, others: Sequence[Tensor]) -> None:
        count = len(setting.outside)
        leaves, self.totals = [x.detach() for x in others[:count]], others[count:]
        wanted = [leaves[i].requires_grad_() for i, _ in setting.wanted]
        super().__init__(setting.term, wanted, None, setting.narrow)
        self.memo = Recalled(setting.term)
        self.found: list[Tensor | None] = [None for _ in wanted]
        self.within = ExitStack()
        self.modes = torch.enable_grad(), Swap(setting.outside, leaves)

    def add_up(self, grads: Sequence[Tensor | None], weight: float = 1.0) -> None:
        self.found = [
            total if grad is None else scaled_add(total, grad, weight)
            for total, grad in zip(self.found, grads, strict=True)
        ]

    def __enter__(self) -> Recorder:
        for mode in self.modes:
            self.within.enter_context(mode)
        return self

    def __exit__(self, *error: object) -> None:
        self.within.close()
        for total, grad in zip(self.totals, self.found, strict=True):
            if grad is not None:
                total.add_(grad.detach())
