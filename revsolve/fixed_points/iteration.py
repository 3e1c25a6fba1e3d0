"""An iteration of steps 0, 1, 2, ... as the engine takes it: its pair may be wider than its states and is stored now and then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.core.gradient import solve, states
from revsolve.core.problem import Problem, Stats
from revsolve.core.stepper import FixedGrid, Stepper
from revsolve.core.tape import Term
from revsolve.extras.progress import AcceptedStep, watched
from revsolve.fixed_points.precision import computed_dtype
from revsolve.fixed_points.term import ValueTerm
from revsolve.prepare.problem import prepare
from revsolve.schemes.increment import Given
from revsolve.schemes.reversible import starting_from

REMEDY = "store the pair more often (anchor_every=1), {}use pair_dtype=torch.float64"


@dataclass(frozen=True)
class Iteration:
    """A scheme and a term, and how steps are undone.

    owners: what holds the tensors that the term uses. spacing: the steps that may be undone, from the dtypes of the pair, of
    what f computes in, and of its values. explain: the message where the state stops being finite; remedy: advice where undoing
    is too inaccurate.
    """

    scheme: Scheme
    term: ValueTerm
    owners: tuple[Any, ...]
    pair_dtype: torch.dtype
    anchor_every: int | None
    spacing: Callable[[torch.dtype, torch.dtype, torch.dtype], int]
    explain: Callable[[float, Tensor], str]
    remedy: str = ""
    callback: Callable[[AcceptedStep], Any] | None = None
    compile: bool | Mapping[str, Any] = False

    def solve(
        self,
        x0: Tensor,
        make: Callable[[], Stepper] | None,
        gradient: str | None,
        second: Tensor | None = None,
        outputs_after: Callable[[int], Sequence[int]] | None = None,
    ) -> tuple[Tensor, Problem]:
        """The states due as output, stacked, and what was asked of the engine.

        second: the pair's other member at the start. outputs_after: the gradient of the steps that `make` takes, if any, is not
        wanted, and this gives, from their number, the numbers of later ones after which states are due.
        """
        term: Term = self.term
        first, before = 0, Stats()
        if outputs_after is not None and make is not None:
            with torch.no_grad():
                head = self._problem(term, x0, make, None, second, 0)
                _, (x0, second), grid = states(head, x0.detach())
            term, first, before = head.field.term, grid.num_steps, head.stats
        if outputs_after is not None:
            make = steps(first, outputs_after(first))
        assert make is not None
        problem = self._problem(term, x0, make, gradient, second, first)
        ys = solve(problem, x0, None)
        problem.stats.num_steps += before.num_steps
        problem.stats.num_evaluations += before.num_evaluations
        return ys, problem

    def _problem(
        self,
        term: Term,
        x0: Tensor,
        make: Callable[[], Stepper],
        gradient: str | None,
        second: Tensor | None,
        first: int,
    ) -> Problem:
        wide, computed, narrow = self.pair_dtype, computed_dtype(self.term.packing), self.term.dtype
        return prepare(
            term,
            x0,
            None,
            (float(first), float(first)),
            (*self.owners, second),
            self.scheme if second is None else starting_from(Given(second), self.scheme),
            watched(make, False, self.callback, unpack=self.term.unpack),
            gradient,
            None,
            explain=self.explain,
            pair_dtype=wide,
            anchor_every=lambda: self.anchor_every or self.spacing(wide, computed, narrow),
            rounding=max(torch.finfo(computed).eps, torch.finfo(wide).eps),
            remedy=REMEDY.format(self.remedy),
            compile=self.compile,
        )


def steps(first: int, outputs: Sequence[int]) -> Callable[[], Stepper]:
    """Makes what takes the steps from number `first` to the last output."""
    return lambda: FixedGrid([float(n) for n in range(first, outputs[-1] + 1)], [n - first for n in outputs])


def check_whole(name: str, number: Any) -> Any:
    """The number. Raise unless it is a whole one of at least 1, or None."""
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"{name} must be a whole number of at least 1, but it is {number!r}.")
    return number


def output_steps(save_at: int | Sequence[int] | None, num_steps: int) -> list[int]:
    """The numbers of steps after which the state is an output."""
    if save_at is None or isinstance(save_at, int):
        every = check_whole("save_at", save_at) or num_steps
        return [*range(every, num_steps, every), num_steps]
    outputs = list(save_at)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in outputs)
    if not (outputs and whole and all(a < b for a, b in pairwise([-1, *outputs, num_steps + 1])) and outputs[-1] > 0):
        raise ValueError(
            f"save_at must be a number, or increasing whole numbers of steps from 0 to {num_steps}, but it is {save_at!r}."
        )
    return outputs
