"""Objects of other packages: Brownian motion of torchsde, paths of torchcde."""
