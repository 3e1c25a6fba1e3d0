"""Deep equilibria: `fixed_point`, whose term is the value of f itself, and `RevDEQ`, a module around it."""

from revsolve.fixed_points.convergence import ConvergenceWarning
from revsolve.fixed_points.loop import reversible_loop
from revsolve.fixed_points.module import RevDEQ, RevLoop
from revsolve.fixed_points.solve import FixedPoint, fixed_point

__all__ = ["ConvergenceWarning", "FixedPoint", "RevDEQ", "RevLoop", "fixed_point", "reversible_loop"]
