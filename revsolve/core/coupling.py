"""Coupling updates: all that ever touches the state, forward, undone and differentiated.

The state is a tuple of members: y alone where a method is plain and at the start, (y, z) between the steps of a pair. One update
reads one member and writes another (a plain method reads and writes y):

    target <- keep * target + mix * source + gain * increment(where, source)

A scheme is a list of them. `advance` applies an update, `pull_back` undoes it and carries cotangents across it with a single
evaluation of the increment; the vector-Jacobian products of evaluations that share their source are taken together by `Tape`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from revsolve.core.arithmetic import OneSided, Scalar, Time, equals, like, linear, moment, scaled_add, value_of
from revsolve.core.tape import Grads, Memo, Tape

State = tuple[Tensor, ...]
Combination = list[tuple[Scalar, Tensor]]  # sum of weight * tensor
# An update, its span, and where it evaluates if the update does not say so itself.
ScheduledUpdate = tuple["CouplingUpdate", Time, Time, "Time | None"]


class Increment(Protocol):
    """What an update adds: a linear combination of stage values, and the same for its error estimate."""

    def __call__(
        self, term: Memo, x: Tensor, t0: Time, t1: Time, with_error: bool = False
    ) -> tuple[Combination, Combination]: ...

    @property
    def nodes(self) -> tuple[float, ...]:
        """Where a call without error estimate evaluates the term, as fractions of the span."""
        ...

    @property
    def ends_in_value(self) -> bool:
        """Whether the last evaluation of a call with error estimate was made at the updated state (FSAL)."""
        ...


@dataclass(frozen=True)
class CouplingUpdate:
    """target <- keep * target + mix * source + gain * increment(source), over the part `start` -> `end` of the step.

    target, source: the numbers of members, 0 for y, 1 for z. With `rate`, one member is a velocity: mix is multiplied by the
    span, gain divided by it.
    error: how much of the increment (of its embedded error, if it has one; of the mixed part, if there is no increment) enters
    the error estimate of the step.
    """

    target: int
    source: int
    keep: Scalar = 1.0
    mix: Scalar = 0.0
    gain: Scalar = 0.0
    increment: Increment | None = None
    start: float = 0.0
    end: float = 1.0
    rate: bool = False
    error: float = 0.0

    def __post_init__(self) -> None:
        for name in ("keep", "mix", "gain"):
            if not isinstance(coefficient := getattr(self, name), Tensor):
                object.__setattr__(self, name, float(coefficient))

    def coefficients(self, t0: Time, t1: Time) -> tuple[Scalar, Scalar, Scalar]:
        mix, gain = self.mix, self.gain
        if self.rate:
            mix = mix if equals(mix, 0.0) else mix * (t1 - t0)
            gain = gain if equals(gain, 0.0) else gain / (t1 - t0)
        return self.keep, mix, gain


@dataclass(frozen=True)
class Scheme:
    """A method as data: the updates of one step, and those that make z follow from y at the start and at every restart.

    order is that of the solution, error_order that of the embedded solution (None: no error estimate). A scheme whose
    `restart` is empty is a plain method: its state is y alone, and its steps cannot be undone. `has_velocity` says that z is a
    velocity, whose parasitic part shows as its change over a step; otherwise it shows as the distance between y and z. One step
    after a restart that defect is of order h ** defect_order. `merged(times)`, if given, is an equivalent shorter schedule of
    the steps between these times: neighbours at the end of one step and the start of the next are one. `max_segment` bounds
    the steps between restarts by default. Where steps are not fixed, they follow the error if `adaptive`, else only where
    tolerances are given. `parameters` names the options that it was made with.
    """

    name: str
    updates: tuple[CouplingUpdate, ...]
    restart: tuple[CouplingUpdate, ...]
    order: int
    error_order: int | None = None
    has_velocity: bool = False
    defect_order: int = 2
    max_segment: int | None = None
    adaptive: bool = field(default=False, compare=False)
    parameters: tuple[str, ...] = field(default=(), compare=False)
    merged: Callable[[Sequence[Time]], list[ScheduledUpdate]] | None = field(default=None, compare=False)
    reversible: bool = field(init=False, compare=False)
    tensors: tuple[Tensor, ...] = field(init=False, compare=False)  # coefficients that are tensors, and a given start

    def __post_init__(self) -> None:
        coefficients = (c for update in self.updates for c in (update.keep, update.mix, update.gain))
        given = (getattr(update.increment, "value", None) for update in self.restart)
        object.__setattr__(self, "tensors", tuple(c for c in (*coefficients, *given) if isinstance(c, Tensor)))
        object.__setattr__(self, "reversible", bool(self.restart))

    @cached_property
    def num_evaluations(self) -> int:
        """In a step, but for those that are the same as the latest one."""
        return sum(len(update.increment.nodes) for update in self.updates if update.increment is not None)

    @cached_property
    def stays_inside(self) -> bool:
        """Whether a step evaluates the field at no time outside of it."""
        nodes = ((u, c) for u in self.updates if u.increment is not None for c in u.increment.nodes)
        return all(0.0 <= moment(u.start, u.end, c) <= 1.0 for u, c in nodes)

    @cached_property
    def alternates(self) -> bool:
        """Whether z's parasitic part changes sign with every step."""
        return bool(math.prod(value_of(update.keep) for update in self.updates if update.target == 1) < 0)


