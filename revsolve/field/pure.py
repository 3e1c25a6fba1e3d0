"""The one boundary to the user's field: any callable becomes a pure function of time, state and a tuple of tensors.

One recorded call tells which tensors it depends on (parameters, closed-over leaves, results computed outside), whether it draws
random numbers and which buffers it changes. What that call found is an expectation: every later evaluation that is differentiated
is held to it, and a difference is an error that says what it is, never another number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revsolve.core.arithmetic import Time
from revsolve.core.tape import Term, leaf_of
from revsolve.field.audit import Audit, Constant, Constants, Watched, products
from revsolve.field.discover import (
    REQUIRES_GRAD,
    depend_on_each_other,
    discover,
    inputs_of,
    refuse_side_results,
    refusing_sharded_calls,
    side_results,
)
from revsolve.field.functorch import has_hooks, num_nodes, version
from revsolve.field.repeat import (
    Buffers,
    OwnValues,
    Repeatable,
    address_of,
    autocast_state,
    capturing,
    drawing,
    in_one_memory,
    own,
    random_state,
    same_random_state,
    set_random_state,
)
from revsolve.field.snapshot import Changes, Snapshot, computed_in, map_tensors, tensors_in
from revsolve.field.substitute import Substitution

NOT_CAPTURED = "a CUDA graph cannot capture this solve, because its field {}: {}."
NO_BUFFERS, NO_CONSTANTS, NOTHING_HELD, NOWHERE = Buffers(), Constants(), Snapshot(), nullcontext()
IS_LEAF = operator.attrgetter("is_leaf")
RATES = ("p", "drop_prob", "dropout")  # what modules that draw call the share of what they drop
NUDGE = 2.0**-10  # how far from the start, relative to it, a field is asked whether its buffers matter


@dataclass(eq=False)
class Pure:
    """What the engine knows of a field: `term`, the tensors outside that it depends on, and the first value.

    first: time and value of an evaluation at the start. opening: that evaluation, which may be made again. repeats: evaluations
    are made to repeat, for the field draws random numbers, or its buffers matter. untouched: buffers that the first call left
    alone; lent: those of which later calls get copies. random: the state of the generators, where the field draws nothing.
    own_leaves: shapes and dtypes of leaves that it makes itself. side_results: what it keeps that it computed from its state.
    coefficients: of the scheme. The sizes are bytes.
    """

    term: Term
    tensors: tuple[Tensor, ...] = ()
    _: KW_ONLY
    opening: Any = None
    first: tuple[Time, Any] | None = None
    repeats: bool = False
    # By functions, for torch.compile cannot take over objects that are defaults of a class.
    untouched: Buffers = field(default_factory=lambda: NO_BUFFERS)
    lent: Buffers = field(default_factory=lambda: NO_BUFFERS)
    random: tuple[Tensor, ...] = ()
    own_leaves: frozenset[Any] = frozenset()
    side_results: Collection[int] = ()
    constants: Constants = field(default_factory=lambda: NO_CONSTANTS)
    snapshot: Snapshot = field(default_factory=lambda: NOTHING_HELD)
    coefficients: Sequence[Tensor] = ()
    state_size: int = 0
    tape_size: int = 0
    autocast: Callable[[], Any] = nullcontext

    differentiate = staticmethod(products)

    def __post_init__(self) -> None:
        self.entangled = not all(map(IS_LEAF, self.tensors)) and depend_on_each_other(self.tensors)

    def take_first(self) -> tuple[Time, Any] | None:
        """Time and value of an evaluation at the start that has been made; once, for it is not kept."""
        first, self.first = self.first, None
        return first

    @contextmanager
    def at(self, tensors: Sequence[Tensor]) -> Iterator[Term]:
        """The term with these tensors in the place of its own, watched where its evaluations make one graph."""
        same = all(map(operator.is_, tensors, self.tensors))
        with nullcontext() if same else Substitution(self.tensors, tensors):
            yield Watched(self.term, self, tensors) if self.opening and self.opening.repeatable else self.term

    def stand_ins(self, tensors: Sequence[Tensor], make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The tensors to differentiate by: as they are, but for those computed from another one, or with hooks, which are to
        see the gradient of the solve alone."""
        if not (self.entangled or any(map(has_hooks, tensors))):  # hooks may be new
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
        with self.snapshot.restored(), self.autocast(), self.lent:
            for x in self.tensors:
                if not x.requires_grad:
                    raise RuntimeError(
                        f"requires_grad of a tensor of shape {tuple(x.shape)} that the field uses was changed between the "
                        "solve and its backward pass: change it after the backward pass."
                    )
            self.constants.check(lambda: self.opening.again())
            yield

    def check_repeatable(self, again: Callable[[], Any], t: float, y: Tensor) -> None:
        """Raise RuntimeError if the field began late with what its first call did not do. `again` repeats the forward pass."""
        late = self.untouched and self.untouched.changed()
        if late and _matter(late, partial(self.opening.at, within=self.lent.but(late)), t, y.detach(), False):
            raise RuntimeError(
                f"the field changes buffers ({late.names()}) by t = {t} on which its values depend, but not when it was first "
                "called, so no step could be repeated: call .eval() on the module, or use it from the start on."
            )
        if changes := self.snapshot.changes():
            self._forget(changes, t, y.detach())
            if self.side_results:
                refuse_side_results(self.snapshot.changes(), self.side_results)
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

    def _forget(self, changes: Changes, t: float, y: Tensor) -> None:
        """Take out what the field keeps since a late call, without a graph, and uses: it would be a constant of later solves."""
        used: dict[int, Tensor] = {}
        if any(computed_in(list(found.values())) for _, found in changes):
            before = random_state(y.device)
            with self.snapshot.undone(changes):
                used = inputs_of(partial(self.opening.at, t, y, self.lent))
            if not same_random_state(before, random_state(y.device)):
                set_random_state(before, y.device)
        self.snapshot.forget(changes, lambda x: id(x) in used)


