"""What a term does when it is called, as text: two calls with the same transcript are the same function of time and state,
and so are their derivatives.

A compiled program stands for a field only as long as the field still does what was recorded. Every solve writes the
transcript of one call (operations, numbers, shapes, which outside tensor goes where, what comes out) and of its vector-Jacobian
product, and looks for the program made for it, so a changed attribute, mode or closure finds another program, and a new module
that does the same finds this one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from revsolve.core.arithmetic import Time
from revsolve.core.tape import Term, vector_jacobian_product

LIFTED = torch.ops.aten.lift_fresh.default  # a tensor made from Python numbers


class CompilationError(RuntimeError):
    """A field, or the code made from it, could not be compiled (docs/architecture.md); the cause is attached."""


class Transcript(TorchDispatchMode):
    """Writes down all operations made while it is open; `outside` are the tensors that were not made by them.

    `own` are the tensors that the caller hands in. A tensor made from Python numbers counts by its numbers.
    """

    def __init__(self, own: Sequence[Tensor]) -> None:
        super().__init__()
        self.lines: list[Hashable] = []
        self.outside: list[Tensor] = []
        self.kept: list[Any] = list(own)  # so that no identity is given to another tensor meanwhile
        self.names: dict[int, Hashable] = {id(x): ("own", i, *_looks(x)) for i, x in enumerate(own)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _numbers if func is LIFTED else self._name
        line = [func, *[name(x) for x in args]]
        if kwargs:
            line += [(key, name(x)) for key, x in kwargs.items()]
        self.lines.append(tuple(line))
        out = func(*args, **(kwargs or {}))
        self.kept.append((args, kwargs, out))
        if isinstance(out, Tensor):
            self.names.setdefault(id(out), (len(self.lines), 0))
        elif isinstance(out, (tuple, list)):
            for i, x in enumerate(tree_leaves(out)):
                self.names.setdefault(id(x), (len(self.lines), i))
        return out

    def result(self, *things: Any) -> None:
        """Write down which tensors come out: operations alone do not tell."""
        self.lines.append(("result", *(isinstance(x, Tensor) and self._name(x) for x in tree_leaves(things))))

    def _name(self, x: Any) -> Hashable:
        if isinstance(x, Tensor):
            known = self.names.get(id(x))
            if known is None:
                known = self.names[id(x)] = ("outside", len(self.outside), *_looks(x))
                self.outside.append(x)
            return known
        return tuple(map(self._name, x)) if isinstance(x, (tuple, list)) else (type(x), repr(x))


def transcript(
    term: Term, t: Time, x: Tensor, t1: Time, drive: Tensor, also: Callable[[Tensor], Any] = lambda x: None
) -> tuple[tuple[Hashable, ...], list[Tensor]]:
    """What one evaluation at (t, x), its product over t -> t1, and `also` at x do; and the tensors from outside that they use.

    `drive` is what the term is driven by over t -> t1, no tensor from outside.
    """
    with torch.no_grad(), uncached(), Transcript([x, drive]) as written:
        value = term.value(t, x)
        written.result(value, term.product(value, term.control(t, t, t1))[0], also(x))
    return tuple(written.lines), written.outside


def derivative_transcript(
    term: Term, t: Time, x: Tensor, t1: Time, drive: Tensor, outside: Sequence[Tensor], apart: bool
) -> tuple[Hashable, ...]:
    """What the same evaluation does where gradients are recorded, and its vector-Jacobian product for x and `outside`, by which
    leaves stand for them unless they are `apart`: without hooks, and none computed from another.

    The operations alone do not tell: torch.no_grad(), hooks and the backward of an autograd.Function do not show in them.
    """
    leaves = outside if apart else [y.detach().requires_grad_(y.requires_grad) for y in outside]
    x = x.detach().requires_grad_()
    with torch.enable_grad(), uncached(), Transcript([x, drive, *leaves]) as written:
        with nullcontext() if apart else Swap(outside, leaves):
            k, _ = term.product(term.value(t, x), term.control(t, t, t1))
        if k.requires_grad:
            wanted = (x, *(y for y in leaves if y.requires_grad))
            written.result(*vector_jacobian_product((k,), wanted, (torch.ones_like(k),)))
    return tuple(written.lines)


@contextmanager
def uncached() -> Iterator[None]:
    """What autocast cast before would hide the tensor that it was cast from; and what it casts now, it would keep for nothing."""
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cache)


class Swap(TorchFunctionMode):
    """Puts other tensors in the place of some, wherever a field uses these."""

    def __init__(self, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.by_id: Mapping[int, Tensor] = {id(x): other for x, other in zip(tensors, others, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(self._swap, args), **{key: self._swap(x) for key, x in (kwargs or {}).items()})

    def _swap(self, x: Any) -> Any:
        return tree_map(self._swap, x) if isinstance(x, (tuple, list, dict)) else self.by_id.get(id(x), x)


def _looks(x: Tensor) -> tuple[Hashable, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad


def _numbers(x: Any) -> Hashable:
    return ("numbers", *_looks(x), repr(x.tolist())) if isinstance(x, Tensor) else (type(x), repr(x))
