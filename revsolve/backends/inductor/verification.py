"""A new program beside the code that it was made from: what is recorded or compiled wrongly is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from revsolve.backends import CompilationError

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
    `eps`; the first results are known up to the `resolution` only.

    Roundings may carry a number over a kink of the field, but hardly twice, so the program has a second try elsewhere.
    """
    wrong = _difference(step, run, inputs, eps, changed, resolution)
    if wrong is not None:
        moved = [x * MOVED if x.is_floating_point() or x.is_complex() else x for x in inputs]
        wrong = _difference(step, run, moved, eps, changed, resolution)
    if wrong is not None:
        raise CompilationError(
            f"a program differs by {wrong[0]:.1e} from the code that it was made from, where numbers are as large as "
            f"{wrong[1]:.1e}: solve with compile=False, and please report the field."
        )


def _difference(
    step: Callable[..., Sequence[Tensor]],
    run: Callable[..., Any],
    inputs: Sequence[Tensor],
    eps: float,
    changed: Sequence[int],
    resolution: Sequence[float],
) -> tuple[float, float] | None:
    """How far a result is off that is further off than roundings explain, and how large it is; None if there is none."""
    ways: list[list[Tensor]] = []
    for call in (step, run):
        given = [x.clone() if i in changed else x for i, x in enumerate(inputs)]
        ways.append([*call(*given), *(given[i] for i in changed)])
    rounded = [x.is_floating_point() or x.is_complex() for x in ways[0]]
    sizes = [float(x.abs().nan_to_num().max()) if rounds else 0.0 for x, rounds in zip(ways[0], rounded, strict=True)]
    rest = eps**0.75 * max(sizes)  # all that is left of some sums, as for the gradient of a bias before a normalisation
    least = [*map(float, resolution), *[0.0] * (len(sizes) - len(resolution))]
    for wanted, got, size, rounds, blur in zip(*ways, sizes, rounded, least, strict=True):
        a, b = ((torch.view_as_real(x) if x.is_complex() else x).double() for x in (wanted, got))
        if not torch.allclose(a, b, rtol=0.0, atol=eps**0.5 * size + rest + blur if rounds else 0.0, equal_nan=True):
            return float((a - b).abs().max()), size
    return None


def rounding(recorded: fx.GraphModule) -> float:
    """That of the coarsest numbers with which a recording computes."""
    graphs = [module.graph for module in recorded.modules() if isinstance(module, fx.GraphModule)]
    made = tree_leaves([node.meta.get("val") for graph in graphs for node in graph.nodes])
    return max(torch.finfo(x.dtype).eps for x in made if isinstance(x, Tensor) and x.dtype.is_floating_point)
