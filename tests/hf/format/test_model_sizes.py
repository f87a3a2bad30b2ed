"""A configuration that claims what no model has is refused before anything is built."""

import json
import shutil

import pytest

from optimum_qvlm import QVLMConfig, dry_run
from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.hf.format.inspection import inspect_checkpoint
from optimum_qvlm.hf.format.model_sizes import require_buildable
from optimum_qvlm.hf.model_class import read_model_config
from tests.jobs import load, quantize

MESSAGE = r"claims num_hidden_layers=9223372036854775808, above 10000"


@pytest.fixture
def endless(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**63}))
    return folder


@pytest.mark.parametrize(
    "use",
    [
        quantize,
        lambda folder: dry_run(folder, QVLMConfig()),
        lambda folder: read_model_config(str(folder), {}),
        lambda folder: inspect_checkpoint(str(folder)),
    ],
    ids=["export", "dry run", "command", "info"],
)
def test_endless_layers_are_refused_at_once(endless, use):
    with pytest.raises(CheckpointError, match=MESSAGE):
        use(endless)


def test_endless_layers_of_a_quantized_model_too(llama_folder, tmp_path):
    quantize(llama_folder, method="rtn").save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2**63}))

    with pytest.raises(CheckpointError, match=MESSAGE):
        load(tmp_path / "saved")


def test_sizes_are_found_inside_and_real_ones_pass():
    require_buildable({"text_config": {"num_hidden_layers": 128, "vocab_size": 262144, "max_length": 10**30}}, "x")
    with pytest.raises(CheckpointError, match="hidden_size=1099511627776"):
        require_buildable({"text_config": {"hidden_size": 2**40}}, "x")
