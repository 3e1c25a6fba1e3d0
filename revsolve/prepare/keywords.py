"""Keywords that other packages have where a door has none: each has an answer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from revsolve.prepare.options import ADAPTIVE_OPTIONS, FIXED_OPTIONS, SCHEME_OPTIONS

Door = TypeVar("Door", bound=Callable[..., Any])

_ONE_GRADIENT = "leave it out, the gradient is that of the steps themselves, and gradient= chooses how it is computed"
_IN_OPTIONS = (
    *FIXED_OPTIONS,
    *ADAPTIVE_OPTIONS,
    *SCHEME_OPTIONS,
    "checkpoint_every",
    "dense",
    "steps_of_each",
    "event_direction",
)
ELSEWHERE = {
    **{name: f"write options={{{name!r}: ...}}" for name in _IN_OPTIONS},
    "max_steps": "write options={'max_num_steps': ...}",
    "adjoint_params": "leave it out, every tensor that the field touches has its gradient",
    **{f"adjoint_{name}": _ONE_GRADIENT for name in ("method", "options", "rtol", "atol", "adaptive")},
    "adjoint": "leave it out, or write gradient='direct' for plain automatic differentiation",
    "backend": "leave it out, there is only one",
    "dt": "write options={'step_size': ...}",
    "dt0": "write options={'first_step': ...}, or 'step_size' for fixed steps",
    "solver": "write method=...",
    "dense_output": "write options={'dense': True} and full_output=True",
    "events": "write event_fn=...",
    **dict.fromkeys(
        ("t_eval", "t_span", "saveat", "t0", "t1"),
        "write the times at which the state is wanted as the argument of times",
    ),
}

OF_SDES = {
    **dict.fromkeys(("step_size", "first_step", "dt0"), "write dt=..."),
    "min_step": "write dt_min=...",
    "dense": "leave it out, no polynomial follows a Brownian path: ask for more times",
    "dense_output": "leave it out, no polynomial follows a Brownian path: ask for more times",
}


def explains_keywords(door: Door) -> Door:
    """A door that says what to write instead of the keywords of other packages; None for one of these is not given."""
    known = inspect.signature(door).parameters
    told = ELSEWHERE | OF_SDES if "dt" in known else ELSEWHERE
    unknown = told.keys() - known.keys()

    @functools.wraps(door)
    def checked(*args: Any, **keywords: Any) -> Any:
        for name in unknown.intersection(keywords) if keywords else ():
            if keywords.pop(name) is not None:
                raise TypeError(f"{door.__name__} has no keyword {name!r}: {told[name]}.")
        return door(*args, **keywords)

    return checked  # type: ignore[return-value]
