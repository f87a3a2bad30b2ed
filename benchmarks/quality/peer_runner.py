"""One peer on one checkpoint, in the peer's own environment: prints a line of JSON with what it reached and took.

    python peer_runner.py gptq CHECKPOINT TEXT.safetensors --bits 4 --group 64

Imports nothing of this project. `TEXT.safetensors` holds token ids `calibration` and `held_out` [chunks, tokens].
Every peer is used as its own documentation shows, with its defaults for everything but bits, group and data.
"""

import argparse
import importlib.metadata
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="where AutoRound and HQQ work; the rest choose it themselves")
    arguments = parser.parse_args()
    text = load_file(arguments.text)
    package, run = PEERS[arguments.peer]
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    started, processor = time.perf_counter(), time.process_time()
    model = run(model, arguments, text["calibration"])
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    result = {
        "perplexity": perplexity(model, text["held_out"]),
        "seconds": seconds,
        "processor_seconds": processor,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "unchanged": unchanged_linears(model, arguments.checkpoint),
        "version": f"{package} {importlib.metadata.version(package)}",
    }
    sys.stdout.flush()
    print("\n" + json.dumps(result), flush=True)


def with_gptq(model: Any, arguments: argparse.Namespace, calibration: torch.Tensor) -> Any:
    """llm-compressor's GPTQ: symmetric groups, its default damping and activation order."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    recipe = GPTQModifier(config_groups=groups(arguments, symmetric=True), ignore=["lm_head"])
    return one_shot(model, recipe, arguments, calibration)


def with_awq(model: Any, arguments: argparse.Namespace, calibration: torch.Tensor) -> Any:
    """llm-compressor's AWQ with zero points, as in its own example."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():  # it pins memory whether or not there is a device to pin it for
        IntermediatesCache.pin_memory = lambda *_arguments, **_named: None
    scheme = groups(arguments, symmetric=False)
    recipe = [AWQModifier(), QuantizationModifier(config_groups=scheme, ignore=["lm_head"])]
    return one_shot(model, recipe, arguments, calibration)


def groups(arguments: argparse.Namespace, *, symmetric: bool) -> dict[str, Any]:
    """llm-compressor's scheme for all linears."""
    weights = {"num_bits": arguments.bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
    return {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": arguments.group}}}


def one_shot(model: Any, recipe: Any, arguments: argparse.Namespace, calibration: torch.Tensor) -> Any:
    """llm-compressor's entry point."""
    from datasets import Dataset
    from llmcompressor import oneshot

    ids = calibration.tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    return oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(arguments.checkpoint),
        dataset=dataset,
        recipe=recipe,
        max_seq_length=calibration.shape[1],
        num_calibration_samples=len(calibration),
    )


def with_autoround_light(model: Any, arguments: argparse.Namespace, calibration: torch.Tensor) -> Any:
    """AutoRound's own light recipe: a quarter of the steps, at a rate of its choice."""
    return with_autoround(model, arguments, calibration, iters=50, lr=5e-3)


def with_autoround(model: Any, arguments: argparse.Namespace, calibration: torch.Tensor, **settings: Any) -> Any:
    """AutoRound, by default with 200 steps a layer."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader

    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in calibration]
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(arguments.checkpoint),
        scheme=f"W{arguments.bits}A16",
        group_size=arguments.group,
        sym=True,
        dataset=DataLoader(rows, batch_size=1),
        nsamples=len(calibration),
        seqlen=calibration.shape[1],
        device_map=arguments.device,
        **settings,
    )
    quantized, _ = rounder.quantize()
    return quantized


def with_hqq(model: Any, arguments: argparse.Namespace, calibration: torch.Tensor) -> Any:
    """HQQ, which needs no data."""
    from hqq.core.quantize import Quantizer

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, meta = Quantizer.quantize(
                module.weight.data,
                nbits=arguments.bits,
                group_size=arguments.group,
                axis=1,
                device=arguments.device,
                compute_dtype=torch.float32,
            )
            module.weight.data = Quantizer.dequantize(packed, meta).reshape(module.weight.shape).float().cpu()
    return model


PEERS: dict[str, tuple[str, Callable[[Any, argparse.Namespace, torch.Tensor], Any]]] = {
    "hqq": ("hqq", with_hqq),
    "awq": ("llmcompressor", with_awq),
    "gptq": ("llmcompressor", with_gptq),
    "autoround-light": ("auto-round", with_autoround_light),
    "autoround": ("auto-round", with_autoround),
}


@torch.inference_mode()
def perplexity(model: Any, chunks: torch.Tensor) -> float:
    """Over all tokens but the first of each chunk, in fp32."""
    model = model.float().eval()
    losses = []
    for ids in chunks.to(next(model.parameters()).device).split(1):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    return math.exp(float(torch.stack(losses).mean()))


@torch.inference_mode()
def unchanged_linears(model: Any, checkpoint: Path) -> int:
    """Linears whose product is the full-precision one: a peer that changed nothing would look perfect."""
    full = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = 0
    for name, module in full.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0))
            other = model.get_submodule(name)
            product = other(x.to(other.weight.device)).cpu() if hasattr(other, "weight") else other(x)
            found += int(torch.allclose(product, module(x), rtol=1e-3))
    return found


if __name__ == "__main__":
    main()
