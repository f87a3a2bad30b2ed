"""`optimum-cli export qvlm --dry-run`, through the parser that optimum-cli builds."""

import pytest

from tests.tiny_models import tiny_llama


def run(parser, model, output, *options):
    """The command as optimum-cli calls it."""
    words = ["export", "qvlm", "--model", str(model), "--device", "cpu", "--dry-run", *map(str, options), str(output)]
    args = parser.parse_args(words)
    args.func(args).run()


@pytest.mark.integration
def test_the_plan_and_the_estimate_are_printed_and_nothing_is_saved(parser, bundled_folder, tmp_path, capsys):
    run(parser, bundled_folder, tmp_path / "new" / "out", "--num-samples", 2, "--scheme", "w4a4")

    shown = capsys.readouterr().out
    assert "language_model.model.layers.3.mlp.down_proj" in shown
    assert shown.count(" w4a4 ") == 28
    assert "estimate: " in shown
    assert "Saved" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
@pytest.mark.parametrize(
    "options, message",
    [
        (["--group-size", "48"], "does not divide in_features"),
        (["--modules-to-not-convert", "layer.0"], "matches no linear of the model"),
        (["--dataset", "missing.jsonl"], "there is no such file"),
        (["--dataset", "nosuch"], "is not a preset"),
        (["--scheme", "w3"], "unknown scheme"),
    ],
    ids=["group", "pattern", "file", "preset", "scheme"],
)
def test_refusals_exit_with_two(parser, bundled_folder, tmp_path, capsys, options, message):
    """So that scripts stop before the hours, not after."""
    with pytest.raises(SystemExit, match=r"^2$"):
        run(parser, bundled_folder, tmp_path / "out", *options)

    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rounding_to_nearest_is_tried_without_data(parser, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")

    run(parser, tmp_path / "model", tmp_path / "out", "--method", "rtn")

    assert "14 linears in 2 blocks, 1 kept in full precision" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_an_output_that_could_not_be_written_is_refused(parser, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "out").write_text("precious")

    with pytest.raises(SystemExit, match=r"^2$"):
        run(parser, tmp_path / "model", tmp_path / "out")

    assert "is a file; name a folder" in capsys.readouterr().err
