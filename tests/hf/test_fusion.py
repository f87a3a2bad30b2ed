"""Which models are refused, which linears are left apart, and that neither is silent."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers.utils import logging

from optimum_qvlm import fuse_linears, unfuse_linears
from optimum_qvlm.errors import ConfigError
from optimum_qvlm.hf import fusion
from optimum_qvlm.hf.fusion import Fusion, fuse_sites
from optimum_qvlm.modules.fused import FusedLinear
from optimum_qvlm.modules.swap import replace_module
from tests.jobs import contents, load, logits, make_batch, quantize
from tests.tiny_models import llava_batch

LAYER = "model.language_model.layers.0"
ATTENTION = tuple(f"{LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
QUERY = ATTENTION[0]


class Adapter(nn.Module):
    """What libraries for adapters put in the place of a linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, linear.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(linear.out_features, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


@pytest.fixture
def model(quantized_llava):
    """A quantized model that a test may change."""
    return copy.deepcopy(quantized_llava)


@pytest.fixture
def log(caplog):
    """What transformers' loggers say, which do not reach pytest on their own."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_a_model_in_full_precision_has_nothing_to_fuse(llava_folder):
    with pytest.raises(ConfigError, match=r"LlavaForConditionalGeneration was not quantized with QVLMConfig"):
        fuse_linears(load(llava_folder))


def test_adapters_are_refused(model):
    """A linear under an adapter is no longer where the record has it."""
    replace_module(model, QUERY, Adapter(model.get_submodule(QUERY)))

    with pytest.raises(ConfigError, match=rf"the model has adapters \(at {QUERY}\); unload them, fuse, and add them"):
        fuse_linears(model)


@pytest.mark.parametrize("name, value", [("_hf_peft_config_loaded", True), ("peft_config", {"default": object()})])
def test_adapters_that_replace_no_linear_are_refused(model, name, value):
    """Prompts, and adapters that transformers itself added."""
    setattr(model, name, value)

    with pytest.raises(ConfigError, match="the model has adapters; unload them"):
        fuse_linears(model)


def test_adapters_that_are_added_to_a_fused_model_compute_what_they_do_elsewhere(model, quantized_llava):
    """A wrapper calls the linear with the same tensor; gradients reach its parameters."""
    alone, fused, actual = copy.deepcopy(quantized_llava), model, []
    fuse_linears(fused)
    for one in (alone, fused):
        adapters = [Adapter(one.get_submodule(path)) for path in (ATTENTION[0], ATTENTION[2])]
        replace_module(one, ATTENTION[0], adapters[0])
        replace_module(one, ATTENTION[2], adapters[1])
        values = one(**llava_batch(rows=2, seed=9)).logits
        values.square().mean().backward()
        actual.append(
            (values.detach(), *[parameter.grad for adapter in adapters for parameter in adapter.parameters()])
        )

    torch.testing.assert_close(actual[1][0], actual[0][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(actual[1][1:], actual[0][1:], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_model_on_a_device_mesh_is_refused(model):
    """Each device has rows of one linear and columns of another."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        norm = model.get_submodule(f"{LAYER}.input_layernorm")
        mesh = init_device_mesh("cpu", (1,))
        norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Replicate()]))

        with pytest.raises(ConfigError, match=rf"{LAYER}.input_layernorm.weight is split over .* load without tp_plan"):
            fuse_linears(model)
    finally:
        distributed.destroy_process_group()


def test_a_model_that_was_loaded_in_parallel_is_refused(model):
    model._tp_size = 2

    with pytest.raises(ConfigError, match=r"the model is split over a device mesh"):
        fuse_linears(model)


def test_weights_that_are_not_there_are_refused(model):
    model.get_submodule(QUERY).to("meta")

    with pytest.raises(ConfigError, match=rf"{QUERY}.weight_packed is offloaded or not loaded"):
        fuse_linears(model)


def test_what_was_asked_for_and_not_done_is_logged_with_its_reason(model, log):
    """Nobody would otherwise know why a model is no faster."""
    model.get_submodule(QUERY).register_forward_hook(lambda *_: None)

    outcome = fuse_linears(model)

    assert outcome.apart == {ATTENTION: "they have hooks"}
    assert str(outcome) in log.text
    assert f"1 groups were not fused, as {', '.join(ATTENTION)}: they have hooks" in log.text
    assert not isinstance(model.get_submodule(QUERY), FusedLinear)


