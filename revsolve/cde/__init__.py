"""Neural CDEs: `cdeint`, whose term is f dX."""

from revsolve.cde.integrate import cdeint

__all__ = ["cdeint"]
