"""Why a solve failed, in words."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revsolve.core.tape import Term
from revsolve.steppers.adaptive import Adaptive, rate


def explain_step(term: Term | None) -> Callable[..., str]:
    """Why adaptive stepping cannot go on, in words; without a term, whose field is not asked."""

    def explain(kind: str, t0: float, stepper: Adaptive, pair: Any) -> str:
        lost = t0 if stepper.lost is None else stepper.lost
        found = None if term is None else _fault(term, (t0, lost), pair[0], stepper.direction)
        if found is not None:
            return found
        progress = (
            f"{stepper.num_steps} steps were accepted and {stepper.num_rejected} rejected, step size {stepper.h:.1e}"
        )
        if kind == "too many steps":
            return (
                f"max_num_steps = {stepper.control.max_num_steps} was reached at t = {t0}, before t = {stepper.targets[-1]} "
                f"({progress}): raise max_num_steps, or loosen rtol and atol; if that does not help, see docs: Stiff problems."
            )
        if kind == "shortest step":
            return (
                f"a step of min_step = {stepper.control.min_step} from t = {t0} has an error that is not finite ({progress}): "
                "lower min_step; if that does not help, see docs: Stiff problems."
            )
        return (
            f"the step size fell below rounding at t = {t0} ({progress}): the solution has a singularity there, or the field is "
            "discontinuous (give its times as options={'jump_t': ...}) or stiff; or the tolerances are too tight."
        )

    return explain


def explain_field(t: float, y: Tensor, value: Tensor) -> str:
    """That the field returned NaN or infinity, where, and for which size of state."""
    kind = "NaN" if bool(torch.isnan(value).any()) else "an infinite value"
    size = float(torch.linalg.vector_norm(y, ord=math.inf))
    return (
        f"the field returned {kind} at t = {t}, where the largest entry of the state is {size:.3g}: check the field there. "
        "If the state has grown large, the step may be too long: halve step_size or rtol (docs: Stiff problems)."
    )


def _fault(term: Term, times: Sequence[float], x: Tensor, direction: float) -> str | None:
    """In words, if the field is not finite at one of the times."""
    for t in times:
        with torch.no_grad():
            value = rate(term, t, x, direction)
        if not bool(torch.isfinite(value).all()):
            return explain_field(t, x, value)
    return None


TOO_LONG = "the step is too long for the method (take smaller ones), or the solution itself grows without bound."


def explain(term: Term, remedy: str, t: float, x: Tensor) -> str:
    """Why the state stopped being finite, in words."""
    with torch.no_grad():
        value, _ = term.product(term.value(t, x), term.control(t, t, t))
    if not bool(torch.isfinite(value).all()):
        return explain_field(t, x, value)
    size = float(torch.linalg.vector_norm(x, ord=math.inf))
    return f"the state stopped being finite in the step from t = {t}, where its largest entry is {size:.3g}: {remedy}"


def wrong_calls(door: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    """In words, which of the functions that a door was given cannot be called as the door does."""
    try:
        given = inspect.signature(door).bind(*args, **keywords).arguments
    except TypeError:
        return ""
    state, more = "z" if "z0" in given else "y", given.get("args", ())
    names = [f"args[{i}]" for i in range(len(more))] if isinstance(more, tuple) else ["args"]
    functions = {"f": (state,), "func": ("t", state), "g": ("t", state)}
    if isinstance(sde := given.get("sde"), tuple):
        given, functions["f"] = dict(zip("fg", sde, strict=False)), ("t", state)
    return " ".join(_mismatch(name, given.get(name), [*first, *names]) for name, first in functions.items()).strip()


def _mismatch(name: str, function: Any, given: list[str]) -> str:
    """In words, if a function cannot be called with these arguments."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # some callables have none
        return ""
    parameters = [p for p in signature.parameters.values() if p.name != "step"]  # which a fixed point gives where it is
    try:
        signature.replace(parameters=parameters).bind(*given)
    except TypeError:
        taken = [p.name for p in parameters if p.default is p.empty]
        missing = ", ".join(taken[len(given) :])
        remedy = f"pass args= for {missing}" if missing else "wrap it, as in lambda t, y: net(y)"
        return f"The solver calls {name}({', '.join(given)}), but the function takes ({', '.join(taken)}): {remedy}."
    return ""
