"""From a dataset and a processor to batches: what is accepted, drawn, padded, cut and recorded."""

import hashlib
import re
import sys
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from optimum_qvlm.data import recipe
from optimum_qvlm.data.loader import (
    LoaderOptions,
    fingerprint,
    make_batches,
    make_labelled_batches,
    make_prompts,
    read_dataset,
    read_held_out,
    tokenizer_of,
)
from optimum_qvlm.data.recipe import Preset
from optimum_qvlm.data.sample import Sample, read_sample
from optimum_qvlm.errors import DataError
from tests.tiny_models import llama_batch, llava_batch

IMAGE_SLOTS = 36
"""Tokens that one image takes in the bundled model."""

BEFORE_IMAGE = 2
"""Tokens before the image: begin of text, user."""


def make_options(num_samples: int = 64, batch_size: int = 8, max_length: int = 512, seed: int = 0) -> LoaderOptions:
    return LoaderOptions(num_samples=num_samples, batch_size=batch_size, max_length=max_length, seed=seed)


def picture(shade: int = 0) -> Image.Image:
    return Image.new("RGB", (20, 30), (shade, shade, shade))


def image_sample(question: str = "hi", answer: str | None = "yes", images: int = 1) -> Sample:
    return read_sample({"images": [picture()] * images, "question": question, "answer": answer}, "sample")


