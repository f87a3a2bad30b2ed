"""JSON is written as transformers writes it, and as the standard has it."""

import math

import pytest
from transformers import LlamaConfig

from optimum_qvlm.files import strict_json


def test_a_file_has_the_form_of_transformers(tmp_path):
    """A save changes nothing in config.json but what it adds."""
    config = LlamaConfig(num_hidden_layers=2, name="\u00e9")
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    written = (tmp_path / "config.json").read_bytes()

    assert strict_json.as_file(strict_json.loads(written)) == written


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_not_written(number):
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        strict_json.as_file({"value": [number]})
