"""The benchmark of calibration: what it builds, what it counts, and how it extrapolates."""

import argparse
import sys

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig

from benchmarks.shapes import SHAPES, llama
from benchmarks.speed import calibration
from benchmarks.speed.calibration import Measurement, Stopwatch, TimeIsUp


def tiny_llava():
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2, image_size=28, patch_size=14
    )
    return LlavaConfig(vision_config=vision, text_config=llama(32, 64, 5, 2, 2, 1200), image_token_index=1100)


@pytest.fixture
def tiny(monkeypatch):
    """A shape of its own, with five layers in the decoder and five in the tower that are read."""
    monkeypatch.setitem(SHAPES, "tiny", tiny_llava)
    return "tiny"


def settings(shape, **changes):
    values = {"random_init": shape, "device": "cpu", "scheme": "w4a8", "layers": 2, "samples": 3, "tokens": None}
    return argparse.Namespace(**(values | {"batch": 2, "limit": 300.0} | changes))


def watch_over(*blocks, limit, part="language"):
    """A stopwatch that has seen blocks of (layers, seconds)."""
    watch = Stopwatch(part, limit)
    for layers, seconds in blocks:
        watch.set_description(f"block 1/9, {part} layer 0")
        watch.block_started -= seconds
        watch.update(layers)
    return watch


@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_part_is_measured_with_all_its_layers(tiny, part):
    """From the cut model to the number for the whole one."""
    found = calibration.measure(part, "fast", settings(tiny))

    assert (found.layers, found.built) == (5, 2)
    assert found.searched in (1, 2)
    assert found.search_seconds > 0 and found.prepare_seconds > 0
    assert found.whole_seconds == pytest.approx(5 * found.seconds_per_layer)


def test_time_that_is_up_ends_after_the_first_block(tiny):
    found = calibration.measure("language", "fast", settings(tiny, limit=0.0))
    assert (found.searched, found.deepest) == (1, 1)


def test_the_extrapolation_counts_preparation_by_built_and_search_by_searched_layers():
    found = Measurement(
        part="language",
        effort="fast",
        layers=40,
        built=4,
        searched=2,
        prepare_seconds=8.0,
        search_seconds=30.0,
        deepest=2,
        peak_bytes=0,
        reserved_bytes=0,
    )
    assert found.seconds_per_layer == 17.0
    assert found.whole_seconds == 680.0


def test_the_first_of_several_blocks_is_not_counted():
    """It compiles what the others find compiled."""
    layers, seconds = watch_over((1, 9.0), (2, 4.0), (1, 2.0), limit=100).searched()
    assert layers == 3
    assert seconds == pytest.approx(6, abs=0.1)


def test_an_only_block_is_counted():
    layers, seconds = watch_over((2, 9.0), limit=100).searched()
    assert layers == 2
    assert seconds == pytest.approx(9, abs=0.1)


def test_no_block_is_begun_that_would_end_too_late():
    """Going by the mean of the layers so far: 20 s are spent, and one more layer would take 10."""
    watch_over((2, 20.0), limit=31)
    with pytest.raises(TimeIsUp, match=r"^$"):
        watch_over((2, 20.0), limit=29)


def test_blocks_of_other_parts_do_not_count():
    watch = Stopwatch("vision", 0.0)
    watch.set_description("block 3/9, language layer 0-1")
    watch.update(2)
    assert watch.blocks == []


def test_one_part_is_cut_and_the_other_nearly_gone():
    """A tower has one layer more than are read."""
    language, vision = (calibration.shortened(tiny_llava(), part, 3) for part in ("language", "vision"))

    assert language.text_config.num_hidden_layers == 3
    assert (language.vision_config.num_hidden_layers, calibration.layers_of(language, "vision")) == (2, 1)
    assert vision.text_config.num_hidden_layers == 1
    assert calibration.layers_of(vision, "vision") == 3


def test_no_more_layers_are_built_than_there_are():
    assert calibration.layers_of(calibration.shortened(tiny_llava(), "language", 99), "language") == 5
    assert calibration.layers_of(calibration.shortened(tiny_llava(), "vision", 99), "vision") == 5


def test_inputs_are_images_text_and_padding():
    """As a processor would make them of the packaged samples."""
    config = tiny_llava()

    batches = calibration.make_inputs(config, settings("tiny", samples=5))

    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert bool((ids[:, :4] == config.image_token_id).all())
        assert int((ids == config.image_token_id).sum()) == 4 * len(ids)
        assert batch["pixel_values"].shape == (len(ids), 3, 28, 28)
        assert int(mask.sum(1).max()) == ids.shape[1]
        assert bool((mask.diff(dim=1) <= 0).all())
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert len(lengths.unique()) > 1


def test_every_row_may_be_given_one_length():
    batches = calibration.make_inputs(tiny_llava(), settings("tiny", tokens=7))
    assert all(batch["input_ids"].shape[1] == 11 and bool(batch["attention_mask"].all()) for batch in batches)


def test_a_text_model_gets_passages_and_no_image():
    batches = calibration.make_inputs(SHAPES["smollm2-135m"](), settings("smollm2-135m", samples=2))
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in batches)


def test_the_table_is_last_and_whole(tiny, monkeypatch, capsys):
    command = ["calibration.py", "--random-init", tiny, "--layers", "2", "--samples", "2", "--efforts", "fast"]
    monkeypatch.setattr(sys, "argv", command)

    calibration.main()

    heading, columns, *rows, whole = capsys.readouterr().out.splitlines()
    assert "tiny, w4a8, 2 samples" in heading
    assert columns.split()[:2] == ["part", "effort"] and columns.endswith("minutes, extrapolated")
    assert [row.split()[:3] for row in rows] == [["language", "fast", "2"], ["vision", "fast", "2"]]
    assert whole.startswith("language and vision, fast: ") and whole.endswith(" minutes, extrapolated")


def test_a_part_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["calibration.py", "--random-init", "smollm2-135m", "--parts", "vision"])
    with pytest.raises(SystemExit, match="2"):
        calibration.main()
    assert "smollm2-135m has no tower" in capsys.readouterr().err