def texts(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("records, taken, held", [(20, 12, 8), (20, 18, 2), (20, 20, 0), (20, 64, 0), (1, 1, 0)])
def test_what_is_held_out_is_not_calibrated_on(records, taken, held, seed):
    """Or figures on it would flatter."""
    data = [{"text": text} for text in texts(records)]
    options = make_options(num_samples=taken, seed=seed)

    left = [sample.text for sample in read_held_out(data, options, wants_images=False, count=8)]

    used = [sample.text for sample in read_dataset(data, options, wants_images=False)[1]]
    assert len(left) == len(set(left)) == held
    assert not set(left) & set(used) and set(left) <= set(texts(records))


def test_ready_inputs_are_held_out_as_they_are():
    data = [llama_batch(rows=1, seed=seed) for seed in range(6)]

    left = read_held_out(data, make_options(num_samples=4), wants_images=False, count=8)

    assert len(left) == 2
    assert all(any(torch.equal(batch["input_ids"], other["input_ids"]) for other in data) for batch in left)


class TestReadDataset:
    """Forms of datasets, and how many of their samples are taken."""

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_a_sequence_of_records_of_several_forms(self, kind):
        records = kind(
            [
                {"image": picture(), "question": "q", "answer": "a"},
                [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
                {"messages": [{"role": "user", "content": "q"}]},
                "text",
                {"text": "text"},
                Sample(text="ready"),
            ]
        )

        source, samples = read_dataset(records, make_options(), wants_images=True)

        assert source == "user"
        assert [sample.has_image for sample in samples] == [True, False, False, False, False, False]
        assert [sample.answer for sample in samples] == ["a", "a", None, None, None, None]
        assert [sample.text for sample in samples] == [None, None, None, "text", "text", "ready"]

    def test_a_datasets_dataset(self):
        features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
        rows = datasets.Dataset.from_dict({"image": [picture()] * 3, "question": ["a", "b", "c"]}, features=features)

        source, samples = read_dataset(rows, make_options(), wants_images=True)

        assert source == "datasets.Dataset"
        assert [sample.messages[0]["content"][1]["text"] for sample in samples] == ["a", "b", "c"]
        assert all(sample.has_image for sample in samples)

    @pytest.mark.parametrize("size, num_samples", [(1, 4), (4, 4), (5, 4), (100, 4), (100, 1)])
    def test_no_more_samples_than_asked_for(self, size, num_samples):
        _, samples = read_dataset(texts(size), make_options(num_samples), wants_images=False)

        drawn = [int(sample.text.split()[1]) for sample in samples]
        assert len(drawn) == min(size, num_samples)
        assert drawn == sorted(set(drawn))

    @pytest.mark.parametrize("seed", range(3))
    def test_the_draw_follows_the_seed(self, seed):
        first, again, other = (
            read_dataset(texts(100), make_options(8, seed=s), wants_images=False)[1] for s in (seed, seed, seed + 1)
        )

        assert first == again
        assert first != other

    def test_only_the_drawn_rows_are_read(self):
        """Each row of an image dataset is a decoded picture: all of them do not fit into memory."""
        read: list[int] = []

        class Rows:
            column_names = ("text",)

            def __len__(self) -> int:
                return 1000

            def __getitem__(self, index: int) -> dict[str, str]:
                read.append(index)
                return {"text": f"text {index}"}

        _, samples = read_dataset(Rows(), make_options(4), wants_images=False)

        assert len(samples) == 4
        assert len(read) <= 5

    @pytest.mark.parametrize("num_samples", [3, 100])
    def test_a_bad_image_is_named_by_its_place_in_the_dataset(self, num_samples):
        """Also where the dataset was sampled: the user looks it up in the whole."""
        records = [{"image": f"gone-{number}.png", "question": "q"} for number in range(100)]

        with pytest.raises(DataError, match=r"dataset\[(\d+)\]: the image gone-\1\.png cannot be read"):
            read_dataset(records, make_options(num_samples, seed=1), wants_images=True)

    @pytest.mark.parametrize("empty", [[], (), datasets.Dataset.from_dict({"text": []})], ids=["list", "tuple", "rows"])
    @pytest.mark.parametrize("wants_images", [True, False])
    def test_an_empty_dataset_is_refused(self, empty, wants_images):
        """An empty one is not None: the packaged set must not slip in."""
        with pytest.raises(DataError, match="the calibration dataset is empty; pass at least one sample, or None"):
            read_dataset(empty, make_options(), wants_images=wants_images)

    def test_a_vision_model_needs_an_image(self):
        with pytest.raises(
            DataError, match=r'none of the 5 calibration samples has an image.*give the records an "image"'
        ):
            read_dataset(texts(5), make_options(), wants_images=True)

    def test_one_image_is_enough(self):
        samples = [*texts(5), {"image": picture(), "question": "q"}]

        assert len(read_dataset(samples, make_options(), wants_images=True)[1]) == 6

    @pytest.mark.parametrize(
        "dataset",
        [
            3,
            {"question": "q"},
            iter(["a"]),
            torch.zeros(2, 2),
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}),
            datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(),
        ],
        ids=["int", "dict", "iterator", "tensor", "splits", "stream"],
    )
    def test_other_containers_are_refused(self, dataset):
        """A single record without its list, a dataset with all its splits, a stream without a length."""
        with pytest.raises(
            DataError, match=r"dataset must be None, a preset's name, a list or a datasets\.Dataset, got"
        ):
            read_dataset(dataset, make_options(), wants_images=False)

    def test_a_wrong_record_is_named(self):
        with pytest.raises(DataError, match=r"dataset\[2\] has the keys \['prompt'\]; expected"):
            read_dataset([*texts(2), {"prompt": "x"}], make_options(), wants_images=False)


class TestModelInputs:
    """Batches that the user made."""

    @pytest.mark.parametrize("wants_images", [True, False])
    def test_they_come_back_as_they_are(self, wants_images):
        """A batch of text alone is the user's decision."""
        batches = [llava_batch(rows=2), llava_batch(rows=3, seed=1)]

        source, actual = read_dataset(batches, make_options(), wants_images=wants_images)

        assert source == "user"
        for given, batch in zip(batches, actual, strict=True):
            assert batch.keys() == given.keys()
            assert all(torch.equal(batch[name], given[name]) for name in given)

    @pytest.mark.parametrize("num_samples, batches", [(1, 1), (2, 1), (3, 2), (4, 2), (6, 3), (50, 3)])
    def test_reading_ends_with_enough_rows(self, num_samples, batches):
        actual = read_dataset([llama_batch(rows=2)] * 3, make_options(num_samples), wants_images=False)[1]

        assert len(actual) == min(batches, num_samples)

    def test_what_a_processor_returns_is_accepted(self):
        """Mappings that are no dicts."""
        _, actual = read_dataset([BatchFeature(llama_batch())], make_options(), wants_images=False)

        assert actual[0].keys() == {"input_ids", "attention_mask"}

    def test_labels_and_what_is_no_tensor_are_left_out(self):
        """With labels the model would compute a loss; lists cannot be moved to a device."""
        batch: dict[str, Any] = llama_batch()
        batch |= {"labels": batch["input_ids"], "id": "a", "sizes": [1, 2]}

        _, actual = read_dataset([batch], make_options(), wants_images=False)

        assert actual[0].keys() == {"input_ids", "attention_mask"}

    @pytest.mark.parametrize(
        "second",
        ["text", {"question": "q"}, {"input_ids": None}],
        ids=["text", "question", "none"],
    )
    def test_a_mixture_is_refused(self, second):
        message = r"dataset\[1\] must be a dict of model inputs with input_ids \[rows, tokens\], as dataset\[0\] is"
        with pytest.raises(DataError, match=message):
            read_dataset([llama_batch(), second], make_options(), wants_images=False)


