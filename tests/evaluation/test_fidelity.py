"""Closeness to full precision, against cases worked out by hand."""

import math

import pytest
import torch

from optimum_qvlm.errors import DataError
from optimum_qvlm.evaluation.fidelity import Agreement, answer_logits, compare, compare_answers
from tests.tiny_models import llama_batch, tiny_llama

LOG2 = math.log(2)


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(answer, **shape):
    """A batch whose labels mark the token positions `answer`."""
    batch = llama_batch(**shape)
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, answer] = batch["input_ids"][:, answer]
    return batch


def test_a_model_is_no_distance_from_itself():
    logits = [random_logits(5, 50), random_logits(1, 50, seed=1)]

    actual = compare(logits, logits)

    assert (actual.tokens, actual.mean_kl, actual.top1_agreement) == (6, 0.0, 1.0)


def test_divergence_and_agreement_by_hand():
    """Reference (1/2, 1/2, 0+) against (1/4, 3/4, 0+): KL = ln 2 - ln(3) / 2. Second token: equal."""
    tiny = -60.0
    expected = torch.tensor([[math.log(0.5) + 1e-9, math.log(0.5), tiny], [0.0, tiny, tiny]])
    actual = torch.tensor([[math.log(0.25), math.log(0.75), tiny], [0.0, tiny, tiny]])

    fidelity = compare([expected.double()], [actual.double()])

    assert fidelity.tokens == 2
    assert fidelity.mean_kl == pytest.approx((LOG2 - math.log(3) / 2) / 2, rel=1e-6)
    assert fidelity.top1_agreement == 0.5


def test_divergence_is_of_the_model_from_the_reference():
    """The other direction would give ln(4/3) / ... : the two differ."""
    one = torch.tensor([[math.log(0.9), math.log(0.1)]])
    other = torch.tensor([[math.log(0.5), math.log(0.5)]])

    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert compare([one], [other]).mean_kl == pytest.approx(forward, rel=1e-5)
    assert compare([other], [one]).mean_kl == pytest.approx(backward, rel=1e-5)


def test_shifting_all_logits_changes_nothing():
    """Probabilities are what counts."""
    logits = random_logits(4, 10)

    assert compare([logits], [logits + 3]).mean_kl == pytest.approx(0, abs=1e-6)


def test_tokens_count_the_same_whatever_batch_they_are_in():
    expected, actual = random_logits(6, 10), random_logits(6, 10, seed=1)

    whole, split = compare([expected], [actual]), compare(expected.split([1, 5]), actual.split([1, 5]))

    assert split.tokens == whole.tokens
    assert split.mean_kl == pytest.approx(whole.mean_kl, rel=1e-12)
    assert split.top1_agreement == pytest.approx(whole.top1_agreement)


def test_batches_must_correspond():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        compare([random_logits(1, 3)] * 2, [random_logits(1, 3)])


def test_logits_are_those_that_predict_the_answer():
    """The token before each labelled one predicts it."""
    model, batch = tiny_llama(), labelled(slice(8, 11))

    actual = answer_logits(model, [batch])

    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(actual[0], whole[:, 7:10].reshape(6, -1), atol=1e-6)
    assert actual[0].dtype == torch.float32


def test_a_label_on_the_first_token_predicts_nothing():
    """Nothing comes before it."""
    with pytest.raises(DataError, match="batch 0 has no labelled answer tokens to compare on"):
        answer_logits(tiny_llama(), [labelled(slice(0, 1))])


@pytest.mark.parametrize("bad", [llama_batch(), labelled(slice(0, 0))], ids=["no labels", "all ignored"])
def test_batches_without_answers_are_refused_by_number(bad):
    with pytest.raises(DataError, match="batch 1 has no labelled answer tokens to compare on"):
        answer_logits(tiny_llama(), [labelled(slice(8, 11)), bad])


def test_labels_stay_in_the_batch():
    batch = labelled(slice(8, 11))

    answer_logits(tiny_llama(), [batch])

    assert "labels" in batch


def test_greedy_answers_by_hand():
    """The same; another third token; cut off early; an end where the reference goes on."""
    expected = [[5, 6, 7], [5, 6, 7, 8], [5, 6], [5, 6, 7, 8]]
    actual = [[5, 6, 7], [5, 6, 9, 8], [5, 6, 7], [5]]

    agreement = compare_answers(expected, actual)

    assert agreement == Agreement(answers=4, tokens=13 / 4, agreed_tokens=(3 + 2 + 2 + 1) / 4, exact_match=0.25)


def test_a_token_that_agrees_behind_a_difference_does_not_count():
    """What follows another word is an answer to another prompt."""
    assert compare_answers([[1, 2, 3]], [[9, 2, 3]]).agreed_tokens == 0


def test_answers_must_correspond():
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        compare_answers([[1], [2]], [[1]])
