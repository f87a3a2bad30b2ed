"""Input that cannot be used: the right error, at once, and nothing written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, GPT2Config, GPT2LMHeadModel

from optimum_qvlm import QVLMConfig
from optimum_qvlm.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    DataError,
    SpecError,
    UnsupportedModelError,
)
from optimum_qvlm.files.atomic import WORK_MARK
from tests.jobs import contents, edit_config, load, logits, make_batch, quantize
from tests.tiny_models import llama_batch, tiny_llama

pytestmark = pytest.mark.integration

WEIGHTS = "model.safetensors"
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def source(llava_folder, tmp_path) -> Path:
    """A full-precision folder that a test may damage."""
    return Path(shutil.copytree(llava_folder, tmp_path / "source"))


@pytest.fixture
def saved(job, tmp_path) -> Path:
    """A quantized folder that a test may damage."""
    return Path(shutil.copytree(job("llava", "w4a8", symmetric=True).folder, tmp_path / "saved"))


def change_tensors(folder, change):
    """Rewrite the weights of `folder` after `change(state)`."""
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def refuse(error, message, folder, **arguments):
    """Quantizing `folder` raises and leaves it, and what is beside it, as it was."""
    before = contents(folder.parent)
    with pytest.raises(error, match=message):
        quantize(folder, **arguments)
    assert contents(folder.parent) == before
    assert not list(folder.parent.rglob(f"*{WORK_MARK}*"))


def record(**changes):
    return {"image": Image.new("RGB", (32, 32), "red"), "question": "what colour?", "answer": "red"} | changes


def test_a_group_that_does_not_divide_is_refused_with_those_that_do(source):
    refuse(SpecError, rf"{Q_PROJ}: group=48 does not divide in_features=64; use 64, 32, 16", source, group_size=48)


def test_a_group_of_an_override_that_does_not_divide_is_refused(source):
    overrides = {"*.down_proj": {"scheme": "w4a8", "group_size": 64}}

    refuse(SpecError, r"down_proj: group=64 does not divide in_features=96; use 32, 16", source, overrides=overrides)


@pytest.mark.parametrize("settings", [{"modules_to_not_convert": ["layers.99"]}, {"overrides": {"layers.99": "w8a8"}}])
def test_a_pattern_that_matches_nothing_is_refused_with_close_names(source, settings):
    refuse(ConfigError, r"'layers.99' matches no linear of the model; close: .*layers", source, **settings)


def test_keeping_everything_is_refused(source):
    refuse(UnsupportedModelError, "nothing is left to quantize", source, modules_to_not_convert=["*"])


def test_a_tied_output_embedding_cannot_be_quantized(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")

    message = "lm_head shares its weight with the input embedding and cannot be quantized alone"
    refuse(ConfigError, message, tmp_path / "tied", overrides={"lm_head": "w8a8"})


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)).save_pretrained(tmp_path)

    message = r"model_type 'gpt2' .* has no adapter.* holds no list of layers.*Known: .*llama, llava.*register_adapter"
    with pytest.raises(UnsupportedModelError, match=message):
        GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=QVLMConfig(dataset=[llama_batch()]))


@pytest.mark.parametrize(
    "dataset, message",
    [
        ([], "the calibration dataset is empty"),
        ([{"question": "a", "answer": "b"}], "none of the 1 calibration samples has an image"),
        ([{"picture": 1}], r"dataset\[0\] has the keys \['picture'\]; expected"),
        ([record(), 5], r"dataset\[1\] is a int; expected"),
        ([record(image=5)], r"dataset\[0\]: an image must be a PIL image or a file path, got int"),
        ([record(image="nowhere.png")], r"dataset\[0\]: the image nowhere.png cannot be read"),
        ("imagenet", "dataset 'imagenet' is not a preset; presets: chartqa, scienceqa, textvqa"),
        ({"question": "a"}, "dataset must be None, a preset's name, a list or a datasets.Dataset, got"),
        ([llama_batch()], "no calibration input holds an image token"),
    ],
    ids=["empty", "no image", "keys", "type", "no picture", "no file", "preset", "no list", "ready without image"],
)
def test_data_that_cannot_be_used_is_refused(source, dataset, message):
    refuse(DataError, message, source, dataset=dataset)


def test_a_corrupt_image_is_refused_by_number(source, tmp_path):
    path = tmp_path / "bad.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nxxxx")

    refuse(
        DataError, r"dataset\[1\]: the image .*bad.png cannot be read", source, dataset=[record(), record(image=path)]
    )


def test_a_truncated_image_is_refused_by_number(source, tmp_path):
    """Its header is fine, so it must be decoded to find out."""
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])

    refuse(DataError, r"dataset\[0\]: the image .*cut.png cannot be read", source, dataset=[record(image=path)])


def test_a_missing_processor_is_refused_with_both_ways_out(source):
    message = "no processor could be loaded from .*pass processor= to QVLMConfig, or ready model inputs"
    refuse(DataError, message, source, dataset=[record()])


def test_a_processor_can_be_passed_and_is_saved(bundled_folder, tmp_path):
    """The way out works: the saved folder is whole then."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copy(bundled_folder / name, source)
    processor = AutoProcessor.from_pretrained(bundled_folder)

    model = quantize(source, dataset=[record()], processor=processor, search_tokens=64)
    model.save_pretrained(tmp_path / "out")

    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert again.chat_template == processor.chat_template


