"""Programs: the steps of a segment, forward or undone, as one loop that `torch.compile`'s inductor turns into machine code.

A program is a recording of the very code that solves without compilation (`advance`, `pull_back` and what they call), made with
the step's number, the times and every outside tensor as inputs; the loop around it is torch's `while_loop`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.while_loop import while_loop_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from revsolve.backends.inductor.checked import check, rounding
from revsolve.backends.inductor.compiler import Compiler, compiling

MOST_PROGRAMS = 256
SMALL = 1024  # multiplications


class Sweep(Protocol):
    """What one program does with a segment of steps: before them, in each of them, and after them."""

    def begin(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """(*given, stop, *constant) -> carried"""
        ...

    def step(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """(*carried, stop, *constant) -> (next n, *carried)"""
        ...

    def end(self, n: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """(*carried, stop, *constant) -> results"""
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


ATEN = torch.ops.aten
DECOMPOSED: dict[Any, Callable[..., Any]] = {
    ATEN.mm.default: _mm,
    ATEN.addmm.default: _addmm,
    ATEN.add.Tensor: _add,
    ATEN.add_.Tensor: _add_,
}


def loop(
    sweep: Sweep,
    ahead: bool,
    number: Tensor,
    given: Sequence[Tensor],
    constant: Sequence[Tensor],
    changed: Sequence[int],
    way: Compiler,
) -> Callable[..., Any]:
    """The program of a sweep: steps are repeated until the number is no longer below (`ahead`) or above `stop`.

    It is called with (number, *given, stop, *constant) and returns what the sweep ends with; `changed` are the constants, by
    their place, that steps change in place. Made for inputs like those given, with which a sweep of one step is checked.
    """
    fakes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    example, split = _fake(fakes, number, *given, number, *constant), 1 + len(given)
    with torch.no_grad(), compiling(way), tracing(TracingContext(fakes)):
        begin = _recorded(sweep.begin, example)
        carried = _fake(fakes, *(node.meta["val"] for node in _results(begin)))
        inside, count = [example[0], *carried, *example[split:]], 1 + len(carried)
        going = operator.lt if ahead else operator.gt
        more = make_fx(lambda n, *rest: going(n, rest[count - 1]), tracing_mode="fake")(*inside)
        parts = {"begin": begin, "body": _recorded(sweep.step, inside), "end": _recorded(sweep.end, inside)}
        hidden = {name: _lift_constants(part, fakes) for name, part in parts.items()}
        whole = _whole(more, parts, [len(x) for x in hidden.values()], len(example), split, count, changed)
        further = [x for found in hidden.values() for x in found]
        made = way(whole, [*example, *_fake(fakes, *further)])
    run = (lambda *inputs: made(*inputs, *further)) if further else made

    def by_parts(first: Tensor, *inputs: Tensor) -> Sequence[Tensor]:
        rest = inputs[split - 1 :]
        return sweep.end(*sweep.step(first, *sweep.begin(first, *inputs), *rest), *rest)

    one_step = (number, *given, number + (1 if ahead else -1), *constant)
    check(by_parts, run, one_step, max(map(rounding, parts.values())), [split + 1 + i for i in changed])
    return run


def once(
    step: Callable[..., tuple[Tensor, ...]], changing: Sequence[Tensor], constant: Sequence[Tensor], way: Compiler
) -> Callable[..., Any]:
    """The program that does `step(*changing, *constant)` one time."""
    fakes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    example = _fake(fakes, *changing, *constant)
    with torch.no_grad(), compiling(way), tracing(TracingContext(fakes)):
        body = _recorded(step, example)
        hidden = _lift_constants(body, fakes)
        made = way(body, [*example, *_fake(fakes, *hidden)])
    run = (lambda *inputs: made(*inputs, *hidden)) if hidden else made
    check(step, run, (*changing, *constant), rounding(body))
    return run


def _fake(fakes: FakeTensorMode, *tensors: Tensor) -> list[Tensor]:
    """Tensors like these without numbers: one given twice, or a part of another, would be taken for that in every call."""
    apart = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors]
    return [fakes.from_tensor(x, static_shapes=True) for x in apart]


def _recorded(code: Callable[..., Sequence[Tensor]], example: Sequence[Tensor]) -> fx.GraphModule:
    return make_fx(code, tracing_mode="fake", decomposition_table=DECOMPOSED)(*example)


def _results(recorded: fx.GraphModule) -> Sequence[fx.Node]:
    return recorded.graph.output_node().args[0]  # type: ignore[return-value]


def _whole(
    more: fx.GraphModule,
    parts: Mapping[str, fx.GraphModule],
    hidden: Sequence[int],
    inputs: int,
    split: int,
    count: int,
    changed: Sequence[int],
) -> fx.GraphModule:
    """The graph of a sweep. Of its `inputs`, the first `split` are what it begins with; `count` tensors are carried through the
    loop. Behind them come the `hidden` inputs of each part."""
    root, graph = torch.nn.Module(), fx.Graph()
    for name, part in (*parts.items(), ("more", more)):
        setattr(root, name, part)
    _take_more(more, hidden[1])
    taken = [graph.placeholder(f"input{i}") for i in range(inputs + sum(hidden))]
    rest, own, place = taken[split:inputs], [], inputs
    for size in hidden:
        own.append(taken[place : place + size])
        place += size

    def outputs(node: fx.Node, size: int) -> list[fx.Node]:
        return [graph.call_function(operator.getitem, (node, i)) for i in range(size)]

    begun = outputs(graph.call_module("begin", (*taken[:inputs], *own[0])), count - 1)
    bodies, carried = (graph.get_attr("more"), graph.get_attr("body")), (taken[0], *begun)
    marked: dict[str, Any] = {"mutated_arg_indices": ",".join(str(count + 1 + i) for i in changed)} if changed else {}
    after = outputs(graph.call_function(while_loop_op, (*bodies, carried, (*rest, *own[1])), marked), count)
    ended = graph.call_module("end", (*after, *rest, *own[2]))
    graph.output(tuple(outputs(ended, len(_results(parts["end"])))))
    return fx.GraphModule(root, graph)


def _lift_constants(graph: fx.GraphModule, fakes: FakeTensorMode) -> list[Tensor]:
    """Make inputs of the tensors that the recorded code made from Python numbers."""
    found = [node for node in graph.graph.nodes if node.op == "get_attr"]
    tensors = [getattr(graph, node.target) for node in found]
    for node, tensor in zip(found, tensors, strict=True):
        _take_more(graph, 1)
        last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
        last.meta["val"] = fakes.from_tensor(tensor, static_shapes=True)
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
    for name in {str(node.target) for node in found}:
        delattr(graph, name)  # or it would be an input a second time
    graph.recompile()
    return tensors


def _take_more(graph: fx.GraphModule, count: int) -> None:
    """Give a recording further inputs, behind those that it has."""
    for _ in range(count):
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        with graph.graph.inserting_after(places[-1]):
            graph.graph.placeholder(f"further{len(places)}")
    graph.recompile()
