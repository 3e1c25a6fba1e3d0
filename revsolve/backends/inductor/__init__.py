"""Compiled solves: the sweeps of the engine as machine code. Nothing in `core` knows of them."""
