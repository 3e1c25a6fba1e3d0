"""Finding every differentiable tensor that a field touches, whether or not anybody named it.

One recorded call tells: the graph names every leaf exactly, and where it comes upon intermediate results (an encoder's output)
that nobody holds, a dispatch mode sees them in another call. What the graph needs but nobody saw raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr as sequence_number
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revsolve.core.arithmetic import Time
from revsolve.core.tape import Guarded

SHARDED = {"FSDPModule", "FullyShardedDataParallel"}  # by name: importing them takes longer than most solves
LEAF: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
Edge = tuple[Any, int]  # a node of the autograd graph and which of its outputs


class _Witness(TorchDispatchMode):
    """Remembers the non-leaf tensors that are handed to any operation, and the identities of all that are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Edge, Tensor] = {}
        self.touched: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look(args)
        if kwargs:
            self._look(kwargs.values())
        return func(*args, **(kwargs or {}))

    def _look(self, things: Iterable[Any]) -> None:
        for x in things:
            if isinstance(x, Tensor):
                self.touched.add(id(x))
                if x.grad_fn is not None:
                    self.seen.setdefault((x.grad_fn, x.output_nr), x)
            elif isinstance(x, (list, tuple)):
                self._look(x)


class _UnseenWitness(_Witness):
    """One that torch.compile leaves alone, for fields that it compiles."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def traced(
    call: Callable[[], Tensor], held: Sequence[Tensor], own: Sequence[Tensor], aside: AbstractContextManager[Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """All tensors outside `call()` that the gradient of its value reaches (those `held` first, `own` left out), and the
    constants: others among those `held` that it uses and does not change. A second call is made `aside`."""
    constants = [(x, x._version) for x in held if not (x.requires_grad or x.is_inference())]
    witness = _UnseenWitness() if "torch._dynamo" in sys.modules else _Witness()
    witness.seen = {(x.grad_fn, x.output_nr): x for x in held if x.grad_fn is not None}
    with torch.enable_grad():
        birthday = sequence_number()
        with witness if constants else nullcontext():  # three times the time of many a call
            value = call()
        leaves, outside = boundary([value], birthday)
        if not constants and any(edge not in witness.seen for edge in outside):
            with aside, witness:
                call()
    found = {id(x): x for x in held if x.requires_grad}
    mine = {id(x) for x in own}
    for leaf in leaves:
        if id(leaf) not in mine:
            found.setdefault(id(leaf), leaf)
    for edge in outside:
        if edge not in witness.seen:
            raise ValueError(
                f"the field uses a tensor computed outside it (by {edge[0].name()}) that could not be found, so its gradient "
                "would be lost: pass it through args=."
            )
        found.setdefault(id(witness.seen[edge]), witness.seen[edge])
    return list(found.values()), [x for x, version in constants if id(x) in witness.touched and x._version == version]


def boundary(
    outputs: Sequence[Tensor], birthday: int = -1, known: Collection[Edge] = ()
) -> tuple[list[Tensor], list[Edge]]:
    """The leaves below `outputs`, and the edges into what had been computed before `birthday`; `known` edges end a path."""
    leaves, outside, seen = [], [], set(known)
    stack: list[Edge] = [(x.grad_fn, x.output_nr) for x in outputs if x.grad_fn is not None]
    leaves += [x for x in outputs if x.grad_fn is None and x.requires_grad]
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        if (leaf := leaf_at(node)) is not None:
            leaves.append(leaf)
        elif node._sequence_nr() < birthday:
            outside.append(edge)
        else:
            stack.extend(node.next_functions)
    return leaves, outside


def leaf_at(node: Any) -> Tensor | None:
    """The leaf where a path ends. A user's own function may have an attribute `variable`, too: its class decides."""
    return node.variable if type(node) is LEAF else None


