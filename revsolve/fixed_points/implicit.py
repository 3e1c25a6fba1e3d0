"""What reversible equilibria are compared with: iterations of a single state, and gradients that are not those of the iteration.

method          next z                                          options
simple          f(z)
relaxed         (1 - beta) z + beta f(z)
anderson        the best combination of the last few of these   memory (6), ridge (1e-8)

gradient        how                                                      options
implicit        solves u = g + J^T u at the fixed point (J = df/dz)      b_method ("anderson"), b_tol (1e-6), b_max_steps (50)
implicit_NAME   the same by NAME, a method above or gmres                memory (20 for gmres), ridge
phantom         differentiates a few relaxed steps from the fixed point  phantom_steps (5), phantom_beta (0.5)
one_step        differentiates one evaluation of f there
truncated       differentiates the last steps, where tol is not 0 those made after convergence          last_steps (4)
direct          differentiates all of the iteration
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Scalar
from revsolve.core.problem import Field, Stats
from revsolve.core.tape import Memo, Term, leaf_of
from revsolve.field.functorch import dual_numbers, transformed
from revsolve.fixed_points.convergence import SMALLEST, Convergence, Criterion
from revsolve.fixed_points.iteration import check_whole
from revsolve.prepare.options import check_choice, check_options
from revsolve.prepare.problem import GRADIENTS
from revsolve.prepare.state import Packing

METHODS = ("simple", "relaxed", "anderson")
BACKWARD_METHODS = (*METHODS, "gmres")  # which also solves where J does not contract
AT_THE_END = ("one_step", "phantom", "implicit", *(f"implicit_{name}" for name in BACKWARD_METHODS))  # of the iteration
OPTIONS = ("memory", "ridge", "b_method", "b_tol", "b_max_steps", "phantom_steps", "phantom_beta", "last_steps")
LAST_STEPS = 4

Rule = Callable[[Tensor, Tensor], Tensor]  # (z, f(z)) -> next z


def iterate(field: Field, z: Tensor, rule: Rule, convergence: Convergence, last_steps: int = 0) -> tuple[Tensor, Stats]:
    """The state after the iteration, and after so many `last_steps` more; if there are any, their gradient alone."""
    term = field.term
    memo = Memo(term)
    if (first := field.take_first()) is not None:
        memo.num_evaluations, memo.latest = 1, (z, *first)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not last_steps):
        z = _iterated(lambda n, z: memo.value(float(n), z), z, rule, convergence)
    for n in range(convergence.num_steps, convergence.num_steps + last_steps):
        z = rule(z, term.value(float(n), z))
    num_steps = convergence.num_steps + last_steps
    return z.clone(), Stats(num_steps=num_steps, num_evaluations=memo.num_evaluations + last_steps)


def gradient_at_the_end(
    term: Term, z: Tensor, gradient: str, packing: Packing, options: Mapping[str, Any], on_failure: str, stats: Stats
) -> Tensor:
    """z, a fixed point of the term without a history, with a gradient of the kind asked for."""
    last = float(stats.num_steps)
    if gradient in ("one_step", "phantom"):
        num_steps, beta = (1, 1.0) if gradient == "one_step" else (options["phantom_steps"], options["phantom_beta"])
        stats.num_evaluations += num_steps
        for _ in range(num_steps):
            z = torch.lerp(z, term.value(last, z), beta)
        return z
    if transformed() or dual_numbers():
        raise ValueError(
            f"gradient={gradient!r} is not possible inside torch.func transforms or in forward mode: use gradient='direct' or "
            "'phantom', or method='reversible', whose gradient follows them."
        )
    leaf = leaf_of(z)
    value = term.value(last, leaf)
    out = z + (value - value.detach())  # z as it is, and the history of one evaluation there
    out.register_hook(_Adjoint(leaf, value, packing, options, on_failure, stats))
    return out


def gradient_options(method: str, gradient: str | None, options: Any) -> tuple[str | None, dict[str, Any]]:
    """The gradient by its name, None for the engine's own choice, and all options; a ValueError says which are possible."""
    check_choice("method", method, ("reversible", *METHODS))
    reversible = method == "reversible"
    gradient = gradient if reversible else gradient or "implicit"
    exact = GRADIENTS if reversible else ("direct",)
    if gradient is not None:
        check_choice("gradient", gradient, (*exact, "truncated", *AT_THE_END))
    if options is not None and reversible and gradient in (None, *exact):
        raise ValueError(
            f"options={options!r} is for {' and '.join(METHODS)}, and for gradients that are not exact: leave it out."
        )
    given = check_options(options, OPTIONS, method)
    check_choice("b_method", given.get("b_method", "anderson"), BACKWARD_METHODS)
    for name in ("last_steps", "phantom_steps", "b_max_steps", "memory"):
        check_whole(name, given.get(name))
    if gradient is not None and gradient.startswith("implicit_"):
        if "b_method" in given:
            raise ValueError(
                f"b_method={given['b_method']!r} is for gradient='implicit', and gradient is {gradient!r}."
            )
        given["b_method"] = gradient.removeprefix("implicit_")
    return gradient, {"last_steps": LAST_STEPS, "phantom_steps": 5, "phantom_beta": 0.5, **given}


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
            u = _iterated(lambda n, u: g + self.product(u), g, rule(method, 1.0, options), convergence)
        convergence.conclude(self.on_failure)
        return u * size

    def product(self, u: Tensor) -> Tensor:
        """J^T u."""
        self.stats.num_backward_evaluations += 1
        back = torch.autograd.grad(self.value, self.leaf, u, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(u) if back is None else back


def _iterated(f: Callable[[int, Tensor], Tensor], z: Tensor, rule: Rule, convergence: Convergence) -> Tensor:
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


def rule(method: str, beta: Scalar, options: Mapping[str, Any]) -> Rule:
    """What makes the next state from a state and its value."""
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


Linear = Callable[[Tensor], Tensor]


def gmres(product: Linear, g: Tensor, memory: int, convergence: Convergence) -> Tensor:
    """The u that differs little enough from g + L u, where product(u) = L u, or the last one after max_steps directions.

    After `memory` directions it starts again from what it has; `convergence` sees the true residual whenever it does.
    """
    criterion = convergence.criterion
    u, value, used = torch.zeros_like(g), g, 0
    while used < criterion.max_steps:
        enough = criterion.tol * (SMALLEST + float(torch.linalg.vector_norm(value)))
        change, number = _cycle(product, value - u, min(memory, criterion.max_steps - used), enough)
        u, used = u + change, used + number
        value = g + product(u)
        if convergence.observe(used, u, value):
            break
    return u


def _cycle(product: Linear, gap: Tensor, most: int, enough: float) -> tuple[Tensor, int]:
    """Of all combinations of gap, L gap, L^2 gap, ... that x for which x - L x comes closest to the gap, and how many it took."""
    length = torch.linalg.vector_norm(gap)
    basis = [_vector(gap) / length.clamp_min(torch.finfo(length.dtype).tiny)]
    # x - L x in the basis, one column for every direction
    projected = torch.zeros(most + 1, most, dtype=torch.float64, device="cpu")
    target = torch.zeros(most + 1, dtype=torch.float64, device="cpu")
    target[0] = length
    for j in range(most):
        rest = basis[j] - _vector(product(_shaped(basis[j], gap)))
        rows = torch.stack(basis)  # (directions, numbers)
        for _ in range(2):  # the second time removes what rounding left of the first
            along = rows @ rest
            rest = rest - along @ rows
            projected[: j + 1, j] += along.to(projected)
        projected[j + 1, j] = size = float(torch.linalg.vector_norm(rest))
        part = projected[: j + 2, : j + 1]
        weights = torch.linalg.lstsq(part, target[: j + 2, None], driver="gelsd").solution[:, 0]
        left = float(torch.linalg.vector_norm(part @ weights - target[: j + 2]))
        if left <= enough or size <= torch.finfo(rest.dtype).eps or not math.isfinite(left):
            break  # close enough, or nothing new is reached
        basis.append(rest / size)
    return _shaped(weights.to(rows) @ rows, gap), j + 1


def _vector(x: Tensor) -> Tensor:
    """As a real vector, of float32 or wider: a derivative need not be linear over the complex numbers."""
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return real.reshape(-1).to(torch.promote_types(real.dtype, torch.float32))


def _shaped(vector: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(vector.view(*like.shape, 2)).to(like.dtype)
    return vector.view(like.shape).to(like.dtype)
