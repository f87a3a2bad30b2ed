"""The commands against the Hub, in this process."""

import json

import pytest

from optimum_qvlm.cli import chat, export, info
from optimum_qvlm.report.card import read_metadata
from tests.jobs import contents

REPO = "me/tiny"
RTN = ["--method", "rtn", "--device", "cpu"]


@pytest.fixture
def base(hub, bundled_folder):
    """The bundled model in full precision as a repository."""
    there = {path: data for path, data in contents(bundled_folder).items() if not path.endswith((".py", ".pyc"))}
    return hub.add("org/base", there)


@pytest.fixture
def run(cli_parser, capsys):
    """Runs a command; returns exit code, stdout, stderr."""
    mains = {"export": export.main, "info": info.main, "chat": chat.main}

    def command(*words):
        args = cli_parser.parse_args(list(map(str, words)))
        code = mains[words[0] if words[0] == "export" else words[1]](args)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return command


def test_from_a_repository_to_a_private_one_and_an_answer(hub, base, run, tmp_path):
    """The whole way of somebody new, with three commands."""
    code, text, _ = run(
        "export", "qvlm", "--model", "org/base", *RTN, "--push-to-hub", REPO, "--private", "--json", tmp_path / "out"
    )

    said = json.loads(text)
    assert code == 0
    assert hub.repos[REPO].private
    assert said["commit"] == hub.repos[REPO].branches["main"]
    pushed = {name: data for name, data in hub.files(REPO).items() if name != ".gitattributes"}
    assert pushed == contents(tmp_path / "out")
    assert read_metadata(pushed["README.md"].decode())["base_model"] == "org/base"

    code, text, _ = run("qvlm", "info", REPO, "--json")
    assert code == 0
    assert json.loads(text)["commit"] == said["commit"]

    code, text, _ = run("qvlm", "chat", REPO, "--device", "cpu", "--max-new-tokens", "4", "how many?")
    assert code == 0
    assert text != ""


def test_info_downloads_no_weights(hub, model, run):
    """Headers come by range requests: a model of many gigabytes is looked at in a moment."""
    model.push_to_hub(REPO, max_shard_size="50KB")

    code, text, _ = run("qvlm", "info", REPO)

    assert code == 0
    assert text.startswith(f"{REPO} at {hub.repos[REPO].branches['main'][:12]}: LlavaForConditionalGeneration")
    asked = [entry for entry in hub.ranges if entry.startswith("bytes=0-")]
    shards = [name for name in hub.files(REPO) if name.endswith(".safetensors")]
    assert len(asked) == len(shards)


def test_info_finds_what_does_not_fit_on_the_hub_too(hub, model, run):
    model.push_to_hub(REPO)
    files = dict(hub.files(REPO))
    config = json.loads(files["config.json"])
    config["quantization_config"]["scheme"] = "w8a8"
    hub.repos[REPO].commit("main", files | {"config.json": json.dumps(config).encode()}, "edit")

    code, _, error = run("qvlm", "info", REPO)

    assert code == 2
    assert "quantization_config was changed after saving" in error


@pytest.mark.parametrize("words", [("info",), ("chat",), ("export",), ("export", "--dry-run")])
def test_a_damaged_index_on_the_hub_is_said(hub, model, bundled_folder, run, tmp_path, words):
    """transformers would raise a KeyError at it."""
    if words[0] == "export":
        hub.add(REPO, {"config.json": (bundled_folder / "config.json").read_bytes()})
    else:
        model.push_to_hub(REPO, max_shard_size="50KB")
    beside = {name: data for name, data in contents(bundled_folder).items() if "token" in name or "processor" in name}
    index = "model.safetensors.index.json"
    hub.repos[REPO].commit("main", hub.files(REPO) | beside | {index: b'{"metadata": {}}'}, "edit")
    command = {
        "info": ["qvlm", "info", REPO],
        "chat": ["qvlm", "chat", REPO, "how many?", "--device", "cpu"],
        "export": ["export", "qvlm", "--model", REPO, *RTN, *words[1:], tmp_path / "out"],
    }[words[0]]

    code, _, error = run(*command)

    assert code == 2
    assert f"{index} has no weight_map and metadata that name files; fetch it again" in error


