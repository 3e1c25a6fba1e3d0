"""What a solve returns when asked for everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from revsolve.core.march import Stats


@dataclass(frozen=True)
class Solution:
    """The result of a solve with ``full_output=True``.

    Attributes:
        ts: the output times, shape (len(t),).
        ys: the states there, like y0 with a leading dimension len(t).
        stats: what the solve did; the backward pass fills in its own counters when it has run.
        times: the accepted time steps, one more than there were steps.
    """

    ts: Tensor
    ys: Any
    stats: Stats
    times: list[float]
