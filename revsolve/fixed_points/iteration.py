"""An iteration of steps 0, 1, 2, ... as the engine takes it: its pair may be wider than its states and is stored now and then."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Scheme
from revsolve.core.gradient import solve, states
from revsolve.core.problem import Problem, Stats
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.extras.progress import AcceptedStep, watched
from revsolve.fixed_points.precision import computed_dtype
from revsolve.prepare.options import SolverOptions
from revsolve.prepare.problem import prepare
from revsolve.prepare.state import Packing
from revsolve.schemes.increment import Given
from revsolve.schemes.reversible import starting_from
from revsolve.steppers.fixed import FixedGrid

REMEDY = "store the pair more often (anchor_every=1), {}use pair_dtype=torch.float64"


class ValueTerm:
    """The value of the f of each step, in `dtype`, whatever those of the pair and of f are.

    fs: one for all steps, or one for every step. one_draw: random numbers are drawn once a solve, not anew in every step.
    name: of an f, in messages. residual: an f adds its value to its input.
    """

    additive = True  # its increments know no spans of time, so that steps may be merged

    def __init__(
        self,
        fs: Sequence[Callable[..., Any]],
        args: Any,
        packing: Packing,
        dtype: torch.dtype,
        *,
        num_steps: int,
        one_draw: bool,
        name: str = "f",
        residual: bool = False,
    ) -> None:
        self.fs = [(f, takes_step(f)) for f in fs]
        self.arguments = args if isinstance(args, tuple) else (args,)
        self.packing, self.dtype, self.last, self.one_draw = packing, dtype, num_steps - 1, one_draw
        self.name, self.residual, self.alike = name, residual, False
        self.several, self.once = len(fs) > 1, len(set(map(id, fs))) == len(fs) > 1

    def value(self, t: Time, x: Tensor) -> Tensor:
        state, (f, numbered) = self.unpack(x), self.fs[0]
        n = min(int(t), self.last) if numbered or self.several else 0  # it is also asked at the end of the last step
        if self.several:
            f, numbered = self.fs[n]
        out = f(state, *self.arguments, step=n) if numbered else f(state, *self.arguments)
        if not (self.alike and out.shape == state.shape and out.dtype == state.dtype):
            self.packing.check_like(out, self.name)
            self.alike = self.packing.lone  # so that two comparisons tell, which are much faster
        out = self.packing.pack(out)
        return (out - self.packing.pack(state) if self.residual else out).to(self.dtype)

    def control(self, t: Time, t0: Time, t1: Time) -> float:
        return 1.0

    def product(self, value: Tensor, control: float) -> tuple[Tensor, float]:
        return value, control

    def unpack(self, y: Tensor) -> Any:
        """The state in the dtypes that it was given in."""
        return self.packing.unpack(y.to(self.packing.dtypes[0]) if self.packing.lone else y)


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
                head = self._problem(term, x0, make, "direct", second, 0)
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
        scheme = self.scheme if second is None else starting_from(Given(second), self.scheme)
        return prepare(
            term,
            (*self.owners, second),
            (float(first), float(first)),
            x0,
            None,
            SolverOptions(scheme, gradient=gradient, restarts=None, compile=self.compile),
            watched(make, False, self.callback, unpack=self.term.unpack),
            self.explain,
            pair_dtype=wide,
            spacing=lambda: self.anchor_every or self.spacing(wide, computed, narrow),
            rounding=max(torch.finfo(computed).eps, torch.finfo(wide).eps),
            undoing_remedy=REMEDY.format(self.remedy),
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


def takes_step(f: Callable[..., Any]) -> bool:
    """Whether f has a parameter named `step`."""
    f = f.forward if isinstance(f, nn.Module) else f
    if torch.compiler.is_dynamo_compiling():  # which knows no signatures
        code = getattr(f, "__code__", None)
        return code is not None and "step" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    try:
        return "step" in inspect.signature(f).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return False
