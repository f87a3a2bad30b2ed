"""The documentation against the code: links, Python blocks, and lists of what there is."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from optimum_qvlm import QVLMConfig, errors
from optimum_qvlm.errors import QVLMError
from tests.docs.settings_tables import tables

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
RUNS = "# runs"


def named(page: Path) -> str:
    """How a page is called in test names."""
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Python blocks of a page with the number of their first line."""
    text = page.read_text(encoding="utf-8")
    actual = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in actual]


def running_script(page: Path) -> str:
    """The blocks of a page that run, each at its own lines, so that a traceback shows lines of the page."""
    script = ""
    for first_line, block in python_blocks(page):
        if block.startswith(f"{RUNS}\n"):
            script += "\n" * (first_line - 1 - script.count("\n")) + block
    return script


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=named)
def test_relative_links_lead_somewhere(page):
    """Both the file and the heading that a link names are there."""
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_index_links_every_page():
    linked = {(DOCS / target).resolve() for target in LINK.findall(prose(DOCS / "index.md")) if "#" not in target}
    assert {page for page in PAGES if page.name != "index.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_python_block_compiles(page):
    """Also those that are not run, since they need a download."""
    for first_line, block in python_blocks(page):
        compile("\n" * (first_line - 1) + block, str(page), "exec")


@pytest.mark.integration
@pytest.mark.parametrize("page", [page for page in PAGES if running_script(page)], ids=named)
def test_blocks_marked_to_run_do(page, bundled_folder, tmp_path):
    """In a new process, in a folder that holds nothing but the bundled model, as the index says."""
    shutil.copytree(bundled_folder, tmp_path / "tiny_vlm", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    script = f"exec(compile({running_script(page)!r}, {str(page)!r}, 'exec'))"

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", tables())
def test_the_tables_of_settings_are_those_of_the_declaration(name):
    """`python -m tests.docs.settings_tables` prints them anew."""
    page = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")

    assert "\n".join(tables()[name]) in page


def test_every_error_class_has_its_section():
    classes = [c.__name__ for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, QVLMError)]
    sections = re.findall(r"^## (\w+)$", (DOCS / "reference" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert sorted(classes) == sorted(sections)


@pytest.mark.integration
def test_every_field_of_the_report_is_described(llava_folder):
    """Of a real one, so that a field added in the code is missed here."""
    from transformers import AutoModelForImageTextToText

    from tests.tiny_models import llava_batch

    config = QVLMConfig(dataset=[llava_batch()])
    report = AutoModelForImageTextToText.from_pretrained(llava_folder, quantization_config=config).hf_quantizer.report

    page = (DOCS / "reference" / "report.md").read_text(encoding="utf-8")
    top_level = page.split("\n## ")[0]
    fields = re.findall(r"^\| `(\w+)` \|", top_level, re.MULTILINE)
    assert fields == list(report)
    inner = [report["calibration"], report["bytes"], report["layers"][0], report["sites"][0]]
    names = {name for entry in inner for name in entry} | set(next(iter(report["modules"].values())))
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_accepted_releases_are_those_of_the_package():
    """A bound that is moved is moved on the page too."""
    page = (DOCS / "reference" / "compatibility.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([a-z]+) \| ([^|]*)\|$", page, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name in rows:
            bounds = {each.operator: each.version for each in requirement.specifier}
            until = f" up to, not including, {bounds['<']}" if "<" in bounds else " and newer"
            assert rows[requirement.name].startswith(f"{bounds['>=']}{until}"), requirement.name
    assert {"torch", "triton", "transformers", "accelerate", "optimum"} <= rows.keys()
