"""A quantized folder in transformers without this package: it must fail, and say what to import."""

import pytest

from tests.jobs import run_python

pytestmark = pytest.mark.integration

GUARD = "import_optimum_qvlm_before_loading"

LOAD_WITHOUT_PLUGIN = """
import sys
from transformers import {auto_class}
model = {auto_class}.from_pretrained(sys.argv[1], **{options})
print("loaded", "optimum_qvlm" in sys.modules)
"""


def load_without_plugin(folder, family, **options):
    auto_class = "AutoModelForCausalLM" if family == "llama" else "AutoModelForImageTextToText"
    return run_python(LOAD_WITHOUT_PLUGIN.format(auto_class=auto_class, options=options), folder)


@pytest.mark.parametrize(
    "family, scheme, settings",
    [
        ("llava", "w4a8", {"symmetric": True}),
        ("llava", "w8a8", {"symmetric": True}),
        ("llama", "w4a16", {"symmetric": False}),
    ],
    ids=["llava", "llava at 8 bits", "llama with zero points"],
)
def test_loading_without_the_plugin_fails_and_says_what_to_import(job, family, scheme, settings):
    """A warning alone would leave users with random weights."""
    ran = load_without_plugin(job(family, scheme, **settings).folder, family)

    assert ran.returncode != 0
    assert "loaded" not in ran.stdout
    assert GUARD in ran.stdout + ran.stderr


def test_even_where_mismatches_are_ignored_the_report_says_what_to_import(job):
    """Who switches the error off still reads the reason."""
    ran = load_without_plugin(job("llava", "w8a8", symmetric=True).folder, "llava", ignore_mismatched_sizes=True)

    assert GUARD in ran.stdout + ran.stderr
    assert "MISMATCH" in ran.stdout + ran.stderr
