"""What a door is told of the way to solve, read once: the method, its options, tolerances and keywords."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from revsolve.core.coupling import Scheme
from revsolve.prepare.diagnosis import wrong_calls
from revsolve.prepare.state import Packing
from revsolve.schemes.names import did_you_mean
from revsolve.schemes.names import scheme as named_scheme
from revsolve.schemes.tableau import Tableau

Tolerance = float | Tensor | None
Door = TypeVar("Door", bound=Callable[..., Any])

SCHEME_OPTIONS = ("coupling", "eta")
FIXED_OPTIONS = ("step_size", "grid_constructor")
TARGETS = ("step_t", "jump_t")  # where steps end, whether they are fixed or adaptive
FROM_T = "; its sign follows from t"
# Options by the names of torchdiffeq: what they must be, and why.
LIMITS: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "first_step": ("be a positive number", lambda x: 0 < x < math.inf, FROM_T),
    "safety": ("lie in (0, 1]", lambda x: 0 < x <= 1, ""),
    "ifactor": ("be at least 1", lambda x: x >= 1, ""),
    "dfactor": ("lie in (0, 1)", lambda x: 0 < x < 1, ""),
    "min_step": ("be finite and not negative", lambda x: 0 <= x < math.inf, ""),
    "max_step": ("be positive", lambda x: x > 0, ""),
    "max_num_steps": ("be a whole number of at least 1", lambda x: x >= 1 and x % 1 == 0, ""),
    "step_size": ("be a positive number", lambda x: 0 < x < math.inf, FROM_T),
    "checkpoint_every": ("be a whole number of at least 1", lambda x: x >= 1 and x % 1 == 0, ""),
}
ADAPTIVE_OPTIONS = (*(name for name in LIMITS if name not in ("step_size", "checkpoint_every")), "norm")
EXPLAINED = {  # names that options have elsewhere
    "restart": "pass the keyword restarts=, a number of steps say",
    "perturb": "leave it out, jump_t alone says where a step sees one side of the field",
    "dtype": "leave it out, times are kept in double precision, and the field sees them in the dtype of y0",
    "grad_free": "leave it out, no method takes derivatives of g by itself",
    "interp": "leave it out, fixed steps land on the output times; dense=True interpolates between any steps",
    "solver": "choose by method=; there are no solvers of scipy",
    "max_steps": "write 'max_num_steps'",
    "seminorm": "leave it out, no adjoint equation is solved; 'norm' measures the error of the state",
    "max_order": "leave it out, there are no Adams methods",
    "max_iters": "leave it out, there are no implicit methods",
}

# Keywords that other packages have where a door has none: each has an answer.
_ONE_GRADIENT = "leave it out, the gradient is that of the steps themselves, and gradient= chooses how it is computed"
_IN_OPTIONS = (
    *FIXED_OPTIONS,
    *ADAPTIVE_OPTIONS,
    *TARGETS,
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
    **dict.fromkeys(("seed", "generator", "entropy"), "pass bm=BrownianPath(t0, t1, size, seed=...)"),
    "dense": "leave it out, no polynomial follows a Brownian path: ask for more times",
    "dense_output": "leave it out, no polynomial follows a Brownian path: ask for more times",
}


@dataclass(frozen=True)
class SolverOptions:
    """How to solve; options have their public names. `adaptive`: whether steps follow the error."""

    scheme: Scheme
    rtol: Tolerance = None
    atol: Tolerance = None
    gradient: str | None = None
    restarts: Any = "auto"
    progress: bool = False
    callback: Callable[[Any], Any] | None = None
    compile: Any = False
    step_size: float | None = None
    grid_constructor: Callable[..., Any] | None = None
    first_step: float | None = None
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int | None = None
    step_t: Sequence[float] = ()
    jump_t: Sequence[float] = ()
    norm: Callable[[Tensor], Tensor] | None = None
    checkpoint_every: int | None = None
    dense: bool = False
    steps_of_each: bool = False
    event_direction: Any = 0
    form: str | None = None  # of the steps of a controlled equation
    longer: float = 0.0  # than step_size, relative to it, fixed steps may be: see `fixed_grid`
    given: frozenset[str] = frozenset()  # the names of the options that were given
    tolerances_given: bool = field(init=False)
    adaptive: bool = field(init=False)

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that are no such steps."""
        for name in LIMITS.keys() & self.given:
            (wanted, holds, why), value = LIMITS[name], getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
                raise ValueError(f"{name} must {wanted}, but it is {value!r:.80}{why}.")
        for name in self.given.intersection(TARGETS):
            object.__setattr__(self, name, _times(name, getattr(self, name)))
        if self.min_step > self.max_step:
            raise ValueError(f"min_step = {self.min_step} is larger than max_step = {self.max_step}.")
        if self.step_size is not None and self.grid_constructor is not None:
            raise ValueError("step_size and grid_constructor exclude each other: give one of them.")
        fixed = self.step_size is not None or self.grid_constructor is not None or self.scheme.error_order is None
        object.__setattr__(self, "tolerances_given", self.rtol is not None or self.atol is not None)
        object.__setattr__(self, "adaptive", not fixed and (self.scheme.adaptive or self.tolerances_given))

    def for_state(self, packing: Packing) -> SolverOptions:
        """These options for the packed state: tolerances and a norm are given for the parts of the user's."""
        if packing.lone and not isinstance(self.rtol, (list, tuple)) and not isinstance(self.atol, (list, tuple)):
            return self
        norm = self.norm
        of_parts = norm if norm is None or packing.lone else lambda x: norm(packing.unpack(x))
        rtol, atol = packing.spread(self.rtol, "rtol"), packing.spread(self.atol, "atol")
        return replace(self, rtol=rtol, atol=atol, norm=of_parts)