@pytest.mark.parametrize(
    "name", [f"{Q_PROJ}.weight", "language_model.lm_head.weight", "multi_modal_projector.linear_1.bias"]
)
def test_a_source_that_lacks_a_tensor_is_refused(source, name):
    """transformers fills it at random with no more than a warning."""
    change_tensors(source, lambda state: state.pop(name))

    refuse(CheckpointError, "the checkpoint .*source lacks .*, so these weights are random; fetch it again", source)


@pytest.mark.parametrize("method", ["qvlm", "rtn"])
def test_tied_weights_may_be_missing_from_the_source(tmp_path, method):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")

    model = quantize(tmp_path / "tied", method=method)
    model.save_pretrained(tmp_path / "out")

    batch = make_batch(tmp_path / "tied")
    again = load(tmp_path / "out")
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert again.lm_head.weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("method", ["qvlm", "rtn"])
def test_nan_weights_are_refused(source, method):
    change_tensors(source, lambda state: state[f"{Q_PROJ}.weight"][0, 0].fill_(float("nan")))

    message = rf"{Q_PROJ}.weight holds 1 NaN or infinite values; the checkpoint is damaged"
    refuse(CalibrationError, message, source, method=method)


@pytest.mark.parametrize(
    "damaged",
    ["language_model.model.norm.weight", "layers.0.self_attn.q_proj.bias", "lm_head"],
    ids=["norm", "bias", "kept head"],
)
@pytest.mark.parametrize("method", ["qvlm", "rtn"])
def test_nan_is_refused_wherever_it_lies(source, damaged, method):
    """Also in what is not rounded, and where no sample runs through the model."""
    name = next(name for name in load_file(source / WEIGHTS) if damaged in name)
    change_tensors(source, lambda state: state[name].view(-1)[0].fill_(float("nan")))

    refuse(CalibrationError, r"holds 1 NaN or infinite values; the checkpoint is damaged", source, method=method)


@pytest.mark.parametrize("settings", [{}, {"error_feedback": False, "transforms": "off"}, {"method": "rtn"}])
def test_a_flipped_exponent_bit_is_refused_by_name_and_value(source, settings):
    """bfloat16 of -0.0089 becomes -3e36 with its highest exponent bit set: finite, but its square is not."""

    def flip(state):
        for key in state:
            state[key] = state[key].bfloat16()
        weight = state[f"{Q_PROJ}.weight"]
        weight[3, 5] = -0.0089
        weight.view(torch.int16)[3, 5] |= 1 << 14

    change_tensors(source, flip)

    message = rf"{Q_PROJ}.weight holds values up to 3.*e\+36, above 1e\+15.*the checkpoint is damaged"
    refuse(CalibrationError, message, source, **settings)


@pytest.mark.parametrize("size", [1e16, 1e20, 1e30])
@pytest.mark.parametrize("settings", [{}, {"error_feedback": False, "transforms": "off"}], ids=["feedback", "plain"])
def test_a_norm_beyond_reason_is_refused_by_the_site_that_reads_it(source, size, settings):
    """Its second moments overflow, which no damping of them mends."""
    norm = "language_model.model.layers.0.input_layernorm.weight"
    change_tensors(source, lambda state: state[norm].fill_(size))

    message = rf"the input of {Q_PROJ} holds values up to .*, above 1e\+15|infinite activations at .*layers.0"
    refuse(CalibrationError, message, source, **settings)


def test_outputs_that_overflow_are_refused_by_their_layer(source):
    """Inputs and weights may both be moderate where the square of their product is not."""

    def enlarge(state):
        state["language_model.model.layers.0.input_layernorm.weight"].fill_(1e13)
        state[f"{Q_PROJ}.weight"].mul_(1e11)

    change_tensors(source, enlarge)

    refuse(CalibrationError, r"language_model.model.layers.0.* (overflows|is inf|is nan)", source)


def test_nan_activations_are_refused_by_layer_and_batch(source):
    norm = "language_model.model.layers.1.input_layernorm.weight"
    change_tensors(source, lambda state: state[norm].fill_(float("inf")))

    message = r"NaN or infinite activations at language_model.model.layers.1 in calibration batch 0"
    refuse(CalibrationError, message, source)


