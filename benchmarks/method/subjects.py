"""Models that the method is examined on: calibrated in memory, compared with full precision."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks import smollm2, tiny_vlm
from benchmarks.measures import divergence
from benchmarks.quality import texts
from benchmarks.timing import clock_of
from optimum_qvlm import QVLMConfig
from optimum_qvlm.data.loader import Batch
from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.evaluation.fidelity import answer_logits, right_answers
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from optimum_qvlm.pipeline.planner import make_plan
from optimum_qvlm.pipeline.result import CalibrationResult
from optimum_qvlm.plan import Block, QuantPlan

NAMES = ("plain", "outlier", "smollm2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much data is used.

    `batch` is samples per calibration batch, `chunk` tokens per text of SmolLM2, `layers` how many layers of it are
    quantized, None for all.
    """

    samples: int
    questions: int
    batch: int = 8
    chunk: int = 512
    layers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What was reported of a calibration, its seconds, and how its model answers the held-out questions.

    `kl` holds nats per held-out token, `right` one number per question.
    """

    result: CalibrationResult
    seconds: float
    kl: Tensor
    right: Tensor

    @property
    def final_error(self) -> float:
        """Relative squared error of the last layer; NaN where nothing was searched."""
        return self.result.layers[-1].error if self.result.layers else float("nan")

    def layer_forwards(self, part: str | None = None) -> float:
        """Layers that the joint search ran, counted in passes over all tokens of a part."""
        return sum(
            error.forwards * error.share * (error.block.last - error.block.first + 1)
            for error in self.result.joint
            if part in (None, error.block.part)
        )


class Subject:
    """One model in full precision, with calibration batches by seed and held-out questions.

    `scratch` is where its checkpoint is written, and found again by other processes. Layers are searched on `device`
    and models answer there; the model itself lies on the CPU.
    """

    def __init__(self, name: str, scratch: Path, sizes: Sizes, device: str = "cpu") -> None:
        self.name, self.scratch, self.sizes, self.device = name, scratch, sizes, device
        if name == "smollm2":
            self.folder = scratch / name
            if not self.folder.exists():
                smollm2.write_checkpoint(self.folder)
            self.full: Any = AutoModelForCausalLM.from_pretrained(self.folder)
            self.held_out: Sequence[Batch] = self.text(0).held_out
        else:
            self.folder = tiny_vlm.variant_folder(name, scratch)
            self.full = AutoModelForImageTextToText.from_pretrained(self.folder)
            questions = tiny_vlm.make_samples("heldout", sizes.questions, 0)
            self.held_out = tiny_vlm.labelled(questions, self.folder, tiny_vlm.HELD_OUT_ROWS)
        self.reference = self.answers(copy.deepcopy(self.full))

    def text(self, seed: int) -> texts.Text:
        """Chunks of the text model: held-out ones are the same for every seed, those for calibration are not."""
        held_out, sizes = max(self.sizes.questions // 64, 1), self.sizes
        chunked = texts.chunked(self.folder, tokens=sizes.chunk)
        drawn = chunked.draw(sizes.samples * (seed + 1), held_out, held_out_first=True)
        return replace(drawn, calibration=drawn.calibration[sizes.samples * seed :])

    def answers(self, model: Any) -> list[Tensor]:
        """Logits of a model for the held-out questions; the model is moved to the device."""
        return answer_logits(model.to(self.device), self.held_out)

    def config(self, scheme: str, **settings: Any) -> QVLMConfig:
        """A configuration whose tower has the bits of the language model, as in the paper."""
        text = self.name == "smollm2" and self.sizes.layers is not None
        count = self.full.config.num_hidden_layers if text else 0
        kept = [f"layers.{number}" for number in range(self.sizes.layers or 0, count)]
        return QVLMConfig(scheme, **({"vision_scheme": scheme, "modules_to_not_convert": kept or None} | settings))

    def data(self, seed: int = 0, batch: int | None = None) -> CalibrationData:
        """Calibration batches of a seed."""
        recipe = Recipe(source="user", samples=self.sizes.samples, seed=seed, fingerprint="")
        if self.name == "smollm2":
            batches = self.text(seed).calibration
            return CalibrationData(batches=batches, recipe=recipe, labels=[b["input_ids"] for b in batches])
        size = self.sizes.batch if batch is None else batch
        samples = tiny_vlm.make_samples("train", self.sizes.samples, seed)
        labelled = tiny_vlm.labelled(samples, self.folder, size, seed)
        labels = [batch.pop("labels") for batch in labelled]
        return CalibrationData(batches=labelled, recipe=recipe, labels=labels)

    def plan(self, config: QVLMConfig) -> QuantPlan:
        """The plan of the model under a configuration."""
        names = {path: path for path, module in self.full.named_modules() if isinstance(module, nn.Linear)}
        return make_plan(adapter_for(self.full), config.options(), names)

    def calibrated(
        self, config: QVLMConfig, data: CalibrationData | None, blocks: tuple[Block, ...] | None = None
    ) -> tuple[nn.Module, CalibrationResult, float]:
        """A quantized copy of the model, what was reported, and seconds. `blocks` fixes the partition.

        Seconds are of the processor on a CPU, of the clock elsewhere.
        """
        model = copy.deepcopy(self.full)
        options = replace(config.options(), blocks=blocks)
        clock = clock_of(self.device, cpu_time=True)
        started = clock()
        result = calibrate(model, self.plan(config), options, data, torch.device(self.device))
        return model, result, clock() - started

    def quantized(
        self, config: QVLMConfig, data: CalibrationData | None, blocks: tuple[Block, ...] | None = None
    ) -> Quantized:
        """As `calibrated`, compared with full precision on the held-out questions."""
        model, result, seconds = self.calibrated(config, data, blocks)
        logits = self.answers(model)
        return Quantized(
            result=result,
            seconds=seconds,
            kl=torch.cat([divergence(a, b) for a, b in zip(self.reference, logits, strict=True)]),
            right=torch.tensor(right_answers(logits, self.held_out)).double(),
        )
