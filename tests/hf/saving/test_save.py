"""`save_pretrained`: whole or not at all, over whatever was there."""

import copy
import json
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.files.atomic import WORK_MARK
from optimum_qvlm.hf.saving.weight_files import REPORT_FILE, REPORT_FILES
from optimum_qvlm.report.page.document import PAGE_FILE
from optimum_qvlm.report.page.picture import PICTURE_FILE
from tests.jobs import contents, load, logits, make_batch, quantize, run_python

WRITTEN = {"README.md", "config.json", "generation_config.json", "model.safetensors", *REPORT_FILES}

SAVE_WITH_LITTLE_ROOM = """
import os, resource, sys
import optimum_qvlm
from transformers import AutoModelForImageTextToText
source, parent, *targets = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(source)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (0, 4_096, 65_536):
    for target in targets:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            model.save_pretrained(target)
        except optimum_qvlm.QVLMError as error:
            print(type(error).__name__, error, sorted(os.listdir(parent)))
"""


def same_logits(first, second, folder):
    batch = make_batch(folder)
    return torch.equal(logits(first, batch), logits(second, batch))


def no_left_overs(folder: Path) -> bool:
    """Whether no temporary folder lies in or below the parent of `folder`."""
    return not list(folder.parent.rglob(f"*{WORK_MARK}*"))


def test_a_save_holds_weights_configuration_and_report(quantized_folder):
    assert set(contents(quantized_folder)) == WRITTEN


def test_a_save_reloads_bit_for_bit(quantized_llava, quantized_folder):
    assert same_logits(quantized_llava, load(quantized_folder), quantized_folder)


def test_saving_twice_gives_the_same_bytes(quantized_llava, quantized_folder, tmp_path):
    """Uploads of the same model can be told from those of another."""
    quantized_llava.save_pretrained(tmp_path / "again")

    assert contents(tmp_path / "again") == contents(quantized_folder)


def test_saving_a_reloaded_model_gives_the_same_bytes(quantized_folder, tmp_path):
    load(quantized_folder).save_pretrained(tmp_path / "again")

    again, first = contents(tmp_path / "again"), contents(quantized_folder)
    assert set(again) == set(first)
    assert again["model.safetensors"] == first["model.safetensors"]
    assert again[REPORT_FILE] == first[REPORT_FILE]
    assert (
        json.loads(again["config.json"])["quantization_config"]
        == json.loads(first["config.json"])["quantization_config"]
    )


def test_a_full_disk_leaves_what_was_there(folder_copy, quantized_folder, tmp_path):
    """The limit on file sizes makes writes fail as a full disk does: at once, early and late in the weights."""
    before = contents(tmp_path)
    assert (quantized_folder / "model.safetensors").stat().st_size > 65_536

    done = run_python(SAVE_WITH_LITTLE_ROOM, quantized_folder, tmp_path, folder_copy, tmp_path / "new")

    said = done.stdout.splitlines()
    assert len(said) == 6, done.stderr
    for line in said:
        assert line.startswith(f"CheckpointError saving to {tmp_path}")
        assert "nothing there was changed. Free space or choose another folder" in line
        assert line.endswith("['copy']"), "no new folder, and no temporary one"
    assert contents(tmp_path) == before


def test_saving_into_a_file_is_refused(quantized_llava, tmp_path):
    (tmp_path / "out").write_text("precious")

    with pytest.raises(CheckpointError, match="out is a file; give a folder to save into"):
        quantized_llava.save_pretrained(tmp_path / "out")

    assert contents(tmp_path) == {"out": b"precious"}


def test_saving_below_a_file_is_refused(quantized_llava, tmp_path):
    (tmp_path / "out").write_text("precious")

    with pytest.raises(CheckpointError, match=r"saving to .*out/model failed"):
        quantized_llava.save_pretrained(tmp_path / "out" / "model")

    assert contents(tmp_path) == {"out": b"precious"}


def test_other_files_of_the_user_stay(quantized_llava, folder_copy):
    mine = {"README.md": b"mine", "notes/a.txt": b"a", "adapter.safetensors": b"b", "model.fp16.safetensors": b"c"}
    for name, content in mine.items():
        (folder_copy / name).parent.mkdir(exist_ok=True)
        (folder_copy / name).write_bytes(content)

    quantized_llava.save_pretrained(folder_copy)

    assert {name: content for name, content in contents(folder_copy).items() if name in mine} == mine


def test_weights_of_an_earlier_save_are_removed(quantized_llava, folder_copy):
    """A single file takes precedence over shards, and stale shards would double the size of an upload."""
    quantized_llava.save_pretrained(folder_copy, max_shard_size="50KB")
    assert not (folder_copy / "model.safetensors").exists()
    assert list(folder_copy.glob("model-00002-of-*"))

    quantized_llava.save_pretrained(folder_copy)

    assert set(contents(folder_copy)) == WRITTEN


