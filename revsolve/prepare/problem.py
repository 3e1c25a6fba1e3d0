"""From raw input to what the engine takes: checked arguments, one traced call of the field, and all tensors it touches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.core.problem import Problem, Stats
from revsolve.core.restart import Restarting
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term
from revsolve.field.functorch import dual_numbers, transformed
from revsolve.field.pure import Pure, pure
from revsolve.field.repeat import capturing
from revsolve.field.transformed import TransformedSolve, transformed_field
from revsolve.prepare.options import check_choice
from revsolve.restarts.growth import Restarts

GRADIENTS = ("reversible", "checkpoint", "direct")
FEW = 2  # steps that are no more than their checkpoints
REMEDY = "restart more often (restarts=8, say), use a wider dtype"
BLIND_INTERVAL = 4  # short enough for all of the classical problems that restarts were tuned on, but the stiffest


def prepare(
    term: Term,
    x0: Tensor,
    t: Tensor | None,
    span: tuple[float, float],
    owners: Sequence[Any],
    scheme: Scheme,
    make_stepper: Callable[[], Stepper],
    gradient: str | None,
    restarts: Any,
    *,
    explain: Callable[[float, Tensor], str],
    pair_dtype: torch.dtype | None = None,
    anchor_every: Callable[[], int] | None = None,
    rounding: float | None = None,
    remedy: str | None = None,
    compile: Any = False,  # noqa: A002
    source: Any = None,
    num_steps: int | None = None,
    checkpoint_every: int | None = None,
) -> Problem:
    """Everything the engine needs, found by a first call of the term over `span`.

    Args:
        owners: the callables and objects whose tensors the term may use.
        explain: the message where the state stops being finite, from a time and a state.
        pair_dtype: the dtype of the pair, where it is wider than that of x0.
        anchor_every: gives the steps between stored pairs; asked only where steps will be undone, as are the next two.
        rounding: that of the field, where it is coarser than the state's.
        remedy: advice where undoing the steps is too inaccurate.
        compile: what `compile=` says; `source` is what drives the term, such as noise.
        num_steps: the number of steps, where it is known beforehand. checkpoint_every: those between checkpoints, if given.
    """
    how = _way_of_gradient(gradient, scheme)
    if (
        gradient is None
        and how == "checkpoint"
        and num_steps is not None
        and num_steps <= FEW
        and t is None
        and not compile
    ):
        how = "direct"
    elif checkpoint_every is not None and how != "checkpoint":
        raise ValueError(
            f"checkpoint_every = {checkpoint_every} goes with gradient='checkpoint', but it is {how!r} here."
        )
    restarts = check_restarts(restarts, scheme)
    pair_dtype = None if pair_dtype == x0.dtype else pair_dtype
    x = x0 if pair_dtype is None else x0.to(pair_dtype)
    hidden = values_hidden()
    handed_down = hidden and how != "direct" and not scheme.tensors
    field: Any = transformed_field(term, x, span, owners) if handed_down else None
    operation = None if field is None else TransformedSolve
    traced = hidden and field is None
    followed = traced or (not hidden and dual_numbers())  # looking at values would cut them off from their tangents
    if followed:
        _refuse_all_but_direct(gradient)
        how = "direct"
    if traced:
        field = Pure(term)
    elif field is None:
        field = pure(term, x, span, owners, how, t is not None, scheme.tensors)
        field.opening.x = x0.detach()  # where the pair is wider, its copy of the start is not to be held
    readable, undoes = not (traced or capturing()), how == "reversible"
    problem = Problem(
        scheme,
        field,
        make_stepper,
        how,
        restarts if readable and not followed else _blind(restarts),
        Stats(),
        explain,
        anchor_every=anchor_every() if undoes and anchor_every else checkpoint_every,
        state_dtype=None if pair_dtype is None else x0.dtype,
        pair_dtype=pair_dtype,
        rounding=rounding if undoes else None,
        remedy=remedy or REMEDY,
        readable=readable,
        followed=followed,
        operation=operation,
    )
    if not compile:
        return problem
    from revsolve.backends.inductor.backend import compiled  # importing what compiles takes longer than many solves

    return compiled(problem, compile, x0, t, source)


def values_hidden() -> bool:
    """Whether numbers cannot be read from tensors now: inside torch.func transforms, and while torch.compile traces."""
    return torch.compiler.is_compiling() or transformed()


def _way_of_gradient(gradient: str | None, scheme: Scheme) -> str:
    if gradient is None:
        return "reversible" if scheme.reversible else "checkpoint"
    check_choice("gradient", gradient, GRADIENTS)
    if gradient == "reversible" and not scheme.reversible:
        raise ValueError(
            f"{scheme.name!r} cannot be undone, so gradient='reversible' is not possible: use method='rev_{scheme.name}', or "
            "gradient='checkpoint'."
        )
    return gradient


def _refuse_all_but_direct(gradient: str | None) -> None:
    if gradient not in (None, "direct"):
        raise ValueError(
            f"gradient={gradient!r} is not possible here, because torch.compile, a transform of torch.func or forward mode "
            "differentiates the solve itself (docs: Works with): leave it out, or say gradient='direct'."
        )


def _blind(restarts: Restarting | None) -> Restarting | None:
    """Restarts that do not look at values: at a fixed interval."""
    if restarts is None or (isinstance(restarts, Restarts) and restarts.interval is not None):
        return restarts
    return Restarts(interval=getattr(restarts, "longest", None) or BLIND_INTERVAL)


def check_restarts(restarts: Any, scheme: Scheme) -> Restarting | None:
    """'auto', a number of steps, a `Restarts` or what has its methods, or None; a scheme whose steps are not undone has none."""
    if not scheme.reversible and restarts not in ("auto", None):
        raise ValueError(
            f"restarts={restarts!r} has no meaning for {scheme.name!r}, whose steps are not undone: leave it out."
        )
    if restarts is None or hasattr(restarts, "policy"):
        return restarts
    if restarts == "auto":
        return Restarts()
    if isinstance(restarts, int) and not isinstance(restarts, bool):
        return Restarts(interval=restarts)
    raise ValueError(f"restarts must be 'auto', a number of steps, a Restarts(...) or None, but it is {restarts!r}.")
