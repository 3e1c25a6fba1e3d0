"""From what a user hands over to what the engine takes: packed states, times, options, grids of steps."""
