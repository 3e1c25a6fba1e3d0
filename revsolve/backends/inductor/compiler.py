"""How programs are compiled: what `compile=` says, and inductor as it is used for them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from revsolve.backends.inductor.transcript import CompilationError, uncached

OPTIONS = ("backend", "mode", "options")
BACKENDS = ("inductor", "eager")
WRITTEN_FOR = ("2.13.", "2.14.")  # versions of torch that `inductor` has been tried with


@dataclass(frozen=True)
class Compiler:
    """How programs are compiled: what `compile=` says.

    Args:
        backend: "inductor", or "eager" to run the recorded operations one by one, which shows whether it is recording or
            compiling that fails.
        options: of inductor, as in `torch.compile(options=...)`.
    """

    backend: str = "inductor"
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, loop: fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., Any]:
        if self.backend == "eager":
            return loop
        # imported here, for it warns of things in torch that are deprecated
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        options = {"cpp_wrapper": example[0].device.type == "cpu", **dict(self.options)}
        made: list[Callable[[list[Tensor]], Any]] = []

        def keep(graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
            inner = compile_fx_inner(graph, inputs, **settings)
            if len(inputs) == len(example):  # nothing was added that only `run` would give it
                made.append(inner)
            return inner

        run: Any = compile_fx(loop, list(example), inner_compile=keep, config_patches=options)
        # What is around it is for graphs that alias or need gradients; from a cache on disk it may come as a whole.
        return (lambda *inputs: made[-1](list(inputs))) if made else run


def _own_code(way: Compiler) -> AbstractContextManager[None]:
    """Inductor as programs use it; as it is in a version of torch whose inside is not known, where solves take longer."""
    if way.backend != "inductor" or not torch.__version__.startswith(WRITTEN_FOR):
        return nullcontext()
    from revsolve.backends.inductor.inductor import own_code

    return own_code()


def compiler(given: Any) -> Compiler:
    """What `compile=` means. Raises ValueError or TypeError for anything but True or a mapping of known options."""
    if given is True:
        return Compiler()
    if not isinstance(given, Mapping):
        raise TypeError(f"compile must be True, False or a dict of options of torch.compile, but it is {given!r}.")
    for name in given:
        if name not in OPTIONS:
            raise ValueError(f"unknown option {name!r} in compile=: options are {', '.join(OPTIONS)}.")
    backend = given.get("backend", "inductor")
    if backend not in BACKENDS:
        raise ValueError(f"compile={{'backend': {backend!r}}} must be one of {', '.join(map(repr, BACKENDS))}.")
    options = dict(torch._inductor.list_mode_options(given["mode"])) if given.get("mode") else {}
    options.update(given.get("options") or {})
    return Compiler(backend, tuple(sorted(options.items())))


@contextmanager
def compiling(way: Compiler) -> Iterator[None]:
    """Python's garbage and the search for anomalies wait meanwhile; where torch cannot record or compile, say what to do."""
    collects = gc.isenabled()
    gc.disable()  # a sixth of the time went into walks through all that torch has imported
    try:
        # a recording has no numbers to look at
        with _own_code(way), uncached(), torch.autograd.set_detect_anomaly(False):
            yield
    except Exception as error:
        raise CompilationError(
            f"compile= cannot turn this field into a program (backend {way.backend!r}): {type(error).__name__}: {error}. A field "
            "may not look at numbers (if on a value, .item(), .numpy()), compute with complex ones, or use tensors that were not "
            "there when it was first called; solve with compile=False, which has no such limits."
        ) from error
    finally:
        if collects:
            gc.enable()
