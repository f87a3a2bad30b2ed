"""The checkpoint format: what is stored, what is asserted, how linears are swapped at load."""

import copy

import pytest
import torch
from torch import nn

from optimum_qvlm import QVLMConfig
from optimum_qvlm.errors import CheckpointError, ConfigError
from optimum_qvlm.hf.format.modules import (
    GUARD,
    packed_bytes,
    quantized_modules,
    quantized_skeleton,
    require_checkpoint,
    stored_state,
    swap_in_quantized,
)
from optimum_qvlm.hf.format.record import config_digest
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.pipeline.planner import make_plan
from tests.configs import make_config
from tests.jobs import load, quantize
from tests.tiny_models import tiny_llama, tiny_llava

IDENTITY = "0f" * 32

IDENTITY = "0123456789abcdef" * 4


def on_meta(model, dtype=torch.float32):
    """The same model without values."""
    with torch.device("meta"):
        return type(model)._from_config(model.config, dtype=dtype)


def read_config(folder, **changes):
    """The configuration in a saved folder, with `changes` and a digest that fits them."""
    values = load(folder).config.quantization_config.to_dict()
    values |= changes
    values["digest"] = config_digest(values)
    return QVLMConfig.from_dict(values)


def files_of(folder):
    return [str(path) for path in folder.glob("*.safetensors")]


def with_entry(folder, **changes):
    """`modules` of a saved folder with the first entry changed."""
    modules = load(folder).config.quantization_config.to_dict()["modules"]
    first = next(iter(modules))
    return first, modules | {first: modules[first] | changes}


def packed(model):
    """A copy with every weight in the layout of the checkpoint, as it is while the model is calibrated."""
    copied = copy.deepcopy(model)
    for module in quantized_modules(copied).values():
        module.pack()
    return copied


def test_every_quantized_linear_is_stored_with_guard_and_shape(quantized_llava):
    """The empty weight makes transformers without the plugin fail instead of leaving the linear random."""
    state = stored_state(quantized_llava, IDENTITY, {})

    for path, module in quantized_modules(quantized_llava).items():
        assert state[f"{path}.weight"].numel() == 0
        assert state[f"{path}.weight_shape"].tolist() == [module.out_features, module.in_features]
        assert torch.equal(state[f"{path}.weight_packed"], module.packed_state()["weight_packed"])
    assert bytes(state[GUARD].tolist()).hex() == IDENTITY


def test_nothing_is_stored_as_a_full_weight_that_is_packed(quantized_llava):
    """A forgotten full weight would cost what quantization saves."""
    linears = set(quantized_modules(quantized_llava))

    full = {
        name
        for name, t in stored_state(quantized_llava, IDENTITY, {}).items()
        if name.endswith(".weight") and t.numel()
    }

    assert not {name.removesuffix(".weight") for name in full} & linears


def test_storing_leaves_the_model_as_it_is(quantized_llava):
    before = list(quantized_llava.state_dict())

    stored_state(quantized_llava, IDENTITY, {})

    assert list(quantized_llava.state_dict()) == before


def test_a_saved_folder_is_accepted(quantized_folder):
    config = read_config(quantized_folder)

    assert require_checkpoint(config, files_of(quantized_folder)) is config.record


def test_a_configuration_without_a_record_is_refused(quantized_folder):
    """A config.json that asks for quantization beside weights that never were."""
    with pytest.raises(CheckpointError, match="no record of a finished calibration"):
        require_checkpoint(QVLMConfig(), files_of(quantized_folder))


@pytest.mark.parametrize("field", ["manifest", "digest"])
def test_a_record_without_its_seal_is_refused(quantized_folder, field):
    config = read_config(quantized_folder)
    setattr(config.record, field, None)

    with pytest.raises(CheckpointError, match="no record of a finished calibration"):
        require_checkpoint(config, files_of(quantized_folder))


def test_a_changed_setting_is_refused(quantized_folder):
    """The tensors would be read with another meaning."""
    values = load(quantized_folder).config.quantization_config.to_dict() | {"symmetric": False}

    with pytest.raises(CheckpointError, match=r"quantization_config was changed after saving .*; restore config.json"):
        require_checkpoint(QVLMConfig.from_dict(values), files_of(quantized_folder))


@pytest.mark.parametrize(
    "changes",
    [{"weight_bits": 6}, {"weight_group": 7}, {"symmetric": False}, {"scale_dtype": "float16"}, {"in_features": 65}],
    ids=lambda changes: next(iter(changes)),
)
def test_an_entry_that_does_not_fit_its_tensors_is_refused(quantized_folder, changes):
    """Also with a digest that fits: files of two calibrations may have been mixed."""
    name, modules = with_entry(quantized_folder, **changes)
    config = read_config(quantized_folder, modules=modules)

    with pytest.raises(CheckpointError, match=rf"{name}.*(need|not valid|does not divide)"):
        require_checkpoint(config, files_of(quantized_folder))


