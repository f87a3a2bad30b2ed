"""TRL's SFTTrainer on a quantized model with adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

from tests.jobs import load, quantize


@pytest.fixture(scope="module")
def folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized text model that was saved. Read only."""
    saved = tmp_path_factory.mktemp("quantized")
    quantize(llama_folder, transforms="both").save_pretrained(saved)
    return saved


def sft_trainer(model: Any, bundled_folder: Path, output: Path, steps: int, **adapters: Any) -> SFTTrainer:
    tokens = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = SFTConfig(
        output, max_steps=steps, learning_rate=0.02, logging_steps=1, save_steps=2, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, gradient_checkpointing=True, seed=0, lr_scheduler_type="constant",
        disable_tqdm=True, bf16=False,
    )  # fmt: skip
    return SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": tokens}),
        processing_class=AutoProcessor.from_pretrained(bundled_folder).tokenizer,
        **adapters,
    )


def adapters() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "up_proj"], r=4, task_type="CAUSAL_LM")


def losses_of(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trains_adapters_and_resumes(folder, bundled_folder, tmp_path):
    """With gradient checkpointing, which is TRL's default, on a model that was reloaded."""
    trainer = sft_trainer(load(folder), bundled_folder, tmp_path, steps=3, peft_config=adapters())
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 3 and losses[2] < losses[0]

    resumed = sft_trainer(load(folder), bundled_folder, tmp_path, steps=4, peft_config=adapters())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert resumed.state.global_step == 4
    assert losses_of(resumed)[2] == pytest.approx(losses[2], rel=1e-4)


def test_sft_refuses_the_bare_model(folder, bundled_folder, tmp_path):
    with pytest.raises(ValueError, match=r"purely quantized models\. Please attach trainable adapters"):
        sft_trainer(load(folder), bundled_folder, tmp_path, steps=1)
