"""Every method of PEFT that the page on adapters lists: trained on a quantized model, saved, and put back."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.jobs import ROOT, load, logits, make_batch, quantize

PAIR = {"target_modules": ["q_proj", "v_proj"]}
QUERY = {"target_modules": ["q_proj"]}
LOW = PAIR | {"r": 4}

WORK: dict[str, Any] = {
    "AdaLoRA": peft.AdaLoraConfig(**PAIR, init_r=4, target_r=2, total_step=10),
    "AdaMSS": peft.AdamssConfig(**LOW),
    "adaption prompts": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"),
    "BEFT": peft.BeftConfig(**PAIR),
    "BOFT": peft.BOFTConfig(**PAIR, boft_block_size=8),
    "C3A": peft.C3AConfig(**QUERY, block_size=8),
    "DEFT": peft.DeftConfig(**LOW),
    "DeLoRA": peft.DeloraConfig(**LOW),
    "DoRA": peft.LoraConfig(**LOW, use_dora=True),
    "EVA": peft.LoraConfig(**LOW, init_lora_weights="eva", eva_config=peft.EvaConfig()),
    "FourierFT": peft.FourierFTConfig(**PAIR, n_frequency=10),
    "FRoD": peft.FrodConfig(**PAIR),
    "GraLoRA": peft.GraloraConfig(**LOW, gralora_k=2),
    "HiRA": peft.HiraConfig(**LOW),
    "HRA": peft.HRAConfig(**LOW),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "Lily": peft.LilyConfig(**LOW),
    "LN tuning": peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "LoHa": peft.LoHaConfig(**LOW),
    "LoKr": peft.LoKrConfig(**LOW),
    "LoRA": peft.LoraConfig(**LOW),
    "MiSS": peft.MissConfig(**LOW),
    "OFT": peft.OFTConfig(**PAIR, r=0, oft_block_size=8),
    "OSF": peft.OSFConfig(**PAIR, effective_rank=4),
    "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "PEANuT": peft.PeanutConfig(**LOW),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "PSOFT": peft.PsoftConfig(**LOW),
    "PVeRA": peft.PveraConfig(**QUERY, r=4),
    "RandLoRA": peft.RandLoraConfig(**QUERY, r=4),
    "RoAd": peft.RoadConfig(**PAIR, group_size=8),
    "rsLoRA": peft.LoraConfig(**LOW, use_rslora=True),
    "SHiRA": peft.ShiraConfig(**LOW),
    "TinyLoRA": peft.TinyLoraConfig(**LOW),
    "trainable tokens": peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=list(range(40))),
    "UniLoRA": peft.UniLoraConfig(**LOW),
    "VB-LoRA": peft.VBLoRAConfig(**QUERY, r=4, num_vectors=8, vector_length=8),
    "VeLoRA": peft.LoraConfig(**LOW, velora_config=peft.VeloraConfig()),
    "VeRA": peft.VeraConfig(**QUERY, r=4),
    "WaveFT": peft.WaveFTConfig(**PAIR, n_frequency=10),
}
"""A configuration of each, by the name that the page has."""

REFUSED = {
    "GLoRA": (peft.GloraConfig(**LOW), r"not a plain torch\.nn\.Linear"),
    "target_parameters": (peft.LoraConfig(target_modules=[], target_parameters=["up_proj.weight"]), "target_param"),
}
"""With what PEFT says of a quantized linear."""


@pytest.fixture(scope="module")
def folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model that was saved. Read only."""
    saved = tmp_path_factory.mktemp("quantized")
    quantize(llama_folder, "w4a8", method="rtn").save_pretrained(saved)
    return saved


@pytest.mark.parametrize("method", list(WORK))
def test_an_adapter_is_trained_saved_and_put_back(folder, tmp_path, method):
    """After a step, the adapter on the base loaded anew computes the same bit for bit."""
    torch.manual_seed(0)
    batch = make_batch(folder)
    model = peft.get_peft_model(load(folder), WORK[method]).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    model.eval().save_pretrained(tmp_path)

    again = peft.PeftModel.from_pretrained(load(folder), tmp_path).eval()
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("method", list(REFUSED))
def test_what_peft_refuses_of_a_quantized_linear(folder, method):
    config, said = REFUSED[method]

    with pytest.raises(ValueError, match=said):
        peft.get_peft_model(load(folder), config)


def test_the_page_lists_each_method():
    page = (ROOT / "docs" / "how-to" / "lora.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("| other methods")]
    listed = row.split("|")[1].partition(":")[2].replace(" and ", ", ").split(",")

    named = {name.strip() for name in listed if name.strip()}
    assert named | {"LoRA", "DoRA"} == set(WORK)
    assert all(name in page for name in REFUSED)
