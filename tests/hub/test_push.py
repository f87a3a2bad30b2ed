"""Uploads through the real client: what arrives, where, and in how many commits."""

import copy
import json
import threading

import pytest
import torch

from optimum_qvlm.errors import HubError
from optimum_qvlm.hf.saving.push import require_access
from optimum_qvlm.hf.saving.weight_files import REPORT_FILE, REPORT_FILES
from tests.jobs import load, quantize

REPO = "me/tiny"
FILES = {".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors", *REPORT_FILES}


def test_everything_arrives_in_one_commit(hub, model):
    info = model.push_to_hub(REPO)

    assert set(hub.files(REPO)) == FILES
    assert info.oid == hub.repos[REPO].branches["main"]
    assert len(hub.repos[REPO].commits) == 2, "the first is the Hub's own, of the new repository"
    assert json.loads(hub.files(REPO)["config.json"])["quantization_config"]["quant_method"] == "qvlm"


def test_weights_go_as_large_files_and_the_rest_in_the_commit(hub, model):
    """Both ways of the protocol are used, whatever the size of the test's model."""
    model.push_to_hub(REPO)

    weights = hub.files(REPO)["model.safetensors"]
    assert weights in hub.objects.values()
    assert hub.asked("POST", "/info/lfs/objects/batch")
    assert hub.files(REPO)["generation_config.json"] not in hub.objects.values()


def test_a_name_without_owner_is_of_the_one_who_pushes(hub, model):
    model.push_to_hub("tiny")

    assert set(hub.repos) == {REPO}


def test_an_organisation_can_own_it(hub, model):
    model.push_to_hub("team/tiny", private=True)

    assert hub.repos["team/tiny"].private


def test_pushing_the_same_again_makes_no_commit(hub, model):
    first = model.push_to_hub(REPO)

    again = model.push_to_hub(REPO)

    assert again.oid == first.oid
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize("first, then", [("50KB", "50GB"), ("50GB", "50KB")], ids=["to one file", "to shards"])
def test_weights_of_an_earlier_push_are_deleted_in_the_same_commit(hub, model, first, then):
    """transformers prefers the single file; stale shards are dead weight in every clone."""
    model.push_to_hub(REPO, max_shard_size=first)

    model.push_to_hub(REPO, max_shard_size=then)

    names = {name for name in hub.files(REPO) if "model" in name}
    assert ("model.safetensors" in names) == (then == "50GB")
    assert ("model.safetensors.index.json" in names) == (then == "50KB")
    assert len(hub.repos[REPO].commits) == 3


def test_other_files_of_the_repository_stay(hub, model):
    hub.add(REPO, {"notes.md": b"mine", "onnx/model.onnx": b"x", "model.small.safetensors": b"y"})

    model.push_to_hub(REPO)

    assert {"notes.md", "onnx/model.onnx", "model.small.safetensors"} <= set(hub.files(REPO))


def test_a_branch_is_made_and_the_main_one_left_alone(hub, model):
    model.push_to_hub(REPO, revision="w4a8", commit_message="four bits")

    assert "config.json" not in hub.files(REPO, "main")
    assert "config.json" in hub.files(REPO, "w4a8")
    assert hub.repos[REPO].messages[hub.repos[REPO].branches["w4a8"]] == "four bits"


def test_a_pull_request_leaves_every_branch_alone(hub, model):
    info = model.push_to_hub(REPO, create_pr=True)

    assert "config.json" not in hub.files(REPO, "main")
    assert "config.json" in hub.files(REPO, "refs/pr/1")
    assert info.pr_url.endswith("/discussions/1")


def test_a_variant_keeps_the_main_weights(hub, model):
    model.push_to_hub(REPO)

    model.push_to_hub(REPO, variant="again")

    assert {"model.safetensors", "model.again.safetensors"} <= set(hub.files(REPO))


