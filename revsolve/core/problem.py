"""What the engine is asked to do, settled before the first step; and what it tells of what it did."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Scheme, State
from revsolve.core.restart import RestartSettings, checkpoint_spacing
from revsolve.core.stepper import Grid, Stepper
from revsolve.core.tape import Audit, Differentiate, Tape, Term


@dataclass
class Stats:
    """What a solve did.

    Attributes:
        num_steps: accepted steps.
        num_rejected: rejected attempts of adaptive steps.
        num_restarts: restarts of a reversible method.
        num_evaluations: calls of the field in the forward pass, those of rejected attempts included.
        num_backward_evaluations: calls of the field in the backward pass; 0 before it has run.
        num_stored_states: tensors of the size of a state that were stored for the backward pass; a pair counts as two.
        reconstruction_error: the largest relative difference of rebuilt and stored states; None before the backward pass.
        times: the accepted times.
    """

    num_steps: int = 0
    num_rejected: int = 0
    num_restarts: int = 0
    num_evaluations: int = 0
    num_backward_evaluations: int = 0
    num_stored_states: int = 0  # tensors of the size of a state: a pair counts as two
    reconstruction_error: float | None = None
    times: list[float] = field(default_factory=list, repr=False, compare=False)

    @property
    def step_sizes(self) -> list[float]:
        """The lengths of the accepted steps, negative backward in time; those of the step variable where that is not the time."""
        return [b - a for a, b in itertools.pairwise(self.times)]


class Field(Protocol):
    """The user's field as a pure function: a term, the tensors outside that it depends on, and what holds it to that."""

    term: Term
    tensors: tuple[Tensor, ...]
    differentiate: Differentiate  # what takes vector-Jacobian products
    state_size: int  # bytes of a state, and those that a recorded evaluation keeps, 0 where that is not known
    tape_size: int

    def take_first(self) -> tuple[Time, Any] | None:
        """Time and value of an evaluation at the start, if one has been made that no one took."""
        ...

    def at(self, tensors: Sequence[Tensor]) -> AbstractContextManager[Term]:
        """The term with these tensors in the place of its own."""
        ...

    def as_solved(self) -> AbstractContextManager[None]:
        """The surroundings of the forward pass, for evaluations that are to be the same."""
        ...

    def stand_ins(self, tensors: Sequence[Tensor], make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The tensors to differentiate by: `make(x)` for those in whose place another one is needed."""
        ...

    def audit(self, tensors: Sequence[Tensor]) -> Audit | None:
        """What raises where a recorded evaluation depends on anything but these tensors."""
        ...

    def check_repeatable(self, again: Callable[[], Any], t: float, y: Tensor) -> None:
        """Raise if steps could not be repeated, after a forward pass to (t, y); `again` makes it once more."""
        ...


Checkpoints = dict[int, State]  # stored states, by the steps after which


class Backend(Protocol):
    """What runs the loops of the engine in another way than eagerly."""

    def march(
        self, problem: Problem, y0: Tensor, store: Callable[[int, State], None] | None
    ) -> tuple[Tensor, State, Grid]:
        """The states due as output, the last pair and the grid."""
        ...

    def undo(
        self, problem: Problem, grid: Grid, checkpoints: Checkpoints, grad_ys: Tensor, tape: Tape, times: Tensor | None
    ) -> Tensor | None:
        """Undo the steps from the last pair, differentiating each: the gradient of y0."""
        ...

    def recompute(
        self, problem: Problem, grid: Grid, checkpoints: Checkpoints, grad_ys: Tensor, tape: Tape, times: Tensor | None
    ) -> Tensor | None:
        """Repeat segment after segment from its stored state, last one first, and differentiate it."""
        ...


@dataclass(frozen=True)
class Problem:
    """Everything the engine needs: raw input has been checked and packed before.

    `explain` says why a state stopped being finite. Where the pair is wider than states and cotangents, `pair_dtype` and
    `state_dtype` are theirs. `rounding` is that of the field, where it is coarser than the state's; `undoing_remedy` is advice
    where undoing the steps is too inaccurate. `readable` is false where numbers cannot be read from tensors (while a graph is
    traced or captured); `followed` is true where derivatives may be wanted of tensors that do not say so (forward mode, tracers).
    `operation` makes of the problem what is differentiated, where that is not a `core.gradient.Solve`.
    """

    scheme: Scheme
    field: Field
    make_stepper: Callable[[], Stepper]
    gradient: str
    restarts: RestartSettings | None
    stats: Stats
    explain: Callable[[float, Tensor], str]
    checkpoint_every: int | None = None
    state_dtype: torch.dtype | None = None
    pair_dtype: torch.dtype | None = None
    rounding: float | None = None
    undoing_remedy: str = ""
    readable: bool = True
    followed: bool = False
    operation: Callable[[Problem], Any] | None = None
    backend: Backend | None = None

    def checkpoint_spacing(self, num_steps: int) -> int:
        """The number of steps between checkpoints, of so many."""
        tape = self.field.tape_size * self.scheme.num_evaluations
        return checkpoint_spacing(num_steps, self.field.state_size, tape)

    def widened(self, y: Tensor) -> Tensor:
        return y if self.pair_dtype is None else y.to(self.pair_dtype)

    def narrowed(self, y: Tensor) -> Tensor:
        return y if self.state_dtype is None else y.to(self.state_dtype)
