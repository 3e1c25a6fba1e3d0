"""The products with the transposed Jacobian that restarts ask for (`core/modes.py`), by a program."""

from __future__ import annotations

import torch
from torch import Tensor

from revsolve.compiled.programs import Program, once
from revsolve.compiled.recorded import Recalled, Setting
from revsolve.compiled.transcript import Swap
from revsolve.core.arithmetic import Time
from revsolve.core.modes import transposed_product
from revsolve.core.tape import Memo


class Looked:
    """What `transposed_product` does, with a memo that is not recorded."""

    def __init__(self, setting: Setting, memo: Memo) -> None:
        self.setting, self.memo = setting, memo
        self.outside = [x.detach() for x in setting.outside]

    def __call__(self, t: Time, y: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, Tensor] | None:
        inputs = [torch.as_tensor(t, dtype=torch.float64, device="cpu"), y, v, before]
        programs = self.setting.differentiating
        if "looked" not in programs:
            programs["looked"] = Program(once(self._step, inputs, self.outside, self.setting.way), 1)
        value, *found = programs["looked"].run(*inputs, *self.outside)
        self.memo.num_evaluations, self.memo.latest = self.memo.num_evaluations + 1, (y, t, value)
        return (found[0], found[1]) if found else None

    def _step(self, t: Tensor, y: Tensor, v: Tensor, before: Tensor, *outside: Tensor) -> tuple[Tensor, ...]:
        with Swap(self.setting.outside, outside):
            memo = Recalled(self.setting.term)
            found = transposed_product(memo, t, y, v, before)
        return memo.latest[2], *(found or ())
