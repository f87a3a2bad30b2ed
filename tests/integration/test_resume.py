"""A calibration that is killed goes on where it was, and ends as if nothing had happened."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_qvlm import QVLMConfig
from optimum_qvlm.errors import JournalError
from tests.jobs import load, make_batch
from tests.tiny_models import llama_batch

FORK = multiprocessing.get_context("fork")
"""Processes that have imported everything already."""

TIMES = ("seconds",)


def quantize(folder, **settings):
    """A tiny model, or the bundled one on its own samples."""
    if "dataset" not in settings and not (folder / "tokenizer.json").exists():
        settings["dataset"] = [make_batch(folder, seed=0, padding=2), make_batch(folder, seed=1)]
    return load(folder, quantization_config=QVLMConfig(**settings))


def quantize_and_save(folder, output, settings):
    torch.set_num_threads(1)
    quantize(folder, **settings).save_pretrained(output)


def started(folder, output, **settings):
    process = FORK.Process(target=quantize_and_save, args=(folder, output, settings))
    process.start()
    return process


def killed_when(folder, output, condition, **settings):
    """Start, and SIGKILL as soon as the condition holds. Returns whether that was before the end."""
    process = started(folder, output, **settings)
    while process.is_alive() and not condition():
        time.sleep(0.002)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def passed(moment):
    return time.perf_counter() > moment


def finished(folder, output, **settings):
    process = started(folder, output, **settings)
    process.join()
    assert process.exitcode == 0


def processor_seconds():
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(each) for name, each in value.items() if name not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def require_same(first, second):
    """All files byte for byte, of the report all but its times."""
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        if name == "qvlm_report.json":
            reports = [without_times(json.loads((folder / name).read_text())) for folder in (first, second)]
            assert reports[0] == reports[1]
        elif name not in ("README.md", "qvlm_report.html", "qvlm_report.svg"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


def entries(journal, pattern="*.safetensors"):
    return sorted(path.name for path in journal.glob(pattern))


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "w4a4", "vision_scheme": "w4a4", "encoder": {"epochs": 3}},
        {"scheme": "w4a8", "servable": True, "search": {"threshold": 0.0}},
    ],
    ids=["encoder", "norms"],
)
def test_killed_twice_it_ends_with_the_same_bytes(llava_folder, tmp_path, settings):
    """Once in the vision tower or the encoder's epochs, then while it goes on from there."""
    journal, pattern = tmp_path / "journal", "encoder-*" if "encoder" in settings else "block-vision-*"
    finished(llava_folder, tmp_path / "whole", **settings)

    settings = settings | {"resume": journal}
    assert killed_when(llava_folder, tmp_path / "saved", lambda: entries(journal, pattern), **settings)
    assert not (tmp_path / "saved").exists()
    assert killed_when(llava_folder, tmp_path / "saved", lambda: entries(journal, "block-language-*"), **settings)
    finished(llava_folder, tmp_path / "saved", **settings)

    require_same(tmp_path / "whole", tmp_path / "saved")
    assert not journal.exists()


def test_nothing_is_searched_again(llama_folder, tmp_path, monkeypatch):
    """What the journal holds is not even run through, where a part is whole."""
    journal = tmp_path / "journal"
    first = quantize(llama_folder, resume=journal)
    monkeypatch.setattr("optimum_qvlm.pipeline.calibrate.quantize_block", None)
    monkeypatch.setattr("optimum_qvlm.pipeline.calibrate.form_blocks", None)

    second = quantize(llama_folder, resume=journal)

    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scheme": "w4a4"}, r"settings\.scheme is 'w4a8' there and 'w4a4' here"),
        ({"search": {"tokens": 77}}, r"settings\.search_tokens is 2048 there and 77 here"),
        ({"dataset": [llama_batch(seed=5)]}, r"data\.inputs has another content"),
    ],
    ids=["scheme", "tokens", "data"],
)
def test_the_journal_of_another_calibration_is_refused(llama_folder, tmp_path, change, words):
    quantize(llama_folder, resume=tmp_path)
    held = entries(tmp_path)

    with pytest.raises(JournalError, match=f"the journal of another calibration: .*{words}"):
        quantize(llama_folder, resume=tmp_path, **change)
    assert entries(tmp_path) == held


def test_another_source_is_refused_by_the_layer_that_differs(llama_folder, tmp_path):
    journal, changed = tmp_path / "journal", tmp_path / "changed"
    quantize(llama_folder, resume=journal)
    model = load(llama_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 0.001
    model.save_pretrained(changed)

    with pytest.raises(JournalError, match=r"another calibration: source\.model\.layers\.1 has another content"):
        quantize(changed, resume=journal)


def damage_bytes(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def damage_end(path):
    path.write_bytes(path.read_bytes()[:-9])


def damage_shape(path):
    """A file that was written whole, with a tensor of another size."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = max(tensors, key=lambda each: tensors[each].numel())
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("damage", [damage_bytes, damage_end, damage_shape])
def test_what_was_damaged_is_done_again(llama_folder, tmp_path, damage):
    whole = quantize(llama_folder, resume=tmp_path).state_dict()
    damage(next(tmp_path.glob("block-language-0-*")))

    again = quantize(llama_folder, resume=tmp_path).state_dict()

    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_folder_of_something_else_is_left_alone(llama_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")

    with pytest.raises(JournalError, match=r"holds thesis\.txt and is no journal"):
        quantize(llama_folder, resume=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_journal_that_another_process_holds_is_refused(llava_folder, tmp_path):
    process = started(llava_folder, tmp_path / "saved", resume=tmp_path / "journal")
    while not entries(tmp_path / "journal"):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(JournalError, match="in use by another process"):
            quantize(llava_folder, resume=tmp_path / "journal")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_thirty_random_moments_it_ends_with_the_same_bytes(bundled_folder, tmp_path):
    """Of the trained model that comes with the repository; every third is killed once more while it goes on."""
    settings = {"scheme": "w4a4", "effort": "fast", "num_samples": 2}
    begun, used = time.perf_counter(), processor_seconds()
    finished(bundled_folder, tmp_path / "whole", **settings)
    whole, used, generator = time.perf_counter() - begun, processor_seconds() - used, random.Random(0)
    same, saved = 0, []
    for number in range(30):
        journal, output = tmp_path / f"journal-{number}", tmp_path / f"saved-{number}"
        kills = 2 if number % 3 == 0 else 1
        moments = []
        while len(moments) < kills:
            moment = generator.uniform(0.0, 0.95 if not moments else 0.5) * whole
            end = time.perf_counter() + moment
            if killed_when(
                bundled_folder, output, lambda end=end: time.perf_counter() > end, resume=journal, **settings
            ):
                moments.append(moment)
            else:  # it was faster this time: once more
                shutil.rmtree(output)
                moments.clear()
        held, begun = len(entries(journal, "block-*")), processor_seconds()
        finished(bundled_folder, output, resume=journal, **settings)
        saved.append(used - (processor_seconds() - begun))
        require_same(tmp_path / "whole", output)
        same += 1
        shutil.rmtree(output)
        print(f"{number}: killed after {', '.join(f'{m:.1f} s' for m in moments)}, {held} blocks kept, ", end="")
        print(f"resumed in {used - saved[-1]:.1f} of {used:.1f} s of processor", flush=True)
    print(f"{same} of 30 the same bytes; {sum(saved) / 30:.1f} of {used:.1f} s saved on average")
