"""Backends that run the loops of the engine in another way than eagerly."""
