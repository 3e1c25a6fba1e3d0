"""Deep equilibria: `fixed_point`, whose term is the value of f itself, and `RevDEQ`, a module around it."""

from revsolve.fixed_point.convergence import ConvergenceWarning
from revsolve.fixed_point.loop import RevLoop, reversible_loop
from revsolve.fixed_point.module import RevDEQ
from revsolve.fixed_point.solve import FixedPoint, fixed_point

__all__ = ["ConvergenceWarning", "FixedPoint", "RevDEQ", "RevLoop", "fixed_point", "reversible_loop"]
