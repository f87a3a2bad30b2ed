"""Quantized models in vLLM, by our own operations. Nothing here imports vLLM before vLLM asks for it."""
