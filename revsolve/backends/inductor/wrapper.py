"""What inductor writes for a loop, but for where memory is asked for.

Inductor's own C++ gives every step new tensors for all that it computes, and new handles for all that it reads: for small
states ten times the time of the kernels. Here that happens in front of the loop. What a step hands on to the next is written
into one of two tensors in turns, for both are there at once; what is small and for kernels alone is no tensor, but lies on
the stack.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import (
    AllocateLine,
    EnterSubgraphLine,
    ReinterpretLine,
    ReuseLine,
    WrapperLine,
)
from torch._inductor.utils import IndentedBuffer
from torch._inductor.virtualized import V

LOOP = "while (1) {"
STACK = 8192  # numbers at most
NAME = re.compile(r"\w+")
DATA = re.compile(r"\b(\w+)\.data_ptr\(\)")
ALIAS = re.compile(r"auto&&? (\w+) = (\w+);.*")
ALLOCATION = re.compile(
    r"AtenTensorHandle (\w+)_handle;|AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_empty_strided\(.*&(\w+)_handle\)\);|"
    r"RAIIAtenTensorHandle (\w+)\(\w+_handle\);"
)


@dataclasses.dataclass
class HandOn(WrapperLine):
    """What a step made, `inner`, becomes what is carried, `outer`.

    Where `made` is what the step wrote into, the memory of what was carried so far is next. That of the first is not ours: there
    is a second one instead.
    """

    outer: str
    inner: str
    made: AllocateLine | None = None

    def codegen(self, code: IndentedBuffer) -> None:
        before = f"{self.outer}_before"
        code.writeline(f"auto {before} = std::move({self.outer});")
        code.writeline(f"{self.outer} = std::move({self.inner});")
        if self.made is not None:
            name = self.made.node.get_name()
            code.writeline(f"{name} = {name}_second.get() ? std::move({name}_second) : std::move({before});")


@dataclasses.dataclass
class Second(WrapperLine):
    """Allocates the like of what another line does."""

    line: AllocateLine

    def codegen(self, code: IndentedBuffer) -> None:
        x = self.line.node
        like: Any = x.get_device(), x.get_dtype(), x.get_size(), x.get_stride()
        code.writeline(self.line.wrapper.make_allocation(f"{x.get_name()}_second", *like))


class Wrapper(CppWrapperCpu):
    """Inductor's C++ around kernels, but for what a step allocates: that stays from one step to the next.

    `staying` are the names of what is the same in all steps, `small` the type and number of entries of what may lie on the stack.
    """

    small: Mapping[str, tuple[str, int]] = {}

    @staticmethod
    def create(*args: Any, **kwargs: Any) -> Wrapper:
        return Wrapper()

    def codegen_subgraph_prefix(self, subgraph: Any, outer_inputs: Any, outer_outputs: Any) -> None:
        handed_on = subgraph.graph.get_output_names()
        for inner, outer in zip(subgraph.graph.graph_inputs, outer_inputs, strict=True):
            if inner in handed_on:  # a handle of its own, for the other one is emptied first
                self.writeline(f"AtenTensorHandle {inner}_handle;")
                copied = f"aoti_torch_assign_tensors_out({outer}, &{inner}_handle)"
                self.writeline(f"AOTI_TORCH_ERROR_CODE_CHECK({copied});")
                self.writeline(f"RAIIAtenTensorHandle {inner}({inner}_handle);")
            else:
                self.writeline(f"auto&& {inner} = {outer};")

    def codegen_subgraph_suffix(self, subgraph: Any, outer_inputs: Any, outer_outputs: Any) -> None:
        for inner, outer in zip(subgraph.graph.graph_outputs, outer_outputs, strict=True):
            self.writeline(HandOn(outer, inner.codegen_reference()))

    def codegen_exact_buffer_reuse(self, old_name: str, new_name: str, del_line: str) -> str:
        way = "auto&" if old_name in self.staying else "auto"
        return f"{way} {new_name} = {old_name if old_name in self.staying else f'std::move({old_name})'};"

    def make_buffer_free(self, buffer: Any) -> str:
        return "" if buffer.get_name() in self.staying else super().make_buffer_free(buffer)

    def memory_plan_reuse(self) -> None:
        super().memory_plan_reuse()
        self.staying: set[str] = set()
        lines: list[Any] = self.lines
        if LOOP not in lines:
            return
        ahead, inside = lines[: lines.index(LOOP)], lines[lines.index(LOOP) :]
        graphs = [line.graph for line in inside if isinstance(line, EnterSubgraphLine)]
        given = {name for graph in graphs for name in graph.graph_inputs}
        handed_on = {name for graph in graphs for name in graph.get_output_names()}
        for line in reversed(inside):
            if isinstance(line, (ReuseLine, ReinterpretLine)) and line.reused_as.get_name() in handed_on:
                handed_on.add(line.node.get_name())
        # A step that hands on what it was given, or has branches of its own, gets new memory for what it hands on.
        swapped = _swapped(inside) if len(graphs) == 2 and not given & handed_on else {}
        self.staying = given - handed_on
        behind: list[Any] = []
        for line in inside:
            name = line.node.get_name() if isinstance(line, AllocateLine) else ""
            if isinstance(line, AllocateLine) and name not in handed_on:
                self.staying.add(name)
            elif isinstance(line, ReuseLine) and line.node.get_name() in self.staying:
                self.staying.add(line.reused_as.get_name())
            (ahead if name in self.staying or name in swapped else behind).append(line)
        self.lines = ahead + [Second(line) for line in swapped.values()] + behind
        self.small = _smallest([line.node for line in inside if isinstance(line, AllocateLine)], self.staying)

    def generate_return(self, output_refs: list[str]) -> None:
        super().generate_return(output_refs)
        code: Any = self.wrapper_call
        code._lines = on_the_stack(code._lines, self.small)


def _swapped(inside: Sequence[Any]) -> dict[str, AllocateLine]:
    """What a loop allocates and hands on as it is."""
    allocated = {line.node.get_name(): line for line in inside if isinstance(line, AllocateLine)}
    named = {line.reused_as.get_name(): line for line in inside if isinstance(line, ReuseLine)}
    handing = [line for line in inside if isinstance(line, HandOn)]
    inner = [line.inner for line in handing]
    for line in handing:
        name, same = line.inner, inner.count(line.inner) == 1
        while same and name in named:
            old, new = named[name].node, named[name].reused_as
            name, same = old.get_name(), old.get_size() == new.get_size() and old.get_stride() == new.get_stride()
        line.made = allocated.get(name) if same else None
    return {line.made.node.get_name(): line.made for line in handing if line.made}


def _smallest(nodes: Sequence[Any], among: set[str]) -> dict[str, tuple[str, int]]:
    """As many of those among these names as fit on the stack: their types and numbers of entries."""
    sizes = [(int(V.graph.get_allocation_storage_size(x)), x) for x in nodes if x.get_name() in among]
    sizes.sort(key=lambda sized: sized[0])
    totals = accumulate(n for n, _ in sizes)
    fitting = [x for x, total in zip(sizes, totals, strict=True) if total <= STACK]
    return {x.get_name(): (DTYPE_TO_CPP[x.get_dtype()], max(n, 1)) for n, x in fitting}


def on_the_stack(lines: Sequence[Any], small: Mapping[str, tuple[str, int]]) -> list[Any]:
    """The code with arrays in the place of small tensors of which nothing but the data is asked for."""
    names = {name: name for name in small}  # and what else they are called
    others: set[str] = set()
    for line in lines:
        written = isinstance(line, str)
        text = line.strip() if written else str(getattr(line, "line", line))
        if written and (called := ALIAS.fullmatch(text)) and called[2] in names:
            names[called[1]] = names[called[2]]
        elif not ALLOCATION.fullmatch(text):
            asked = DATA.sub("", text) if written else text
            others.update(names[name] for name in NAME.findall(asked) if name in names)
    arrays = {name for name, root in names.items() if root not in others}
    code: list[Any] = []
    for line in lines:
        written = isinstance(line, str)
        made = ALLOCATION.fullmatch(line.strip()) if written else None
        if made is None or made[made.lastindex or 0] not in arrays:
            code.append(DATA.sub(lambda x: x[1] if x[1] in arrays else x[0], line) if written else line)
        elif made[3]:
            kind, n = small[made[3]]
            code.append(f"alignas(64) {kind} {made[3]}[{n}];")
    return code
