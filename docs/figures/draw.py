"""Draws every figure of the documentation anew: `python docs/figures/draw.py`."""

import bouncing_ball
import diagrams
import measured
import plots
import restarts
import states_stored

if __name__ == "__main__":
    plots.stability_regions()
    plots.parasitic_growth()
    plots.reconstruction()
    measured.horizon()
    measured.work_precision()
    measured.width()
    measured.memory()
    restarts.restarts()
    states_stored.states_stored()
    bouncing_ball.bouncing_ball()
    diagrams.layers()
