"""PEFT adapters on quantized models: injected, trained by transformers' Trainer, saved, resumed and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import Trainer, TrainingArguments

from optimum_qvlm.errors import ReadOnlyError
from tests.jobs import load, logits, make_batch, quantize


@pytest.fixture(scope="module", params=["llama", "llava"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model that was saved. Read only."""
    saved = tmp_path_factory.mktemp("quantized")
    quantize(request.getfixturevalue(f"{request.param}_folder"), transforms="equalize").save_pretrained(saved)
    return saved


def adapt(folder: Path, **settings: Any) -> Any:
    """The reloaded model with adapters whose second factor is not zero."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False, **settings)
    return get_peft_model(load(folder), config)


def samples(folder: Path) -> list[dict[str, Tensor]]:
    """Rows of a batch that the model is to learn by heart."""
    batch = make_batch(folder)
    images = len(batch["input_ids"])
    assert all(len(tensor) == images for tensor in batch.values())
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(images)]
    return [row | {"labels": row["input_ids"]} for row in rows]


def trainer(model: Any, folder: Path, output: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output, max_steps=steps, learning_rate=0.02, logging_steps=1, save_steps=2, report_to=[], use_cpu=True,
        per_device_train_batch_size=2, gradient_checkpointing=True, seed=0, lr_scheduler_type="constant",
        disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=samples(folder))


def test_only_adapters_ask_for_gradients_after_a_reload(folder):
    """Equalizers and scales used to, which optimizers would have taken for parameters."""
    trained = [name for name, parameter in load(folder).named_parameters() if parameter.requires_grad]

    assert not [name for name in trained if name.endswith(("_scale", "_equalizer", "_packed", "_point"))]
    assert all("lora_" in name for name, parameter in adapt(folder).named_parameters() if parameter.requires_grad)


def test_the_trainer_trains_saves_and_resumes(folder, tmp_path):
    """With gradient checkpointing, on a model that was reloaded."""
    runner = trainer(adapt(folder), folder, tmp_path, steps=3)
    runner.train()
    losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[0]

    resumed = trainer(adapt(folder), folder, tmp_path, steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert resumed.state.global_step == 4
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert again[2] == pytest.approx(losses[2], rel=1e-4)
    saved = PeftModel.from_pretrained(load(folder), tmp_path / "checkpoint-4")
    batch = make_batch(folder)
    torch.testing.assert_close(logits(saved, batch), logits(resumed.model.eval(), batch))


def test_transformers_refuses_to_train_the_bare_model(folder, tmp_path):
    with pytest.raises(ValueError, match=r"purely quantized models\. Please attach trainable adapters"):
        trainer(load(folder), folder, tmp_path, steps=1)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merge_is_refused_and_works_once_dequantized(folder, dora):
    """A merge used to leave the base as it was, and unloading threw the adapter away."""
    model, batch = adapt(folder, use_dora=dora).eval(), make_batch(folder)
    before = logits(model, batch)
    for merge in (
        lambda: model.merge_adapter(),
        lambda: model.merge_adapter(safe_merge=True),
        lambda: model.merge_and_unload(),
    ):
        with pytest.raises(ReadOnlyError, match="dequantize"):
            merge()
    assert torch.equal(logits(model, batch), before)

    model.dequantize()
    expected = logits(model, batch)
    merged = model.merge_and_unload()

    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(load(folder).dequantize(), batch), atol=1e-3)


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_initialisations_that_change_the_base_are_refused(folder, initialisation):
    """They subtract from the base what the adapter starts with."""
    with pytest.raises(ReadOnlyError, match="dequantize"):
        get_peft_model(load(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=initialisation))


def test_a_model_prepared_for_training_is_saved_and_loads(llama_folder, tmp_path):
    """PEFT turns 16-bit parameters to fp32; the scales go back to their dtype when they are saved."""
    quantize(llama_folder, options={"dtype": torch.bfloat16}).save_pretrained(tmp_path / "first")
    model = prepare_model_for_kbit_training(load(tmp_path / "first"), use_gradient_checkpointing=False)

    model.save_pretrained(tmp_path / "second")

    batch = make_batch(llama_folder)
    assert torch.equal(logits(load(tmp_path / "second"), batch), logits(model, batch))
