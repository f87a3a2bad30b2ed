"""Quantized models in formats of other programs."""