class TestPresets:
    """Presets go through the real `load_dataset`, here on a folder of parquet files."""

    @pytest.fixture
    def save(self, tmp_path, monkeypatch):
        """A function that makes a preset of some columns, with the library's cache in a temporary folder."""
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

        def save(columns: dict[str, list[Any]], **fields: Any) -> None:
            rows = datasets.Dataset.from_dict(columns)
            if "image" in columns:
                rows = rows.cast_column("image", datasets.Image())
            rows.to_parquet(str(tmp_path / "set" / "train.parquet"))
            preset = Preset(path=str(tmp_path / "set"), split="train", question="question", answer="answer", **fields)
            monkeypatch.setitem(recipe.PRESETS, "local", preset)

        (tmp_path / "set").mkdir()
        return save

    def test_columns_become_samples(self, save):
        save({"image": [picture(9), picture(200)], "question": ["a", "b"], "answer": ["x", "y"], "id": [1, 2]})

        source, samples = read_dataset("local", make_options(), wants_images=True)

        assert source == "preset:local"
        shown = [sample.messages[0]["content"] for sample in samples]
        assert [image["image"].open().getpixel((0, 0))[0] for image, _ in shown] == [9, 200]
        assert [text["text"] for _, text in shown] == ["a", "b"]
        assert [sample.answer for sample in samples] == ["x", "y"]

    def test_rows_without_image_are_left_out(self, save):
        """Half of ScienceQA has none."""
        save({"image": [picture(), None, picture()], "question": list("abc"), "answer": list("xyz")})

        _, samples = read_dataset("local", make_options(), wants_images=True)

        assert [sample.answer for sample in samples] == ["x", "z"]

    def test_an_index_into_choices_becomes_the_choice(self, save):
        save(
            {"question": ["a", "b"], "answer": [1, 0], "choices": [["no", "yes"], ["red", "blue"]]},
            image=None,
            choices="choices",
        )

        _, samples = read_dataset("local", make_options(), wants_images=False)

        assert [sample.answer for sample in samples] == ["yes", "red"]

    def test_the_first_of_several_answers_is_taken(self, save):
        save({"question": ["a"], "answer": [["one", "1"]]}, image=None)

        assert read_dataset("local", make_options(), wants_images=False)[1][0].answer == "one"

    def test_a_large_set_is_sampled(self, save):
        save({"question": [str(n) for n in range(50)], "answer": [str(n) for n in range(50)]}, image=None)

        answers = [sample.answer for sample in read_dataset("local", make_options(5), wants_images=False)[1]]

        assert len(answers) == 5
        assert answers == sorted(answers, key=int)

    def test_an_unknown_preset_is_refused(self):
        with pytest.raises(DataError, match="dataset 'coco' is not a preset; presets: chartqa"):
            read_dataset("coco", make_options(), wants_images=True)

    def test_without_the_library_the_extra_is_named(self, save, monkeypatch):
        save({"question": ["a"], "answer": ["b"]}, image=None)
        monkeypatch.setitem(sys.modules, "datasets", None)

        with pytest.raises(
            DataError, match=r"a preset needs the datasets library: pip install 'optimum-qvlm\[datasets\]'"
        ):
            read_dataset("local", make_options(), wants_images=False)


