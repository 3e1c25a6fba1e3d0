"""Coupling updates: the only arithmetic that ever touches the pair (y, z), forward, undone and differentiated.

One update reads one member of the pair and writes the other (a plain, irreversible method reads and writes y):

    target <- keep * target + mix * source + gain * increment(where, source)

A scheme is a list of them. `advance` applies an update, `pull_back` undoes it and carries cotangents across it with a single
evaluation of the increment; the vector-Jacobian products of evaluations that share their source are taken together by `Tape`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Scalar = float | Tensor
Time = float | Tensor
Pair = tuple[Tensor, Tensor | None]
Grads = list[Tensor | None]
Combination = list[tuple[float, Tensor]]  # sum of weight * tensor


class Term(Protocol):
    """What is integrated: a field, and how its value becomes an increment over a span of time."""

    def value(self, t: Time, x: Tensor) -> Any: ...

    def product(self, value: Any, t0: Time, t1: Time) -> tuple[Tensor, Scalar]:
        """The increment over t0 -> t1 as (k, scale), meaning scale * k; linear in value."""
        ...


class Increment(Protocol):
    """What an update adds: a linear combination of stage values, and the same for its error estimate."""

    def __call__(
        self, term: Term, x: Tensor, t0: Time, t1: Time, with_error: bool = False
    ) -> tuple[Combination, Combination]: ...

    @property
    def ends_in_value(self) -> bool:
        """Whether the last evaluation of a call with error estimate was made at the updated state (FSAL)."""
        ...


@dataclass(frozen=True)
class CouplingUpdate:
    """target <- keep * target + mix * source + gain * increment(source), over the part `start` -> `end` of the step.

    target, source: 0 for y, 1 for z. With `rate`, one member is a velocity: mix is multiplied by the span, gain divided by it.
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

    def coefficients(self, t0: Time, t1: Time) -> tuple[Scalar, Scalar, Scalar]:
        if not self.rate:
            return self.keep, self.mix, self.gain
        span = t1 - t0
        return (
            self.keep,
            0.0 if _is(self.mix, 0.0) else self.mix * span,
            0.0 if _is(self.gain, 0.0) else self.gain / span,
        )


@dataclass(frozen=True)
class Scheme:
    """A method as data: the updates of one step, and those that make z follow from y at the start and at every restart.

    order is that of the solution, error_order that of the embedded solution (None: no error estimate). A scheme whose
    `restart` is empty is a plain method: its z is not used and its steps cannot be undone. `staggered` says that z is a
    velocity, whose parasitic part shows as its change over a step; otherwise it shows as the distance between y and z. In one
    step from a restart that measure grows to the order h ** gap_order.
    """

    name: str
    updates: tuple[CouplingUpdate, ...]
    restart: tuple[CouplingUpdate, ...]
    order: int
    error_order: int | None = None
    staggered: bool = False
    gap_order: int = 2

    @property
    def reversible(self) -> bool:
        return bool(self.restart)


class Memo:
    """A term that keeps its latest evaluation, because the next update may ask for the same one."""

    __slots__ = ("latest", "num_evaluations", "product", "term")

    def __init__(self, term: Term) -> None:
        self.term = term
        self.product = term.product
        self.num_evaluations = 0
        self.latest: tuple[Tensor | None, Time | None, Any] = (None, None, None)

    def value(self, t: Time, x: Tensor) -> Any:
        kept_x, kept_t, kept = self.latest
        if x is kept_x and (t is kept_t or bool(t == kept_t)):
            return kept
        self.num_evaluations += 1
        kept = self.term.value(t, x)
        self.latest = (x, t, kept)
        return kept


