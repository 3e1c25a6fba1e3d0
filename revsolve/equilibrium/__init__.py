"""Deep equilibria: `fixed_point`, whose term is the value of f itself, and `RevDEQ`, a module around it."""

from revsolve.equilibrium.convergence import ConvergenceWarning
from revsolve.equilibrium.module import RevDEQ
from revsolve.equilibrium.solve import FixedPoint, fixed_point

__all__ = ["ConvergenceWarning", "FixedPoint", "RevDEQ", "fixed_point"]
