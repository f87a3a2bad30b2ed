"""Backends for CPUs, over operators that PyTorch carries."""
