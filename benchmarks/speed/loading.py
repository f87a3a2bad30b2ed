"""Growth of anonymous memory while a checkpoint is loaded, quantized against the same model in bf16.

Each load runs in a process of its own, after that of a tiny model of the same kind, so that imports do not count.
transformers leaves tensors that it need not change in the mapped file, where they are not anonymous; they are copied
once all is loaded, in both, and the model is measured as it lies in memory. The most that was anonymous while
`from_pretrained` ran, where mapped tensors do not count, is printed beside it. Tensors that are left unquantized are in
both and are subtracted.
"""

import argparse
import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SHAPES, model_of
from optimum_qvlm import QVLMConfig
from optimum_qvlm.hf.format.modules import packed_bytes, quantized_modules

LOAD = """
import gc, re, sys, threading, time, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
import optimum_qvlm.hf.quantizer
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def watch():
    global most
    while running:
        most = max(most, anonymous())
        time.sleep(0.002)
def load(folder):
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.bfloat16)
torch.set_num_threads(1)
load(sys.argv[1])
gc.collect()
before = most = anonymous()
running = True
watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[2])
running = False
watcher.join()
maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
files = [[int(end, 16) for end in part[0].split("-")] for part in maps if part[-1].endswith(".safetensors")]
with torch.no_grad():
    for parameter in model.parameters():
        if any(first <= parameter.data_ptr() < last for first, last in files):
            parameter.data = parameter.data.clone()
gc.collect()
print(anonymous() - before, most - before)
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random-init", choices=SHAPES, default="smollm2-360m")
    parser.add_argument("--scheme", default="w4a16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        left = write_pair(SHAPES[arguments.random_init](), arguments.scheme, Path(scratch) / "model")
        write_pair(tiny(SHAPES[arguments.random_init]()), arguments.scheme, Path(scratch) / "tiny")
        dense, dense_most = grown(Path(scratch), "plain")
        quantized, most = grown(Path(scratch), "packed")
    print(f"unquantized tensors {left / 1e6:.1f} MB")
    for name, size, peak in (("bf16", dense, dense_most), (arguments.scheme, quantized, most)):
        print(
            f"{name} {size / 1e6:.1f} MB, without them {(size - left) / 1e6:.1f} MB; while loading {peak / 1e6:.1f} MB"
        )
    print(f"ratio {(quantized - left) / (dense - left):.3f}")


def write_pair(config: Any, scheme: str, folder: Path) -> int:
    """A random model in bf16 and its quantized form, as `plain` and `packed`; the bytes that both leave unquantized."""
    model = model_of(config, None, torch.bfloat16, "cpu")
    model.save_pretrained(folder / "plain")
    full = packed_bytes(model)
    settings = QVLMConfig(scheme, method="rtn")
    model = type(model).from_pretrained(folder / "plain", quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(folder / "packed")
    return full - sum(2 * m.in_features * m.out_features for m in quantized_modules(model).values())


def tiny(config: Any) -> Any:
    """The same kind of model with few layers."""
    small = copy.deepcopy(config)
    small.get_text_config().num_hidden_layers = 1
    if hasattr(small, "vision_config"):
        small.vision_config.num_hidden_layers = 3  # the language model reads the one before the last
    return small


def grown(scratch: Path, form: str) -> tuple[int, int]:
    """Bytes by which a fresh process grows while it loads a model: once all lies in memory, and at most."""
    command = [sys.executable, "-W", "ignore", "-c", LOAD, scratch / "tiny" / form, scratch / "model" / form]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode != 0:
        raise RuntimeError(ran.stderr)
    held, most = ran.stdout.split()[-2:]
    return int(held), int(most)


if __name__ == "__main__":
    main()
