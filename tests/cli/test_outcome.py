"""What reaches the screen, whoever chose it."""

import io

import pytest

from optimum_qvlm.cli.outcome import finish, print_json, say
from optimum_qvlm.errors import CheckpointError


def test_names_do_not_steer_the_terminal(capsys):
    """A checkpoint's names may hold escapes that clear the screen or set its title."""

    def refuse():
        raise CheckpointError("tensor \x1b]0;title\x07\x1b[2J\u202eevil is missing\nnext\tline")

    assert finish("qvlm", refuse) == 2

    assert capsys.readouterr().err == (
        "qvlm: error: tensor \\x1b]0;title\\x07\\x1b[2J\\u202eevil is missing\nnext\tline\n"
    )


@pytest.mark.parametrize("text", ["caf\u00e9", "\udcff", "\ud83d"], ids=["accent", "raw byte", "half"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_every_name_can_be_said_on_every_terminal(text, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)

    say(text, to=stream)

    assert stream.buffer.getvalue().rstrip()


def test_json_of_an_outcome_is_strict(capsys):
    print_json({"name": "\x1b\ud83d"})

    assert capsys.readouterr().out == '{"name": "\\u001b\\ud83d"}\n'
    with pytest.raises(ValueError, match="Out of range float"):
        print_json({"error": float("nan")})
