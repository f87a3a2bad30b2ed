"""How commands find and load a model."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HTTPError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPConfig, LlamaConfig, LlavaConfig

from optimum_qvlm.cli import loading
from optimum_qvlm.errors import ConfigError, HubError, QVLMError
from optimum_qvlm.hf import model_class

REMOTE_CODE = {"AutoModelForImageTextToText": "modeling.Model"}
SOURCE = {"revision": "main", "trust_remote_code": False}


@pytest.fixture
def args(parser, tmp_path) -> Namespace:
    """Of a command without options."""
    return parser.parse_args(["export", "qvlm", "--model", "some/model", str(tmp_path / "out")])


def test_the_model_is_loaded_with_every_option(args, monkeypatch):
    calls = []
    auto_class = SimpleNamespace(
        __name__="AutoModelForImageTextToText", from_pretrained=lambda *given, **options: calls.append((given, options))
    )
    monkeypatch.setattr(model_class, "read_model_config", lambda *_: LlavaConfig())
    monkeypatch.setattr(model_class, "choose_auto_class", lambda *_: auto_class)
    args.device, args.dtype, args.revision, args.trust_remote_code = "cpu:0", "bfloat16", "v2", True

    loading.load_model(args, quantization_config="the configuration")

    options = {"device_map": "cpu:0", "dtype": "bfloat16", "revision": "v2", "trust_remote_code": True}
    assert calls == [(("some/model",), options | {"quantization_config": "the configuration"})]


@pytest.mark.parametrize("available, device", [(True, "cuda"), (False, "cpu")])
def test_the_device_is_a_gpu_where_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)

    assert loading.choose_device(None) == device


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "auto", "balanced", "sequential"])
def test_a_device_that_is_there_is_taken_as_it_is(device):
    assert loading.choose_device(device) == device


@pytest.mark.parametrize(
    "device, message",
    [
        ("gpu", "'gpu' is no device; use cpu, cuda, cuda:1, mps or auto"),
        ("cuda:", "'cuda:' is no device"),
        ("", "'' is no device"),
        ("cuda:99", "device cuda:99 cannot be used here .*; choose another one, as cpu"),
        ("xpu", "device xpu cannot be used here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, message):
    with pytest.raises(ConfigError, match=message):
        loading.choose_device(device)


@pytest.mark.parametrize(
    "task, config, auto_class",
    [
        ("auto", LlavaConfig(), AutoModelForImageTextToText),
        ("auto", LlamaConfig(), AutoModelForCausalLM),
        ("auto", LlamaConfig(auto_map=REMOTE_CODE), AutoModelForImageTextToText),
        ("image-text-to-text", LlamaConfig(), AutoModelForImageTextToText),
        ("text-generation", LlavaConfig(), AutoModelForCausalLM),
    ],
    ids=["llava", "llama", "remote code", "images given", "text given"],
)
def test_the_task_is_the_given_one_or_follows_from_the_model(task, config, auto_class):
    assert model_class.choose_auto_class(task, config) is auto_class


def test_the_models_configuration_is_read(tmp_path):
    LlavaConfig().save_pretrained(tmp_path)

    assert model_class.read_model_config(str(tmp_path), SOURCE).model_type == "llava"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(QVLMError, match=f"model {tmp_path} cannot be read; name a folder"):
        model_class.read_model_config(str(tmp_path), SOURCE)


def test_a_model_without_weights_is_refused(args, tmp_path):
    LlavaConfig().save_pretrained(tmp_path)
    args.model = str(tmp_path)

    with pytest.raises(QVLMError, match=f"model {tmp_path} cannot be loaded: .*no file named"):
        loading.load_model(args)


def test_a_download_that_breaks_off_is_the_hubs_failure(args, monkeypatch):
    """The transport's errors are no OSErrors."""

    def broken(*_, **__):
        raise HTTPError("slow")

    monkeypatch.setattr(loading, "how_to_load", lambda *_, **__: (SimpleNamespace(from_pretrained=broken), {}))

    with pytest.raises(HubError, match="model some/model cannot be loaded: slow"):
        loading.load_model(args)


@pytest.mark.parametrize(
    "found", [{"quant_method": "awq"}, SimpleNamespace(quant_method="awq")], ids=["dict", "object"]
)
def test_a_model_is_not_quantized_twice(found):
    """transformers would keep the old settings, and the command say that it had used the new ones."""
    loading.require_full_precision("some/model", LlamaConfig())

    with pytest.raises(QVLMError, match="model some/model is quantized already, with 'awq'; name the full-precision"):
        loading.require_full_precision("some/model", LlamaConfig(quantization_config=found))


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForCausalLM])
def test_a_model_of_another_kind_is_refused(auto_class):
    with pytest.raises(QVLMError, match=f"model x is of type 'clip', which {auto_class.__name__} does not load"):
        model_class.require_class("x", CLIPConfig(), auto_class)


def test_a_model_with_code_of_its_own_is_not_judged_by_its_type():
    config = LlamaConfig(auto_map=REMOTE_CODE)

    model_class.require_class("x", config, AutoModelForImageTextToText)
