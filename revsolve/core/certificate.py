"""The certificate of a gradient: what a backward pass reconstructs is compared with what was stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from revsolve.core.caller import warn
from revsolve.core.coupling import State
from revsolve.core.problem import Problem


class ReconstructionWarning(UserWarning):
    """Undoing the steps did not lead back to the stored states: the gradient may be inaccurate."""


class Certificate:
    """How far what is reconstructed lies from what was stored, segment by segment and sample by sample.

    Entries are measured by their largest size in the states stored, and a segment by the larger of the states at its ends, the
    last of which was stored after `stop` steps.
    """

    def __init__(self, problem: Problem, stored: Mapping[int, State], stop: int) -> None:
        self.problem = problem
        largest = reduce(torch.maximum, (problem.narrowed(state[0]).abs() for state in stored.values()))
        self.scale = largest + torch.finfo(largest.dtype).tiny  # never zero
        self.distances, self.sizes = [], [mean_size(stored[stop][0] / self.scale)]  # type: list[Tensor], list[Tensor]

    def follow(self, y: Tensor) -> None:
        """Measure entries by their size in this state, too, if it is larger."""
        self.scale = torch.maximum(self.scale, self.problem.narrowed(y).abs())

    def compare(self, y: Tensor, stored: Tensor, start: Tensor) -> None:
        """Note the distance of y, reconstructed, from what was stored, at one end of the segment that begins at `start`."""
        self.distances.append(mean_size((y - stored).div_(self.scale)))  # a state less at the peak
        self.sizes.append(mean_size(start / self.scale))

    def check(self) -> None:
        """Raise or warn where a distance is too large: a gradient is never silently wrong. One device read."""
        problem = self.problem
        if not problem.readable:
            return
        kind, size = torch.finfo(self.scale.dtype), torch.stack(self.sizes)
        relative = torch.stack(self.distances) / torch.maximum(size[1:], size[:-1]).clamp(min=kind.tiny / kind.eps)
        worst = problem.stats.reconstruction_error = float(relative.amax())
        done, remedies = "repeating", "make sure that the field is deterministic"
        if problem.gradient == "reversible":
            done, remedies = "undoing", f"{problem.undoing_remedy}, {remedies}, or use gradient='checkpoint'"
        if not math.isfinite(worst):
            raise RuntimeError(
                f"{done} the steps gave a state that is not finite, so the gradient would be wrong: {remedies}."
            )
        limit = math.sqrt(problem.rounding or kind.eps)
        if worst > limit:
            warn(
                f"{done} the steps missed the stored states by {worst:.1e} (relative), more than {limit:.1e}: the gradient may "
                f"be that inaccurate. Remedies: {remedies}.",
                ReconstructionWarning,
            )


def mean_size(x: Tensor) -> Tensor:
    """The mean absolute value of each sample's entries, or of all where there is but one dimension."""
    if x.ndim > 1:
        return torch.linalg.vector_norm(x.flatten(1), 1, dim=1) / x[0].numel()
    return torch.linalg.vector_norm(x, 1) / x.numel()
