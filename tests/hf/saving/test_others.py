"""Saves beside other processes, threads and files: nobody's are removed, nobody's are mixed."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.files.atomic import WORK_MARK
from optimum_qvlm.hf.format.inspection import inspect_checkpoint
from optimum_qvlm.hf.saving import source as sources
from optimum_qvlm.hf.saving.save import require_writable
from optimum_qvlm.hf.saving.weight_files import WeightFiles
from tests.jobs import ROOT, contents, load, quantize

PROCESSOR = ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json")

# Processes of one number on one host, as containers that share a volume may be; each publishes files that belong
# together, and takes its time between any two steps.
SAME_NUMBER = """
import os, random, socket, sys, time
from pathlib import Path
os.getpid, socket.gethostname = lambda: 7, lambda: "container"
from optimum_qvlm.files.atomic import publish, publishing, work_folder
name, target = sys.argv[1], Path(sys.argv[2])
chance = random.Random(name)
def pause(event, _):
    if event in ("os.rename", "os.mkdir", "os.link", "os.remove"):
        time.sleep(chance.choice([0, 0, 0.003]))
sys.addaudithook(pause)
for number in range(8):
    with work_folder(target) as work:
        for part in "abc":
            (work / part).write_text(f"{name} {number}")
        with publishing(target):
            assert publish(work, target)
"""

ALL_RANKS = """
import os, sys
import torch.distributed as dist
import optimum_qvlm
from tests.jobs import load
from pathlib import Path
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meeting", rank=rank, world_size=2)
model = load(Path(sys.argv[3]))
for target, options in (("flag", {"is_main_process": rank == 0}), ("none", {})):
    model.save_pretrained(f"{sys.argv[2]}/{target}", **options)
    dist.barrier()
    model.save_pretrained(f"{sys.argv[2]}/{target}", **options)
    dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def doubled(quantized_folder):
    """The quantized model with embeddings twice as large: another model. Read only."""
    model = load(quantized_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    return model


@pytest.fixture
def peft(monkeypatch):
    """PEFT, whatever its release: transformers asks for one that may not be out yet."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.17.0")
    import peft

    return peft


def run_all(code: str, *arguments: tuple) -> None:
    """Run processes with the same code at the same time."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    commands = [[sys.executable, "-c", code, *map(str, words)] for words in arguments]
    processes = [subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) for words in commands]
    ends = [(process.communicate(timeout=200)[1], process.returncode) for process in processes]
    assert all(code == 0 for _, code in ends), ends


@pytest.mark.parametrize("arguments", [{"is_main_process": False}, False], ids=["by name", "by position"])
def test_a_process_that_is_not_the_main_one_does_nothing(quantized_llava, quantized_folder, tmp_path, arguments):
    """accelerate's way: `save_pretrained(folder, is_main_process=...)` on all ranks."""
    target = Path(shutil.copytree(quantized_folder, tmp_path / "out"))
    before = {name: (target / name).stat().st_mtime_ns for name in os.listdir(target)}

    for folder in (target, tmp_path / "new" / "one"):
        if isinstance(arguments, dict):
            quantized_llava.save_pretrained(folder, **arguments)
        else:
            quantized_llava.save_pretrained(folder, arguments)

    assert {name: (target / name).stat().st_mtime_ns for name in os.listdir(target)} == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_all_ranks_of_torch_distributed_save(quantized_folder, tmp_path):
    run_all(ALL_RANKS, (0, tmp_path, quantized_folder), (1, tmp_path, quantized_folder))

    for target in ("flag", "none"):
        assert contents(tmp_path / target).keys() == contents(quantized_folder).keys()
        assert (tmp_path / target / "model.safetensors").read_bytes() == (
            quantized_folder / "model.safetensors"
        ).read_bytes()
    assert list(tmp_path.glob(f"*{WORK_MARK}*")) == []


