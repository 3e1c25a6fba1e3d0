"""The operations of one call of a term, as the key under which its programs are kept: two calls with the same trace are the same
function of time and state, and so are their derivatives.

A compiled program stands for a field only as long as the field still does what was recorded. Every solve traces one call
(operations, numbers, shapes, which outside tensor goes where, what comes out) and its vector-Jacobian product, and looks for
the program made for it, so a changed attribute, mode or closure finds another program, and a new module that does the same finds
this one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from revsolve.backends import CompilationError
from revsolve.core.arithmetic import Time
from revsolve.core.tape import Term, vector_jacobian_product

LIFTED = torch.ops.aten.lift_fresh.default  # a tensor made from Python numbers
READ = torch.ops.aten._local_scalar_dense.default  # a number read from a tensor


class OperationTrace(TorchDispatchMode):
    """Writes down all operations made while it is open; `outside` are the tensors that were not made by them.

    `own` are the tensors that the caller hands in. A tensor made from Python numbers counts by its numbers. Raises
    CompilationError before a tensor from outside is changed: a program would not change it.
    """

    def __init__(self, own: Sequence[Tensor]) -> None:
        super().__init__()
        self.lines: list[Hashable] = []
        self.outside: list[Tensor] = []
        self.kept: list[Any] = list(own)  # so that no identity is given to another tensor meanwhile
        self.names: dict[int, Hashable] = {id(x): ("own", i, *_metadata(x)) for i, x in enumerate(own)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _numbers if func is LIFTED else self._name
        line = [func, *[name(x) for x in args]]
        if kwargs:
            line += [(key, name(x)) for key, x in kwargs.items()]
        self.lines.append(tuple(line))
        if func._schema.is_mutable:
            self._check_changed(func, args, kwargs or {})
        # Known at once, where a recording would fail after seconds. In anomaly mode autograd itself looks for NaN.
        if func is READ and args[0].dtype is torch.bool and not torch.is_anomaly_enabled():
            raise CompilationError(
                "compile= records one branch for all times and states: a field may not look at numbers (if on a value). Use "
                f"torch.where, or {INSTEAD}."
            )
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
                known = self.names[id(x)] = ("outside", len(self.outside), *_metadata(x))
                self.outside.append(x)
            return known
        if isinstance(x, torch.Generator):
            raise CompilationError(f"compile= needs a field that draws no random numbers: {INSTEAD}.")
        return tuple(map(self._name, x)) if isinstance(x, (tuple, list)) else (type(x), repr(x))

    def _check_changed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        schema = [
            argument for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write
        ]
        given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
        storages = {x.untyped_storage().data_ptr() for x in self.outside if x.numel()}
        for x in tree_leaves([given.get(argument.name) for argument in schema]):
            if isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() in storages:
                raise CompilationError(
                    f"compile= needs a field that changes no tensors that it keeps, but it changes one of shape {tuple(x.shape)} "
                    f"by {func}: call .eval() on it, make a new tensor instead, or {INSTEAD}."
                )


INSTEAD = "solve with compile=False"


class Substituted(TorchDispatchMode):
    """Puts other tensors in the place of some in every operation, be it called from Python, from C++ or in a derivative.

    Autograd goes on to see the tensors themselves: what it finds are their gradients.
    """

    def __init__(self, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.by_id = {id(x): other for x, other in zip(tensors, others, strict=True)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda x: self.by_id.get(id(x), x), (args, kwargs or {}))
        return func(*args, **kwargs)


def operation_trace(
    term: Term, t: Time, x: Tensor, t1: Time, control: Tensor, also: Callable[[Tensor], Any] = lambda x: None
) -> tuple[tuple[Hashable, ...], list[Tensor]]:
    """The operations of one evaluation at (t, x), of its product over t -> t1, and of `also` at x; and the tensors from outside
    that they use.

    `control` is a tensor of which the term makes its control over t -> t1, none from outside.
    """
    with torch.no_grad(), uncached(), OperationTrace([x, control]) as trace:
        value = term.value(t, x)
        trace.result(value, term.product(value, term.control(t, t, t1))[0], also(x))
    # The only state outside of a field that decides which operations it does.
    autocast = ((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return (*trace.lines, *autocast), trace.outside


def derivative_trace(
    term: Term,
    t: Time,
    x: Tensor,
    t1: Time,
    control: Tensor,
    leaves: Sequence[Tensor],
    within: AbstractContextManager[Any],
) -> tuple[Hashable, ...]:
    """The operations of the same evaluation where gradients are recorded, and of its vector-Jacobian product for x and `leaves`,
    which stand for outside tensors `within` a context.

    Those of the evaluation alone do not tell: torch.no_grad(), hooks and the backward of an autograd.Function do not show there.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), uncached(), within, OperationTrace([x, control, *leaves]) as trace:
        k, _ = term.product(term.value(t, x), term.control(t, t, t1))
        if k.requires_grad:
            wanted = (x, *(y for y in leaves if y.requires_grad))
            trace.result(*vector_jacobian_product((k,), wanted, (torch.ones_like(k),)))
    return tuple(trace.lines)


@contextmanager
def uncached() -> Iterator[None]:
    """Without autocast's cache: it would hide the tensor that was cast, and keep what is cast now for nothing."""
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cache)


def _metadata(x: Tensor) -> tuple[Hashable, ...]:
    return tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad


def _numbers(x: Any) -> Hashable:
    return ("numbers", *_metadata(x), repr(x.tolist())) if isinstance(x, Tensor) else (type(x), repr(x))
