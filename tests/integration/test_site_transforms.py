"""Transforms and error feedback through the whole path: calibrate, save, reload, dequantize."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.modules.swap import replace_module
from optimum_qvlm.quant.transform import SiteTransform
from tests.jobs import load, logits, make_batch, quantize
from tests.plans import plan_for
from tests.tiny_families import FAMILIES

pytestmark = pytest.mark.integration

KINDS = ["off", "equalize", "rotate", "both"]
NO_ROUNDING = 1e-4
"""Relative change of the logits in fp32, from other orders of summation alone."""


@pytest.fixture(
    params=[
        "llava",
        pytest.param("qwen2_5_vl", marks=pytest.mark.slow),
        pytest.param("smolvlm", marks=pytest.mark.slow),
        "llama",
    ]
)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Towers of the common shape, with windows and a merger, and with a pixel shuffle; and text alone."""
    FAMILIES[request.param].build().save_pretrained(tmp_path / "full")
    return tmp_path / "full"


class Transformed(nn.Module):
    """A linear behind a transform, with nothing rounded."""

    def __init__(self, linear: nn.Linear, transform: SiteTransform) -> None:
        super().__init__()
        self.transform, self.folded, self.bias = transform, transform.fold(linear.weight.detach()), linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self.transform.tokens(input), self.folded, self.bias)


def quantized_linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def kind_of(module: QuantLinear) -> str:
    found = (module.format.equalized, module.format.rotation is not None)
    return {(False, False): "off", (True, False): "equalize", (False, True): "rotate", (True, True): "both"}[found]


def change(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_without_rounding_transforms_leave_the_model_as_it_was(folder, kind):
    """With the transforms that calibration found on this model, in all linears at once."""
    full, batch = load(folder), make_batch(folder)
    transforms = {
        path: SiteTransform(module.input_equalizer, module.format.rotation)
        for path, module in quantized_linears(quantize(folder, "w4a4", transforms=kind)).items()
    }
    model = copy.deepcopy(full)

    for path, transform in transforms.items():
        replace_module(model, path, Transformed(model.get_submodule(path), transform))

    assert change(logits(model, batch), logits(full, batch)) < NO_ROUNDING


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_every_option_survives_saving_and_dequantizing(folder, kind, scheme, tmp_path):
    """Bit for bit, the transform's tensors included; dequantized weights are the plain ones."""
    batch = make_batch(folder)
    model = quantize(folder, scheme, transforms=kind)
    model.save_pretrained(tmp_path / "saved")

    reloaded = load(tmp_path / "saved")

    assert torch.equal(logits(reloaded, batch), logits(model, batch))
    before, after = quantized_linears(model), quantized_linears(reloaded)
    assert {path: kind_of(module) for path, module in before.items()} == {p: kind_of(m) for p, m in after.items()}
    if kind != "auto":
        cannot_rotate = {"rotate": "off", "both": "equalize"}.get(kind, kind)
        assert {kind_of(module) for module in before.values()} <= {kind, "off", cannot_rotate}
        assert any(kind_of(module) == kind for module in before.values())
    weights = {path: module.weight for path, module in after.items()}
    plain = reloaded.dequantize()
    assert all(torch.equal(plain.get_submodule(path).weight, weight) for path, weight in weights.items())


def test_linears_of_a_site_get_one_transform(folder):
    """They read one tensor, so a kernel transforms it once."""
    model = quantize(folder, "w4a4", transforms="both")

    recorded: dict[str, set[Any]] = {}
    for record in model.config.quantization_config.record.modules.values():
        recorded.setdefault(record.site, set()).add((record.format.equalized, record.format.rotation))
    assert all(len(found) == 1 for found in recorded.values())
    for site in plan_for(load(folder), "w4a4").sites():
        first, *others = [model.get_submodule(linear.path) for linear in site.linears]
        for other in others:
            assert other.format.rotation == first.format.rotation
            assert (other.input_equalizer is None) == (first.input_equalizer is None)
            assert first.input_equalizer is None or torch.equal(other.input_equalizer, first.input_equalizer)


@pytest.mark.parametrize("settings", [{"error_feedback": False}, {"effort": "fast"}, {"symmetric": False}])
def test_every_setting_stays_closer_than_round_to_nearest(folder, settings):
    """On the data of the search, at the model's output."""
    full, batches = load(folder), [make_batch(folder, seed=0, padding=2), make_batch(folder, seed=1)]
    searched = quantize(folder, "w4a4", **settings)
    symmetric = {name: value for name, value in settings.items() if name == "symmetric"}
    nearest = quantize(folder, "w4a4", method="rtn", dataset=None, **symmetric)

    def error(model: Any) -> float:
        return sum(change(logits(model, batch), logits(full, batch)) for batch in batches)

    assert error(searched) < error(nearest)


def test_a_servable_model_has_no_transform_in_its_forward(folder, tmp_path):
    """Runtimes that serve it cannot apply one. What norms took up is named, saved and reloaded."""
    before, batch = load(folder).state_dict(), make_batch(folder)
    model = quantize(folder, "w4a4", servable=True)
    model.save_pretrained(tmp_path / "saved")

    assert {kind_of(module) for module in quantized_linears(model).values()} == {"off"}
    assert not any("input_equalizer" in name for name in model.state_dict())
    assert torch.equal(logits(load(tmp_path / "saved"), batch), logits(model, batch))
    moved = {
        name for name, tensor in model.state_dict().items() if name in before and bool((tensor != before[name]).any())
    }
    folded = model.hf_quantizer.report["folded_into_norms"].values()
    assert {in_layer(name.removesuffix(".weight").removesuffix(".bias")) for name in moved} == set(
        map(in_layer, folded)
    )


def in_layer(name: str) -> str:
    """A name without what differs between disk and memory."""
    return name.rpartition("layers.")[2].rpartition("blocks.")[2]


def test_norms_take_up_what_outliers_need(tmp_path):
    """Channels that a norm makes large and the linears behind it small again: what one calibration can undo alone."""
    full = FAMILIES["llama"].build()
    with torch.no_grad():
        for layer in full.model.layers:
            for norm, linears in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[::9] *= 40
                for linear in linears:
                    linear.weight[:, ::9] /= 40
    full.save_pretrained(tmp_path / "full")
    batch = make_batch(tmp_path / "full")
    wanted = logits(full, batch)

    servable = quantize(tmp_path / "full", "w4a4", servable=True)
    plain = quantize(tmp_path / "full", "w4a4", transforms="off")

    assert len(servable.hf_quantizer.report["folded_into_norms"]) == 2 * len(full.model.layers)
    assert change(logits(servable, batch), wanted) < 0.5 * change(logits(plain, batch), wanted)
