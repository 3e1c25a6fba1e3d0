"""What a solve returns when asked for everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from revsolve.core.integrate import Stats
from revsolve.extras.dense import Dense


@dataclass(frozen=True)
class Solution:
    """The result of a solve with ``full_output=True``.

    Attributes:
        ts: the output times, shape (len(t),).
        ys: the states there, like y0 with a leading dimension len(t).
        stats: what the solve did; the backward pass fills in its own counters when it has run.
        times: the accepted time steps, one more than there were steps; with times of each sample, in steps or outputs counted.
        interpolant: the solution between the steps: from the start with `options={"dense": True}`, else once it is asked for.
        again: solves once more over the same steps and keeps them all; None where that is not possible.
    """

    ts: Tensor
    ys: Any
    stats: Stats
    times: list[float]
    interpolant: Dense | None = None
    again: Callable[[], Solution] | None = None

    def evaluate(self, t: Any) -> Any:
        """The state at the times t, a tensor of any shape: like y0, with the dimensions of t where those of output times are
        (in front; before the last in `cdeint`).

        Without `options={"dense": True}` the first call solves again over the same steps, and keeps them all.

        Raises:
            ValueError: if t leaves what was solved, or the solve has no dense output (SDEs, fixed points, events,
                jumps, times of each sample).
        """
        return self._dense().evaluate(t)

    def derivative(self, t: Any) -> Any:
        """The time derivative of the state at the times t, shaped like `evaluate(t)`.

        Raises:
            ValueError: if t leaves what was solved, or the solve has no dense output (SDEs, fixed points, events,
                jumps, times of each sample).
        """
        return self._dense().derivative(t)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles forget how to solve again: a field need not be something that can be pickled."""
        return {**self.__dict__, "again": None}

    def _dense(self) -> Dense:
        if self.interpolant is None:
            if self.again is None:
                raise ValueError(
                    "this solve has no dense output: solve with options={'dense': True} in odeint or cdeint, without jump_t, and "
                    "with one time for all samples (docs: Works with)."
                )
            object.__setattr__(self, "interpolant", self.again().interpolant)
        assert self.interpolant is not None
        return self.interpolant