class Opening:
    """The first evaluation of a term, at x and the start of a span; it may be made again."""

    def __init__(self, term: Term, span: tuple[float, float], x: Tensor) -> None:
        self.term, self.span, self.x, self.dtype = term, span, x, x.dtype
        self.repeatable = getattr(term, "repeats_graph", True)

    def __call__(self) -> list[Tensor]:
        """Evaluate, keep the `value`, and return what is differentiated of it."""
        t, before, birthday = self.span[0], version(self.x), num_nodes()
        self.value = self.term.value(t, self.x)
        self.num_nodes = num_nodes() - birthday
        product = self.term.product(self.value, self.term.control(t, *self.span))[0]
        self.num_nodes = self.num_nodes or num_nodes() - birthday  # where the product makes the evaluation
        if version(self.x) != before:
            raise ValueError(
                "the field changes its state in place, which is the solver's: write y = y.clone() first, or use operations "
                "without an underscore."
            )
        return [product]

    def repeats(self) -> bool:
        """Whether the evaluation makes as many nodes as it did."""
        other = copy(self)
        other.x = leaf_of(self.x.to(self.dtype))
        with torch.enable_grad():
            other()
        return other.num_nodes == self.num_nodes

    def at(self, t: float, x: Tensor, within: Any = NOWHERE) -> list[Tensor]:
        """All that an evaluation at (t, x) gives, recording nothing."""
        with within, torch.no_grad():
            value = self.term.value(t, x)
            found = tensors_in(value)
            start = self.span[0]
            return [*found, self.term.product(value, self.term.control(t, *self.span))[0]] if t == start else found

    def again(self, within: Any = NOWHERE) -> list[Tensor]:
        return self.at(self.span[0], self.x.detach(), within)


class Saved:
    """The memory that autograd keeps for the gradient of a call, without that of tensors which are there anyhow."""

    num_bytes = 0

    def __init__(self, call: Callable[[], Any], others: Iterable[Tensor]) -> None:
        self.call, self.others = call, set(map(address_of, others))

    def __call__(self) -> Any:
        """The call, measured unless it uses torch.func, which allows no hooks."""
        self.counted, self.num_bytes = self.others.copy(), 0
        try:
            with saved_tensors_hooks(self._add, torch.Tensor.detach):
                return self.call()
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            self.num_bytes = 0
            return self.call()

    def _add(self, x: Tensor) -> Tensor:
        address = address_of(x)
        if address not in self.counted:
            self.counted.add(address)
            self.num_bytes += x.numel() * x.element_size()  # at most, where it is sparse
        return x.detach()  # x itself would be a cycle, where it is a result


