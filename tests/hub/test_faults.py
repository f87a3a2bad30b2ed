"""A Hub, and a network, that fail: transient faults are survived, others said, and no work is done twice."""

import hashlib
import json

import pytest
import torch
from huggingface_hub import constants

from optimum_qvlm.errors import HubError
from tests.jobs import logits, make_batch

REPO = "me/tiny"


def pull(**options):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(REPO, **options)


@pytest.fixture
def small_chunks(monkeypatch):
    """The client keeps what it downloaded in steps of 10 MB; files here are smaller."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
@pytest.mark.parametrize("step", ["preupload", "objects/batch"])
def test_a_moment_of_overload_is_survived(hub, model, patient, step, status):
    hub.fail("POST", step, status=status, times=2)

    model.push_to_hub(REPO)

    assert "model.safetensors" in hub.files(REPO)
    assert patient == [1, 2], "the client's own pauses"


@pytest.mark.parametrize("how", [{"status": 500}, {"drop_after": 1000}], ids=["5xx", "dropped connection"])
def test_a_large_file_that_broke_off_is_sent_again(hub, model, patient, how):
    hub.fail("PUT", "/lfs/", **how, times=2)

    model.push_to_hub(REPO)

    weights = hub.files(REPO)["model.safetensors"]
    assert hub.objects[hashlib.sha256(weights).hexdigest()] == weights


@pytest.mark.parametrize(
    "method, step, how",
    [
        ("POST", "/commit/", {"status": 500}),
        ("POST", "/commit/", {"status": 409, "error": "A commit has happened since"}),
        ("POST", "/commit/", {"drop_after": 10}),
        ("PUT", "/lfs/", {"status": 500}),
        ("PUT", "/lfs/", {"drop_after": 100}),
        ("POST", "/preupload/", {"status": 503}),
        ("POST", "validate-yaml", {"status": 500}),
        ("POST", "repos/create", {"status": 500}),
        ("GET", "/tree/", {"status": 500}),
    ],
    ids=lambda value: str(value).strip("/"),
)
def test_a_lasting_fault_is_said_and_nothing_is_committed(hub, model, patient, method, step, how):
    hub.fail(method, step, **how, times=1000)

    with pytest.raises(HubError, match="uploading to me/tiny failed and nothing was committed"):
        model.push_to_hub(REPO)

    assert all(set(files) == {".gitattributes"} for repo in hub.repos.values() for files in repo.commits.values())


@pytest.mark.parametrize("step", [("POST", "/commit/"), ("PUT", "/lfs/")], ids=["commit", "last file"])
def test_an_interrupted_upload_goes_on_where_it_stopped(hub, model, patient, step):
    """Saving is repeatable to the byte, so large files that arrived are known by their hash."""
    if step[0] == "POST":
        hub.fail(*step, status=500)
    else:
        hub.fail("PUT", "/lfs/", status=403, times=1)
    with pytest.raises(HubError):
        model.push_to_hub(REPO, max_shard_size="50KB")
    arrived = set(hub.objects)
    assert arrived

    model.push_to_hub(REPO, max_shard_size="50KB")

    assert "config.json" in hub.files(REPO)
    for oid in arrived:
        assert hub.received[oid] == len(hub.objects[oid]), "sent once"


def test_a_slow_hub_is_waited_for(hub, model):
    for method, step in (("POST", "create"), ("POST", "preupload"), ("PUT", "/lfs/"), ("POST", "/commit/")):
        hub.fail(method, step, delay=0.4)
    hub.fail("HEAD", "config.json", delay=0.4)
    hub.fail("GET", "model.safetensors", delay=0.4)

    model.push_to_hub(REPO)
    pull()

    assert [fault.times for fault in hub.faults] == [0] * 6


def test_a_download_that_broke_off_goes_on_in_the_same_call(hub, model, llava_folder, patient, small_chunks):
    model.push_to_hub(REPO)
    size = len(hub.files(REPO)["model.safetensors"])
    hub.fail("GET", "resolve/.*/model.safetensors", drop_after=40_000, times=2)

    actual = pull()

    batch = make_batch(llava_folder)
    assert torch.equal(logits(actual, batch), logits(model, batch))
    assert hub.ranges == ["bytes=40000-", "bytes=80000-"]
    assert hub.sent["model.safetensors"] == size, "no byte twice"


def test_a_download_that_was_given_up_keeps_the_shards_that_came(hub, model, llava_folder, patient):
    """The client throws the half of a file away, but no whole ones."""
    model.push_to_hub(REPO, max_shard_size="50KB")
    *whole, last = sorted(name for name in hub.files(REPO) if name.endswith(".safetensors"))
    hub.fail("GET", f"resolve/.*/{last}", drop_after=0, times=20)
    with pytest.raises(Exception, match=r"(?i)peer closed|disconnected|incomplete|can't load"):
        pull()
    hub.faults.clear()
    assert hub.sent[last] == 0

    actual = pull()

    batch = make_batch(llava_folder)
    assert torch.equal(logits(actual, batch), logits(model, batch))
    assert {name: hub.sent[name] for name in whole} == {name: len(hub.files(REPO)[name]) for name in whole}


def test_a_file_that_comes_short_is_never_loaded(hub, model, patient):
    """A proxy that cuts the body and its length alike."""
    model.push_to_hub(REPO)
    repo = hub.repos[REPO]
    files = dict(hub.files(REPO))
    files["model.safetensors"] = files["model.safetensors"][:-100]
    repo.commit("main", files, "cut")

    with pytest.raises(ValueError, match="damaged or truncated"):
        pull()


def test_files_of_two_commits_do_not_mix(hub, llava_folder):
    """Somebody pushed config.json of one save and the weights of another, whose tensors have the same names."""
    from tests.jobs import quantize

    quantize(llava_folder, transforms="off").push_to_hub(REPO)
    quantize(llava_folder, scheme="w4a16", transforms="off").push_to_hub("me/other")
    files = dict(hub.files(REPO)) | {"config.json": hub.files("me/other")["config.json"]}
    hub.repos[REPO].commit("main", files, "mixed")

    with pytest.raises(ValueError, match=r"the weights were not written together with config.json"):
        pull()


def test_a_repository_cannot_name_files_outside_itself(hub, model, tmp_path):
    model.push_to_hub(REPO, max_shard_size="50KB")
    files = dict(hub.files(REPO))
    index = json.loads(files["model.safetensors.index.json"])
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../../../../outside.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.repos[REPO].commit("main", files, "escape")
    before = set(tmp_path.rglob("outside*"))

    with pytest.raises((OSError, ValueError)):
        pull()

    assert set(tmp_path.rglob("outside*")) == before
