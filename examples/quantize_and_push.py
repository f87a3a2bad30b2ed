"""Quantize a vision-language model, save it, and with --repo upload it.

    python examples/quantize_and_push.py --out quantized
    python examples/quantize_and_push.py --model llava-hf/llava-1.5-7b-hf --out llava-w4a8 --repo me/llava-w4a8

The upload needs a token: `hf auth login`, or HF_TOKEN.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from optimum_qvlm import QVLMConfig

BUNDLED = Path(__file__).parent / "tiny_vlm"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(BUNDLED), help="folder or Hub id (default: the bundled model)")
parser.add_argument("--out", default="quantized", help="folder for the result (%(default)s)")
parser.add_argument("--repo", help="repository to upload to")
parser.add_argument("--samples", type=int, default=16, help="calibration samples (%(default)s)")
arguments = parser.parse_args()

config = QVLMConfig("w4a8", num_samples=arguments.samples)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(arguments.model, quantization_config=config, device_map=device)

model.save_pretrained(arguments.out)
print(f"Saved in {arguments.out}: {', '.join(sorted(path.name for path in Path(arguments.out).iterdir()))}")

if arguments.repo is not None:
    commit = model.push_to_hub(arguments.repo, private=True)
    print(f"Pushed to {commit.commit_url}")
