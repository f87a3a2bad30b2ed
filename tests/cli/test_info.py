"""What `info` prints, and that it refuses what does not fit together."""

import json
import re
import shutil
from pathlib import Path

import pytest

from optimum_qvlm.cli import info
from tests.jobs import edit_config, quantize

FIRST = "language_model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(llava_folder, tmp_path_factory):
    """A quantized folder in which one linear differs from its like in the other layer. Read only."""
    folder = tmp_path_factory.mktemp("info")
    quantize(llava_folder, overrides={"*layers.0.self_attn.v_proj": "w6a6"}).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def run(parser, capsys):
    """Runs the command; returns exit code, stdout, stderr."""

    def command(*words):
        args = parser.parse_args(["qvlm", "info", *map(str, words)])
        code = info.main(args)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return command


def test_parts_blocks_and_modules_are_shown(run, saved):
    code, text, _ = run(saved)

    assert code == 0
    assert text.startswith(f"{saved}: LlavaForConditionalGeneration\nformat      qvlm 1; ")
    assert "calibrated  qvlm on 4 samples (user), seed 0, fingerprint " in text
    lines = [line.split() for line in text.splitlines()]
    language = [line for line in lines if line[:1] == ["language_model.model.layers"]]
    assert sum(int(line[1]) for line in language if line[2] == "w4a8") == 13
    assert [line[1] for line in language if line[2] == "w6a6"] == ["1"]
    assert ["multi_modal_projector", "2", "w8a8", "row"] in [line[:4] for line in lines]
    assert "blocks      vision 0, 1; projector 0; language 0" in text


def test_equal_modules_of_all_layers_share_a_line(run, saved):
    """A model has hundreds of linears, and a few kinds of them."""
    _, text, _ = run(saved)

    shown = [line.split() for line in text.splitlines() if "language_model" in line and "*" in line]
    assert ["language_model.model.layers.*.self_attn.q_proj", "x2", "64x64", "w4a8", "64"] in [s[:5] for s in shown]
    different = [line for line in shown if line[0].endswith("v_proj")]
    assert [line[-4] for line in different] == ["w6a6", "w4a8"], "layer 0, then layer 1"


def test_json_has_every_module_and_the_bytes_that_are_on_disk(run, saved):
    code, text, _ = run(saved, "--json")

    actual = json.loads(text)
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert code == 0
    assert actual["modules"].keys() == config["modules"].keys()
    assert actual["modules"][FIRST]["scheme"] == "w4a8"
    assert actual["files"] == {"model.safetensors": (saved / "model.safetensors").stat().st_size}
    assert 0 < actual["files"]["model.safetensors"] - actual["bytes"]["tensors"] < 50_000, "the header is the rest"
    assert sum(part["linears"] for part in actual["parts"]) == len(config["modules"])
    assert actual["format_version"] == 1


def test_a_sharded_model_and_a_variant_are_found(run, saved, tmp_path):
    from tests.jobs import load

    load(saved).save_pretrained(tmp_path / "shards", max_shard_size="50KB", variant="small")

    code, text, _ = run(tmp_path / "shards", "--variant", "small", "--json")

    assert code == 0
    assert len(json.loads(text)["files"]) > 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: edit_config(folder, scheme="w8a8"), "quantization_config was changed after saving"),
        (lambda folder: edit_config(folder, format_version=99), "format version 99, this release .* reads up to 1"),
        (lambda folder: edit_config(folder, format_version=0), "format version 0, which this release .* does not"),
        (lambda folder: edit_config(folder, quant_method="gptq"), "is quantized with 'gptq', not with 'qvlm'"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json; name the folder"),
        (lambda folder: (folder / "config.json").write_text("["), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds a list where an object"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors is damaged"),
        (lambda folder: (folder / "qvlm_report.json").write_text("{"), "qvlm_report.json is not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_together_is_refused(run, copied, change, message):
    change(copied)

    code, text, error = run(copied)

    assert code == 2
    assert text == ""
    assert re.search(message, error)
    assert error.startswith("optimum-cli qvlm info: error: ")


def test_a_full_precision_model_is_said_to_be_one(run, llava_folder):
    code, _, error = run(llava_folder)

    assert code == 2
    assert f"{llava_folder} is not quantized; there is nothing to show" in error


def test_a_model_of_another_method_is_said_to_be_one(run, copied):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (copied / "config.json").write_text(json.dumps(config))

    code, _, error = run(copied)

    assert code == 2
    assert f"{copied} is quantized with 'awq', not with 'qvlm'; there is nothing to show" in error


def test_a_file_is_no_model(run, copied):
    code, _, error = run(copied / "config.json")

    assert code == 2
    assert "config.json is a file; name the folder that it lies in" in error


@pytest.mark.parametrize(
    "name, message",
    [
        ("../outside.safetensors", "which is outside its folder"),
        ("/etc/model.safetensors", "which is outside its folder"),
        ("sub/model.safetensors", "sub/model.safetensors, which .* names, is missing"),
        ("/etc/passwd", "which is no safetensors file"),
        ("model.bin", "which is no safetensors file"),
        (5, "which is no safetensors file"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(run, copied, name, message):
    (copied / "model.safetensors").rename(copied / "m.safetensors")
    index = {"metadata": {}, "weight_map": {"x": name}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))

    code, _, error = run(copied)

    assert code == 2
    assert re.search(message, error)


def test_norms_that_took_up_equalizers_are_said(run, copied):
    """Everything else is as it was, but they are not."""
    path = copied / "qvlm_report.json"
    report = json.loads(path.read_text())

    assert "differ from the source" not in run(copied)[1]
    path.write_text(json.dumps(report | {"folded_into_norms": {"a.q_proj": "a.norm", "a.fc1": "a.norm2"}}))

    assert "norms       2 differ from the source: they scale what the linears behind them read" in run(copied)[1]


def test_fidelity_at_once_by_steps_and_through_generate_is_shown(run, copied):
    figures = {
        "prefill": {"tokens": 90, "mean_kl": 0.5, "top1_agreement": 0.9},
        "decode": {"tokens": 80, "mean_kl": 0.25, "top1_agreement": 1.0},
        "generate": {"answers": 8, "tokens": 14.25, "agreed_tokens": 9.5, "exact_match": 0.375},
    }
    path = copied / "qvlm_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fidelity": figures}))

    _, text, _ = run(copied)
    _, values, _ = run(copied, "--json")

    assert "fidelity    on prefill: answer tokens 90, mean KL 0.5, same first choice 0.9\n" in text
    assert "fidelity    on decode: answer tokens 80, mean KL 0.25, same first choice 1\n" in text
    assert "generation  37.5 % of 8 greedy answers the same, first difference after 9.5 of 14.25 tokens" in text
    generate = figures.pop("generate")
    assert json.loads(values)["fidelity"] == figures and json.loads(values)["generation"] == generate


def test_equal_answers_have_no_first_difference(run, copied):
    generate = {"answers": 8, "tokens": 1.875, "agreed_tokens": 1.875, "exact_match": 1.0}
    path = copied / "qvlm_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fidelity": {"generate": generate}}))

    assert "generation  100 % of 8 greedy answers the same, 1.875 tokens on average\n" in run(copied)[1]
