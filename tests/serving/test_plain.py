"""Linears that a server computes in full precision, from a saved checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file

from optimum_qvlm import QVLMConfig
from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.format.record import read_record
from optimum_qvlm.serving.plain import dequantized
from tests.jobs import load, quantize


@pytest.fixture(scope="module")
def saved(llava_folder, tmp_path_factory):
    """A saved model with transforms and zero points: its tensors, its record, and the weights they stand for."""
    folder = tmp_path_factory.mktemp("plain")
    model = quantize(llava_folder, "w4a8", transforms="both", symmetric=False, effort="fast")
    model.save_pretrained(folder / "quantized")
    load(folder / "quantized", quantization_config=QVLMConfig(dequantize=True)).save_pretrained(folder / "plain")
    values = json.loads((folder / "quantized" / "config.json").read_text())["quantization_config"]
    files = (load_file(folder / name / "model.safetensors") for name in ("quantized", "plain"))
    return *files, read_record(values).modules


def test_linears_are_dequantized_and_others_pass(saved):
    stored, plain, modules = saved
    some = {name: entry for name, entry in modules.items() if "projector" in name or name.endswith("down_proj")}
    assert some

    passed = dict(dequantized(stored.items(), some))

    for name in some:
        assert torch.equal(passed.pop(f"{name}.weight"), plain[f"{name}.weight"]), name
        assert not any(f"{name}.{kind}" in passed for kind in ("weight_packed", "weight_shape", "input_equalizer"))
    kept = {
        name: tensor for name, tensor in stored.items() if name.endswith("bias") or name[: name.rfind(".")] not in some
    }
    assert passed.keys() == kept.keys() and all(passed[name] is tensor for name, tensor in kept.items())


def test_a_linear_that_is_not_whole_is_refused_by_name(saved):
    stored, _, modules = saved
    name = next(iter(modules))
    rest = {tensor: value for tensor, value in stored.items() if tensor != f"{name}.weight_scale"}
    with pytest.raises(CheckpointError, match=f"not all tensors of {name} were loaded"):
        dict(dequantized(rest.items(), modules))
    assert dict(dequantized([], modules)) == {}  # a part of the model that has none of them
