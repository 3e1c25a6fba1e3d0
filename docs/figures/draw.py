"""Draws every figure of the documentation anew: `python docs/figures/draw.py`."""

import diagrams
import plots

if __name__ == "__main__":
    plots.stability_regions()
    plots.parasitic_growth()
    plots.reconstruction()
    plots.memory_and_stability()
    diagrams.layers()
    diagrams.choice()
