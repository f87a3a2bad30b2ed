"""Models whose linears are fused: what they compute, what they save, and what is refused."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import attach_execution_device_hook
from transformers import GenerationConfig

from optimum_qvlm import fuse_linears, unfuse_linears
from optimum_qvlm.errors import ConfigError
from optimum_qvlm.hf.format.modules import packed_bytes, quantized_modules
from optimum_qvlm.modules.fused import FusedLinear
from optimum_qvlm.modules.qlinear import QuantLinear
from tests.jobs import contents, load, logits, make_batch, quantize
from tests.tiny_families import FAMILIES

pytestmark = pytest.mark.integration

ATTENTION = ("q_proj", "k_proj", "v_proj")
QUICK = ("llava", "qwen2_5_vl", "llama")
GREEDY = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folders of each family rounded to nearest, made once. Read only."""
    done = {}

    def quantized(name, **settings):
        key = (name, *sorted(map(str, settings.items())))
        if key not in done:
            source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("saved")
            FAMILIES[name].build().save_pretrained(source)
            quantize(source, method="rtn", dataset=None, **settings).save_pretrained(folder)
            done[key] = folder
        return done[key]

    return quantized


def groups_of(outcome) -> set[tuple[str, ...]]:
    """Names within their parents."""
    return {tuple(path.rpartition(".")[2] for path in paths) for paths in outcome.groups}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_computes_generates_and_saves_the_same(name, saved, tmp_path):
    """Tower and decoder, prefill and decoding. No file of a save may tell whether the model was fused."""
    folder = saved(name)
    model, fused, batch = load(folder), load(folder), make_batch(folder)
    outcome = fuse_linears(fused)
    assert ATTENTION in groups_of(outcome) and not outcome.apart
    assert any(isinstance(module, FusedLinear) for module in fused.modules())

    assert torch.equal(logits(fused, batch), logits(model, batch))
    tokens = [m.generate(**batch, generation_config=GREEDY) for m in (model, fused)]
    assert torch.equal(*tokens)

    fused.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"symmetric": False},
        {"overrides": {"*": "w3a8"}},
        {"transforms": "both", "method": "layerwise"},
        {"activation_range": "static", "method": "layerwise"},
    ],
    ids=["zero points", "three bits", "transforms", "static"],
)
def test_every_kind_of_format_is_saved_as_it_was_calibrated(llava_folder, tmp_path, settings):
    """In shards, and through a model that was just calibrated rather than loaded."""
    model = quantize(llava_folder, **settings)
    model.save_pretrained(tmp_path / "alone", max_shard_size="20KB")
    expected = logits(model, make_batch(llava_folder))

    fuse_linears(model)

    torch.testing.assert_close(logits(model, make_batch(llava_folder)), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "fused", max_shard_size="20KB")
    assert len(contents(tmp_path / "alone")) > 5
    assert contents(tmp_path / "fused") == contents(tmp_path / "alone")


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_it_compiles_whole(name, saved):
    """One graph, with one product where there were two or three."""
    model, batch = load(saved(name)), make_batch(saved(name))
    ids = batch["input_ids"] if name == "llama" else None
    layer, counts = model.get_decoder(), []
    x = layer.embed_tokens(ids) if ids is not None else torch.randn(1, 7, layer.config.hidden_size)

    def count(graph, _):
        counts.append(sum("optimum_qvlm.linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    with torch.no_grad():
        expected = layer(inputs_embeds=x, use_cache=False).last_hidden_state
        for fuses in (False, True):
            if fuses:
                fuse_linears(model)
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, backend=count)
            assert torch.equal(compiled(inputs_embeds=x, use_cache=False).last_hidden_state, expected)
    layers = layer.config.num_hidden_layers
    assert counts == [7 * layers, 4 * layers]


def test_a_loaded_model_takes_no_more_memory(saved):
    """The parts are gone; joint tables have fewer blocks that are not full."""
    model = load(saved("llava"))
    before = packed_bytes(model)

    fuse_linears(model)

    assert packed_bytes(model) <= before


def test_fusing_twice_and_undoing_it(saved):
    model, batch = load(saved("llava")), make_batch(saved("llava"))
    expected = logits(model, batch)
    first = fuse_linears(model)

    assert fuse_linears(model).groups == first.groups
    unfuse_linears(model)

    assert all(type(module) is QuantLinear for module in quantized_modules(model).values())
    assert not any("joint" in name for name, _ in model.named_modules())
    assert torch.equal(logits(model, batch), expected)


def test_a_fused_model_is_dequantized_like_any_other(saved):
    model, fused, batch = load(saved("llama")), load(saved("llama")), make_batch(saved("llama"))
    fuse_linears(fused)

    actual, expected = fused.dequantize(), model.dequantize()

    assert not any(isinstance(module, QuantLinear) for module in actual.modules())
    assert not any("joint" in name for name, _ in actual.named_modules())
    assert torch.equal(logits(actual, batch), logits(expected, batch))


def test_gradients_reach_what_lies_before_a_fused_model(saved):
    """Prompts, adapters and the encoder step train through it."""
    models = [load(saved("llama")) for _ in range(2)]
    fuse_linears(models[1])
    actual = []
    for model in models:
        x = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model.train()
        model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        actual.append(x.grad)

    torch.testing.assert_close(*actual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_that_keeps_the_model_in_memory_is_fine(saved, device_map):
    model = load(saved("llava"), device_map=device_map)

    assert fuse_linears(model).groups


def test_hooks_that_move_inputs_go_on(saved):
    """On several devices, each linear has one; their inputs come from elsewhere only where a map is that fine."""
    model, batch = load(saved("llama")), make_batch(saved("llama"))
    expected = logits(model, batch)
    attach_execution_device_hook(model, "cpu")

    outcome = fuse_linears(model)

    assert outcome.groups and not outcome.apart
    joint = model.get_submodule(outcome.groups[0][0]).joint
    assert joint._hf_hook.execution_device == "cpu"
    assert torch.equal(logits(model, batch), expected)
    unfuse_linears(model)
    assert model.get_submodule(outcome.groups[0][0])._hf_hook.execution_device == "cpu"
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_models_are_refused(saved, tmp_path, offload):
    """Their weights come for one call of one module at a time."""
    options = {"offload_dir": str(tmp_path)} if offload is disk_offload else {}
    model = offload(load(saved("llama")), execution_device="cpu", **options)

    with pytest.raises(ConfigError, match=r"is offloaded or not loaded, .* device_map that keeps it in memory"):
        fuse_linears(model)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_a_fused_model_cannot_be_offloaded(saved, tmp_path, offload):
    """The first call of the model would otherwise fail for want of a weight."""
    options = {"offload_dir": str(tmp_path)} if offload is disk_offload else {}
    model = load(saved("llama"))
    fuse_linears(model)

    with pytest.raises(ConfigError, match=r"fused linears cannot be offloaded; call optimum_qvlm.unfuse_linears"):
        offload(model, execution_device="cpu", **options)


def test_a_model_that_came_by_disk_offload_is_refused(saved, tmp_path):
    on_cpu = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(on_cpu, "cpu") | {"model.layers": "disk"}
    model = load(saved("llama"), device_map=device_map, offload_folder=str(tmp_path))

    with pytest.raises(ConfigError, match=r"is offloaded or not loaded"):
        fuse_linears(model)


def test_formats_that_differ_within_a_site_are_left_apart(llama_folder, tmp_path):
    """One kernel call has one format."""
    model = quantize(llama_folder, method="rtn", dataset=None, overrides={"layers.0.self_attn.v_proj": "w8a8"})
    batch = make_batch(llama_folder)
    expected = logits(model, batch)

    outcome = fuse_linears(model)

    paths = tuple(f"model.layers.0.self_attn.{name}" for name in ATTENTION)
    assert outcome.apart == {paths: "their weight grids differ"}
    assert torch.equal(logits(model, batch), expected)


def test_a_linear_in_full_precision_is_no_member(llama_folder):
    model = quantize(llama_folder, method="rtn", dataset=None, modules_to_not_convert=["layers.0.self_attn.v_proj"])

    assert groups_of(fuse_linears(model)) == {ATTENTION, ATTENTION[:2], ("gate_proj", "up_proj")}
