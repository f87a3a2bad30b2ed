"""Time and device memory of a calibration at a real shape: its first layers are measured, the rest is extrapolated.

    python -m benchmarks.speed.calibration --random-init llava-1.5-13b --device cuda

Weights are random and samples have the lengths of the packaged ones. The model lies on the CPU in bf16, where
`from_pretrained(..., quantization_config=..., device_map="cuda")` puts it too, and a layer is on the device while it is
worked on, so what the device must hold grows with the layers of a block, not with those of the model.

Decoder and tower are measured apart, each with the other cut to one layer that is left as it is. Capturing inputs,
checks and dependencies count by the layers that the cut model has, searching by those that were searched before the
time was up. The projector, loading, rendering, saving and the comparison on held-out samples are left out.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.utils import logging

from benchmarks.shapes import SHAPES, model_of
from benchmarks.timing import machine
from optimum_qvlm import QVLMConfig
from optimum_qvlm.data.loader import LoaderOptions, read_dataset
from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from optimum_qvlm.pipeline.planner import make_plan

CHARACTERS_PER_TOKEN = 4
TEMPLATE_TOKENS = 10
"""What a chat template adds to question and answer."""

SEARCHES = {
    "language": {"vision_scheme": None},
    "vision": {"modules_to_not_convert": ["language_model", "multi_modal_projector"]},
}
"""Settings under which nothing but the part is quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One part with one effort.

    Attributes:
        layers: of the part in the whole model.
        built: of them in the model that was measured.
        searched: of them until the time was up.
        prepare_seconds: capturing inputs, checks and dependencies, for all that were built.
        search_seconds: of those that were searched.
        deepest: layers of the largest block among them.
        peak_bytes: the most that tensors took on the device, 0 on a CPU.
        reserved_bytes: the most that torch held there for them.
    """

    part: str
    effort: str
    layers: int
    built: int
    searched: int
    prepare_seconds: float
    search_seconds: float
    deepest: int
    peak_bytes: int
    reserved_bytes: int

    @property
    def seconds_per_layer(self) -> float:
        """Preparation and search."""
        return self.prepare_seconds / self.built + self.search_seconds / self.searched

    @property
    def whole_seconds(self) -> float:
        """Extrapolated to all layers."""
        return self.seconds_per_layer * self.layers


class TimeIsUp(Exception):
    """Ends a calibration after the layers that were searched in time."""


@dataclass(slots=True)
class Stopwatch:
    """Stands in for the progress bar of a calibration, and notes when each block of one part is done.

    Attributes:
        part: whose blocks count.
        limit_seconds: no block of the part is begun that would end later, going by the layers before it.
        blocks: layers and seconds of each.
    """

    part: str
    limit_seconds: float
    started: float = field(default_factory=time.perf_counter)
    first_block: float | None = None
    block_started: float = 0.0
    counts: bool = False
    blocks: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, _factory: Callable[..., Any], _args: Any, _settings: Any) -> Self:
        """The bar that transformers asks for."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def set_description(self, text: str) -> None:
        """A phase or a block begins."""
        self.counts = f", {self.part} layer" in text
        self.block_started = time.perf_counter()
        if self.counts and self.first_block is None:
            self.first_block = self.block_started

    def set_postfix_str(self, _text: str) -> None:
        """Nothing is shown."""

    def update(self, layers: int) -> None:
        """A block is done."""
        if not self.counts:
            return
        now = time.perf_counter()
        self.blocks.append((layers, now - self.block_started))
        searching = sum(seconds for _, seconds in self.blocks)
        if searching * (1 + 1 / sum(count for count, _ in self.blocks)) > self.limit_seconds:
            raise TimeIsUp

    def prepare_seconds(self) -> float:
        """Until the first block of the part began."""
        assert self.first_block is not None
        return self.first_block - self.started

    def searched(self) -> tuple[int, float]:
        """Layers and seconds. Of several blocks the first is left out: what is compiled once is compiled there."""
        counted = self.blocks[1:] or self.blocks
        return sum(layers for layers, _ in counted), sum(seconds for _, seconds in counted)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random-init", choices=SHAPES, required=True)
    parser.add_argument("--device", default="cpu", help="where layers are worked on")
    parser.add_argument("--scheme", default="w4a8", help="of the decoder; the tower gets that of the default settings")
    parser.add_argument("--layers", type=int, default=4, help="layers of each part in the model that is measured")
    parser.add_argument("--efforts", nargs="+", default=["fast", "balanced"], choices=["fast", "balanced"])
    parser.add_argument("--parts", nargs="+", default=list(SEARCHES), choices=SEARCHES)
    parser.add_argument("--samples", type=int, default=64, help="rows of the calibration set")
    parser.add_argument("--tokens", type=int, help="tokens of every row; by default those of the packaged samples")
    parser.add_argument("--batch", type=int, default=8, help="rows per forward")
    parser.add_argument("--limit", type=float, default=30, help="seconds of searching per part and effort, about")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    parts = [part for part in arguments.parts if part == "language" or has_tower(SHAPES[arguments.random_init]())]
    if not parts:
        parser.error(f"{arguments.random_init} has no tower; measure --parts language")
    if arguments.device.startswith("cuda"):
        warm_up(arguments)
    print_heading(arguments)
    found = []
    for effort in arguments.efforts:
        for part in parts:
            found.append(measure(part, effort, arguments))
            print_row(found[-1])
        print_whole([one for one in found if one.effort == effort])
    if arguments.json is not None:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        content = {"settings": settings, "machine": machine(arguments.device), "parts": [asdict(one) for one in found]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def warm_up(arguments: argparse.Namespace) -> None:
    """One small layer, so that what a device loads once is not counted as one layer's time."""
    small = argparse.Namespace(**(vars(arguments) | {"random_init": "llava-1.5-small", "layers": 1, "samples": 8}))
    for part in SEARCHES:
        measure(part, "fast", small)


def measure(part: str, effort: str, arguments: argparse.Namespace) -> Measurement:
    """The first layers of one part."""
    whole = SHAPES[arguments.random_init]()
    config = shortened(SHAPES[arguments.random_init](), part, arguments.layers)
    on_cuda = arguments.device.startswith("cuda")
    model = model_of(config, None, torch.bfloat16, arguments.device).to("cpu")
    batches = make_inputs(config, arguments)
    settings = SEARCHES[part] if has_tower(config) else {}
    options = QVLMConfig(arguments.scheme, effort=effort, **settings).options()
    names = {path: path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    plan = make_plan(adapter_for(model), options, names)
    recipe = Recipe(source="random", samples=arguments.samples, seed=0, fingerprint="")
    if on_cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch(part, arguments.limit)
    previous = logging.set_tqdm_hook(watch)
    try:
        calibrate(model, plan, options, CalibrationData(batches=batches, recipe=recipe), torch.device(arguments.device))
    except TimeIsUp:
        pass
    finally:
        logging.set_tqdm_hook(previous)
    searched, seconds = watch.searched()
    return Measurement(
        part=part,
        effort=effort,
        layers=layers_of(whole, part),
        built=layers_of(config, part),
        searched=searched,
        prepare_seconds=watch.prepare_seconds(),
        search_seconds=seconds,
        deepest=max(count for count, _ in watch.blocks),
        peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else 0,
        reserved_bytes=torch.cuda.max_memory_reserved() if on_cuda else 0,
    )


def has_tower(config: Any) -> bool:
    """Whether a model of this configuration sees images."""
    return getattr(config, "vision_config", None) is not None


def shortened(config: Any, part: str, layers: int) -> Any:
    """The configuration with that many layers in one part, at most, and one in the other."""
    text = config.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, layers) if part == "language" else 1
    if has_tower(config):
        vision = config.vision_config
        vision.num_hidden_layers = min(vision.num_hidden_layers, layers + 1 if part == "vision" else 2)
    return config


def layers_of(config: Any, part: str) -> int:
    """Layers that are searched: of a tower all but the last, whose output LLaVA does not read."""
    if part == "language":
        return int(config.get_text_config().num_hidden_layers)
    return int(config.vision_config.num_hidden_layers) - 1


def make_inputs(config: Any, arguments: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Batches of random tokens, padded on the right, after the tokens of a random image where the model has a tower."""
    generator = torch.Generator().manual_seed(0)
    images = image_tokens(config)
    lengths = [images + text for text in text_lengths(images > 0, arguments)]
    batches = []
    for start in range(0, len(lengths), arguments.batch):
        rows = torch.tensor(lengths[start : start + arguments.batch])
        ids = torch.randint(10, 1000, (len(rows), int(rows.max())), generator=generator)
        batch = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < rows[:, None]).long()}
        if images:
            ids[:, :images] = config.image_token_id
            size = config.vision_config.image_size
            batch["pixel_values"] = torch.randn(len(rows), 3, size, size, generator=generator)
        batches.append(batch)
    return batches


def image_tokens(config: Any) -> int:
    """Tokens that stand for one image."""
    if not has_tower(config):
        return 0
    return int(config.vision_config.image_size // config.vision_config.patch_size) ** 2


def text_lengths(wants_images: bool, arguments: argparse.Namespace) -> list[int]:
    """Tokens of text in each row, estimated from the characters of the packaged samples, which repeat if need be."""
    if arguments.tokens is not None:
        return [arguments.tokens] * arguments.samples
    limits = LoaderOptions(num_samples=arguments.samples, batch_size=arguments.batch, max_length=2048, seed=0)
    _, samples = read_dataset(None, limits, wants_images=wants_images)
    known = [min(characters(s) // CHARACTERS_PER_TOKEN, limits.max_length) + TEMPLATE_TOKENS for s in samples]
    return [known[number % len(known)] for number in range(arguments.samples)]


def characters(sample: Sample) -> int:
    """Of question and answer, or of a passage."""
    parts = [part.get("text", "") for message in sample.messages for part in message["content"]]
    return sum(map(len, (*parts, sample.answer or "", sample.text or "")))


def print_heading(arguments: argparse.Namespace) -> None:
    """Of the table."""
    print(f"{machine(arguments.device)}; {arguments.random_init}, {arguments.scheme}, {arguments.samples} samples")
    searched = f"{'built':>6} {'searched':>8} {'prepare s/layer':>15} {'search s/layer':>14} {'deepest':>7}"
    memory = f"{'peak GB':>8} {'reserved GB':>11}"
    print(f"{'part':9} {'effort':9} {searched} {memory} {'layers':>7} {'minutes, extrapolated':>22}", flush=True)


def print_row(one: Measurement) -> None:
    """One part with one effort."""
    searched = f"{one.built:6} {one.searched:8} {one.prepare_seconds / one.built:15.2f}"
    searched += f" {one.search_seconds / one.searched:14.2f} {one.deepest:7}"
    memory = f"{one.peak_bytes / 1e9:8.2f} {one.reserved_bytes / 1e9:11.2f}"
    whole = f"{one.layers:7} {one.whole_seconds / 60:22.1f}"
    print(f"{one.part:9} {one.effort:9} {searched} {memory} {whole}", flush=True)


def print_whole(parts: list[Measurement]) -> None:
    """All parts with one effort together."""
    minutes = sum(one.whole_seconds for one in parts) / 60
    row = f"{' and '.join(one.part for one in parts)}, {parts[0].effort}: {minutes:.1f} minutes, extrapolated"
    peak = max(one.peak_bytes for one in parts) / 1e9
    print(f"{row}; peak {peak:.2f} GB, measured" if peak else row, flush=True)


if __name__ == "__main__":
    main()
