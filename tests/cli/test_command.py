"""Options, their help, and what they turn into."""

import os
import re
import shlex
import signal
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser

import pytest

from optimum_qvlm.cli import command, qvlm_options

COMMAND = ["export", "qvlm", "--model", "some/model"]
HELP_AND_LOADED_MODULES = """
import sys
from optimum.commands.optimum_cli import main

sys.argv = ["optimum-cli", "export", "qvlm", "--help"]
try:
    main()
finally:
    print("LOADED", *sorted(sys.modules))
"""


def test_help_shows_every_option_group_and_the_examples(parser, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        parser.parse_args(["export", "qvlm", "--help"])

    text = capsys.readouterr().out
    for title in ("model:", "quantization:", "calibration:", "sharing:", "examples:", "exit status:"):
        assert f"\n{title}\n" in text
    assert "optimum-cli export qvlm --model llava-hf/llava-1.5-7b-hf --scheme w4a8 llava-w4a8/" in text


def test_examples_in_the_help_parse(parser):
    """Examples are copied from the terminal, so a stale one is a bug."""
    joined = (command.EXPORT_EPILOG + command.INFO_EPILOG + command.CHAT_EPILOG).replace("\\\n", " ")
    examples = re.findall(r"^ +optimum-cli (.*)$", joined, flags=re.MULTILINE)

    assert len(examples) == 12
    for example in examples:
        parser.parse_args(shlex.split(example))


def test_help_loads_neither_torch_nor_our_package():
    """optimum-cli imports the command's file on each run, also for commands of others: it must stay cheap."""
    done = subprocess.run([sys.executable, "-c", HELP_AND_LOADED_MODULES], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    help_text, _, loaded = done.stdout.partition("LOADED")
    assert "--vision-scheme" in help_text, "`export qvlm` is not registered: install with `pip install -e .`"
    assert set(loaded.split()).isdisjoint({"torch", "transformers", "optimum_qvlm", "datasets", "triton"})


def setting_options():
    """Default by name of the options that are settings of a configuration and that the help shows."""
    plain = ArgumentParser()
    qvlm_options.add_setting_options(plain)
    shown = [action for action in plain._actions if action.help != SUPPRESS]
    return {action.dest: action.default for action in shown if action.dest not in ("help", "paper")}


def test_only_options_that_were_given_reach_the_configuration(parser):
    """What equals a default may still differ from what the paper's mode has."""
    from optimum_qvlm.cli.export import config_arguments

    given = ["--vision-scheme", "w8a8", "--search", "transforms=auto", "--search", "threshold=none", "--seed", "0"]

    assert config_arguments(parser.parse_args([*COMMAND, "out"])) == {}
    assert config_arguments(parser.parse_args([*COMMAND, "out", "--paper", "4", *given])) == {
        "vision_scheme": "w8a8",
        "search": {"transforms": "auto", "threshold": None},
        "seed": 0,
    }


def test_the_help_still_shows_defaults(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["export", "qvlm", "--help"])

    shown = " ".join(capsys.readouterr().out.split())
    assert "samples to calibrate on (64)" in shown and "same for vision tower and projector; none keeps" in shown
    assert "SUPPRESS" not in shown and "%(default)" not in shown


@pytest.mark.parametrize("task", ["image-text-to-text-with-past", "text-generation-with-past", "auto"])
def test_options_of_other_exporters_are_known(parser, task):
    """Who exports with another command of optimum can write the same here."""
    given = ["-m", "some/model", "--cache_dir", "c", "--variant", "fp16", "--subfolder", "s", "--task", task, "out"]

    args = parser.parse_args(["export", "qvlm", *given])

    found = (args.model, args.cache_dir, args.variant, args.subfolder, args.task)
    assert found == ("some/model", "c", "fp16", "s", task)


def test_every_setting_of_the_configuration_has_an_option():
    """Whoever declares a setting names the title its option stands under, or says here why there is none."""
    from inspect import signature

    from optimum_qvlm import QVLMConfig

    without_option = {"dequantize"}  # of loading a quantized checkpoint, where the command line quantizes

    assert set(signature(QVLMConfig).parameters) - set(setting_options()) == without_option


def test_options_become_the_arguments_of_the_configuration(parser):
    from optimum_qvlm.cli.export import config_arguments

    args = parser.parse_args(
        [
            *COMMAND,
            *("--scheme", "w4a16"),
            *("--vision-scheme", "none"),
            *("--group-size", "64"),
            *("--num-samples", "3"),
            *("--batch-size", "2"),
            *("--max-length", "77"),
            *("--seed", "5"),
            *("--method", "rtn"),
            *("--dataset", "scienceqa"),
            *("--modules-to-not-convert", "projector"),
            *("--modules-to-not-convert", "head"),
            *("--override", "*.layers.0.*=w8a8"),
            *("--override", "a=b=none"),
            *("--override", '*.up_proj={"scheme": "w4a8", "group_size": 32}'),
            "--no-symmetric",
            "--two-level-scales",
            *("--search", "tokens=99"),
            *("--search", "error_feedback=false"),
            *("--search", "weight_clips=1,0.9"),
            *("--encoder", "learning_rate=0.5"),
            *("--processor", "some/processor"),
            "out",
        ]
    )

    expected = {
        "scheme": "w4a16",
        "vision_scheme": None,
        "group_size": 64,
        "num_samples": 3,
        "batch_size": 2,
        "max_length": 77,
        "seed": 5,
        "method": "rtn",
        "dataset": "scienceqa",
        "modules_to_not_convert": ["projector", "head"],
        "overrides": {"*.layers.0.*": "w8a8", "a=b": None, "*.up_proj": {"scheme": "w4a8", "group_size": 32}},
        "symmetric": False,
        "two_level_scales": True,
        "search": {"tokens": 99, "error_feedback": False, "weight_clips": [1.0, 0.9]},
        "encoder": {"learning_rate": 0.5},
        "processor": "some/processor",
    }

    found = config_arguments(args)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("none", None), ("32", 32)])