class Tape:
    """Recorded evaluations of one member of the pair, waiting to be differentiated together.

    `sums` accumulates the gradients of `tensors` (everything else the field depends on); half precision ones in float32.
    """

    def __init__(
        self, term: Term, tensors: Sequence[Tensor], audit: Callable[[Sequence[Tensor], Sequence[Tensor]], None]
    ) -> None:
        self.memo = Memo(term)
        self.tensors = tuple(tensors)
        self.audit = audit
        self.audit_due = True
        self.looks: set[tuple[Any, ...]] = set()
        self.num_nodes = 0
        self.sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in self.tensors]
        self.times: dict[Tensor, Tensor | None] = {}
        self.member: int | None = None
        self.source: Tensor | None = None
        self.leaf: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self.member, self.source, self.leaf = None, None, None
        self.weight = 1.0
        self.outputs: list[Tensor] = []
        self.cotangents: list[Tensor] = []

    def watch(self, member: int, source: Tensor, grads: Grads) -> Tensor:
        """The leaf that stands for `source` in what is recorded next."""
        if self.source is not source:
            self.flush(grads)
            self.member, self.source = member, source
            self.leaf = source.detach().requires_grad_()
        assert self.leaf is not None
        return self.leaf

    def add(self, output: Tensor, cotangent: Tensor, weight: float = 1.0) -> None:
        """Record that `weight * cotangent` belongs to `output`; the first weight scales the products, not the cotangent."""
        if not output.requires_grad:
            return
        if not self.outputs:
            self.weight = weight
        elif weight != self.weight:
            cotangent = cotangent * (weight / self.weight)
        if self.outputs and self.outputs[-1] is output:
            self.cotangents[-1] = self.cotangents[-1] + cotangent
        else:
            self.outputs.append(output)
            self.cotangents.append(cotangent)

    def flush(self, grads: Grads) -> None:
        """Take the vector-Jacobian products of all that was recorded, and add them up."""
        if self.outputs:
            assert self.member is not None and self.leaf is not None
            inputs = (self.leaf, *self.times, *self.tensors)
            got = torch.autograd.grad(self.outputs, inputs, self.cotangents, allow_unused=True)
            if self._looks_new(got) or self.audit_due:
                self.audit(self.outputs, inputs)
                self.audit_due = False
            if got[0] is not None:
                grads[self.member] = scaled_add(grads[self.member], got[0], self.weight)
            for time, grad in zip(self.times, got[1:], strict=False):
                self.times[time] = self.times[time] if grad is None else scaled_add(self.times[time], grad, self.weight)
            self.add_up(got[1 + len(self.times) :], self.weight)
        self._forget()

    def _looks_new(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether the recorded graph has another number of nodes, or uses other tensors, than all before: walking it is dear."""
        node = self.outputs[-1].grad_fn
        latest = 0 if node is None else node._sequence_nr()
        look = (latest - self.num_nodes, *(grad is None for grad in grads))
        self.num_nodes = latest
        new = look not in self.looks
        self.looks.add(look)
        return new

    def add_up(self, grads: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add gradients of `tensors`, times the weight, to their sums."""
        found = [(total, grad) for total, grad in zip(self.sums, grads, strict=True) if grad is not None]
        if found:
            torch._foreach_add_([total for total, _ in found], [grad for _, grad in found], alpha=weight)


def advance(
    update: CouplingUpdate, pair: Pair, t0: Time, t1: Time, memo: Memo, error: list[Tensor] | None = None
) -> Pair:
    """The pair after the update over the step t0 -> t1; parts of the step's error estimate are appended to `error`."""
    start, end = moment(t0, t1, update.start), moment(t0, t1, update.end)
    keep, mix, gain = update.coefficients(start, end)
    target, source = pair[update.target], pair[update.source]
    assert source is not None
    out = None if _is(keep, 0.0) else target
    if update.increment is None:
        out = linear(keep, out, mix, source)
    else:
        with_error = error is not None and update.error != 0.0
        parts, error_parts = update.increment(memo, source, start, end, with_error)
        if len(parts) == 1 and _is(mix, 0.0):
            out = linear(keep, out, gain * parts[0][0], parts[0][1])
        else:
            out = linear(keep, out, mix, source)
            for weight, k in parts:
                out = scaled_add(out, k, gain * weight)
        if with_error:
            assert error is not None
            error.extend(k.detach() * (update.error * weight) for weight, k in error_parts)
            if update.increment.ends_in_value and update.source == update.target:
                memo.latest = (out, end, memo.latest[2])
    if update.increment is None and error is not None and update.error:
        error.append((source * (mix * update.error)).detach())
    assert out is not None
    return (out, pair[1]) if update.target == 0 else (pair[0], out)


def pull_back(
    update: CouplingUpdate, pair: Pair, grads: Grads, t0: Time, t1: Time, tape: Tape, restored: Tensor | None = None
) -> Pair:
    """Undo the update and carry the cotangents in `grads` (changed in place) across it; returns the pair before it.

    An update with keep = 0 overwrote its target: that is given back as `restored`.
    """
    if tape.member == update.target:
        tape.flush(grads)
    start, end = moment(t0, t1, update.start), moment(t0, t1, update.end)
    keep, mix, gain = update.coefficients(start, end)
    target, source = pair[update.target], pair[update.source]
    assert target is not None and source is not None
    parts: Combination = []
    if update.increment is not None:
        parts = update.increment(tape.memo, tape.watch(update.source, source, grads), start, end)[0]
    if isinstance(mix, Tensor):
        parts = [*((w * gain, k) if not isinstance(gain, Tensor) else (w, gain * k) for w, k in parts)]
        parts.append((1.0, _like(mix, source) * tape.watch(update.source, source, grads)))
        mix, gain = 0.0, 1.0
    elif isinstance(gain, Tensor):
        parts, gain = [(w, gain * k) for w, k in parts], 1.0
    weighted = [(gain * w, k) for w, k in parts]
    before = restored if _is(keep, 0.0) else _undone(keep, target, mix, source, weighted)
    grad = grads[update.target]
    if grad is not None:
        for weight, k in weighted:
            tape.add(k, grad, weight)
        if isinstance(keep, Tensor) and keep.requires_grad and before is not None:
            tape.watch(update.source, source, grads)
            tape.add(keep * before, grad)
        if not _is(mix, 0.0):
            grads[update.source] = scaled_add(grads[update.source], grad, mix)
        grads[update.target] = None if _is(keep, 0.0) else linear(_value(keep), grad, 0.0, grad)
    return (before, pair[1]) if update.target == 0 else (pair[0], before)  # type: ignore[return-value]


def _undone(keep: Scalar, target: Tensor, mix: Scalar, source: Tensor, parts: Combination) -> Tensor:
    """(target - mix * source - parts) / keep"""
    keep = _value(keep)
    if len(parts) == 1 and _is(mix, 0.0):
        weight, k = parts[0]
        out = linear(1.0 / keep, target, -weight / keep, k.detach())
    else:
        for weight, k in parts:
            target = torch.add(target, k.detach(), alpha=-weight)
        out = linear(1.0 / keep, target, -mix / keep, source)
    assert out is not None
    return out


def moment(t0: Time, t1: Time, fraction: float) -> Time:
    """t0 + fraction * (t1 - t0), exact at both ends."""
    if fraction == 0.0:
        return t0
    if fraction == 1.0:
        return t1
    return t0 + fraction * (t1 - t0)


def scaled_add(x: Tensor | None, k: Tensor, weight: Scalar) -> Tensor:
    """x + weight * k, where x = None stands for zero."""
    if isinstance(weight, Tensor):
        scaled = _like(weight, k) * k
        return scaled if x is None else x + scaled
    if x is None:
        return k if weight == 1.0 else k * weight
    return torch.add(x, k, alpha=weight)


def linear(keep: Scalar, target: Tensor | None, mix: Scalar, source: Tensor) -> Tensor | None:
    """keep * target + mix * source in as few kernels as the coefficients allow; None stands for zero."""
    if keep.__class__ is not float or mix.__class__ is not float:
        out = None if target is None else target if _is(keep, 1.0) else keep * target
        return out if _is(mix, 0.0) else scaled_add(out, source, mix)
    if target is None:
        return None if mix == 0.0 else source if mix == 1.0 else source * mix
    if mix == 0.0:
        return target if keep == 1.0 else target * keep
    if keep == 1.0:
        return torch.add(target, source, alpha=mix)
    if abs(keep + mix - 1.0) < 1e-14:
        return torch.lerp(source, target, keep)
    return torch.add(target * keep, source, alpha=mix)


def accumulate(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """total + grad, where None stands for zero."""
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad


def _value(coefficient: Scalar) -> Scalar:
    return coefficient.detach() if isinstance(coefficient, Tensor) else coefficient


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.to(x.real.dtype) if coefficient.ndim == 0 else coefficient


def _is(coefficient: Scalar, number: float) -> bool:
    return coefficient.__class__ is float and coefficient == number
