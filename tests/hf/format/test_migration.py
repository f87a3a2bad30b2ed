"""Versions of the format."""

import pytest

from optimum_qvlm.errors import ConfigError
from optimum_qvlm.hf.format import migration
from optimum_qvlm.hf.format.migration import migrate


def test_the_current_version_passes_as_it_is():
    values = {"format_version": 3, "scheme": "w4a8"}

    assert migrate(values, 3) == {"scheme": "w4a8"}
    assert values == {"format_version": 3, "scheme": "w4a8"}, "the digest is computed over it"


def test_settings_without_a_version_are_current():
    """A dict that a user wrote."""
    assert migrate({"scheme": "w4a8"}, 1) == {"scheme": "w4a8"}


def test_older_versions_are_converted_step_by_step(monkeypatch):
    steps = {1: lambda values: values | {"two": True}, 2: lambda values: values | {"three": values["two"]}}
    monkeypatch.setattr(migration, "MIGRATIONS", steps)

    assert migrate({"format_version": 1}, 3) == {"two": True, "three": True}
    assert migrate({"format_version": 2, "two": False}, 3) == {"two": False, "three": False}


@pytest.mark.parametrize("version", [2, 99, "1", None, 1.0, True, [1]])
def test_newer_versions_and_what_is_none_are_refused(version):
    with pytest.raises(ConfigError, match=r"this release of optimum-qvlm reads up to 1; upgrade it: pip install -U"):
        migrate({"format_version": version}, 1)


@pytest.mark.parametrize("version", [0, -1, -(10**30)])
def test_versions_that_nobody_converts_are_refused(version):
    with pytest.raises(ConfigError, match=rf"format version {version}, which this release .* \(it reads 1\); quantize"):
        migrate({"format_version": version}, 1)
