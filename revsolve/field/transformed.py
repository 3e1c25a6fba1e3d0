"""Solves inside torch.func: the field as a function of what it takes from outside, and the solve as an operation of each level.

No graph can be walked there. Instead the field is called twice: what enters its operations, was not made by one of them, and
was there before the second call, comes from outside. `torch.func` then hands the operations down from transform to transform,
until at the lowest level there are plain tensors: the loops of the engine run there, on the whole batch, and keep what they
always keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from revsolve.core.gradient import Differentiable, Solve, store_in
from revsolve.core.integrate import march, replay_all
from revsolve.core.problem import Problem
from revsolve.core.tape import Term
from revsolve.field.audit import KEPT, Constants, products
from revsolve.field.batch import Batch
from revsolve.field.functorch import (
    core,
    have_rules,
    outside,
    stray,
    transforms,
    version,
    wrapped,
)
from revsolve.field.repeat import Repeatable, autocast_state, random_state, same_random_state, set_random_state
from revsolve.field.snapshot import Snapshot, computed_in
from revsolve.field.substitute import Substitution

PLAIN = (Tensor, float, int, type(None))


class Transformed:
    """A field inside torch.func: its term, whose tensors are replaced by what they are at each level."""

    state_size = tape_size = 0
    differentiate = staticmethod(products)

    def __init__(self, term: Term, tensors: Sequence[Tensor], constants: Sequence[Tensor], snapshot: Snapshot) -> None:
        self.term, self.tensors, self.snapshot = term, tuple(tensors), snapshot
        self.constants = Constants((x, version(x)) for x in constants)
        self.autocast = autocast_state()

    def take_first(self) -> None:
        return None

    @contextmanager
    def at(self, tensors: Sequence[Tensor]) -> Iterator[Term]:
        with Substitution(self.tensors, tensors, stray):
            yield self.term

    @contextmanager
    def as_solved(self) -> Iterator[None]:
        self.constants.check(None)
        with self.snapshot.restored(), self.autocast():
            yield

    def stand_ins(self, tensors: Sequence[Tensor], make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [make(x) for x in tensors]

    def audit(self, tensors: Sequence[Tensor]) -> None:
        return None

    def check_repeatable(self, again: Callable[[], Any], t: float, y: Tensor) -> None:
        pass


def transformed_field(term: Term, x0: Tensor, span: tuple[float, float], owners: Sequence[Any]) -> Transformed | None:
    """The field where torch.func transforms are active; None where there are no rules for all of them, or for the field."""

    def call(x: Tensor) -> Any:
        value = term.value(span[0], x)
        return value, term.product(value, term.control(span[0], *span))

    if torch.compiler.is_compiling() or not have_rules():
        return None
    before = random_state(x0.device)
    snapshot = Snapshot(owners)
    free = _taken_from_outside(call, x0, list(snapshot.tensors.values()))
    changes = snapshot.changes()
    if free is not None:
        seen = {id(x) for _, found in changes for x in computed_in(list(found.values()))}
        if any(id(x) not in seen for x in free[2]):
            raise RuntimeError(KEPT.format("where nobody looks"))
    snapshot.forget(changes)  # what was kept was computed without derivatives
    draws = not same_random_state(before, random_state(x0.device))
    if draws:
        set_random_state(before, x0.device)
    if free is None:
        return None
    if draws:
        with outside():
            seed = int(torch.randint(2**62, (), device="cpu"))
        term = Repeatable(term, seed, x0.device, None)
    return Transformed(term, *free[:2], snapshot)


def _taken_from_outside(
    call: Callable[[Tensor], Any], x: Tensor, held: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]] | None:
    """All that `call(x)` takes from outside and that some derivative or batch may concern (those `held` first), the constants
    that it uses besides, and what it kept from one call to the next. None if that cannot be said: its value is no pytree of
    tensors and numbers, or it hands tensors from outside to transforms of its own.
    """
    watches = [_Watch(), _Watch()]
    with torch.no_grad():
        for watch in watches:
            own = x.detach()
            watch.made[id(own)] = own
            with watch:
                out = call(own)
    if not all(isinstance(leaf, PLAIN) for leaf in tree_leaves(out)):
        return None
    first, second = watches
    level = len(transforms())
    used = dict(second.taken)
    for key, inner in second.taken.items():
        outer = core(inner, level)
        if outer is not inner:
            del used[key]
            if id(outer) not in second.made and _concerns(outer):
                return None
    before = first.taken | first.made
    used = {key: x for key, x in used.items() if key in before}
    found = {id(x): x for x in held} | used
    constants = [x for x in used.values() if not (_concerns(x) or x.is_inference())]
    kept = [x for key, x in used.items() if key in first.made and _concerns(x)]
    return [x for x in found.values() if _concerns(x)], constants, kept


def _concerns(x: Tensor) -> bool:
    return wrapped(x) or x.requires_grad


class _Watch(TorchFunctionMode):
    """Remembers, by identity, the tensors that operations make, and those they take that none had made."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in _tensors((args, kwargs)):
            if id(x) not in self.made:
                self.taken[id(x)] = x
        out = func(*args, **kwargs)
        for x in _tensors(out):
            self.made.setdefault(id(x), x)
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


