"""Reversible solvers for neural ODEs, CDEs, SDEs and fixed points: exact gradients in bounded memory."""

from revsolve.backends import CompilationError
from revsolve.brownian.path import BrownianPath
from revsolve.cde import cdeint
from revsolve.core.certificate import ReconstructionWarning
from revsolve.core.problem import Stats
from revsolve.divergence import with_divergence
from revsolve.extras.progress import AcceptedStep
from revsolve.fixed_points import ConvergenceWarning, FixedPoint, RevDEQ, RevLoop, fixed_point, reversible_loop
from revsolve.ode import odeint, odeint_event
from revsolve.paths.control import HermitePath, LinearPath, NaturalCubicPath
from revsolve.paths.log_ode import LogODEField
from revsolve.paths.logsignature import LogSignaturePath, logsignature
from revsolve.restarts.growth import Restarts
from revsolve.schemes.names import method_names
from revsolve.schemes.reversible import alf, leapfrog, plain, reversible, reversible_heun
from revsolve.schemes.tableau import Tableau
from revsolve.sde import SDE, sde_method_names, sdeint
from revsolve.solution import Solution

__all__ = [
    "SDE",
    "AcceptedStep",
    "BrownianPath",
    "CompilationError",
    "ConvergenceWarning",
    "FixedPoint",
    "HermitePath",
    "LinearPath",
    "LogODEField",
    "LogSignaturePath",
    "NaturalCubicPath",
    "ReconstructionWarning",
    "Restarts",
    "RevDEQ",
    "RevLoop",
    "Solution",
    "Stats",
    "Tableau",
    "alf",
    "cdeint",
    "fixed_point",
    "leapfrog",
    "logsignature",
    "method_names",
    "odeint",
    "odeint_event",
    "plain",
    "reversible",
    "reversible_heun",
    "reversible_loop",
    "sde_method_names",
    "sdeint",
    "with_divergence",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    if name in ("odeint_adjoint", "sdeint_adjoint"):
        door = name.removesuffix("_adjoint")
        raise ImportError(
            f"revsolve has no {name}, for {door} itself has exact gradients in bounded memory: write from revsolve import "
            f"{door}, and leave out adjoint_params and the like."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
