"""The methods of `sdeint`: which of them converge to the solution of an SDE, and to which one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from revsolve.core.coupling import Scheme
from revsolve.prepare.options import ADAPTIVE_OPTIONS, TARGETS, SolverOptions, check_options
from revsolve.restarts.growth import Restarts
from revsolve.schemes.names import did_you_mean
from revsolve.schemes.names import scheme as named_scheme
from revsolve.schemes.stochastic import STOCHASTIC, stochastic
from revsolve.schemes.tableau import TABLEAUS, Tableau
from revsolve.sde.coefficients import Coefficients

ALIASES = {"heun": "heun2", "rev_heun": "rev_heun2"}  # torchsde's name
ELSEWHERE = {
    "srk": "'rev_shark' (additive noise) and 'rev_slowrk' have its strong order, 1.5",
    "milstein": "'reversible_heun' and 'rev_heun2' have its strong order, 1, without derivatives of g",
    "euler_heun": "'reversible_heun' and 'heun2' have its strong order or more",
    "log_ode": "the methods here have strong order 1/2 for noise that does not commute: take 'reversible_heun'",
}

ARGUMENTS = {"first_step": "dt", "step_size": "dt", "min_step": "dt_min"}  # what these options are called here
LONGER = 1 / 16  # so much longer, relative to dt, fixed steps may be
KNOWN = (*(name for name in ADAPTIVE_OPTIONS if name not in ARGUMENTS), *TARGETS, *ARGUMENTS, "coupling", "dense")


def sde_method_names() -> list[str]:
    """All names that `sdeint` takes for `method`; see `revsolve/sde/methods.py` and docs/architecture.md for their orders."""
    runge_kutta = [*TABLEAUS, *STOCHASTIC]
    return ["reversible_heun", *runge_kutta, *(f"rev_{name}" for name in runge_kutta)]


def sde_scheme(method: str | Tableau | Scheme | None, noise_type: str, sde_type: str, coupling: float | None) -> Scheme:
    """The scheme that `method` means. Raises ValueError where it does not converge to the solution of such an SDE."""
    found = _named(ALIASES.get(method, method) if isinstance(method, str) else method or "reversible_heun", coupling)
    _check_convergence(found, noise_type, sde_type)
    # In one step from a restart, y and z drift apart by the method's local error. Over the straight line that stands for
    # dW that is of order (p + 1) in dW, or (p + 1)/2 in h; only ratios of unequal steps depend on the number.
    defect_order = 1 if found.name == "reversible_heun" else max(1, (found.order + 1) // 2)
    return replace(found, defect_order=defect_order, error_order=None if found.error_order is None else 1)


def read_sde_options(
    method: str | Tableau | Scheme | None,
    parts: Coefficients,
    options: Mapping[str, Any] | None,
    steps: float | dict[str, Any],
    restarts: Any,
    **keywords: Any,
) -> SolverOptions:
    """What `method`, `options` and the other keywords say; `steps` are the length of fixed ones, or keywords of adaptive ones."""
    given, adaptive = dict(options or {}), isinstance(steps, dict)
    scheme = sde_scheme(method, parts.noise_type, parts.sde_type, given.pop("coupling", None))
    given = check_options(given, KNOWN, scheme.name)
    for name in given:
        if name == "dense":
            raise ValueError(
                "a Brownian path has no slope that a polynomial could follow between the steps, so sdeint has no dense output: "
                "ask for more times ts, or solve again over the same BrownianPath."
            )
        if name in ARGUMENTS:
            raise ValueError(f"option {name!r} is the argument {ARGUMENTS[name]} of sdeint.")
        if not adaptive:
            raise ValueError(f"option {name!r} is for adaptive steps, but these are fixed: pass adaptive=True.")
    if adaptive and scheme.error_order is None:
        raise ValueError(
            f"{scheme.name!r} has no error estimate to adapt steps by: use 'reversible_heun', 'rev_heun_euler', 'rev_slowrk' "
            "or another embedded method."
        )
    restarts = default_restarts(scheme) if scheme.reversible and restarts == "auto" else restarts
    keywords |= steps if isinstance(steps, dict) else {"step_size": steps, "longer": LONGER}
    return SolverOptions(scheme, restarts=restarts, given=frozenset(given), **keywords, **given)


def default_restarts(scheme: Scheme) -> Restarts:
    """Restarts that keep the error of a dissipative SDE within twice that of the plain method, as measured on
    Ornstein-Uhlenbeck and neural SDEs in both dtypes (tests/test_sde_stability.py).

    What the first step leaves between y and z is of the order of the error for reversible Heun, and the smaller the higher
    the order for pairs, so that it may grow further before it is seen. It is random, too: a stricter limit fires at will.
    """
    growth = 0.75 if scheme.name == "reversible_heun" else 0.75 if scheme.order == 2 else 2.0
    return Restarts(growth=growth, adds_up=True)


def _named(method: str | Tableau | Scheme, coupling: float | None) -> Scheme:
    if isinstance(method, str):
        name = method.removeprefix("rev_")
        if name in ELSEWHERE:
            raise ValueError(f"method {method!r} does not exist here: {ELSEWHERE[name]}.")
        if name in STOCHASTIC and coupling is None:
            return stochastic(STOCHASTIC[name], pair=method != name)
        if not method.startswith(("alf", "leapfrog", "reversible_heun")) and method not in (
            known := sde_method_names()
        ):
            hint = did_you_mean(method, known)
            raise ValueError(
                f"unknown method {method!r} of sdeint{hint} Known methods: see revsolve.sde_method_names()."
            )
    return named_scheme(method, coupling)


def _check_convergence(scheme: Scheme, noise_type: str, sde_type: str) -> None:
    """Refuse what does not converge to the solution; velocities and compositions need a path that can be differentiated."""
    name = scheme.name
    for update in scheme.updates:
        if update.rate:
            raise ValueError(
                f"{name!r} keeps a velocity, and Brownian motion has none: use 'reversible_heun', which costs the same."
            )
        if not {update.start, update.end} <= {0.0, 1.0}:
            raise ValueError(
                f"{name!r} composes substeps to raise the order for smooth drivers, which Brownian motion is not: use "
                "'reversible_heun', or 'rev_slowrk' for strong order 1.5."
            )
    tableau = STOCHASTIC.get(name.removeprefix("rev_"))
    if tableau is not None and tableau.additive and noise_type != "additive":
        raise ValueError(f"{name!r} is for additive noise, but noise_type is {noise_type!r}: use 'rev_slowrk'.")
    if scheme.order > 1 or noise_type == "additive":
        return
    if scheme.reversible:
        raise ValueError(
            f"{name!r} is inconsistent for {noise_type} noise: Euler steps converge in the sense of Ito, but forward and "
            "backward ones differ by the Ito correction, so that y and z would drift apart. Use 'rev_heun2'."
        )
    if sde_type != "ito":
        raise ValueError(
            f"{name!r} converges to the Ito solution, but sde_type is 'stratonovich' with {noise_type} noise: use 'heun2' or "
            "'reversible_heun'."
        )
