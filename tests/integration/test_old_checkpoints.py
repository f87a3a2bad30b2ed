"""Checkpoints that earlier releases wrote, kept as they were: they load for ever, bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimum_qvlm.hf.format.modules import GUARDS
from tests.jobs import load, logits, make_batch

pytestmark = pytest.mark.integration

VERSION_1 = Path(__file__).parents[1] / "checkpoints" / "version_1"


@pytest.fixture(params=["llama", "llava"])
def old(request) -> Path:
    """A text model with transforms and several grids; a VLM with zero points and six bits."""
    return VERSION_1 / request.param


def test_an_old_checkpoint_computes_what_it_did(old):
    """The order of sums hangs on the CPU, nothing else may differ."""
    expected = load_file(VERSION_1 / f"{old.name}_logits.safetensors")["logits"]

    torch.testing.assert_close(logits(load(old), make_batch(old)), expected, rtol=1e-4, atol=1e-5)


def test_an_old_checkpoint_is_saved_with_the_same_tensors(old, tmp_path):
    """Only the guard, whose name tells strangers what to do, is another."""
    load(old).save_pretrained(tmp_path)

    before, after = load_file(old / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(before) - set(after) == {GUARDS[1]} and set(after) - set(before) == {GUARDS[0]}
    for name in set(before) & set(after):
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