def schedule(scheme: Scheme, times: Sequence[Time], additive: bool) -> list[ScheduledUpdate]:
    """The updates of the steps from each of the times to the next, in order; in fewer moves if the term adds up."""
    if additive and scheme.merged is not None and len(times) > 2:
        path = scheme.merged(times)
    else:
        path = []
        for t0, t1 in pairwise(times):
            for update in scheme.updates:
                path.append(scheduled(update, t0, t1))
    return path + _jump(scheme, times) if scheme.has_velocity and isinstance(times[-1], OneSided) else path


def _jump(scheme: Scheme, times: Sequence[Time]) -> list[ScheduledUpdate]:
    """Where the field jumps at the end of the steps, so does the velocity; otherwise it would oscillate about the new field."""
    before = times[-1]
    assert isinstance(before, OneSided)
    follow = next(update for update in scheme.updates if update.increment is not None)
    sides = ((-1.0, before), (1.0, OneSided(before, -before.side)))
    return [(replace(follow, keep=1.0, mix=0.0, gain=sign, error=0.0), times[-2], before, at) for sign, at in sides]


def evaluations(path: Iterable[ScheduledUpdate]) -> Iterator[tuple[Time, Time, Time]]:
    """The (t, t0, t1) for which the moves ask the term: an evaluation at t, used for the span t0 -> t1."""
    for update, t0, t1, at in path:
        if update.increment is not None:
            for t in (moment(t0, t1, c) for c in update.increment.nodes) if at is None else (at,):
                yield t, t0, t1


def scheduled(update: CouplingUpdate, t0: Time, t1: Time) -> ScheduledUpdate:
    """The update in the step t0 -> t1."""
    return update, moment(t0, t1, update.start), moment(t0, t1, update.end), None


def frozen(memo: Memo, x: Tensor, at: Time, t0: Time, t1: Time) -> Combination:
    """The increment of the term over t0 -> t1 with the field frozen at one time."""
    return memo.parts(memo.value(at, x), memo.control(at, t0, t1))


def written(state: State, member: int, x: Tensor) -> State:
    """The state with x as this member, which may be one more."""
    return (*state[:member], x, *state[member + 1 :])


