"""Reversible solvers for neural ODEs, CDEs, SDEs and fixed points: exact gradients in bounded memory."""

from revsolve.cde import cdeint
from revsolve.compiled.transcript import CompilationError
from revsolve.core.engine import ReconstructionWarning
from revsolve.core.march import Stats
from revsolve.core.restarts import Restarts
from revsolve.drivers.brownian import BrownianPath
from revsolve.drivers.control import HermitePath, LinearPath, NaturalCubicPath
from revsolve.drivers.log_ode import LogODEField
from revsolve.drivers.logsignature import LogSignaturePath, logsignature
from revsolve.equilibrium import ConvergenceWarning, FixedPoint, RevDEQ, fixed_point
from revsolve.ode import odeint, odeint_event
from revsolve.progress import AcceptedStep
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
    "sde_method_names",
    "sdeint",
]
__version__ = "0.1.0"
