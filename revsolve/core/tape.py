"""Evaluations of a term: the latest one remembered, and those of a backward pass recorded until they are differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from revsolve.core.arithmetic import Scalar, Time, equals, linear, scaled_add


class Term(Protocol):
    """What is integrated: the value of a field, the control that drives it over a span of time, and the product of both.

    A term may also have `additive`, true where the controls over two spans, one after the other, add up to that over both, or
    know no spans; `is_rate`, true where the value is the time derivative of the state; `summands(value, control)`, the product
    as a list of (weight, k) with numbers or tensors as weights; `late`, true where the value is but the place (t, x) of an
    evaluation that the product makes; and `repeats_graph`, false where evaluations are recorded in parts, as they are needed.
    """

    def value(self, t: Time, x: Tensor) -> Any: ...

    def control(self, t: Time, t0: Time, t1: Time) -> Any:
        """What drives an evaluation at t over the span t0 -> t1, such as its length h, dX or (h, dW)."""
        ...

    def product(self, value: Any, control: Any) -> tuple[Tensor, Scalar]:
        """The increment as (k, scale), meaning scale * k; linear in value."""
        ...


class Wrapped:
    """A term around another one: all but `value` is that of the other."""

    def __init__(self, term: Term) -> None:
        self.term, self.control, self.product = term, term.control, term.product
        self.summands, self.late = getattr(term, "summands", None), getattr(term, "late", False)
        self.additive, self.is_rate = getattr(term, "additive", False), getattr(term, "is_rate", False)


class Memo(Wrapped):
    """A term that keeps its latest evaluation, because the next update may ask for the same one."""

    def __init__(self, term: Term) -> None:
        super().__init__(term)
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

    def peek(self, t: Time, x: Tensor) -> Any:
        """The value at (t, x), which takes the place of no other one."""
        latest = self.latest
        value = self.value(t, x)
        self.latest = latest
        return value

    def recorded(self, t: Time, x: Tensor) -> tuple[Tensor, Any]:
        """A leaf that stands for x, and the value there as its function.

        It is remembered as the value at x; but not while gradients are recorded, for what they need must not be freed with it.
        Under no_grad a field may do what cannot be recorded (out=, numpy): then the value is no function of the leaf.
        """
        latest, keeps, leaf = self.latest, not torch.is_grad_enabled(), leaf_of(x)
        self.latest = (None, None, None)
        try:
            with torch.enable_grad():
                value = self.value(t, leaf)
        except RuntimeError:
            if not keeps:
                raise
            value = self.value(t, x)
        self.latest = (x, t, value.detach()) if keeps else latest
        return leaf, value

    def weighted(self, value: Any, control: Any) -> tuple[float, Tensor]:
        """The product as (weight, k), with a number as weight."""
        k, scale = self.product(value, control)
        return (1.0, scaled_add(None, k, scale)) if isinstance(scale, Tensor) else (scale, k)

    def parts(self, value: Any, control: Any) -> list[tuple[Scalar, Tensor]]:
        """The product as the term's summands, or as one."""
        return [self.weighted(value, control)] if self.summands is None else self.summands(value, control)


def leaf_of(x: Tensor) -> Tensor:
    """A leaf with the values of x. A view, for of any other leaf autocast keeps what it cast until its context ends."""
    return x.detach().view_as(x).requires_grad_()


class Grads:
    """The cotangents of a state's members, None for zero, by default those of a pair.

    Scaling is lazy: a factor is applied when something is added. With the lazy weight of `Tape.add`, that is a kernel less for
    each step, or 4 % of the gradient of a tiny field (reversible Heun, width 16, 200 steps).
    """

    def __init__(self, *totals: Tensor | None) -> None:
        self.totals = list(totals) or [None, None]
        self.factors = [1.0] * len(self.totals)

    def __getitem__(self, member: int) -> Tensor | None:
        total, factor = self.totals[member], self.factors[member]
        if total is not None and factor != 1.0:
            self[member] = total = linear(factor, total, 0.0, total)
        return total

    def signed(self, member: int) -> tuple[Tensor | None, float]:
        """A cotangent and its sign, which has not been applied."""
        factor = self.factors[member]
        return (self.totals[member], -1.0) if factor == -1.0 else (self[member], 1.0)

    def __setitem__(self, member: int, total: Tensor | None) -> None:
        self.totals[member], self.factors[member] = total, 1.0

    def scale(self, member: int, factor: Scalar) -> None:
        if equals(factor, 0.0) or self.totals[member] is None:
            self[member] = None
        elif isinstance(factor, Tensor):
            total = self[member]
            self[member] = None if total is None else factor * total
        else:
            self.factors[member] *= factor

    def add(self, member: int, grad: Tensor | None, weight: Scalar = 1.0) -> None:
        """Add weight * grad."""
        if grad is None:
            return
        total, factor = self.totals[member], self.factors[member]
        if total is None:
            self[member] = scaled_add(None, grad, weight)
        elif factor == 1.0 or factor == -1.0:  # a sign goes on waiting
            self.totals[member] = scaled_add(total, grad, weight, factor)
        else:
            self[member] = scaled_add(scaled_add(None, grad, weight), total, factor)


# Raises RuntimeError if outputs, recorded since it was called last, depend on anything but the inputs. Gives the leaves, besides
# the first input, on which they do, or None where it does not tell.
Audit = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor] | None]
# Gives the products of cotangents, by outputs and inputs, as `vector_jacobian_product` does.
Differentiate = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor | None, ...]]


