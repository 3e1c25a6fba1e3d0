"""Later evaluations held to what the first one showed: a dependence that would be lost is an error that says what it is."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.core.tape import Term
from revsolve.field.discover import boundary, edge_of, inputs_of, leaf_at, taken_from_outside
from revsolve.field.functorch import made_before, num_nodes, vector_jacobian_product, version
from revsolve.field.repeat import Guarded
from revsolve.field.snapshot import Snapshot, map_tensors, tensors_in

KEPT = (
    "the field uses a value that it kept from an earlier call (a cache; {}), or one computed before from a place where it was "
    "not found, so its gradient would be lost: compute it in every call, or before the solve, and pass it through args=."
)


class Expected(Protocol):
    """What is known of a field: `tensors` are those outside that it depends on, `own_leaves` the shapes and dtypes of leaves
    that it makes itself, `constants` other tensors that it may use, `coefficients` those of the scheme, `opening` its first call,
    and `snapshot` what it holds."""

    tensors: tuple[Tensor, ...]
    own_leaves: frozenset[Any]
    constants: Constants
    coefficients: Sequence[Tensor]
    opening: Any
    snapshot: Snapshot


def keeps_casts() -> bool:
    """Whether autocast uses what it has cast before again."""
    return torch.is_autocast_cache_enabled() and any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


class Audit:
    """Holds recorded evaluations to what the first one showed: their graph ends at `tensors` and at what the solver hands in."""

    def __init__(self, tensors: Sequence[Tensor], field: Expected) -> None:
        self.field = field
        self.known = set(map(id, tensors))
        self.ends: dict[Any, Tensor] = {}  # the leaves among those by their nodes, as they are met
        self.some: set[Any] = set()  # edges to some of a node's results
        self.spare: set[int] = set()
        # Perhaps by a hook, so that others stand for the leaves.
        unpacked = not all(map(operator.is_, tensors, field.tensors))
        self.made: dict[int, weakref.ref[Tensor]] = {}  # leaves of which the field makes others in every call, it seems
        for x in tensors:
            if not x.is_leaf:
                self.some.add(edge_of(x))
            elif x.requires_grad and unpacked:
                self.known.add(id(leaf_at(edge_of(x)[0])))
        self.since = -1 if keeps_casts() else num_nodes()  # what autocast cast before is used again, and may be

    def __call__(self, outputs: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """Look for nodes of leaves that are not known, and for nodes older than the recording; the leaves met, but for own[0].

        On the hot path (4 % of the gradient of a small field): one flat loop, in which a node stands for all its results but
        where only some of these are known, and ages are asked only where a count of nodes is new.
        """
        state = own[0] if own else None
        strangers: list[Any] = []
        reached: list[Tensor] = []
        done, ends, some = {None}, self.ends, self.some  # type: set[Any], dict[Any, Tensor], set[Any]
        stack: list[Any] = []
        for x in outputs:
            if x.grad_fn is None:
                reached.append(x)  # a leaf that the field returns
            elif id(x) not in self.known:
                stack.append(x.grad_fn)
        while stack:
            node = stack.pop()
            if node in done:
                continue
            done.add(node)
            if node in ends:
                reached.append(ends[node])
                continue
            further = node.next_functions
            if further:
                for edge in further:
                    if edge[0] not in done and edge not in some:
                        stack.append(edge[0])
            else:
                leaf: Any = getattr(node, "variable", None)
                if leaf is not None and leaf is not state:
                    reached.append(leaf)
                if id(leaf) in self.known:
                    ends[node] = leaf
                elif leaf is None or leaf is not state:
                    strangers.append(node)
        if self.since >= 0:
            now = num_nodes()
            # nodes that were made and are not needed; another number where some are older
            spare = now - self.since - len(done) + len(reached)
            if spare not in self.spare:
                older = [node for node in done if made_before(node, self.since)]
                strangers += older
                self.spare |= set() if older else {spare}
            self.since = now  # what is recorded next is younger
        if strangers:
            self._explain(strangers, own)
        return reached

    def _explain(self, strangers: Sequence[Any], own: Sequence[Tensor]) -> None:
        """Raise unless what is not known belongs to the solver, or is a leaf that the field makes in every call."""
        leaves = [leaf for node in strangers if (leaf := leaf_at(node)) is not None]
        computed = {edge_of(x)[0] for x in self.field.coefficients if x.requires_grad}
        old = [(node, 0) for node in strangers if leaf_at(node) is None and node not in computed]
        mine = {id(x) for x in own}
        if old and any(id(x) not in mine or id(x) in self.known for x in boundary(old)[0]):
            raise RuntimeError(KEPT.format(f"by {old[0][0].name()}"))
        for leaf in leaves:
            if id(leaf) in mine:
                continue
            before = self.made.get(id(leaf), lambda: None)()
            if (leaf.shape, leaf.dtype) not in self.field.own_leaves or before is leaf:
                raise self._judged(leaf)
            self.made[id(leaf)] = weakref.ref(leaf)

    def _judged(self, leaf: Tensor) -> RuntimeError:
        if any(leaf is x for x, _ in self.field.constants.versions):
            return RuntimeError(
                f"requires_grad of a tensor of shape {tuple(leaf.shape)} that the field uses was set since it was solved: set it "
                "before the solve."
            )
        if any(leaf is x for x in self.field.tensors):
            return RuntimeError(
                f"the field hands a tensor of shape {tuple(leaf.shape)}, which has a hook or another tensor computed from it, to "
                "a torch.autograd.Function or to scripted code, where no other can stand in for it: remove the hook, call torch "
                "functions, or say gradient='direct'."
            )
        return lost(leaf)


class Watched(Guarded):
    """A term in the backward pass, which looks into an evaluation that makes another number of nodes than those before.

    That may be another branch, or a value that the field kept from a call which recorded nothing: no graph tells of it, but it is
    there again in the next call.
    """

    def __init__(self, term: Term, field: Expected, tensors: Sequence[Tensor]) -> None:
        super().__init__(term)
        self.field, self.tensors, self.counts = field, tensors, {field.opening.num_nodes}

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        before = num_nodes()
        value = call(*args)
        if (made := num_nodes() - before) not in self.counts and not keeps_casts():
            self.counts.add(made)
            self._look(partial(call, *args), t, args)
        return value

    def _look(self, call: Callable[[], Any], t: Time, args: Any) -> None:
        """Raise RuntimeError if a call takes a tensor from outside that is held nowhere, and that the first one did not take."""
        snapshot, own = self.field.snapshot, (*self.tensors, *tensors_in(args))
        with torch.no_grad():
            used = taken_from_outside(call)
            lent = (x for module in snapshot.modules.values() for x in module.buffers(recurse=False))
            strange = used.keys() - snapshot.tensors.keys() - {id(x) for x in (*own, *lent)}
            if strange and self.field.opening.repeats():  # else it uses what it has kept since
                strange -= taken_from_outside(self.field.opening.again).keys()
        for x in map(used.__getitem__, strange):
            remembered = not x.ndim and not x.is_complex() and math.isclose(float(x), float(t), rel_tol=1e-6)
            if not remembered:  # as times are
                raise (
                    lost(x)
                    if x.requires_grad and x.is_leaf
                    else RuntimeError(KEPT.format("found again in the next call"))
                )


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
        return map_tensors(Tensor.detach, value) if outputs else value


def products(*given: Any) -> tuple[Tensor | None, ...]:
    """The products of cotangents, as `vector_jacobian_product` gives them, or the reason why there are none."""
    try:
        return vector_jacobian_product(*given)
    except RuntimeError as error:
        if "through the graph a second time" in str(error):
            raise RuntimeError(KEPT.format("the graph of which is gone")) from error
        raise


class Constants:
    """Tensors without a gradient that a field may use: each of them with its version."""

    def __init__(self, versions: Iterable[tuple[Tensor, int]] = (), buffers: Any = ()) -> None:
        """But for those that have changed already, or are buffers."""
        self.versions = [(x, number) for x, number in versions if version(x) == number and x not in buffers]

    def check(self, again: Callable[[], Any] | None) -> None:
        """Raise RuntimeError if one of them was changed in place that `again`, an evaluation, uses; None: all are used."""
        changed = [x for x, number in self.versions if version(x) != number]
        used = inputs_of(again) if changed and again is not None else {}
        for x in changed:
            if again is None or id(x) in used:
                raise RuntimeError(
                    f"a tensor of shape {tuple(x.shape)} that the field uses was modified by an inplace operation between the "
                    "solve and its gradient, which needs it as it was: change it later, or give the field a copy."
                )


def lost(x: Tensor) -> RuntimeError:
    """The error of a tensor that was not there when the field was first called."""
    return RuntimeError(
        f"the field depends on a tensor of shape {tuple(x.shape)} that it did not use when it was first called, so its gradient "
        "would be lost: pass it through args=, or make the field an nn.Module that owns it."
    )