def test_no_folder_is_left_behind(hub, model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    model.push_to_hub(REPO)

    assert [path.name for path in tmp_path.iterdir() if path.name != "hub-cache"] == []


def test_saving_can_push_what_it_wrote(hub, model, tmp_path):
    """What else lies in the folder may be private."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("private")

    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=REPO, private=True, commit_message="first")

    assert set(hub.files(REPO)) == FILES
    assert hub.repos[REPO].private
    assert "first" in hub.repos[REPO].messages.values()
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_saving_pushes_to_the_folders_name(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "my-model", push_to_hub=True)

    assert set(hub.repos) == {"me/my-model"}


def test_arguments_that_do_not_exist_are_refused(hub, model):
    with pytest.raises(TypeError, match="use_auth_token"):
        model.push_to_hub(REPO, use_auth_token=True)

    assert hub.repos == {}


def test_a_dequantized_model_pushes_as_transformers_does(hub, llava_folder):
    quantize(llava_folder, method="rtn").dequantize().push_to_hub(REPO)

    assert "quantization_config" not in json.loads(hub.files(REPO)["config.json"])


@pytest.mark.parametrize(
    "token, repo, reason",
    [
        ("hf_unknown", REPO, "Invalid credentials|Invalid user token"),
        ("hf_reader", REPO, "rights to create a model under the namespace 'me'"),
        ("hf_other", REPO, "rights to create a model under the namespace 'me'"),
        ("hf_owner", "their/tiny", "rights to create a model under the namespace 'their'"),
        ("hf_owner", "not a name", "Repo id must"),
    ],
    ids=["401", "403 read only", "403 stranger", "403 namespace", "name"],
)
def test_refused_uploads_say_why_and_what_to_do(hub, model, token, repo, reason):
    with pytest.raises(HubError, match=rf"uploading to {repo} failed and nothing was committed: .*({reason})") as error:
        model.push_to_hub(repo, token=token)

    assert "`hf auth login` or set HF_TOKEN" in str(error.value)
    assert hub.repos == {}


def test_without_a_token_the_upload_is_refused(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")

    with pytest.raises(HubError, match="uploading to me/tiny failed and nothing was committed"):
        model.push_to_hub(REPO)


@pytest.mark.parametrize(
    "token, repo, reason",
    [
        ("hf_unknown", REPO, "does not let you upload to me/tiny: .*[Ii]nvalid"),
        ("hf_reader", REPO, "the token only reads"),
        ("hf_owner", "their/tiny", "not yours to write: your token is of me, team"),
    ],
)
def test_access_is_checked_before_hours_are_spent(hub, token, repo, reason):
    with pytest.raises(HubError, match=reason):
        require_access(repo, token)

    assert hub.asked("GET", "whoami")


@pytest.mark.parametrize("repo", [REPO, "tiny", "team/tiny"])
def test_access_to_ones_own_names_is_granted(hub, repo):
    require_access(repo)
    assert hub.repos == {}, "nothing is made yet"


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_threads_push_each_their_own_model(hub, model, tmp_path, way):
    """At the same time; with `save_pretrained` into one folder, whose files the other one replaces meanwhile."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    models, expected = {"first": model, "second": other}, {}
    for name, pushed in models.items():
        pushed.save_pretrained(tmp_path / name)
        expected[name] = (tmp_path / name / "model.safetensors").read_bytes()
    own = 0

    for round in range(4):

        def push(name, round=round):
            if way == "push_to_hub":
                models[name].push_to_hub(f"me/{name}-{round}")
            else:
                target = tmp_path / "shared"
                models[name].save_pretrained(target, push_to_hub=True, repo_id=f"me/{name}-{round}")

        threads = [threading.Thread(target=push, args=(name,)) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        own += sum(hub.files(f"me/{name}-{round}").get("model.safetensors") == expected[name] for name in models)

    print(f"{way}: {own} of 8 repositories hold their own model")
    assert own == 8


def test_a_model_without_a_report_deletes_that_of_another(hub, model, tmp_path):
    """In the commit that brings the weights."""
    model.push_to_hub(REPO)
    model.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / REPORT_FILE).unlink()

    load(tmp_path / "bare").push_to_hub(REPO)

    assert set(hub.files(REPO)) == FILES - set(REPORT_FILES)
    assert len(hub.repos[REPO].commits) == 3, "the Hub's own, and two pushes"