class Tape:
    """Recorded evaluations of one member of the pair, waiting to be differentiated together.

    `sums` accumulates the gradients of `tensors` (everything else the field depends on); half precision ones in float32. They are
    allocated with the first gradient, which lowers the peak of memory where 64 layers are used once each.
    Leaves are of the dtype `narrow`, where the pair's is wider. `differentiate` takes the products.
    """

    def __init__(
        self,
        term: Term,
        tensors: Sequence[Tensor],
        audit: Audit | None = None,
        narrow: torch.dtype | None = None,
        differentiate: Differentiate | None = None,
    ) -> None:
        self.narrow = narrow
        self.differentiate = differentiate or vector_jacobian_product
        self.memo = Memo(term)
        self.tensors = tuple(tensors)
        self.places = {id(x): i for i, x in enumerate(self.tensors)}
        self.computed = [i for i, x in enumerate(self.tensors) if not x.is_leaf]
        self.one_dtype = not any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        self.dtypes = set(map(attrgetter("dtype"), self.tensors))
        self.audit = audit
        self._sums: list[Tensor | None] = [None] * len(self.tensors)
        self.member: int | None = None
        self.source: Tensor | None = None
        self.leaf: Tensor | None = None
        self._forget()

    @property
    def sums(self) -> list[Tensor]:
        return list(map(self._sum, range(len(self.tensors))))

    def _sum(self, i: int) -> Tensor:
        total, x = self._sums[i], self.tensors[i]
        if total is None:
            self._sums[i] = total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        return total

    def _forget(self) -> None:
        self.member, self.source, self.leaf = None, None, None
        self.memo.latest = (None, None, None)
        self.outputs: list[Tensor] = []
        self.cotangents: list[Tensor] = []
        self.weight = 1.0  # of them all

    def watch(self, member: int, source: Tensor, grads: Grads) -> Tensor:
        """The leaf that stands for `source` in what is recorded next."""
        if self.source is not source:
            if self.source is not None:
                self.flush(grads)
            self.member, self.source = member, source
            x = source.detach() if self.narrow is None else source.detach().to(self.narrow)
            self.leaf = x.requires_grad_() if self.one_dtype else leaf_of(x)
        assert self.leaf is not None
        return self.leaf

    def add(self, output: Tensor, cotangent: Tensor, weight: Scalar = 1.0) -> None:
        """Record that weight * cotangent belongs to `output`.

        The weight of a single cotangent is applied to its products, which saves a kernel. Where the field may compute in fewer
        digits it is applied to the cotangent, as autograd would, so that both round alike.
        """
        if not self.outputs and weight.__class__ is float and self.one_dtype and self.dtypes <= {cotangent.dtype}:
            self.weight = weight
        else:
            cotangent = scaled_add(None, cotangent, weight)
            if self.weight != 1.0:
                self.cotangents = [x.mul(self.weight) for x in self.cotangents]
                self.weight = 1.0
        if self.outputs and self.outputs[-1] is output:
            self.cotangents[-1] = self.cotangents[-1] + cotangent
        elif output.requires_grad:
            self.outputs.append(output)
            self.cotangents.append(cotangent)

    def flush(self, grads: Grads) -> None:
        """Take the vector-Jacobian products of all that was recorded, and add them up."""
        if self.outputs:
            assert self.member is not None and self.leaf is not None
            outputs, cotangents = self.outputs, self.cotangents
            total = grads[self.member] if self.weight == 1.0 else None
            joins = total is not None and total.dtype is self.leaf.dtype
            if total is not None and joins:  # added up in the order in which autograd would, so that both round alike
                outputs, cotangents = [*outputs, self.leaf], [*cotangents, total]
            (grad,) = self.products(outputs, (self.leaf,), cotangents, self.weight)
            if joins:
                grads[self.member] = grad
            else:
                grads.add(self.member, grad, self.weight)
        self._forget()

    def products(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        cotangents: Sequence[Tensor],
        weight: float = 1.0,
    ) -> tuple[Tensor | None, ...]:
        """The products of cotangents with the Jacobians of `leaves`; weight * those of `tensors` are added to their sums.

        Only tensors on which outputs depend are asked for, where that is known: the engine takes a microsecond for each, which is
        4 % of the gradient of 64 small transformer blocks that are used once each, and 11 % with an eighth of the batch.
        """
        numbers: Sequence[int] = range(len(self.tensors))
        reached = None if self.audit is None else self.audit(outputs, (*leaves, *self.tensors))
        if reached is not None and len(reached) < len(self.tensors):
            known = [self.places[id(x)] for x in reached if id(x) in self.places]
            numbers = known + self.computed if len(known) == len(reached) else numbers
        got = self.differentiate(outputs, (*leaves, *[self.tensors[i] for i in numbers]), cotangents)
        self.add_up(numbers, got[len(leaves) :], weight)
        return got[: len(leaves)]

    def add_up(self, numbers: Sequence[int], grads: Sequence[Tensor | None], weight: float = 1.0) -> None:
        """Add weight * gradients of the `tensors` with these numbers to their sums."""
        for i, grad in zip(numbers, grads, strict=True):
            if grad is not None:
                total = self._sums[i]
                try:
                    (self._sum(i) if total is None else total).add_(grad, alpha=weight)
                except RuntimeError:  # a batch of cotangents (is_grads_batched=True) fits into no sum of one
                    self._sums[i] = scaled_add(self._sum(i), grad, weight)


def vector_jacobian_product(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The products with the Jacobians of all inputs, None for one on which nothing depends."""
    return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
