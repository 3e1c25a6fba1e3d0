"""The compilation of programs as `compile=` asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from revsolve.backends import CompilationError
from revsolve.backends.inductor.operation_trace import uncached
from revsolve.backends.inductor.torch_internals import compile_graph, mode_options

OPTIONS = ("backend", "mode", "options")
BACKENDS = ("inductor", "eager")


@dataclass(frozen=True)
class Compiler:
    """Makes programs of recordings.

    Args:
        backend: "inductor", or "eager" to run the recorded operations one by one, which shows whether it is recording or
            compiling that fails.
        options: of inductor, as in `torch.compile(options=...)`.
    """

    backend: str = "inductor"
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, graph: fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., Any]:
        return graph if self.backend == "eager" else compile_graph(graph, example, dict(self.options))


def compiler(given: Any) -> Compiler:
    """The meaning of `compile=`. Raises ValueError or TypeError for anything but True or a mapping of known options."""
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
    options = mode_options(given["mode"]) if given.get("mode") else {}
    options.update(given.get("options") or {})
    return Compiler(backend, tuple(sorted(options.items())))


@contextmanager
def compiling(by: Compiler) -> Iterator[None]:
    """Say what to do where torch cannot record or compile."""
    try:
        # a recording has no numbers in which anomalies could be looked for
        with uncached(), torch.autograd.set_detect_anomaly(False):
            yield
    except CompilationError:
        raise
    except Exception as error:
        raise CompilationError(
            f"compile= cannot turn this field into a program (backend {by.backend!r}): {type(error).__name__}: {error}. A field "
            "may not look at numbers (if on a value, .item(), .numpy()), compute with complex ones, or use tensors that were not "
            "there when it was first called; solve with compile=False, which has no such limits."
        ) from error
