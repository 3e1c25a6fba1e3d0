"""What reversible equilibria are compared with: plain, relaxed and Anderson iteration, with implicit or phantom gradients.

method      next z                                          options
simple      f(z)
relaxed     (1 - beta) z + beta f(z)
anderson    the best combination of the last few of these   memory (6), ridge (1e-8)

gradient    how                                                       options
implicit    solves u = g + J^T u at the fixed point (J = df/dz)       b_method ("anderson"), b_tol (1e-6), b_max_steps (50)
            by one of the methods above, or by "gmres"                memory (20 for "gmres")
phantom     differentiates a few relaxed steps from the fixed point   phantom_steps (5), phantom_beta (0.5)
direct      differentiates all of the iteration
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Scalar
from revsolve.core.problem import Stats
from revsolve.core.tape import Memo, Term, leaf_of
from revsolve.field.functorch import dual_numbers, transformed
from revsolve.fixed_points.convergence import Convergence, Criterion
from revsolve.fixed_points.gmres import gmres
from revsolve.prepare.options import check_choice
from revsolve.prepare.state import Packing

METHODS = ("simple", "relaxed", "anderson")
BACKWARD_METHODS = (*METHODS, "gmres")  # which also solves where J does not contract
GRADIENTS = ("implicit", "phantom", "direct")
OPTIONS = ("memory", "ridge", "b_method", "b_tol", "b_max_steps", "phantom_steps", "phantom_beta")

Rule = Callable[[Tensor, Tensor], Tensor]  # (z, f(z)) -> next z


def equilibrium(
    term: Term,
    z0: Tensor,
    beta: Scalar,
    method: str,
    gradient: str,
    convergence: Convergence,
    options: Mapping[str, Any],
    on_failure: str,
) -> tuple[Tensor, Stats]:
    """The fixed point of the term from z0, with a gradient of the kind asked for, and what it took."""
    check_choice("b_method", options.get("b_method", "anderson"), BACKWARD_METHODS)
    if gradient == "implicit" and (transformed() or dual_numbers()):
        raise ValueError(
            "gradient='implicit' is not possible inside torch.func transforms or in forward mode: use gradient='direct' or "
            "'phantom', or method='reversible', whose gradient follows them."
        )
    memo = Memo(term)
    rule = _rule(method, beta, options)
    tracked = torch.is_grad_enabled()
    with torch.set_grad_enabled(tracked and gradient == "direct"):
        z = _iterate(lambda n, z: memo.value(float(n), z), z0, rule, convergence)
    stats = Stats(num_steps=convergence.num_steps, num_evaluations=memo.num_evaluations)
    if not tracked or gradient == "direct":
        return z, stats
    last = float(stats.num_steps)
    if gradient == "phantom":
        for _ in range(options.get("phantom_steps", 5)):
            z = torch.lerp(z, term.value(last, z), options.get("phantom_beta", 0.5))
        return z, stats
    leaf = leaf_of(z)
    value = term.value(last, leaf)
    out = z + (value - value.detach())  # z as it is, and the history of one evaluation there
    out.register_hook(_Adjoint(leaf, value, convergence.packing, options, on_failure, stats))
    return out, stats


@dataclass(frozen=True)
class _Adjoint:
    """Makes the cotangent g of the fixed point that of one evaluation f(z) there: u = g + J^T u, where J = df/dz."""

    leaf: Tensor
    value: Tensor  # f(leaf)
    packing: Packing
    options: Mapping[str, Any]
    on_failure: str
    stats: Stats

    def __call__(self, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradient='implicit' cannot be differentiated again (create_graph=True): use gradient='direct', or "
                "method='reversible', whose gradient can."
            )
        options, method = self.options, self.options.get("b_method", "anderson")
        criterion = Criterion(options.get("b_tol", 1e-6), options.get("b_max_steps", 50))
        solving = f"the backward solve with b_method={method!r}"
        convergence = Convergence(criterion, self.packing, solving=solving, contracting=method != "gmres")
        size = torch.linalg.vector_norm(grad)
        g = grad / torch.where(size > 0.0, size, 1.0)  # its residual then means the same for every scale of the loss
        if method == "gmres":
            u = gmres(self.product, g, options.get("memory", 20), convergence)
        else:
            u = _iterate(lambda n, u: g + self.product(u), g, _rule(method, 1.0, options), convergence)
        convergence.conclude(self.on_failure)
        return u * size

    def product(self, u: Tensor) -> Tensor:
        """J^T u."""
        self.stats.num_backward_evaluations += 1
        back = torch.autograd.grad(self.value, self.leaf, u, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(u) if back is None else back


def _iterate(f: Callable[[int, Tensor], Tensor], z: Tensor, rule: Rule, convergence: Convergence) -> Tensor:
    criterion = convergence.criterion
    for n in range(criterion.max_steps):
        value = f(n, z)
        if criterion.tol > 0 and n > 0 and convergence.observe(n, z, value):
            return z
        after = rule(z, value)
        z = torch.where(convergence.moves(n), after, z) if criterion.rests else after
    convergence.num_steps = criterion.max_steps
    if criterion.tol > 0:
        convergence.observe(criterion.max_steps, z, f(criterion.max_steps, z))
    return z


def _rule(method: str, beta: Scalar, options: Mapping[str, Any]) -> Rule:
    if method == "simple":
        return lambda z, value: value
    if method == "relaxed":
        return lambda z, value: z + beta * (value - z)
    return _Anderson(beta, options.get("memory", 6), options.get("ridge", 1e-8))


class _Anderson:
    """Anderson acceleration (Walker & Ni 2011): combine the last points so that their residuals cancel best, then relax."""

    def __init__(self, beta: Scalar, memory: int, ridge: float) -> None:
        self.beta, self.memory, self.ridge = beta, memory, ridge
        self.points: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def __call__(self, z: Tensor, value: Tensor) -> Tensor:
        self.points = [*self.points, z][-self.memory :]
        self.residuals = [*self.residuals, value - z][-self.memory :]
        gaps = torch.stack([r.reshape(-1) for r in self.residuals])
        gram = (gaps @ gaps.mH).real
        size = gram.diagonal().sum().clamp_min(torch.finfo(gram.dtype).tiny)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram / size + self.ridge * eye, torch.ones_like(gram[0]))
        weights = weights / weights.sum()
        terms = (w * (p + self.beta * r) for w, p, r in zip(weights, self.points, self.residuals, strict=True))
        return torch.stack(list(terms)).sum(0)