def advance(move: ScheduledUpdate, state: State, memo: Memo, error: list[Tensor] | None = None) -> State:
    """The state after the move; parts of the step's error estimate are appended to `error`."""
    update, t0, t1, at = move
    keep, mix, gain = update.coefficients(t0, t1)
    source = state[update.source]
    out = None if equals(keep, 0.0) else state[update.target]
    if update.increment is None:
        out = linear(keep, out, mix, source)
    else:
        with_error = error is not None and update.error != 0.0
        if at is None:
            parts, error_parts = update.increment(memo, source, t0, t1, with_error)
        else:
            parts = frozen(memo, source, at, t0, t1)
        if len(parts) == 1 and equals(mix, 0.0):
            out = linear(keep, out, gain * parts[0][0], parts[0][1])
        else:
            out = linear(keep, out, mix, source)
            for weight, k in parts:
                out = scaled_add(out, k, weight, gain)
        if with_error:
            assert error is not None
            error.extend(k.detach() * (update.error * weight) for weight, k in error_parts)
            if update.increment.ends_in_value and update.source == update.target:
                memo.latest = (out, t1, memo.latest[2])
    if update.increment is None and error is not None and update.error:
        error.append((source * (mix * update.error)).detach())
    assert out is not None
    return written(state, update.target, out)


def pull_back(move: ScheduledUpdate, state: State, grads: Grads, tape: Tape, restored: Sequence[Tensor] = ()) -> State:
    """Undo the move and carry the cotangents in `grads` (changed in place) across it; returns the state before it.

    An update with keep = 0 overwrote its target: that is found in the state `restored`, or was not there. Gradients must be
    enabled, for the tape.
    """
    update, t0, t1, at = move
    i, j = update.target, update.source
    if tape.member == i:
        tape.flush(grads)
    keep, mix, gain = update.coefficients(t0, t1)
    target, source = state[i], state[j]
    parts: Combination = []
    if update.increment is not None:
        leaf = tape.watch(j, source, grads)
        if at is None:
            parts, _ = update.increment(tape.memo, leaf, t0, t1)
        else:
            parts = frozen(tape.memo, leaf, at, t0, t1)
    if mix.__class__ is not float or gain.__class__ is not float:
        parts = [(weight, k.to(target.dtype)) for weight, k in parts]  # as wide as they were when they were added
        parts, mix = _absorbed(parts, mix, gain, tape.watch(j, source, grads)), 0.0
    elif parts and gain != 1.0:
        parts = [(gain * weight, k) for weight, k in parts]
    overwritten = equals(keep, 0.0)
    if not overwritten:
        before = written(state, i, _undone(value_of(keep), target, mix, source, parts))
    else:
        before = written(state, i, restored[i]) if i < len(restored) else state[:i]
    grad, sign = grads.signed(i)
    if grad is not None:
        if sign != 1.0:
            parts = [(-weight, k) for weight, k in parts]
        if len(parts) == 1:
            tape.add(parts[0][1], grad, parts[0][0])
        elif parts:
            scaled: dict[Scalar, Tensor] = {1.0: grad}
            for weight, k in parts:
                if weight not in scaled:
                    scaled[weight] = grad.mul(weight)
                tape.add(k, scaled[weight])
        if isinstance(keep, Tensor) and keep.requires_grad and not overwritten:
            tape.watch(j, source, grads)
            tape.add(keep * before[i], grad, sign)
        if mix != 0.0:
            grads.add(j, grad, sign * mix)
        if not equals(keep, 1.0):
            grads.scale(i, value_of(keep))
    return before


def _absorbed(parts: Combination, mix: Scalar, gain: Scalar, leaf: Tensor) -> Combination:
    """The parts with the gain, and with the mixed part, as recorded tensors: their coefficients may need gradients."""
    out: Combination = [(w, like(gain, k) * k) if isinstance(gain, Tensor) else (gain * w, k) for w, k in parts]
    if not equals(mix, 0.0):
        out.append((1.0, scaled_add(None, leaf, mix)))
    return out


def _undone(keep: Scalar, target: Tensor, mix: Scalar, source: Tensor, parts: Combination) -> Tensor:
    """(target - mix * source - parts) / keep"""
    if len(parts) == 1 and equals(mix, 0.0):
        weight, k = parts[0]
        out = linear(1.0 / keep, target, -weight / keep, k.detach())
    else:
        for weight, k in parts:
            target = scaled_add(target, k.detach(), weight, -1.0)
        out = linear(1.0 / keep, target, -mix / keep, source)
    assert out is not None
    return out
