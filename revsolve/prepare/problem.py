"""From raw input to what the engine takes: checked arguments, one traced call of the field, and all tensors it touches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from revsolve.backends.inductor.driven import Source
from revsolve.core.capture import capturing
from revsolve.core.coupling import Scheme
from revsolve.core.integrate import Problem, Stats
from revsolve.core.replay import Buffers, Frozen, Noisy, has_hooks, random_state_changed_by, taken_as_it_is
from revsolve.core.restarts import Restarts
from revsolve.core.stepper import Stepper
from revsolve.core.tape import Term, leaf_of
from revsolve.field.discover import (
    Audit,
    Constant,
    depend_on_each_other,
    held_modules,
    held_tensors,
    refusing_sharded_calls,
    traced,
)
from revsolve.field.free_tensors import by_rule
from revsolve.field.functorch import dual_numbers, transformed
from revsolve.prepare.options import check_choice

GRADIENTS = ("reversible", "checkpoint", "direct")
NOT_CAPTURED = "a CUDA graph cannot capture this solve, because its field {}: {}."
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
    explain: Callable[[float, Tensor], str] | None = None,
    pair_dtype: torch.dtype | None = None,
    anchor_every: Callable[[], int] | None = None,
    rounding: float | None = None,
    remedy: str | None = None,
) -> Problem:
    """Everything the engine needs, found by a first call of the term over `span`.

    Args:
        explain: the message where the state stops being finite, from a time and a state.
        pair_dtype: the dtype of the pair, where it is wider than that of x0.
        anchor_every: gives the steps between stored pairs; asked only where steps will be undone, as are the next two.
        rounding: that of the field, where it is coarser than the state's.
        remedy: advice where undoing the steps is too inaccurate.
    """
    wide = None if pair_dtype == x0.dtype else pair_dtype
    x = x0 if wide is None else x0.to(wide)
    problem = _traced(term, x, t, span, owners, scheme, make_stepper, gradient, restarts)
    given: dict[str, Any] = {"explain": explain}
    if wide is not None:
        given |= {"narrow": x0.dtype, "wide": wide}
    if problem.gradient == "reversible":
        every = None if anchor_every is None else anchor_every()
        given |= {"anchor_every": every, "rounding": rounding, "remedy": remedy}
    return replace(problem, **{name: value for name, value in given.items() if value is not None})


def _traced(
    term: Term,
    x0: Tensor,
    t: Tensor | None,
    span: tuple[float, float],
    owners: Sequence[Any],
    scheme: Scheme,
    make_stepper: Callable[[], Stepper],
    gradient: str | None,
    restarts: Any,
) -> Problem:
    """Call the term once over `span`, twice where it takes results from outside that nobody holds, and gather what the engine
    needs.

    `owners` are the callables and objects whose tensors the term may use; tensors that they hold without being found by the
    traced call get zero gradients if they stay unused.
    """
    chosen, gradient = gradient, _gradient(gradient, scheme)
    if not scheme.reversible and restarts not in ("auto", None):
        raise ValueError(
            f"restarts={restarts!r} has no meaning for {scheme.name!r}, whose steps are not undone: leave it out."
        )
    restarts = check_restarts(restarts)
    if capturing():
        restarts = _blind(restarts)
    if values_hidden():
        problem = by_rule(term, x0, span, owners, scheme, make_stepper, gradient, restarts)
        if problem is None:
            _refuse_all_but_direct(chosen)
        return problem or Problem(
            scheme, term, make_stepper, "direct", _blind(restarts), Stats(), values_hidden=True, tangents=dual_numbers()
        )
    if dual_numbers():
        _refuse_all_but_direct(chosen)
        gradient, restarts = "direct", _blind(restarts)  # looking at values would cut them off from their tangents
    values: list[Any] = []

    def call() -> Tensor:
        values[:] = [term.value(span[0], leaf)]
        return term.product(values[0], term.control(span[0], *span))[0]

    torch.clear_autocast_cache()  # before torch 2.13 it may hold casts of parameters made under no_grad
    held = list(held_tensors(list(owners), depth=4))
    leaf = leaf_of(x0)
    buffers = Buffers(held_modules(list(owners), depth=4))
    if capturing() and buffers.kept:
        raise ValueError(NOT_CAPTURED.format("belongs to a module in training mode with buffers", "call .eval() on it"))
    replays = gradient != "direct" and torch.is_grad_enabled()
    with refusing_sharded_calls() if replays else nullcontext():
        (tensors, constants), noisy = random_state_changed_by(lambda: traced(call, held, (leaf,), buffers), x0.device)
    if capturing() and noisy:
        raise ValueError(NOT_CAPTURED.format("draws random numbers", "draw them outside and pass them through args="))
    buffers.keep_changed()
    repeatable, lent = _repeatable(term, noisy, buffers, span, x0)
    stand_in = depend_on_each_other(tensors) or any(map(has_hooks, tensors))
    wanted = any(x.requires_grad for x in (x0, *tensors)) or t is not None
    value = values[0].detach() if isinstance(values[0], Tensor) else tree_map_only(Tensor, Tensor.detach, values[0])
    return Problem(
        scheme=scheme,
        term=repeatable if wanted or not torch.is_grad_enabled() else Constant(repeatable),
        make_stepper=make_stepper,
        gradient=gradient,
        restarts=restarts,
        stats=Stats(),
        tensors=tuple(tensors),
        audit=Audit([x for x in tensors if not stand_in or taken_as_it_is(x)]),
        stand_in=stand_in,
        constants=tuple(x for x in constants if not buffers.holds(x)),
        buffers=lent,
        first_value=(span[0], value) if repeatable is term and lent is None and not dual_numbers() else None,
        tangents=dual_numbers(),
    )


def by_programs(
    problem: Problem, given: Any, x0: Tensor, moving: Tensor | None = None, source: Source | None = None
) -> None:
    """Let the problem be solved by programs, as `compile=` says. `source` is what drives the term, such as noise."""
    from revsolve.backends.inductor.sweeps import compiled  # importing what compiles takes longer than many solves

    if isinstance(problem.term, Constant):  # programs know what their fields take
        problem.term = problem.term.term
    compiled(problem, given, x0, moving, source)


def _repeatable(
    term: Term, noisy: bool, buffers: Buffers, span: tuple[float, float], x0: Tensor
) -> tuple[Term, Buffers | None]:
    """A term whose values are the same when asked again, after a first call; and the buffers that it changes all the same."""
    if noisy:
        seed = int(torch.randint(2**62, (), device="cpu"))
        term = Noisy(term, seed, [x0.device] if x0.device.type == "cuda" else [])
    if buffers.kept and _depends_on(buffers, term, span, x0):
        return Frozen(term, buffers), None  # the first call was the one that changes the state
    buffers.restore()
    return term, buffers if buffers.kept else None


def _depends_on(buffers: Buffers, term: Term, span: tuple[float, float], x: Tensor) -> bool:
    """Whether the term's value is another one once a call has changed the buffers."""

    def call() -> Tensor:
        k, scale = term.product(term.value(span[0], x.detach()), term.control(span[0], *span))
        return k * scale

    with torch.no_grad(), buffers:
        first, second = (random_state_changed_by(call, x.device)[0] for _ in range(2))
    return not torch.equal(first, second)


def values_hidden() -> bool:
    """Whether numbers cannot be read from tensors now: inside torch.func transforms, and while torch.compile traces."""
    return torch.compiler.is_compiling() or transformed()


def _gradient(gradient: str | None, scheme: Scheme) -> str:
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


def _blind(restarts: Restarts | None) -> Restarts | None:
    """Restarts that do not look at values: at a fixed interval."""
    if restarts is None or restarts.interval is not None:
        return restarts
    return Restarts(interval=restarts.longest or BLIND_INTERVAL)


def check_restarts(restarts: Any) -> Restarts | None:
    """'auto', a number of steps, a `Restarts`, or None for none."""
    if restarts is None or isinstance(restarts, Restarts):
        return restarts
    if restarts == "auto":
        return Restarts()
    if isinstance(restarts, int) and not isinstance(restarts, bool):
        return Restarts(interval=restarts)
    raise ValueError(f"restarts must be 'auto', a number of steps, a Restarts(...) or None, but it is {restarts!r}.")