@pytest.mark.parametrize(
    "settings, field, tensor",
    [
        ({"transforms": "equalize"}, "equalized", "input_equalizer"),
        ({"symmetric": False}, "symmetric", "weight_zero_point"),
        ({"transforms": "off", "activation_range": "static"}, "activation_static", "input_scale"),
    ],
    ids=["equalizer", "zero point", "static scale"],
)
def test_an_entry_that_forgets_a_tensor_is_refused(llama_folder, tmp_path, settings, field, tensor):
    """Without that tensor the product means something else, and nothing would fail."""
    quantize(llama_folder, "w4a4", **settings).save_pretrained(tmp_path)
    name = next(n for n in read_config(tmp_path).record.manifest if n.endswith(tensor)).removesuffix(f".{tensor}")
    modules = read_config(tmp_path).to_dict()["modules"]
    modules[name][field] = field == "symmetric"
    config = read_config(tmp_path, modules=modules)

    with pytest.raises(CheckpointError, match=rf"{name}\.{tensor} is in the checkpoint, but its entry .* says nothing"):
        require_checkpoint(config, files_of(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [{"weight_bits": 99}, {"weight_group": 0}],
    ids=["bits", "group"],
)
def test_an_entry_that_means_nothing_is_refused(quantized_folder, changes):
    name, modules = with_entry(quantized_folder, **changes)

    with pytest.raises(ConfigError, match=f"{name}: its entry in quantization_config is not valid"):
        read_config(quantized_folder, modules=modules)


def test_weights_of_another_calibration_are_refused(quantized_folder, llava_folder, tmp_path):
    """Same model, same scheme, same shapes: only the identity in the weights tells a mixed download."""
    quantize(llava_folder, max_length=2047).save_pretrained(tmp_path / "other")

    with pytest.raises(CheckpointError, match=r"the weights were not written together with config.json .* mixes two"):
        require_checkpoint(load(quantized_folder).config.quantization_config, files_of(tmp_path / "other"))


def test_recorded_linears_are_swapped_and_no_others(quantized_llava):
    model = on_meta(tiny_llava())
    plain = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}

    swap_in_quantized(model, quantized_llava.config.quantization_config.record)

    swapped = quantized_modules(model)
    assert set(swapped) == set(quantized_modules(quantized_llava))
    assert set(swapped) <= plain
    assert all(parameter.is_meta for module in swapped.values() for parameter in module.parameters())
    assert type(model.lm_head) is nn.Linear


def test_swapped_linears_have_the_recorded_precision(quantized_llava):
    model = on_meta(tiny_llava())

    swap_in_quantized(model, quantized_llava.config.quantization_config.record)

    expected = quantized_modules(packed(quantized_llava))
    for path, module in quantized_modules(model).items():
        assert module.format == expected[path].format
        assert {n: (t.shape, t.dtype) for n, t in module.state_dict().items()} == {
            n: (t.shape, t.dtype) for n, t in expected[path].state_dict().items()
        }


def test_a_recorded_linear_that_the_model_lacks_is_refused(quantized_llava):
    """Loading a vision-language checkpoint as a text model, say."""
    with pytest.raises(
        CheckpointError, match="is quantized in the checkpoint, but LlamaForCausalLM has no such linear"
    ):
        swap_in_quantized(on_meta(tiny_llama()), quantized_llava.config.quantization_config.record)


def test_a_recorded_linear_of_other_sizes_is_refused(quantized_llava):
    """config.json changed after saving."""
    model = on_meta(tiny_llava(text={"intermediate_size": 128}))

    with pytest.raises(CheckpointError, match="has 96x64 weights in the checkpoint, 128x64 in the model"):
        swap_in_quantized(model, quantized_llava.config.quantization_config.record)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("scheme", ["w4a8", "w6a6", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_skeleton_is_as_large_as_the_real_result(llava_folder, scheme, symmetric, dtype):
    """Device maps are made from it before calibration, so it must tell the truth."""
    settings = {"symmetric": symmetric, "method": "rtn"}
    real = packed(quantize(llava_folder, scheme, options={"dtype": dtype}, **settings))
    model = on_meta(tiny_llava(), dtype)
    names = {path: path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    plan = make_plan(adapter_for(model), make_config(scheme, **settings).options(), names)

    skeleton = quantized_skeleton(model, plan)

    assert packed_bytes(skeleton) == packed_bytes(real)
    assert set(skeleton.state_dict()) == set(real.state_dict())
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not quantized_modules(model), "the model itself must stay as it is"


def test_bytes_count_shared_tensors_once():
    model = tiny_llama(tie_word_embeddings=True)
    untied = tiny_llama()

    assert packed_bytes(untied) - packed_bytes(model) == 4 * model.lm_head.weight.numel()


def test_quantized_modules_are_found_in_a_copy(quantized_llava):
    copied = copy.deepcopy(quantized_llava)

    assert set(quantized_modules(copied)) == set(quantized_modules(quantized_llava))
    assert all(isinstance(module, QuantLinear) for module in quantized_modules(copied).values())


def test_weights_of_another_save_are_refused(quantized_folder, tmp_path):
    """A crash between two renames, or a partial copy, may put weights beside the wrong config.json."""
    files = files_of(quantized_folder)
    config = read_config(quantized_folder, seed=7)

    with pytest.raises(CheckpointError, match=r"not written together with config.json.*the folder mixes two saves"):
        require_checkpoint(config, files)
