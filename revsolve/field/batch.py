"""A term as a function of the tensors that its field takes from outside, one sample at a time or a batch of them.

Below a torch.func transform a field must run on other tensors than those it holds: on what they are at that level, and
on all samples at once where torch.vmap is active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from revsolve.core.arithmetic import Scalar, Time, scaled_add
from revsolve.core.tape import Term
from revsolve.field.functorch import of_all, of_sample, sample_level, vector_jacobian_product


class Batch:
    """A field for all samples of a torch.vmap at once: states have a dimension more in front, and so have the tensors marked in
    `own`."""

    differentiate = staticmethod(vector_jacobian_product)
    state_size = tape_size = 0

    def __init__(self, sample: Any, own: tuple[bool, ...], size: int, randomness: str) -> None:
        self.sample, self.own, self.size, self.randomness = sample, own, size, randomness
        self.term, self.tensors = sample.term, sample.tensors
        self.as_solved, self.audit, self.check_repeatable = sample.as_solved, sample.audit, sample.check_repeatable
        self.take_first = sample.take_first

    @contextmanager
    def at(self, tensors: Sequence[Tensor]) -> Iterator[Term]:
        yield _BatchTerm(self, tensors)


class _BatchTerm:
    """Values are pytrees in which `_Rows` stand for what differs from sample to sample."""

    def __init__(self, batch: Batch, tensors: Sequence[Tensor]) -> None:
        self.batch, self.tensors = batch, tuple(tensors)
        self.additive = getattr(batch.term, "additive", False)

    def value(self, t: Time, x: Tensor) -> Any:
        return self._collected(lambda term, x: term.value(t, x), [x])

    def control(self, t: Time, t0: Time, t1: Time) -> Any:
        return self._collected(lambda term: term.control(t, t0, t1), [])

    def product(self, value: Any, control: Any) -> tuple[Tensor, Scalar]:
        key = id(self.batch)  # tree_flatten leaves a reference cycle around its is_leaf, which must not hold tensors
        leaves, spec = tree_flatten((value, control), is_leaf=lambda x: isinstance(x, _Rows) and x.key == key)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _Rows)]

        def product(term: Term, *rows: Tensor) -> list[Any]:
            of_one = dict(zip(places, rows, strict=True))
            k, scale = term.product(*tree_unflatten([of_one.get(i, x) for i, x in enumerate(leaves)], spec))
            return [scaled_add(None, k, scale), 1.0] if isinstance(scale, Tensor) else [k, scale]

        (k, dim), (scale, _) = self._mapped(product, [leaves[i].rows for i in places])
        return (k.expand(self.batch.size, *k.shape) if dim is None else k.movedim(dim, 0)), scale

    def _collected(self, call: Callable[..., Any], rows: list[Tensor]) -> Any:
        """What the call gives for all samples, a pytree."""
        specs: list[Any] = []

        def flat(term: Term, *rows: Tensor) -> list[Any]:
            leaves, spec = tree_flatten(call(term, *rows))
            specs.append(spec)
            return leaves

        leaves = [
            leaf if dim is None else _Rows(leaf.movedim(dim, 0), id(self.batch))
            for leaf, dim in self._mapped(flat, rows)
        ]
        return tree_unflatten(leaves, specs[0])

    def _mapped(self, call: Callable[..., list[Any]], rows: list[Tensor]) -> list[tuple[Any, int | None]]:
        """What the call gives for one sample after the other, with the dimension in which they lie (None: the same for all)."""
        batch = self.batch
        with sample_level(batch.size, batch.randomness) as level:
            tensors = [of_sample(x, level) if own else x for x, own in zip(self.tensors, batch.own, strict=True)]
            with batch.sample.at(tensors) as term:
                return [of_all(out, level) for out in call(term, *(of_sample(row, level) for row in rows))]


class _Rows(NamedTuple):
    """One value for every sample, in the leading dimension; of batches in batches, those of the outermost lie innermost."""

    rows: Any
    key: int  # of the batch
