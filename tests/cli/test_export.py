"""From arguments to a saved model, with the model replaced; the real thing is in test_whole_command.py."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlavaConfig

from optimum_qvlm.cli import export
from optimum_qvlm.errors import QVLMError

REMOTE_CODE = {"AutoModelForImageTextToText": "modeling.Model"}
SOURCE = {"revision": "main", "trust_remote_code": False}


class SavedModel:
    """Stands for a quantized model; writes two files of known size."""

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "config.json").write_bytes(bytes(500))
        (folder / "model.safetensors").write_bytes(bytes(1_250_000))


@pytest.fixture
def args(parser, tmp_path) -> Namespace:
    """Of a command without options."""
    return parser.parse_args(["export", "qvlm", "--model", "some/model", str(tmp_path / "out")])


def test_a_saved_model_is_summed_up(args, monkeypatch, capsys):
    monkeypatch.setattr(export, "load_model", lambda *_: SavedModel())

    assert export.main(args) == 0

    assert capsys.readouterr().out == f"Saved the w4a8 model in {args.output}: 2 files, 1.25 MB\n"


def test_refused_input_is_said_without_traceback(args, monkeypatch, capsys):
    def refuse(*_):
        raise QVLMError("group=48 does not divide in_features=128")

    monkeypatch.setattr(export, "load_model", refuse)

    assert export.main(args) == 2

    shown = capsys.readouterr()
    assert shown.err == "optimum-cli export qvlm: error: group=48 does not divide in_features=128\n"
    assert shown.out == ""


def test_unknown_schemes_are_refused_before_anything_is_loaded(args, monkeypatch, capsys):
    args.scheme = "w3"
    monkeypatch.setattr(export, "load_model", lambda *_: pytest.fail("loaded the model"))

    assert export.main(args) == 2
    assert "'w3'" in capsys.readouterr().err


def test_bugs_keep_their_traceback(args, monkeypatch):
    """Python turns what is raised into a traceback and exit code 1."""

    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(export, "load_model", fail)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        export.main(args)


def test_an_output_that_is_a_file_is_refused_first(args, capsys):
    args.output.write_text("precious")

    assert export.main(args) == 2

    assert "is a file; name a folder" in capsys.readouterr().err
    assert args.output.read_text() == "precious"


def test_the_models_own_folder_is_refused_as_output(args, capsys):
    args.output.mkdir()
    args.model = f"{args.output}/../{args.output.name}"

    assert export.main(args) == 2
    assert "is the folder of the full-precision model" in capsys.readouterr().err


def test_the_model_is_loaded_with_every_option(args, monkeypatch):
    calls = []
    auto_class = SimpleNamespace(from_pretrained=lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr(export, "read_model_config", lambda *_: LlavaConfig())
    monkeypatch.setattr(export, "choose_auto_class", lambda *_: auto_class)
    args.device, args.dtype, args.revision, args.trust_remote_code = "cuda:1", "bfloat16", "v2", True

    export.load_model(args, config="the configuration")

    options = {"device_map": "cuda:1", "dtype": "bfloat16", "revision": "v2", "trust_remote_code": True}
    assert calls == [(("some/model",), options | {"quantization_config": "the configuration"})]


@pytest.mark.parametrize("available, device", [(True, "cuda"), (False, "cpu")])
def test_the_device_is_a_gpu_where_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)

    assert export.choose_device(None) == device
    assert export.choose_device("cuda:1") == "cuda:1"


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
    assert export.choose_auto_class(task, config) is auto_class


def test_the_models_configuration_is_read(tmp_path):
    LlavaConfig().save_pretrained(tmp_path)

    assert export.read_model_config(str(tmp_path), SOURCE).model_type == "llava"


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(QVLMError, match=f"model {tmp_path} cannot be read; name a folder"):
        export.read_model_config(str(tmp_path), SOURCE)


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (2_500_000, "2.50 MB"), (13 * 10**9, "13.00 GB")],
)
def test_sizes_are_readable(count, text):
    assert export.readable_bytes(count) == text
