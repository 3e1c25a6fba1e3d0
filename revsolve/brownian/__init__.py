"""Brownian motion as a pure function of seed and place."""