class TransformedSolve(Solve):
    """A solve as the transforms hand it down. Its field may be a `Batch`, for all samples at once."""

    def __init__(self, problem: Problem) -> None:
        stepper = problem.make_stepper()  # here, where the transforms are those of the user's call
        super().__init__(replace(problem, make_stepper=lambda: stepper))

    def __call__(self, y0: Tensor, t: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        problem, checkpoints = self.problem, []  # type: Problem, list[Any]
        with problem.field.at(tensors) as term:
            ys, last, self.grid = march(problem, term, y0.detach(), store_in(problem, checkpoints))
        return torch.stack(ys), *self._keep(checkpoints, last)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if grads[0] is None:
            return (None,) * len(needed)
        found = iter(Differentiable.apply(_Gradient(self, needed), grads[0], *ctx.saved_tensors))
        return tuple(next(found) if needs else None for needs in needed)

    def replayed(self, y0: Tensor, t: Tensor | None, *tensors: Tensor) -> Tensor:
        """The solve again, with everything kept."""
        assert self.grid is not None
        with self.problem.field.as_solved(), self.problem.field.at(tensors) as term:
            return torch.stack(replay_all(self.problem, term, self.grid, y0, t))

    def for_batch(self, size: int, own: tuple[bool, ...], randomness: str) -> TransformedSolve:
        """The same for all samples at once; tensors marked in `own` have a sample's own values in the leading dimension."""
        field: Any = Batch(self.problem.field, own, size, randomness)
        below = TransformedSolve(replace(self.problem, field=field, explain=_explain_batch))
        below._found(self)
        return below

    def map_batch(self, info: Any, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> tuple[Any, Any]:
        (y0, t, *tensors), (dim_y0, _, *dims) = inputs, in_dims
        below = self.for_batch(info.batch_size, tuple(dim is not None for dim in dims), info.randomness)
        rows = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]
        ys, *kept = Differentiable.apply(below, _rows(y0, dim_y0, info.batch_size), t, *rows)
        self._found(below)
        return (ys, *kept), (1, *(0 for _ in kept))

    def _found(self, other: TransformedSolve) -> None:
        self.grid, self.stored_after, self.num_members = other.grid, other.stored_after, other.num_members


class _Gradient:
    """(grad_ys, y0, t, *tensors, *kept) to the gradients of those among y0, t and tensors that are needed."""

    num_differentiable = None  # all of them

    def __init__(self, solve: TransformedSolve, needed: Sequence[bool]) -> None:
        self.solve, self.needed = solve, tuple(needed)

    def __call__(self, grad_ys: Tensor, y0: Tensor, t: Tensor | None, *rest: Tensor) -> tuple[Tensor, ...]:
        solve, split = self.solve, len(self.needed) - 2
        needs = self.needed[2:]
        leaves = [x.detach().requires_grad_() if n else x.detach() for x, n in zip(rest[:split], needs, strict=True)]
        with solve.problem.field.as_solved():
            found = solve.gradient(self.needed, grad_ys, t, leaves, solve.checkpoints(y0, rest[split:]))
        return tuple(torch.zeros_like(y0) if x is None else x for x in _chosen(found, self.needed))

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The derivative of a derivative: of the replayed solve, by torch.func itself."""
        solve, needed, saved = self.solve, self.needed, ctx.saved_tensors[: len(self.needed) + 1]
        wanted = ctx.needs_input_grad[1 : 1 + len(saved)]  # among grad_ys, y0, t and tensors

        def gradient(*chosen: Tensor) -> tuple[Tensor, ...]:
            grad_ys, *inputs = _filled(saved, wanted, chosen)
            pull = vjp(lambda *xs: solve.replayed(*_filled(inputs, needed, xs)), *_chosen(inputs, needed))[1]
            return pull(grad_ys)

        outputs, pull = vjp(gradient, *_chosen(saved, wanted))[:2]
        cotangents = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(outputs, grads, strict=True))
        found = _filled([None] * len(saved), wanted, pull(cotangents))
        return *found, *(None for _ in ctx.needs_input_grad[1 + len(saved) :])

    def map_batch(self, info: Any, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> tuple[Any, Any]:
        size, split = info.batch_size, len(self.needed) + 1
        if inputs[2] is not None:  # steps of one sample cannot move alone, so those of each are undone by themselves
            each = [
                Differentiable.apply(self, *(_sample(x, dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
                for i in range(size)
            ]
            return tuple(map(torch.stack, zip(*each, strict=True))), 0
        of_cotangents = all(dim is None for dim in in_dims[split:])  # a batch of which the solve knew nothing
        randomness = "same" if of_cotangents else info.randomness
        below = self.solve.for_batch(size, (True,) * (split - 3), randomness)
        grad_ys, *given = (x if x is None else _rows(x, dim, size) for x, dim in zip(inputs, in_dims, strict=True))
        assert grad_ys is not None
        return Differentiable.apply(_Gradient(below, self.needed), grad_ys.movedim(0, 1), *given), 0


def _explain_batch(t: float, y: Tensor) -> str:
    return f"the state of a sample is not finite after t = {t}: solve that sample outside of torch.vmap to see why."


def _rows(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x with one entry for every sample in the leading dimension."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _sample(x: Tensor | None, dim: int | None, i: int) -> Tensor | None:
    return x if x is None or dim is None else x.select(dim, i)


def _chosen(xs: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    return [x for x, wanted in zip(xs, mask, strict=True) if wanted]


def _filled(xs: Sequence[Any], mask: Sequence[bool], chosen: Sequence[Any]) -> list[Any]:
    """xs, with the chosen ones put where the mask says."""
    found = iter(chosen)
    return [next(found) if wanted else x for x, wanted in zip(xs, mask, strict=True)]
