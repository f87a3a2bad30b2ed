"""How a labelled batch is cut into prompts and answers: what `generate` gets must be what the row says."""

import pytest
import torch

from optimum_qvlm.evaluation.continuation import continuation_of
from optimum_qvlm.evaluation.fidelity import IGNORED

IMAGE, PAD = 9, 0


def batch_of(rows, labelled, mask=None, **more):
    """A batch of token ids with labels at the places `labelled` of each row."""
    ids = torch.tensor(rows)
    labels = torch.full_like(ids, IGNORED)
    for row, places in enumerate(labelled):
        labels[row, places] = ids[row, places]
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **more}


def test_a_row_is_cut_before_its_first_label():
    actual = continuation_of(batch_of([[1, 2, 3, 4, 5]], [[3, 4]]), [], PAD)

    assert actual.prompt["input_ids"].tolist() == [[1, 2, 3]]
    assert actual.tokens.tolist() == [[4, 5]]
    assert actual.counted.all() and actual.labelled.tolist() == [True, True]


def test_prompts_are_padded_on_the_left_and_answers_on_the_right():
    """Where each row's prompt ends is where generation goes on."""
    batch = batch_of([[1, 2, 3, 4, 5], [1, 6, 7, 0, 0]], [[3, 4], [2]], mask=[[1] * 5, [1, 1, 1, 0, 0]])

    actual = continuation_of(batch, [], PAD)

    assert actual.prompt["input_ids"].tolist() == [[1, 2, 3], [PAD, 1, 6]]
    assert actual.prompt["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert actual.tokens.tolist() == [[4, 5], [7, PAD]]
    assert actual.counted.tolist() == [[True, True], [True, False]]


def test_padding_on_the_left_goes_and_no_wider_prompt_comes():
    batch = batch_of([[0, 0, 1, 2, 3], [0, 1, 4, 5, 6]], [[4], [4]], mask=[[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])

    actual = continuation_of(batch, [], PAD)

    assert actual.prompt["input_ids"].tolist() == [[PAD, 1, 2], [1, 4, 5]]
    assert actual.tokens.tolist() == [[3], [6]]


def test_padding_never_stands_for_an_image():
    """Models count image tokens whether they are masked or not, and would miss a picture."""
    batch = batch_of([[IMAGE, IMAGE, 3, 4, 5], [IMAGE, IMAGE, 7, 8, 8]], [[4], [3]])

    actual = continuation_of(batch, [IMAGE], PAD)

    assert (actual.prompt["input_ids"] == IMAGE).sum() == 4
    assert actual.prompt["input_ids"][1, 0] == PAD


def test_decoding_begins_behind_the_images():
    """Labels before an image, and of what follows it at once, are the prompt's: images go in with the first step."""
    batch = batch_of([[1, 2, IMAGE, 4, 5, 6]], [[1, 3, 4, 5]])

    actual = continuation_of(batch, [IMAGE], PAD)

    assert actual.prompt["input_ids"].tolist() == [[1, 2, IMAGE, 4]]
    assert actual.tokens.tolist() == [[5, 6]]
    assert actual.labelled.tolist() == [False, False, True, True]


def test_what_lies_between_labels_is_said_but_not_counted():
    actual = continuation_of(batch_of([[1, 2, 3, 4, 5, 6]], [[2, 4]]), [], PAD)

    assert actual.tokens.tolist() == [[3, 4, 5]]
    assert actual.counted.tolist() == [[True, False, True]]


def test_a_row_without_answer_is_all_prompt():
    """It stays in the batch, since its images cannot be told from those of the others."""
    actual = continuation_of(batch_of([[1, 2, 3], [4, 5, 6]], [[2], []]), [], PAD)

    assert actual.prompt["input_ids"].tolist() == [[PAD, 1, 2], [4, 5, 6]]
    assert actual.counted.tolist() == [[True], [False]]


def test_counted_places_are_in_the_order_of_the_labels():
    """Logits of both ways to read an answer are compared line by line."""
    batch = batch_of([[1, 2, IMAGE, 4, 5], [1, 6, 7, 8, 3]], [[1, 4], [1, 3]])

    actual = continuation_of(batch, [IMAGE], PAD)

    in_order = batch["labels"][:, 1:][batch["labels"][:, 1:] != IGNORED][actual.labelled]
    assert in_order.tolist() == actual.tokens[actual.counted].tolist() == [5, 6, 8]


def test_tensors_along_the_tokens_are_cut_with_them_and_others_kept():
    kinds, pixels = torch.tensor([[3, 3, 3, 4], [5, 5, 6, 6]]), torch.randn(2, 3)
    batch = batch_of([[1, 2, 3, 4], [1, 2, 3, 4]], [[3], [2]], token_type_ids=kinds, pixel_values=pixels)

    actual = continuation_of(batch, [], PAD)

    assert actual.prompt["token_type_ids"].tolist() == [[3, 3, 3], [0, 5, 5]]
    assert actual.prompt["pixel_values"] is pixels
    assert "labels" not in actual.prompt


def test_without_a_mask_every_token_is_real():
    batch = batch_of([[1, 2, 3]], [[2]])
    del batch["attention_mask"]

    assert continuation_of(batch, [], PAD).prompt["attention_mask"].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "labelled", [[[]], [[0]], [[1]], [[2]]], ids=["none", "first token", "before an image", "at once behind it"]
)
def test_nothing_to_decode_is_no_continuation(labelled):
    assert continuation_of(batch_of([[1, IMAGE, 3]], labelled), [IMAGE], PAD) is None
