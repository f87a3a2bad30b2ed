"""A quantized folder in transformers without this package: it must fail, and say what to import."""

import pytest

from tests.jobs import ROOT, run_python

pytestmark = pytest.mark.integration

WAYS_OUT = "`import optimum_qvlm` before loading, or `python -m optimum_qvlm PROGRAM`"

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
def test_loading_without_the_plugin_fails_and_says_what_to_do(job, family, scheme, settings):
    """A warning alone would leave users with random weights."""
    ran = load_without_plugin(job(family, scheme, **settings).folder, family)

    assert ran.returncode != 0
    assert "loaded" not in ran.stdout
    assert WAYS_OUT in ran.stdout + ran.stderr


def test_even_where_mismatches_are_ignored_the_report_says_what_to_do(job):
    """Who switches the error off still reads the reason."""
    ran = load_without_plugin(job("llava", "w8a8", symmetric=True).folder, "llava", ignore_mismatched_sizes=True)

    assert WAYS_OUT in ran.stdout + ran.stderr
    assert "MISMATCH" in ran.stdout + ran.stderr


def test_the_documentation_quotes_what_strangers_see(job):
    """Who searches for the message finds the page."""
    ran = load_without_plugin(job("llava", "w8a8", symmetric=True).folder, "llava")
    page = (ROOT / "docs" / "how-to" / "other-programs.md").read_text(encoding="utf-8")

    for sentence in (
        "Unknown quantization type, got qvlm - supported types are: ['awq', 'bitsandbytes_4bit', ",
        f"READ THIS: quantized with optimum-qvlm. {WAYS_OUT}",
        "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error.",
    ):
        assert sentence in page
        assert sentence in ran.stdout + ran.stderr
