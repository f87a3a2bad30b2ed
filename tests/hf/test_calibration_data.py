"""What must be in order before a calibration starts."""

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from optimum_qvlm.data.loader import fingerprint
from optimum_qvlm.errors import CheckpointError, DataError
from optimum_qvlm.hf.calibration_data import LABELS_PER_SAMPLE, prepare_data, require_all_loaded
from optimum_qvlm.hf.format.names import disk_names_of_linears
from optimum_qvlm.hf.saving.source import Source
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.planner import make_plan
from tests.configs import make_config
from tests.jobs import load
from tests.tiny_models import IMAGE_TOKEN, llama_batch, llava_batch, tiny_llama

CPU = torch.device("cpu")


def prepare(folder, **settings):
    """`prepare_data` for the model in `folder`."""
    model, config = load(folder), make_config(**settings)
    plan = make_plan(adapter_for(model), config.options(), disk_names_of_linears(model, []))
    return prepare_data(model, plan, config, Source(folder=folder), CPU)


def forget(model, *names):
    """Mark parameters as transformers leaves those that the checkpoint lacks."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor._is_hf_initialized = name not in names


def test_a_loaded_model_is_accepted(llava_folder):
    require_all_loaded(load(llava_folder))


@pytest.mark.parametrize(
    "names, message",
    [
        (["model.norm.weight"], "lacks model.norm.weight, so these weights are random; fetch it again"),
        (["lm_head.weight"], "lacks lm_head.weight"),
        (
            [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkvo"],
            r"lacks model.layers.0.self_attn.q_proj.weight, .* and 1 more",
        ),
    ],
    ids=["one", "head", "many"],
)
def test_missing_weights_are_refused(names, message):
    """transformers fills them at random with no more than a warning."""
    model = tiny_llama()
    forget(model, *names)

    with pytest.raises(CheckpointError, match=message):
        require_all_loaded(model)


def test_tied_weights_need_not_be_in_the_checkpoint(tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)

    require_all_loaded(load(tmp_path))


def test_weights_that_the_model_declares_optional_may_be_missing():
    model = tiny_llama()
    model._keys_to_ignore_on_load_missing = [r"norm\.weight"]
    forget(model, "model.norm.weight")

    require_all_loaded(model)


def test_ready_inputs_are_taken_as_they_are(llava_folder):
    batches = [llava_batch(rows=2, seed=0), llava_batch(rows=3, seed=1)]

    data = prepare(llava_folder, dataset=batches)

    assert fingerprint(data.batches) == fingerprint(batches)


def test_the_recipe_records_what_was_used(llava_folder):
    batches = [llava_batch(rows=2, seed=0), llava_batch(rows=3, seed=1)]

    recipe = prepare(llava_folder, dataset=batches, seed=5).recipe

    assert (recipe.source, recipe.samples, recipe.seed) == ("user", 5, 5)
    assert recipe.fingerprint == fingerprint(batches)


def test_conversations_are_rendered_and_answered(bundled_folder):
    from PIL import Image

    record = {"image": Image.new("RGB", (32, 32), "red"), "question": "what colour?"}

    data = prepare(bundled_folder, dataset=[record] * 3, batch_size=2)

    assert [batch["input_ids"].shape[0] for batch in data.batches] == [2, 1]
    assert all("pixel_values" in batch for batch in data.batches)


def test_inputs_without_an_image_token_are_refused(llava_folder):
    """The tower would have nothing to be calibrated on."""
    with pytest.raises(DataError, match=r"no calibration input holds an image token \(49\)"):
        prepare(llava_folder, dataset=[llama_batch()])


def test_text_models_need_no_image(llama_folder):
    assert len(prepare(llama_folder, dataset=[llama_batch()]).batches) == 1


def test_a_named_processor_that_is_not_there_is_refused(llama_folder, tmp_path):
    with pytest.raises(DataError, match=r"processor='.*nowhere' could not be loaded"):
        prepare(llama_folder, dataset=["Hello"], processor=str(tmp_path / "nowhere"))


def test_a_named_processor_is_loaded(tmp_path, bundled_folder):
    tiny_llama(vocab_size=384).save_pretrained(tmp_path)

    data = prepare(tmp_path, dataset=["Hello"], processor=str(bundled_folder))

    assert data.batches[0]["input_ids"].shape[0] == 1


def test_labels_mark_the_answers_where_the_encoder_learns_from_them(bundled_folder):
    """Answers alone: the loss would else be that of guessing the questions."""
    picture = Image.new("RGB", (48, 48), (200, 30, 30))
    records = [{"image": picture, "question": "Is there a 4?", "answer": answer} for answer in ("yes", "no")]
    tokenizer = AutoProcessor.from_pretrained(bundled_folder).tokenizer

    data = prepare(bundled_folder, dataset=records, encoder_epochs=1)

    texts = [tokenizer.decode(row[row != -100], skip_special_tokens=True).strip() for row in data.labels[0]]
    assert texts == ["yes", "no"]


def test_model_inputs_have_labels_where_they_have_text(llava_folder):
    """They do not say what the answer is."""
    batch = llava_batch(padding=2)

    labels = prepare(llava_folder, dataset=[batch], encoder_epochs=1).labels[0]

    text = (batch["input_ids"] != IMAGE_TOKEN) & batch["attention_mask"].bool()
    assert torch.equal(labels, torch.where(text, batch["input_ids"], -100))


def test_learning_from_answers_changes_no_batch(bundled_folder):
    """The fingerprint says what data was used, not what for."""
    records = [{"image": Image.new("RGB", (48, 48)), "question": "Is there a 4?", "answer": "no"}]

    plain, learned = (prepare(bundled_folder, dataset=records, encoder_epochs=epochs) for epochs in (0, 1))

    assert learned.recipe == plain.recipe
    assert all("labels" not in batch for batch in learned.batches)


def test_of_an_answer_the_first_tokens_are_held_out_and_of_a_text_the_last(bundled_folder):
    """What is decoded then has the whole text before it; a text's first token would be a prompt like any other's."""
    picture = {"image": Image.new("RGB", (48, 48)), "question": "Is there a 4?", "answer": "no " * 50}
    text = {"text": "is there a 4 in the square or not " * 12}

    data = prepare(bundled_folder, dataset=[picture] * 4 + [text] * 8, num_samples=4)

    assert len(data.held_out) >= 2
    for batch in data.held_out:
        labelled, ends = batch["labels"] != -100, batch["attention_mask"].sum(1, keepdim=True) - 1
        assert labelled.sum(1).tolist() == [LABELS_PER_SAMPLE] * len(labelled)
        at_the_end = labelled.gather(1, ends)
        assert not at_the_end.any() if "pixel_values" in batch else at_the_end.all()


@pytest.mark.parametrize("decode_tokens, exact, rows", [(16, False, 8), (3, False, 3), (3, True, 8), (0, False, 8)])
def test_held_out_batches_decode_as_few_sequences_do(bundled_folder, decode_tokens, exact, rows):
    """More rows than `decode_tokens` would be decoded with rounded activations, and said to be what users see."""
    records = [{"image": Image.new("RGB", (48, 48)), "question": f"Is there a {n}?", "answer": "no"} for n in range(9)]

    settings = {"decode_tokens": decode_tokens, "exact_decode": exact}
    data = prepare(bundled_folder, dataset=records, num_samples=1, batch_size=8, **settings)

    assert max(batch["input_ids"].shape[0] for batch in data.held_out) == rows
    assert sum(batch["input_ids"].shape[0] for batch in data.held_out) == 8


def test_ready_inputs_are_held_out_with_their_last_text(llava_folder):
    data = prepare(llava_folder, dataset=[llava_batch(tokens=60, seed=seed) for seed in range(3)], num_samples=2)

    (batch,) = data.held_out
    assert (batch["labels"] != -100).sum(1).tolist() == [LABELS_PER_SAMPLE] * 2
    assert bool((batch["labels"][:, -LABELS_PER_SAMPLE:] != -100).all())
