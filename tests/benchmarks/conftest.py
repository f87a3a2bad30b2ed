"""Benchmarks are scripts beside the package, which import each other by their bare names."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in ("benchmarks", "examples/tiny_vlm"):
    sys.path.insert(0, str(ROOT / folder))
