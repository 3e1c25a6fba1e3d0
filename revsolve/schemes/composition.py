"""Symmetric compositions: a symmetric method of order 2 taken over substeps is one of order 4 or 6.

The fractions of the step are those of Yoshida (1990), Suzuki (1990), and Kahan and Li (1997).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from revsolve.core.coupling import CouplingUpdate
from revsolve.schemes.increment import OneEvaluation


def halved(fractions: Sequence[float]) -> tuple[float, ...]:
    """Every substep as two halves: one alone reflects z about y, two in a row are near the identity on the whole pair.

    The theory of symmetric compositions asks for that. Single substeps lose an order at every restart, and reach 4 at most.
    """
    return tuple(fraction / 2 for fraction in fractions for _ in range(2))


_YOSHIDA = 1 / (2 - 2 ** (1 / 3))
THREE_STAGES = (_YOSHIDA, 1 - 2 * _YOSHIDA, _YOSHIDA)
_SUZUKI = 1 / (4 - 4 ** (1 / 3))
FIVE_STAGES = (_SUZUKI, _SUZUKI, 1 - 4 * _SUZUKI, _SUZUKI, _SUZUKI)
YOSHIDA4, SUZUKI4 = halved(THREE_STAGES), halved(FIVE_STAGES)
_KAHAN_LI = (0.39216144400731413928, 0.33259913678935943860, -0.70624617255763935981, 0.082213596293550800230)
KAHAN_LI6 = halved((*_KAHAN_LI, 1 - 2 * sum(_KAHAN_LI), *reversed(_KAHAN_LI)))
# Divided differences over more nodes would measure the second-order wobble between substeps, not the error of the step.
ERROR_NODES = 4


def compose(base: Sequence[CouplingUpdate], composition: Sequence[float]) -> list[CouplingUpdate]:
    """The same updates over the substeps one after another; two that meet and do the same become one over both substeps."""
    updates: list[CouplingUpdate] = []
    for a, b in itertools.pairwise(partial_sums(composition)):
        for update in base:
            last = updates[-1] if updates else None
            if last is not None and replace(update, start=last.start, end=last.end, increment=last.increment) == last:
                updates[-1] = _joined(last, replace(update, start=a, end=b))
            else:
                updates.append(replace(update, start=a, end=b))
    return updates


def _joined(first: CouplingUpdate, second: CouplingUpdate) -> CouplingUpdate:
    """One update over both substeps; an evaluation at the end of the first is that at the start of the second."""
    if first.increment is None:
        return replace(first, end=second.end)
    at = (first.end - first.start) / (second.end - first.start)
    return replace(first, end=second.end, increment=OneEvaluation(at))


def partial_sums(composition: Sequence[float]) -> list[float]:
    """Where the substeps begin and end, from 0 to 1; ValueError if the fractions do not add up to 1."""
    if not math.isclose(sum(composition), 1.0, abs_tol=1e-14):
        raise ValueError(
            f"the fractions of a composition must add up to 1, but {composition} add up to {sum(composition)}."
        )
    return [*(sum(composition[:i]) for i in range(len(composition))), 1.0]


def embedded_weights(weights: Sequence[float], nodes: Sequence[float]) -> list[float]:
    """Error weights: the multiple of a divided difference over spread nodes that drops one of them from the quadrature."""
    count = min(len(nodes), ERROR_NODES)
    spread = [round(i * (len(nodes) - 1) / (count - 1)) for i in range(count)]
    difference = {i: 1 / math.prod([nodes[i] - nodes[j] for j in spread if j != i]) for i in spread}
    scale = sorted([weights[i] / difference[i] for i in spread], key=abs)[0]  # torch.compile knows no min by key
    return [scale * difference.get(i, 0.0) for i in range(len(nodes))]
