"""The command in fresh environments, installed by pip both ways."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]


def share_packages(folder: Path) -> None:
    """Fill `folder` with links to the packages of this environment, leaving out its own optimum-qvlm."""
    folder.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name == "optimum":
            shutil.copytree(entry, folder / entry.name, ignore=shutil.ignore_patterns("register"))
        elif "optimum_qvlm" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)


@pytest.fixture
def python(tmp_path) -> Path:
    """Python of a new environment without optimum-qvlm. It shares the rest, which spares downloads."""
    venv.create(tmp_path / "venv")
    share_packages(tmp_path / "shared")
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (site / "shared.pth").write_text(f"{tmp_path / 'shared'}\n")
    return tmp_path / "venv" / "bin" / "python"


def show_help(python: Path, folder: Path) -> str:
    """What `optimum-cli export qvlm --help` prints outside the repository.

    Without our command that is the help of `optimum-cli export`.
    """
    command = [python, "-m", "optimum.commands.optimum_cli", "export", "qvlm", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--editable"]], ids=["wheel", "editable"])
def test_an_install_adds_the_command_and_an_uninstall_removes_it(python, tmp_path, mode):
    """Twice installed must not register twice, and nothing may stay behind in optimum's folders."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    before = show_help(python, tmp_path)

    for _ in range(2):
        subprocess.run([*pip, *INSTALL, *mode, str(ROOT)], check=True, timeout=120)
    installed = show_help(python, tmp_path)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "optimum-qvlm"], check=True, timeout=60)

    assert "usage: optimum-cli export qvlm" in installed
    assert "usage: optimum-cli export qvlm" not in before
    assert show_help(python, tmp_path) == before
