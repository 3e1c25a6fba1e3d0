"""Solves inside torch.func: which transforms are active, and rules by which a solve goes through them."""