def test_success_is_logged_quietly(model, log):
    with log.at_level("INFO", logger="transformers.optimum_qvlm"):
        outcome = fuse_linears(model)

    assert f"{sum(map(len, outcome.groups))} linears were fused into {len(outcome.groups)} products" in log.text
    assert {record.levelname for record in log.records if "fused" in record.message} == {"INFO"}


def test_a_linear_in_two_places_is_left(model):
    """Its other place would keep a copy of the weight."""
    model.extra = model.get_submodule(QUERY)

    assert fuse_linears(model).apart == {ATTENTION: "the model has one of them in several places"}


def test_a_site_over_several_modules_is_left(model):
    """Its linears run far apart, and the product would be kept in between."""
    paths = (f"{LAYER}.mlp.up_proj", f"{LAYER}.self_attn.q_proj")

    outcome = fuse_sites(model, [paths])

    assert list(outcome.apart.values()) == ["they are in several modules"]
    assert set(*outcome.apart) == set(paths)


def test_sites_that_overlap_with_fused_ones_are_left(model):
    assert fuse_sites(model, [ATTENTION[:2]]).groups == (ATTENTION[:2],)

    assert fuse_sites(model, [ATTENTION]).apart == {ATTENTION: "some of them are fused already"}


def test_parts_are_let_go_site_by_site(model):
    """A model that fills the memory of its device must fit while it is fused."""
    sites = [ATTENTION, (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj")]
    held, alive = [], []

    def one_by_one():
        for site in sites:
            held.extend(weakref.ref(model.get_submodule(path).weight_packed) for path in site)
            yield site
            alive.append([reference() for reference in held])

    fuse_sites(model, one_by_one())

    assert alive == [[None] * 3, [None] * 5]


def test_the_outcome_counts_and_gives_each_reason_once():
    outcome = Fusion(groups=(("a", "b"), ("c", "d", "e")), apart={("f", "g"): "x", ("h", "i"): "x", ("j", "k"): "y"})

    assert str(outcome).splitlines() == [
        "5 linears were fused into 2 products",
        "2 groups were not fused, as f, g: x",
        "1 groups were not fused, as j, k: y",
    ]
    assert str(Fusion()) == "0 linears were fused into 0 products"


def test_a_copy_of_a_fused_model_is_fused_and_apart_from_it(model, llava_folder):
    batch = make_batch(llava_folder)
    fuse_linears(model)
    expected = logits(model, batch)

    copied = copy.deepcopy(model)
    for parameter in model.get_submodule(QUERY).joint.parameters():
        parameter.data.zero_()

    assert torch.equal(logits(copied, batch), expected)
    assert not torch.equal(logits(model, batch), expected)


@pytest.fixture
def fused_here(monkeypatch):
    """This device is one on which models are fused when they are loaded."""
    monkeypatch.setattr(fusion, "FUSED_ON", ("cpu",))


def is_fused(model) -> bool:
    return any(isinstance(module, FusedLinear) for module in model.modules())


def test_models_are_fused_after_calibration_and_at_load_where_that_pays(llava_folder, fused_here, tmp_path, log):
    """Nobody has to know of it, and no file tells."""
    with log.at_level("INFO", logger="transformers.optimum_qvlm"):
        model = quantize(llava_folder)
    model.save_pretrained(tmp_path / "one")
    loaded = load(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")

    assert is_fused(model) and is_fused(loaded)
    assert "optimum_qvlm.unfuse_linears(model) undoes it" in log.text
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    unfuse_linears(loaded)
    batch = make_batch(llava_folder)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def test_models_are_not_fused_where_calls_cost_little(quantized_llava):
    assert not is_fused(quantized_llava)


def test_a_model_that_cannot_be_fused_is_loaded_and_the_reason_said(llama_folder, fused_here, tmp_path, log):
    """Weights that come from disk for a call of one module."""
    quantize(llama_folder).save_pretrained(tmp_path / "saved")
    on_cpu = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    device_map = dict.fromkeys(on_cpu, "cpu") | {"model.layers.1": "disk"}
    log.clear()

    model = load(tmp_path / "saved", device_map=device_map, offload_folder=str(tmp_path / "disk"))

    assert not is_fused(model)
    assert "were not fused, which would decode faster" in log.text and "is offloaded or not loaded" in log.text
