"""Neural SDEs: `sdeint`, whose term is f h + g . dW."""

from revsolve.sde.coefficients import SDE
from revsolve.sde.integrate import sdeint
from revsolve.sde.methods import sde_method_names

__all__ = ["SDE", "sde_method_names", "sdeint"]
