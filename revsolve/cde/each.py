"""The path as samples pass it that have times of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from revsolve.core.arithmetic import Time
from revsolve.extras.per_sample_steps import BatchedTime
from revsolve.paths.control import Control
from revsolve.paths.piecewise import PiecewisePath


class PathOfEach:
    """X_b(t_b(s)) for every sample b: a path in the step variable s, which all samples share."""

    def __init__(self, control: Control, clock: BatchedTime) -> None:
        self.control, self.clock = control, clock

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.control.tensors

    def derivative(self, s: Time, *, span: tuple[Time, Time]) -> Any:
        """dX/dt dt/ds, (batch, ..., channels)."""
        times, spans = self.clock.exact(s), (self.clock.exact(span[0]), self.clock.exact(span[1]))
        if isinstance(self.control, PiecewisePath):
            slopes = self.control.derivatives_of_each(times, spans=spans)
        else:
            slopes = tree_map(_own, self.control.derivatives(times, spans=spans))
        rate = self.clock.rate(*span).reshape(-1)
        return tree_map(lambda x: x * rate.to(x.dtype).view(-1, *(1,) * (x.ndim - 1)), slopes)

    def increment(self, s0: Time, s1: Time) -> Any:
        return tree_map(torch.sub, self._values(s1), self._values(s0))

    def _values(self, s: Time) -> Any:
        times = self.clock.exact(s)
        if isinstance(self.control, PiecewisePath):
            return self.control.values_of_each(times)
        return tree_map(lambda x: _own(x.movedim(-2, 0)), self.control.evaluate(times))


def _own(x: Tensor) -> Tensor:
    """(batch, ...) from (batch, batch, ...): what each sample has at its own time."""
    return x[(each := torch.arange(len(x), device=x.device)), each]
