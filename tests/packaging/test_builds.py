"""What wheels, editable installs and source archives hold; hatchling builds them in this process."""

import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling import build

ROOT = Path(__file__).parents[2]
REGISTERED = {
    "optimum_qvlm/cli/command.py": "optimum/commands/register/register_qvlm.py",
    "optimum_qvlm/cli/qvlm_options.py": "optimum/commands/register/qvlm_options.py",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> zipfile.ZipFile:
    """A wheel of the working tree."""
    monkeypatch.chdir(ROOT)
    return zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path)))


@pytest.fixture
def editable(tmp_path, monkeypatch) -> zipfile.ZipFile:
    """What `pip install -e .` installs."""
    monkeypatch.chdir(ROOT)
    return zipfile.ZipFile(tmp_path / build.build_editable(str(tmp_path)))


def test_a_wheel_holds_the_whole_package(wheel):
    """Every file of the package, data and type marker among them; the files of the command move to optimum's folder."""
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "optimum_qvlm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    files = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert files == sources - set(REGISTERED) | set(REGISTERED.values())
    assert "optimum_qvlm/py.typed" in files
    assert "optimum_qvlm/data/default/samples.jsonl" in files
    assert any(name.startswith("optimum_qvlm/data/default/images/") for name in files)


def test_a_wheel_does_not_close_optimums_namespaces(wheel):
    """An `__init__.py` in one of them would hide optimum's own modules."""
    namespaces = ("optimum/", "optimum/commands/", "optimum/commands/register/")

    assert set(wheel.namelist()).isdisjoint({f"{namespace}__init__.py" for namespace in namespaces})


def test_wheels_and_editable_installs_register_the_same_command(wheel, editable):
    for source, name in REGISTERED.items():
        assert wheel.read(name) == editable.read(name) == (ROOT / source).read_bytes()


def test_an_editable_install_takes_the_package_from_the_working_tree(editable):
    (path_file,) = (name for name in editable.namelist() if name.endswith(".pth"))

    assert editable.read(path_file).decode().split() == [str(ROOT)]
    assert not any(name.startswith("optimum_qvlm/") for name in editable.namelist())


def test_the_version_and_the_licence_are_in_the_metadata(wheel):
    from optimum_qvlm.version import __version__

    folder = f"optimum_qvlm-{__version__}.dist-info"

    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_a_source_archive_can_build_the_wheel(tmp_path, monkeypatch, wheel):
    """Distributions build wheels from it, without the repository."""
    monkeypatch.chdir(ROOT)
    archive = tmp_path / build.build_sdist(str(tmp_path))
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked")
    (folder,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "again").mkdir()

    monkeypatch.chdir(folder)
    rebuilt = zipfile.ZipFile(tmp_path / "again" / build.build_wheel(str(tmp_path / "again")))

    assert sorted(rebuilt.namelist()) == sorted(wheel.namelist())
