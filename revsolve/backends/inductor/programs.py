"""Programs: the steps of a segment, forward or undone, as one loop that `torch.compile`'s inductor turns into machine code.

A program is a recording of the very code that solves without compilation (`advance`, `pull_back` and what they call), made with
the step's number, the times and every outside tensor as inputs; the loop around it is torch's `while_loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from revsolve.backends.inductor.options import Compiler, compiling
from revsolve.backends.inductor.torch_internals import fake_tensors, record, while_loop, without_numbers
from revsolve.backends.inductor.verification import check, rounding

Tensors = Sequence[Tensor]
Constants = dict[str, Any]  # tensors, or lists of them
MOST_PROGRAMS = 256
SMALL = 1024  # multiplications


class Sweep(Protocol):
    """The part of a solve that one program does: before the steps of a segment, in each of them, and after them.

    n is the number of steps that have been taken, `stop` that at which the segment ends; `given` is what it begins with,
    `constant` and `changed` are what it uses and what it changes in place.
    """

    def begin(self, n: Tensor, given: Tensors, constant: Constants) -> Tensors:
        """What is carried through the steps."""
        ...

    def step(self, n: Tensor, stop: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        """What is carried after one more step."""
        ...

    def end(self, n: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        """The results."""
        ...


@dataclass(frozen=True)
class Program:
    """A compiled recording, and how often it evaluates the field: besides steps, and in each of them."""

    run: Callable[..., Any]
    besides: int
    in_steps: int = 0


class Programs:
    """Programs, ahead and back, by what they do; those used longest ago are dropped where there are too many."""

    def __init__(self) -> None:
        self.known: dict[Hashable, dict[Hashable, Any]] = {}

    def made(self, key: Hashable) -> dict[Hashable, Any]:
        """The programs of this key that there are, those that differentiate by its derivative: further ones are put there."""
        found = self.known.pop(key, None) or {}
        self.known[key] = found
        if len(self.known) > MOST_PROGRAMS:
            del self.known[next(iter(self.known))]
        return found


PROGRAMS = Programs()


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Small products as sums, which become part of the code around them; a call of the library costs more than they do."""
    if a.shape[0] * a.shape[1] * b.shape[1] > SMALL:
        return NotImplemented
    return a * b if a.shape[1] == 1 else (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    product = _mm(a, b)
    return product if product is NotImplemented else beta * bias + alpha * product


def _add(x: Tensor, k: Tensor, alpha: float = 1.0) -> Tensor:
    """Without alpha, which inductor of torch 2.13 leaves out where k is a product of matrices."""
    return NotImplemented if alpha == 1 else x + alpha * k


def _add_(x: Tensor, k: Tensor, alpha: float = 1.0) -> Tensor:
    return NotImplemented if alpha == 1 else x.add_(alpha * k)


# tanh(x) = x P(x^2) / Q(x^2), fitted for a relative error of 2e-8 up to 9; from there on it is 1 in float32.
ABOVE = (1.335463976e-8, 2.060906507e-5, 3.495587022e-3, 0.1338102470, 1.0)
BELOW = (7.776548935e-7, 3.285633048e-4, 2.587697795e-2, 0.4671434030, 1.0)


def _tanh(x: Tensor) -> Tensor:
    """In float32, within six roundings: that of inductor takes a third of the time of a solve through a small network."""
    if x.dtype is not torch.float32:
        return NotImplemented
    x = x.clamp(-9.0, 9.0)
    u = x * x
    return (x * (_polynomial(ABOVE, u) / _polynomial(BELOW, u))).clamp(-1.0, 1.0)


def _polynomial(coefficients: Sequence[float], u: Tensor) -> Tensor:
    a, b, c, d, e = coefficients
    return ((a * u + b) * u + c) * (u * u) + (d * u + e)  # fewer roundings meet than by Horner's rule


ATEN = torch.ops.aten
DECOMPOSED: dict[Any, Callable[..., Any]] = {
    ATEN.mm.default: _mm,
    ATEN.addmm.default: _addmm,
    ATEN.add.Tensor: _add,
    ATEN.add_.Tensor: _add_,
    ATEN.tanh.default: _tanh,
}


class Packing:
    """Puts small tensors of one dtype into one: every tensor that a loop is given costs two handles in each of its steps."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.shapes = [x.shape for x in tensors]
        small = [i for i, x in enumerate(tensors) if x.numel() <= SMALL and x.is_contiguous()]
        dtypes = dict.fromkeys(tensors[i].dtype for i in small)
        groups = [[i for i in small if tensors[i].dtype is dtype] for dtype in dtypes]
        self.groups = [places for places in groups if len(places) > 1]
        self.alone = [i for i in range(len(tensors)) if not any(i in places for places in self.groups)]
        self.size = len(self.groups) + len(self.alone)

    def packed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        joined = [torch.cat([tensors[i].reshape(-1) for i in places]) for places in self.groups]
        return [*joined, *(tensors[i] for i in self.alone)]

    def restored(self, packed: Sequence[Tensor]) -> list[Tensor]:
        found = dict(zip(self.alone, packed[len(self.groups) :], strict=True))
        for places, joined in zip(self.groups, packed, strict=False):
            parts = joined.split([self.shapes[i].numel() for i in places])
            found |= {i: part.view(self.shapes[i]) for i, part in zip(places, parts, strict=True)}
        return [found[i] for i in range(len(self.shapes))]


def loop(
    sweep: Sweep, start: Tensor, stop: Tensor, given: Tensors, constant: Constants, changed: Tensors, compiler: Compiler
) -> Callable[..., Any]:
    """The program of a sweep from step number `start`, up or down to `stop`.

    It is called with (start, stop, given, constant, changed) and returns what the sweep ends with. Made for inputs like those
    given, with which a sweep of one step is checked.
    """
    ahead = bool(start < stop)
    sign = 1 if ahead else -1
    flat, form = tree_flatten((start, stop, list(given), constant, list(changed)))

    def single_step(*inputs: Tensor) -> Tensors:
        n, stop, given, constant, changed = tree_unflatten(inputs, form)
        carried = sweep.step(n, stop, sweep.begin(n, given, constant), constant, changed)
        return sweep.end(n + sign, carried, constant, changed)

    with torch.no_grad(), compiling(compiler), fake_tensors() as fake:
        example = [fake(x) for x in flat]
        n, end, given, constant, changed = tree_unflatten(example, form)
        begun = without_numbers(sweep.begin, (n, given, constant))
        leaves, constant_form = tree_flatten(constant)
        carry, keep, change = Packing(begun), Packing(leaves), Packing(changed)
        last = 2 + carry.size + keep.size  # behind it stands what steps change

        def step(n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            carried, rest = carry.restored(inputs[: carry.size]), keep.restored(inputs[carry.size + 1 : last - 1])
            sums = change.restored(inputs[last - 1 : last - 1 + change.size])
            after = sweep.step(n, inputs[carry.size], carried, tree_unflatten(rest, constant_form), sums)
            return n + sign, *carry.packed(after)

        body = record(step, [n, *carry.packed(begun), end, *keep.packed(leaves), *change.packed(changed)], DECOMPOSED)
        hidden = lift_constants(body)

        def whole(*inputs: Tensor) -> Tensors:
            n, stop, given, constant, changed = tree_unflatten(inputs[: len(flat)], form)
            carried, sums = carry.packed(sweep.begin(n, given, constant)), change.packed(changed)
            n, *carried = while_loop(
                lambda n, *rest: n < rest[carry.size] if ahead else n > rest[carry.size],
                body,
                (n, *carried),
                (stop, *keep.packed(tree_leaves(constant)), *sums, *inputs[len(flat) :]),
                range(last, last + change.size),
            )
            for x, total in zip(changed, change.restored(sums), strict=True):
                if total is not x:
                    x.copy_(total)
            return sweep.end(n, carry.restored(carried), constant, changed)

        run, eps = _finished(whole, example, hidden, fake, compiler)
    first_step = [flat[0], flat[0] + sign, *flat[2:]]
    check(single_step, run, first_step, eps, range(len(flat) - len(changed), len(flat)))
    return lambda *inputs: run(*tree_leaves(inputs))


def once(
    step: Callable[..., Tensors], inputs: Tensors, compiler: Compiler, resolution: Sequence[float] = ()
) -> Callable[..., Any]:
    """The program that does `step(*inputs)` one time; the first results are known up to the `resolution` only."""
    with torch.no_grad(), compiling(compiler), fake_tensors() as fake:
        run, eps = _finished(step, [fake(x) for x in inputs], [], fake, compiler)
    check(step, run, inputs, eps, resolution=resolution)
    return run


def _finished(
    code: Callable[..., Tensors],
    example: Tensors,
    hidden: list[Tensor],
    fake: Callable[[Tensor], Tensor],
    compiler: Compiler,
) -> tuple[Callable[..., Any], float]:
    """The code as a program, to which the `hidden` inputs are given behind the others; and its rounding."""
    example = [*example, *map(fake, hidden)]
    graph = record(code, example, DECOMPOSED)
    lifted = lift_constants(graph)
    made, hidden = compiler(graph, [*example, *map(fake, lifted)]), [*hidden, *lifted]
    return (lambda *inputs: made(*inputs, *hidden)) if hidden else made, rounding(graph)


def lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that recorded code made from Python numbers, behind the others."""
    found = [
        node for node in graph.graph.nodes if node.op == "get_attr" and isinstance(getattr(graph, node.target), Tensor)
    ]
    tensors = [getattr(graph, node.target) for node in found]
    for node in found:
        last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
        with graph.graph.inserting_after(last):
            node.replace_all_uses_with(graph.graph.placeholder(f"lifted_{node.name}"))
        graph.graph.erase_node(node)
    for name in {str(node.target) for node in found}:
        delattr(graph, name)  # or it would be an input a second time
    graph.recompile()
    return tensors
