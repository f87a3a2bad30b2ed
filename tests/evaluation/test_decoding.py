"""Decoding must be what users get from `generate`, and say of full precision what one pass says."""

import pytest
import torch
from transformers import GenerationConfig

from optimum_qvlm.evaluation.continuation import continuation_of
from optimum_qvlm.evaluation.decoding import ANSWER_TOKENS, decoded_logits, greedy_answers, pad_token_of
from optimum_qvlm.evaluation.fidelity import IGNORED, answer_logits
from tests.plans import CPU
from tests.tiny_families import FAMILIES, VIDEO_TOKEN
from tests.tiny_models import IMAGE_TOKEN, PAD_TOKEN, llama_batch, tiny_llama

EVERY = pytest.mark.parametrize("name", [name for name in FAMILIES if name != "paligemma"])


def labelled(batch, last=4):
    """The batch with labels on the last real tokens of each row, one fewer in the first row."""
    ids, length = batch["input_ids"], batch["attention_mask"].sum(1, keepdim=True)
    places = torch.arange(ids.shape[1])
    expected = (places < length) & (places >= length - last)
    expected[0, int(length[0]) - last] = False
    ids[(ids == VIDEO_TOKEN) | (ids == IMAGE_TOKEN) & expected] = 5
    return {**batch, "labels": torch.where(expected, ids, IGNORED)}


def cut(batch):
    return continuation_of(batch, [IMAGE_TOKEN], PAD_TOKEN)


@EVERY
@pytest.mark.parametrize("padding", [0, 1], ids=["even", "padded"])
def test_full_precision_says_the_same_at_once_and_by_steps(name, padding):
    """Every family in every form of prompt: images in the first step alone, rows of different lengths."""
    model, batch = FAMILIES[name].build(), labelled(FAMILIES[name].batch(rows=3, seed=5, padding=padding), last=3)

    actual = decoded_logits(model, cut(batch), CPU)

    (expected,) = answer_logits(model, [batch])
    assert actual.shape == expected.shape == (8, expected.shape[1])
    assert torch.allclose(actual, expected, atol=2e-6)
    assert actual.dtype == torch.float32


def test_each_token_but_the_first_has_a_step_of_its_own():
    model, batch, seen = tiny_llama(), labelled(llama_batch()), []
    model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape[:2])))

    decoded_logits(model, cut(batch), CPU)

    assert seen == [(2, 9), (2, 1), (2, 1), (2, 1)]


def test_an_end_token_in_the_answer_ends_nothing():
    """Templates put tokens behind it, which are labelled too."""
    model, batch = tiny_llama(), llama_batch(rows=1)
    batch["input_ids"][0, -3] = model.generation_config.eos_token_id
    batch = labelled(batch)

    actual = decoded_logits(model, cut(batch), CPU)

    assert torch.allclose(actual, answer_logits(model, [batch])[0], atol=2e-6)


def test_greedy_answers_are_those_of_generate():
    model, batch = tiny_llama(), labelled(llama_batch(padding=3))
    prompt = cut(batch).prompt

    actual = greedy_answers(model, cut(batch), CPU)

    output = model.generate(**prompt, do_sample=False, max_new_tokens=ANSWER_TOKENS, eos_token_id=None)
    width = prompt["input_ids"].shape[1]
    assert actual == output[:, width:].tolist()
    assert all(len(row) == ANSWER_TOKENS for row in actual)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_an_answer_ends_with_its_end_token(several):
    model, batch = tiny_llama(), labelled(llama_batch())
    long = greedy_answers(model, cut(batch), CPU)
    end = long[0][2]
    model.generation_config.eos_token_id = [end, 1] if several else end

    actual = greedy_answers(model, cut(batch), CPU)

    assert actual[0] == long[0][: long[0].index(end) + 1]
    assert actual[1][: len(actual[1])] == long[1][: len(actual[1])]


def test_rows_without_an_answer_are_not_asked():
    batch = labelled(llama_batch())
    batch["labels"][1] = IGNORED

    assert len(greedy_answers(tiny_llama(), cut(batch), CPU)) == 1


def test_settings_of_the_model_change_nothing_and_are_left_as_they_were():
    """Sampling, penalties and forced tokens would compare other things than two models."""
    plain, batch = tiny_llama(), labelled(llama_batch())
    own = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, forced_eos_token_id=7, eos_token_id=2, num_beams=2
    )
    model = tiny_llama()
    model.generation_config = own

    assert greedy_answers(model, cut(batch), CPU) == greedy_answers(plain, cut(batch), CPU)
    assert torch.equal(decoded_logits(model, cut(batch), CPU), decoded_logits(plain, cut(batch), CPU))
    assert model.generation_config is own and own.do_sample


def test_inputs_that_only_forward_swallows_are_left_out():
    """Tokenizers of text models may give token types, which `generate` refuses."""
    batch = labelled(llama_batch())
    more = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}

    assert greedy_answers(tiny_llama(), cut(more), CPU) == greedy_answers(tiny_llama(), cut(batch), CPU)


@pytest.mark.parametrize("generation, config, found", [(4, 5, 4), (None, 5, 5), (None, None, 0), (-1, 6, 6)])
def test_prompts_are_padded_with_the_models_pad_token(generation, config, found):
    model = tiny_llama()
    model.generation_config.pad_token_id, model.config.pad_token_id = generation, config

    assert pad_token_of(model) == found
