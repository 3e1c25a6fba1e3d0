"""Inductor as programs use it: with the memory of `wrapper`, a tanh of its own, and nothing tried or compiled that need not be.

Inductor's tanh takes a third of the time of a solve through a small network: here it is a rational function.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
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
from torch._inductor.virtualized import V

from revsolve.backends.inductor.wrapper import Wrapper

# tanh(x) = x P(x^2) / Q(x^2), fitted for a relative error of 2e-8 up to 9; from there on it is 1 in float32.
ABOVE = (1.335463976e-8, 2.060906507e-5, 3.495587022e-3, 0.1338102470, 1.0)
BELOW = (7.776548935e-7, 3.285633048e-4, 2.587697795e-2, 0.4671434030, 1.0)


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