def test_a_sharded_save_reloads(quantized_llava, tmp_path):
    quantized_llava.save_pretrained(tmp_path / "out", max_shard_size="50KB")

    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert same_logits(quantized_llava, load(tmp_path / "out"), tmp_path / "out")


def test_a_variant_reloads(quantized_llava, tmp_path):
    quantized_llava.save_pretrained(tmp_path / "out", variant="small")

    assert (tmp_path / "out" / "model.small.safetensors").exists()
    assert same_logits(quantized_llava, load(tmp_path / "out", variant="small"), tmp_path / "out")


def test_stale_shards_of_a_variant_are_removed(quantized_llava, tmp_path):
    quantized_llava.save_pretrained(tmp_path / "out", variant="small", max_shard_size="50KB")

    quantized_llava.save_pretrained(tmp_path / "out", variant="small")

    assert {path.name for path in (tmp_path / "out").glob("model*")} == {"model.small.safetensors"}


def test_a_variant_leaves_the_main_weights(quantized_llava, folder_copy):
    before = (folder_copy / "model.safetensors").read_bytes()

    quantized_llava.save_pretrained(folder_copy, variant="small")

    assert (folder_copy / "model.safetensors").read_bytes() == before


def test_a_deep_copy_saves_itself(quantized_llava, quantized_folder, tmp_path):
    """A method bound to the original would save the wrong weights."""
    copied = copy.deepcopy(quantized_llava)
    with torch.no_grad():
        copied.get_input_embeddings().weight.mul_(2)

    copied.save_pretrained(tmp_path / "out")

    again = load(tmp_path / "out")
    assert torch.equal(again.get_input_embeddings().weight, copied.get_input_embeddings().weight)
    assert not torch.equal(again.get_input_embeddings().weight, quantized_llava.get_input_embeddings().weight)


def test_missing_parents_are_made(quantized_llava, tmp_path):
    quantized_llava.save_pretrained(tmp_path / "a" / "b" / "out")

    assert set(contents(tmp_path / "a" / "b" / "out")) == WRITTEN


@pytest.mark.parametrize("target", [".", "out", "out/"])
def test_relative_folders_are_found(quantized_llava, tmp_path, monkeypatch, target):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    quantized_llava.save_pretrained(target)

    assert set(contents(tmp_path / "here" / target)) == WRITTEN
    assert no_left_overs(tmp_path / "here")


def test_links_to_folders_are_followed(quantized_llava, tmp_path):
    """Large disks are often mounted elsewhere."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")

    quantized_llava.save_pretrained(tmp_path / "link")

    assert (tmp_path / "link").is_symlink()
    assert set(contents(tmp_path / "disk")) == WRITTEN


@pytest.mark.parametrize("name", ["source", "source/../source", "link"])
def test_saving_over_the_full_precision_source_is_refused(llava_folder, tmp_path, name):
    """What took hours to download, or exists nowhere else, is gone by one mistyped name."""
    source = Path(shutil.copytree(llava_folder, tmp_path / "source"))
    (tmp_path / "link").symlink_to(source)
    model = quantize(source, method="rtn")
    before = contents(source)

    with pytest.raises(CheckpointError, match=r"source is the folder of the full-precision model.*as .*source-qvlm"):
        model.save_pretrained(tmp_path / name)
    assert contents(source) == before

    shutil.rmtree(source)
    model.save_pretrained(source)
    model.save_pretrained(source)
    assert same_logits(model, load(source), source), "nothing full-precision lies there any more"


def test_saving_over_the_folder_that_it_was_loaded_from(folder_copy):
    before = contents(folder_copy)
    model = load(folder_copy)

    model.save_pretrained(folder_copy)

    assert contents(folder_copy)["model.safetensors"] == before["model.safetensors"]
    assert same_logits(model, load(folder_copy), folder_copy)


def test_files_beside_the_source_travel(llava_folder, tmp_path):
    source = Path(shutil.copytree(llava_folder, tmp_path / "source"))
    (source / "LICENSE").write_text("Apache")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")

    quantize(source, method="rtn").save_pretrained(tmp_path / "out")

    written = contents(tmp_path / "out")
    assert written["LICENSE"] == b"Apache"
    assert written["additional_chat_templates/tools.jinja"] == b"{{ tools }}"


def test_the_report_is_of_this_calibration(folder_copy, llava_folder, tmp_path):
    """Not one that lay beside the source."""
    source = Path(shutil.copytree(llava_folder, tmp_path / "source"))
    (source / REPORT_FILE).write_text("old")

    model = quantize(source, method="rtn")
    model.save_pretrained(tmp_path / "out")

    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text()) == model.hf_quantizer.report


def test_the_seal_names_every_tensor_in_the_files(quantized_folder):
    from safetensors import safe_open

    values = json.loads((quantized_folder / "config.json").read_text())["quantization_config"]

    with safe_open(quantized_folder / "model.safetensors", framework="pt") as file:
        assert set(values["manifest"]) == set(file.keys())


def test_a_card_that_the_user_wrote_stays(quantized_llava, folder_copy):
    (folder_copy / "README.md").write_text("# Mine\n")

    quantized_llava.save_pretrained(folder_copy)

    assert (folder_copy / "README.md").read_text() == "# Mine\n"


def test_an_untouched_card_is_renewed(quantized_llava, quantized_folder, llava_folder, tmp_path):
    quantize(llava_folder, "w4a16", method="rtn").save_pretrained(tmp_path / "out")

    quantized_llava.save_pretrained(tmp_path / "out")

    assert (tmp_path / "out" / "README.md").read_bytes() == (quantized_folder / "README.md").read_bytes()


def test_a_failed_save_leaves_no_parents(quantized_llava, tmp_path, monkeypatch):
    """Also one that Ctrl-C stopped: folders that were made on the way are gone again."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(quantized_llava), "save_pretrained", interrupt)

    with pytest.raises(KeyboardInterrupt):
        quantized_llava.save_pretrained(tmp_path / "a" / "b" / "out")

    assert list(tmp_path.iterdir()) == []