@pytest.mark.parametrize(
    "token, private, reason",
    [("hf_other", True, "Repository Not Found"), (None, True, "Repository Not Found"), ("hf_bad", False, "Invalid")],
)
def test_info_says_why_a_repository_cannot_be_read(hub, model, run, monkeypatch, token, private, reason):
    model.push_to_hub(REPO, private=private)
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)

    code, _, error = run("qvlm", "info", REPO)

    assert code == 3
    assert "me/tiny is no folder here, and could not be read from the Hub" in error
    assert "log in with `hf auth login` or set HF_TOKEN" in error


def test_info_of_what_is_not_there(hub, run):
    code, _, error = run("qvlm", "info", "nobody/nothing")

    assert code == 3
    assert "nobody/nothing is no folder here" in error


@pytest.mark.parametrize("name", ["a/b/c", "no folder", "./nowhere", "/nowhere"])
@pytest.mark.parametrize("command", ["info", "export"])
def test_a_name_that_no_repository_can_have_is_a_wrong_path(hub, run, tmp_path, name, command):
    """Exit status 2, and no advice about tokens."""
    words = ["qvlm", "info", name] if command == "info" else ["export", "qvlm", "--model", name, tmp_path / "out"]

    code, _, error = run(*words)

    assert code == 2
    assert f"there is no folder {name}, and no model on the Hub can have this name" in error
    assert hub.requests == []


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_quantized_model_is_not_quantized_again(hub, model, run, tmp_path, words):
    """transformers would keep its settings, whatever the options say."""
    model.push_to_hub(REPO)

    code, _, error = run("export", "qvlm", "--model", REPO, "--scheme", "w4a4", *words, tmp_path / "out")

    assert code == 2
    assert "model me/tiny is quantized already, with 'qvlm'; name the full-precision model" in error
    assert not hub.asked("GET", "resolve/.*safetensors")


def test_a_model_that_is_not_on_the_hub_is_the_hubs_refusal(hub, run, tmp_path):
    code, _, error = run("export", "qvlm", "--model", "nobody/nothing", tmp_path / "out")

    assert code == 3
    assert "model nobody/nothing cannot be read; name a folder with a config.json, or a model on the Hub" in error


@pytest.mark.parametrize("how", [{"status": 500}, {"status": 403}, {"drop_after": 1000}])
def test_weights_that_do_not_arrive_are_the_hubs_failure(hub, base, run, tmp_path, patient, how):
    """Not a traceback, whatever transformers and the transport make of it."""
    for method in ("GET", "HEAD"):
        hub.fail(method, r"resolve/.*model\.safetensors$", times=50, **how)

    code, _, error = run("export", "qvlm", "--model", "org/base", *RTN, tmp_path / "out")

    assert code == 3
    assert "model org/base cannot be loaded: " in error
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_keeps_what_was_saved(hub, base, run, tmp_path, patient):
    hub.fail("POST", "/commit/", status=500)

    code, text, error = run("export", "qvlm", "--model", "org/base", *RTN, "--push-to-hub", REPO, tmp_path / "out")

    assert code == 3
    assert text.startswith("Saved the w4a8 model in ")
    assert "uploading to me/tiny failed and nothing was committed" in error
    assert "config.json" in contents(tmp_path / "out")


def test_files_of_the_user_in_the_folder_are_not_uploaded(hub, base, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("private")

    code, _, _ = run("export", "qvlm", "--model", "org/base", *RTN, "--push-to-hub", REPO, tmp_path / "out")

    assert code == 0
    assert "diary.txt" not in hub.files(REPO)


def test_a_repository_that_is_not_ones_own_is_refused_before_the_model_is_loaded(hub, base, run, tmp_path):
    code, _, error = run("export", "qvlm", "--model", "org/base", *RTN, "--push-to-hub", "their/x", tmp_path / "out")

    assert code == 3
    assert "their/x is not yours to write" in error
    assert not hub.asked("GET", "resolve/.*safetensors")
    assert not (tmp_path / "out").exists()