def test_group_size_takes_words_and_numbers(parser, text, value):
    assert parser.parse_args([*COMMAND, "--group-size", text, "out"]).group_size == value


@pytest.mark.parametrize(
    "options, message",
    [
        (["--group-size", "0"], r"--group-size: must be auto, none or a whole number above 0, got '0'"),
        (["--group-size", "big"], r"--group-size: must be auto, none or a whole number above 0, got 'big'"),
        (["--num-samples", "-1"], r"--num-samples: must be a whole number above 0, got '-1'"),
        (["--batch-size", "1.5"], r"--batch-size: must be a whole number above 0, got '1.5'"),
        (["--override", "layers"], r"--override: must read PATTERN=SCHEME.*got 'layers'"),
        (["--override", "=w4a8"], r"--override: must read PATTERN=SCHEME.*got '=w4a8'"),
        (["--override", "a={w4a8}"], r"--override: what follows = is not JSON"),
        (["--override", '={"scheme":"w4a8"}'], r"--override: must read PATTERN=SCHEME"),
        (["--override", "a=w4a8", "--override", "a=w8a8"], r"--override: pattern 'a' is given twice"),
        (["--method", "awq"], r"--method: invalid choice: 'awq'"),
        (["--search", "tokens"], r"--search: must read NAME=VALUE with one of transforms, .*got 'tokens'"),
        (["--search", "depth=3"], r"--search: must read NAME=VALUE with one of .*got 'depth=3'"),
        (["--search", "tokens=0"], r"--search: tokens: must be a whole number above 0, got '0'"),
        (["--search", "error_feedback=no"], r"--search: error_feedback: must be true or false, got 'no'"),
        (["--encoder", "epochs=many"], r"--encoder: epochs: invalid literal"),
        (["--task", "ocr"], r"--task: must be auto, image-text-to-text or text-generation.*got 'ocr'"),
    ],
)
def test_usage_errors_name_option_and_value_and_exit_with_two(parser, capsys, options, message):
    with pytest.raises(SystemExit, match=r"^2$"):
        parser.parse_args([*COMMAND, *options, "out"])

    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("words", [["--model", "m"], ["out"]], ids=["no output", "no model"])
def test_model_and_output_are_required(parser, capsys, words):
    with pytest.raises(SystemExit, match=r"^2$"):
        parser.parse_args(["export", "qvlm", *words])

    assert "the following arguments are required" in capsys.readouterr().err


