"""What the library's figures come from: speed, quality, and whether the method does what it claims.

Run them from the root of a clone, as in `python -m benchmarks.speed.kernels --help`.
"""
