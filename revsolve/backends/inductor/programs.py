"""Programs: the steps of a segment, forward or undone, as one loop that `torch.compile`'s inductor turns into machine code.

A program is a recording of the very code that solves without compilation (`advance`, `pull_back` and what they call), made with
the step's number, the times and every outside tensor as inputs; the loop around it is torch's `while_loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from revsolve.backends.inductor.compiler import Compiler, check, compiling, rounding
from revsolve.backends.inductor.torch_internals import fake_tensors, record, while_loop, without_numbers

Tensors = Sequence[Tensor]
Constants = dict[str, Any]  # tensors, or lists of them
MOST_PROGRAMS = 256
SMALL = 1024  # multiplications


def detached_clones(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What a loop hands on: tensors of their own, all laid out alike."""
    return tuple(x.detach().clone(memory_format=torch.contiguous_format) for x in tensors if x is not None)


class Sweep:
    """The part of a solve that one program does: before the steps of a segment, in each of them, and after them.

    n is the number of steps that have been taken, `stop` that at which the segment ends; `given` is what it begins with,
    `constant` and `changed` are what it uses and what it changes in place.
    """

    def begin(self, n: Tensor, given: Tensors, constant: Constants) -> Tensors:
        """What is carried through the steps."""
        return detached_clones(*given)

    def step(self, n: Tensor, stop: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        """What is carried after one more step."""
        raise NotImplementedError

    def end(self, n: Tensor, carried: Tensors, constant: Constants, changed: Tensors) -> Tensors:
        """The results."""
        return carried


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
        rest, rest_form = tree_flatten((constant, changed))
        count, changes = len(begun), range(2 + len(begun) + len(rest) - len(changed), 2 + len(begun) + len(rest))

        def step(n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            constant, changed = tree_unflatten(inputs[count + 1 :], rest_form)
            return n + sign, *sweep.step(n, inputs[count], inputs[:count], constant, changed)

        body = record(step, [n, *begun, end, *rest], DECOMPOSED)
        hidden = lift_constants(body)

        def whole(*inputs: Tensor) -> Tensors:
            n, stop, given, constant, changed = tree_unflatten(inputs[: len(flat)], form)
            n, *carried = while_loop(
                lambda n, *rest: n < rest[count] if ahead else n > rest[count],
                body,
                (n, *sweep.begin(n, given, constant)),
                (stop, *tree_leaves((constant, changed)), *inputs[len(flat) :]),
                changes,
            )
            return sweep.end(n, carried, constant, changed)

        run, eps = _finished(whole, example, hidden, fake, compiler)
    first_step = [flat[0], flat[0] + sign, *flat[2:]]
    check(single_step, run, first_step, eps, range(len(flat) - len(changed), len(flat)))
    return lambda *inputs: run(*flattened(*inputs))


def flattened(start: Tensor, stop: Tensor, given: Tensors, constant: Constants, changed: Tensors) -> list[Tensor]:
    """The tensors in the order of `tree_flatten`, which would take a tenth of the time of a small solve."""
    flat = [start, stop, *given]
    for x in constant.values():
        flat += [x] if isinstance(x, Tensor) else x
    return [*flat, *changed]


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
    example, hidden = [*example, *map(fake, lifted)], [*hidden, *lifted]
    for node, x in zip(graph.graph.nodes, example, strict=False):
        node.meta["val"] = x
    made = compiler(graph, example)
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