class Audit:
    """Checks now and then, while gradients are taken, that the field touches nothing differentiable but what was found."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.leaves = {id(x) for x in tensors if x.is_leaf}
        self.edges = {(x.grad_fn, x.output_nr) for x in tensors if not x.is_leaf}

    def __call__(self, outputs: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        mine = {id(x) for x in own}
        leaves, _ = boundary(outputs, known=self.edges)
        missed = [x for x in leaves if id(x) not in self.leaves and id(x) not in mine]
        if missed:
            raise _lost(missed[0])


class Constant(Guarded):
    """A term that nothing found asks for a gradient of. Raises RuntimeError if its values depend on something that does."""

    def evaluate(self, t: Time, call: Callable[..., Any], *args: Any) -> Any:
        if torch.is_grad_enabled():  # a leaf of the solver's own
            return call(*args)
        with torch.enable_grad():
            value = call(*args)
        outputs = [part for part in tree_leaves(value) if isinstance(part, Tensor) and part.requires_grad]
        if outputs:
            leaves, _ = boundary(outputs)
            raise _lost(next(iter(leaves), outputs[0]))
        return value


def _lost(x: Tensor) -> RuntimeError:
    return RuntimeError(
        f"the field depends on a tensor of shape {tuple(x.shape)} that it did not use when it was first called, so its gradient "
        "would be lost: pass it through args=, or make the field an nn.Module that owns it."
    )


@contextmanager
def refusing_sharded_calls() -> Iterator[None]:
    """Raises ValueError if an FSDP module is called: one that is called again in the backward pass loses its gradient.

    FSDP reduces the gradients of a module when the backward pass leaves it, but those of a solve come after its last call.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return

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


def depend_on_each_other(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the tensors was computed from another of them."""
    edges = {(x.grad_fn, x.output_nr) for x in tensors if x.grad_fn is not None}
    leaves = {id(x) for x in tensors if x.is_leaf}
    seen: set[Edge] = set()
    stack = [edge for node, _ in edges for edge in node.next_functions]
    while stack:
        edge = stack.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        if edge in edges or id(leaf_at(edge[0])) in leaves:
            return True
        stack.extend(edge[0].next_functions)
    return False


def held_tensors(func: Any, depth: int = 3) -> Iterator[Tensor]:
    """Tensors that a callable holds, those of modules included: its own, its closure's, its bound object's, a partial's."""
    for thing in _distinct(_things_held(func, depth)):
        yield from (*thing.parameters(), *thing.buffers()) if isinstance(thing, nn.Module) else (thing,)


def held_modules(func: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Modules that a callable holds in the same ways, or as attributes of any object, and their submodules."""
    holders = func if isinstance(func, (list, tuple)) else [func]
    owners = [owner for holder in holders for owner in (holder, getattr(holder, "__self__", None))]
    plain = [owner for owner in owners if not (callable(owner) or isinstance(owner, ModuleType))]
    attributes = [x for owner in plain for x in getattr(owner, "__dict__", {}).values()]
    for thing in _distinct([*_things_held(func, depth), *attributes]):
        if isinstance(thing, nn.Module):
            yield from thing.modules()


def _distinct(things: Iterable[Any]) -> Iterable[Any]:
    """Each of them once; a bound method and a closure may hold the same module."""
    return {id(thing): thing for thing in things}.values()


def _things_held(func: Any, depth: int) -> Iterator[Tensor | nn.Module]:
    if isinstance(func, (Tensor, nn.Module)):
        yield func
    elif isinstance(func, (list, tuple)) and depth:
        for item in func:
            yield from _things_held(item, depth - 1)
    elif isinstance(func, dict) and depth:
        yield from _things_held(list(func.values()), depth)
    elif callable(func) and depth:
        for item in _held(func):
            yield from _things_held(item, depth - 1)


def _held(func: Any) -> Iterator[Any]:
    for cell in getattr(func, "__closure__", None) or ():
        with suppress(ValueError):  # a cell that is not filled yet
            yield cell.cell_contents
    code = getattr(func, "__code__", None)
    if code is not None:
        yield from (func.__globals__[name] for name in code.co_names if name in func.__globals__)
    for name in ("__self__", "func", "args", "keywords", "__wrapped__"):
        yield getattr(func, name, None)
    if not isinstance(func, type):
        yield from getattr(func, "__dict__", {}).values()
