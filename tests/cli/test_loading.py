"""How commands find and load a model."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlavaConfig

from optimum_qvlm.cli import loading
from optimum_qvlm.errors import QVLMError

REMOTE_CODE = {"AutoModelForImageTextToText": "modeling.Model"}
SOURCE = {"revision": "main", "trust_remote_code": False}


@pytest.fixture
def args(parser, tmp_path) -> Namespace:
    """Of a command without options."""
    return parser.parse_args(["export", "qvlm", "--model", "some/model", str(tmp_path / "out")])


def test_the_model_is_loaded_with_every_option(args, monkeypatch):
    calls = []
    auto_class = SimpleNamespace(from_pretrained=lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr(loading, "read_model_config", lambda *_: LlavaConfig())
    monkeypatch.setattr(loading, "choose_auto_class", lambda *_: auto_class)
    args.device, args.dtype, args.revision, args.trust_remote_code = "cuda:1", "bfloat16", "v2", True

    loading.load_model(args, quantization_config="the configuration")

    options = {"device_map": "cuda:1", "dtype": "bfloat16", "revision": "v2", "trust_remote_code": True}
    assert calls == [(("some/model",), options | {"quantization_config": "the configuration"})]


@pytest.mark.parametrize("available, device", [(True, "cuda"), (False, "cpu")])
def test_the_device_is_a_gpu_where_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)

    assert loading.choose_device(None) == device
    assert loading.choose_device("cuda:1") == "cuda:1"


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
    assert loading.choose_auto_class(task, config) is auto_class


def test_the_models_configuration_is_read(tmp_path):
    LlavaConfig().save_pretrained(tmp_path)

    assert loading.read_model_config(str(tmp_path), SOURCE).model_type == "llava"


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(QVLMError, match=f"model {tmp_path} cannot be read; name a folder"):
        loading.read_model_config(str(tmp_path), SOURCE)


def test_a_model_without_weights_is_refused(args, tmp_path):
    LlavaConfig().save_pretrained(tmp_path)
    args.model = str(tmp_path)

    with pytest.raises(QVLMError, match=f"model {tmp_path} cannot be loaded: .*no file named"):
        loading.load_model(args)
