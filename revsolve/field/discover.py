"""What a call of a field depends on: every differentiable tensor that it touches, whether or not anybody named it.

One recorded call tells: the graph names every leaf exactly, and where it comes upon intermediate results (an encoder's output)
that nobody holds, a dispatch mode sees them in another call. What the graph needs but nobody saw raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import filterfalse
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.module import register_module_forward_pre_hook

from revsolve.field.functorch import made_before, num_nodes, watching
from revsolve.field.snapshot import Changes, Snapshot, put, tensors_in

Edge = tuple[Any, int]  # a node of the graph, and which of its results
ACCUMULATE = "torch::autograd::AccumulateGrad"
REQUIRES_GRAD, SHAPE_AND_DTYPE = attrgetter("requires_grad"), attrgetter("shape", "dtype")
SHARDED = {"FSDPModule", "FullyShardedDataParallel"}  # by name: importing them takes longer than most solves


def leaf_at(node: Any) -> Tensor | None:
    """The leaf where a path ends. A node of a user's Function may have an attribute `variable`, too: the name decides."""
    return node.variable if node.name() == ACCUMULATE else None


def edge_of(x: Tensor) -> Edge:
    """Where the graph of a tensor that requires a gradient begins; for a leaf, the node that accumulates its gradient."""
    if x.is_leaf and x.layout is not torch.strided:  # of which torch makes no view
        with torch.enable_grad():
            return x.clone().grad_fn.next_functions[0]  # type: ignore[union-attr]
    node, number = get_gradient_edge(x)[:2]
    return node, number


def boundary(outputs: Iterable[Tensor | Edge], since: int = -1) -> tuple[list[Tensor], list[Edge]]:
    """The leaves below `outputs`, and the edges into what was recorded before the node number `since`."""
    leaves, old, seen = [], [], set()
    stack: list[Edge] = []
    for x in outputs:
        if not isinstance(x, Tensor):
            stack.append(x)
        elif x.requires_grad:
            stack.append(edge_of(x))
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        further = node.next_functions
        if not further and (leaf := leaf_at(node)) is not None:
            leaves.append(leaf)
        elif since >= 0 and made_before(node, since):
            old.append(edge)
        else:
            stack.extend(further)
    return leaves, old


