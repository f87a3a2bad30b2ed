"""The search for rounding functions. Knows tensors and callables, nothing of any model library."""
