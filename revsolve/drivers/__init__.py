"""What drives an equation: control paths X(t) of CDEs and the Brownian motion W(t) of SDEs."""