def pure(
    term: Term,
    x0: Tensor,
    pair_dtype: torch.dtype | None,
    span: tuple[float, float],
    owners: Any,
    gradient: str,
    moving: bool,
    coefficients: Sequence[Tensor] = (),
) -> Pure:
    """Call the term once at the start, and find all that it depends on.

    `owners` are the callables and objects whose tensors the term may use; leaves that they hold without being found by the
    recorded call get zero gradients if they stay unused. The engine takes the gradient, unless it is "direct", also with
    respect to the times if they are `moving`, and to the scheme's `coefficients`. The call is made at x0 in the `pair_dtype`.
    """
    # What it holds.
    captured, records, snapshot = capturing(), torch.is_grad_enabled(), Snapshot(owners)
    several, once = getattr(term, "several", False), getattr(term, "once", False)  # fields, each for a step of its own
    buffers, held = Buffers(snapshot.modules.values()), records and gradient != "direct"
    if captured and buffers:
        raise ValueError(NOT_CAPTURED.format("belongs to a module in training mode with buffers", "call .eval() on it"))
    plain = list(filterfalse(REQUIRES_GRAD, snapshot.tensors.values())) if held or not records else []
    versions = list(zip(plain, map(version, plain), strict=True))

    # What an evaluation depends on, and whether it draws random numbers.
    x = x0 if pair_dtype is None else x0.to(pair_dtype)
    opening = Opening(term, span, leaf_of(x) if held else x if records else x.detach())
    saved = Saved(opening, (*snapshot.tensors.values(), x)) if held and gradient == "checkpoint" else None
    call = partial(discover, saved or opening, snapshot, opening.x, buffers) if held else opening
    torch.clear_autocast_cache()  # before torch 2.13 it may hold casts of parameters made under no_grad
    random = () if captured else random_state(x.device)
    with refusing_sharded_calls() if held else nullcontext():
        found, draws = drawing(call) if captured else _watched(call, random, opening, buffers)
    if several and not draws:  # any of the fields may be the first one to draw
        rates = (vars(m).get(name) for m in snapshot.modules.values() if m.training for name in RATES)
        draws = any(isinstance(rate, float) and rate > 0.0 for rate in rates)
    if captured and draws:
        raise ValueError(NOT_CAPTURED.format("draws random numbers", "draw them outside and pass them through args="))

    # What it takes for another one to give the same.
    value, changing = opening.value, buffers.changed() if buffers else buffers
    # Where nothing is recorded, nothing may be later on, either: it would be written into memory of the field's.
    writes = not records and any(version(x) != number and x not in buffers for x, number in versions)
    shares = partial(in_one_memory, value, partial(opening.again, buffers))
    if not (captured or getattr(term, "late", False)) and (writes or shares()):
        value = map_tensors(Tensor.clone, value)
        term = opening.term = OwnValues(term)
    matters = bool(changing) and _matter(changing, opening.at, span[0], x.detach(), draws)
    if changing and not matters:
        changing.restore()
    if draws or matters:
        seed = int(torch.randint(2**62, (), device="cpu")) if draws else None
        term = opening.term = Repeatable(term, seed, x.device, changing if matters else None)
    first = None if draws or changing else (span[0], map_tensors(partial(_kept, held), value))

    tensors, own_leaves, changes = found if held else ((), frozenset(), [])
    sides: Collection[int] = ()
    wanted = held and (moving or x.requires_grad or bool(tensors))
    if changes and wanted:
        sides = side_results(snapshot.changes(), opening.x, tensors)
        snapshot.settle(changes)
    del opening.value  # and with it what the graph of an evaluation holds
    opening.x = x0.detach()  # not its copy in the dtype of the pair
    untouched = buffers.but(changing) if buffers else buffers
    return Pure(
        term if wanted or not held else Constant(term),
        tuple(tensors),
        opening=opening,
        first=first,
        repeats=draws or matters,
        untouched=NO_BUFFERS if once else untouched,
        lent=untouched if matters else buffers if wanted else changing,
        random=() if draws else random,
        own_leaves=own_leaves,
        side_results=sides,
        constants=Constants(versions, buffers) if held else NO_CONSTANTS,
        snapshot=snapshot if wanted else NOTHING_HELD,
        coefficients=coefficients,
        state_size=x.nbytes if saved else 0,
        tape_size=saved.num_bytes if saved else 0,
        autocast=autocast_state() if held else nullcontext,
    )


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
        elif found is not None:  # it may have been another thread
            _, draws = drawing(partial(opening.again, buffers))
        if draws:
            set_random_state(before, device)
    return found, draws


def _kept(held: bool, x: Tensor) -> Tensor:
    """A value to be kept, without its graph if that is `held`, and not where the next call may write."""
    return own(x.detach() if held else x)


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
