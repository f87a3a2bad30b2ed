"""Model inputs that no model takes are refused by sample, in the dry run too."""

import re

import datasets
import pytest
import torch

from optimum_qvlm import QVLMConfig, dry_run
from optimum_qvlm.errors import DataError
from tests.jobs import quantize
from tests.tiny_models import VOCABULARY, llama_batch


def wrong_id(value):
    batch = llama_batch(rows=2)
    batch["input_ids"][1, 3] = value
    return batch


def empty(rows, tokens):
    return {"input_ids": torch.zeros(rows, tokens, dtype=torch.long)}


CASES = {
    "beyond": (wrong_id(VOCABULARY), r"dataset\[1\], row 1: token id 50 at place 3 is outside 0\.\.49"),
    "far beyond": (wrong_id(2**40), r"dataset\[1\], row 1: token id 1099511627776 at place 3 is outside"),
    "negative": (wrong_id(-100), r"dataset\[1\], row 1: token id -100 at place 3 is outside"),
    "float": ({"input_ids": torch.ones(1, 4)}, r"dataset\[1\]: input_ids must be integers .* got torch\.float32"),
    "bool": ({"input_ids": torch.ones(1, 4).bool()}, r"dataset\[1\]: input_ids must be integers .* got torch\.bool"),
    "list": ({"input_ids": [[1, 2]]}, r"dataset\[1\]: input_ids must be a tensor \[rows, tokens\], got list"),
    "one dimension": ({"input_ids": torch.tensor([1, 2])}, r"dataset\[1\]: input_ids has the shape \[2\]; .*unsqueeze"),
    "no tokens": (empty(1, 0), r"dataset\[1\] is empty"),
    "no rows": (empty(0, 5), r"dataset\[1\] is empty"),
    "masked": (
        llama_batch(rows=1) | {"attention_mask": torch.zeros(1, 12)},
        r"dataset\[1\] is empty: its attention_mask",
    ),
    "mask of another shape": (
        llama_batch(rows=1) | {"attention_mask": torch.ones(1, 3)},
        r"dataset\[1\]: attention_mask has the shape \[1, 3\], input_ids \[1, 12\]",
    ),
    "empty text": ("", r"dataset\[1\] must be a dict of model inputs"),
}


@pytest.mark.parametrize("tried", [False, True], ids=["real", "dry run"])
@pytest.mark.parametrize("case", CASES)
def test_a_bad_sample_is_named_with_its_reason(case, tried, llama_folder):
    sample, message = CASES[case]
    dataset = [llama_batch(rows=1), sample]

    with pytest.raises(DataError, match=message):
        dry_run(llama_folder, QVLMConfig(dataset=dataset)) if tried else quantize(llama_folder, dataset=dataset)


def test_rows_of_a_dataset_in_torch_format_are_explained(llama_folder):
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]]}).with_format("torch")

    with pytest.raises(DataError, match=r"dataset\[0\]: input_ids has the shape \[3\].*torch format"):
        quantize(llama_folder, dataset=rows)


def test_a_processor_of_another_model_is_found_out(llama_folder, bundled_folder):
    """Its ids lie beyond the embedding."""
    with pytest.raises(DataError, match=re.escape("dataset[0]: token id") + ".*use the tokenizer or processor of this"):
        quantize(llama_folder, dataset=["how many digits"], processor=str(bundled_folder))


@pytest.mark.parametrize(
    "record", ["", " \n", {"text": ""}, {"question": "", "answer": None}, [{"role": "user", "content": ""}]]
)
def test_an_empty_sample_is_named(record, llama_folder, bundled_folder):
    with pytest.raises(DataError, match=r"dataset\[1\] holds neither text nor image; fill or remove it"):
        quantize(llama_folder, dataset=["text", record], processor=str(bundled_folder))
