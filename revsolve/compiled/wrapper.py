"""What inductor writes for a loop, but for two things: where memory is asked for, and tanh.

Inductor's own C++ gives every step new tensors for all that it computes, and new handles for all that it reads: for small
states ten times the time of the kernels. Here that happens in front of the loop. Its tanh takes a third of the time of a solve
through a small network: here it is a rational function.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import cache
from threading import Thread
from typing import Any

import torch
from torch._inductor import cpu_vec_isa
from torch._inductor.codecache import CppWrapperCodeCache
from torch._inductor.codegen import common
from torch._inductor.codegen.cpp import CppVecOverrides
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
# tanh(x) = x P(x^2) / Q(x^2), fitted for a relative error of 2e-8 up to 9; from there on it is 1 in float32.
ABOVE = (1.335463976e-8, 2.060906507e-5, 3.495587022e-3, 0.1338102470, 1.0)
BELOW = (7.776548935e-7, 3.285633048e-4, 2.587697795e-2, 0.4671434030, 1.0)


@dataclasses.dataclass
class HandOn(WrapperLine):
    """What a step made becomes `outer`, what was carried so far.

    The memory of that becomes `made`, into which the next step writes; that of the first is not ours, so `second` is.
    """

    outer: str
    inner: str
    made: AllocateLine | None = None

    def codegen(self, code: IndentedBuffer) -> None:
        before, made = f"{self.outer}_before", self.made and self.made.node.get_name()
        code.writeline(f"auto {before} = std::move({self.outer});")
        code.writeline(f"{self.outer} = std::move({self.inner});")
        if made:
            code.writeline(f"{made} = {made}_second.get() ? std::move({made}_second) : std::move({before});")


@dataclasses.dataclass
class Second(WrapperLine):
    """Memory like that which this line allocates."""

    line: AllocateLine

    def codegen(self, code: IndentedBuffer) -> None:
        x = self.line.node
        like: Any = x.get_device(), x.get_dtype(), x.get_size(), x.get_stride()
        code.writeline(self.line.wrapper.make_allocation(f"{x.get_name()}_second", *like))


class Wrapper(CppWrapperCpu):
    """Inductor's C++ around kernels, but for what a step allocates: that stays from one step to the next.

    Of what a step hands on to the next there are two, for both are there at once.
    """

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
        handed_on = {name for graph in graphs for name in graph.get_output_names()}
        for line in reversed(inside):
            if isinstance(line, (ReuseLine, ReinterpretLine)) and line.reused_as.get_name() in handed_on:
                handed_on.add(line.node.get_name())
        given = {name for graph in graphs for name in graph.graph_inputs}
        swapped = {} if given & handed_on else _swapped(inside)
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


def tanh(x: Any) -> str:
    """C++ for the tanh of a vector; in float32, within five roundings, in a fraction of the time of the vector library."""
    if x.dtype is not torch.float32 or not isinstance(V.graph.wrapper_code, Wrapper):
        return TANH(x)
    above, below = (_horner([f"V({c}f)" for c in polynomial]) for polynomial in (ABOVE, BELOW))
    bounded = "at::vec::clamp({}, V({}f), V({}f))".format
    return (
        f"[](auto given) {{ using V = decltype(given); const V x = {bounded('given', -9.0, 9.0)}, u = x * x; "
        f"return {bounded(f'x * {above} / {below}', -1.0, 1.0)}; }}({x})"
    )


TANH = CppVecOverrides.tanh


def _horner(coefficients: list[str]) -> str:
    out, *rest = coefficients
    for c in rest:
        out = f"at::vec::fmadd({out}, u, {c})"
    return out


def vector_instructions_known() -> bool:
    """Whether this x86 processor has vector instructions that torch itself makes use of. Compilers that know its headers know
    these too: inductor need not try, which takes three seconds or more."""
    has = cpu_vec_isa.x86_isa_checker() if platform.machine() in ("x86_64", "AMD64") else []
    return torch.backends.cpu.get_cpu_capability() == ("AVX512" if "avx512" in has else "AVX2")


@cache
def precompiling() -> Thread:
    """Prepares the header of all programs while the first is being recorded: it takes longer than a program does."""

    def prepare() -> None:
        with suppress(Exception):  # whatever it is, it comes again when a program is compiled
            CppWrapperCodeCache.load_async("", needs_vec_isa=True)

    thread = Thread(target=copy_context().run, args=(prepare,), daemon=True)
    thread.start()
    return thread


@contextmanager
def own_code() -> Iterator[None]:
    """What is compiled meanwhile is written so."""
    common.init_backend_registration()
    usual = common.device_codegens["cpu"]
    common.device_codegens["cpu"] = dataclasses.replace(usual, cpp_wrapper_codegen=Wrapper)
    CppVecOverrides.tanh = staticmethod(tanh)  # type: ignore[method-assign]
    usual_trial = cpu_vec_isa.VecISA.check_build
    if vector_instructions_known():
        cpu_vec_isa.VecISA.check_build = lambda isa, code: True  # type: ignore[assignment]
    try:
        precompiling()
        yield
    finally:
        cpu_vec_isa.VecISA.check_build = usual_trial  # type: ignore[method-assign]
        common.device_codegens["cpu"] = usual
        CppVecOverrides.tanh = staticmethod(TANH)  # type: ignore[method-assign]
