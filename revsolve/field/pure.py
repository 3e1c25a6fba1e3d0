"""The one boundary to the user's field: any callable becomes a pure function of time, state and a tuple of tensors.

One recorded call tells which tensors it depends on (parameters, closed-over leaves, results computed outside), whether it draws
random numbers and which buffers it changes. What that call found is an expectation: every later evaluation that is differentiated
is held to it, and a difference is an error that says what it is, never another number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from revsolve.core.arithmetic import Time
from revsolve.core.tape import Guarded, Term, leaf_of
from revsolve.field.audit import Audit, lost, products
from revsolve.field.autograd import boundary, depend_on_each_other, drawing, inputs_of
from revsolve.field.discover import REQUIRES_GRAD, discover, refusing_sharded_calls
from revsolve.field.functorch import has_hooks, is_borrowed, version
from revsolve.field.holders import Holdings, Memory, tensors_in
from revsolve.field.repeat import (
    Buffers,
    Repeatable,
    autocast_state,
    capturing,
    random_state,
    same_random_state,
    set_random_state,
)
from revsolve.field.substitute import Substitution

NOT_CAPTURED = "a CUDA graph cannot capture this solve, because its field {}: {}."
NUDGE = 2.0**-10  # how far from the start, relative to it, a field is asked whether its buffers matter
NO_BUFFERS = Buffers()
IS_LEAF = operator.attrgetter("is_leaf")


class Pure:
    """What the engine knows of a field: `term`, the tensors outside that it depends on, and the first value."""

    differentiate = staticmethod(products)
    own_leaves: frozenset[Any] = frozenset()  # shapes and dtypes of leaves that the field makes itself
    constants: Sequence[tuple[Tensor, int]] = ()  # what it may use besides, with versions
    memory = Memory()  # where it finds and keeps things, with what it found there
    coefficients: Sequence[Tensor] = ()  # of the scheme
    random: tuple[Tensor, ...] = ()  # the state of the generators, where it draws nothing
    late = lent = NO_BUFFERS  # of modules that train: those the first call left alone; those lent to later calls
    repeats = False  # whether evaluations are made to repeat: the field draws random numbers, or its buffers matter
    first: tuple[Time, Any] | None = None  # an evaluation at the start
    state_size = tape_size = 0  # bytes
    opening: Opening  # which may be made again

    def __init__(self, term: Term, tensors: Sequence[Tensor] = ()) -> None:
        self.term, self.tensors = term, tuple(tensors)
        self.autocast = autocast_state()
        self.stand_ins_needed = not all(map(IS_LEAF, tensors)) and depend_on_each_other(tensors)

    def take_first(self) -> tuple[Time, Any] | None:
        """Time and value of an evaluation at the start that has been made; once, for it is not kept."""
        first, self.first = self.first, None
        return first

    @contextmanager
    def at(self, tensors: Sequence[Tensor]) -> Iterator[Term]:
        """The term with these tensors in the place of its own."""
        if all(map(operator.is_, tensors, self.tensors)):
            yield self.term
        else:
            with Substitution(self.tensors, tensors):
                yield self.term

    def stand_ins(self, tensors: Sequence[Tensor], make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The tensors to differentiate by: as they are, but for those computed from another one, or with hooks, which are to
        see the gradient of the solve alone."""
        if not (self.stand_ins_needed or any(map(has_hooks, tensors))):  # hooks may be new
            return list(tensors)
        return [x if x.is_leaf and not has_hooks(x) else make(x) for x in tensors]

    def unguarded(self) -> Pure:
        """The same for who knows what a field takes: no evaluation looks for what asks for a gradient."""
        other = copy(self)
        other.term = self.term.term if isinstance(self.term, Constant) else self.term
        return other

    def audit(self, tensors: Sequence[Tensor]) -> Audit:
        return Audit(tensors, self)

    @contextmanager
    def as_solved(self) -> Iterator[None]:
        """The state of Python and PyTorch in which the forward pass ran. Raises RuntimeError where it cannot be had."""
        with self.memory.restored(), self.autocast(), self.lent:
            self._check_tensors()
            yield

    def conclude(self, again: Callable[[], Any], t: float, y: Tensor) -> None:
        """Raise RuntimeError if the field began late with what its first call did not do. `again` repeats the forward pass."""
        late = self.late and self.late.changed()
        if late and self._matter_now(late, t, y.detach()):
            raise RuntimeError(
                f"the field changes buffers ({late.names()}) by t = {t} on which its values depend, but not when it was first "
                "called, so no step could be repeated: call .eval() on the module, or use it from the start on."
            )
        self._forget(t, y.detach())
        before, self.random = self.random, ()  # 5 kB that nobody asks for again
        if before and not same_random_state(before, random_state(y.device)):
            with self.lent, torch.no_grad():
                _, late_draws = drawing(again)
            if late_draws:
                raise RuntimeError(
                    f"the field draws random numbers (dropout, say) by t = {t}, but not when it was first called, so its steps "
                    "could not be repeated with the same numbers: let it draw in every call, or draw outside and pass the "
                    "numbers through args=."
                )

    def _forget(self, t: float, y: Tensor) -> None:
        """Forget what the field keeps since a late call, without a graph, and uses: it would be a constant of later solves."""
        kept, used = self.memory.late(), {}  # type: list[Tensor], dict[int, Tensor]
        if kept:
            before = random_state(y.device)
            with self.lent:
                used = inputs_of(lambda: self.opening.at(t, y))
            if not same_random_state(before, random_state(y.device)):
                set_random_state(before, y.device)
        self.memory.forget([id(x) for x in kept if id(x) in used])

    def _matter_now(self, late: Buffers, t: float, y: Tensor) -> bool:
        with self.lent:  # also those that the first call changed
            return _matter(late, self.opening.at, t, y, False)

    def _check_tensors(self) -> None:
        for x in self.tensors:
            if not x.requires_grad:
                raise RuntimeError(
                    f"requires_grad of a tensor of shape {tuple(x.shape)} that the field uses was changed between the solve and "
                    "its backward pass: change it after the backward pass."
                )
        suspects = [x for x, number in self.constants if version(x) != number] if self.constants else []
        used = inputs_of(self.opening.again) if suspects else {}
        for x in suspects:
            if id(x) in used:
                raise RuntimeError(
                    f"a tensor of shape {tuple(x.shape)} that the field uses was modified by an inplace operation between "
                    "the solve and its backward pass, which needs it as it was: change it later, or give the field a copy."
                )


