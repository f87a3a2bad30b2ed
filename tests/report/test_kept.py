"""Why a linear stays in full precision: what the user asked for, or where it lies."""

import pytest

from optimum_qvlm.report.kept import OUTSIDE, VISION, kept_reasons
from tests.configs import make_config
from tests.plans import plan_for
from tests.tiny_models import tiny_llava

TOWER = "model.vision_tower.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    "asked, name, reason",
    [
        ({}, "lm_head", OUTSIDE),
        ({"vision_scheme": None}, TOWER, VISION),
        ({"overrides": {"*.fc1": None}}, TOWER, "overrides keeps '*.fc1'"),
        ({"modules_to_not_convert": ["fc1"]}, TOWER, "modules_to_not_convert names 'fc1'"),
        ({"overrides": {"*.fc1": None}, "modules_to_not_convert": ["fc1"]}, TOWER, "overrides keeps '*.fc1'"),
    ],
)
def test_the_reason_is_what_decided(asked, name, reason):
    plan = plan_for(tiny_llava(), "w4a8", **asked)

    reasons = kept_reasons(plan, make_config("w4a8", **asked).to_dict())

    assert reasons[name] == reason
    assert set(reasons) == set(plan.kept)
