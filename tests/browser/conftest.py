"""Chromium as Debian has it, and pages to open in it."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from transformers import AutoModelForImageTextToText

from optimum_qvlm import QVLMConfig
from optimum_qvlm.cli.report import read
from optimum_qvlm.report.page.document import render_comparison, render_page
from optimum_qvlm.report.page.reading import Reading
from tests.report.page.reports import HOSTILE, early_report, full_report, hostile_report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where screenshots go."""
    parser.addoption("--shots", type=Path, help="keep a screenshot of each page and window in this folder")


@dataclass
class Opened:
    """A page in the browser.

    Attributes:
        tab: of the browser.
        said: what the console, errors and the policy said.
        asked: addresses that were asked for.
    """

    tab: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless, without a sandbox, which containers do not allow."""
    path = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    assert path is not None, "install Chromium first: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def bundled_model(bundled_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, calibrated with pictures of held-out samples in its report."""
    sys.path.insert(0, str(bundled_folder))
    from questions import make_samples

    folder = tmp_path_factory.mktemp("bundled") / "tiny-vlm-w4a8"
    settings: dict[str, Any] = {"dataset": make_samples("train", 72, 0), "num_samples": 64, "report_samples": "images"}
    model = AutoModelForImageTextToText.from_pretrained(
        bundled_folder, quantization_config=QVLMConfig("w4a8", **settings)
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pages(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pages: of the model, of a comparison, of an early report, of a deep one, and hostile ones."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copy(bundled_model / "qvlm_report.html", folder / "bundled.html")
    shutil.copy(bundled_model / "qvlm_report.svg", folder / "picture.svg")
    whole = Reading(name="whole", report=full_report(), files={"model.safetensors": 2_100_000})
    written = {
        "whole": render_page(whole),
        "early": render_page(Reading(name="early", report=early_report())),
        "deep": render_page(Reading(name="deep", report=full_report(layers=60, vision=32))),
        "compared": render_comparison(read(str(bundled_model), None, None), whole),
        "empty": render_page(Reading(name="empty", report={})),
    }
    for number, text in enumerate(HOSTILE):
        written[f"hostile-{number}"] = render_page(Reading(name=text, report=hostile_report(text)))
    for name, page in written.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder


@pytest.fixture
def open_page(browser: Browser, pages: Path) -> Iterator[Any]:
    """Opens a page by its name, in a window as wide as asked."""
    contexts = []

    def opened(name: str, *, width: int = 1280, scheme: Any = "light") -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=True)
        contexts.append(context)
        page = Opened(tab=context.new_page())
        page.tab.add_init_script(
            "document.addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.blockedURI))"
        )
        page.tab.on("console", lambda message: page.said.append(message.text))
        page.tab.on("pageerror", lambda error: page.said.append(str(error)))
        page.tab.on("request", lambda request: page.asked.append(request.url))
        page.tab.goto((pages / name).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
