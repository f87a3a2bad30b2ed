"""The ScienceQA protocol on a small folder in the data set's own form."""

import json

import pytest
from PIL import Image

from benchmarks.quality import scienceqa
from optimum_qvlm.errors import DataError

PROBLEMS = {
    "1": {"subject": "natural science", "grade": "grade2", "hint": "", "image": "image.png", "answer": 1},
    "2": {"subject": "social science", "grade": "grade7", "hint": "A hint.", "image": None, "answer": 0},
    "3": {"subject": "language science", "grade": "grade12", "hint": "", "image": None, "answer": 2},
    "4": {"subject": "natural science", "grade": "grade6", "hint": "Look.", "image": "image.png", "answer": 0},
    "5": {"subject": "natural science", "grade": "grade3", "hint": "", "image": "image.png", "answer": 1},
    "6": {"subject": "social science", "grade": "grade8", "hint": "", "image": "image.png", "answer": 0},
}
SPLITS = {"train": ["5", "6"], "val": [], "test": ["1", "2", "3", "4"]}
FIELDS = {"question": "Which one?", "choices": ["red", "green", "blue"], "task": "closed choice", "topic": "colors"}


@pytest.fixture
def data(tmp_path):
    """Six problems with all fields that the real files have, four of them with a picture."""
    problems = {}
    for number, entry in PROBLEMS.items():
        split = next(name for name, members in SPLITS.items() if number in members)
        problems[number] = FIELDS | entry | {"split": split, "category": "", "skill": "", "lecture": "", "solution": ""}
        if entry["image"] is not None:
            folder = tmp_path / "images" / split / number
            folder.mkdir(parents=True)
            Image.new("RGB", (60, 40), (40 * int(number), 0, 0)).save(folder / "image.png")
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps(SPLITS))
    return tmp_path


def change(data, number, **fields):
    """Rewrite fields of one problem."""
    path = data / "problems.json"
    problems = json.loads(path.read_text())
    problems[number] |= fields
    path.write_text(json.dumps(problems))


def test_a_split_is_read_in_its_order(data):
    assert [problem.number for problem in scienceqa.read_problems(data, "test")] == ["1", "2", "3", "4"]
    assert scienceqa.read_problems(data, "val") == []


@pytest.mark.parametrize(
    "place, columns",
    [
        (0, {"NAT", "IMG", "G1-6", "Avg"}),
        (1, {"SOC", "TXT", "G7-12", "Avg"}),
        (2, {"LAN", "NO", "G7-12", "Avg"}),
        (3, {"NAT", "TXT", "IMG", "G1-6", "Avg"}),
    ],
    ids=["picture", "hint", "neither", "both"],
)
def test_a_problem_counts_where_the_protocol_says(data, place, columns):
    """One with hint and picture counts in both; NO is for those with neither."""
    assert set(scienceqa.read_problems(data, "test")[place].columns) == columns


def test_the_prompt_holds_hint_question_and_lettered_choices(data):
    prompt = scienceqa.read_problems(data, "test")[1].prompt

    assert prompt.splitlines()[:5] == ["Context: A hint.", "Which one?", "A. red", "B. green", "C. blue"]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("B", 1),
        ("B.", 1),
        (" (C) because", None),
        ("(C)", 2),
        ("C: blue", 2),
        ("The answer is A.", 0),
        ("BECAUSE: it is. The answer is (B).", 1),
        ("Answer: c", 2),
        ("green", 1),
        ("Green.", 1),
        ("A dog", None),
        ("E", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_answers_are_read_off_the_text(text, wanted):
    """Only a text that names one of the choices counts as an answer."""
    assert scienceqa.read_answer(text, ["red", "green", "blue"]) == wanted


def test_accuracies_are_counted_per_column(data):
    problems = scienceqa.read_problems(data, "test")

    found = scienceqa.accuracies([True, False, True, False], problems)

    assert found == {
        "NAT": 50,
        "SOC": 0,
        "LAN": 100,
        "TXT": 0,
        "IMG": 50,
        "NO": 100,
        "G1-6": 50,
        "G7-12": 50,
        "Avg": 50,
    }


def test_a_column_without_problems_is_empty(data):
    problems = scienceqa.read_problems(data, "test")[:1]

    assert scienceqa.accuracies([True], problems)["SOC"] is None
    row = scienceqa.table({"fp": [True]}, problems, "7b").splitlines()[1]
    assert row.split() == ["fp", "100.00", "-", "-", "-", "100.00", "-", "100.00", "-", "100.00"]


def test_the_table_shows_the_paired_difference_and_what_was_published(data):
    problems = scienceqa.read_problems(data, "test")

    lines = scienceqa.table({"fp": [True] * 4, "rtn": [True, True, True, False]}, problems, "7b").splitlines()

    assert "-25.00 (" in lines[2]
    assert any(line.split()[-1] == "79.79" for line in lines)


def test_calibration_takes_pictures_of_the_train_split(data):
    """Never test problems, and no problem without a picture."""
    records = scienceqa.calibration_records(data, 64, seed=0)

    assert sorted(record["image"].split("/")[-2] for record in records) == ["5", "6"]
    assert {record["answer"] for record in records} == {"A", "B"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"choices": None}, "problem 1 of .* is not whole"),
        ({"grade": "second"}, "problem 1 of .* is not whole"),
        ({"answer": 3}, "problem 1: subject .*, answer 3 of 3 choices"),
        ({"subject": "sports"}, "subject 'sports'.*expected one of natural science"),
        ({"image": "other.png"}, "problem 1: .*other.png is missing; unpack"),
    ],
    ids=["no choices", "grade", "answer", "subject", "picture"],
)
def test_a_damaged_problem_is_named(data, fields, message):
    change(data, "1", **fields)

    with pytest.raises(DataError, match=message):
        scienceqa.read_problems(data, "test")


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"problems.json cannot be read"):
        scienceqa.read_problems(tmp_path, "test")


def test_an_unknown_split_is_refused(data):
    with pytest.raises(DataError, match="no split 'minitest'; it has test, train, val"):
        scienceqa.read_problems(data, "minitest")


@pytest.mark.integration
def test_one_command_gives_the_table(data, bundled_folder, tmp_path, capsys):
    """The whole way on the bundled model: it knows nothing of the questions, but every row is filled."""
    output = tmp_path / "answers.json"

    command = f"--model {bundled_folder} --data {data} --scheme w4a8 --rows fp rtn qvlm --calibration 2"
    scienceqa.main([*command.split(), *f"--batch-size 2 --max-new-tokens 4 --output {output}".split()])

    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("4 problems of test")
    assert [line.split()[0] for line in printed[2:5]] == ["fp", "rtn", "qvlm"]
    saved = json.loads(output.read_text())
    assert {row: set(values["answers"]) for row, values in saved.items()} == {
        row: {"1", "2", "3", "4"} for row in ("fp", "rtn", "qvlm")
    }
