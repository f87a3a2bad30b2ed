"""From arguments to a saved model, with the model replaced; the real thing is in test_whole_command.py."""

import json
from argparse import Namespace

import pytest

from optimum_qvlm.cli import export
from optimum_qvlm.errors import HubError, QVLMError
from tests.configs import make_paper


def save_two_files(_, args):
    """Stands for saving a quantized model; writes two files of known size."""
    args.output.mkdir()
    (args.output / "config.json").write_bytes(bytes(500))
    (args.output / "model.safetensors").write_bytes(bytes(1_250_000))
    return ["config.json", "model.safetensors"]


@pytest.fixture
def args(parser, tmp_path) -> Namespace:
    """Of a command without options."""
    return parser.parse_args(["export", "qvlm", "--model", "some/model", str(tmp_path / "out")])


def test_a_saved_model_is_summed_up(args, monkeypatch, capsys):
    monkeypatch.setattr(export, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(export, "save_model", save_two_files)

    assert export.main(args) == 0

    assert capsys.readouterr().out == f"Saved the w4a8 model in {args.output}: 2 files, 1.25 MB\n"


def test_the_outcome_can_be_had_as_json(args, monkeypatch, capsys):
    """One object on stdout and nothing else, for scripts."""
    monkeypatch.setattr(export, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(export, "save_model", save_two_files)
    args.json = True

    assert export.main(args) == 0

    said = json.loads(capsys.readouterr().out)
    assert said | {"seconds": 0} == {
        "output": str(args.output),
        "scheme": "w4a8",
        "files": 2,
        "bytes": 1_250_500,
        "size": "1.25 MB",
        "seconds": 0,
    }


def test_refusals_too(args, capsys):
    args.json, args.scheme = True, "w3"

    assert export.main(args) == 2

    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "SpecError"
    assert "'w3'" in error["message"]


def test_a_format_that_could_not_hold_the_model_is_refused_before_it_is_loaded(args, monkeypatch, capsys):
    monkeypatch.setattr(export, "load_model", lambda *_, **__: pytest.fail("loaded the model"))
    args.format = "compressed-tensors"

    assert export.main(args) == 2
    assert "--format compressed-tensors writes" in capsys.readouterr().err
    assert not args.output.exists()


def test_a_repository_that_cannot_be_written_is_refused_before_the_model_is_loaded(args, monkeypatch, capsys):
    def refuse(repo):
        raise HubError(f"the token only reads, and {repo} is to be written")

    monkeypatch.setattr("optimum_qvlm.hf.saving.push.require_access", refuse)
    monkeypatch.setattr(export, "load_model", lambda *_, **__: pytest.fail("loaded the model"))
    args.push_to_hub = "me/model"

    assert export.main(args) == 3
    assert "the token only reads, and me/model is to be written" in capsys.readouterr().err


def test_refused_input_is_said_without_traceback(args, monkeypatch, capsys):
    def refuse(*_, **__):
        raise QVLMError("group=48 does not divide in_features=128")

    monkeypatch.setattr(export, "load_model", refuse)

    assert export.main(args) == 2

    shown = capsys.readouterr()
    assert shown.err == "optimum-cli export qvlm: error: group=48 does not divide in_features=128\n"
    assert shown.out == ""


def test_unknown_schemes_are_refused_before_anything_is_loaded(args, monkeypatch, capsys):
    args.scheme = "w3"
    monkeypatch.setattr(export, "load_model", lambda *_, **__: pytest.fail("loaded the model"))

    assert export.main(args) == 2
    assert "'w3'" in capsys.readouterr().err


def test_bugs_keep_their_traceback(args, monkeypatch):
    """Python turns what is raised into a traceback and exit code 1."""

    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(export, "load_model", fail)

    with pytest.raises(ZeroDivisionError, match="a bug"):
        export.main(args)


def test_an_output_that_is_a_file_is_refused_first(args, capsys):
    args.output.write_text("precious")

    assert export.main(args) == 2

    assert "is a file; name a folder" in capsys.readouterr().err
    assert args.output.read_text() == "precious"


@pytest.mark.parametrize("name", ["file/out", "file/out/deeper", "out"])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    args, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(export, "load_model", lambda *_, **__: pytest.fail("loaded the model"))
    (tmp_path / "file").write_text("precious")
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    args.output = tmp_path / name
    before = sorted(tmp_path.rglob("*"))

    assert export.main(args) == 2

    assert f"{tmp_path / name}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_trying_the_output_leaves_nothing(args, tmp_path, monkeypatch):
    def look(*_, **__):
        assert list(tmp_path.iterdir()) == []
        raise QVLMError("loaded the model")

    monkeypatch.setattr(export, "load_model", look)
    args.output = tmp_path / "some" / "where" / "out"

    assert export.main(args) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_models_own_folder_is_refused_as_output(args, capsys):
    args.output.mkdir()
    args.model = f"{args.output}/../{args.output.name}"

    assert export.main(args) == 2
    assert "is the folder of the full-precision model" in capsys.readouterr().err


def test_the_papers_mode_takes_what_was_given(parser):
    """Also what equals a default that the mode changes."""
    from optimum_qvlm import QVLMConfig

    given = ["--paper", "4", "--vision-scheme", "w8a8", "--transforms", "auto", "--activation-range", "dynamic"]
    args = parser.parse_args(["export", "qvlm", "--model", "some/model", "out", *given])

    config = export.make_config(args.paper, export.config_arguments(args))

    assert (config.scheme, config.vision_scheme, config.encoder_epochs) == ("w4a4", "w8a8", 10)
    assert (config.transforms, config.activation_range) == ("auto", "dynamic")
    assert config == make_paper(4, vision_scheme="w8a8", transforms="auto", activation_range="dynamic")
    assert export.make_config(6, {"seed": 1}) == QVLMConfig.paper(6, seed=1)


def test_what_is_said_is_the_scheme_that_was_used(args, monkeypatch, capsys):
    """The paper's mode has a scheme of its own, whatever the option's default."""
    monkeypatch.setattr(export, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(export, "save_model", save_two_files)
    args.paper = 6

    assert export.main(args) == 0

    assert capsys.readouterr().out.startswith("Saved the w6a6 model in ")