class Opening:
    """The first evaluation of a term, at x and the start of a span; it may be made again."""

    def __init__(self, term: Term, span: tuple[float, float], x: Tensor) -> None:
        self.term, self.span, self.x = term, span, x

    def __call__(self) -> list[Tensor]:
        """Evaluate, keep the `value`, and return what is differentiated of it."""
        t, before = self.span[0], version(self.x)
        self.value = self.term.value(t, self.x)
        product = self.term.product(self.value, self.term.control(t, *self.span))[0]
        if version(self.x) != before:
            raise ValueError(
                "the field changes its state in place, which is the solver's: write y = y.clone() first, or use operations "
                "without an underscore."
            )
        return [product]

    def at(self, t: float, x: Tensor) -> list[Tensor]:
        """All that an evaluation at (t, x) gives."""
        with torch.no_grad():
            value = self.term.value(t, x)
            found = tensors_in(value)
            start = self.span[0]
            return [*found, self.term.product(value, self.term.control(t, *self.span))[0]] if t == start else found

    def again(self) -> list[Tensor]:
        return self.at(self.span[0], self.x.detach())


class Saved:
    """The memory that autograd keeps for the gradient of a call, without that of tensors which are there anyhow."""

    num_bytes = 0

    def __init__(self, others: Iterable[Tensor]) -> None:
        self.others = set(map(address_of, others))

    def during(self, call: Callable[[], Any]) -> Any:
        """The call, measured unless it uses torch.func, which allows no hooks."""
        self.counted, self.num_bytes = self.others.copy(), 0
        try:
            with saved_tensors_hooks(self._add, torch.Tensor.detach):
                return call()
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            self.num_bytes = 0
            return call()

    def _add(self, x: Tensor) -> Tensor:
        address = address_of(x)
        if address not in self.counted:
            self.counted.add(address)
            self.num_bytes += x.nbytes
        return x.detach()  # x itself would be a cycle, where it is a result


class Constant(Guarded):
    """A term that nothing found asks for a gradient of. Raises RuntimeError if its values depend on something that does."""

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        if torch.is_grad_enabled():  # a leaf of the solver's own
            return call(*args)
        with torch.enable_grad():
            value = call(*args)
        outputs = [part for part in tensors_in(value) if part.requires_grad]
        own = {id(x) for x in tensors_in(args)}  # the state, of which the field may want gradients
        leaves = [leaf for leaf in boundary(outputs)[0] if id(leaf) not in own]
        if leaves:
            raise lost(leaves[0])
        return tree_map_only(Tensor, Tensor.detach, value) if outputs else value


class OwnValues(Guarded):
    """A term whose field returns the same preallocated memory in every call: values are copied out of it."""

    def __init__(self, term: Term) -> None:
        super().__init__(term)
        self.is_rate = False  # no evaluation is recorded where no gradient is wanted: it would stay in that memory

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        return tree_map_only(Tensor, Tensor.clone, call(*args))