@pytest.mark.parametrize("code", [1, 2])
def test_run_raises_the_exit_code(parser, monkeypatch, code):
    """optimum-cli ignores what `run` returns, so only SystemExit reaches the shell."""
    args = parser.parse_args([*COMMAND, "out"])
    monkeypatch.setattr("optimum_qvlm.cli.export.main", lambda _: code)

    with pytest.raises(SystemExit, match=f"^{code}$"):
        args.func(args).run()


def test_interrupts_give_the_shells_code(parser, monkeypatch, capsys):
    """The way a shell reports Ctrl-C, without a traceback."""

    def interrupt(_):
        raise KeyboardInterrupt

    args = parser.parse_args([*COMMAND, "out"])
    monkeypatch.setattr("optimum_qvlm.cli.export.main", interrupt)

    with pytest.raises(SystemExit, match=r"^130$"):
        args.func(args).run()
    assert capsys.readouterr().err == "optimum-cli export qvlm: interrupted\n"


def test_termination_unwinds_and_gives_the_shells_code(parser, monkeypatch, tmp_path):
    """So that `finally` and `with` remove what is temporary; and the handler of before is back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    args = parser.parse_args([*COMMAND, "out"])
    unwound = []

    def work(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)

    monkeypatch.setattr("optimum_qvlm.cli.export.main", work)

    with pytest.raises(SystemExit, match=r"^143$"):
        args.func(args).run()

    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("words", [["info", "model"], ["chat", "model", "question"]], ids=["info", "chat"])
def test_the_other_commands_parse_too(parser, monkeypatch, words):
    args = parser.parse_args(["qvlm", *words])
    monkeypatch.setattr(f"optimum_qvlm.cli.{words[0]}.main", lambda given: 2 if given is args else 0)

    with pytest.raises(SystemExit, match=r"^2$"):
        args.func(args).run()


@pytest.mark.parametrize("words", [["qvlm", "info", "--help"], ["qvlm", "chat", "--help"]])
def test_their_help_has_examples_and_exit_codes(parser, capsys, words):
    with pytest.raises(SystemExit, match=r"^0$"):
        parser.parse_args(words)

    text = capsys.readouterr().out
    assert "\nexamples:\n" in text
    assert "3 the Hub refused" in text


def test_run_returns_when_all_went_well(parser, monkeypatch):
    args = parser.parse_args([*COMMAND, "out"])
    seen = []
    monkeypatch.setattr("optimum_qvlm.cli.export.main", lambda given: seen.append(given) or 0)

    args.func(args).run()

    assert seen == [args]


@pytest.mark.parametrize(
    "given, paper", [([], None), (["--paper"], 4), (["--paper", "6"], 6)], ids=["not asked for", "bare", "with bits"]
)
def test_the_papers_mode_has_four_bits_unless_told(parser, given, paper):
    assert parser.parse_args([*COMMAND, "out", *given]).paper == paper


def test_clips_are_numbers_with_commas(parser, capsys):
    args = parser.parse_args([*COMMAND, "out", "--activation-clips", "1,0.95"])
    assert args.activation_clips == [1.0, 0.95] and not hasattr(args, "weight_clips")

    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([*COMMAND, "out", "--weight-clips", "1;0.9"])
    assert "must be numbers with commas between them" in capsys.readouterr().err


def test_options_of_before_work_and_say_what_they_are_now(parser, capsys):
    from optimum_qvlm.cli.export import config_arguments

    former = ["--search-tokens", "99", "--no-error-feedback", "--encoder-epochs", "3", "--exact-decode"]
    args = parser.parse_args([*COMMAND, "out", "--search", "threshold=0.5", *former])

    assert config_arguments(args) == {
        "search": {"threshold": 0.5, "tokens": 99, "error_feedback": False},
        "encoder": {"epochs": 3},
        "decode_tokens": 0,
    }
    said = capsys.readouterr().err
    assert "--search-tokens is deprecated, write --search tokens=VALUE" in said
    assert "--encoder-epochs is deprecated, write --encoder epochs=VALUE" in said
    assert "--exact-decode is deprecated, write --decode-tokens 0" in said


def test_options_of_before_are_not_in_the_help(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["export", "qvlm", "--help"])

    assert "--encoder-lr" not in capsys.readouterr().out
