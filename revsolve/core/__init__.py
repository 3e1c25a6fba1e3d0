"""The engine room: coupling updates, steppers, restarts, and the one place where gradients are computed."""