class TestBatches:
    """Rendering with a processor, padding, cutting."""

    @pytest.mark.parametrize("count, batch_size, rows", [(1, 8, [1]), (8, 8, [8]), (9, 8, [8, 1]), (3, 1, [1, 1, 1])])
    def test_samples_are_stacked_in_order(self, processor, count, batch_size, rows):
        samples = [image_sample(question=str(number)) for number in range(count)]

        batches = make_batches(samples, processor, make_options(batch_size=batch_size))

        assert [len(batch["input_ids"]) for batch in batches] == rows
        assert [len(batch["pixel_values"]) for batch in batches] == rows
        rendered = [
            t for batch in batches for t in processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
        ]
        assert [text[0] for text in rendered] == [str(number) for number in range(count)]

    def test_the_conversation_holds_image_question_and_answer(self, processor):
        (batch,) = make_batches([image_sample("hi", "yes")], processor, make_options())

        image = "<image>" * IMAGE_SLOTS
        assert processor.batch_decode(batch["input_ids"]) == [f"<s><|user|>{image}hi<|assistant|>yes</s>"]
        assert batch.keys() == {"input_ids", "attention_mask", "pixel_values"}

    def test_without_answer_the_question_is_all(self, processor):
        (batch,) = make_batches([image_sample("hi", None)], processor, make_options())

        assert processor.batch_decode(batch["input_ids"])[0].endswith("<image>hi")

    @pytest.mark.parametrize("images", [0, 1, 2])
    def test_any_number_of_images(self, processor, images):
        (batch,) = make_batches([image_sample(images=images)], processor, make_options())

        assert int((batch["input_ids"] == processor.image_token_id).sum()) == images * IMAGE_SLOTS
        assert ("pixel_values" in batch) == (images > 0)

    def test_samples_with_and_without_image_share_a_batch(self, processor):
        samples = [image_sample(), read_sample({"question": "hi", "answer": "no"}, "s"), Sample(text="a passage")]

        (batch,) = make_batches(samples, processor, make_options())

        assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [IMAGE_SLOTS, 0, 0]
        assert len(batch["pixel_values"]) == 1

    @pytest.mark.parametrize("flat", [True, False], ids=["tokenizer", "processor"])
    def test_plain_texts_are_read_without_a_template(self, processor, flat):
        reader = processor.tokenizer if flat else processor

        (batch,) = make_batches([Sample(text="hello you"), Sample(text="hi")], reader, make_options())

        decoded = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
        assert decoded == ["hello you", "hi"]
        assert "<|user|>" not in processor.batch_decode(batch["input_ids"])[0]

    def test_a_tokenizer_with_a_template_renders_questions(self, processor):
        """Text models: content is a string there."""
        sample = read_sample({"question": "hi", "answer": "yes"}, "s")

        (batch,) = make_batches([sample, sample], processor.tokenizer, make_options())

        assert processor.batch_decode(batch["input_ids"]) == ["<s><|user|>hi<|assistant|>yes</s>"] * 2

    def test_a_tokenizer_without_a_template_gets_question_and_answer(self, processor):
        tokenizer = processor.tokenizer
        tokenizer.chat_template = None
        sample = read_sample({"question": "hi", "answer": "yes"}, "s")

        (batch,) = make_batches([sample], tokenizer, make_options())

        assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "hi\nyes"

    def test_images_need_a_template(self, processor):
        processor.tokenizer.chat_template = None

        with pytest.raises(DataError, match="no chat template, which image samples need"):
            make_batches([image_sample()], processor.tokenizer, make_options())

    @pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, IndexError])
    def test_what_the_processor_refuses_is_explained(self, processor, monkeypatch, error):
        def refuse(*_: Any, **__: Any) -> None:
            raise error("image tokens do not match")

        monkeypatch.setattr(processor, "apply_chat_template", refuse)

        message = r"LlavaProcessor cannot process the calibration samples: .*do not match.*ready model inputs"
        with pytest.raises(DataError, match=message) as caught:
            make_batches([image_sample()], processor, make_options())

        assert isinstance(caught.value.__cause__, error)

    def test_what_the_template_refuses_is_explained(self, processor):
        """Many published templates raise for system turns, or for roles that do not alternate."""
        processor.chat_template = "{{ raise_exception('roles must alternate') }}"

        with pytest.raises(
            DataError, match=r"LlavaProcessor cannot process the calibration samples: roles must alternate"
        ):
            make_batches([image_sample()], processor, make_options())

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("flat", [True, False], ids=["tokenizer", "processor"])
    def test_padding_is_on_the_right_and_the_tokenizer_gets_its_side_back(self, processor, side, flat):
        """The processor is the user's own object."""
        processor.tokenizer.padding_side = side
        reader = processor.tokenizer if flat else processor
        samples = [read_sample({"question": q, "answer": "yes"}, "s") for q in ("hi", "hi there my friend")]

        (batch,) = make_batches(samples, reader, make_options())

        mask = batch["attention_mask"]
        assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True)
        assert int(mask[0].sum()) < int(mask[1].sum()) == mask.shape[1]
        assert processor.tokenizer.padding_side == side

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_side_is_restored_after_an_error(self, processor, side):
        processor.tokenizer.padding_side = side
        processor.tokenizer.chat_template = None

        with pytest.raises(DataError, match="no chat template"):
            make_batches([image_sample()], processor.tokenizer, make_options())

        assert processor.tokenizer.padding_side == side

    def test_a_tokenizer_without_pad_token_pads_with_the_end(self, processor):
        """Llama's has none."""
        tokenizer = processor.tokenizer
        tokenizer.pad_token = None

        (batch,) = make_batches([Sample(text="hi"), Sample(text="hello you there")], tokenizer, make_options())

        padded = batch["input_ids"][0][batch["attention_mask"][0] == 0]
        assert len(padded) > 0 and set(padded.tolist()) == {tokenizer.eos_token_id}

    @pytest.mark.parametrize("max_length", [1, 3, 5, 100])
    def test_long_texts_lose_their_end(self, processor, max_length):
        samples = [Sample(text="hello you there"), Sample(text="hi")]
        (whole,) = make_batches(samples, processor, make_options())

        (batch,) = make_batches(samples, processor, make_options(max_length=max_length))

        length = min(max_length, whole["input_ids"].shape[1])
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(batch[name], whole[name][:, :length])

    @pytest.mark.parametrize("max_length", [1, 20, BEFORE_IMAGE + IMAGE_SLOTS, BEFORE_IMAGE + IMAGE_SLOTS + 3])
    def test_a_cut_never_goes_through_an_image(self, processor, max_length):
        """The model refuses a text whose image tokens do not fit its patches."""
        samples = [image_sample("hi there my friend"), image_sample("hi")]

        (batch,) = make_batches(samples, processor, make_options(max_length=max_length), (processor.image_token_id,))

        length = max(max_length, BEFORE_IMAGE + IMAGE_SLOTS)
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, length)
        assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [IMAGE_SLOTS] * 2
        assert batch["pixel_values"].shape == (2, 3, 48, 48)

    def test_the_last_image_of_any_row_counts(self, processor):
        samples = [image_sample(images=1), image_sample(images=3)]

        (batch,) = make_batches(samples, processor, make_options(max_length=50), (processor.image_token_id,))

        assert batch["input_ids"].shape[1] == BEFORE_IMAGE + 3 * IMAGE_SLOTS

    def test_the_same_samples_give_the_same_batches(self, processor):
        samples = [image_sample(str(number)) for number in range(5)]

        first, second = (fingerprint(make_batches(samples, processor, make_options(batch_size=2))) for _ in range(2))

        assert first == second

    def test_the_tokenizer_is_found_in_a_processor_or_is_itself(self, processor):
        assert tokenizer_of(processor) is processor.tokenizer
        assert tokenizer_of(processor.tokenizer) is processor.tokenizer