def test_other_threads_save_without_touching_signals(quantized_llava, tmp_path):
    """Python allows handlers in the main thread alone."""
    thread = threading.Thread(target=quantized_llava.save_pretrained, args=(tmp_path / "out",))
    thread.start()
    thread.join()

    assert set(contents(tmp_path / "out")) == WRITTEN


def test_a_sidecar_that_links_out_of_the_folder_is_refused(llava_folder, tmp_path):
    """Or the next upload publishes a private file."""
    source = Path(shutil.copytree(llava_folder, tmp_path / "source"))
    (tmp_path / "secret").write_text("private")
    (source / "LICENSE").symlink_to(tmp_path / "secret")

    with pytest.raises(CheckpointError, match=r"LICENSE is a link that leaves .*source; put a copy"):
        quantize(source, method="rtn").save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)], ids=oct)
def test_every_file_gets_the_mode_that_the_umask_gives(quantized_llava, tmp_path, mask, mode):
    """safetensors lets nobody but the owner read what it writes, which a server under another account stumbles over."""
    before = os.umask(mask)
    try:
        quantized_llava.save_pretrained(tmp_path / "out", max_shard_size="60KB")
    finally:
        os.umask(before)

    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_a_reloaded_model_is_saved_with_a_page_drawn_anew(folder_copy, tmp_path):
    """A page that somebody else wrote may hold anything, and is not carried along."""
    page = (folder_copy / PAGE_FILE).read_bytes()
    for name in (PAGE_FILE, PICTURE_FILE):
        (folder_copy / name).write_text("<script>alert(1)</script>")

    load(folder_copy).save_pretrained(tmp_path / "again")

    assert contents(tmp_path / "again")[PAGE_FILE] == page
    assert b"alert" not in contents(tmp_path / "again")[PICTURE_FILE]


@pytest.mark.parametrize("exchanges", [True, False], ids=["at once", "file by file"])
def test_a_model_without_a_report_leaves_none_of_another(
    folder_copy, quantized_folder, tmp_path, monkeypatch, exchanges
):
    """A report, page or picture that stayed would tell of a model that is gone."""
    if not exchanges:
        monkeypatch.setattr("optimum_qvlm.hf.saving.publish.publish", lambda *_, **__: False)
    (folder_copy / REPORT_FILE).unlink()
    model = load(folder_copy)
    target = Path(shutil.copytree(quantized_folder, tmp_path / "target"))
    (target / "notes.html").write_text("mine")

    model.save_pretrained(target)

    assert set(contents(target)) == WRITTEN - set(REPORT_FILES) | {"notes.html"}
    assert PAGE_FILE not in (target / "README.md").read_text()


def test_a_report_that_cannot_be_read_has_no_page(folder_copy, tmp_path):
    (folder_copy / REPORT_FILE).write_text("[1, 2")

    load(folder_copy).save_pretrained(tmp_path / "again")

    assert not {PAGE_FILE, PICTURE_FILE} & set(contents(tmp_path / "again"))
