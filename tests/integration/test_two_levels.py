"""A whole model with scales on two levels: calibrated, saved, reloaded, and refused where the scales are others."""

import pytest
import torch

from optimum_qvlm import fuse_linears
from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.format.modules import prepare_modules, quantized_modules
from optimum_qvlm.kernels import dispatch
from optimum_qvlm.kernels.levels import common_step
from optimum_qvlm.kernels.triton import linear as triton_linear
from optimum_qvlm.modules.fused import JointLinear
from tests.jobs import load, logits, make_batch, quantize

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=["qvlm", "rtn"])
def saved(request, llava_folder, tmp_path_factory):
    """The model and its folder."""
    settings = {"dataset": None} if request.param == "rtn" else {"effort": "balanced"}
    settings |= {"two_level_scales": True, "group_size": 16, "method": request.param}
    model = quantize(llava_folder, options={"dtype": torch.bfloat16}, **settings)
    folder = tmp_path_factory.mktemp("levels")
    model.save_pretrained(folder)
    return model, folder


def language(model):
    """Its quantized linears by name."""
    return {name: module for name, module in quantized_modules(model).items() if "language" in name}


def test_scales_of_the_language_model_are_multiples_and_recorded(saved):
    """Whatever the method; the tower keeps its own."""
    model, _ = saved
    records = model.config.quantization_config.record.modules

    assert {name for name, record in records.items() if record.weight.two_level} == {
        name for name in records if "language" in name
    }
    assert language(model)
    for module in language(model).values():
        scale = module.quantized().scale
        assert module.grid.weight.two_level
        assert scale.dtype == torch.bfloat16 and len(common_step(scale)) == module.out_features


def test_a_reloaded_model_is_the_same(saved):
    """The setting and the grids come back with it."""
    model, folder = saved
    batch = make_batch(folder)

    again = load(folder, dtype=torch.bfloat16)

    assert torch.equal(logits(again, batch), logits(model, batch))
    assert again.config.quantization_config.two_level_scales is True
    assert all(module.format.weight.two_level for module in language(again).values())


def test_the_layout_of_a_gpu_is_undone_without_a_trace(saved):
    """What a GPU would save has the bytes that it loaded."""
    _, folder = saved
    for module in language(load(folder, dtype=torch.bfloat16)).values():
        before = {name: tensor.clone() for name, tensor in module.packed_state().items()}

        module.put_into(triton_linear.LAYOUT)

        assert module.weight_scale.shape[0] > module.grid.groups
        after = module.packed_state()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_fused_linears_have_the_steps_of_all_their_rows(saved):
    """Each row has its own, so that nothing is lost by lying together."""
    _, folder = saved
    model = load(folder, dtype=torch.bfloat16)
    before = {path: module.packed_state() for path, module in language(model).items()}
    fuse_linears(model)
    joints = [module for module in model.modules() if isinstance(module, JointLinear) and module.grid.weight.two_level]

    for joint in joints:
        joint.put_into(triton_linear.LAYOUT)
        assert joint.weight_scale.shape[1] == joint.out_features

    assert joints
    for path, module in language(model).items():
        assert all(torch.equal(before[path][name], tensor) for name, tensor in module.packed_state().items())


def test_scales_that_are_no_multiples_are_refused_with_their_module(saved, monkeypatch):
    """A damaged checkpoint would be computed wrongly on a GPU, so its layout is not made."""
    _, folder = saved
    model = load(folder, dtype=torch.bfloat16)
    path, module = next(iter(language(model).items()))
    module.pack().weight_scale.data[3, 0] *= 1.5078125
    module.weight_scale.data[3, 1:] = 0.3

    monkeypatch.setattr(dispatch, "choose_layout", lambda *_: triton_linear.LAYOUT)

    with pytest.raises(CheckpointError, match=f"{path}: scales of row 3 are not multiples of one step"):
        prepare_modules(model, 16)