class TestPrompts:
    """What is generated from, and where answers begin."""

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_prompts_end_where_the_answer_begins(self, processor, side):
        """Padded on the left, so that generation goes on from the last real token of every row."""
        processor.tokenizer.padding_side = side
        samples = [image_sample("hi", "yes"), image_sample("hi there my friend", None)]

        batch = make_prompts(samples, processor)

        texts = processor.batch_decode(batch["input_ids"])
        assert all(text.endswith("<|assistant|>") for text in texts)
        assert texts[0].startswith("<pad>") and not texts[1].startswith("<pad>")
        assert bool((batch["attention_mask"][:, -1] == 1).all())
        assert processor.tokenizer.padding_side == side

    def test_labels_are_the_answers_and_their_end(self, processor):
        samples = [image_sample("hi", "yes"), image_sample("hi there my friend", "no way"), image_sample("a", "yes")]

        batches = make_labelled_batches(samples, processor, make_options(batch_size=2))

        answers = [row[row != -100] for batch in batches for row in batch["labels"]]
        assert [processor.decode(answer) for answer in answers] == ["yes</s>", "no way</s>", "yes</s>"]
        for batch in batches:
            labelled = batch["labels"] != -100
            assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
            assert bool((batch["attention_mask"][labelled] == 1).all())

    def test_labels_follow_a_cut(self, processor):
        samples = [image_sample("hi", "yes"), image_sample("hi there my friend " * 6, "no")]
        options = make_options(max_length=BEFORE_IMAGE + IMAGE_SLOTS + 8)

        (batch,) = make_labelled_batches(samples, processor, options, (processor.image_token_id,))

        assert batch["labels"].shape == batch["input_ids"].shape
        assert (batch["labels"] != -100).sum(dim=1).tolist() == [2, 0]