@pytest.mark.parametrize("method", ["qvlm", "rtn"])
def test_a_pickled_source_is_refused(llama_folder, tmp_path, method):
    source = Path(shutil.copytree(llama_folder, tmp_path / "source"))
    torch.save(load_file(source / WEIGHTS), source / "pytorch_model.bin")
    (source / WEIGHTS).unlink()

    message = r"pytorch_model.bin is not a safetensors file, and pickled weights are not read; convert the checkpoint"
    refuse(CheckpointError, message, source, method=method)


def test_a_truncated_source_is_refused(source):
    os.truncate(source / WEIGHTS, (source / WEIGHTS).stat().st_size - 100)

    refuse(CheckpointError, f"{WEIGHTS} is damaged or truncated", source)


def load_refused(error, message, folder):
    before = contents(folder.parent)
    with pytest.raises(error, match=message):
        load(folder)
    assert contents(folder.parent) == before


def test_a_truncated_checkpoint_is_refused(saved):
    os.truncate(saved / WEIGHTS, (saved / WEIGHTS).stat().st_size - 100)

    load_refused(CheckpointError, f"{WEIGHTS} is damaged or truncated", saved)


@pytest.mark.parametrize(
    "tensor", [f"{Q_PROJ}.weight_scale", f"{Q_PROJ}.weight_packed", f"{Q_PROJ}.weight", "language_model.lm_head.weight"]
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused(saved, tensor):
    change_tensors(saved, lambda state: state.pop(tensor))

    load_refused(CheckpointError, f"tensor {tensor} is missing from the checkpoint's files; fetch it again", saved)


def test_a_checkpoint_with_a_tensor_too_many_is_refused(saved):
    change_tensors(saved, lambda state: state.update(extra=torch.ones(1)))

    load_refused(CheckpointError, "tensor extra is in the checkpoint's files but not in its manifest", saved)


@pytest.mark.parametrize("change", [lambda t: t[:-1].contiguous(), lambda t: t.half()], ids=["shape", "dtype"])
def test_a_checkpoint_with_a_changed_tensor_is_refused(saved, change):
    name = f"{Q_PROJ}.weight_scale"
    change_tensors(saved, lambda state: state.update({name: change(state[name])}))

    load_refused(CheckpointError, f"tensor {name} has dtype .* but was written with dtype F32", saved)


@pytest.mark.parametrize(
    "field, value",
    [("weight_bits", 8), ("activation_bits", None), ("activation_clip", 0.3), ("symmetric", False), ("site", "x")],
)
def test_a_tampered_entry_is_refused(saved, field, value):
    """Another precision than the saved one is never used without a word."""
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules"][Q_PROJ][field] = value
    path.write_text(json.dumps(config))

    load_refused(CheckpointError, "quantization_config was changed after saving .*; restore config.json", saved)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"scheme": "w8a8"}, CheckpointError, "quantization_config was changed after saving"),
        ({"format_version": 99}, ConfigError, "format version 99, .* reads up to 1; upgrade it"),
        ({"modules": None}, ConfigError, "the modules of quantization_config are not whole"),
        ({"modules": {}}, CheckpointError, "quantization_config was changed after saving"),
        ({"digest": None}, CheckpointError, "no record of a finished calibration"),
        ({"manifest": None}, CheckpointError, "no record of a finished calibration"),
        ({"scheme": "w9a9"}, SpecError, "unknown scheme 'w9a9'"),
        ({"sparsity": 0.5}, ConfigError, "unknown fields in quantization_config: sparsity"),
    ],
    ids=["scheme", "version", "no modules", "empty modules", "no digest", "no manifest", "bad scheme", "unknown field"],
)
def test_a_tampered_configuration_is_refused(saved, changes, error, message):
    edit_config(saved, **changes)

    load_refused(error, message, saved)


def test_weights_of_another_calibration_are_refused(saved, job):
    """Same model, same names; a mixed download."""
    shutil.copy(job("llava", "w6a6", symmetric=True).folder / WEIGHTS, saved / WEIGHTS)

    message = (
        "has dtype I32 and shape .* but was written with dtype I32|not in its manifest|missing from the checkpoint"
    )
    load_refused(CheckpointError, message, saved)


def test_full_precision_weights_under_a_quantized_configuration_are_refused(saved, llava_folder):
    shutil.copy(llava_folder / WEIGHTS, saved / WEIGHTS)

    load_refused(CheckpointError, "missing from the checkpoint's files", saved)


def test_errors_come_before_data_is_touched(source):
    """A wrong setting must not cost a download or a pass over the data."""

    class Untouchable(list):
        def __len__(self):
            raise AssertionError("the dataset was read")

    refuse(SpecError, "group=48 does not divide", source, group_size=48, dataset=Untouchable())
