"""Configurations that no model can be built from."""

import json
import shutil

import pytest

from optimum_qvlm.errors import UnsupportedModelError
from tests.jobs import quantize


@pytest.mark.parametrize("family, part", [("llama", None), ("llava", "text_config"), ("llava", "vision_config")])
def test_a_claim_of_too_many_layers_is_refused_before_anything_is_built(family, part, request, tmp_path):
    """Building would go on until memory is gone."""
    folder = shutil.copytree(request.getfixturevalue(f"{family}_folder"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part])["num_hidden_layers"] = 2**63
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(UnsupportedModelError, match=f"claims num_hidden_layers={2**63} .*at most 10000 layers"):
        quantize(folder)
