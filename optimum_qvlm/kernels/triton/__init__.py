"""Backends for GPUs: the Triton kernels, their launchers and launch shapes."""
