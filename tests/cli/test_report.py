"""`optimum-cli qvlm report`: one page of a folder or of two, and what it refuses."""

import json
import shutil

import pytest

from optimum_qvlm.cli import report
from optimum_qvlm.hf.saving.weight_files import REPORT_FILE
from tests.jobs import contents, quantize


@pytest.fixture(scope="module")
def saved(llava_folder, tmp_path_factory):
    """Two quantized folders. Read only."""
    home = tmp_path_factory.mktemp("report")
    for scheme in ("w4a8", "w8a8"):
        quantize(llava_folder, scheme=scheme).save_pretrained(home / scheme)
    return home


@pytest.fixture
def run(parser, capsys):
    """Runs the command; returns exit code, stdout, stderr."""

    def command(*words):
        code = report.main(parser.parse_args(["qvlm", "report", *map(str, words)]))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return command


def test_a_page_is_written_where_the_command_runs(run, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(saved / "w4a8")

    code, said, _ = run(saved / "w4a8")

    assert code == 0 and "qvlm_report.html" in said
    assert list(contents(tmp_path)) == ["qvlm_report.html"]
    assert "<h1>w4a8</h1>" in (tmp_path / "qvlm_report.html").read_text()
    assert contents(saved / "w4a8") == before


def test_two_models_share_a_page(run, saved, tmp_path):
    code, _, _ = run(saved / "w4a8", "--compare", saved / "w8a8", "--output", tmp_path / "both.html")

    assert code == 0
    assert "<h1>w4a8 and w8a8</h1>" in (tmp_path / "both.html").read_text()


def test_without_a_report_the_record_is_shown(run, saved, tmp_path):
    """Reports can be deleted; config.json knows the precision of every linear."""
    folder = shutil.copytree(saved / "w4a8", tmp_path / "bare")
    (folder / REPORT_FILE).unlink()

    code, _, _ = run(folder, "--output", tmp_path / "bare.html")

    assert code == 0
    page = (tmp_path / "bare.html").read_text()
    assert 'id="precision"' in page and 'id="sites"' not in page


def test_a_page_is_replaced(run, saved, tmp_path):
    (tmp_path / "page.html").write_text("old")

    run(saved / "w4a8", "-o", tmp_path / "page.html")

    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert list(contents(tmp_path)) == ["page.html"], "nothing is left beside it"


@pytest.mark.parametrize(
    "output, said",
    [
        ("model.safetensors", "does not end in .html or .htm; name a page"),
        ("folder.html", "is a folder; name a file in it"),
    ],
)
def test_what_is_no_page_is_not_overwritten(run, saved, tmp_path, output, said):
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "folder.html").mkdir()

    code, _, error = run(saved / "w4a8", "--output", tmp_path / output)

    assert code == 2 and said in error
    assert (tmp_path / "model.safetensors").read_text() == "weights"


def test_a_model_that_is_not_quantized_has_no_report(run, llava_folder, tmp_path):
    code, _, error = run(llava_folder, "--output", tmp_path / "page.html")

    assert code == 2 and "is not quantized; there is nothing to show" in error
    assert not (tmp_path / "page.html").exists()


def test_what_a_report_says_is_text(run, saved, tmp_path):
    folder = shutil.copytree(saved / "w4a8", tmp_path / "hostile")
    values = json.loads((folder / REPORT_FILE).read_text())
    values["kept_in_full_precision"] = ["<script>alert(1)</script>"]
    (folder / REPORT_FILE).write_text(json.dumps(values))

    run(folder, "--output", tmp_path / "page.html")

    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and page.count("<script>") == 1