def pure(
    term: Term,
    x0: Tensor,
    span: tuple[float, float],
    owners: Sequence[Any],
    gradient: str,
    moving: bool,
    coefficients: Sequence[Tensor] = (),
) -> Pure:
    """Call the term once at the start, and find all that it depends on.

    `owners` are the callables and objects whose tensors the term may use; leaves that they hold without being found by the
    recorded call get zero gradients if they stay unused. The engine takes the gradient, unless it is "direct", also with
    respect to the times if they are `moving`, and to the scheme's `coefficients`.
    """
    holdings, captured, device = Holdings(owners), capturing(), x0.device
    buffers = Buffers(holdings.modules.values())
    if captured and buffers:
        raise ValueError(NOT_CAPTURED.format("belongs to a module in training mode with buffers", "call .eval() on it"))
    torch.clear_autocast_cache()  # before torch 2.13 it may hold casts of parameters made under no_grad
    records = torch.is_grad_enabled()
    held = gradient != "direct" and records
    plain = list(filterfalse(REQUIRES_GRAD, holdings.tensors.values())) if held else []
    versions = list(zip(plain, map(version, plain), strict=True))
    opening = Opening(term, span, leaf_of(x0) if held else x0 if records else x0.detach())
    saved = Saved((*holdings.tensors.values(), x0)) if held and gradient == "checkpoint" else None
    call = opening if saved is None else partial(saved.during, opening)
    first = partial(discover, call, holdings, opening.x, buffers) if held else opening
    before = () if captured else random_state(device)
    with refusing_sharded_calls() if held else nullcontext():
        found, draws = drawing(first) if captured else _watched(first, before, opening, buffers)
    if captured and draws:
        raise ValueError(NOT_CAPTURED.format("draws random numbers", "draw them outside and pass them through args="))
    changing = buffers.changed() if buffers else buffers
    value = opening.value
    if not captured and _in_one_memory(opening, buffers):
        value = tree_map_only(Tensor, Tensor.clone, value)
        term = opening.term = OwnValues(term)
    matters = bool(changing) and _matter(changing, opening.at, span[0], x0.detach(), draws)
    if changing and not matters:
        changing.restore()
    repeats = draws or matters
    if repeats:
        seed = int(torch.randint(2**62, (), device="cpu")) if draws else None
        term = opening.term = Repeatable(term, seed, device, changing if matters else None)
    tensors = found.tensors if held else []
    wanted = moving or x0.requires_grad or bool(tensors)
    field = Pure(Constant(term) if held and not wanted else term, tensors)
    field.repeats, field.coefficients, field.opening = repeats, coefficients, opening
    field.lent = NO_BUFFERS if matters else changing
    if saved is not None:
        field.state_size, field.tape_size = x0.nbytes, saved.num_bytes
    if not repeats and not changing:
        field.first = (span[0], tree_map_only(Tensor, partial(_own, held), value))
    del opening.value  # and with it what the graph of an evaluation holds
    if held and wanted:
        field.own_leaves, field.memory = found.own_leaves, Memory(found.places, holdings.keepers)
        field.random = () if draws else before
        field.constants = versions and [
            (x, number) for x, number in versions if version(x) == number and x not in buffers
        ]
        if buffers:
            field.late = buffers.but(changing)
            field.lent = field.late if matters else buffers
    return field


def _watched(
    first: Callable[[], Any], before: tuple[Tensor, ...], opening: Opening, buffers: Buffers
) -> tuple[Any, bool]:
    """The first call's findings, and whether it drew random numbers; if so, the state of the generators is put back."""
    device, found, draws = opening.x.device, None, True
    try:
        found = first()
    finally:  # also where the field raises
        if same_random_state(before, random_state(device)):
            draws = False
        elif found is not None:
            with buffers, torch.no_grad():  # it may have been another thread
                _, draws = drawing(opening)
        if draws:
            set_random_state(before, device)
    return found, draws


def _in_one_memory(opening: Opening, buffers: Buffers) -> bool:
    """Whether another call returns the memory of this value, which was written in place, or is numpy's."""
    written = [x for x in tensors_in(opening.value) if version(x) != 0 or is_borrowed(x)]
    if not written or getattr(opening.term, "late", False):
        return False
    first = opening.value
    with buffers, torch.no_grad():
        opening()
    there = set(map(address_of, tensors_in(opening.value)))
    opening.value = first
    return any(address_of(x) in there for x in written)


def address_of(x: Tensor) -> int:
    """That of its memory, or of the object where it has none of its own."""
    return x.untyped_storage().data_ptr() if type(x) in (Tensor, Parameter) and x.layout is torch.strided else id(x)


def _own(held: bool, x: Tensor) -> Tensor:
    """A value to be kept, without its graph if that is `held`, and not where the next call may write."""
    x = x.detach() if held else x
    return x.clone() if version(x) > 0 else x


def _matter(buffers: Buffers, at: Callable[[float, Tensor], list[Tensor]], t: float, x: Tensor, draws: bool) -> bool:
    """Whether values are other ones once a call has changed the buffers: at x, where a layer may be its bias, and nearby."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.real.dtype, device="cpu")
    nearby = x + NUDGE * x.abs().amax().clamp(min=1.0) * noise.to(x.device)
    before = random_state(x.device) if draws else ()
    try:
        for place in (x, nearby):
            found = []
            with buffers:
                for _ in range(2):
                    if draws:
                        set_random_state(before, x.device)
                    found.append([value.nan_to_num() for value in at(t, place)])
            if not all(map(torch.equal, *found)):
                return True
        return False
    finally:
        if draws:
            set_random_state(before, x.device)
