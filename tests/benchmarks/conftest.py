"""The example that benchmarks share is scripts in a folder, which import each other by their bare names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny_vlm"))
