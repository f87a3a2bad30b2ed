"""The optimisation of tower and projector by gradients (equations 8 to 10 of the paper)."""
