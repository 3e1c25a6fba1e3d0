"""The one boundary to the user's field: any callable becomes a pure function of time, state and a tuple of tensors.

One recorded call tells which tensors it depends on (parameters, closed-over leaves, results computed outside), whether it draws
random numbers and which buffers it changes. What that call found is an expectation: every later evaluation that is differentiated
is held to it, and a difference is an error that says what it is, never another number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from revsolve.core.arithmetic import Time
from revsolve.core.tape import Guarded, Term, leaf_of
from revsolve.field.autograd import boundary, drawing, edge_of, inputs_of, leaf_at
from revsolve.field.discover import Found, depend_on_each_other, discover, refusing_sharded_calls
from revsolve.field.functorch import has_hooks, made_before, num_nodes, vector_jacobian_product, version
from revsolve.field.holders import MISSING, Holdings, changed
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


class Pure:
    """What the engine knows of a field: `term`, the tensors outside that it depends on, and the first value."""

    differentiate = staticmethod(vector_jacobian_product)

    def __init__(self, term: Term, tensors: Sequence[Tensor] = (), repeats: bool = False) -> None:
        self.term, self.tensors = term, tuple(tensors)
        self.repeats = (
            repeats  # whether evaluations are made to repeat: the field draws random numbers, or its buffers matter
        )
        self._first: tuple[Time, Any] | None = None
        self.own_leaves: frozenset[Any] = frozenset()  # shapes and dtypes of leaves that the field makes itself
        self.coefficients: list[Tensor] = []  # of the scheme, which were computed before
        self.lent: Buffers | None = None  # that evaluations change, though their values do not depend on them
        self.constants: list[tuple[Tensor, int]] = []  # what it may use besides, with versions
        self.places: list[Any] = []  # where it finds things, with what it found there
        self.random: tuple[Tensor, ...] = ()  # the state of the generators, where it draws nothing
        self.autocast = autocast_state()
        self.late = Buffers()  # of modules that train, which the first call left alone
        self.probe: Callable[[float, Tensor], list[Tensor]] = lambda t, x: []  # an evaluation
        self.start: tuple[float, Tensor] = (0.0, torch.empty(0, device="cpu"))
        self.stand_ins_needed = depend_on_each_other(self.tensors)

    def take_first(self) -> tuple[Time, Any] | None:
        """Time and value of an evaluation at the start that has been made; once, for it is not kept."""
        first, self._first = self._first, None
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
        self._check_tensors()
        moved = changed(self.places)
        try:
            for place, then, _ in moved:
                place.set(then)
            with self.autocast(), self.lent or nullcontext():
                yield
        finally:
            for place, _, now in moved:
                if now is not MISSING:
                    place.set(now)

    def conclude(self, again: Callable[[], Any], t: float, y: Tensor) -> None:
        """Raise RuntimeError if the field began late with what its first call did not do. `again` repeats the forward pass."""
        late = self.late and self.late.changed()
        if late and self._matter_now(late, t, y.detach()):
            raise RuntimeError(
                f"the field changes buffers ({late.names()}) by t = {t} on which its values depend, but not when it was first "
                "called, so no step could be repeated: call .eval() on the module, or use it from the start on."
            )
        before, self.random = self.random, ()  # 5 kB that nobody asks for again
        if before and not same_random_state(before, random_state(y.device)):
            with self.lent or nullcontext(), torch.no_grad():
                _, late_draws = drawing(again)
            if late_draws:
                raise RuntimeError(
                    f"the field draws random numbers (dropout, say) by t = {t}, but not when it was first called, so its steps "
                    "could not be repeated with the same numbers: let it draw in every call, or draw outside and pass the "
                    "numbers through args=."
                )

    def _matter_now(self, late: Buffers, t: float, y: Tensor) -> bool:
        with self.lent or nullcontext():  # also those that the first call changed
            return _matter(late, self.probe, t, y, False)

    def _check_tensors(self) -> None:
        for x in self.tensors:
            if not x.requires_grad:
                raise RuntimeError(
                    f"requires_grad of a tensor of shape {tuple(x.shape)} that the field uses was changed between the solve and "
                    "its backward pass: change it after the backward pass."
                )
        suspects = [x for x, number in self.constants if version(x) != number]
        if suspects:
            used = inputs_of(lambda: self.probe(*self.start))
            for x in suspects:
                if id(x) in used:
                    raise RuntimeError(
                        f"a tensor of shape {tuple(x.shape)} that the field uses was modified by an inplace operation between "
                        "the solve and its backward pass, which needs it as it was: change it later, or give the field a copy."
                    )


class Audit:
    """Holds recorded evaluations to what the first one showed: their graph ends at `tensors` and at what the solver hands in."""

    def __init__(self, tensors: Sequence[Tensor], field: Pure) -> None:
        self.field = field
        wanted = [x for x in tensors if x.requires_grad]
        self.known: set[Any] = {edge_of(x)[0] for x in wanted if x.is_leaf}  # nodes
        self.some = {edge_of(x) for x in wanted if not x.is_leaf}  # edges to some of a node's results
        self.spare: set[int] = set()
        self.computed = {edge_of(x)[0] for x in field.coefficients}
        cached = any(map(torch.is_autocast_enabled, ("cpu", "cuda"))) and torch.is_autocast_cache_enabled()
        self.since = -1 if cached else num_nodes()  # what autocast cast before is used again, and may be

    def __call__(self, outputs: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        strangers = self._strangers(outputs, own)
        if strangers:
            self._explain(strangers, own)

    def _strangers(self, outputs: Sequence[Tensor], own: Sequence[Tensor]) -> list[Any]:
        """Nodes of leaves that are not known, and nodes older than the recording.

        On the hot path (4 % of the gradient of a small field): one flat loop, in which a node stands for all its results but
        where only some of these are known, and ages are asked only where a count of nodes is new.
        """
        state, strangers = own[0] if own else None, []
        done = self.known.copy()
        stack = [x.grad_fn for x in outputs]
        while stack:
            node = stack.pop()
            if node is None or node in done:
                continue
            done.add(node)
            further = node.next_functions
            if further:
                for edge in further:
                    if edge[0] not in done and edge not in self.some:
                        stack.append(edge[0])
            elif state is None or getattr(node, "variable", None) is not state:
                strangers.append(node)
        if self.since >= 0:
            now = num_nodes()
            # nodes that were made and are not needed; another number where some are older
            spare = now - self.since - len(done)
            if spare not in self.spare:
                older = [node for node in done - self.known if made_before(node, self.since)]
                strangers += older
                self.spare |= set() if older else {spare}
            self.since = now  # what is recorded next is younger
        return strangers

    def _explain(self, strangers: Sequence[Any], own: Sequence[Tensor]) -> None:
        """Raise unless what is not known belongs to the solver, or is a leaf that the field makes in every call."""
        leaves = [leaf for node in strangers if (leaf := leaf_at(node)) is not None]
        old = [(node, 0) for node in strangers if leaf_at(node) is None and node not in self.computed]
        mine = {id(x) for x in own}
        if old and any(id(x) not in mine or edge_of(x)[0] in self.known for x in boundary(old)[0]):
            raise RuntimeError(
                f"the field uses a value that it kept from an earlier call (a cache; by {old[0][0].name()}), whose gradient "
                "would be lost: compute it in every call, or before the solve."
            )
        for leaf in leaves:
            if id(leaf) not in mine and (leaf.shape, leaf.dtype) not in self.field.own_leaves:
                self._judge(leaf)

    def _judge(self, leaf: Tensor) -> None:
        if any(leaf is x for x, _ in self.field.constants):
            raise RuntimeError(
                f"requires_grad of a tensor of shape {tuple(leaf.shape)} that the field uses was set since it was solved: set it "
                "before the solve."
            )
        if any(leaf is x for x in self.field.tensors):
            raise RuntimeError(
                f"the field hands a tensor of shape {tuple(leaf.shape)}, which has a hook or another tensor computed from it, to "
                "a torch.autograd.Function or to scripted code, where no other can stand in for it: remove the hook, call torch "
                "functions, or say gradient='direct'."
            )
        raise lost(leaf)


class Constant(Guarded):
    """A term that nothing found asks for a gradient of. Raises RuntimeError if its values depend on something that does."""

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        if torch.is_grad_enabled():  # a leaf of the solver's own
            return call(*args)
        with torch.enable_grad():
            value = call(*args)
        outputs = [part for part in tree_leaves(value) if isinstance(part, Tensor) and part.requires_grad]
        own = {
            id(x) for x in tree_leaves(args) if isinstance(x, Tensor)
        }  # the state, of which the field may want gradients
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


def _in_one_memory(value: Any, again: Callable[[], Any], values: list[Any], buffers: Buffers) -> bool:
    """Whether another call returns the memory of this value, which was written in place. `again` puts its value in `values`."""
    written = [x for x in tree_leaves(value) if isinstance(x, Tensor) and version(x) != 0]
    if not written or capturing():
        return False
    with buffers, torch.no_grad():
        again()
    there = {x.untyped_storage().data_ptr() for x in tree_leaves(values[0]) if isinstance(x, Tensor)}
    return any(x.untyped_storage().data_ptr() in there for x in written)


def lost(x: Tensor) -> RuntimeError:
    """The error of a tensor that was not there when the field was first called."""
    return RuntimeError(
        f"the field depends on a tensor of shape {tuple(x.shape)} that it did not use when it was first called, so its gradient "
        "would be lost: pass it through args=, or make the field an nn.Module that owns it."
    )


def pure(
    term: Term, x0: Tensor, span: tuple[float, float], owners: Sequence[Any], differentiates: bool, moving: bool
) -> Pure:
    """Call the term once at the start, and find all that it depends on.

    `owners` are the callables and objects whose tensors the term may use; leaves that they hold without being found by the
    recorded call get zero gradients if they stay unused. `differentiates`: the engine takes the gradient, not autograd.
    """
    holdings, records = Holdings(owners), torch.is_grad_enabled()
    buffers = Buffers(holdings.modules.values())
    if capturing() and buffers:
        raise ValueError(NOT_CAPTURED.format("belongs to a module in training mode with buffers", "call .eval() on it"))
    torch.clear_autocast_cache()  # before torch 2.13 it may hold casts of parameters made under no_grad
    versions = {i: version(x) for i, x in holdings.tensors.items()} if differentiates and records else {}
    leaf = leaf_of(x0) if records else x0.detach()
    values: list[Any] = []

    def evaluate() -> list[Tensor]:
        value = term.value(span[0], leaf)
        values[:] = [value]
        return [term.product(value, term.control(span[0], *span))[0]]

    def first() -> Found | None:
        if records:
            return discover(evaluate, holdings, (leaf,), lambda: buffers)
        evaluate()
        return None

    with refusing_sharded_calls() if differentiates and records else nullcontext():
        found, draws = _watched(first, evaluate, buffers, x0.device)
    if capturing() and draws:
        raise ValueError(NOT_CAPTURED.format("draws random numbers", "draw them outside and pass them through args="))
    changing, device = buffers.changed() if buffers else buffers, x0.device
    value = values[0]
    if not getattr(term, "late", False) and _in_one_memory(value, evaluate, values, buffers):
        term, value = OwnValues(term), tree_map_only(Tensor, Tensor.clone, values[0])
    probe = partial(_probe, term, span)
    matter = bool(changing) and _matter(changing, probe, span[0], x0.detach(), draws)
    repeats = draws or matter
    if repeats:
        seed = int(torch.randint(2**62, (), device="cpu")) if draws else None
        term = Repeatable(term, seed, [device] if x0.is_cuda else [], changing if matter else None)
    if changing and not matter:
        changing.restore()
    tensors = found.tensors if found else []
    wanted = moving or any(x.requires_grad for x in (x0, *tensors))
    field = Pure(Constant(term) if records and not wanted else term, tensors, repeats)
    field.lent = None if matter or not changing else changing
    if not repeats and not changing:
        field._first = (span[0], tree_map_only(Tensor, Tensor.detach, value))
    if found and differentiates and wanted:
        field.own_leaves, field.places = found.own_leaves, found.places
        known = {id(x) for x in tensors} | {id(buffer) for _, _, buffer, _ in buffers.kept}
        field.constants = [
            (x, versions[i]) for i, x in holdings.tensors.items() if i not in known and version(x) == versions[i]
        ]
        field.probe = probe
        if buffers:
            field.late = buffers.but(changing)
            field.lent = (field.late if matter else buffers) or None
        field.random = () if draws or capturing() else random_state(device)
    return field


def _probe(term: Term, span: tuple[float, float], t: float, x: Tensor) -> list[Tensor]:
    """All that an evaluation at (t, x) gives."""
    with torch.no_grad():
        value = term.value(t, x)
        found = [part for part in tree_leaves(value) if isinstance(part, Tensor)]
        return [*found, term.product(value, term.control(t, *span))[0]] if t == span[0] else found


def _watched(
    first: Callable[[], Any], again: Callable[[], Any], buffers: Buffers, device: torch.device
) -> tuple[Any, bool]:
    """The first call's findings, and whether it drew random numbers; if so the state of the generators is put back."""
    if capturing():
        return drawing(first)
    before = random_state(device)
    try:
        found = first()
    except BaseException:
        set_random_state(before, device)
        raise
    if same_random_state(before, random_state(device)):
        return found, False
    with buffers, torch.no_grad():  # it may have been another thread
        _, draws = drawing(again)
    if draws:
        set_random_state(before, device)
    return found, draws


def _matter(buffers: Buffers, probe: Callable[[float, Tensor], list[Tensor]], t: float, x: Tensor, draws: bool) -> bool:
    """Whether values are other ones once a call has changed the buffers: at x, where a layer may be its bias, and nearby."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.real.dtype, device="cpu")
    nearby = x + NUDGE * x.abs().amax().clamp(min=1.0) * noise.to(x.device)
    before = random_state(x.device) if draws else ()
    try:
        return not all(_same_twice(buffers, lambda: probe(t, place), before, x.device) for place in (x, nearby))  # noqa: B023
    finally:
        if draws:
            set_random_state(before, x.device)


def _same_twice(
    buffers: Buffers, call: Callable[[], list[Tensor]], random: tuple[Tensor, ...], device: torch.device
) -> bool:
    found = []
    with buffers:
        for _ in range(2):
            if random:
                set_random_state(random, device)
            found.append([x.nan_to_num() for x in call()])
    return all(map(torch.equal, *found))
