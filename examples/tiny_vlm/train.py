"""Trains the tiny vision-language model and writes its model folder.

The defaults are the settings of the weights in this folder, which came from one run on one GPU.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from architecture import build_model, build_processor
from batches import IGNORED, TOKENS, GridBatches, Painter, pack_grids, prompt_tokens
from evaluate import answer_questions, conversation, print_accuracy
from questions import LAYOUTS, ask, draw_grid, load_split, make_samples, render
from torch import Tensor, nn
from torch.utils.data import DataLoader


def parse_arguments() -> argparse.Namespace:
    """The command line's values."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=19285)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=1000, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--average", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eval-count", type=int, default=4000, help="held-out questions asked at the end")
    return parser.parse_args()


def check_inputs(processor: Any) -> None:
    """Raises unless training sees exactly the tokens and pixel values that the processor makes."""
    labels = load_split("train")[1]
    rng = random.Random(0)
    grids = [draw_grid(len(labels), rng, layout) for layout in LAYOUTS for _ in range(4)]
    painted = Painter(processor, torch.device("cpu")).paint(**pack_grids(grids), distorted=False)
    for grid, pixels in zip(grids, painted, strict=True):
        question, answer, _ = ask(grid.cells(labels), rng)
        sample = {"image": render(grid, "train"), "question": question, "answer": answer}
        wanted = processor.apply_chat_template(
            conversation(sample),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        torch.testing.assert_close(pixels, wanted["pixel_values"][0], rtol=1e-5, atol=1e-5)
        if prompt_tokens(processor, question) != wanted["input_ids"][0].tolist():
            raise RuntimeError(f"training and the processor tokenize {question!r} differently; align them")


def answer_loss(model: Any, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
    """`model(...).loss` for batches of constant shape, without waiting for the device.

    Padding is on the right, so the causal mask alone keeps it from the answers. Every prompt begins with
    bos and user, then come the image's tokens.
    """
    core = model.model
    vision = core.vision_tower(pixel_values, output_hidden_states=True)
    features = core.multi_modal_projector(vision.hidden_states[model.config.vision_feature_layer][:, 1:])
    after = 2 + features.shape[1]
    words = core.get_input_embeddings()(input_ids)
    embeds = torch.cat([words[:, :2], features.to(words.dtype), words[:, after:]], dim=1)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=embeds.device).tril()[None, None]
    hidden = core.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, after:-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, after + 1 :].flatten(), ignore_index=IGNORED)


class GradientStep:
    """Computes the loss and the gradients of a batch; on CUDA as one recorded graph."""

    def __init__(self, model: nn.Module, painter: Painter, batch: dict[str, Tensor]) -> None:
        self.model = model
        self.painter = painter
        self.batch = {name: tensor.clone() for name, tensor in batch.items()}
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.batch["input_ids"].is_cuda:
            self._record()

    def _run(self) -> Tensor:
        batch = self.batch
        with torch.no_grad():
            pixels = self.painter.paint(batch["scans"], batch["palettes"], distorted=True)
        kind = pixels.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda", cache_enabled=False):
            loss = answer_loss(self.model, pixels, batch["input_ids"], batch["labels"])
        loss.backward()
        return loss.detach()

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
                self.model.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._run()

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor, non_blocking=True)
        if self.graph is None:
            self.model.zero_grad(set_to_none=True)
            return self._run()
        self.graph.replay()
        return self.loss


def build_optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def rate_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def draw_batches(processor: Any, arguments: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """All batches of the run, on the CPU."""
    drawn = GridBatches(processor, batch_size=arguments.batch_size, batches=arguments.steps, seed=arguments.seed)
    pinned = torch.device(arguments.device).type == "cuda"
    return iter(DataLoader(drawn, batch_size=None, num_workers=arguments.workers, pin_memory=pinned))


def train(model: nn.Module, processor: Any, arguments: argparse.Namespace) -> nn.Module:
    """Trains in place and returns the averaged model."""
    device = torch.device(arguments.device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = build_optimizer(model, arguments.learning_rate, arguments.weight_decay)
    gradients: GradientStep | None = None
    start = time.monotonic()
    for step, batch in enumerate(draw_batches(processor, arguments)):
        if gradients is None:
            first = {name: tensor.to(device) for name, tensor in batch.items()}
            gradients = GradientStep(model.train(), Painter(processor, device), first)
        loss = gradients(batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate_factor(step, arguments.warmup, arguments.steps)
        optimizer.step()
        weight = 1 - min(arguments.average, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), weight)
        if step % 500 == 0 or step == arguments.steps - 1:
            print(f"step {step} loss {loss.item():.4f} after {time.monotonic() - start:.0f} s", flush=True)
    return averaged.eval()


def main() -> None:
    """Command line: trains, saves, then answers held-out questions."""
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    processor = build_processor()
    check_inputs(processor)
    model = build_model().to(arguments.device)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters")
    averaged: Any = train(model, processor, arguments)
    averaged.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    if arguments.eval_count:
        torch.set_float32_matmul_precision("highest")
        samples = make_samples("heldout", arguments.eval_count, seed=0)
        print_accuracy(answer_questions(averaged, processor, samples, batch_size=500), samples)


if __name__ == "__main__":
    main()
