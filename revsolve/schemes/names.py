"""Names of schemes: strings are shorthand for the frozen objects of `revsolve.schemes.reversible`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from functools import partial

from revsolve.core.coupling import Scheme
from revsolve.schemes.composition import FIVE_STAGES, KAHAN_LI6, SUZUKI4, THREE_STAGES, YOSHIDA4
from revsolve.schemes.reversible import alf, leapfrog, plain, reversible, reversible_heun
from revsolve.schemes.tableau import TABLEAUS, Tableau

METHODS: dict[str, Callable[[], Scheme]] = {
    **{name: partial(plain, tableau) for name, tableau in TABLEAUS.items()},
    **{f"rev_{name}": partial(reversible, tableau) for name, tableau in TABLEAUS.items()},
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
MADE: dict[str, Scheme] = {}  # torch.compile knows no functools.cache

_NO_MULTISTEP = (
    "there are no Adams or other multistep methods here, implicit ones neither, take 'rev_dopri5' or 'dopri5'"
)
_OF_SDES = "it is a method for SDEs, see sdeint, for ODEs take 'rev_dopri5' or 'reversible_heun'"
ELSEWHERE = {  # names that methods have in other packages
    "adaptive_heun": "that pair of tableaus is called 'heun_euler' here, or 'rev_heun_euler' as a reversible method",
    "fehlberg2": "take 'heun_euler' or 'bosh3', pairs of orders 2 and 3, or 'fehlberg45'",
    "dopri853": "that method is called 'dop853' here, or 'rev_dop853' as a reversible method",
    **dict.fromkeys(("adams", "explicit_adams", "implicit_adams", "fixed_adams"), _NO_MULTISTEP),
    "scipy_solver": "there are no solvers of scipy here, take 'dopri5' for its RK45, 'bosh3' for RK23, 'dop853' for DOP853",
    "rk45": "that method is called 'dopri5' here",
    "rk23": "that method is called 'bosh3' here",
    **dict.fromkeys(
        ("lsoda", "bdf", "radau", "implicit_euler", "trapezoid", "kvaerno5"),
        "all methods here are explicit, there are no methods for stiff equations: see docs: Stiff problems, and 'rev_dopri8' "
        "where a few hundred steps do not matter",
    ),
    **dict.fromkeys(("srk", "milstein", "euler_heun", "log_ode"), _OF_SDES),
}


def did_you_mean(name: str, known: Collection[str], cutoff: float = 0.6, twins: Sequence[str] = ()) -> str:
    """The end of a message about an unknown name: the known one that is closest to it, or a twin and two close ones."""
    close = [*(x for x in twins if x in known), *get_close_matches(name, known, n=2 if twins else 1, cutoff=cutoff)]
    return f": did you mean {' or '.join(map(repr, dict.fromkeys(close)))}?" if close else "."


def method_names() -> list[str]:
    """All names that `method=` takes: every tableau, its reversible twin, and the natively reversible methods."""
    return [*METHODS]


def scheme(method: str | Tableau | Scheme, coupling: float | None = None, eta: float | None = None) -> Scheme:
    """The scheme that `method` means; a bare Tableau means its plain method. Raises ValueError for an unknown name."""
    if isinstance(method, str):
        name, pair = method.removeprefix("rev_"), method.startswith("rev_")
        if coupling is not None and pair and name in TABLEAUS:
            return reversible(TABLEAUS[name], coupling)
        if eta is not None and method == "alf":
            return alf(eta)
    for parameter, value, owner in (("coupling", coupling, "rev_ methods given by name"), ("eta", eta, "alf")):
        if value is not None:
            raise ValueError(
                f"{parameter}={value!r} is a parameter of {owner}, and has no meaning for method={method!r}."
            )
    if isinstance(method, Scheme):
        return method
    if isinstance(method, Tableau):
        return plain(method)
    if not isinstance(method, str):
        raise TypeError(f"method must be a name, a Tableau or a Scheme, but it is {method!r}.")
    if method in METHODS:
        if method not in MADE:
            MADE[method] = METHODS[method]()
        return MADE[method]
    twins = [method.lower().replace("reversible", "rev"), method.lower().replace("rev_", "reversible_")]
    hint = (
        f": {ELSEWHERE[name.lower()]}."
        if name.lower() in ELSEWHERE
        else did_you_mean(method.lower(), METHODS, twins=twins)
    )
    raise ValueError(f"unknown method {method!r}{hint} Known methods: see revsolve.method_names().")
