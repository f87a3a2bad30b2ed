"""Every family, from a full-precision folder to a reloaded model, under schemes and settings."""

import pytest
import torch

from optimum_qvlm import QVLMConfig
from optimum_qvlm.hf.format.modules import quantized_modules
from tests.family_cases import examine
from tests.tiny_families import FAMILIES, ODD_WIDTH

pytestmark = pytest.mark.integration

EVERY = pytest.mark.parametrize("name", list(FAMILIES))
SETTINGS = {
    "vision in full precision": {"vision_scheme": None},
    "vision at 4 bits": {"vision_scheme": "w4a4"},
    "groups of 16": {"group_size": 16},
    "whole rows": {"group_size": None},
    "zero points": {"symmetric": False},
    "first layer kept": {"modules_to_not_convert": ["layers.0"]},
    "override": {"overrides": {"layers.1.mlp.down_proj": {"scheme": "w3a8", "group_size": 32, "symmetric": False}}},
    "head": {"overrides": {"lm_head": "w8a8"}},
    "no transforms": {"transforms": "off"},
    "equalized": {"transforms": "equalize"},
    "rotated": {"transforms": "rotate"},
    "equalized and rotated": {"transforms": "both"},
    "no feedback": {"error_feedback": False},
    "fast": {"effort": "fast"},
    "servable": {"servable": True},
    "static ranges": {"activation_range": "static"},
    "blocks of one": {"max_block_depth": 1, "threshold": 0.0},
    "blocks of four": {"max_block_depth": 4, "threshold": 1e9, "soft_assignment": "step"},
    "layer-wise": {"method": "layerwise"},
    "own clips": {"activation_clips": [1.0, 0.9], "weight_clips": [1.0, 0.8]},
    "few tokens": {"search_tokens": 3, "seed": 5, "num_samples": 1, "batch_size": 1},
}


@EVERY
def test_a_family_is_quantized_reported_as_it_is_and_reloaded_bit_for_bit(name, tmp_path):
    """The reported error comes from the chain of quantized layers, so it is right only if the chain is."""
    seen = examine(FAMILIES[name], tmp_path)

    assert seen.reload_exact
    assert seen.chain < 1e-6
    assert seen.reported == pytest.approx(seen.real, rel=1e-3)
    assert seen.real > 0


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("scheme", ["w4a16", "w4a4", "w6a6", "w8a8"])
def test_so_it_is_under_every_scheme(name, scheme, tmp_path):
    seen = examine(FAMILIES[name], tmp_path, scheme)

    assert seen.reload_exact
    assert seen.reported == pytest.approx(seen.real, rel=1e-3)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_so_it_is_under_every_setting(name, settings, tmp_path):
    seen = examine(FAMILIES[name], tmp_path, **settings)

    assert seen.reload_exact
    if "num_samples" not in settings:
        assert seen.agreed(), (seen.reported, seen.real)


@EVERY
def test_without_data_all_linears_are_rounded_but_the_head(name, tmp_path):
    """What no part holds would stay in full precision, and nobody asked for that."""
    seen = examine(FAMILIES[name], tmp_path, "w4a4", method="rtn", dataset=None)

    assert seen.reload_exact
    assert seen.report["sites"] == []
    (kept,) = seen.report["kept_in_full_precision"]
    assert kept.endswith("lm_head")
    assert len(quantized_modules(seen.reloaded)) == len(seen.report["modules"])


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_layers_that_nothing_reads_are_reported_and_packed(name, tmp_path):
    """Nothing can be measured on them, but their bytes count and a reload must be whole."""
    seen = examine(FAMILIES[name], tmp_path)

    (unused,) = seen.report["unused"]
    assert unused == "vision_tower.encoder.layers.2"
    assert unused not in {entry["layer"] for entry in seen.report["layers"]}
    entries = [entry for module, entry in seen.report["modules"].items() if module.startswith(unused)]
    assert len(entries) == 6
    assert all((entry["weight_bits"], entry["weight_clip"], entry["activation_clip"]) == (8, 1, 1) for entry in entries)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_widths_that_no_group_divides_share_whole_rows(name, tmp_path):
    """The real towers have 3420 channels inside their MLP, which no group size divides."""
    seen = examine(FAMILIES[name], tmp_path, vision_scheme="w4a4", method="rtn")

    groups = {entry["in_features"]: entry["weight_group"] for entry in seen.report["modules"].values()}
    assert groups[ODD_WIDTH] is None
    assert groups[64] == 64


def test_deepstack_features_come_from_the_quantized_tower(tmp_path):
    """Full-precision ones in the quantized chain would hide what the tower's rounding does to the decoder."""
    coarse = examine(FAMILIES["qwen3_vl"], tmp_path / "coarse", "w8a8", vision_scheme="w2a4")
    fine = examine(FAMILIES["qwen3_vl"], tmp_path / "fine", "w8a8", vision_scheme="w8a8")

    assert coarse.reported == pytest.approx(coarse.real, rel=1e-3)
    assert coarse.reported > 10 * fine.reported
    parts = {entry["part"] for entry in coarse.report["layers"]}
    assert parts == {"vision", "deepstack 0", "deepstack 1", "projector", "language"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "smolvlm"])
def test_half_precision_checkpoints_reload_exactly(name, dtype, tmp_path):
    """They are what the Hub has."""
    family = FAMILIES[name]
    family.build(dtype).save_pretrained(tmp_path / "full")
    batch = {n: t.to(dtype) if t.is_floating_point() else t for n, t in family.batch().items()}
    config = QVLMConfig("w4a8", dataset=[batch])
    model = family.auto_class.from_pretrained(tmp_path / "full", quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")

    reloaded = family.auto_class.from_pretrained(tmp_path / "quantized")

    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
