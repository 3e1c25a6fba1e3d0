"""Adaptive steps by programs: an attempted step and the measure of its error, recorded from the code that steps eagerly.

The controller stays where it is: `march` and `Adaptive` take these steps as they take those of `Walk`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from revsolve.backends.inductor.compiler import Compiler
from revsolve.backends.inductor.context import TracedMemo, without_fakes
from revsolve.backends.inductor.operation_trace import Substituted, operation_trace
from revsolve.backends.inductor.programs import PROGRAMS, Program, once
from revsolve.backends.inductor.tables import as_seen
from revsolve.core.coupling import Scheme, State, advance, scheduled
from revsolve.core.integrate import defect, size_of
from revsolve.core.stepper import Measure
from revsolve.core.tape import Memo


class CompiledSteps:
    """Takes single steps and measures their error, as `Walk` does; `defect` is that of the latest one.

    Where the last evaluation of a step is the first of the next, its value goes out of one call and into the other.
    """

    def __init__(
        self, compiler: Compiler, owners: Sequence[Any], time_dtype: torch.dtype, scheme: Scheme, memo: Memo
    ) -> None:
        self.compiler, self.owners, self.time_dtype, self.scheme, self.memo = compiler, owners, time_dtype, scheme, memo
        self.begins = next(update.source for update in scheme.updates if update.increment is not None)
        self.passes_on = _first_same_as_last(scheme, self.begins)
        self.program: Program | None = None

    def __call__(
        self, state: State, times: Sequence[float], restart: bool, measure: Measure | None = None
    ) -> tuple[State, Tensor | None]:
        assert measure is not None
        (t0, t1), memo = times, self.memo
        self.before_attempt = memo.latest
        if restart:
            for update in self.scheme.restart:
                state = advance(scheduled(update, t0, t1), state, memo)
        source = state[self.begins]
        value, form = tree_flatten(memo.value(t0, source) if self.passes_on else ())
        seen = [as_seen(t, self.time_dtype) for t in times]
        moments = [torch.tensor(t, dtype=torch.float64, device="cpu") for t in seen]
        inputs = [*moments, *(x.contiguous() for x in (*state, *value))]
        if self.program is None:
            self._find(times, inputs, measure, form)
        assert self.program is not None
        measured, self.defect, y, *rest = self.program.run(*inputs, *(x.detach() for x in self.outside))
        memo.num_evaluations += self.program.besides
        state = (y, rest.pop(0)) if self.scheme.reversible else (y,)
        memo.latest = (state[self.begins], t1, tree_unflatten(rest, form)) if self.passes_on else (None, None, None)
        return state, measured

    def forget_attempt(self) -> None:
        self.memo.latest = self.before_attempt

    def gap(self, state: State, h: float, weight: Tensor) -> Tensor:
        return size_of(self.defect * weight)

    def _find(self, times: Sequence[float], inputs: list[Tensor], measure: Measure, form: Any) -> None:
        """The program for inputs like these, made now unless there is one."""
        (t0, t1), y = times, inputs[2]
        trace, self.outside = operation_trace(self.memo.term, t0, y, t1, y.new_zeros(0), lambda x: measure(x, x, x))
        states = [(x.shape, x.stride(), x.dtype) for x in inputs]
        made = PROGRAMS.made((self.scheme, self.compiler, trace, *states))
        if "attempt" not in made:
            counts: list[int] = []

            def step(*tensors: Tensor) -> tuple[Tensor, ...]:
                with torch.no_grad(), Substituted(self.outside, tensors[len(inputs) :]):
                    return self._step(counts, measure, form, *tensors[: len(inputs)])

            eps = torch.finfo(y.dtype).eps
            rounded = torch.full_like(y, eps**0.75 * float(y.abs().max()))
            blur = measure(rounded, y, y)  # of an error that rounding alone makes
            with torch.no_grad(), without_fakes(self.owners):
                run = once(step, [*inputs, *(x.detach() for x in self.outside)], self.compiler, [float(blur)])
            made["attempt"] = Program(run, counts[-1])
        self.program = made["attempt"]

    def _step(
        self, counts: list[int], measure: Measure, form: Any, t0: Tensor, t1: Tensor, y: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        pair, value = ((y, rest[0]), rest[1:]) if self.scheme.reversible else ((y,), rest)  # type: State, Sequence[Tensor]
        memo, error, before = TracedMemo(self.memo.term), [], pair[1:]  # type: Memo, list[Tensor], State
        if self.passes_on:
            memo.latest = (pair[self.begins], t0, tree_unflatten(value, form))
        for update in self.scheme.updates:
            pair = advance(scheduled(update, t0, t1), pair, memo, error)
        measured, distance = measure(sum(error[1:], start=error[0]), y, pair[0]), torch.zeros((), device=y.device)
        if before:
            distance = defect(self.scheme, pair, before[0], (t1 - t0).to(y.real.dtype))
        counts.append(memo.num_evaluations)
        passed = tree_flatten(memo.latest[2])[0] if self.passes_on else []
        return measured, distance, *pair, *passed


def _first_same_as_last(scheme: Scheme, begins: int) -> bool:
    """Whether the last evaluation of an attempt is the first of the step after it (FSAL)."""
    memo, one = Memo(_Unmoved()), torch.ones((), device="cpu")
    pair: State = (one, one)
    for update in scheme.updates:
        pair = advance(scheduled(update, 0.0, 1.0), pair, memo, [])
    return memo.latest[0] is pair[begins] and bool(memo.latest[1] == 1.0)


class _Unmoved:
    """y' = 0."""

    def value(self, t: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def control(self, t: Any, t0: Any, t1: Any) -> float:
        return 1.0

    def product(self, value: Tensor, control: float) -> tuple[Tensor, float]:
        return value, control