def depend_on_each_other(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the tensors was computed from another of them."""
    stack = [edge for x in tensors if x.grad_fn is not None for edge in x.grad_fn.next_functions]
    edges, seen = set(map(edge_of, tensors)), set()
    while stack:
        edge = stack.pop()
        if edge[0] is None or edge in seen:
            continue
        if edge in edges:
            return True
        seen.add(edge)
        stack.extend(edge[0].next_functions)
    return False


def inputs_of(call: Callable[[], Any], refer: Callable[[Tensor], Any] = lambda x: x) -> dict[int, Any]:
    """All tensors that the operations of a call take, by identity; what `refer` makes of them."""
    seen: dict[int, Any] = {}

    def add(things: Sequence[Any]) -> None:
        for x in things:
            if isinstance(x, Tensor):
                seen[id(x)] = refer(x)
            elif isinstance(x, (list, tuple)):
                add(x)

    with watching(lambda operation, args, kwargs: add((args, *kwargs.values()))):
        call()
    return seen


def taken_from_outside(call: Callable[[], Any]) -> dict[int, Tensor]:
    """The tensors that the operations of a call take from outside, by identity: those that are there after it, and that another
    call takes again. Nothing else is held meanwhile."""
    first, second = inputs_of(call, weakref.ref), inputs_of(call, weakref.ref)
    there = {key: x for key, ref in first.items() if (x := ref()) is not None}
    return {key: x for key, x in there.items() if key in second and second[key]() is x}


def discover(
    call: Callable[[], Sequence[Tensor]], snapshot: Snapshot, own: Tensor, again: Any
) -> tuple[list[Tensor], frozenset[Any], Changes]:
    """Record `call()`, whose results are differentiable; `own` is the solver's leaf. Further calls are made in the context
    `again`.

    Returns the tensors outside that the gradient reaches, and held ones that it may reach later; shapes and dtypes of leaves that
    the field makes itself; and what the call changed of what is held.
    """
    held = list(snapshot.tensors.values())
    plain = list(filterfalse(REQUIRES_GRAD, held))
    birthday, outputs = num_nodes(), call()
    if any(map(REQUIRES_GRAD, plain)):
        _refuse_written(plain)
    changes, kept = snapshot.changes(), []  # type: Changes, list[Tensor]
    unused = snapshot.listed  # unless the call's graph ends there
    if changes:
        values = [x for _, found in changes for value in found.values() for x in tensors_in(value)]
        kept = [x for x in values if x.grad_fn is not None]
        before = (then.get(key) for (_, _, then), found in changes for key in found)
        unused = unused.union(id(x) for value in before for x in tensors_in(value))
    if kept:  # if they are used again, later calls find them as results computed outside
        with again:
            birthday, outputs = num_nodes(), call()
    leaves, outside = boundary(outputs, since=birthday)
    found = {id(x): x for x in held if x.requires_grad and (x.is_leaf or id(x) not in unused)}
    unheld = {id(x): x for x in leaves if x is not own and id(x) not in found}
    if unheld:  # is it there when the field is called again, or does the field make it?
        with again:
            there = unheld.keys() & map(id, boundary(call())[0])
        found |= {key: unheld.pop(key) for key in there}
    if kept and any(leaf is own for leaf in boundary(outside)[0]):
        raise ValueError(
            "the field uses a value that it computed from its state and kept from an earlier call, so its gradient would be "
            "lost: compute it in every call."
        )
    if outside:
        found |= {id(x): x for x in _intermediate(outside, [*held, *kept], call, again)}
    return list(found.values()), frozenset(map(SHAPE_AND_DTYPE, unheld.values())), changes


def side_results(changes: Changes, own: Tensor, tensors: Sequence[Tensor]) -> set[int]:
    """What the field computed from the solver's leaf and kept, but for `tensors`: gradients of it raise from now on."""
    used, found = set(map(id, tensors)), set()
    for value in (value for _, values in changes for value in values.values()):
        for x in tensors_in(value):
            if x.grad_fn is not None and id(x) not in used and any(leaf is own for leaf in boundary([x])[0]):
                x.register_hook(_refuse_side_result)
                found.add(id(x))
    return found


def refuse_side_results(changes: Changes, sides: Collection[int]) -> None:
    """Let gradients raise, too, of what stands in the places of `sides` now, which was not recorded."""
    for entries, found in changes:
        for key, x in found.items():
            if (
                id(entries[2].get(key)) in sides
                and isinstance(x, Tensor)
                and x.grad_fn is None
                and x.is_floating_point()
            ):
                with torch.enable_grad():
                    marked = x.detach().requires_grad_().view_as(x)
                marked.register_hook(_refuse_side_result)
                put(entries, {key: marked})


def _refuse_side_result(grad: Tensor) -> None:
    raise RuntimeError(
        f"a gradient is wanted of a value of shape {tuple(grad.shape)} that the field computed from its state and kept, such as "
        "a penalty that it adds up. A solve evaluates its field mostly without recording, so neither this value nor its gradient "
        "would be right: integrate it as a further component of the state."
    )


def _intermediate(
    outside: Sequence[Edge], held: Sequence[Tensor], call: Callable[[], Any], again: Any
) -> Iterator[Tensor]:
    """The tensors at these edges: among those held, or else among the inputs of the operations of another call."""
    known = {edge_of(x): x for x in held if x.grad_fn is not None}
    if any(edge not in known for edge in outside):
        with again:
            known |= {edge_of(x): x for x in inputs_of(call).values() if x.grad_fn is not None}
    for edge in outside:
        if edge not in known:
            raise ValueError(
                f"the field uses a tensor computed outside it (by {edge[0].name()}) that could not be found, so its gradient "
                "would be lost: pass it through args=."
            )
        yield known[edge]


def _refuse_written(tensors: Iterable[Tensor]) -> None:
    """Raise: the field wrote what needs a gradient into tensors of its own, which are left as they were."""
    written = [x.detach_() for x in tensors if x.requires_grad]
    raise ValueError(
        f"the field writes into a tensor of shape {tuple(written[0].shape)} that it keeps (a preallocated buffer), so that "
        "all its values share the same memory: return a new tensor in every call."
    )


def refusing_sharded_calls() -> AbstractContextManager[None]:
    """Raises ValueError if an FSDP module is called: one that is called again in the backward pass loses its gradient.

    FSDP reduces the gradients of a module when the backward pass leaves it, but those of a solve come after its last call.
    """
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return _refusing() if initialized else nullcontext()


@contextmanager
def _refusing() -> Iterator[None]:
    def refuse(module: nn.Module, args: Any) -> None:
        if SHARDED & {kind.__name__ for kind in type(module).__mro__}:
            raise ValueError(
                f"the field calls an FSDP module ({type(module).__name__}), which would lose its gradient: shard the module "
                "whose forward calls the solver, not the field or parts of it, or use gradient='direct'."
            )

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
