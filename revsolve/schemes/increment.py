"""Increments: a tableau applied to a term."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time, moment, plus
from revsolve.core.coupling import Combination, frozen
from revsolve.core.tape import Memo
from revsolve.schemes.tableau import Tableau

Weight = tuple[int, float]  # a stage and its weight
Stage = tuple[float, tuple[Weight, ...]]  # where it is evaluated, and the weights of earlier stages


@dataclass(frozen=True)
class RungeKutta:
    """One explicit Runge-Kutta step of the term from x:  sum_i b_i k_i  with
    k_i = term(t0 + c_i (t1 - t0), x + sum_j a_ij k_j, t0 -> t1)."""

    tableau: Tableau
    nodes: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _stages: tuple[Stage, ...] = field(init=False, repr=False, compare=False)
    _weights: tuple[Weight, ...] = field(init=False, repr=False, compare=False)
    _error_weights: tuple[Weight, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tableau, store = self.tableau, object.__setattr__
        store(self, "_stages", tuple((c, _nonzero(row)) for c, row in zip(tableau.c, tableau.a, strict=True)))
        store(self, "nodes", tableau.c[: tableau.advancing_stages])
        store(self, "_weights", _nonzero(tableau.b))
        store(self, "_error_weights", _nonzero(tableau.b_error or ()))

    @property
    def ends_in_value(self) -> bool:
        return self.tableau.fsal

    def __call__(
        self, term: Memo, x: Tensor, t0: Time, t1: Time, with_error: bool = False
    ) -> tuple[Combination, Combination]:
        stages: list[Tensor] = []
        scale = 1.0
        for c, row in self._stages if with_error else self._stages[: len(self.nodes)]:
            xi = x
            for j, a in row:
                xi = plus(xi, stages[j], a * scale)
            t = moment(t0, t1, c)
            scale, k = term.weighted(term.value(t, xi), term.control(t, t0, t1))
            stages.append(k)
        parts: Combination = [(b * scale, stages[i]) for i, b in self._weights]
        errors: Combination = [(e * scale, stages[i]) for i, e in self._error_weights] if with_error else []
        return parts, errors


@dataclass(frozen=True)
class OneEvaluation:
    """The increment of the term over t0 -> t1 with the field frozen at the fraction `at` of the span."""

    at: float
    ends_in_value = False

    @property
    def nodes(self) -> tuple[float, ...]:
        return (self.at,)

    def __call__(
        self, term: Memo, x: Tensor, t0: Time, t1: Time, with_error: bool = False
    ) -> tuple[Combination, Combination]:
        parts = frozen(term, x, moment(t0, t1, self.at), t0, t1)
        return parts, parts if with_error else []


@dataclass(frozen=True, eq=False)
class Given:
    """No evaluation: a tensor, or zero."""

    value: Tensor | None = None
    nodes = ()
    ends_in_value = False

    def __call__(
        self, term: Memo, x: Tensor, t0: Time, t1: Time, with_error: bool = False
    ) -> tuple[Combination, Combination]:
        return [(1.0, torch.zeros_like(x) if self.value is None else self.value.view_as(x))], []


def _nonzero(row: tuple[float, ...]) -> tuple[Weight, ...]:
    return tuple((i, w) for i, w in enumerate(row) if w != 0.0)
