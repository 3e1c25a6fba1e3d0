"""What a solve returns when asked for everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from revsolve.core.problem import Stats


class Interpolant(Protocol):
    """The solution between the steps."""

    def evaluate(self, t: Any) -> Any: ...
    def derivative(self, t: Any) -> Any: ...


@dataclass(frozen=True)
class Solution:
    """The result of a solve with ``full_output=True``.

    Attributes:
        ts: the output times, shape (len(t),).
        ys: the states there, like y0 with a leading dimension len(t).
        stats: what the solve did; the backward pass fills in its own counters when it has run.
        times: the accepted time steps, one more than there were steps; with times of each sample, in steps or outputs counted.
        interpolant: the solution between the steps, with `options={"dense": True}`.
    """

    ts: Tensor
    ys: Any
    stats: Stats
    times: list[float]
    interpolant: Interpolant | None = None

    def evaluate(self, t: Any) -> Any:
        """The state at the times t, a tensor of any shape: like y0, with the dimensions of t where those of output times are
        (in front; before the last in `cdeint`).

        Raises:
            ValueError: if t leaves what was solved, or the solve has no dense output.
        """
        return self._dense().evaluate(t)

    def derivative(self, t: Any) -> Any:
        """The time derivative of the state at the times t, shaped like `evaluate(t)`.

        Raises:
            ValueError: if t leaves what was solved, or the solve has no dense output.
        """
        return self._dense().derivative(t)

    def _dense(self) -> Interpolant:
        if self.interpolant is None:
            raise ValueError(
                "this solve has no dense output: solve again with options={'dense': True} in odeint or cdeint, for one time of "
                "all samples and without event_fn (docs: Works with)."
            )
        return self.interpolant
