"""Exported folders, read by compressed-tensors itself and by transformers without this package."""

import json
import re
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from optimum_qvlm import QVLMConfig, export_compressed_tensors
from optimum_qvlm.errors import ConfigError
from tests.jobs import contents, load, logits, make_batch, quantize, run_python
from tests.tiny_families import FAMILIES

SCHEMES = {
    "w4a16": {"scheme": "w4a16", "vision_scheme": "w4a16"},
    "w8a8": {"scheme": "w8a8"},
    "w4a4 in groups with zero points": {"scheme": "w4a4", "group_size": 32, "symmetric": False},
    "fixed ranges, and exceptions": {
        "scheme": "w4a8",
        "activation_range": "static",
        "method": "layerwise",
        "overrides": {"down_proj": "w8a8", "o_proj": None, "fc2": "w6a6"},
    },
}
PLAIN_READER = """
import sys, torch
from transformers import {auto_class}
model, report = {auto_class}.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(report.values()), report
batch = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**batch).logits, sys.argv[3])
assert not any(name.startswith("optimum_qvlm") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A full-precision vision-language model. Read only."""
    folder = tmp_path_factory.mktemp("export") / "full"
    FAMILIES["llava"].build().save_pretrained(folder)
    return folder


def servable(folder, **settings):
    return quantize(folder, servable=True, **({"method": "rtn"} | settings))


def configuration(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def read_weights(folder):
    """The dequantized weights of an exported folder by the names of their tensors, by compressed-tensors."""
    config = QuantizationConfig.model_validate(configuration(folder))
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for scheme in config.config_groups.values():
        for name in scheme.targets:
            own = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}
            if own:
                reader = BaseCompressor.get_value_from_registry(scheme.format)
                weights[name] = reader.decompress(own, scheme)["weight"]
    return weights


@pytest.mark.parametrize("settings", SCHEMES.values(), ids=SCHEMES.keys())
def test_compressed_tensors_reads_the_weights_bit_for_bit(llava, settings, tmp_path):
    model = servable(llava, **settings)
    export_compressed_tensors(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "ours")
    load(tmp_path / "ours", quantization_config=QVLMConfig(dequantize=True)).save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")

    weights = read_weights(tmp_path / "out")

    modules = configuration(tmp_path / "ours")["modules"]
    assert {name.replace("vision_tower.vision_model.", "vision_tower.") for name in weights} == modules.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, plain[f"{name.replace('vision_tower.vision_model.', 'vision_tower.')}.weight"]), name


@pytest.mark.parametrize(("scheme", "near"), [("w4a16", 1e-5), ("w8a8", 0.02)])
def test_transformers_computes_the_same_without_this_package(llava, scheme, near, tmp_path):
    """Activations of 8 bits are rounded with a step that differs by 0.4 %."""
    model, batch = servable(llava, scheme=scheme, vision_scheme=scheme), make_batch(llava)
    export_compressed_tensors(model, tmp_path / "out")
    torch.save(batch, tmp_path / "batch.pt")

    code = PLAIN_READER.format(auto_class=FAMILIES["llava"].auto_class.__name__)
    done = run_python(code, tmp_path / "out", tmp_path / "batch.pt", tmp_path / "logits.pt")

    assert done.returncode == 0, done.stderr
    ours = logits(exact(model), batch)
    assert (torch.load(tmp_path / "logits.pt") - ours).norm() < near * ours.norm()


def exact(model):
    """Rounds activations however few tokens there are."""
    for module in model.modules():
        if hasattr(module, "decode_tokens"):
            module.decode_tokens = 0
    return model


def test_names_are_those_that_servers_know(llava, tmp_path):
    """The tower lies in `vision_model` for them, and processor files lie beside the weights."""
    (llava / "preprocessor_config.json").write_text("{}")
    names = export_compressed_tensors(servable(llava, scheme="w4a16"), tmp_path / "out", max_shard_size="100KB")

    shards = sorted(name for name in names if name.endswith(".safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and sorted(set(index["weight_map"].values())) == shards
    actual = {name: shard for shard in shards for name in load_file(tmp_path / "out" / shard)}
    assert actual == index["weight_map"]
    tower = [name for name in actual if "vision_tower" in name]
    assert tower and all("vision_tower.vision_model." in name for name in tower)
    assert not any("optimum" in name for name in actual)
    assert "preprocessor_config.json" in names and "README.md" not in names


def test_what_the_format_has_no_words_for_is_refused_by_name(llava, tmp_path):
    model = quantize(llava, method="layerwise", scheme="w4a8", transforms="rotate", effort="fast")
    with pytest.raises(ConfigError, match=r"cannot express .*q_proj \(its activations are rotated .*servable=True"):
        export_compressed_tensors(model, tmp_path / "out")

    model = servable(llava, scheme="w8a8")
    modules = model.hf_quantizer.config.record.modules
    name = next(iter(modules))
    clipped = replace(modules[name].format, activation_clip=0.9)
    modules[name] = replace(modules[name], format=clipped)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} \(its activations are clipped at 0\.9 of their peak"):
        export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_on_a_grid_that_servers_do_not_know_are_refused(llava, tmp_path):
    """A server would take the peak of each token, and round to other values in silence."""
    model = quantize(llava, "w4a4", method="rtn", fitted_activations=True)

    with pytest.raises(ConfigError, match=r"cannot express .*the scales of its activations are fitted.*servable=True"):
        export_compressed_tensors(model, tmp_path / "out")


def test_parts_of_what_servers_fuse_need_one_scheme(llava, tmp_path):
    model = servable(llava, scheme="w4a16", overrides={"layers.1.self_attn.k_proj": "w8a8"})
    with pytest.raises(ConfigError, match=r"q_proj, .*k_proj, .*v_proj are one linear to servers"):
        export_compressed_tensors(model, tmp_path / "out")

    model = servable(llava, scheme="w4a16", overrides={"layers.1.mlp.up_proj": None})
    with pytest.raises(ConfigError, match=r"gate_proj, .*up_proj are one linear to servers"):
        export_compressed_tensors(model, tmp_path / "out")


def test_a_model_that_is_not_quantized_is_refused(llava, tmp_path):
    with pytest.raises(ConfigError, match="LlavaForConditionalGeneration is not quantized with qvlm"):
        export_compressed_tensors(load(llava), tmp_path / "out")


def test_an_export_takes_the_place_of_a_saved_model_as_a_whole(llava, tmp_path):
    """And what cannot be written leaves it."""
    model = servable(llava, scheme="w4a16")
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError):
        export_compressed_tensors(load(llava), tmp_path / "out")
    assert contents(tmp_path / "out") == before

    export_compressed_tensors(model, tmp_path / "out")

    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert configuration(tmp_path / "out")["quant_method"] == "compressed-tensors"


def test_the_command_writes_it(llava, tmp_path):
    words = ["export", "qvlm", "--model", llava, "--scheme", "w8a8", "--method", "rtn", "--servable"]
    code = "import sys; from optimum.commands.optimum_cli import main; sys.exit(main())"

    done = run_python(code, *words, "--format", "compressed-tensors", tmp_path / "out")

    assert done.returncode == 0, done.stderr
    assert configuration(tmp_path / "out")["format"] == "int-quantized"
    assert set(read_weights(tmp_path / "out"))
