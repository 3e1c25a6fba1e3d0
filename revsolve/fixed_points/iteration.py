"""An iteration of steps 0, 1, 2, ... as the engine takes it: its pair may be wider than its states and is stored now and then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.core.gradient import solve
from revsolve.core.problem import Stats
from revsolve.core.stepper import Stepper
from revsolve.extras.progress import AcceptedStep, watched
from revsolve.fixed_points.precision import computed_dtype
from revsolve.fixed_points.term import ValueTerm
from revsolve.prepare.problem import prepare

REMEDY = "store the pair more often (anchor_every=1), {}use pair_dtype=torch.float64"


@dataclass(frozen=True)
class Iteration:
    """A scheme, and how its steps are undone.

    spacing: the steps that may be undone, from the dtypes of the pair, of what f computes in, and of its values.
    explain: the message where the state stops being finite; remedy: advice where undoing is too inaccurate.
    """

    scheme: Scheme
    gradient: str | None
    pair_dtype: torch.dtype
    anchor_every: int | None
    spacing: Callable[[torch.dtype, torch.dtype, torch.dtype], int]
    explain: Callable[[float, Tensor], str]
    remedy: str = ""
    callback: Callable[[AcceptedStep], Any] | None = None
    compile: bool | Mapping[str, Any] = False

    def solve(
        self, term: ValueTerm, x0: Tensor, make: Callable[[], Stepper], owners: tuple[Any, ...]
    ) -> tuple[Tensor, Stats]:
        """The states due as output, stacked, and what it took."""
        wide, computed = self.pair_dtype, computed_dtype(term.packing)
        problem = prepare(
            term,
            x0,
            None,
            (0.0, 0.0),
            owners,
            self.scheme,
            watched(make, False, self.callback, unpack=term.unpack),
            self.gradient,
            None,
            explain=self.explain,
            pair_dtype=wide,
            anchor_every=lambda: self.anchor_every or self.spacing(wide, computed, x0.dtype),
            rounding=max(torch.finfo(computed).eps, torch.finfo(wide).eps),
            remedy=REMEDY.format(self.remedy),
            compile=self.compile,
        )
        return solve(problem, x0, None), problem.stats
