"""The stages of a GPU run: all of them are there, none hangs, and each says how it ended."""

import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.speed import gpu

ROOT = Path(__file__).parents[3]


def stage_of(code, *, limit_seconds=60, needs=None):
    return gpu.Stage(name="one", command=(sys.executable, "-c", code), limit_seconds=limit_seconds, needs=needs)


def listed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--list", *arguments])
    gpu.main()
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_both_devices_have_the_same_kinds_of_stages(monkeypatch, capsys):
    """A dry run says nothing about a stage that it lacks."""
    on_gpu, dry = (listed(monkeypatch, capsys, "--device", device) for device in ("cuda", "cpu"))

    kinds = ["suite", "sanitizer", "kernels", "peers"]
    assert on_gpu[:4] == dry[:4] == kinds
    models = [f"llava-1.5-{size}-batch{batch}" for batch in (1, 4, 16) for size in ("13b", "7b")]
    others = [f"llava-1.5-{size}-{kind}" for kind in ("generate", "calibration") for size in ("13b", "7b")]
    assert on_gpu[4:] == [*models, *others]
    assert dry[4:] == [f"smollm2-135m-{kind}" for kind in ("batch1", "batch4", "generate", "calibration")]


def test_only_the_named_stages_are_taken(monkeypatch, capsys):
    assert listed(monkeypatch, capsys, "--stages", "peers", "suite") == ["suite", "peers"]


def test_an_unknown_stage_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        listed(monkeypatch, capsys, "--stages", "kernel")
    assert "no stage kernel; there are suite, sanitizer, kernels" in capsys.readouterr().err


def test_models_are_timed_at_600_tokens_and_decode_128():
    """576 tokens of the image and 24 of text."""
    stages = [stage for stage in gpu.make_stages("cuda") if "benchmarks.speed.generate" in stage.command]
    assert len(stages) == 6
    for stage in stages:
        joined = " ".join(stage.command)
        assert "--image --prompt 24 --tokens 128" in joined and "--static-cache" in joined and "--compile" in joined
        assert ("w4a16 w4a8 w4a4 w8a8" in joined) == ("--batch 16" not in joined)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_everything_that_a_stage_names_is_there(device):
    parts = {part for stage in gpu.make_stages(device) for part in stage.command}
    tests, modules = ({part for part in parts if mark in part} for mark in (".py", "benchmarks."))
    assert len(tests) == 3 and len(modules) == 5
    assert all((ROOT / test).exists() for test in tests)
    assert all(find_spec(module) is not None for module in modules)


def test_every_file_with_tests_for_a_gpu_is_in_the_suite():
    """The suite names folders, so that what it does not need is not imported."""
    marked = [
        path for path in (ROOT / "tests").rglob("*.py") if "mark.gpu" in path.read_text() and path != Path(__file__)
    ]
    assert len(marked) >= 3
    assert all(any(path.is_relative_to(ROOT / folder) for folder in gpu.GPU_TESTS) for path in marked)


def test_the_last_lines_of_a_stage_are_kept():
    """Its table is last."""
    status, _, output = gpu.run(stage_of("print('\\n'.join(map(str, range(100))))"))

    assert status == "done"
    assert output.splitlines() == [str(number) for number in range(60, 100)]


def test_a_stage_that_fails_says_so_with_what_it_printed():
    status, _, output = gpu.run(stage_of("import sys; print('before'); sys.exit(3)"))
    assert (status, output) == ("failed with status 3", "before")


def test_a_stage_past_its_limit_is_stopped_with_what_it_started():
    """A process that it left behind would hold the pipe, and the run would wait for it."""
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print('row', flush=True); subprocess.run([sys.executable, '-c', '{child}'])"
    started = time.perf_counter()

    status, _, output = gpu.run(stage_of(code, limit_seconds=5))

    assert (status, output) == ("stopped after 5 s", "row")
    assert time.perf_counter() - started < 30


def test_a_stage_whose_program_is_missing_is_not_run():
    status, seconds, output = gpu.run(stage_of("print('ran')", needs="no-such-program"))
    assert (status, seconds, output) == ("not run: there is no no-such-program on the PATH", 0.0, "")


def test_the_package_is_imported_from_beside_the_benchmarks():
    """It need not be installed where it is measured."""
    status, _, output = gpu.run(stage_of("import optimum_qvlm; print(optimum_qvlm.__file__)"))
    assert status == "done"
    assert Path(output) == ROOT / "optimum_qvlm" / "__init__.py"