class TestFingerprint:
    """The record of what was used."""

    def test_it_is_the_hash_of_names_dtypes_shapes_and_bytes(self):
        """Written out here, since saved models are compared by it over releases."""
        ids = torch.tensor([[1, 2]])
        mask = torch.tensor([[True, False]])

        expected = hashlib.sha256(
            b"attention_mask torch.bool (1, 2)\x01\x00" + b"input_ids torch.int64 (1, 2)" + ids.numpy().tobytes()
        )
        assert fingerprint([{"input_ids": ids, "attention_mask": mask}]) == expected.hexdigest()

    @pytest.mark.parametrize("name", ["input_ids", "attention_mask", "pixel_values"])
    @pytest.mark.parametrize("place", [0, -1])
    def test_any_change_of_a_value_shows(self, name, place):
        batch, changed = llava_batch(), llava_batch()
        flat = changed[name].view(-1)
        flat[place] = (
            torch.nextafter(flat[place], flat.new_tensor(9.0)) if flat.is_floating_point() else flat[place] + 1
        )

        assert fingerprint([changed]) != fingerprint([batch])

    def test_names_dtypes_shapes_and_order_show(self):
        x = torch.arange(6)
        variants = [
            [{"a": x}],
            [{"b": x}],
            [{"a": x.int()}],
            [{"a": x.reshape(2, 3)}],
            [{"a": x.flip(0)}],
            [{"a": x}, {"a": x}],
            [{"a": x, "b": x}],
            [{"a": x}, {"b": x + 1}],
            [{"b": x + 1}, {"a": x}],
            [{"a": x[:3]}, {"a": x[3:]}],
            [],
        ]

        assert len({fingerprint(batches) for batches in variants}) == len(variants)

    def test_layout_in_memory_and_order_of_names_do_not_matter(self):
        batch = llava_batch()
        strided = {name: batch[name].transpose(0, 1).contiguous().transpose(0, 1) for name in reversed(batch)}

        assert fingerprint([strided]) == fingerprint([batch])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)], ids=str)
    def test_every_dtype_and_shape_has_one(self, dtype, shape):
        digest = fingerprint([{"x": torch.ones(shape, dtype=dtype)}])

        assert re.fullmatch("[0-9a-f]{64}", digest)


def test_batches_are_dicts_of_tensors(processor):
    """Processors also return lists and strings, which no device takes."""
    (batch,) = make_batches([image_sample()], processor, make_options())

    assert type(batch) is dict
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
