"""PEFT adapters on quantized models: injected, trained by transformers' Trainer, saved, resumed and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import Trainer, TrainingArguments

from optimum_qvlm import QVLMConfig
from optimum_qvlm.errors import CheckpointError, ReadOnlyError
from tests.jobs import load, logits, make_batch, quantize


@pytest.fixture(scope="module", params=["llama", "llava"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model that was saved. Read only."""
    saved = tmp_path_factory.mktemp("quantized")
    quantize(request.getfixturevalue(f"{request.param}_folder"), transforms="equalize").save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def whole_folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model whose linears have every tensor that there may be. Read only."""
    saved = tmp_path_factory.mktemp("whole")
    data = [make_batch(llama_folder, seed=0), make_batch(llama_folder, seed=1)]
    config = QVLMConfig.paper(4, dataset=data, transforms="equalize", symmetric=False)
    load(llama_folder, quantization_config=config).save_pretrained(saved)
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
    assert all("lora_" in name for name, parameter in adapt(folder).named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "name", ["weight_packed", "weight_scale", "weight_zero_point", "input_equalizer", "input_scale"]
)
def test_each_tensor_of_a_quantized_linear_is_frozen_after_a_reload(whole_folder, name):
    """Optimizers would take them for parameters, and train what the codes were chosen for."""
    model = load(whole_folder)
    held = [parameter for path, parameter in model.named_parameters() if path.endswith(f".{name}")]

    assert held and not any(parameter.requires_grad for parameter in held)
    for parameter in model.train().parameters():
        assert not parameter.requires_grad or parameter.is_floating_point()
    model(**make_batch(whole_folder), labels=make_batch(whole_folder)["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in held)


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


@pytest.mark.parametrize("module", ["up_proj", "mlp"])
def test_a_quantized_linear_cannot_be_a_module_to_save(folder, module):
    """PEFT trains a copy of it, or of what holds it, which packed integers cannot be."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[module], exclude_modules=".*vision.*")
    named = r"layers\.0\.mlp\.\w+ \(quantized.*target_modules.*modules_to_not_convert.*dequantize"

    with pytest.raises(ReadOnlyError, match=named):
        get_peft_model(load(folder), config)


def test_a_plain_linear_is_a_module_to_save(folder):
    """The output embedding is not quantized by default."""
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])

    model = get_peft_model(load(folder), config)

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("modules_to_save" in name and "lm_head" in name for name in trained)


def test_a_whole_quantized_model_cannot_be_made_trainable(folder):
    model = load(folder)

    with pytest.raises(ReadOnlyError, match=r"layers\.0\.\w+\.\w+ \(.*target_modules.*dequantize"):
        model.requires_grad_(True)

    assert not any(parameter.requires_grad for parameter in model.requires_grad_(False).parameters())
    assert all(parameter.requires_grad for parameter in model.dequantize().requires_grad_().parameters())


def test_the_base_under_adapters_is_saved_once_they_are_unloaded(folder, tmp_path):
    model, batch = adapt(folder), make_batch(folder)

    with pytest.raises(CheckpointError, match=r"q_proj .*adapter.*unload\(\)"):
        model.get_base_model().save_pretrained(tmp_path / "base")

    model.unload().save_pretrained(tmp_path / "base")
    assert torch.equal(logits(load(tmp_path / "base"), batch), logits(load(folder), batch))


def test_adalora_trains(folder):
    """It adds to what the base returns in place, and gives up ranks while it trains."""
    torch.manual_seed(0)
    config = AdaLoraConfig(
        target_modules=["q_proj", "up_proj"],
        exclude_modules=".*vision.*",
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=1,
        total_step=6,
    )
    model = get_peft_model(load(folder), config)
    (sample, *_), losses = samples(folder), []
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)

    for step in range(1, 6):
        loss = model(**{name: tensor[None] for name, tensor in sample.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        losses.append(float(loss.detach()))

    assert losses[-1] < losses[0]


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
