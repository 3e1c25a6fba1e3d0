"""The parts of PyTorch that are not public, each behind a function: recordings of fake tensors, `while_loop`, and inductor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

LOWEST = (2, 13)  # the first torch whose loops change tensors in place


def supported() -> bool:
    """Whether this torch can record and compile loops."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return found is not None and tuple(map(int, found.groups())) >= LOWEST


def is_fake(x: Any) -> bool:
    """Whether it is a tensor without numbers."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(x, FakeTensor)


@contextmanager
def fake_tensors() -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that makes tensors like others, without numbers; what is recorded of them is compiled meanwhile.

    One given twice, or a part of another, gives two that have nothing in common.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)

    def fake(x: Tensor) -> Tensor:
        return mode.from_tensor(
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device), static_shapes=True
        )

    with tracing(TracingContext(mode)):
        yield fake


def without_numbers(code: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """The results of code for fake tensors, the first input among them."""
    mode: Any = inputs[0]
    with mode.fake_mode:
        return code(*inputs)


def record(
    code: Callable[..., Any], inputs: Sequence[Tensor], decompositions: Mapping[Any, Callable[..., Any]]
) -> fx.GraphModule:
    """The operations that the code does with fake tensors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(code, tracing_mode="fake", decomposition_table=decompositions)(*inputs)


def while_loop(
    more: Callable[..., Tensor],
    body: Callable[..., tuple[Tensor, ...]],
    carried: tuple[Tensor, ...],
    constant: tuple[Tensor, ...],
    changed: Iterable[int],
) -> tuple[Tensor, ...]:
    """What is carried, after `carried = body(*carried, *constant)` as long as `more(*carried, *constant)`; the body changes the
    inputs at the places `changed` in place."""
    from torch._higher_order_ops.while_loop import while_loop_op

    marked: Any = {"mutated_arg_indices": ",".join(map(str, changed))}
    operands: Any = carried, constant
    return while_loop_op(more, body, *operands, **(marked if any(marked.values()) else {}))


def compile_graph(graph: fx.GraphModule, example: Sequence[Tensor], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The machine code that inductor makes of a recording."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # warns of what is deprecated within torch

    made: list[Callable[[list[Tensor]], Any]] = []

    def keep(inner_graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        inner = compile_fx_inner(inner_graph, inputs, **settings)
        if len(inputs) == len(example):  # nothing was added that only `run` would give it
            made.append(inner)
        return inner

    options = {"cpp_wrapper": example[0].device.type == "cpu", **options}
    run: Any = compile_fx(graph, list(example), inner_compile=keep, config_patches=options)
    # What `run` does around it is for graphs that alias or need gradients; from a cache on disk it may come as a whole.
    return (lambda *inputs: made[-1](list(inputs))) if made else run


def mode_options(mode: str) -> dict[str, Any]:
    """The options of inductor that a mode of `torch.compile` stands for."""
    return dict(torch._inductor.list_mode_options(mode))