@pytest.mark.parametrize("shard", ["50GB", "60KB"], ids=["one file", "shards"])
def test_an_adapter_in_its_bases_folder_removes_nothing(quantized_llava, tmp_path, peft, shard):
    quantized_llava.save_pretrained(tmp_path / "base", max_shard_size=shard)
    before = contents(tmp_path / "base")
    model = load(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))

    model.save_pretrained(tmp_path / "base")
    after = contents(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")

    assert after.keys() - before.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert {name: after[name] for name in before if name != "generation_config.json"} == {
        name: content for name, content in before.items() if name != "generation_config.json"
    }
    assert set(contents(tmp_path / "adapter")) <= {*after.keys() - before.keys(), "generation_config.json"}
    with pytest.raises(CheckpointError, match="the adapter does not fit into max_shard_size='1KB'"):
        model.save_pretrained(tmp_path / "adapter", max_shard_size="1KB")


def test_threads_that_save_into_one_folder_leave_one_whole_model(quantized_llava, doubled, tmp_path):
    """Whose save came last is theirs to say; the files are all of one."""
    models = {"first": quantized_llava, "second": doubled}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, max_shard_size="60KB")
    expected = [contents(tmp_path / name) for name in models]
    target = tmp_path / "home" / "out"
    whole = 0

    for _ in range(10):
        words = {"max_shard_size": "60KB"}
        threads = [
            threading.Thread(target=model.save_pretrained, args=(target,), kwargs=words) for model in models.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole += contents(target) in expected

    print(f"{whole} of 10 folders whole")
    assert whole == 10
    assert os.listdir(target.parent) == ["out"]


def test_processes_of_the_same_number_do_not_mix(tmp_path):
    run_all(SAME_NUMBER, *((name, tmp_path / "home" / "out") for name in ("first", "second")))

    assert os.listdir(tmp_path / "home") == ["out"]
    actual = contents(tmp_path / "home" / "out")
    assert set(actual) == {"a", "b", "c"}
    assert len(set(actual.values())) == 1


def test_a_source_that_is_gone_is_not_needed(llava_folder, bundled_folder, tmp_path):
    """Processor, tokenizer, chat template and licence are held from the start."""
    source = Path(shutil.copytree(llava_folder, tmp_path / "source"))
    for name in PROCESSOR:
        shutil.copyfile(bundled_folder / name, source / name)
    (source / "LICENSE").write_text("Apache")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    model = quantize(source, method="rtn")
    shutil.rmtree(source)

    model.save_pretrained(tmp_path / "out")
    reloaded = load(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    reloaded.save_pretrained(tmp_path / "again")

    again = contents(tmp_path / "again")
    assert {name: again[name] for name in PROCESSOR} == {
        name: (bundled_folder / name).read_bytes() for name in PROCESSOR
    }
    assert again["LICENSE"] == b"Apache"
    assert b"license: apache-2.0" in again["README.md"]


def test_a_source_that_became_another_model_lends_nothing(llava_folder, tmp_path):
    source = Path(shutil.copytree(llava_folder, tmp_path / "source"))
    (source / "chat_template.jinja").write_text("ours")
    model = quantize(source, method="rtn")
    (source / "chat_template.jinja").write_text("theirs")

    model.save_pretrained(tmp_path / "out")

    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "ours"


@pytest.mark.parametrize("happens", ["gone", "changed"])
def test_a_large_file_that_is_gone_is_missed(llava_folder, tmp_path, monkeypatch, happens):
    """Without it the saved folder would not be whole."""
    monkeypatch.setattr(sources, "LARGEST_HELD", 10)
    source = Path(shutil.copytree(llava_folder, tmp_path / "source"))
    (source / "tokenizer.model").write_text("more than ten bytes")
    model = quantize(source, method="rtn")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "more than ten bytes"
    before = contents(tmp_path / "out")
    (source / "tokenizer.model").unlink()
    if happens == "changed":
        (source / "tokenizer.model").write_text("other bytes")

    with pytest.raises(CheckpointError, match=r"tokenizer.model, which belongs to the model, is gone or was changed"):
        model.save_pretrained(tmp_path / "out")

    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "README.md"])
def test_a_target_that_cannot_be_replaced_is_found_first(quantized_llava, folder_copy, name):
    (folder_copy / name).unlink()
    (folder_copy / name).mkdir()
    (folder_copy / name / "mine").write_text("mine")
    before = contents(folder_copy.parent)

    for attempt in (quantized_llava.save_pretrained, require_writable):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be replaced \(it is a folder\); nothing in"):
            attempt(folder_copy)

    assert contents(folder_copy.parent) == before


def test_a_file_in_place_of_a_folder_is_found_first(llava_folder, tmp_path):
    source = Path(shutil.copytree(llava_folder, tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    model = quantize(source, method="rtn")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "additional_chat_templates").write_text("mine")

    with pytest.raises(CheckpointError, match="additional_chat_templates is a file where the save needs a folder"):
        model.save_pretrained(tmp_path / "out")

    assert contents(tmp_path / "out") == {"additional_chat_templates": b"mine"}


@pytest.mark.parametrize("variant", [None, "small"])
@pytest.mark.parametrize("shard", ["50GB", "60KB"], ids=["one file", "shards"])
def test_a_generation_is_loaded_shown_and_settled(quantized_llava, tmp_path, shard, variant):
    """What a kill leaves behind where folders cannot be exchanged: config.json names weights by other names."""
    out, kind = tmp_path / "out", WeightFiles(variant)
    quantized_llava.save_pretrained(out, max_shard_size=shard, variant=variant)
    before = contents(out)
    for name in [name for name in before if kind.pattern.fullmatch(name)]:
        (out / name).rename(out / kind.in_generation(name, "0123abcd"))
    index, single = (kind.in_generation(name, "0123abcd") for name in (kind.index, f"{kind.stem}.safetensors"))
    if (out / index).exists():
        content = json.loads((out / index).read_text())
        weight_map = content["weight_map"]
        content["weight_map"] = {key: kind.in_generation(name, "0123abcd") for key, name in weight_map.items()}
        (out / index).write_text(json.dumps(content))
    entry = index if (out / index).exists() else single
    config = json.loads((out / "config.json").read_text()) | {"transformers_weights": entry}
    (out / "config.json").write_text(json.dumps(config))

    model = load(out, variant=variant)
    assert inspect_checkpoint(str(out), variant=variant).files.keys() == {
        name for name in os.listdir(out) if name.endswith(".safetensors")
    }
    model.save_pretrained(tmp_path / "other", max_shard_size=shard, variant=variant)
    assert contents(tmp_path / "other") == before

    quantized_llava.save_pretrained(out, variant="another")
    after = contents(out)
    assert after.keys() - before.keys() == {"model.another.safetensors"}
    assert all(
        after[name] == before[name]
        for name in before
        if name not in ("README.md", "qvlm_report.html", "qvlm_report.svg")
    ), "card and page list files"
