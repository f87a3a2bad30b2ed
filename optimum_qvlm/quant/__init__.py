"""Integer grids for weights and activations: specifications, rounding, packing."""
