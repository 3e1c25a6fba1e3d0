"""Schemes: Butcher tableaus as data, and the coupling updates that make them reversible."""
