"""Steppers beside the fixed grid of the engine."""
