"""Names of schemes: strings are shorthand for the frozen objects of `revsolve.schemes.reversible`."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from revsolve.core.coupling import Scheme
from revsolve.schemes.composition import FIVE_STAGES, KAHAN_LI6, SUZUKI4, THREE_STAGES, YOSHIDA4
from revsolve.schemes.reversible import alf, leapfrog, plain, reversible, reversible_heun
from revsolve.schemes.tableau import TABLEAUS, Tableau

NATIVE: dict[str, Callable[[], Scheme]] = {
    "reversible_heun": reversible_heun,
    "reversible_heun4": lambda: reversible_heun(SUZUKI4, order=4),
    "reversible_heun4_yoshida": lambda: reversible_heun(YOSHIDA4, order=4),
    "reversible_heun4_s3": lambda: reversible_heun(THREE_STAGES, order=4),
    "reversible_heun4_s5": lambda: reversible_heun(FIVE_STAGES, order=4),
    "reversible_heun6": lambda: reversible_heun(KAHAN_LI6, order=6),
    "alf": alf,
    "alf4": lambda: alf(1.0, SUZUKI4, order=4),
    "alf4_yoshida": lambda: alf(1.0, YOSHIDA4, order=4),
    "alf4_s3": lambda: alf(1.0, THREE_STAGES, order=4),
    "alf4_s5": lambda: alf(1.0, FIVE_STAGES, order=4),
    "alf6": lambda: alf(1.0, KAHAN_LI6, order=6),
    "leapfrog": leapfrog,
}


def method_names() -> list[str]:
    """All names that `method=` takes: every tableau, its reversible twin, and the natively reversible methods."""
    return [*TABLEAUS, *(f"rev_{name}" for name in TABLEAUS), *NATIVE]


def scheme(method: str | Tableau | Scheme, coupling: float | None = None, eta: float | None = None) -> Scheme:
    """The scheme that `method` means; a bare Tableau means its plain method. Raises ValueError for an unknown name."""
    if isinstance(method, str):
        name, pair = method.removeprefix("rev_"), method.startswith("rev_")
        if coupling is not None and pair and name in TABLEAUS:
            return reversible(TABLEAUS[name], coupling)
        if eta is not None and method == "alf":
            return alf(eta)
    _refuse_parameter("coupling", coupling, method, "rev_ methods given by name")
    _refuse_parameter("eta", eta, method, "alf")
    if isinstance(method, Scheme):
        return method
    if isinstance(method, Tableau):
        return plain(method)
    if not isinstance(method, str):
        raise TypeError(f"method must be a name, a Tableau or a Scheme, but it is {method!r}.")
    if method in NATIVE or name in TABLEAUS:
        return _named(method)
    close = difflib.get_close_matches(method, method_names(), n=1, cutoff=0.0)
    raise ValueError(
        f"unknown method {method!r}: did you mean {close[0]!r}? Known methods: {', '.join(method_names())}."
    )


MADE: dict[str, Scheme] = {}  # torch.compile knows no functools.cache


def _named(method: str) -> Scheme:
    if method not in MADE:
        tableau = TABLEAUS.get(method.removeprefix("rev_"))
        if tableau is None:
            MADE[method] = NATIVE[method]()
        else:
            MADE[method] = plain(tableau) if method in TABLEAUS else reversible(tableau)
    return MADE[method]


def _refuse_parameter(name: str, value: float | None, method: object, owner: str) -> None:
    if value is not None:
        raise ValueError(f"{name}={value!r} is a parameter of {owner}, and has no meaning for method={method!r}.")
