"""The compilation of programs as `compile=` asks for it; what is recorded or compiled wrongly is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from revsolve.backends import CompilationError
from revsolve.backends.inductor.operation_trace import uncached
from revsolve.backends.inductor.torch_internals import compile_graph, mode_options

OPTIONS = ("backend", "mode", "options")
BACKENDS = ("inductor", "eager")


@dataclass(frozen=True)
class Compiler:
    """Makes programs of recordings by a backend with its options, as in `torch.compile`."""

    backend: str = "inductor"  # or "eager", by which recorded operations run one by one: is it recording that fails?
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


MOVED = 1.01  # by this factor, in the second try


def check(
    step: Callable[..., Sequence[Tensor]],
    run: Callable[..., Any],
    inputs: Sequence[Tensor],
    eps: float,
    changed: Sequence[int] = (),
    resolution: Sequence[float] = (),
) -> None:
    """Raise CompilationError unless the program does what the code does that it was recorded from, but for roundings of size
    `eps`; the first results are known up to the `resolution` only. Inputs that are `changed` begin at zero: memory that was
    never written may hold numbers beside which no difference counts.

    Roundings may carry a number over a kink of the field, but hardly twice, so the program has a second try elsewhere.
    """
    for factor in (1.0, MOVED):
        results: list[list[Tensor]] = []
        for call in (step, run):
            given = [x * factor if x.is_floating_point() or x.is_complex() else x for x in inputs]
            for i in changed:
                given[i] = torch.zeros_like(inputs[i])
            results.append([*call(*given), *(given[i] for i in changed)])
        wanted, got = results
        if (wrong := _difference(wanted, got, eps, resolution)) is None:
            return
        error, size = wrong
    raise CompilationError(
        f"a program differs by {error:.1e} from the code that it was made from, where numbers are as large as "
        f"{size:.1e}: solve with compile=False, and please report the field."
    )


def _difference(
    wanted: Sequence[Tensor], got: Sequence[Tensor], eps: float, resolution: Sequence[float]
) -> tuple[float, float] | None:
    """How far a result is off that is further off than roundings explain, and how large it is; None if there is none."""
    rounded = [x.is_floating_point() or x.is_complex() for x in wanted]
    sizes = [float(x.abs().nan_to_num().max()) if rounds else 0.0 for x, rounds in zip(wanted, rounded, strict=True)]
    rest = eps**0.75 * max(sizes)  # all that is left of some sums, as for the gradient of a bias before a normalisation
    least = [*map(float, resolution), *[0.0] * (len(sizes) - len(resolution))]
    for a, b, size, rounds, blur in zip(wanted, got, sizes, rounded, least, strict=True):
        a, b = ((torch.view_as_real(x) if x.is_complex() else x).double() for x in (a, b))
        if not torch.allclose(a, b, rtol=0.0, atol=eps**0.5 * size + rest + blur if rounds else 0.0, equal_nan=True):
            return float((a - b).abs().max()), size
    return None


def rounding(recorded: fx.GraphModule) -> float:
    """That of the coarsest numbers with which a recording computes."""
    graphs = [module.graph for module in recorded.modules() if isinstance(module, fx.GraphModule)]
    made = tree_leaves([node.meta.get("val") for graph in graphs for node in graph.nodes])
    return max(torch.finfo(x.dtype).eps for x in made if isinstance(x, Tensor) and x.dtype.is_floating_point)
