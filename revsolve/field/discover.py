"""Finding every differentiable tensor that a field touches, whether or not anybody named it.

One recorded call tells: the graph names every leaf exactly, and where it comes upon intermediate results (an encoder's output)
that nobody holds, a dispatch mode sees them in another call. What the graph needs but nobody saw raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import filterfalse
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from revsolve.field.autograd import Edge, boundary, edge_of, inputs_of
from revsolve.field.functorch import num_nodes
from revsolve.field.holders import Holdings, Place, changed

REQUIRES_GRAD, SHAPE_AND_DTYPE = attrgetter("requires_grad"), attrgetter("shape", "dtype")
SHARDED = {"FSDPModule", "FullyShardedDataParallel"}  # by name: importing them takes longer than most solves


@dataclass(frozen=True)
class Found:
    """What a field's first call showed.

    tensors: those outside that its gradient reaches, and held ones that it may reach later. own_leaves: shape and dtype of
    leaves that the field makes itself. places: where the field's holders keep values, but for those that the call changed.
    """

    tensors: list[Tensor]
    own_leaves: frozenset[Any]
    places: list[Place]


def discover(call: Callable[[], Sequence[Tensor]], holdings: Holdings, own: Tensor, again: Any) -> Found:
    """Record `call()`, whose results are differentiable; `own` is the solver's leaf. Further calls are made in the context
    `again`."""
    held = holdings.tensors.values()
    plain = list(filterfalse(REQUIRES_GRAD, held))
    birthday, outputs = num_nodes(), call()
    if any(map(REQUIRES_GRAD, plain)):
        _refuse_written(plain)
    moved = changed(holdings.places)
    kept = [x for _, x in moved if isinstance(x, Tensor) and x.grad_fn is not None] if moved else []
    if kept:  # if they are used again, later calls find them as results computed outside
        with again:
            birthday, outputs = num_nodes(), call()
    leaves, outside = boundary(outputs, since=birthday)
    found, unused = {}, holdings.listed
    if moved:
        unused = unused.union(id(place.value) for place, _ in moved)
    for x in held:
        if x.requires_grad and (x.is_leaf or id(x) not in unused):  # unless the call's graph ends there
            found[id(x)] = x
    unheld = {}
    for x in leaves:
        if x is not own and id(x) not in found:
            unheld[id(x)] = x
    if unheld:  # is it there when the field is called again, or does the field make it?
        with again:
            there = unheld.keys() & map(id, boundary(call())[0])
        found |= {key: unheld.pop(key) for key in there}
    if outside:
        found |= {id(x): x for x in _intermediate(outside, [*held, *kept], call, again)}
    gone = {id(place) for place, _ in moved} if moved else ()
    places = [place for place in holdings.places if id(place) not in gone] if moved else holdings.places
    return Found(list(found.values()), frozenset(map(SHAPE_AND_DTYPE, unheld.values())), places)


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


def _refuse_written(tensors: Sequence[Tensor]) -> None:
    """Raise: the field wrote what needs a gradient into a tensor of its own, which is left as it was found."""
    written = list(filter(REQUIRES_GRAD, tensors))
    for x in written:
        x.detach_()
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
