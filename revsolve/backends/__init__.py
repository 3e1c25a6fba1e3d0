"""Other ways to march and to undo than the eager one; each is imported when a solve asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from revsolve.core.arithmetic import Time


class CompilationError(RuntimeError):
    """A field, or the code made from it, could not be compiled (docs/architecture.md); the cause is attached."""


@dataclass(frozen=True)
class TensorControl:
    """The control of a term as one tensor: at(t, t0, t1) is that of an evaluation at t over the span t0 -> t1, by number;
    control(row, t0, t1) makes of such a tensor the control itself."""

    at: Callable[[float, float, float], Tensor]
    control: Callable[[Tensor, Time, Time], Any]
