"""Growth of anonymous memory while a checkpoint is loaded, quantized against the same model in bf16.

Each load runs in a process of its own. Tensors that are left unquantized are in both and are subtracted.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from shapes import SHAPES, random_model

from optimum_qvlm import QVLMConfig
from optimum_qvlm.hf.checkpoint import quantized_modules

LOAD = """
import re, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
import optimum_qvlm.hf.quantizer
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
config = AutoConfig.from_pretrained(sys.argv[1])
auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
torch.set_num_threads(1)
torch.zeros(8, 8) @ torch.zeros(8, 8)
before = anonymous()
model = auto.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(anonymous() - before)
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random-init", choices=SHAPES, default="smollm2-360m")
    parser.add_argument("--scheme", default="w4a16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        plain, packed = Path(scratch) / "plain", Path(scratch) / "packed"
        model = random_model(arguments.random_init, None, torch.bfloat16, "cpu")
        model.save_pretrained(plain)
        config = QVLMConfig(arguments.scheme, method="rtn")
        model = type(model).from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(packed)
        weights = sum(2 * m.in_features * m.out_features for m in quantized_modules(model).values())
        full = sum(tensor.nbytes for tensor in type(model).from_pretrained(plain).parameters())
        del model
        left = full - weights
        dense, quantized = (grown(folder) for folder in (plain, packed))
    print(f"unquantized tensors {left / 1e6:.1f} MB")
    print(f"bf16 {dense / 1e6:.1f} MB, without them {(dense - left) / 1e6:.1f} MB")
    print(f"{arguments.scheme} {quantized / 1e6:.1f} MB, without them {(quantized - left) / 1e6:.1f} MB")
    print(f"ratio {(quantized - left) / (dense - left):.3f}")


def grown(folder: Path) -> int:
    """Bytes by which a fresh process grows while it loads `folder`."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, str(folder)], capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(ran.stderr)
    return int(ran.stdout.split()[-1])


if __name__ == "__main__":
    main()
