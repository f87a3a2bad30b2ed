"""Sums over rows say what the library's own comparison says."""

import math

import pytest
import torch

from benchmarks.measures import joined, perplexity, rows_of
from optimum_qvlm.evaluation.fidelity import answer_logits, compare, right_answers
from tests.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def sides():
    """A model, another one, and batches of rows of which some positions are labelled."""
    model, other = tiny_llama().eval(), tiny_llama().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    batches = []
    for rows in (1, 3):
        ids = torch.randint(10, 50, (rows, 9), generator=generator)
        labels = ids.masked_fill(torch.arange(9) < torch.arange(2, 2 + rows)[:, None], -100)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return model, other, batches


def test_rows_add_up_to_the_comparison(sides):
    model, other, batches = sides
    reference, logits = answer_logits(model, batches), answer_logits(other, batches)

    rows = rows_of(other, reference, batches, torch.arange(4))

    close = compare(reference, logits)
    assert rows.tokens.tolist() == [7, 7, 6, 5]
    assert rows.share("kl") == pytest.approx(close.mean_kl, rel=1e-6) and close.mean_kl > 0
    assert rows.share("agreed") == pytest.approx(close.top1_agreement)
    assert rows.right.bool().tolist() == right_answers(logits, batches)
    assert math.exp(rows.share("loss")) == pytest.approx(perplexity(logits, batches), rel=1e-5)
    assert math.exp(rows.share("reference_loss")) == pytest.approx(perplexity(reference, batches), rel=1e-5)


def test_a_model_beside_itself_differs_nowhere(sides):
    """And answers rightly what it says itself."""
    model, _, batches = sides
    said = model(input_ids=batches[0]["input_ids"]).logits.argmax(-1)
    labels = torch.cat([batches[0]["labels"][:, :1], said[:, :-1]], dim=1)
    batch = batches[0] | {"labels": labels}

    rows = rows_of(model, answer_logits(model, [batch]), [batch], torch.tensor([5]))

    assert rows.kl.tolist() == [0.0] and rows.right.tolist() == [1.0]
    assert joined([rows, rows]).number.tolist() == [5, 5]
