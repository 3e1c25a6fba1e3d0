"""The graph of autograd below a value, and what operations take: who reads these knows what a field depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from revsolve.field.functorch import made_before, watching

Edge = tuple[Any, int]  # a node of the graph, and which of its results
ACCUMULATE = "torch::autograd::AccumulateGrad"


def leaf_at(node: Any) -> Tensor | None:
    """The leaf where a path ends. A node of a user's Function may have an attribute `variable`, too: the name decides."""
    return node.variable if node.name() == ACCUMULATE else None


def edge_of(x: Tensor) -> Edge:
    """Where the graph of a tensor that requires a gradient begins; for a leaf, the node that accumulates its gradient."""
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


def inputs_of(call: Callable[[], Any]) -> dict[int, Tensor]:
    """All tensors that the operations of a call take, by identity."""
    seen: dict[int, Tensor] = {}

    def add(things: Sequence[Any]) -> None:
        for x in things:
            if isinstance(x, Tensor):
                seen[id(x)] = x
            elif isinstance(x, (list, tuple)):
                add(x)

    with watching(lambda operation, args, kwargs: add((args, *kwargs.values()))):
        call()
    return seen


def drawing(call: Callable[[], Any]) -> tuple[Any, bool]:
    """What a call returns, and whether it draws from a default generator of torch; draws of other threads do not count."""
    seeded, found = torch.Tag.nondeterministic_seeded, [False]

    def see(operation: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        found[0] |= seeded in operation.tags and kwargs.get("generator") is None

    with watching(see):
        return call(), found[0]
