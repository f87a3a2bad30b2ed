"""Modules that stand in for `torch.nn.Linear` at run time."""