def read_options(
    method: str | Tableau | Scheme, options: Mapping[str, Any] | None, extra: Sequence[str] = (), **keywords: Any
) -> SolverOptions:
    """What `method`, `options` and the other keywords of a door say; `extra` options are known besides the usual.

    Methods with an embedded estimate adapt their steps unless the options fix them, the natively reversible ones only when a
    tolerance is given.
    """
    told = options or {}
    if not isinstance(told, Mapping):
        raise TypeError(f"options must be a dict, such as {{'step_size': 0.1}}, but it is {told!r:.80}.")
    scheme = named_scheme(method, *map(_number, map(told.get, SCHEME_OPTIONS)))
    fixed = scheme.error_order is None or any(told.get(name) is not None for name in FIXED_OPTIONS)
    known = (
        *FIXED_OPTIONS,
        *(() if fixed else ADAPTIVE_OPTIONS),
        *TARGETS,
        *scheme.parameters,
        "checkpoint_every",
        *extra,
    )
    given = check_options(told, known, scheme.name)
    for name in scheme.parameters:
        given.pop(name, None)
    return SolverOptions(scheme, given=frozenset(given), **keywords, **given)


def check_options(options: Mapping[str, Any] | None, known: Sequence[str], method: str) -> dict[str, Any]:
    """The options that are not None, numbers as those of Python. Raises ValueError for one that the method does not have."""
    given = {}
    for name, value in (options or {}).items():
        if value is None:
            continue
        if name in EXPLAINED:
            raise ValueError(f"option {name!r} does not exist here: {EXPLAINED[name]}.")
        if name not in known and name in ADAPTIVE_OPTIONS:
            raise ValueError(f"option {name!r} is for adaptive steps, but these are fixed ({method!r}).")
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"unknown option {name!r} for method {method!r}{hint} Options: {', '.join(known)}.")
        given[name] = _number(value)
    return given


def _times(name: str, given: Any) -> tuple[float, ...]:
    """One or several times as floats."""
    if isinstance(given, Tensor) and given.requires_grad:
        raise ValueError(f"{name} requires a gradient, which it does not have: pass {name}.detach().")
    try:
        times = tuple(map(float, [given] if isinstance(given, (int, float)) else given))
    except (TypeError, ValueError):
        times = (math.nan,)
    if not all(map(math.isfinite, times)):
        raise ValueError(f"{name} must be a time or several, finite numbers, but it is {given!r:.80}.")
    return times


def _number(value: Any) -> Any:
    """A number of another kind, a tensor without dimensions or one of numpy's, as that of Python; anything else as it is."""
    of_another_kind = (
        isinstance(value, (Tensor, np.generic)) and value.ndim == 0 and not getattr(value, "requires_grad", False)
    )
    return value.item() if of_another_kind else value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, but it is {value!r}.")


def explains_keywords(door: Door) -> Door:
    """A door that says what to write instead of the keywords of other packages, of which None is not given, and how a function
    is called where its signature does not allow that."""
    known = inspect.signature(door).parameters
    told = ELSEWHERE | OF_SDES if "dt" in known else ELSEWHERE if "t" in known else {}

    @functools.wraps(door)
    def checked(*args: Any, **keywords: Any) -> Any:
        for name in keywords.keys() - known:
            if name not in told:
                close = did_you_mean(name, known)
                raise TypeError(f"{door.__name__}() got an unexpected keyword argument {name!r}{close}")
            if keywords.pop(name) is not None:
                raise TypeError(f"{door.__name__} has no keyword {name!r}: {told[name]}.")
        try:
            return door(*args, **keywords)
        except TypeError as error:
            if hints := wrong_calls(door, args, keywords):
                raise TypeError(f"{error}. {hints}") from error
            raise

    return checked  # type: ignore[return-value]
