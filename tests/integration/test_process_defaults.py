"""The default dtype and device of torch are settings of the whole process, which other libraries change too."""

import json

import pytest
import torch
from safetensors.torch import load_file

from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.hf.format.modules import stored_state
from optimum_qvlm.pipeline.calibrate import CalibrationData, calibrate
from tests.configs import make_config
from tests.jobs import logits, make_batch, quantize, run_python
from tests.plans import CPU, plan_for
from tests.tiny_models import llava_batch, tiny_llava

pytestmark = pytest.mark.integration

CASES = {
    "rotated": {"scheme": "w4a4", "transforms": "rotate", "symmetric": False},
    "searched": {"scheme": "w4a8", "two_level_scales": True, "group_size": 32},
    "plain": {"scheme": "w4a4", "error_feedback": False, "transforms": "both", "effort": "fast"},
    "static": {"scheme": "w4a4", "activation_range": "static", "encoder_epochs": 1, "soft_assignment": "step"},
    "rtn": {"scheme": "w6a6", "method": "rtn"},
}
"""Settings that between them run all of the search, and both encoder losses."""

IN_BFLOAT16 = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tests.integration.test_process_defaults import outcome
from tests.jobs import logits, make_batch
source, target, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
data, batch = [make_batch(source, seed=0, padding=2), make_batch(source, seed=1)], make_batch(source)
torch.set_default_dtype(torch.bfloat16)
for name, settings in cases.items():
    model, found = outcome(source, data, batch, settings)
    torch.set_default_dtype(torch.float32)
    found["later"] = logits(model, batch)
    torch.set_default_dtype(torch.bfloat16)
    save_file(found, target / name)
"""


def outcome(source, data, batch, settings):
    """A model quantized with the settings, and every tensor of it with what it answers."""
    model = quantize(source, dataset=data, options={"dtype": torch.float32}, **settings)
    found = stored_state(model, "00" * 32, {}) | {"logits": logits(model, batch)}
    return model, {name: tensor.clone() for name, tensor in found.items()}


def calibrated(name):
    """The state of the tiny model after calibration; the data are made on the CPU."""
    settings = {"method": "qvlm"} | CASES[name]
    with torch.device("cpu"):
        model, batches = tiny_llava().eval(), [llava_batch(seed=0, padding=2), llava_batch(rows=3, tokens=9, seed=1)]
        labels = [batch["input_ids"] for batch in batches]
    options = make_config(**settings).options()
    recipe = Recipe(source="user", samples=4, seed=0, fingerprint="0")
    data = CalibrationData(batches=batches, recipe=recipe, labels=labels)
    plan = plan_for(model, **settings)
    result = calibrate(model, plan, options, None if options.method == "rtn" else data, CPU)
    return stored_state(model, "00" * 32, {}), {key: record.to_dict() for key, record in result.modules.items()}


def test_results_do_not_depend_on_the_default_dtype(llava_folder, tmp_path):
    """Weights and answers are the same bits whatever type tensors get that name none.

    Nothing is cached yet in the fresh process, and what is kept there serves other default dtypes later.
    """
    done = run_python(IN_BFLOAT16, llava_folder, tmp_path, json.dumps(CASES))

    assert done.returncode == 0, done.stderr
    data = [make_batch(llava_folder, seed=0, padding=2), make_batch(llava_folder, seed=1)]
    for name, settings in CASES.items():
        _, expected = outcome(llava_folder, data, make_batch(llava_folder), settings)
        expected["later"] = expected["logits"]
        found = load_file(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


@pytest.mark.parametrize("name", CASES)
def test_a_calibration_does_not_depend_on_the_default_device(name):
    """Tensors on "meta" hold nothing, so one that is made there shows at once."""
    expected_state, expected_records = calibrated(name)

    with torch.device("meta"):
        state, records = calibrated(name)

    assert records == expected_records
    assert all(torch.equal(tensor, expected_state[key]) for key, tensor in state.items())
